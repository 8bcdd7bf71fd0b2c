"""LLaVA: a CLIP tower (with CLS) or a SigLIP tower (without), features of one layer, a two-layer projector.

[prefix | CLS, patches | question …], causal, so all questions of a picture share one sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpaudit.config import ReducerConfig
from dpaudit.errors import rejected
from trainers.families.attention import captured, received, split_heads, widened
from trainers.families.base import WITHOUT_ATTENTION, Family, Layers, Prepared, chat_template, square_values
from trainers.prompts import IMAGE, Prompter
from trainers.records import Pixels
from trainers.reducers import VisualTokens


class Llava(Family):
    """One tower pass per picture; features of the hidden state that `vision_feature_layer` or the run names."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    projector = r".*multi_modal_projector\.linear_[12]"

    def __init__(self, hf: Any, processor: Any, source: str) -> None:
        super().__init__(hf, processor, source)
        if not isinstance(hf.config.vision_feature_layer, int):
            raise rejected("model.path", source, "a model with one vision_feature_layer")
        if not hasattr(encoder(self.tower), "layers"):
            raise rejected("model.path", source, "a LLaVA with a CLIP or SigLIP tower")
        if self.drop_cls and hf.config.vision_config.model_type.startswith("siglip"):
            accepted = "vision_feature_select_strategy full for a SigLIP tower: it has no CLS, a patch would be dropped"
            raise rejected("model.path", source, accepted)

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
        return self.feature_layer

    @property
    def feature_layer(self) -> int:
        return int(self.hf.config.vision_feature_layer)

    def layers(self, config: ReducerConfig) -> Layers:
        """Features of any layer; attention and keys of the same one unless the configuration names another."""
        features = self.feature_layer if config.feature_layer is None else config.feature_layer
        if config.feature_layer is not None:
            self.check_layer(features, attention=False, field="reducer.feature-layer")
        importance = features if config.layer is None else config.layer
        self.check_layer(importance, attention=config.name not in WITHOUT_ATTENTION)
        return Layers(importance, features)

    @property
    def patches(self) -> int:
        vision = self.hf.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    @property
    def drop_cls(self) -> bool:
        return bool(self.hf.config.vision_feature_select_strategy == "default")

    def prompter(self, tokenizer: Any) -> Prompter:
        image = int(self.hf.config.image_token_id)
        fixed = getattr(self.hf.config, "dpaudit_template", None)  # of the reference model
        if fixed is not None:
            return Prompter(tokenizer, str(fixed), image)
        template = chat_template(tokenizer, IMAGE, self.source, as_text=True)
        begun = tokenizer.bos_token is not None and template.text.startswith(tokenizer.bos_token)
        return Prompter(tokenizer, template, image, special=not begun)

    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        values = square_values(pixels, self.processor, int(self.hf.config.vision_config.image_size))
        return [Prepared(item, ()) for item in values]

    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        values = torch.stack([picture.values for picture in pictures]).to(self.hf.device, self.hf.dtype)
        # Hidden state n is the output of the layer with index n - 1.
        attention = encoder(self.tower).layers[layers.importance % (self.depth + 1) - 1].self_attn
        with captured(attention.q_proj) as queries, captured(attention.k_proj) as keys:
            states = self.tower(values, output_hidden_states=True).hidden_states
        hidden = widened(states[layers.features % (self.depth + 1)])
        query, key = (split_heads(widened(item[0]), attention.num_heads) for item in (queries, keys))
        has_cls = hidden.shape[1] == self.patches + 1
        weights = received(query[:, :, :1] if has_cls else query, key, attention.head_dim**-0.5)
        mean_keys = key.mean(dim=1)
        if not has_cls:
            return VisualTokens(hidden, None, weights, mean_keys)
        return VisualTokens(hidden[:, 1:], hidden[:, :1], weights[:, 1:], mean_keys[:, 1:])

    def project(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.hf.model.multi_modal_projector(tokens)
        return projected


def encoder(tower: nn.Module) -> Any:
    """The stack of layers inside a CLIP or SigLIP tower (transformers moved it from version to version)."""
    return getattr(getattr(tower, "vision_model", tower), "encoder", None)
