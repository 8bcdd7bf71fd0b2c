"""Random-init tiny models of every family but LLaVA, with their own preprocessing: no download, milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.tiny import save, save_tiny_llava, tiny_tokenizer

TEXT_SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


# Idefics3's and SmolVLM's (with another beginning), and Qwen2-VL's.
USER = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_idefics3(folder: Path, *, seed: int = 0, smol: bool = False) -> Path:
    """Tiles of 32 pixels, 4 tokens each, pictures up to 2 x 2 tiles."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    start = "<|im_start|>" if smol else "<|begin_of_text|>"
    tokenizer = tiny_tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", start, *tiles)
    tokenizer.chat_template = start + USER
    torch.manual_seed(seed)
    config_class, model_class, processor_class = (
        (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)
        if smol
        else (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil)
    )
    config = config_class(
        vision_config=dict(SIGLIP),
        text_config=LlamaConfig(**TEXT_SIZE, vocab_size=len(tokenizer)),
        scale_factor=2,
        image_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}).save_pretrained(folder)
    return save(model_class(config), tokenizer, folder)


def save_tiny_paligemma(folder: Path, *, seed: int = 0) -> Path:
    """16 patches a picture."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = PaliGemmaConfig(
        vision_config=dict(SIGLIP, vision_use_head=False, model_type="siglip_vision_model"),
        text_config=GemmaConfig(**TEXT_SIZE, head_dim=8, vocab_size=len(tokenizer)),
        image_token_index=3,
        vocab_size=len(tokenizer),
        projection_dim=32,
        hidden_size=32,
    )
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor.image_seq_length = 16
    processor.save_pretrained(folder)
    return save(PaliGemmaForConditionalGeneration(config), tokenizer, folder)


def save_tiny_qwen2_vl(folder: Path, *, seed: int = 0, version: str = "2") -> Path:
    """Patches of 4 pixels in squares of two: 4 to 16 tokens a picture. Version 2.5 attends in windows of 16 pixels."""
    tokenizer = tiny_tokenizer("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokenizer.chat_template = CHATML
    image = int(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    torch.manual_seed(seed)
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    text = {**TEXT_SIZE, "vocab_size": len(tokenizer), "rope_parameters": ROPE}
    common = {
        "text_config": text,
        "image_token_id": image,
        "vision_start_token_id": image - 2,
        "tie_word_embeddings": True,
    }
    model: Any
    if version == "2":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **common))
    else:
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
        vision["fullatt_block_indexes"] = [0, 2]
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **common))
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size).save_pretrained(folder)
    return save(model, tokenizer, folder)


def save_tiny_qwen3_vl(folder: Path, *, seed: int = 0, experts: bool = False) -> Path:
    """As Qwen2-VL, with features of two tower layers for the first two decoder layers."""
    import transformers

    tokenizer = tiny_tokenizer("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokenizer.chat_template = CHATML
    image = int(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    torch.manual_seed(seed)
    vision = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_size": 16,
              "intermediate_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
              "num_position_embeddings": 64}  # fmt: skip
    text = {**TEXT_SIZE, "vocab_size": len(tokenizer), "head_dim": 8, "rope_parameters": ROPE}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if experts else {}
    kind: Any = "Qwen3VLMoe" if experts else "Qwen3VL"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_id=image, vision_start_token_id=image - 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size).save_pretrained(folder)
    return save(getattr(transformers, f"{kind}ForConditionalGeneration")(config), tokenizer, folder)


ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}

# Every family by name, as a function of the folder to save it in.
TINY: dict[str, Callable[[Path], Path]] = {
    "llava": save_tiny_llava,
    "llava-siglip": lambda folder: save_tiny_llava(folder, tower="siglip"),
    "idefics3": save_tiny_idefics3,
    "smolvlm": lambda folder: save_tiny_idefics3(folder, smol=True),
    "paligemma": save_tiny_paligemma,
    "qwen2_vl": save_tiny_qwen2_vl,
    "qwen2_5_vl": lambda folder: save_tiny_qwen2_vl(folder, version="2.5"),
    "qwen3_vl": save_tiny_qwen3_vl,
    "qwen3_vl_moe": lambda folder: save_tiny_qwen3_vl(folder, experts=True),
}
