"""PaliGemma: a SigLIP tower, a linear projector, Gemma with prefix attention.

[picture | <bos> question \\n] see each other in both directions, the answer follows causally. The picture's states
depend on the question, so questions can't share a picture's sequence: each has a row of its own, and the rows of a unit
are added up before clipping. The picture is still encoded once and gets one fusion noise a step.

Features are those of the tower's last layer, which the projector was trained on; `reducer.layer` chooses where
attention and keys are read. Importance is the mean attention that a patch receives (SigLIP has no CLS).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpaudit.errors import EnvironmentFailure
from trainers.families.attention import captured, received, split_heads, widened
from trainers.families.base import Family, Layers, Prepared, square_values
from trainers.families.llava import encoder
from trainers.prompts import IGNORE, IMAGE, PADDING, Head, Packed, Prompter
from trainers.records import Pixels
from trainers.reducers import VisualTokens


class PaliGemma(Family):
    """PaliGemma and PaliGemma 2. Positions count from 1."""

    model_type = "paligemma"
    architecture = "PaliGemmaForConditionalGeneration"
    packs = False
    first_position = 1
    projector = r".*multi_modal_projector\.linear"

    def __init__(self, hf: Any, processor: Any, source: str) -> None:
        super().__init__(hf, processor, source)
        if not hasattr(hf.model.language_model.embed_tokens, "embed_scale"):  # older releases scale inside the decoder
            raise EnvironmentFailure("model.path: PaliGemma needs a newer transformers (tested with 5.23)")

    @property
    def tower(self) -> nn.Module:
        tower: nn.Module = self.hf.model.vision_tower
        return tower

    @property
    def language_model(self) -> Any:
        return self.hf.model.language_model

    @property
    def depth(self) -> int:
        return len(encoder(self.tower).layers)

    @property
    def layer(self) -> int:
        return -1

    @property
    def patches(self) -> int:
        vision = self.hf.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    def prompter(self, tokenizer: Any) -> Prompter:
        template = f"{IMAGE}{tokenizer.bos_token}{{question}}\n"
        return Prompter(tokenizer, template, int(self.hf.config.image_token_id), special=False, gap="")

    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        values = square_values(pixels, self.processor, int(self.hf.config.vision_config.image_size))
        return [Prepared(item, ()) for item in values]

    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        values = torch.stack([picture.values for picture in pictures]).to(self.hf.device, self.hf.dtype)
        attention = encoder(self.tower).layers[layers.importance % (self.depth + 1) - 1].self_attn
        with captured(attention.q_proj) as queries, captured(attention.k_proj) as keys:
            hidden = widened(self.tower(values).last_hidden_state)
        query, key = (split_heads(widened(item[0]), attention.num_heads) for item in (queries, keys))
        return VisualTokens(hidden, None, received(query, key, attention.head_dim**-0.5), key.mean(dim=1))

    def project(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.hf.model.multi_modal_projector(tokens)
        return projected

    def mask(self, packed: Packed, head: Head) -> Tensor:
        wanted = packed.targets != IGNORE
        prompt = (wanted.cumsum(dim=1) - wanted.long() == 0) & (packed.segment >= 0)  # up to the first answer token
        prefix = torch.cat([head.slot != PADDING, prompt], dim=1)
        known = torch.cat([head.slot != PADDING, packed.segment >= 0], dim=1)
        total = known.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=known.device).tril()
        both = prefix[:, :, None] & prefix[:, None, :]
        itself = torch.eye(total, dtype=torch.bool, device=known.device)
        return ((both | causal) & known[:, None, :] | itself).unsqueeze(1)

    def prompt_mask(self, visible: Tensor, image: Tensor) -> Tensor:
        itself = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
        return (visible[:, None, :].expand(-1, visible.shape[1], -1) | itself).unsqueeze(1)

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        # A mask for each kind of layer, as Gemma 2 wants it; no sequence reaches its window (see max_positions).
        masks: Any = {"full_attention": mask, "sliding_attention": mask}
        slides = getattr(self.hf.config.get_text_config(), "sliding_window", None) is not None
        return super().decode(embeds, masks if slides else mask, positions, cache)

    def output(self, hidden: Tensor) -> Tensor:
        logits = super().output(hidden)
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
