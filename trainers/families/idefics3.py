"""Idefics3 and SmolVLM: a picture is cut into tiles plus one small view of the whole, all through one SigLIP tower.

The connector stacks squares of `scale_factor` x `scale_factor` patches into one token (pixel shuffle) and projects it.
What a reducer sees are these stacked tokens of all tiles of a picture, joined: K is a budget for the picture, not for a
tile, and the pieces of one picture are fused or dropped together. Importance is the mean attention that a token's
patches receive within their own tile (there is no CLS, and tiles do not see each other; every tile hands out the same
amount, so the numbers compare). Features are always those of the last layer, which the connector was trained on;
`reducer.layer` chooses where attention and keys are read.

Causal, so all questions of a picture share one sequence, tile markers included.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpaudit.errors import rejected
from trainers.families.attention import captured, received, split_heads, widened
from trainers.families.base import Family, Grid, Layers, Prepared, chat_template, square_values
from trainers.prompts import IMAGE, Prompter
from trainers.records import Pixels
from trainers.reducers import VisualTokens

TILES_AT_ONCE = 64
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3(Family):
    """Grid: (rows, columns) of tiles, (0, 0) for a picture that is one tile only."""

    model_type = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
    language = r".*text_model\..*"
    projector = r".*connector\.modality_projection\.proj"

    @property
    def tower(self) -> nn.Module:
        tower: nn.Module = self.hf.model.vision_model
        return tower

    @property
    def language_model(self) -> Any:
        return self.hf.model.text_model

    @property
    def depth(self) -> int:
        return len(self.hf.model.vision_model.encoder.layers)

    @property
    def layer(self) -> int:
        return -1

    @property
    def patches(self) -> int | None:
        return None  # a multiple of `tile_tokens` that depends on the picture's size

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile behind the pixel shuffle."""
        vision = self.hf.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2 // int(self.hf.config.scale_factor) ** 2

    def prompter(self, tokenizer: Any) -> Prompter:
        template = chat_template(tokenizer, IMAGE, self.source)
        begun = tokenizer.bos_token is not None and template.text.startswith(tokenizer.bos_token)
        image = int(self.hf.config.image_token_id)
        return Prompter(tokenizer, template, image, special=not begun)

    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        if self.processor is None:  # no splitting without the checkpoint's own rules for it
            values = square_values(pixels, None, int(self.hf.config.vision_config.image_size))
            return [Prepared(item[None], (0, 0)) for item in values]
        return [self._tiles(item) for item in pixels]

    def _tiles(self, pixels: Pixels) -> Prepared:
        made = self.processor([[Image.fromarray(pixels)]], return_row_col_info=True, return_tensors="np")
        values = torch.as_tensor(np.asarray(made["pixel_values"]))[0]
        side = int(self.hf.config.vision_config.image_size)
        whole = bool(np.asarray(made.get("pixel_attention_mask", 1)).all())
        if values.shape[-2:] != (side, side) or not whole:
            raise rejected(
                "model.path",
                self.source,
                f"a preprocessing that cuts pictures into whole tiles of {side} pixels (max_image_size, do_resize)",
            )
        return Prepared(values, (int(made["rows"][0][0]), int(made["cols"][0][0])))

    def image_head(self, prompter: Prompter, grid: Grid, tokens: int) -> list[int]:
        rows, columns = grid
        across = "".join(
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{IMAGE}" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        text = f"{across}\n" if rows else ""
        marked = prompter.before(f"{text}{AROUND}{WHOLE}{IMAGE}{AROUND}")
        out: list[int] = []
        for token in marked:
            out += [token] * (self.tile_tokens if token == prompter.image_token_id else 1)
        return out

    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        values = torch.cat([picture.values for picture in pictures]).to(self.hf.device, self.hf.dtype)
        parts = [self._encode(values[at : at + TILES_AT_ONCE], layers) for at in range(0, len(values), TILES_AT_ONCE)]
        tiles = VisualTokens.join(parts)

        def joined(value: Tensor) -> Tensor:
            return value.reshape(len(pictures), -1, *value.shape[2:])

        return replace(tiles, tokens=joined(tiles.tokens), importance=joined(tiles.importance), keys=joined(tiles.keys))

    def _encode(self, values: Tensor, layers: Layers) -> VisualTokens:
        tower = self.hf.model.vision_model
        attention = tower.encoder.layers[layers.importance % (self.depth + 1) - 1].self_attn
        with captured(attention.q_proj) as queries, captured(attention.k_proj) as keys:
            hidden = widened(tower(pixel_values=values).last_hidden_state)
        query, key = (split_heads(widened(item[0]), attention.num_heads) for item in (queries, keys))
        weights = received(query, key, attention.head_dim**-0.5).unsqueeze(-1)
        connector, scale = self.hf.model.connector, int(self.hf.config.scale_factor)
        squares = connector.pixel_shuffle(weights, scale).mean(dim=-1)
        mean_keys = connector.pixel_shuffle(key.mean(dim=1), scale)
        mean_keys = mean_keys.unflatten(-1, (scale * scale, -1)).mean(dim=-2)
        return VisualTokens(connector.pixel_shuffle(hidden, scale), None, squares, mean_keys)

    def project(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.hf.model.connector.modality_projection(tokens)
        return projected


class SmolVlm(Idefics3):
    """The same architecture under its own name."""

    model_type = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
