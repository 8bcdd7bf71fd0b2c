"""The units of a run, ready for the language model: reduced visual tokens and packed questions, computed once.

The tower is frozen, so a picture's tokens are a fixed function of that picture alone. They live in memory for the
length of the run, or in its feature cache (trainers.features). Fusion noise is added fresh at every use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit.errors import DpauditError
from dpaudit.randomness import Key
from trainers.features import Features
from trainers.generation import Encoded, pad_tokens
from trainers.prompts import IGNORE, Packed, stack_heads
from trainers.records import Picture, Unit

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel

PURPOSE = "fusion"


@dataclass(frozen=True)
class Rows:
    """A selection of units: R rows of U units, all rows of a unit adjacent.

    A row is a picture with all its questions, however many tiles it has; where a family can't pack questions, it is
    one question about a picture. tokens: (R, M, D). packed: R rows. owner: (R,) int64, index of the row's unit within
    the selection. weight: (R,) float32, questions of the row / questions of its unit, so that a unit's weighted sum of
    row losses is the mean over its questions.

    Raises DpauditError where the rows are not those of whole units: what is clipped would not be one unit's gradient.
    """

    tokens: Tensor
    packed: Packed
    owner: Tensor
    weight: Tensor
    units: int

    def __post_init__(self) -> None:
        counts = {self.tokens.shape[0], self.packed.rows, len(self.owner), len(self.weight)}
        if len(counts) != 1:
            raise DpauditError(
                f"rows of {self.units} units: tokens, questions, owners and weights count {sorted(counts)}; each unit "
                "needs the same rows in all four, tiles and patches are no rows"
            )
        if self.owner.device.type == "cpu":  # once, before a copy to a device, where looking would make it wait
            shares = torch.zeros(self.units).index_add(0, self.owner, self.weight.detach().float())
            if not bool(((shares - 1).abs() < 1e-4).all()) or not bool((self.owner.diff() >= 0).all()):
                raise DpauditError(
                    f"rows of {self.units} units: a unit's rows are split, missing or doubled; sampling, clipping and "
                    "counting go by whole units"
                )

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on a device."""
        if self.tokens.device == torch.device(device):
            return self
        moved = self.tokens.to(device), self.packed.to(device), self.owner.to(device), self.weight.to(device)
        return Rows(*moved, self.units)

    def unit(self, index: int) -> "Rows":
        """The rows of one unit alone."""
        mine = (self.owner == index).nonzero()[:, 0]
        packed = self.packed[mine]
        tokens = self.tokens[mine]
        if packed.head is not None:
            tokens = tokens[:, : int(packed.head.slot.max()) + 1]  # without the padding for pictures with more tokens
        return Rows(tokens, packed, torch.zeros_like(mine), self.weight[mine], 1)


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
        model: "VisionLanguageModel",
        units: Sequence[Unit],
        *,
        features: Features | None = None,
        progress: Callable[[int, int], None] | None = None,
        batch_size: int = 128,
        release: Callable[[Sequence[Unit], Sequence[Encoded]], list[Encoded]] | None = None,
    ) -> None:
        pictures = [picture for unit in units for picture in unit.pictures]
        asked = [(question, len(picture.images)) for picture in pictures for question in picture.questions]
        model.vouch(asked, answers=True)
        rows = [_questions(unit, model.family.packs) for unit in units]
        self.units = len(units)
        self._starts: list[int] = [0, *np.cumsum([len(row) for row in rows], dtype=np.int64).tolist()]
        self._model = model
        self._packed = model.prompter.pack([picture for unit in rows for picture in unit])
        self._weight = torch.cat([_shares(unit) for unit in rows]) if rows else torch.zeros(0)
        # Which picture a row shows: its place in the list, since ids may repeat in planted or foreign data.
        spread = [len(picture.questions) if not model.family.packs else 1 for picture in pictures]
        self._picture = np.repeat(np.arange(len(pictures)), spread)
        self.ids = [pictures[index].id for index in self._picture]
        self._encoded: list[Encoded] = []
        for at in range(0, len(pictures), batch_size):
            shown = [picture.images for picture in pictures[at : at + batch_size]]
            chunk = [image for pictures_of_row in shown for image in pictures_of_row]
            found = iter(model.encoded(chunk) if features is None else features.encoded(model, chunk))
            joined = [model.shown([next(found) for _ in pictures_of_row]) for pictures_of_row in shown]
            self._encoded += [replace(item, tokens=item.tokens.cpu()) for item in joined]  # few are in use at once
            if progress is not None:
                progress(min(at + batch_size, len(pictures)), len(pictures))
        if release is not None:  # published tokens take the place of the pictures' own (trainers.fusion)
            self._encoded = release(units, self._encoded)
        self.fused = self._encoded[0].fused if self._encoded else 0

    def rows_of(self, unit: int) -> int:
        """Number of rows of a unit."""
        return self._starts[unit + 1] - self._starts[unit]

    def select(self, units: Sequence[int], *, key: Key | None = None, step: int = 0, fusion_std: float = 0.0) -> Rows:
        """The rows of some units; with `fusion_std` > 0, noise keyed by (key, step, picture id) on fused tokens."""
        index = [row for unit in units for row in range(self._starts[unit], self._starts[unit + 1])]
        owner = [place for place, unit in enumerate(units) for _ in range(self.rows_of(unit))]
        shown = [self._encoded[self._picture[row]] for row in index]
        tokens = pad_tokens([item.tokens for item in shown])
        if fusion_std > 0 and self.fused and index:
            assert key is not None
            noisy = []
            for row, item in zip(index, shown, strict=True):
                shape = (item.fused, tokens.shape[2])
                noise = fusion_noise(key, step=step, picture=self.ids[row], shape=shape, std=fusion_std)
                fused = item.tokens[-item.fused :].float() + torch.from_numpy(noise).to(tokens.device)
                noisy.append(torch.cat([item.tokens[: -item.fused], fused.to(tokens.dtype)]))
            tokens = pad_tokens(noisy)
        chosen = torch.tensor(index, dtype=torch.int64)
        packed = replace(self._packed[chosen], head=stack_heads([item.head for item in shown]))
        owners = torch.tensor(owner, dtype=torch.int64)
        return Rows(tokens, packed, owners, self._weight[chosen], len(units)).to(self._model.device)

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
    def answers(self) -> int:
        """Most tokens that a row has to learn."""
        return int((self._packed.targets != IGNORE).sum(dim=1).max()) if len(self._packed.targets) else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row: its head, with the picture in it, and its text."""
        text = (self._packed.segment >= 0).sum(dim=1).tolist()
        heads = [len(self._encoded[index].head.slot) for index in self._picture]
        return max((head + words for head, words in zip(heads, text, strict=True)), default=0)


def _questions(unit: Unit, packs: bool) -> list[Picture]:
    """The rows of a unit: its pictures, or one copy of a picture for each question where a family can't pack them."""
    if packs:
        return list(unit.pictures)
    return [picture.derived(questions=(question,)) for picture in unit.pictures for question in picture.questions]


def _shares(rows: Sequence[Picture]) -> Tensor:
    """(rows,) questions of each row as a share of the unit's questions."""
    total = sum(len(row.questions) for row in rows)
    return torch.tensor([len(row.questions) / total for row in rows], dtype=torch.float32)
