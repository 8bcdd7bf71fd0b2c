"""Reducers that merge patches into fewer tokens."""

from typing import Literal

import torch
from torch import Tensor

from trainers.reducers.tokens import Reduced, Reducer, VisualTokens, cosine, each, gather, split_by_importance, with_cls


def visionzip(keep: int, fuse: int, assign: Literal["keys", "tokens"] = "keys") -> Reducer:
    """Mechanism 1 of Dual-Priv Pruning (arXiv 2506.07077), which is VisionZip's merging (arXiv 2412.04467).

    CLS and the K patches of largest importance stay. Of the others, `fuse` at evenly spaced positions become centres;
    each remaining one joins the centre with the largest cosine similarity; a fused token is its centre plus the mean of
    its members (an empty cluster is its centre alone). assign: what the cosine compares, the keys of the layer of the
    importance, as VisionZip's code does, or the tokens, as Dual-Priv's text says.
    """

    def reduce(visual: VisualTokens) -> Reduced:
        kept, rest = split_by_importance(visual.importance, keep)
        others = gather(visual.tokens, rest)
        compared = gather(visual.keys, rest) if assign == "keys" else others
        count = rest.shape[1]
        step = max(1, count // fuse)
        centre = torch.arange(0, count, step, device=rest.device)[:fuse]
        is_member = torch.ones(count, dtype=torch.bool, device=rest.device)
        is_member[centre] = False
        assignment = cosine(compared, compared[:, centre]).argmax(dim=-1)  # the first of equals, whatever the batch
        assignment[:, centre] = torch.arange(fuse, device=rest.device)
        one_hot = (assignment.unsqueeze(-1) == torch.arange(fuse, device=rest.device)).to(others.dtype)
        one_hot = one_hot * is_member[None, :, None]
        sums = each(one_hot.transpose(1, 2), others)
        means = sums / one_hot.sum(dim=1).clamp(min=1).unsqueeze(-1)
        fused = others[:, centre] + means
        return Reduced(with_cls(visual, gather(visual.tokens, kept), fused), kept, assignment, fuse)

    return reduce


def tome(keep: int) -> Reducer:
    """Token merging (ToMe, Bolya et al., ICLR 2023) down to CLS and `keep` tokens, in one place instead of per layer.

    A round splits the tokens alternately into A and B; each token of A finds its most similar one in B by the cosine of
    keys; the most similar pairs are merged into the token of B, tokens and keys as means weighted by the number of
    patches that they stand for. A round removes at most half, so rounds repeat until `keep` tokens are left. Ties go to
    the earlier position. A token stands where the patch stood that the others joined; order is positional. CLS is
    never merged. (In the paper keys are computed anew in the next layer, and attention later weighs tokens by size.)
    """

    def reduce(visual: VisualTokens) -> Reduced:
        rows, patches = visual.importance.shape
        device = visual.tokens.device
        tokens, keys = visual.tokens, visual.keys
        size = torch.ones(rows, patches, 1, dtype=tokens.dtype, device=device)
        where = torch.arange(patches, device=device).expand(rows, -1)  # position of each present token
        group = where  # the present token that each patch belongs to
        while where.shape[1] > keep:
            count = where.shape[1]
            remove = min(count // 2, count - keep)
            target = _round(keys, remove)
            stays = target == torch.arange(count, device=device)
            left = stays.nonzero()[:, 1].view(rows, count - remove)  # the tokens that are left, ascending
            place = stays.cumsum(dim=1) - 1  # and the new index of each of them, at its old place
            member = (target.unsqueeze(1) == left.unsqueeze(-1)).to(tokens.dtype)  # (B, left, count)
            total = each(member, size)
            tokens, keys = each(member, tokens * size) / total, each(member, keys * size) / total
            size, where = total, where.gather(1, left)
            group = place.gather(1, target.gather(1, group))
        others = torch.ones(rows, patches, dtype=torch.bool, device=device).scatter(1, where, False)
        assignment = group[others].view(rows, patches - keep)
        return Reduced(with_cls(visual, tokens), where, assignment)

    return reduce


def _round(keys: Tensor, remove: int) -> Tensor:
    """(B, N) index of the token that each token becomes a part of: itself, or for `remove` even ones an odd one."""
    rows, count, _ = keys.shape
    best, partner = cosine(keys[:, 0::2], keys[:, 1::2]).max(dim=2)
    merged = best.argsort(dim=1, descending=True, stable=True)[:, :remove]
    target = torch.arange(count, device=keys.device).repeat(rows, 1)
    return target.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
