"""Checkpoints of a training run: weights, optimiser, pruning and averaging state, one atomic safetensors file each.

No generator state is stored: batch, noise and masks of step t are functions of (key, t), so a resumed run repeats
exactly what an interrupted one did.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from dpaudit import atomic, untrusted
from dpaudit.errors import UsageError
from trainers.distributed import ALONE, Group
from trainers.updates import Average, Pruning, optimizer_tensors, restore_optimizer

KEEP = 2
MOST_BYTES = 1 << 34  # of a checkpoint: an adapter with its optimiser has a thousandth


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.safetensors"


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: str,
    *,
    pruning: Pruning,
    average: Average,
) -> None:
    """Write the state after `step`; older checkpoints but one are removed once the new one is on disk.

    identity: of which run it is (trainers.binding).
    """
    tensors = {f"parameter//{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"optimizer//{name}": value for name, value in optimizer_tensors(parameters, optimizer).items()}
    tensors |= {f"pruning//{name}": value for name, value in pruning.tensors().items()}
    tensors |= {f"average//{name}": value for name, value in average.tensors().items()}
    atomic.write_tensors(_path(folder, step), tensors, {"step": str(step), "run": identity}, mode=0o600)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink(missing_ok=True)


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: str,
    *,
    pruning: Pruning,
    average: Average,
    group: Group = ALONE,
) -> int:
    """Load the newest readable checkpoint in place and return its step; 0 when there is none.

    Rank 0 reads it and sends it to the others, however many they are now: all ranks hold the same state, so nothing in
    a checkpoint depends on their number.
    """
    raw = group.from_first(lambda: newest(folder, identity))
    if not raw:
        return 0
    tensors = load(raw)
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"parameter//{name}"])
        restore_optimizer(parameters, optimizer, _part(tensors, "optimizer//"))
        pruning.restore(_part(tensors, "pruning//"))
        average.restore(_part(tensors, "average//"))
        average.sums = {name: value.to(parameters[name].device) for name, value in average.sums.items()}
        return int(_metadata(raw)["step"])
    except (KeyError, ValueError, TypeError, RuntimeError):
        raise UsageError(
            f"{folder}: the newest checkpoint holds other tensors than this run trains; remove it"
        ) from None


def newest(folder: Path, identity: str) -> bytes:
    """The content of the newest readable checkpoint; empty when there is none.

    A damaged file is skipped in favour of the older one (that only repeats steps already paid for); one that belongs
    to another run is an error.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            raw = untrusted.read_bytes(path, MOST_BYTES)
            load(raw)
        except (SafetensorError, OSError):
            continue
        if _metadata(raw).get("run") != identity:
            raise UsageError(f"{path}: belongs to another run: to another key, configuration, model or data")
        return raw
    return b""


def _metadata(raw: bytes) -> dict[str, str]:
    """The text part of a safetensors file that was read whole: 8 bytes of length, then JSON."""
    size = int.from_bytes(raw[:8], "little")
    found: dict[str, str] = json.loads(raw[8 : 8 + size]).get("__metadata__", {})
    return found


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
