"""Greedy answers of any family: prompts padded on the left, one decoding loop with a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainers.prompts import HeadRow, stack_heads

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Encoded:
    """A picture after tower and reducer: tokens (M, D), the last `fused` of them fused, and the head they stand in."""

    tokens: Tensor
    fused: int
    head: HeadRow


def pad_tokens(tokens: Sequence[Tensor]) -> Tensor:
    """(B, M, D) from rows of (M_i, D), zeros behind the shorter ones."""
    if not tokens:
        return torch.empty(0)
    if len({len(item) for item in tokens}) == 1:
        return torch.stack(list(tokens))
    return nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)


@torch.no_grad()
def greedy(
    model: "VisionLanguageModel", pictures: Sequence[Encoded], ids: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """The most likely continuation of each (picture, question ids) pair, token by token, as text.

    Left padding puts the first token of every answer into the same column.
    """
    from transformers import DynamicCache

    family, ends = model.family, _end_ids(model)
    embeds, visible, positions = _prompts(model, pictures, ids)
    cache = DynamicCache(config=model.core.config.get_text_config())
    mask = family.prompt_mask(visible)
    out: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    for _ in range(max_new_tokens):
        hidden = family.decode(embeds, mask, positions, cache)[:, -1]
        chosen = family.output(hidden).argmax(dim=-1).masked_fill(done, model.prompter.pad_id)
        out.append(chosen)
        done |= torch.isin(chosen, ends)
        if bool(done.all()):
            break
        embeds = model.embed(chosen)[:, None].to(embeds.dtype)
        visible = torch.cat([visible, visible.new_ones(len(ids), 1)], dim=1)
        mask = visible[:, None, None, :]
        positions = positions[:, :, -1:] + 1
    texts = model.tokenizer.batch_decode(torch.stack(out, dim=1), skip_special_tokens=True)
    return [text.strip() for text in texts]


def _prompts(
    model: "VisionLanguageModel", pictures: Sequence[Encoded], ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts: embeddings (B, T, W), visible (B, T), positions (A, B, T)."""
    device, axes = model.device, model.family.axes
    head = stack_heads([picture.head for picture in pictures]).to(device)
    front = model.front(pad_tokens([picture.tokens for picture in pictures]).to(device), head)
    lengths = [len(picture.head.slot) for picture in pictures]
    total = max(length + len(item) for length, item in zip(lengths, ids, strict=True))
    embeds = front.new_zeros(len(ids), total, front.shape[2])
    visible = torch.zeros(len(ids), total, dtype=torch.bool, device=device)
    positions = torch.zeros(axes, len(ids), total, dtype=torch.int64, device=device)
    for row, (length, item) in enumerate(zip(lengths, ids, strict=True)):
        text = model.embed(torch.tensor(item, dtype=torch.int64, device=device)).to(front.dtype)
        used = length + len(item)
        embeds[row, -used:] = torch.cat([front[row, :length], text])
        visible[row, -used:] = True
        behind = torch.arange(len(item), device=device) + head.start[row]
        positions[:, row, -used:] = torch.cat([head.positions[:, row, :length], behind.expand(axes, -1)], dim=1)
    return embeds, visible, positions


def _end_ids(model: "VisionLanguageModel") -> Tensor:
    """Every token that ends an answer: the prompt's own and those of the checkpoint's generation settings."""
    known = getattr(model.core.generation_config, "eos_token_id", None)
    more = [known] if isinstance(known, int) else list(known or [])
    return torch.tensor(sorted({model.prompter.eos_id, *more}), dtype=torch.int64, device=model.device)
