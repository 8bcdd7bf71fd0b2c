"""Qwen3-VL, dense or with experts: Qwen2-VL's pictures, with features of several tower layers for the decoder.

What a reducer sees of a square of patches is its features of the tower's last layer, followed by those of each
`deepstack` layer; projected, they are as wide as the embedding times one more than there are such layers. The decoder
takes the first part as embeddings and adds each other part behind one of its first layers; text has zeros there.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainers.families.attention import captured, widened
from trainers.families.base import Layers, Prepared
from trainers.families.qwen2_vl import Qwen2Vl
from trainers.reducers import VisualTokens


class Qwen3Vl(Qwen2Vl):
    """Positions, grid and prompt as in Qwen2-VL."""

    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    projector = r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"

    @property
    def _layers(self) -> list[int]:
        """Tower layers whose features the decoder's first layers take, in the order in which they take them."""
        return sorted(int(index) for index in self.hf.model.visual.deepstack_visual_indexes)

    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        blocks = self.hf.model.visual.blocks
        with ExitStack() as stack:
            deep = [stack.enter_context(captured(blocks[index])) for index in self._layers]
            found = super().encode(pictures, layers)
        squares = self._square**2

        def grouped(hidden: Tensor) -> Tensor:
            return widened(hidden).reshape(len(pictures), -1, squares * hidden.shape[-1])

        return replace(found, tokens=torch.cat([found.tokens, *(grouped(item[0]) for item in deep)], dim=-1))

    def project(self, tokens: Tensor) -> Tensor:
        visual = self.hf.model.visual
        own = [int(index) for index in visual.deepstack_visual_indexes]
        mergers = [visual.merger, *(visual.deepstack_merger_list[own.index(layer)] for layer in self._layers)]
        parts = tokens.chunk(len(mergers), dim=-1)
        return torch.cat([self._merged(*pair) for pair in zip(mergers, parts, strict=True)], dim=-1)

    def _merged(self, merger: Any, part: Tensor) -> Tensor:
        """(B, M, W) squares of one layer through its merger, a row a picture as per-unit gradients need it."""
        if merger.use_postshuffle_norm:
            normed = merger.norm(part)
        else:
            normed = merger.norm(part.reshape(*part.shape[:-1], self._square**2, -1)).flatten(-2)
        merged: Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(normed)))
        return merged

    def embedded(self, words: Tensor) -> Tensor:
        return nn.functional.pad(words, (0, words.shape[-1] * len(self._layers)))

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        first, *deep = embeds.chunk(1 + len(self._layers), dim=-1)
        everywhere = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        hidden: Tensor = self.language_model(
            inputs_embeds=first,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            visual_pos_masks=everywhere,
            deepstack_visual_embeds=[part.flatten(0, 1) for part in deep],
        ).last_hidden_state
        return hidden


class Qwen3VlMoe(Qwen3Vl):
    """The same with experts."""

    model_type = "qwen3_vl_moe"
    architecture = "Qwen3VLMoeForConditionalGeneration"
