"""Planted variants of the trainer's token path, one for every row of the truth table that a run can be tested for.

A plant replaces one part of a `TokenPath`. `stage` is the stage that isolation must name, None where it must pass;
`training` and `release` are what the truth table of docs/fusion-path.md says of it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from attacks.bugs import fusion
from attacks.fusion import noise as checks
from attacks.fusion.path import Stage, TokenPath
from dpaudit.documents import LedgerStatus
from dpaudit.randomness import Key
from trainers.inputs import Rows, UnitInputs
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """What fusion noise is drawn for: `ids` and `contents` of the pictures, `shape` of one picture's noise."""

    key: Key
    step: int
    ids: Sequence[str]
    contents: Sequence[bytes]
    shape: tuple[int, int]


Draw = Callable[[Asked], Floats]  # (pictures, *shape), standard normal


@dataclass(frozen=True)
class Plant:
    """One variant. `noise` names the noise check that must fail, where one must."""

    name: str
    what: str
    source: str
    apply: Callable[[TokenPath], TokenPath]
    training: LedgerStatus
    stage: Stage | None = None
    noise: str | None = None


def _reducer(make: Callable[[VisionLanguageModel], fusion.Reduce]) -> Callable[[TokenPath], TokenPath]:
    def plant(path: TokenPath) -> TokenPath:
        path.model.reducer = make(path.model)
        return path

    return plant


def _loss(path: TokenPath) -> TokenPath:
    path.model.losses = fusion.token_mean(path.model)  # type: ignore[method-assign, assignment]
    return path


def _padding(path: TokenPath) -> TokenPath:
    path.model.logits = fusion.padded_positions(path.model)  # type: ignore[method-assign, assignment]
    return path


class PlantedNoise(UnitInputs):
    """Inputs whose fusion noise comes from somewhere else than it should."""

    def __init__(self, model: VisionLanguageModel, units: Sequence[Unit], draw: Draw) -> None:
        super().__init__(model, units)
        self.draw = draw
        self.members = [list(unit.pictures) for unit in units]

    def select(self, units: Sequence[int], *, key: Key | None = None, step: int = 0, fusion_std: float = 0.0) -> Rows:
        """The rows with the planted noise."""
        rows = super().select(units)
        if fusion_std <= 0 or not self.fused or not len(rows.tokens):
            return rows
        assert key is not None
        pictures = [picture for unit in units for picture in self.members[unit]]
        asked = Asked(
            key,
            step,
            [item.id for item in pictures],
            [item.pixels.tobytes() for item in pictures],
            (self.fused, rows.tokens.shape[2]),
        )
        noise = torch.from_numpy(self.draw(asked)).to(rows.tokens) * fusion_std
        head, tail = rows.tokens[:, : -self.fused], rows.tokens[:, -self.fused :]
        return replace(rows, tokens=torch.cat([head, tail + noise], dim=1))


def _noise(draw_for: Callable[[TokenPath], Draw]) -> Callable[[TokenPath], TokenPath]:
    def plant(path: TokenPath) -> TokenPath:
        draw = draw_for(path)
        return replace(path, encode=lambda units: PlantedNoise(path.model, units, draw))

    return plant


def _shared_over_batch(asked: Asked) -> Floats:
    one = asked.key.normal(asked.shape, step=asked.step, name="everybody", purpose="fusion")
    return np.repeat(one[None], len(asked.ids), axis=0)


def _shared_over_steps(asked: Asked) -> Floats:
    return np.stack([asked.key.normal(asked.shape, step=0, name=name, purpose="fusion") for name in asked.ids])


def _seeded_by_content(asked: Asked) -> Floats:
    seeds = [int.from_bytes(hashlib.sha256(content).digest()[:8], "big") for content in asked.contents]
    return np.stack(
        [np.random.default_rng([seed, asked.step]).standard_normal(asked.shape, np.float32) for seed in seeds]
    )


def _without_key(asked: Asked) -> Floats:
    public = Key.from_seed(0)
    return np.stack([public.normal(asked.shape, step=asked.step, name=name, purpose="fusion") for name in asked.ids])


def _gradient_values(path: TokenPath) -> Draw:
    def draw(asked: Asked) -> Floats:
        noise, size = path.noise(asked.key, asked.step), int(np.prod(asked.shape))
        values = np.concatenate([noise[name].detach().flatten().cpu().numpy() for name in sorted(noise)])
        starts = [sum(name.encode()) * 97 % (len(values) - size) for name in asked.ids]
        return np.stack([values[at : at + size].reshape(asked.shape) for at in starts])

    return draw


def _gradient_stream(path: TokenPath) -> Draw:
    names = sorted(path.parameters)

    def draw(asked: Asked) -> Floats:
        chosen = [names[sum(name.encode()) % len(names)] for name in asked.ids]
        return np.stack([asked.key.normal(asked.shape, step=asked.step, name=name) for name in chosen])

    return draw


REASONING = "design reasoning; no public case found"
PER_EXAMPLE: LedgerStatus = "per-example preprocessing"
BROKEN: LedgerStatus = "UNACCOUNTED"

PLANTS: tuple[Plant, ...] = (
    Plant(
        "batch-count",
        "K is an outlier rule over the attention of the whole batch.",
        "42Shawn/LLaVA-PruMerge at 1ca8b2b, outlier_dectection",
        _reducer(fusion.batch_count),
        BROKEN,
        stage="selection",
    ),
    Plant(
        "batch-centres",
        "Tokens are fused around centres that are means over the batch.",
        REASONING,
        _reducer(fusion.batch_centres),
        BROKEN,
        stage="centres",
    ),
    Plant(
        "batch-merged",
        "Fused tokens are pulled towards the batch's mean.",
        REASONING,
        _reducer(fusion.batch_merged),
        BROKEN,
        stage="fusion",
    ),
    Plant(
        "batch-normalised",
        "Tokens are normalised by statistics of the batch.",
        "Opacus issues 308 and 340",
        _reducer(fusion.batch_normalised),
        BROKEN,
        stage="normalisation",
    ),
    Plant(
        "padded-positions",
        "Positions count the padding, so they follow the longest record.",
        "left padding without position ids; " + REASONING,
        _padding,
        BROKEN,
        stage="padding",
    ),
    Plant(
        "token-mean",
        "The loss is Hugging Face's mean over all answer tokens of the batch.",
        "transformers' outputs.loss (measured: x 2.75)",
        _loss,
        BROKEN,
        stage="loss",
    ),
    Plant(
        "noise-shared-over-batch",
        "One fusion-noise vector for the whole batch.",
        'torch.vmap(randomness="same")',
        _noise(lambda _: _shared_over_batch),
        PER_EXAMPLE,
        noise=checks.PICTURES,
    ),
    Plant(
        "noise-shared-over-steps",
        "Each picture's fusion noise is the same in every step.",
        REASONING,
        _noise(lambda _: _shared_over_steps),
        PER_EXAMPLE,
        noise=checks.OVER_STEPS,
    ),
    Plant(
        "noise-seeded-by-content",
        "Fusion noise is seeded by a hash of the picture.",
        REASONING,
        _noise(lambda _: _seeded_by_content),
        PER_EXAMPLE,
        noise=checks.CONTENT,
    ),
    Plant(
        "noise-without-key",
        "Fusion noise comes from a public seed.",
        REASONING,
        _noise(lambda _: _without_key),
        PER_EXAMPLE,
        noise=checks.KEYED,
    ),
    Plant(
        "noise-is-gradient-noise",
        "Fusion noise is cut out of the gradient noise of the same step.",
        REASONING,
        _noise(_gradient_values),
        BROKEN,
        noise=checks.APART,
    ),
    Plant(
        "noise-of-gradient-stream",
        "Fusion noise is drawn from a parameter's address of the noise stream.",
        REASONING,
        _noise(_gradient_stream),
        BROKEN,
        noise=checks.APART,
    ),
)


def plant(name: str) -> Plant:
    """One by name; KeyError if there is none."""
    return {item.name: item for item in PLANTS}[name]
