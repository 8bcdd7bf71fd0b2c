"""A Hugging Face `Trainer` subclass under test.

`PrivateTrainer` overrides `training_step` alone: one example at a time (so each loss is the mean over its own tokens,
never Hugging Face's token mean over the batch), clip, add, noise, divide by the public batch size. What follows is the
Trainer's own optimiser on the noisy gradient. `max_grad_norm=0` in the arguments turns off the Trainer's own clipping,
which would otherwise act on the noisy mean (harmless, but not what C means). Trained is what `requires_grad`: with PEFT
the adapter.

`UnderTest` is what a subclass of your own needs to be tested: it builds the trainer from records and seeds, feeds it
chosen batches, and shows the noisy gradient. `examples/llava_trainer` uses both on a LLaVA with LoRA; `factory` here is
the smallest causal language model.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from dpaudit import accounting
from dpaudit.claims import StepClaim
from dpaudit.randomness import Key

Example = Tensor | Mapping[str, Tensor]  # token ids (length,), or the model's arguments without the batch dimension
Gradient = dict[str, Tensor]

VOCABULARY = 24


@dataclass(frozen=True)
class Privacy:
    """The public numbers of a DP training: C, sigma / C, expected batch size, declared number of records, steps."""

    max_grad_norm: float = 0.5
    noise_multiplier: float = 1.0
    expected_batch_size: int = 5
    public_size: int = 40
    steps: int | None = None
    delta: float = 1e-5
    unit: str = "sequence"

    @property
    def rate(self) -> float:
        """Of Poisson sampling."""
        return self.expected_batch_size / self.public_size


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """DP-SGD by the micro-batch loop inside Hugging Face's training step."""

    def __init__(self, *arguments: Any, key: Key, privacy: Privacy = Privacy(), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.key, self.privacy, self.private_steps = key, privacy, 0
        self.injected: list[Mapping[str, Tensor]] = []
        self.create_optimizer_and_scheduler(num_training_steps=privacy.steps or 1000)

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is clipped, noised and updated."""
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    def unit_loss(self, model: nn.Module, example: Example) -> Tensor:
        """The loss of one example: the mean over its own tokens."""
        if isinstance(example, Tensor):
            example = {"input_ids": example, "labels": example}
        loss: Tensor = self.compute_loss(model, {name: value[None] for name, value in example.items()})
        return loss

    def unit_gradient(self, model: nn.Module, example: Example) -> tuple[Gradient, Tensor]:
        """Gradient of one example's loss before clipping, and the loss."""
        named = self.trained(model)
        loss = self.unit_loss(model, example)
        values = torch.autograd.grad(loss, list(named.values()))
        return dict(zip(named, values, strict=True)), loss.detach()

    def clip_factor(self, gradient: Mapping[str, Tensor]) -> float:
        """min(1, C / norm); 0 for a gradient that is not finite: it must not reach the sum."""
        norm = torch.stack([value.square().sum() for value in gradient.values()]).sum().sqrt()
        size = self.privacy.max_grad_norm
        return float(size / norm.clamp(min=size)) if bool(torch.isfinite(norm)) else 0.0

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Noise on the sum: a function of key, step and parameter name."""
        standard = torch.from_numpy(self.key.normal(tuple(like.shape), step=self.private_steps, name=name))
        return self.privacy.noise_multiplier * self.privacy.max_grad_norm * standard

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """`inputs`: a list of examples; leaves the noisy mean in `.grad` for the optimiser."""
        self.private_steps += 1
        named = self.trained(model)
        total = {name: torch.zeros_like(value) for name, value in named.items()}
        loss = torch.zeros(())
        for gradient in self.injected:
            self._add_clipped(total, gradient)
        self.injected = []
        for example in inputs:
            own, one = self.unit_gradient(model, example)
            self._add_clipped(total, own)
            loss = loss + one
        for name, value in named.items():
            value.grad = (total[name] + self.noise(name, value)) / self.privacy.expected_batch_size
        return loss / self.privacy.expected_batch_size

    def _add_clipped(self, total: Gradient, gradient: Mapping[str, Tensor]) -> None:
        factor = self.clip_factor(gradient)
        for name in total if factor else ():
            total[name].add_(gradient[name], alpha=factor)


class UnderTest:
    """A `PrivateTrainer` on a model as a trainer under test; override `canaries` and `extreme_records`."""

    trainer_class: type[PrivateTrainer] = PrivateTrainer

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[Example],
        privacy: Privacy,
        *,
        seed: int,
        noise_seed: int | None = None,
        learning_rate: float = 1e-2,
    ) -> None:
        hf_logging.set_verbosity_error()
        self.model, self.records, self.privacy = model, list(records), privacy
        self.sampler = np.random.default_rng([seed, 3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(
                output_dir=tempfile.gettempdir(),
                max_grad_norm=0.0,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            )
            key = Key.fresh() if noise_seed is None else Key.from_seed(noise_seed)
            self.trainer = self.trainer_class(model=model, args=arguments, key=key, privacy=privacy)
        self.last: Gradient = {}

    @property
    def claim(self) -> StepClaim:
        """Of one training step."""
        own = self.privacy
        return StepClaim(
            mechanism="gaussian",
            max_grad_norm=own.max_grad_norm,
            noise_multiplier=own.noise_multiplier,
            sampling="poisson",
            sample_rate=own.rate,
            expected_batch_size=float(own.expected_batch_size),
            relation="add-remove",
            unit=own.unit,
            steps=own.steps,
            delta=own.delta,
        )

    def step(self, indices: Sequence[int]) -> None:
        """What the Trainer's loop does with one batch."""
        self.model.train()
        self.trainer.training_step(self.model, [self.records[index] for index in sorted(set(indices))])
        named = self.trainer.trained(self.model)
        self.last = {name: value.grad.detach().clone() for name, value in named.items() if value.grad is not None}
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()

    def released(self) -> Mapping[str, Tensor | None]:
        """The noisy mean."""
        return self.last

    def parameters(self) -> Mapping[str, Tensor]:
        """What is trained."""
        return dict(self.trainer.trained(self.model))

    def sample(self) -> list[int]:
        """Poisson."""
        return [int(index) for index in np.flatnonzero(self.sampler.random(len(self.records)) < self.privacy.rate)]

    def gradient(self, record: Example) -> Mapping[str, Tensor]:
        """Before clipping."""
        self.model.train()
        return self.trainer.unit_gradient(self.model, record)[0]

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """One more unit for the next step, before clipping."""
        self.trainer.injected.append(gradient)

    @torch.no_grad()
    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """What is trained, and nothing of the optimiser's state."""
        for name, value in self.trainer.trained(self.model).items():
            value.copy_(parameters[name])

    @torch.no_grad()
    def score(self, record: Example) -> float:
        """Minus the loss."""
        self.model.eval()
        return -float(self.trainer.unit_loss(self.model, record))

    def epsilon(self, delta: float) -> float:
        """For the steps taken."""
        event = accounting.DpSgd(self.privacy.noise_multiplier, self.privacy.rate, self.trainer.private_steps)
        return accounting.epsilon(event, delta)


def own_records() -> list[Tensor]:
    """Token sequences of different lengths, always the same."""
    generator = torch.Generator().manual_seed(5513)
    lengths = torch.randint(4, 10, (Privacy().public_size,), generator=generator).tolist()
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


class Adapter(UnderTest):
    """The smallest example: all parameters of a tiny language model, trained on token sequences."""

    def __init__(self, records: Sequence[Tensor] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        chosen = own_records() if records is None else records
        super().__init__(tiny_llama(seed), chosen, Privacy(), seed=seed, noise_seed=noise_seed)

    def canaries(self, n: int, seed: int) -> list[Tensor]:
        """Random sequences."""
        generator = torch.Generator().manual_seed(seed)
        return list(torch.randint(VOCABULARY, (n, 8), generator=generator))

    def extreme_records(self) -> list[Tensor]:
        """One token over and over, a long sequence, the shortest one."""
        return [torch.zeros(12, dtype=torch.int64), torch.arange(40) % VOCABULARY, torch.tensor([1, 2])]


factory = Adapter
