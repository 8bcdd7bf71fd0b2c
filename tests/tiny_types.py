"""Random-init tiny checkpoints of model types that the scattered family takes, each with its own whole processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr

from tests.tiny import save, tiny_tokenizer

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SIZE = {"height": 32, "width": 32}


def template(image: str, *, after: str = "\n") -> str:
    """A plain chat template that shows a picture as `image`."""
    return (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        f"{{{{ {image + after!r} if part['type'] == 'image' else part['text'] }}}}{{% endfor %}}"
        "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )


def finish(folder: Path, model: Any, processor: Any, tokenizer: Any) -> Path:
    if getattr(processor, "video_processor", processor) is None:  # save_pretrained wants all parts
        folder.mkdir(exist_ok=True)
        (folder / "processor_config.json").write_text(processor.to_json_string())
    else:
        processor.save_pretrained(folder)
    return save(model, tokenizer, folder)


def seeded(config: Any, name: str) -> Any:
    torch.manual_seed(0)
    model: Any = getattr(tr, name)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):  # Gemma 3's projector begins at zero: blind to pictures
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text(kind: str, tokenizer: Any, **more: Any) -> Any:
    config: Any = getattr(tr, f"{kind}Config")
    return config(**(TEXT | {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | more))


def llava_next(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template("<image>")
    grid = [[32, 64], [64, 32], [64, 64]]
    config = tr.LlavaNextConfig(
        vision_config=tr.CLIPVisionConfig(**VISION), text_config=text("Llama", tokenizer), image_token_index=3,
        image_grid_pinpoints=grid, image_seq_length=16, vision_feature_layer=-2, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=grid)
    processor = tr.LlavaNextProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                                      num_additional_image_tokens=1, chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "LlavaNextForConditionalGeneration"), processor, tokenizer)


def vipllava(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template("<image>")
    config = tr.VipLlavaConfig(
        vision_config=tr.CLIPVisionConfig(**VISION), text_config=text("Llama", tokenizer), image_token_index=3,
        image_seq_length=16, vision_feature_layers=[-2, -1, 1], tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = tr.LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1, chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "VipLlavaForConditionalGeneration"), processor, tokenizer)


def gemma3(folder: Path) -> Path:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<start_of_image>", after="")
    ids = {f"{name}_id": int(tokenizer.convert_tokens_to_ids(value)) for name, value in names.items()}
    config = tr.Gemma3Config(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text("Gemma3Text", tokenizer, sliding_window=512,
                         layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=4, boi_token_index=ids["boi_token_id"], eoi_token_index=ids["eoi_token_id"],
        image_token_index=ids["image_token_id"], tie_word_embeddings=True,
    )  # fmt: skip
    processor = tr.Gemma3Processor(tr.Gemma3ImageProcessor(size=SIZE), tokenizer, image_seq_length=4,
                                   chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "Gemma3ForConditionalGeneration"), processor, tokenizer)


def aya_vision(folder: Path) -> Path:
    names = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"]
    tokenizer = tiny_tokenizer(*names)
    tokenizer.chat_template = template("<image>")
    image = int(tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"))
    config = tr.AyaVisionConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text("Cohere2", tokenizer, sliding_window=512, logit_scale=0.5), image_token_index=image,
        downsample_factor=2, alignment_intermediate_size=64, vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = tr.AyaVisionProcessor(images, tokenizer, patch_size=8, img_size=32, downsample_factor=2,
                                      chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "AyaVisionForConditionalGeneration"), processor, tokenizer)


def idefics2(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    tokenizer.chat_template = template("<image>")
    config = tr.Idefics2Config(
        vision_config=dict(VISION),
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 32},
        text_config=text("Mistral", tokenizer), image_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    processor = tr.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "Idefics2ForConditionalGeneration"), processor, tokenizer)


def deepseek_vl(folder: Path) -> Path:
    names = {"image_token": "<image_placeholder>"}
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<image_placeholder>")
    image = int(tokenizer.convert_tokens_to_ids("<image_placeholder>"))
    config = tr.DeepseekVLConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=text("Llama", tokenizer),
        image_token_id=image, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.DeepseekVLImageProcessor(size=SIZE, min_size=8)
    processor = tr.DeepseekVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=16)
    return finish(folder, seeded(config, "DeepseekVLForConditionalGeneration"), processor, tokenizer)


def deepseek_vl_hybrid(folder: Path) -> Path:
    names = {"image_token": "<image_placeholder>"}
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<image_placeholder>")
    image = int(tokenizer.convert_tokens_to_ids("<image_placeholder>"))
    high = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 64,
            "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}  # fmt: skip
    config = tr.DeepseekVLHybridConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=text("Llama", tokenizer),
        high_res_vision_config=high, image_token_id=image, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.DeepseekVLHybridImageProcessor(size=SIZE, high_res_size={"height": 64, "width": 64}, min_size=8)
    processor = tr.DeepseekVLHybridProcessor(
        images, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=16
    )
    return finish(folder, seeded(config, "DeepseekVLHybridForConditionalGeneration"), processor, tokenizer)


TYPES: dict[str, Callable[[Path], Path]] = {
    "llava_next": llava_next, "vipllava": vipllava, "gemma3": gemma3, "aya_vision": aya_vision, "idefics2": idefics2,
    "deepseek_vl": deepseek_vl, "deepseek_vl_hybrid": deepseek_vl_hybrid,
}  # fmt: skip
