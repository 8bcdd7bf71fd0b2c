"""How many rows a physical batch may hold: from a computed bound on memory, the same on every machine.

What a backward pass needs grows with the rows of its batch: what the forward pass saves (activations), and with Opacus'
hooks one gradient of every trained number for each row. Both are computed from the model's sizes and from the longest
row, so `training.rows-at-once=auto` is a function of configuration, model and data: a resumed run adds up the same
physical batches, wherever it goes on. What is free on the machine is not asked.

The bound on activations was compared with the bytes that autograd really saves, family by family
(tests/trainers/test_memory.py): it was never below them, and at most 1.4 times as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from trainers.gradients import GradientPath, Hooks, MicroBatch
from trainers.rows import AdapterRows

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel

MOST_ROWS = 64  # more is not faster on anything that was measured
FEW_ROWS = 8  # of Opacus' hooks: below, a second backward pass over many rows is preferred to many small batches
GIB = 1 << 30
HIDDEN, INNER = 13, 5  # tensors of the model's width and of the feed-forward width that a decoder layer saves


@dataclass(frozen=True)
class RowMemory:
    """Bytes that one row of a physical batch needs."""

    activations: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients

    def ghost_pays(self, gib: float) -> bool:
        """Whether few rows fit into `gib`, and more than twice as many would without a gradient for each."""
        return self.rows(gib) < FEW_ROWS and self.gradients > self.activations

    def rows(self, gib: float) -> int:
        """Rows that fit into `gib`, at least one, at most 64."""
        return max(1, min(MOST_ROWS, int(gib * GIB / self.total)))


def row_memory(
    model: "VisionLanguageModel",
    parameters: Mapping[str, Tensor],
    path: GradientPath | None,
    *,
    longest: int,
    answers: int,
) -> RowMemory:
    """The bound for rows of at most `longest` tokens, `answers` of them to be learned.

    path: how gradients are computed; None: forward passes alone.
    """
    text = model.core.config.get_text_config()
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    size = model.dtype.itemsize
    one_layer = longest * ((HIDDEN * width + INNER * inner) * size + _adapters(parameters, size) // layers)
    once = 2 * answers * int(text.vocab_size) * 4 + 4 * longest**2  # logits and their softmax; the mask
    if path is None:
        return RowMemory(one_layer + once, 0)
    if model.checkpointing != "none":
        activations = one_layer + layers * longest * width * size + once
    else:
        activations = layers * one_layer + once
    each = sum(value.numel() for value in parameters.values()) * 4 if keeps_rows(path) else 0
    return RowMemory(activations, each)


def keeps_rows(path: GradientPath) -> bool:
    """Whether a path keeps one gradient a row until they are clipped."""
    return isinstance(path, Hooks) or (isinstance(path, AdapterRows) and path.clip is not None)


def _adapters(parameters: Mapping[str, Tensor], size: int) -> int:
    """Bytes a token of what LoRA saves: the output of A, and a float32 copy of its input in half precision."""
    shapes = [(value.shape[0], value.shape[1]) for name, value in parameters.items() if "lora_A" in name]
    if not shapes:  # B alone is trained: its input is the output of A
        shapes = [(value.shape[1], 0) for value in parameters.values() if value.dim() == 2]
    return sum(4 * rank + (4 * width if size < 4 else 0) for rank, width in shapes)


def rows_at_once(
    wanted: "int | str",
    model: "VisionLanguageModel",
    parameters: Mapping[str, Tensor],
    path: GradientPath | None,
    *,
    longest: int,
    answers: int,
    gib: float,
) -> int:
    """`training.rows-at-once`: as given, or by the bound; the micro-batch loop takes one unit at a time anyway."""
    if isinstance(wanted, int):
        return wanted
    if isinstance(path, MicroBatch):
        return MOST_ROWS
    return row_memory(model, parameters, path, longest=longest, answers=answers).rows(gib)
