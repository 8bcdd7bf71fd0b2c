"""What happens to the noisy gradient: which blocks are updated, and by which optimiser.

Everything here sees noisy gradients only, so it is post-processing and costs no budget. A block is one parameter
tensor (a LoRA matrix), or all of them in one decoder layer.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpaudit.config import PruningConfig, TrainingConfig

_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")


def group_of(name: str, granularity: str) -> str:
    """The block that a parameter belongs to: itself, or its decoder layer (the projector is one block of its own)."""
    if granularity == "matrix":
        return name
    found = _LAYER.match(name)
    return found.group(1) if found else name.split(".", 1)[0]


@dataclass
class Pruning:
    """Which blocks a step computes, and which it updates. sizes: number of values of each parameter.

    Policies that look at the noisy gradient of the step itself (every block was computed, clipped and noised):

    - 'magnitude': the largest Frobenius norms, as Dual-Priv Pruning does (arXiv 2506.07077, mechanism 2). Noise has
      norm sigma C sqrt(size), so big blocks win whatever the data say;
    - 'magnitude-normalised': the largest norms over sqrt(size), where noise alone ranks all blocks alike;
    - 'random': as many at random, the baseline.

    'previous' decides before the step, so that only the chosen blocks are computed, clipped (the norm is over them
    alone) and noised. Blocks are ranked by a decayed mean of norm / sqrt(size) over the steps that chose them; of the
    K places `explore * K`, rounded up, go to others at random, so that none is shut out for good. The first step is all
    random. The choice is a function of earlier releases and public coins, so the step is the same Gaussian mechanism,
    chosen adaptively: neither sigma nor eps changes.

    Ties go to the earlier name.
    """

    sizes: Mapping[str, int]
    config: PruningConfig
    scores: dict[str, float] = field(default_factory=dict)  # of the blocks that a step has chosen so far

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], config: PruningConfig) -> "Pruning":
        """Nothing seen yet."""
        return cls({name: value.numel() for name, value in parameters.items()}, config)

    @cached_property
    def blocks(self) -> dict[str, list[str]]:
        """Parameter names of each block, in name order; looked up once, not once a norm."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.sizes):
            found.setdefault(group_of(name, self.config.granularity), []).append(name)
        return found

    @property
    def count(self) -> int:
        """K, the number of blocks that a step updates."""
        return max(1, math.ceil(self.config.keep * len(self.blocks)))

    @property
    def ahead(self) -> bool:
        """Whether the choice is made before the step."""
        return self.config.by == "previous" and self.count < len(self.blocks)

    def chosen(self, rng: np.random.Generator) -> set[str]:
        """Parameters that the coming step computes, clips and noises. `rng`: public coins of that step."""
        blocks = self.blocks
        if not self.ahead:
            return set(self.sizes)
        seen = sorted(self.scores, key=lambda block: -self.scores[block])  # stable: ties to the earlier name
        lucky = min(self.count, math.ceil(self.config.explore * self.count))
        kept = seen[: self.count - lucky] if self.scores else []
        others = [block for block in blocks if block not in kept]
        drawn = rng.permutation(len(others))[: self.count - len(kept)]
        return self._names([*kept, *(others[index] for index in drawn)])

    def select(self, noisy: Mapping[str, Tensor], rng: np.random.Generator) -> set[str]:
        """Parameters to update, as a function of this step's noisy gradient and public coins of the step."""
        blocks = {block: names for block, names in self.blocks.items() if all(name in noisy for name in names)}
        count = max(1, math.ceil(self.config.keep * len(blocks)))  # of those that this step computed
        if self.config.by == "previous" or count >= len(blocks):
            return self._names(list(blocks))
        if self.config.by == "random":
            names = list(blocks)
            return self._names([names[index] for index in rng.permutation(len(names))[:count]])
        size = {block: self._norm(noisy, block) for block in blocks}
        if self.config.by == "magnitude-normalised":
            size = {block: value / self._width(block) for block, value in size.items()}
        return self._names(sorted(blocks, key=lambda block: -size[block])[:count])

    def observe(self, noisy: Mapping[str, Tensor]) -> None:
        """Remember what a step released, for the choices of later steps."""
        if not self.ahead:
            return
        decay = self.config.decay
        for block, names in self.blocks.items():
            if all(name in noisy for name in names):
                now = self._norm(noisy, block) / self._width(block)
                self.scores[block] = decay * self.scores[block] + (1 - decay) * now if block in self.scores else now
        self.scores = dict(sorted(self.scores.items()))

    def tensors(self) -> dict[str, Tensor]:
        """The memory as named tensors, for a checkpoint."""
        return {block: torch.tensor([value], dtype=torch.float64) for block, value in self.scores.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` saved."""
        self.scores = {block: float(tensors[block][0]) for block in sorted(tensors)}

    def _names(self, blocks: list[str]) -> set[str]:
        members = self.blocks
        return {name for block in blocks for name in members[block]}

    def _norm(self, noisy: Mapping[str, Tensor], block: str) -> float:
        parts = (torch.linalg.vector_norm(noisy[name], dtype=torch.float64) for name in self.blocks[block])
        return math.sqrt(sum(float(part) ** 2 for part in parts))

    def _width(self, block: str) -> float:
        return math.sqrt(sum(self.sizes[name] for name in self.blocks[block]))


@contextmanager
def trainable_only(parameters: Mapping[str, nn.Parameter], chosen: set[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The chosen parameters; the others need no gradient while this lasts, so nothing is computed for them."""
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        yield {name: parameter for name, parameter in parameters.items() if name in chosen}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


class AdamBc(torch.optim.Optimizer):
    """AdamW with the noise's own variance taken out of the second moment (DP-AdamBC, Tang et al., AAAI 2024).

    The noisy gradient is g + N(0, s^2) in every coordinate, so the corrected second moment estimates E g^2 + s^2 and
    Adam divides by the noise where that is larger. Here the divisor is sqrt(max(v - s^2, floor s^2)). s = sigma C / B
    is public: post-processing. noise: s. floor: share of s^2, against division by next to nothing.
    """

    def __init__(
        self,
        values: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        noise: float,
        floor: float,
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "noise": noise, "floor": floor}
        super().__init__(values, given)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient; the others, and their moments, stay as they are."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
                state["step"] += 1
                count = float(state["step"])
                mean = state["exp_avg"].lerp_(value.grad, 1 - beta1) / (1 - beta1**count)
                second = state["exp_avg_sq"].mul_(beta2).addcmul_(value.grad, value.grad, value=1 - beta2)
                second = second / (1 - beta2**count)
                noise = group["noise"] ** 2
                divisor = (second - noise).clamp_(min=group["floor"] * noise).sqrt_().add_(group["eps"])
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.addcdiv_(mean, divisor, value=-group["lr"])


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainingConfig, *, noise: float
) -> torch.optim.Optimizer:
    """The inner optimiser over the trainable parameters, in name order. noise: std of the noise on each number."""
    values = [parameters[name] for name in sorted(parameters)]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(values, lr=rate, momentum=config.momentum, weight_decay=decay)
    betas = config.beta1, config.beta2
    if config.optimizer == "adambc":
        named = {"lr": rate, "eps": config.adam_epsilon, "weight_decay": decay}
        return AdamBc(values, betas=betas, noise=noise, floor=config.variance_floor, **named)
    return torch.optim.AdamW(values, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=decay)


def learning_rate(config: TrainingConfig, *, step: int, steps: int) -> float:
    """The rate of a step, counted from 1; it follows the number of the step and nothing else.

    A linear warm-up over the first `warmup` share of the steps, then a cosine or a line to zero, or constant.
    """
    warm = config.warmup * steps
    if step <= warm:
        return config.learning_rate * step / max(1.0, warm)
    done = (step - warm) / max(1.0, steps - warm + 1)
    left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done, "constant": 1.0}
    return config.learning_rate * left[config.schedule]


@dataclass
class Average:
    """An exponential mean of the weights after each step, to be released in place of the last ones.

    Post-processing: the accountant pays for all steps together, so any function of all weights is covered. The mean is
    corrected for its start like Adam's, so that after one step it is that step's weights. decay 0: nothing is kept.
    """

    decay: float
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the weights after a step."""
        if not self.decay:
            return
        self.steps += 1
        for name, value in parameters.items():
            old = self.sums.get(name)
            old = torch.zeros_like(value) if old is None else old
            self.sums[name] = old.mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)

    def install(self, parameters: Mapping[str, Tensor]) -> None:
        """Put the mean in place of the weights."""
        with torch.no_grad():
            for name, value in self.sums.items():
                parameters[name].copy_(value / (1 - self.decay**self.steps))

    def tensors(self) -> dict[str, Tensor]:
        """The mean so far as named tensors, for a checkpoint; none where no step was seen."""
        return {**self.sums, "": torch.tensor([self.steps])} if self.steps else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` saved."""
        self.steps = int(tensors[""][0]) if tensors else 0
        self.sums = {name: value.clone() for name, value in tensors.items() if name}


def apply_update(
    parameters: Mapping[str, nn.Parameter],
    noisy: Mapping[str, Tensor],
    kept: set[str],
    optimizer: torch.optim.Optimizer,
    rate: float,
) -> None:
    """One optimiser step on the kept blocks.

    A pruned block gets no gradient at all, so both optimisers pass it over: its weights don't move, not by weight decay
    either; its momentum (SGD) and both moments and step count (AdamW) stay as they were and go on from there when it is
    chosen again. A gradient of zero instead would move it by momentum and decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    for name, parameter in parameters.items():
        parameter.grad = noisy[name].to(parameter.dtype) if name in kept else None
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, for a checkpoint."""
    out: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                out[f"{name}//{key}"] = torch.as_tensor(value).detach().clone().contiguous()
    return out


def restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` saved."""
    for full, value in tensors.items():
        name, key = full.rsplit("//", 1)
        parameter = parameters[name]
        moved = value.clone() if key == "step" else value.clone().to(parameter.device)
        optimizer.state[parameter][key] = moved
