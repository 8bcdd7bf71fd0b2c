"""LoRA fine-tuning of a (tiny) LLaVA with a DP Trainer of one's own. It knows nothing of dpaudit.

    python llava.py                         # train it
    BUG=half-noise python llava.py          # with a mistake on purpose

Nothing is downloaded: the model is LLaVA's architecture with random weights, the pictures are scikit-learn's digits.
"""

import os
import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

SIZE, BATCH, STEPS, CLIP, SIGMA = 60, 6, 30, 1.0, 0.7
BUG = os.environ.get("BUG", "none")  # none, half-noise, batch-clip

ANSWERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTION = ["what", "digit", "is", "this", "?"]
WORDS = ["<pad>", "<image>", *QUESTION, *ANSWERS]
IMAGE = WORDS.index("<image>")
PATCHES = 4  # a picture of 16 x 16 pixels in patches of 8 x 8


def tiny_llava():
    """LLaVA with random weights and LoRA on the language model: 5,120 trained parameters."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS),
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    )
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj|o_proj)")
    return get_peft_model(model, lora)


def example(picture, answer):
    """One picture with its question, as the model's arguments; only the answer is learned."""
    grey = torch.tensor(np.kron(picture.reshape(8, 8) / 8.0 - 1.0, np.ones((2, 2))), dtype=torch.float32)
    question = [IMAGE] * PATCHES + [WORDS.index(word) for word in QUESTION]
    ids = torch.tensor([*question, WORDS.index(answer)])
    labels = torch.where(torch.arange(len(ids)) < len(question), -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": grey.expand(3, 16, 16)}


def load_data():
    """Digits of scikit-learn."""
    pictures, digits = load_digits(return_X_y=True)
    return [example(pictures[index], ANSWERS[digits[index]]) for index in range(SIZE)]


class DPTrainer(Trainer):
    """DP-SGD: one example at a time, so each loss is the mean over its own tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer seeds torch's global generator with 42 by default: noise drawn from it would be public.
        self.secret = torch.Generator()
        self.secret.seed()

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        trained = [value for value in model.parameters() if value.requires_grad]
        total = [torch.zeros_like(value) for value in trained]
        for row in inputs["rows"]:
            loss = self.compute_loss(model, {name: value[None] for name, value in row.items()})
            self.accelerator.backward(loss)
            self.add(total, [value.grad for value in trained], CLIP if BUG != "batch-clip" else 1e9)
            model.zero_grad()
        if (
            BUG == "batch-clip"
        ):  # Hugging Face's own `max_grad_norm` does this: it clips the gradient of the whole batch
            summed, total = total, [torch.zeros_like(value) for value in trained]
            self.add(total, summed, CLIP)
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
    return DPTrainer(
        model=tiny_llava(), args=arguments, train_dataset=rows, data_collator=lambda chosen: {"rows": chosen}
    )


if __name__ == "__main__":
    trainer = make_trainer(load_data())
    trainer.train()
    print(f"{trainer.state.global_step} steps")
