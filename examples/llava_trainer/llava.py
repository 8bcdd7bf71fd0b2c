"""LoRA fine-tuning of a (tiny) LLaVA with Hugging Face's Trainer under DP-SGD, and its audit.

    python llava.py                                            # train it
    dpaudit audit --trainer llava:factory                      # audit it
    dpaudit audit --trainer llava:factory --set bug=half-noise     # a mistake on purpose: refuted

Nothing is downloaded: the model is LLaVA's architecture with random weights, the pictures are scikit-learn's digits.
`PrivateTrainer` (trainers/adapters/huggingface.py) is a `transformers.Trainer` whose `training_step` clips each
example; put your checkpoint, your PEFT configuration and your collation in the places of those below.
"""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from trainers.adapters.huggingface import Example, Privacy, PrivateTrainer, UnderTest

PRIVACY = Privacy(
    max_grad_norm=1.0,
    noise_multiplier=0.7,
    expected_batch_size=6,
    public_size=60,
    steps=30,
    delta=1e-5,
    unit="picture with its question",
)
BUGS = ("none", "no-noise", "half-noise", "batch-clip")

ANSWERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTION = ["what", "digit", "is", "this", "?"]
WORDS = ["<pad>", "<image>", *QUESTION, *ANSWERS]
IMAGE = WORDS.index("<image>")
PATCHES = 4  # a picture of 16 x 16 pixels in patches of 8 x 8


def tiny_llava(seed: int) -> nn.Module:
    """LLaVA with random weights and LoRA on the language model: 5,120 trained parameters."""
    torch.manual_seed(seed)
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


def example(picture: np.ndarray, answer: str) -> Mapping[str, Tensor]:
    """One picture with its question, as the model's arguments; only the answer is learned."""
    grey = torch.tensor(np.kron(picture.reshape(8, 8) / 8.0 - 1.0, np.ones((2, 2))), dtype=torch.float32)
    question = [IMAGE] * PATCHES + [WORDS.index(word) for word in QUESTION]
    ids = torch.tensor([*question, WORDS.index(answer)])
    labels = torch.where(torch.arange(len(ids)) < len(question), -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": grey.expand(3, 16, 16)}


def own_records() -> list[Example]:
    """Digits of scikit-learn."""
    pictures, digits = load_digits(return_X_y=True)
    return [example(pictures[index], ANSWERS[digits[index]]) for index in range(PRIVACY.public_size)]


class Buggy(PrivateTrainer):
    """Mistakes on purpose; `bug` is set after construction."""

    bug = "none"

    def noise(self, name: str, like: Tensor) -> Tensor:
        return {"no-noise": 0.0, "half-noise": 0.5}.get(self.bug, 1.0) * super().noise(name, like)

    def training_step(self, model: nn.Module, inputs: Sequence[Example], num_items_in_batch: object = None) -> Tensor:
        if self.bug != "batch-clip":
            return super().training_step(model, inputs)
        # Hugging Face's own `max_grad_norm` does this: it clips the gradient of the whole batch.
        self.private_steps += 1
        gradients = [*self.injected, *(self.unit_gradient(model, item)[0] for item in inputs)]
        self.injected = []
        size = self.privacy.expected_batch_size
        mean = {
            name: torch.stack([gradient[name] for gradient in gradients]).sum(dim=0) / size if gradients else value * 0
            for name, value in self.trained(model).items()
        }
        factor = self.clip_factor(mean)
        for name, value in self.trained(model).items():
            value.grad = factor * mean[name].detach() + self.noise(name, value) / size
        return torch.zeros(())


class LlavaUnderTest(UnderTest):
    """What dpaudit sees: records and seeds in, steps out. `UnderTest` holds the rest of the protocol."""

    trainer_class = Buggy

    def __init__(
        self, records: Sequence[Example] | None = None, *, seed: int, noise_seed: int | None = None, bug: str = "none"
    ) -> None:
        if bug not in BUGS:
            raise ValueError(f"bug: got {bug!r}; accepted: {', '.join(BUGS)}")
        chosen = own_records() if records is None else records
        super().__init__(tiny_llava(seed), chosen, PRIVACY, seed=seed, noise_seed=noise_seed)
        self.trainer.bug = bug

    def canaries(self, n: int, seed: int) -> list[Example]:
        """Noise pictures with answers drawn at random."""
        rng = np.random.default_rng(seed)
        return [example(rng.uniform(0, 16, 64), ANSWERS[rng.integers(10)]) for _ in range(n)]

    def extreme_records(self) -> list[Example]:
        """White, black, and far brighter than any picture."""
        return [example(np.full(64, value), "zero") for value in (16.0, 0.0, 1e4)]


factory = LlavaUnderTest


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the model.")
    parser.add_argument("--bug", choices=BUGS, default="none", help="a mistake on purpose")
    trainer = LlavaUnderTest(seed=0, bug=parser.parse_args().bug)
    before = np.mean([trainer.score(record) for record in trainer.records])
    for _ in range(PRIVACY.steps):
        trainer.step(trainer.sample())
    after = np.mean([trainer.score(record) for record in trainer.records])
    spent = trainer.epsilon(PRIVACY.delta)
    print(f"loss {-before:.3f} -> {-after:.3f} on {len(trainer.records)} records; eps = {spent:.2f}")


if __name__ == "__main__":
    main()
