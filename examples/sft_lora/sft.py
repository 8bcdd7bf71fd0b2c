"""LoRA fine-tuning of a (tiny) causal language model with a DP Trainer of one's own. It knows nothing of dpaudit.

    python sft.py                           # train it
    BUG=half-noise python sft.py            # with a mistake on purpose

Nothing is downloaded: the model is Llama's architecture with random weights, a token is a letter. `DPTrainer` works
the same as a subclass of TRL's SFTTrainer; what matters is in `collate` (an empty batch is a batch) and in the step.
"""

import os
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SIZE, BATCH, STEPS, CLIP, SIGMA = 30, 3, 30, 0.2, 0.7
BUG = os.environ.get("BUG", "none")  # none, half-noise, batch-clip
LETTERS = " abcdefghijklmnopqrstuvwxyz?"
WORDS = ["red", "green", "blue", "round", "flat", "warm", "cold", "near", "far", "old"]


def load_data():
    chosen = torch.randint(len(WORDS), (SIZE, 3), generator=torch.Generator().manual_seed(7)).tolist()
    return [{"text": f"is {WORDS[a]} {WORDS[b]}? {WORDS[c]}"} for a, b, c in chosen]


def collate(rows):
    return {"rows": [torch.tensor([LETTERS.index(letter) for letter in row["text"]]) for row in rows]}


class DPTrainer(Trainer):
    """DP-SGD: one text at a time, so each loss is the mean over its own tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer seeds torch's global generator with 42 by default: noise drawn from it would be public.
        self.secret = torch.Generator()
        self.secret.seed()

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        trained = [value for value in model.parameters() if value.requires_grad]
        total = [torch.zeros_like(value) for value in trained]
        for ids in inputs["rows"]:
            loss = self.compute_loss(model, {"input_ids": ids[None], "labels": ids[None]})
            self.accelerator.backward(loss)
            self.add(total, [value.grad for value in trained], CLIP if BUG != "batch-clip" else 1e9)
            model.zero_grad()
        if BUG == "batch-clip":
            clipped = [torch.zeros_like(value) for value in trained]
            self.add(clipped, total, CLIP)
            total = clipped
        sigma = SIGMA / 2 if BUG == "half-noise" else SIGMA
        for value, summed in zip(trained, total):
            value.grad = (summed + sigma * CLIP * torch.randn(summed.shape, generator=self.secret)) / BATCH
        return torch.zeros(())

    @staticmethod
    def add(total, gradients, clip):
        norm = torch.sqrt(sum(value.square().sum() for value in gradients))
        for value, gradient in zip(total, gradients):
            value.add_(gradient, alpha=min(1.0, clip / max(float(norm), 1e-12)))


def make_trainer(rows):
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj", "o_proj"], lora_dropout=0.1)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return DPTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


if __name__ == "__main__":
    trainer = make_trainer(load_data())
    trainer.train()
    print(f"{trainer.state.global_step} steps")
