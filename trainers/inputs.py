"""The units of a run, ready for the language model: reduced visual tokens and packed questions, computed once.

The tower is frozen, so a picture's tokens are a fixed function of that picture alone. They live in memory for the
length of the run and are never written. Fusion noise is added fresh at every use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit.randomness import Key
from trainers.prompts import Packed
from trainers.records import Picture, Unit
from trainers.reducers import Reduced
from trainers.vlm import VisionLanguageModel

PURPOSE = "fusion"


@dataclass(frozen=True)
class Rows:
    """A selection of units: R rows (pictures) of U units, all rows of a unit adjacent.

    tokens: (R, M, D). packed: R rows. owner: (R,) int64, index of the row's unit within the selection. weight: (R,)
    float32, questions of the row / questions of its unit, so that a unit's weighted sum of row losses is the mean
    over its questions.
    """

    tokens: Tensor
    packed: Packed
    owner: Tensor
    weight: Tensor
    units: int


def fusion_noise(key: Key, *, step: int, picture: str, shape: tuple[int, ...], std: float) -> npt.NDArray[np.float32]:
    """Noise for one picture's fused tokens at one step: independent over pictures and steps, blind to content.

    Keyed by the picture's id, not by its place in the batch, so that no other record can change it.
    """
    values: npt.NDArray[np.float32] = key.normal(shape, step=step, name=picture, purpose=PURPOSE) * np.float32(std)
    return values


class UnitInputs:
    """Model inputs of a list of units, with random access by unit index."""

    def __init__(
        self,
        model: VisionLanguageModel,
        units: Sequence[Unit],
        *,
        progress: Callable[[int, int], None] | None = None,
        batch_size: int = 128,
    ) -> None:
        pictures: list[Picture] = []
        starts: list[int] = [0]
        for unit in units:
            pictures.extend(unit.pictures)
            starts.append(len(pictures))
        self.units = len(units)
        self.ids = [picture.id for picture in pictures]
        self._starts = starts
        self._model = model
        self._packed = model.prompter.pack(pictures)
        parts: list[Reduced] = []
        for at in range(0, len(pictures), batch_size):
            chunk = [picture.pixels for picture in pictures[at : at + batch_size]]
            parts.append(model.reduce(model.visual_tokens(chunk)))
            if progress is not None:
                progress(min(at + batch_size, len(pictures)), len(pictures))
        self._tokens = torch.cat([part.tokens for part in parts]) if parts else torch.empty(0)
        self.fused = parts[0].fused if parts else 0
        questions = [len(picture.questions) for picture in pictures]
        self._weight = torch.zeros(len(pictures))
        for index in range(self.units):
            mine = slice(starts[index], starts[index + 1])
            total = sum(questions[mine])
            self._weight[mine] = torch.tensor([count / total for count in questions[mine]])

    def rows_of(self, unit: int) -> int:
        """Number of pictures of a unit."""
        return self._starts[unit + 1] - self._starts[unit]

    def select(self, units: Sequence[int], *, key: Key | None = None, step: int = 0, fusion_std: float = 0.0) -> Rows:
        """The rows of some units; with `fusion_std` > 0, noise keyed by (key, step, picture id) on fused tokens."""
        index = [row for unit in units for row in range(self._starts[unit], self._starts[unit + 1])]
        owner = [place for place, unit in enumerate(units) for _ in range(self.rows_of(unit))]
        device = self._model.device
        chosen = torch.tensor(index, dtype=torch.int64)
        tokens = self._tokens[chosen.to(self._tokens.device)]
        if fusion_std > 0 and self.fused and index:
            assert key is not None
            shape = (self.fused, tokens.shape[2])
            noise = np.stack(
                [fusion_noise(key, step=step, picture=self.ids[row], shape=shape, std=fusion_std) for row in index]
            )
            tokens = torch.cat(
                [tokens[:, : -self.fused], tokens[:, -self.fused :] + torch.from_numpy(noise).to(tokens)], dim=1
            )
        return Rows(
            tokens.to(device),
            self._packed[chosen].to(device),
            torch.tensor(owner, dtype=torch.int64, device=device),
            self._weight[chosen].to(device),
            len(units),
        )

    def chunks(self, units: Sequence[int], rows_at_once: int) -> list[list[int]]:
        """Split units into physical batches of at most `rows_at_once` rows; a unit is never split."""
        out: list[list[int]] = []
        used = 0
        for unit in units:
            rows = self.rows_of(unit)
            if not out or used + rows > rows_at_once:
                out.append([])
                used = 0
            out[-1].append(unit)
            used += rows
        return out

    @property
    def longest(self) -> int:
        """Text tokens of the longest row."""
        return int(self._packed.input_ids.shape[1])
