"""One forward pass through a model of any family, stopped before the decoder: what rows look like to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.inputs import Rows
from trainers.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Embedded:
    """Rows at the decoder's door: embeds (R, T, W), mask (R, 1, T, T) boolean, positions (A, R, T), T = head + text."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    head: int


def embed(model: VisionLanguageModel, rows: Rows) -> Embedded:
    """Heads with their projected picture tokens, then the packed questions, as `VisionLanguageModel.logits` joins
    them. Rows come from `UnitInputs`, so they carry their heads."""
    packed, head = rows.packed, rows.packed.head
    assert head is not None
    front = model.front(rows.tokens, head)
    text = model.embed(packed.input_ids).to(front.dtype)
    behind = (packed.offset + head.start[:, None]).expand(model.family.axes, -1, -1)
    return Embedded(
        torch.cat([front, text], dim=1),
        model.family.mask(packed, head),
        torch.cat([head.positions, behind], dim=2),
        front.shape[1],
    )


@torch.no_grad()
def hidden_states(model: VisionLanguageModel, embedded: Embedded) -> Tensor:
    """(R, T, W) last hidden states of the decoder."""
    return model.family.decode(embedded.embeds, embedded.mask, embedded.positions)
