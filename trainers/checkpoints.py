"""Checkpoints of a training run: parameters, optimiser and pruning state, as one atomic safetensors file each.

No generator state is stored: batch, noise and masks of step t are functions of (key, t), so a resumed run repeats
exactly what an interrupted one did.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpaudit import atomic
from dpaudit.errors import UsageError
from trainers.updates import Pruning, optimizer_tensors, restore_optimizer

KEEP = 2


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.safetensors"


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: str,
    *,
    pruning: Pruning,
) -> None:
    """Write the state after `step`; older checkpoints but one are removed once the new one is on disk."""
    tensors = {f"parameter//{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"optimizer//{name}": value for name, value in optimizer_tensors(parameters, optimizer).items()}
    tensors |= {f"pruning//{name}": value for name, value in pruning.tensors().items()}
    atomic.write_tensors(_path(folder, step), tensors, {"step": str(step), "config": config}, mode=0o600)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink(missing_ok=True)


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: str,
    *,
    pruning: Pruning,
) -> int:
    """Load the newest readable checkpoint in place and return its step; 0 when there is none.

    A damaged file is skipped in favour of the older one (that only repeats steps already paid for); one that belongs
    to another configuration is an error.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError):
            continue
        if metadata.get("config") != config:
            raise UsageError(f"{path}: belongs to another configuration; --resume needs the run's own config.yaml")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"parameter//{name}"])
        restore_optimizer(parameters, optimizer, _part(tensors, "optimizer//"))
        pruning.restore(_part(tensors, "pruning//"))
        return int(metadata["step"])
    return 0


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
