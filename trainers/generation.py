"""Greedy answers of any family: prompts padded on the left, one decoding loop with a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trainers.prompts import TEXT, HeadRow, stack_heads

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Encoded:
    """A picture after tower and reducer: tokens (M, D), the last `fused` of them fused, and the head they stand in."""

    tokens: Tensor
    fused: int
    head: HeadRow


def join(items: Sequence[Encoded], prefix: int, between: Sequence[Sequence[int]], first: int = 0) -> Encoded:
    """Several pictures as one: their heads one behind the other, fused tokens of all of them at the end.

    prefix: ids of the prompt before a picture, which each head begins with. between: ids between each two pictures.
    first: the position of a prompt's first token.
    """
    if len(items) == 1:
        return items[0]
    plain = [len(item.tokens) - item.fused for item in items]
    starts, fused_starts = np.cumsum([0, *plain]), sum(plain) + np.cumsum([0, *(item.fused for item in items)])
    ids, slots, positions = [], [], []
    at = 0
    for place, item in enumerate(items):
        head = item.head
        slot = np.where(
            head.slot < plain[place], head.slot + starts[place], head.slot - plain[place] + fused_starts[place]
        )
        slot = np.where(head.slot < 0, head.slot, slot)
        if place == 0:
            ids.append(head.ids)
            slots.append(slot)
            positions.append(head.positions)
            at = head.start
            continue
        words = np.asarray(between[place - 1], dtype=np.int64)
        shift = at + len(words) - (first + prefix)
        ids += [words, head.ids[prefix:]]
        slots += [np.full(len(words), TEXT, dtype=np.int64), slot[prefix:]]
        lines = np.broadcast_to(at + np.arange(len(words)), (head.positions.shape[0], len(words)))
        positions += [lines, head.positions[:, prefix:] + shift]
        at = head.start + shift
    row = HeadRow(np.concatenate(ids), np.concatenate(slots), np.concatenate(positions, axis=1), int(at))
    tokens = [item.tokens[: plain[place]] for place, item in enumerate(items)]
    tokens += [item.tokens[plain[place] :] for place, item in enumerate(items)]
    return Encoded(torch.cat(tokens), sum(item.fused for item in items), row)


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

    family, ends = model.family, end_ids(model)
    embeds, visible, positions, image = _prompts(model, pictures, ids)
    cache = DynamicCache(config=model.core.config.get_text_config())
    mask = family.prompt_mask(visible, image)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left-padded prompts: embeddings (B, T, W), visible (B, T), positions (A, B, T), visual tokens (B, T)."""
    device, axes = model.device, model.family.axes
    head = stack_heads([picture.head for picture in pictures]).to(device)
    front = model.front(pad_tokens([picture.tokens for picture in pictures]).to(device), head)
    lengths = [len(picture.head.slot) for picture in pictures]
    total = max(length + len(item) for length, item in zip(lengths, ids, strict=True))
    embeds = front.new_zeros(len(ids), total, front.shape[2])
    visible = torch.zeros(len(ids), total, dtype=torch.bool, device=device)
    image = torch.zeros_like(visible)
    positions = torch.zeros(axes, len(ids), total, dtype=torch.int64, device=device)
    for row, (length, item) in enumerate(zip(lengths, ids, strict=True)):
        text = model.embed(torch.tensor(item, dtype=torch.int64, device=device)).to(front.dtype)
        used = length + len(item)
        embeds[row, -used:] = torch.cat([front[row, :length], text])
        visible[row, -used:] = True
        image[row, total - used : total - used + length] = head.slot[row, :length] >= 0
        behind = torch.arange(len(item), device=device) + head.start[row]
        positions[:, row, -used:] = torch.cat([head.positions[:, row, :length], behind.expand(axes, -1)], dim=1)
    return embeds, visible, positions, image


def end_ids(model: "VisionLanguageModel") -> Tensor:
    """Every token that ends an answer: the prompt's own and those of the checkpoint's generation settings."""
    known = getattr(model.core.generation_config, "eos_token_id", None)
    more = [known] if isinstance(known, int) else list(known or [])
    return torch.tensor(sorted({model.prompter.eos_id, *more}), dtype=torch.int64, device=model.device)
