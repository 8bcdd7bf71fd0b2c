"""A Hugging Face `Trainer` subclass under test.

`PrivateTrainer` overrides `training_step` alone: one example at a time (so each loss is the mean over its own tokens,
never Hugging Face's token mean over the batch), clip, add, noise, divide by the public batch size. What follows is the
Trainer's own optimiser on the noisy gradient. `max_grad_norm=0` in the arguments turns off the Trainer's own clipping,
which would otherwise act on the noisy mean (harmless, but not what C means).

The adapter below is what your own subclass needs to be tested: build it from records and seeds, feed it chosen batches,
and show the noisy gradient.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from dpaudit import accounting
from dpaudit.claims import StepClaim
from dpaudit.randomness import Key

PUBLIC_SIZE, BATCH, CLIP, SIGMA, DELTA, VOCABULARY = 40, 5, 0.5, 1.0, 1e-5, 24
RATE = BATCH / PUBLIC_SIZE


def own_records() -> list[Tensor]:
    """Token sequences of different lengths, always the same."""
    generator = torch.Generator().manual_seed(5513)
    lengths = torch.randint(4, 10, (PUBLIC_SIZE,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A random causal language model of 4,000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """DP-SGD by the micro-batch loop inside Hugging Face's training step."""

    def __init__(self, *arguments: Any, key: Key, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.key, self.private_steps = key, 0
        self.create_optimizer_and_scheduler(num_training_steps=1000)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """`inputs`: a list of examples; leaves the noisy mean in `.grad` for the optimiser."""
        self.private_steps += 1
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        total = {name: torch.zeros_like(value) for name, value in named.items()}
        loss = torch.zeros(())
        for example in inputs:
            one = self.compute_loss(model, {"input_ids": example[None], "labels": example[None]})
            values = torch.autograd.grad(one, list(named.values()))
            norm = torch.stack([value.square().sum() for value in values]).sum().sqrt()
            if bool(torch.isfinite(norm)):
                factor = float(CLIP / norm.clamp(min=CLIP))
                for name, value in zip(named, values, strict=True):
                    total[name].add_(value, alpha=factor)
            loss = loss + one.detach()
        for name, value in named.items():
            noise = torch.from_numpy(self.key.normal(tuple(value.shape), step=self.private_steps, name=name))
            value.grad = (total[name] + SIGMA * CLIP * noise) / BATCH
        return loss / BATCH


class Adapter:
    """`PrivateTrainer` as a trainer under test."""

    def __init__(self, records: Sequence[Tensor] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        hf_logging.set_verbosity_error()
        self.records = list(records) if records is not None else own_records()
        self.sampler = np.random.default_rng([seed, 3])
        self.model = tiny_llama(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(
                output_dir=tempfile.gettempdir(),
                max_grad_norm=0.0,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            )
            key = Key.fresh() if noise_seed is None else Key.from_seed(noise_seed)
            self.trainer = PrivateTrainer(model=self.model, args=arguments, key=key)
        self.last: dict[str, Tensor] = {}

    @property
    def claim(self) -> StepClaim:
        """Of one training step."""
        return StepClaim("gaussian", CLIP, SIGMA, "poisson", RATE, float(BATCH), "add-remove", "sequence", delta=DELTA)

    def step(self, indices: Sequence[int]) -> None:
        """What the Trainer's loop does with one batch."""
        self.model.train()
        self.trainer.training_step(self.model, [self.records[index] for index in sorted(set(indices))])
        named = self.model.named_parameters()
        self.last = {name: value.grad.detach().clone() for name, value in named if value.grad is not None}
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()

    def released(self) -> Mapping[str, Tensor | None]:
        """The noisy mean."""
        return self.last

    def parameters(self) -> Mapping[str, Tensor]:
        """All of the model."""
        return dict(self.model.named_parameters())

    def extreme_records(self) -> list[Tensor]:
        """One token over and over, a long sequence, the shortest one."""
        return [torch.zeros(12, dtype=torch.int64), torch.arange(40) % VOCABULARY, torch.tensor([1, 2])]

    def sample(self) -> list[int]:
        """Poisson."""
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < RATE)]

    def gradient(self, record: Tensor) -> Mapping[str, Tensor]:
        """Before clipping."""
        named = dict(self.model.named_parameters())
        loss = self.model(input_ids=record[None], labels=record[None]).loss
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def epsilon(self, delta: float) -> float:
        """For the steps taken."""
        event = accounting.DpSgd(SIGMA, RATE, self.trainer.private_steps)
        return accounting.epsilon(event, delta)


factory = Adapter
