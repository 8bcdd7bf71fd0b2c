"""Planted bugs of the token-fusion path, on the real vision-language trainer: tokens or losses shared over a batch.

The tower encodes a data set in batches, so a statistic over that batch carries one record into another's tokens.
`attacks.bugs.token_path` plants the same faults, and those of the noise, into the parts that the fusion audit watches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from attacks.fusion.path import Traced
from dpaudit.config import ReducerConfig
from trainers.adapters import vlm
from trainers.adapters.vlm import VlmTrainer, Workshop
from trainers.prompts import Packed
from trainers.records import Unit
from trainers.reducers import Reduced, VisualTokens, make_reducer
from trainers.vlm import VisionLanguageModel

KEEP, FUSE = 6, 3
Reduce = Callable[[VisualTokens], Reduced]


def _visionzip(model: VisionLanguageModel) -> Reduce:
    config = ReducerConfig(name="visionzip", keep=KEEP, fuse=FUSE)
    return make_reducer(config, patches=model.patches, drop_cls=model.drop_cls)


def batch_centres(model: VisionLanguageModel) -> Reduce:
    """Batch-mean centres: what tokens are fused around is a mean over the batch, as in a shared codebook."""
    own = _visionzip(model)

    def reduce(visual: VisualTokens) -> Reduced:
        mine = own(visual)
        rows, width = visual.rows, visual.tokens.shape[2]
        rest = torch.ones_like(visual.importance, dtype=torch.bool).scatter(1, mine.kept, False)
        others = visual.tokens[rest].view(rows, -1, width)
        at = torch.arange(0, others.shape[1], max(1, others.shape[1] // FUSE), device=others.device)[:FUSE]
        centres = others[:, at].mean(dim=0, keepdim=True).expand(rows, -1, -1)
        unit = torch.nn.functional.normalize(others, dim=-1)
        assignment = (unit @ torch.nn.functional.normalize(centres, dim=-1).transpose(1, 2)).argmax(dim=-1)
        member = torch.nn.functional.one_hot(assignment, FUSE).to(others.dtype)
        means = member.transpose(1, 2) @ others / member.sum(dim=1).clamp(min=1).unsqueeze(-1)
        tokens = torch.cat([mine.tokens[:, :-FUSE], centres + means], dim=1)
        return Traced(tokens, mine.kept, assignment, FUSE, centres=centres)

    return reduce


def batch_merged(model: VisionLanguageModel) -> Reduce:
    """Fused tokens are pulled towards the batch's mean fused token; centres and clusters stay the picture's own."""
    own = _visionzip(model)

    def reduce(visual: VisualTokens) -> Reduced:
        mine = own(visual)
        fused = mine.tokens[:, -FUSE:]
        tokens = torch.cat([mine.tokens[:, :-FUSE], 0.5 * (fused + fused.mean(dim=0, keepdim=True))], dim=1)
        return Traced(tokens, mine.kept, mine.assignment, FUSE, centres=torch.zeros_like(fused))

    return reduce


def batch_normalised(model: VisionLanguageModel) -> Reduce:
    """Tokens are normalised by mean and deviation of the batch."""
    own = _visionzip(model)

    def reduce(visual: VisualTokens) -> Reduced:
        mine = own(visual)
        mean, std = mine.tokens.mean(dim=(0, 1)), mine.tokens.std(dim=(0, 1)) + 1e-6
        return replace(mine, tokens=(mine.tokens - mean) / std)

    return reduce


def batch_count(model: VisionLanguageModel) -> Reduce:
    """How many tokens survive is an outlier rule over the attention of the whole batch.

    As `outlier_dectection` in 42Shawn/LLaVA-PruMerge (clip_encoder.py at 1ca8b2b), which flattens the batch: the share
    of patches above Q3 + 1.5 IQR.
    """

    def reduce(visual: VisualTokens) -> Reduced:
        flat = visual.importance.flatten()
        low, high = flat.quantile(0.25), flat.quantile(0.75)
        ratio = float((flat > high + 1.5 * (high - low)).float().mean())
        config = ReducerConfig(name="cls-topk", keep=min(max(1, int(model.patches * ratio)), model.patches - 1))
        return make_reducer(config, patches=model.patches, drop_cls=model.drop_cls)(visual)

    return reduce


def token_mean(model: VisionLanguageModel) -> Callable[[Tensor, Packed], Tensor]:
    """Hugging Face's loss: a mean over all answer tokens of the batch."""

    def losses(tokens: Tensor, packed: Packed) -> Tensor:
        wanted = packed.targets != -100
        each = torch.nn.functional.cross_entropy(model.logits(tokens, packed), packed.targets[wanted], reduction="none")
        rows = torch.zeros(packed.rows, device=each.device).index_add(0, wanted.nonzero()[:, 0], each)
        return rows / wanted.sum() * packed.rows

    return losses


def padded_positions(model: VisionLanguageModel) -> Callable[[Tensor, Packed], Tensor]:
    """Left padding with positions that count the padding: they follow the longest record of the batch."""
    correct = model.logits

    def logits(tokens: Tensor, packed: Packed) -> Tensor:
        lengths = (packed.segment >= 0).sum(dim=1, keepdim=True)
        shifted = packed.offset + (packed.segment.shape[1] - lengths)
        return correct(tokens, replace(packed, offset=shifted))

    return logits


class _Planted(Workshop):
    """A workshop whose model has one part replaced."""

    def __init__(self, original: Workshop, plant: Callable[[VisionLanguageModel], None]) -> None:
        super().__init__(original.config, original.plan, original.units)
        self.plant = plant

    def adapt(self, model: VisionLanguageModel) -> None:
        self.plant(model)


def _with_reducer(make: Callable[[VisionLanguageModel], Reduce]) -> Callable[[VisionLanguageModel], None]:
    def plant(model: VisionLanguageModel) -> None:
        model.reducer = make(model)

    return plant


def _with_loss(model: VisionLanguageModel) -> None:
    model.losses = token_mean(model)  # type: ignore[method-assign, assignment]


@lru_cache(maxsize=8)
def _workshop(name: str) -> Workshop:
    plants = {
        "centres": _with_reducer(batch_centres),
        "normalised": _with_reducer(batch_normalised),
        "count": _with_reducer(batch_count),
        "token-mean": _with_loss,
    }
    return _Planted(vlm.workshop("dp-sgd"), plants[name])


def fused_batch_centres(
    records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None
) -> VlmTrainer:
    """Vision-language trainer: fused tokens share their centres over the encoding batch."""
    return VlmTrainer(_workshop("centres"), records, seed=seed, noise_seed=noise_seed)


def fused_batch_normalised(
    records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None
) -> VlmTrainer:
    """Vision-language trainer: visual tokens are normalised by statistics of the encoding batch."""
    return VlmTrainer(_workshop("normalised"), records, seed=seed, noise_seed=noise_seed)


def fused_batch_count(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """Vision-language trainer: the number of kept tokens is a statistic of the encoding batch."""
    return VlmTrainer(_workshop("count"), records, seed=seed, noise_seed=noise_seed)


def fused_token_mean(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """Vision-language trainer: Hugging Face's token-mean loss over the batch."""
    return VlmTrainer(_workshop("token-mean"), records, seed=seed, noise_seed=noise_seed)
