"""Accounted fusion: visual tokens that may leave the trust boundary, because they pass through one Gaussian mechanism.

All released tokens of a unit (CLS, dominant and fused ones of all its pictures) are one vector f. It is clipped to
norm R, and N(0, (zR)^2) is added to every coordinate, once for each picture of the run: f R / max(R, |f|) + zR N(0, I).
Replacing the unit by nothing (zero-out) moves f by at most R, so mu = 1/z; replacing it by another moves it by at most
2R, so mu = 2/z. Selection, clusters and fusion are covered, since nothing of them but f leaves. What is *not* covered:
that the unit is there at all (a published row shows it), how many pictures it has, and their sizes.

The joint norm is what makes this cheap: clipping each of M tokens to R would cost sqrt(M) times as much.

Training uses the published tokens and nothing else of a picture, in all epochs, so the release counts once. For the
model they are shrunk by the public factor 1 / (1 + d z^2), d the coordinates of a picture: the linear estimate of a
vector of norm R from itself plus that noise. Without it the noise, of norm sqrt(d) zR, would swamp the language model.
Test pictures are clipped and shrunk alike, and never noised.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpaudit.config import RunConfig
from dpaudit.errors import DpauditError, UsageError
from dpaudit.randomness import Key
from trainers.records import Picture, Unit, pixels_sha256
from trainers.reducers import Reduced, Reducer, VisualTokens
from trainers.vlm import Encoded, VisionLanguageModel

PURPOSE = "token release"


def shrinkage(coordinates: int, multiplier: float) -> float:
    """1 / (1 + d z^2), a public number."""
    return 1.0 / (1.0 + coordinates * multiplier**2)


def clip_factor(tokens: Sequence[Tensor], radius: float) -> float:
    """min(1, R / joint norm) of all `tokens` together; 0 when that norm is not finite."""
    squares = sum(float(item.double().square().sum()) for item in tokens)
    if not math.isfinite(squares):
        return 0.0
    norm = math.sqrt(squares)
    return 1.0 if norm <= radius else radius / norm


@dataclass(frozen=True)
class TokenRelease:
    """The mechanism. radius: R, chosen without looking at private pictures. multiplier: z."""

    radius: float
    multiplier: float
    key: Key

    @property
    def std(self) -> float:
        """Standard deviation of the noise on every coordinate: z R."""
        return self.multiplier * self.radius

    def clipped(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of one unit, (M, D) a picture, scaled together to a joint norm of at most R; float32."""
        factor = clip_factor(tokens, self.radius)
        if factor == 0.0:
            return [torch.zeros_like(item, dtype=torch.float32) for item in tokens]
        return [item.float() * factor for item in tokens]

    def publish(self, tokens: Sequence[Tensor], pictures: Sequence[str]) -> list[Tensor]:
        """Clipped and noised: what may leave. The noise follows from the key and the picture's id alone."""
        noise = [self.key.normal(tuple(item.shape), step=0, name=name, purpose=PURPOSE)
                 for item, name in zip(tokens, pictures, strict=True)]  # fmt: skip
        return [
            item + self.std * torch.from_numpy(values).to(item.device)
            for item, values in zip(self.clipped(tokens), noise, strict=True)
        ]

    def __call__(self, units: Sequence[Unit], encoded: Sequence[Encoded]) -> list[Encoded]:
        """Model inputs made of published tokens, for the pictures of `units` in their order.

        Raises DpauditError when two different pictures share an id: they would share their noise, and it would cancel.
        """
        seen: dict[str, Picture] = {}
        for picture in (picture for unit in units for picture in unit.pictures):
            other = seen.setdefault(picture.id, picture)
            if other is not picture and pixels_sha256(other.images[0]) != pixels_sha256(picture.images[0]):
                raise DpauditError(
                    f"fusion.release: two pictures have the id {picture.id!r}; each needs noise of its own"
                )
        out: list[Encoded] = []
        for unit in units:
            mine = encoded[len(out) : len(out) + len(unit.pictures)]
            published = self.publish([item.tokens for item in mine], [picture.id for picture in unit.pictures])
            out += [
                replace(item, tokens=self.estimate(tokens).to(item.tokens.dtype))
                for item, tokens in zip(mine, published, strict=True)
            ]
        return out

    def estimate(self, tokens: Tensor) -> Tensor:
        """What the model sees of the published tokens of one picture, (M, D)."""
        return tokens * shrinkage(tokens.numel(), self.multiplier)


def release_of(config: RunConfig, key: Key) -> TokenRelease | None:
    """The release that a configuration asks for; None for `fusion.release=none`."""
    if config.fusion.release == "none":
        return None
    assert config.fusion.radius is not None and config.fusion.multiplier is not None
    return TokenRelease(config.fusion.radius, config.fusion.multiplier, key)


def clipping(reducer: Reducer, radius: float, multiplier: float) -> Reducer:
    """`reducer` with each picture's tokens clipped to R and shrunk as in training, without noise: for test pictures."""

    def reduce(visual: VisualTokens) -> Reduced:
        own = reducer(visual)
        norms = own.tokens.float().flatten(1).norm(dim=1).clamp(min=radius)
        factors = radius / norms * shrinkage(own.tokens[0].numel(), multiplier)
        return replace(own, tokens=own.tokens * factors.to(own.tokens.dtype).view(-1, 1, 1))

    return reduce


def for_questions(model: VisionLanguageModel, config: RunConfig) -> None:
    """Make `model` see new pictures as a run with a release was trained to; nothing for other runs."""
    chosen = config.fusion
    if chosen.release != "none":
        assert chosen.radius is not None and chosen.multiplier is not None
        model.reducer = clipping(model.reducer, chosen.radius, chosen.multiplier)


def public_norms(model: VisionLanguageModel, count: int = 200) -> list[float]:
    """Joint token norms of `count` public synthetic pictures under the model's reducer, ascending: to choose R by."""
    from trainers.public.synthetic import synthetic_pictures

    pictures = synthetic_pictures("base", count, np.random.default_rng(0))
    tokens = [item.tokens for item in model.encoded([picture.pixels for picture in pictures])]
    return sorted(float(item.double().norm()) for item in tokens)


def main(arguments: Sequence[str], say: Callable[[str], None] = print) -> None:
    """`python -m trainers.fusion [key.sub=value …]`: token norms of public pictures under that model and reducer."""
    from dpaudit.config import resolve

    config = resolve({"method": "dual-priv"}, arguments)
    model = VisionLanguageModel.load(config.model.path, device=config.model.device)
    model.set_reducer(config.reducer)
    norms = public_norms(model)
    say(f"reducer {config.reducer.name}: joint token norm of {len(norms)} public pictures")
    for share in (0.1, 0.5, 0.9):
        say(f"  {share:.0%} below {norms[int(share * len(norms))]:.4g}")


if __name__ == "__main__":
    import sys

    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"{error}")
