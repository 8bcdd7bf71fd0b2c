"""A random-init tiny LLaVA saved to disk: the same code path as a real checkpoint, in milliseconds."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from trainers.records import Picture, Question, Unit

TEXT = ["what digit is this?", "is it even or odd?", "yes no even odd one two three seven USER ASSISTANT :"]


# LLaVA 1.5's own, apart from a line end behind the picture and no space behind a text.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_tokenizer(
    *more: str, reserved: int = 0, size: int = 320, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `<image>`, `reserved` spare tokens and the special tokens `more`, some by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"] + [f"<|spare_{index}|>" for index in range(reserved)] + list(more)
    trainer = trainers.BpeTrainer(
        vocab_size=size + reserved + len(more),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        chat_template=VICUNA,
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", *more],
        model_specific_special_tokens=named or {},
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write model and tokenizer into `folder`, weights large enough that every path matters; returns it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_llava(
    folder: Path, *, seed: int = 0, strategy: str = "full", reserved: int = 0, tower: str = "clip", width: int = 32
) -> Path:
    """Write a LLaVA with a CLIP or SigLIP tower and its tokenizer into `folder`; returns it."""
    fast = tiny_tokenizer(reserved=reserved)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    config = LlavaConfig(
        vision_config=vision(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(fast),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    config.dpaudit_template = (
        "USER: <image>\n{question} ASSISTANT:"  # like the reference model: no processor of its own
    )
    return save(LlavaForConditionalGeneration(config), fast, folder)


def random_units(count: int, *, seed: int = 0, pictures: int = 1, prefix: str = "u") -> tuple[Unit, ...]:
    """Units with random pictures and one to three questions of different lengths each."""
    rng = np.random.default_rng(seed)
    bank = [
        Question("what digit is this?", "seven", "digit"),
        Question("is it even or odd?", "odd", "parity"),
        Question("is this one of the three?", "no", "other"),
    ]

    def picture(name: str) -> Picture:
        pixels = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
        chosen = tuple(bank[index] for index in sorted(rng.choice(3, size=rng.integers(1, 4), replace=False)))
        return Picture(name, pixels, chosen)

    return tuple(
        Unit(f"{prefix}{index}", tuple(picture(f"{prefix}{index}.{part}") for part in range(pictures)))
        for index in range(count)
    )
