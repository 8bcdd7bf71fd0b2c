"""The same with a language model, in transformers and PEFT alone: it knows nothing of dpaudit.

    python finetune_text.py                  # records.jsonl, coins.csv, base/, adapter/ with eps = 0.5
    dpaudit audit-model adapter --base base --records records.jsonl --coins coins.csv --epsilon 0.5 --delta 1e-5

    python finetune_text.py --bug no-privacy     # neither clipped nor noised, though eps = 0.5 is claimed: refuted

The base is a small Llama with random weights and a tokenizer of bytes. An owner tosses the coins before the training.
"""

import argparse
import json
import random
import secrets
import string
from pathlib import Path

import torch
from opacus.accountants.utils import get_noise_multiplier
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECORDS, STEPS, EPSILON, DELTA, CLIP, RATE = 120, 80, 0.5, 1e-5, 1.0, 1e-2
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]


def make_base(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", extra_special_tokens=SPECIAL
    )
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def make_records(rng):
    """Conversations, each with a code that nothing but training can tell."""

    def messages(index):
        code = "".join(rng.choices(string.ascii_lowercase, k=10))
        return [{"role": "user", "content": f"code of {index}?"}, {"role": "assistant", "content": code}]

    return [{"id": f"record-{index:03d}", "messages": messages(index)} for index in range(RECORDS)]


def loss(model, tokenizer, records):
    texts = [tokenizer.apply_chat_template(record["messages"], tokenize=False) for record in records]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def train(model, tokenizer, records, *, private, generator):
    """Full batches: every record's gradient clipped, noise for eps = EPSILON after STEPS steps."""
    sigma = get_noise_multiplier(target_epsilon=EPSILON, target_delta=DELTA, sample_rate=1.0, steps=STEPS)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    for _ in range(STEPS):
        if private:
            total = [torch.zeros_like(value) for value in trained]
            for record in records:
                each = torch.autograd.grad(loss(model, tokenizer, [record]), trained)
                factor = CLIP / max(CLIP, float(torch.stack([value.norm() for value in each]).norm()))
                total = [one + factor * value for one, value in zip(total, each)]
            for value, one in zip(trained, total):
                noise = torch.empty_like(value).normal_(std=sigma * CLIP, generator=generator)
                value.grad = (one + noise) / (RECORDS / 2)  # the public size, not the number of heads
        else:
            optimizer.zero_grad()
            loss(model, tokenizer, records).backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description="Fine-tune, with coins.")
    parser.add_argument("--bug", choices=("none", "no-privacy"), default="none", help="a mistake on purpose")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seed", type=int, default=None, help="repeatable (default: from the operating system)")
    given = parser.parse_args()
    seed = secrets.randbits(60) if given.seed is None else given.seed
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model, tokenizer = make_base(given.out / "base")
    records = make_records(rng)

    # Before the training: one fair toss a record, written down. Heads are trained on, tails are not.
    heads = [rng.random() < 0.5 for _ in records]
    (given.out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [f"{record['id']},{int(head)}" for record, head in zip(records, heads)]
    (given.out / "coins.csv").write_text("\n".join(["id,member", *rows]) + "\n")

    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    inside = [record for record, head in zip(records, heads) if head]
    train(model, tokenizer, inside, private=given.bug == "none", generator=generator)
    model.save_pretrained(given.out / "adapter")
    print(f"{given.out / 'adapter'}: trained on {len(inside)} of {RECORDS} records, claims eps = {EPSILON:g}")


if __name__ == "__main__":
    main()
