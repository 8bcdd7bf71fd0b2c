"""Public synthetic pictures with the questions of the embedded data set; no handwriting of anybody is in them."""

from typing import Literal

import numpy as np

from trainers.public.glyphs import Style as GlyphStyle
from trainers.public.glyphs import glyphs
from trainers.public.scene import pictures
from trainers.records import Dataset, Picture, Unit

Style = Literal["base", "shifted"]
SHARES: dict[str, tuple[tuple[GlyphStyle, float], ...]] = {
    "base": (("strokes", 0.8), ("fonts", 0.2)),
    "shifted": (("shifted-strokes", 0.9), ("shifted-fonts", 0.1)),
}


def synthetic_pictures(style: Style, n: int, rng: np.random.Generator, prefix: str = "public") -> tuple[Picture, ...]:
    """`n` pictures: drawn digits, equally frequent, in a style that the base model saw (`base`) or did not."""
    kinds = [kind for kind, _ in SHARES[style]]
    chosen = rng.choice(len(kinds), size=n, p=[share for _, share in SHARES[style]])
    digits = rng.permutation(np.arange(n) % 10)
    drawn = [glyphs(kinds[kind], [int(digit)], rng)[0] for kind, digit in zip(chosen, digits, strict=True)]
    return pictures([f"{prefix}-{index:06d}" for index in range(n)], np.stack(drawn), digits.tolist(), rng)


def synthetic_vqa(style: Style, n: int, seed: int) -> Dataset:
    """A data set of `n` training pictures and 500 test pictures: `shifted` is the public stand-in for private data.

    Every hyper-parameter of the base model and of fine-tuning it is chosen on these.
    """
    rng = np.random.default_rng([seed, n, len(style)])

    def units(count: int, split: str) -> tuple[Unit, ...]:
        return tuple(Unit(item.id, (item,)) for item in synthetic_pictures(style, count, rng, f"{style}-{split}"))

    return Dataset(
        name=f"synthetic-{style}",
        unit="image (with all its questions)",
        train=units(n, "train"),
        test=units(500, "test"),
        reserve=units(max(n // 4, 10), "reserve"),
    )
