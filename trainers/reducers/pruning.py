"""Reducers that keep some patches and drop the others."""

import numpy as np
import torch

from trainers.reducers.tokens import Reduced, Reducer, VisualTokens, cosine, gather, split_by_importance, with_cls


def keep_all(*, drop_cls: bool) -> Reducer:
    """Every patch; CLS as the checkpoint's own `vision_feature_select_strategy` says."""

    def reduce(visual: VisualTokens) -> Reduced:
        rows, patches = visual.importance.shape
        kept = torch.arange(patches, device=visual.tokens.device).expand(rows, -1)
        tokens = visual.tokens if drop_cls else with_cls(visual, visual.tokens)
        return Reduced(tokens, kept)

    return reduce


def random_positions(keep: int, seed: int = 0) -> Reducer:
    """CLS and the same `keep` positions for every picture, drawn once from a public seed: the content-free baseline."""

    def reduce(visual: VisualTokens) -> Reduced:
        rows, patches = visual.importance.shape
        chosen = np.sort(np.random.default_rng(seed).permutation(patches)[:keep])
        kept = torch.as_tensor(chosen, device=visual.tokens.device).expand(rows, -1)
        return Reduced(with_cls(visual, gather(visual.tokens, kept)), kept)

    return reduce


def cls_topk(keep: int) -> Reducer:
    """CLS and the `keep` patches with the largest importance, in positional order; the others are dropped."""

    def reduce(visual: VisualTokens) -> Reduced:
        kept, _ = split_by_importance(visual.importance, keep)
        return Reduced(with_cls(visual, gather(visual.tokens, kept)), kept)

    return reduce


def divprune(keep: int) -> Reducer:
    """DivPrune (Alvar et al., CVPR 2025): CLS and the `keep` most diverse patches, found greedily.

    Max-min diversity by farthest points under the cosine distance of tokens: first the patch that is farthest from its
    nearest neighbour, then again and again the one that is farthest from its nearest kept one; ties go to the earlier
    position, nothing is kept twice. The smallest distance on the unit sphere is at least half of the best possible (it
    is a metric with the same order: Ravi et al. 1994). No attention, so any encoder will do. The paper measures behind
    the projector; here it is the tower's tokens, so that a choice does not move with weights that are trained.
    """

    def reduce(visual: VisualTokens) -> Reduced:
        distance = 1 - cosine(visual.tokens, visual.tokens)
        rows, patches = visual.importance.shape
        if not rows:
            return cls_topk(keep)(visual)
        itself = torch.eye(patches, dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(itself, torch.inf).amin(dim=2)
        chosen = torch.zeros(rows, patches, dtype=torch.bool, device=distance.device)
        every = torch.arange(rows, device=distance.device)
        for _ in range(keep):
            first = not bool(chosen.any())
            best = nearest.masked_fill(chosen, -torch.inf).argmax(dim=1)
            chosen[every, best] = True
            mine = distance[every, best]
            nearest = mine if first else torch.minimum(nearest, mine)
        kept = chosen.nonzero()[:, 1].view(rows, keep)
        return Reduced(with_cls(visual, gather(visual.tokens, kept)), kept)

    return reduce
