"""What happens to the noisy gradient: which blocks are updated, and by which optimiser.

Everything here sees the noisy gradient only, so it is post-processing and costs no budget.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dpaudit.config import PruningConfig, TrainingConfig


def select_blocks(noisy: Mapping[str, Tensor], config: PruningConfig, *, rng: np.random.Generator) -> set[str]:
    """Names of the blocks (one parameter tensor each) to update: a function of the noisy gradient and public coins.

    'magnitude' keeps the blocks with the largest Frobenius norm, as Dual-Priv Pruning does (arXiv 2506.07077,
    mechanism 2); ties go to the earlier name. 'random' keeps as many at random.
    """
    names = list(noisy)
    keep = max(1, math.ceil(config.keep * len(names)))
    if keep >= len(names):
        return set(names)
    if config.by == "random":
        return {names[index] for index in rng.permutation(len(names))[:keep]}
    norms = [float(noisy[name].float().norm()) for name in names]
    order = sorted(range(len(names)), key=lambda index: -norms[index])
    return {names[index] for index in order[:keep]}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The inner optimiser over the trainable parameters, in name order."""
    values = [parameters[name] for name in sorted(parameters)]
    if config.optimizer == "sgd":
        return torch.optim.SGD(values, lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(values, lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: TrainingConfig, *, step: int, steps: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero. Steps count from 1."""
    warm = config.warmup * steps
    if step <= warm:
        return config.learning_rate * step / max(1.0, warm)
    done = (step - warm) / max(1.0, steps - warm + 1)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def apply_update(
    parameters: Mapping[str, nn.Parameter],
    noisy: Mapping[str, Tensor],
    kept: set[str],
    optimizer: torch.optim.Optimizer,
    rate: float,
) -> None:
    """One optimiser step on the kept blocks.

    A pruned block gets no gradient at all: its weights, momentum and weight decay stay exactly as they were (setting
    its gradient to zero instead would still move it by momentum and decay).
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
