"""What goes into a reducer and what comes out, and the arithmetic that treats one picture at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """What the encoder says of B pictures, from one layer.

    tokens: (B, P, D) patch tokens. cls: (B, 1, D), or None for encoders without one. importance: (B, P), the CLS row
    of the head-averaged attention (mean received attention without CLS). keys: (B, P, Dk), keys averaged over heads.
    """

    tokens: Tensor
    cls: Tensor | None
    importance: Tensor
    keys: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "VisualTokens":
        return VisualTokens(
            self.tokens[rows], None if self.cls is None else self.cls[rows], self.importance[rows], self.keys[rows]
        )

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @staticmethod
    def join(parts: "list[VisualTokens]") -> "VisualTokens":
        """Concatenate along the pictures."""
        cls = [part.cls for part in parts if part.cls is not None]
        return VisualTokens(
            torch.cat([part.tokens for part in parts]),
            torch.cat(cls) if cls else None,
            torch.cat([part.importance for part in parts]),
            torch.cat([part.keys for part in parts]),
        )


@dataclass(frozen=True)
class Reduced:
    """A reducer's output.

    tokens: (B, M, D), CLS (where kept), then dominant tokens in positional order, then fused tokens. kept: (B, K)
    positions of the dominant tokens. assignment: (B, P - K) where each other patch went, in positional order: index of
    a fused token, or of a dominant one for a reducer that merges patches into their like (`tome`: fused 0); None where
    the others are dropped. fused: number of fused tokens at the end of `tokens`.
    """

    tokens: Tensor
    kept: Tensor
    assignment: Tensor | None = None
    fused: int = 0

    def __getitem__(self, rows: Tensor | slice) -> "Reduced":
        assignment = None if self.assignment is None else self.assignment[rows]
        return Reduced(self.tokens[rows], self.kept[rows], assignment, self.fused)

    def with_noise(self, noise: Tensor | None) -> Tensor:
        """Tokens with `noise` (B, fused, D) added to the fused ones only, as Dual-Priv Pruning does."""
        if noise is None or self.fused == 0:
            return self.tokens
        head = self.tokens[:, : -self.fused]
        return torch.cat([head, self.tokens[:, -self.fused :] + noise], dim=1)


Reducer = Callable[[VisualTokens], Reduced]


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, P, D), index (B, K) -> (B, K, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def with_cls(visual: VisualTokens, *parts: Tensor) -> Tensor:
    """CLS (where there is one) before the other tokens."""
    head = [] if visual.cls is None else [visual.cls]
    return torch.cat([*head, *parts], dim=1)


def each(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products (B, N, D) @ (B, D, M), one picture at a time.

    A batched kernel may block its sums by the size of the batch, and a last bit can turn a tie: one product a picture,
    each from memory of its own, gives the same bits whoever else is in the batch.
    """
    if not len(left):
        return left.new_zeros(0, left.shape[1], right.shape[2])
    return torch.stack([one.clone() @ other.clone() for one, other in zip(left, right, strict=True)])


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarities (B, N, D) x (B, M, D) -> (B, N, M); 0 with a zero vector."""
    unit = torch.nn.functional.normalize
    return each(unit(left, dim=-1), unit(right, dim=-1).transpose(1, 2))


def split_by_importance(importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Positions of the `keep` most important patches and of the others, both ascending: (B, K), (B, P - K).

    A stable sort, so that ties go to the earlier position whatever else is in the batch (top-k kernels promise no
    tie order, a known channel between examples of one batch).
    """
    order = importance.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values
