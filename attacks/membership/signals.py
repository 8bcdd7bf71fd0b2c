"""What one forward pass through a model says of each record: everything that the cheap attacks are made of.

A record is a unit: its pictures with all their questions. Token signals belong to answer tokens (what is trained on);
entropies belong to the positions of three slices: picture tokens, question tokens, answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainers.forward import embed, hidden_states
from trainers.inputs import Rows, UnitInputs
from trainers.prompts import IGNORE
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SLICES = ("image", "question", "answer")
ORDERS = (0.5, 1.0, 2.0, float("inf"))  # of the Renyi entropies
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Signals:
    """One model's view of U records.

    loss: (U,), the mean over questions of the mean over answer tokens. For the T answer tokens of all records: owner
    (T,), the record; log_p (T,), log probability of the right token; mean, spread (T,): of log p under the model's own
    next-token law. entropies: for each slice, (owner (P,), values (P, 4)), Renyi entropies of orders 0.5, 1, 2 and
    infinity at its P positions.
    """

    loss: Floats
    owner: Indices
    log_p: Floats
    mean: Floats
    spread: Floats
    entropies: dict[str, tuple[Indices, Floats]]

    @property
    def records(self) -> int:
        """U."""
        return self.loss.size


def renyi_entropies(log_p: Tensor) -> Tensor:
    """(N, 4) Renyi entropies log(sum p^a) / (1 - a) of N laws, log_p (N, V); order 1: Shannon, infinity: -log max."""
    p = log_p.exp()
    half = 2.0 * torch.logsumexp(0.5 * log_p, dim=-1)
    shannon = -(p * log_p).sum(dim=-1)
    two = -torch.logsumexp(2.0 * log_p, dim=-1)
    return torch.stack([half, shannon, two, -log_p.max(dim=-1).values], dim=-1)


@torch.no_grad()
def signals(model: VisionLanguageModel, units: Sequence[Unit], *, inputs: UnitInputs | None = None) -> Signals:
    """One forward pass over `units` under `model` with its reducer, without fusion noise.

    inputs: the encoded units, if the caller has them.
    """
    encoded = inputs or UnitInputs(model, units)
    parts = [
        _of_rows(model, encoded.select(chunk), chunk[0]) for chunk in encoded.chunks(range(encoded.units), ROWS_AT_ONCE)
    ]
    if not parts:
        nothing = np.empty(0), np.empty((0, len(ORDERS)))
        empty = np.empty(0, dtype=np.int64)
        return Signals(nothing[0], empty, *(nothing[0],) * 3, dict.fromkeys(SLICES, (empty, nothing[1])))
    return Signals(
        loss=np.concatenate([part.loss for part in parts]),
        owner=np.concatenate([part.owner for part in parts]),
        log_p=np.concatenate([part.log_p for part in parts]),
        mean=np.concatenate([part.mean for part in parts]),
        spread=np.concatenate([part.spread for part in parts]),
        entropies={
            name: (
                np.concatenate([part.entropies[name][0] for part in parts]),
                np.concatenate([part.entropies[name][1] for part in parts]),
            )
            for name in SLICES
        },
    )


def _of_rows(model: VisionLanguageModel, rows: Rows, first: int) -> Signals:
    """Signals of whole units; `first` is the index of the first one."""
    packed, device = rows.packed, model.device
    embedded = embed(model, rows)
    hidden = hidden_states(model, embedded)
    text = hidden[:, embedded.head :]
    wanted = packed.targets != IGNORE
    log_p = model.family.output(text[wanted]).float().log_softmax(dim=-1)
    targets = packed.targets[wanted].unsqueeze(1)
    right = log_p.gather(1, targets)[:, 0]
    p = log_p.exp()
    mean = (p * log_p).sum(dim=-1)
    spread = ((p * log_p.square()).sum(dim=-1) - mean.square()).clamp(min=0).sqrt()
    row = wanted.nonzero()[:, 0]
    weight = packed.weights[wanted] * rows.weight[row]
    loss = torch.zeros(rows.units, device=device).index_add(0, rows.owner[row], -right * weight)
    assert packed.head is not None
    asked = (packed.segment >= 0) & ~wanted
    shown = packed.head.slot >= 0
    slices = {"image": (shown, hidden[:, : embedded.head]), "question": (asked, text)}
    entropies = {
        name: (
            _numpy(rows.owner[mask.nonzero()[:, 0]] + first),
            _numpy(renyi_entropies(model.family.output(values[mask]).float().log_softmax(dim=-1))),
        )
        for name, (mask, values) in slices.items()
    }
    entropies["answer"] = (_numpy(rows.owner[row] + first), _numpy(renyi_entropies(log_p)))
    return Signals(
        _numpy(loss), _numpy(rows.owner[row] + first), _numpy(right), _numpy(mean), _numpy(spread), entropies
    )


def _numpy(values: Tensor) -> Any:
    plain = values.cpu()
    return plain.double().numpy() if plain.is_floating_point() else plain.numpy()


@torch.no_grad()
def answer_laws(model: VisionLanguageModel, units: Sequence[Unit]) -> tuple[Tensor, Indices]:
    """(T, V) log next-token laws at the answer positions of all records, float16, and their owners (T,).

    Needed twice at once by divergences between a record and its changed copies; half the memory is plenty there.
    """
    encoded = UnitInputs(model, units)
    laws, owners = [], []
    for chunk in encoded.chunks(range(encoded.units), ROWS_AT_ONCE):
        rows = encoded.select(chunk)
        laws.append(model.logits(rows.tokens, rows.packed).float().log_softmax(dim=-1).half().cpu())
        row = (rows.packed.targets != IGNORE).nonzero()[:, 0]
        owners.append((rows.owner[row] + chunk[0]).cpu().numpy())
    return torch.cat(laws), np.concatenate(owners)


def mean_by_record(values: Floats, owner: Indices, records: int) -> Floats:
    """(records,) mean of the values of each record; 0 for a record without any."""
    counts = np.bincount(owner, minlength=records)
    return np.bincount(owner, weights=values, minlength=records) / np.maximum(counts, 1)
