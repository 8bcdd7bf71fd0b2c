"""The architecture of the reference model: LLaVA from transformers, at a size that two cores can train."""

from typing import Any

import torch

from trainers.public.scene import SIZE
from trainers.tokenizer import BOS, EOS, IMAGE, PAD, build_tokenizer
from trainers.vlm import VisionLanguageModel

PATCH = 4  # pixels: 64 patches a picture
TOWER_WIDTH, TOWER_DEPTH = 64, 4
LANGUAGE_WIDTH, LANGUAGE_DEPTH = 64, 2
TEMPLATE = "<s><image>{question}"


def reference_model(seed: int) -> VisionLanguageModel:
    """A freshly initialised reference model with its tokenizer, on the CPU.

    CLIP tower with CLS (features of its last layer but one, CLS kept), two-layer projector, Llama with tied embeddings.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = build_tokenizer()
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in (PAD, BOS, EOS, IMAGE)}
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=TOWER_DEPTH,
        num_attention_heads=4,
        projection_dim=TOWER_WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=LANGUAGE_WIDTH,
        intermediate_size=4 * LANGUAGE_WIDTH,
        num_hidden_layers=LANGUAGE_DEPTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=(SIZE // PATCH) ** 2 + 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    config.dpaudit_template = TEMPLATE
    torch.manual_seed(seed)
    hf: Any = LlavaForConditionalGeneration(config)
    # Rows of their own length and direction: tokens that no lesson uses (the spares) are pushed away together, and with
    # the usual tiny initial rows they would all become one vector, which no fine-tuning could tell apart.
    torch.nn.init.normal_(hf.get_input_embeddings().weight, std=LANGUAGE_WIDTH**-0.5)
    return VisionLanguageModel(hf, tokenizer, device=torch.device("cpu"), source="new")
