"""Qwen2-VL and Qwen2.5-VL: pictures of any size, positions of time, height and width, a merger in the tower.

The merger joins squares of 2 x 2 patches into one token, norms and projects it. What a reducer sees are these squares
before the merger; importance is the mean attention that their patches receive. Features are those of the tower's last
layer; `reducer.layer` chooses where attention and keys are read. In Qwen2.5-VL most layers attend inside windows, whose
shares do not compare over windows of other sizes: only layers with full attention are accepted there.

Causal, so all questions of a picture share one sequence. A token that is kept keeps its own place in height and width,
a fused one stands at the (rounded) mean place of what went into it, and the text begins where it would without any
reduction.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from dpaudit.errors import rejected
from trainers.families.attention import captured, received, widened
from trainers.families.base import Family, Grid, Layers, Prepared, chat_template
from trainers.prompts import Prompter
from trainers.records import Pixels
from trainers.reducers import Reduced, VisualTokens

IMAGE_PAD = "<|image_pad|>"
Table = npt.NDArray[np.int64]


class Qwen2Vl(Family):
    """Grid: (height, width) in patches. A picture's values are its patches, (N, channels * time * side * side)."""

    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    axes = 3
    projector = r".*visual\.merger\.mlp\.[02]"

    def __init__(self, hf: Any, processor: Any, source: str) -> None:
        super().__init__(hf, processor, source)
        if processor is None:
            raise rejected("model.path", source, "a Qwen2-VL checkpoint with its preprocessor_config.json")

    @property
    def tower(self) -> nn.Module:
        tower: nn.Module = self.hf.model.visual
        return tower

    @property
    def language_model(self) -> Any:
        return self.hf.model.language_model

    @property
    def depth(self) -> int:
        return len(self.hf.model.visual.blocks)

    @property
    def layer(self) -> int:
        return -1

    @property
    def patches(self) -> int | None:
        return None

    @property
    def _square(self) -> int:
        return int(self.hf.config.vision_config.spatial_merge_size)

    def prompter(self, tokenizer: Any) -> Prompter:
        template = chat_template(tokenizer, IMAGE_PAD, self.source)
        image = int(self.hf.config.image_token_id)
        return Prompter(tokenizer, template, image, special=False)

    # -- the tower -------------------------------------------------------------------------------------------------

    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        return [self._patches(item) for item in pixels]

    def _patches(self, pixels: Pixels) -> Prepared:
        made = self.processor([Image.fromarray(pixels)], return_tensors="np")
        _, height, width = (int(value) for value in np.asarray(made["image_grid_thw"])[0])
        return Prepared(torch.as_tensor(np.asarray(made["pixel_values"])), (height, width))

    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        values = torch.cat([picture.values for picture in pictures]).to(self.hf.device, self.hf.dtype)
        sizes = torch.tensor([[1, *picture.grid] for picture in pictures], device=self.hf.device)
        attention = self.hf.model.visual.blocks[layers.importance % (self.depth + 1) - 1].attn
        with captured(attention.qkv) as projected, _rotations(attention) as rotations:
            hidden = widened(self.hf.model.visual(values, grid_thw=sizes).last_hidden_state)
        query, key = self._rotated(widened(projected[0]), rotations[0], attention.num_heads, len(pictures))
        weights = received(query, key, attention.head_dim**-0.5)
        squares = self._square**2
        order = self._order(sizes)

        def grouped(value: Tensor) -> Tensor:
            """(B, N, ...) in the tower's order -> (B, N / squares, squares, ...) in reading order."""
            flat = value.reshape(-1, squares, *value.shape[2:])
            return flat[order].reshape(len(pictures), -1, *flat.shape[1:])

        tokens = grouped(hidden.reshape(len(pictures), -1, hidden.shape[-1])).flatten(2)
        return VisualTokens(tokens, None, grouped(weights).mean(dim=2), grouped(key.mean(dim=1)).mean(dim=2))

    def _order(self, sizes: Tensor) -> Tensor:
        """Where each square in reading order stands in the tower's own order."""
        total = int(sizes.prod(dim=1).sum()) // self._square**2
        return torch.arange(total, device=sizes.device)

    def _rotated(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], heads: int, pictures: int
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, (B, heads, N, d), after the tower's rotary positions."""
        query, key, _ = projected.view(projected.shape[0], 3, heads, -1).unbind(dim=1)  # (B * N, heads, d)
        cos, sin = (widened(part).unsqueeze(-2) for part in rotation)

        def turn(value: Tensor) -> Tensor:
            first, second = value.chunk(2, dim=-1)
            turned = value * cos + torch.cat([-second, first], dim=-1) * sin
            return turned.view(pictures, -1, *turned.shape[1:]).transpose(1, 2)

        return turn(query), turn(key)

    def project(self, tokens: Tensor) -> Tensor:
        merger = self.hf.model.visual.merger
        parts = tokens.reshape(*tokens.shape[:-1], self._square**2, -1)
        normed = merger.ln_q(parts).flatten(2)
        projected: Tensor = merger.mlp(normed)
        return projected

    # -- the prompt ------------------------------------------------------------------------------------------------

    def positions(self, slot: Table, origin: Table, grid: Grid, reduced: Reduced, index: int) -> tuple[Table, int]:
        height, width = grid[0] // self._square, grid[1] // self._square
        begin = int(np.flatnonzero(slot >= 0)[0])  # the prompt's text before the picture
        out = np.zeros((3, len(slot)), dtype=np.int64)
        out[:, :begin] = np.arange(begin)
        here = np.flatnonzero(origin >= 0)
        out[0, slot >= 0] = begin
        out[1, here], out[2, here] = begin + origin[here] // width, begin + origin[here] % width
        if reduced.fused:
            places = _mean_places(reduced, index, height * width, width)
            out[1:, len(slot) - reduced.fused :] = begin + places
        return out, begin + max(height, width)


class Qwen25Vl(Qwen2Vl):
    """Qwen2.5-VL: window attention in most layers of the tower, which works in an order of its own."""

    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"

    @property
    def layer(self) -> int:
        return max(self._full) - self.depth

    @property
    def _full(self) -> set[int]:
        return {int(block) for block in self.hf.config.vision_config.fullatt_block_indexes if block < self.depth}

    def check_layer(self, layer: int, *, attention: bool, field: str = "reducer.layer") -> None:
        super().check_layer(layer, attention=attention, field=field)
        if attention and layer % (self.depth + 1) - 1 not in self._full:
            accepted = ", ".join(str(block - self.depth) for block in sorted(self._full))
            raise rejected("reducer.layer", layer, f"{accepted} (layers of this tower with full attention)")

    def _order(self, sizes: Tensor) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        vision = self.hf.config.vision_config
        index, _ = get_vision_window_index(
            sizes, spatial_merge_size=self._square, window_size=vision.window_size, patch_size=vision.patch_size
        )
        return torch.argsort(index)


@contextmanager
def _rotations(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the rotary cosines and sines that an attention module is called with."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        found.append(given["position_embeddings"])

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _mean_places(reduced: Reduced, index: int, count: int, width: int) -> Table:
    """(2, fused) rounded mean height and width of the places that went into each fused token of one picture."""
    assert reduced.assignment is not None
    kept = reduced.kept[index].cpu().numpy()
    rest = np.setdiff1d(np.arange(count), kept)
    cluster = reduced.assignment[index].cpu().numpy()
    places = np.stack([rest // width, rest % width])
    members = np.bincount(cluster, minlength=reduced.fused).clip(min=1)
    means = np.stack([np.bincount(cluster, weights=axis, minlength=reduced.fused) / members for axis in places])
    return np.floor(means + 0.5).astype(np.int64)
