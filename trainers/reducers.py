"""Visual token reducers: tokens in, fewer tokens out, example by example.

A reducer may look at one example only: `reduce(a ++ b) == reduce(a) ++ reduce(b)` bit for bit. That property is what
keeps token pruning and fusion inside the sensitivity of DP-SGD (each clipped gradient still depends on one unit);
`attacks.fusion` tests it on the real model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpaudit.config import ReducerConfig
from dpaudit.errors import rejected


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
    positions of the dominant tokens. assignment: (B, P - K) index of the fused token that each other patch went to,
    in positional order, or None where nothing is fused. fused: number of fused tokens at the end of `tokens`.
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


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, P, D), index (B, K) -> (B, K, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _with_cls(visual: VisualTokens, *parts: Tensor) -> Tensor:
    head = [] if visual.cls is None else [visual.cls]
    return torch.cat([*head, *parts], dim=1)


def split_by_importance(importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Positions of the `keep` most important patches and of the others, both ascending: (B, K), (B, P - K).

    A stable sort, so that ties go to the earlier position whatever else is in the batch (top-k kernels promise no
    tie order, a known channel between examples of one batch).
    """
    order = importance.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values


def keep_all(*, drop_cls: bool) -> Reducer:
    """Every patch; CLS as the checkpoint's own `vision_feature_select_strategy` says."""

    def reduce(visual: VisualTokens) -> Reduced:
        rows, patches = visual.importance.shape
        kept = torch.arange(patches, device=visual.tokens.device).expand(rows, -1)
        tokens = visual.tokens if drop_cls else _with_cls(visual, visual.tokens)
        return Reduced(tokens, kept)

    return reduce


def random_positions(keep: int, seed: int = 0) -> Reducer:
    """CLS and the same `keep` positions for every picture, drawn once from a public seed: the content-free baseline."""

    def reduce(visual: VisualTokens) -> Reduced:
        rows, patches = visual.importance.shape
        chosen = np.sort(np.random.default_rng(seed).permutation(patches)[:keep])
        kept = torch.as_tensor(chosen, device=visual.tokens.device).expand(rows, -1)
        return Reduced(_with_cls(visual, _gather(visual.tokens, kept)), kept)

    return reduce


def cls_topk(keep: int) -> Reducer:
    """CLS and the `keep` patches with the largest importance, in positional order; the others are dropped."""

    def reduce(visual: VisualTokens) -> Reduced:
        kept, _ = split_by_importance(visual.importance, keep)
        return Reduced(_with_cls(visual, _gather(visual.tokens, kept)), kept)

    return reduce


def visionzip(keep: int, fuse: int) -> Reducer:
    """Mechanism 1 of Dual-Priv Pruning (arXiv 2506.07077), which is VisionZip's merging (arXiv 2412.04467).

    CLS and the K patches of largest importance stay. Of the others, `fuse` at evenly spaced positions become centres;
    each remaining one joins the centre with the largest cosine similarity of keys; a fused token is its centre plus
    the mean of its members (an empty cluster is its centre alone).
    """

    def reduce(visual: VisualTokens) -> Reduced:
        kept, rest = split_by_importance(visual.importance, keep)
        others, keys = _gather(visual.tokens, rest), _gather(visual.keys, rest)
        count = rest.shape[1]
        step = max(1, count // fuse)
        centre = torch.arange(0, count, step, device=rest.device)[:fuse]
        is_member = torch.ones(count, dtype=torch.bool, device=rest.device)
        is_member[centre] = False
        unit = torch.nn.functional.normalize(keys, dim=-1)
        similarity = unit @ unit[:, centre].transpose(1, 2)  # (B, count, fuse)
        assignment = similarity.argmax(dim=-1)
        assignment[:, centre] = torch.arange(fuse, device=rest.device)
        one_hot = (assignment.unsqueeze(-1) == torch.arange(fuse, device=rest.device)).to(others.dtype)
        one_hot = one_hot * is_member[None, :, None]
        sums = one_hot.transpose(1, 2) @ others
        means = sums / one_hot.sum(dim=1).clamp(min=1).unsqueeze(-1)
        fused = others[:, centre] + means
        return Reduced(_with_cls(visual, _gather(visual.tokens, kept), fused), kept, assignment, fuse)

    return reduce


def make_reducer(config: ReducerConfig, *, patches: int, drop_cls: bool) -> Reducer:
    """The reducer of a configuration for an encoder with `patches` patch tokens; raises UsageError on bad sizes."""
    if config.name == "none":
        return keep_all(drop_cls=drop_cls)
    if config.keep >= patches:
        raise rejected("reducer.keep", config.keep, f"1 to {patches - 1} (the encoder has {patches} patches)")
    if config.name == "random":
        return random_positions(config.keep)
    if config.name == "cls-topk":
        return cls_topk(config.keep)
    if config.keep + config.fuse > patches:
        raise rejected("reducer.fuse", config.fuse, f"at most {patches - config.keep} (patches - reducer.keep)")
    return visionzip(config.keep, config.fuse)
