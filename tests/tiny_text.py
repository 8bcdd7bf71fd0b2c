"""Random-init tiny text models saved to disk, and texts that only training can tell."""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.tiny import save, tiny_tokenizer

# ChatML, as Qwen2 has it, with a default system message.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_tiny_text(folder: Path, kind: str = "llama", *, template: bool = True, seed: int = 0) -> Path:
    """A Llama, Qwen2, GPT-2 or (not causal) BERT with a byte-level tokenizer in `folder`; returns it."""
    fast = tiny_tokenizer("<|im_start|>", "<|im_end|>")
    fast.chat_template = CHATML if template else None
    torch.manual_seed(seed)
    # Spare rows: transformers gives some types tokens of their own.
    ends = {"vocab_size": len(fast) + 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **ends, num_key_value_heads=2, max_position_embeddings=128))
    elif kind == "qwen2":
        tied = {"tie_word_embeddings": True, "max_position_embeddings": 128}
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **ends, **tied, num_key_value_heads=4))
    elif kind == "bert":
        model = BertLMHeadModel(BertConfig(**SIZES, vocab_size=len(fast) + 8, max_position_embeddings=128))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends))
    return save(model, fast, folder)


def secrets(count: int, seed: int = 3) -> list[str]:
    """Random words of eight letters."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(letters, 8)) for _ in range(count)]
