"""Attention of one chosen layer from its queries and keys, so that the tower keeps its fast kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs while the block runs."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def widened(value: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    rows, count, width = projected.shape
    return projected.view(rows, count, heads, width // heads).transpose(1, 2)


def received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, N) attention that each token gets, averaged over heads and over the asking tokens.

    query: (B, heads, Q, d), the tokens that ask: the CLS token alone, or all of them. key: (B, heads, N, d).
    """
    return (query @ key.transpose(-1, -2) * scale).softmax(dim=-1).mean(dim=(1, 2))
