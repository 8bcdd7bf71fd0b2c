"""A base model in pieces: each rank keeps its share of every decoder layer's frozen weights (`training.parallel=fsdp`).

PyTorch's FSDP2 (`fully_shard`) gathers a layer's weights when its turn comes, forwards and backwards, and drops them
again. Only frozen weights are sharded. The adapter is small, lies whole on every rank, and FSDP never sees it
(`ignored_params`), so per-unit gradients, clipping, noise and checkpoints are those of plain data parallel training, to
the bit; the checkpoint of an adapter is not worth sharding, and a run may continue with another number of ranks.

Opacus has its own FSDP mode (1.6, `ghost_fsdp`). It is not used: it knows ghost clipping alone, which
makes a second backward pass (trainers.ghost), draws its noise from torch's generator on every rank and shards the
trained weights, so that noise, ledger and resume would be other than those of a single process.

Gathering is a joint act of all ranks: every rank must make as many passes as the one with the most, and makes empty
ones for that (`Group.passes`).
"""

from collections.abc import Mapping

import torch
from torch import nn

from trainers.distributed import Group
from trainers.vlm import VisionLanguageModel


def shard(model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], group: Group, wanted: str) -> None:
    """Shard the decoder layers over `group` in place, and move the rest to this rank's device.

    The model may still be on the CPU, so that no GPU ever holds all layers at once. wanted: the configured device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    cuda = wanted != "cpu" and torch.cuda.is_available()
    device = torch.device(group.device(wanted) if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (group.size,))
    for layer in model.family.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh, ignored_params=set(parameters.values()))
    with torch.no_grad():
        for module in model.hf.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != device.type:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    model.device = device


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value
