"""Checkpoints: what is saved comes back, damaged ones are passed over, foreign ones are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dpaudit.config import PruningConfig, TrainingConfig
from dpaudit.errors import UsageError
from trainers import checkpoints, updates

NAMES = ("layers.0.a", "layers.0.b", "layers.1.a")
PRUNING = PruningConfig(keep=0.5, by="previous")


def state(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, updates.Pruning]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(4, 3, generator=generator)) for name in NAMES}
    optimizer = updates.make_optimizer(parameters, TrainingConfig(optimizer="adamw"), noise=0.0)
    return parameters, optimizer, updates.Pruning.of(parameters, PRUNING)


def stepped(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, updates.Pruning]:
    parameters, optimizer, pruning = state(seed)
    noisy = {name: torch.full((4, 3), 0.1 * place) for place, name in enumerate(NAMES, 1)}
    updates.apply_update(parameters, noisy, {NAMES[0], NAMES[2]}, optimizer, 0.01)
    pruning.observe(noisy)
    return parameters, optimizer, pruning


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_everything_that_a_step_depends_on_comes_back(tmp_path: Path) -> None:
    parameters, optimizer, pruning = stepped(1)
    checkpoints.save(tmp_path, 7, parameters, optimizer, "abc", pruning=pruning, average=updates.Average(0.0))
    other, inner, memory = state(2)
    assert checkpoints.restore(tmp_path, other, inner, "abc", pruning=memory, average=updates.Average(0.0)) == 7
    assert same(dict(parameters), dict(other))
    assert same(updates.optimizer_tensors(parameters, optimizer), updates.optimizer_tensors(other, inner))
    assert pruning.scores == memory.scores != {}
    # and the next step is the same step
    noisy = {name: torch.ones(4, 3) for name in NAMES}
    for values, how in ((parameters, optimizer), (other, inner)):
        updates.apply_update(values, noisy, set(NAMES), how, 0.01)
    assert same(dict(parameters), dict(other))


def test_the_newest_readable_one_is_taken_and_two_are_kept(tmp_path: Path) -> None:
    parameters, optimizer, pruning = stepped(1)
    for step in (5, 10, 15):
        checkpoints.save(tmp_path, step, parameters, optimizer, "abc", pruning=pruning, average=updates.Average(0.0))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == ["step-0000010.safetensors", "step-0000015.safetensors"]
    files[1].write_bytes(files[1].read_bytes()[:-9])
    assert checkpoints.restore(tmp_path, *state(3)[:2], "abc", pruning=pruning, average=updates.Average(0.0)) == 10
    files[1].write_bytes(b"")
    assert checkpoints.restore(tmp_path, *state(3)[:2], "abc", pruning=pruning, average=updates.Average(0.0)) == 10
    files[0].write_bytes(b"\xff" * 64)
    assert checkpoints.restore(tmp_path, *state(3)[:2], "abc", pruning=pruning, average=updates.Average(0.0)) == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    parameters, optimizer, pruning = stepped(1)
    checkpoints.save(tmp_path, 5, parameters, optimizer, "abc", pruning=pruning, average=updates.Average(0.0))
    with pytest.raises(UsageError, match=r"step-0000005.safetensors: belongs to another run"):
        checkpoints.restore(tmp_path, *state(3)[:2], "xyz", pruning=pruning, average=updates.Average(0.0))
    assert checkpoints.newest(tmp_path / "none", "abc") == b""
