"""Stacked trainings are the trainings that the trainer makes one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attacks.membership.stacked import (
    Shared,
    Trial,
    best_stack,
    initial_adapter,
    losses_under,
    train_alone,
    train_stack,
)
from attacks.scores import losses
from attacks.training import start_run
from dpaudit.config import RunConfig, resolve
from dpaudit.randomness import Key
from tests.tiny import random_units
from trainers.gradients import MicroBatch
from trainers.inputs import UnitInputs
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.rows import RowModel, row_gradients
from trainers.run import load_model
from trainers.vlm import VisionLanguageModel, short_name

UNITS = random_units(24, pictures=1)
TWO = random_units(6, seed=5, pictures=2, prefix="t")


def config(tiny: Path, method: str = "dp-sgd", *extra: str) -> RunConfig:
    settings = [f"model.path={tiny}", "model.device=cpu", "model.lora.rank=3", "seed=4", "training.batch-size=8",
                "training.steps=4", "data.public-size=30", "training.learning-rate=0.01"]  # fmt: skip
    private = [] if method == "non-private" else ["privacy.noise-multiplier=1.0", "privacy.max-grad-norm=0.7"]
    return resolve({"method": method}, [*settings, *private, *extra])


def shared_of(config: RunConfig, tiny: Path, units: tuple = UNITS) -> Shared:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.set_reducer(config.reducer)
    dataset = Dataset("x", "image", units, random_units(2, seed=9, prefix="e"))
    return Shared.of(config, make_plan(config, dataset, 0), model, units)


def test_row_gradients_are_those_of_one_unit_at_a_time(tiny: Path) -> None:
    """Against plain autograd through transformers and peft, every row under an adapter of its own."""
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(config(tiny).model.lora, generator=np.random.default_rng(0))
    inputs = UnitInputs(model, UNITS[:5])
    mine = RowModel.of(model, inputs)
    assert mine is not None
    torch.manual_seed(0)
    adapters = {name: torch.randn(5, *value.shape) * 0.03 for name, value in parameters.items()}
    gradients, row_losses = row_gradients(inputs.select(range(5)), mine, adapters)
    for row in range(5):
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(adapters[name][row])
        expected, loss = MicroBatch(model, parameters).gradient(inputs.select([row]))
        assert float(row_losses[row]) == pytest.approx(float(loss), rel=1e-5)
        error = sum(float((gradients[name][row] - value).square().sum()) for name, value in expected.items())
        assert error**0.5 <= 2e-5 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5


@pytest.mark.parametrize(
    ("method", "extra", "units"),
    [
        ("dp-sgd", (), UNITS),
        ("non-private", (), UNITS),
        ("dual-priv", ("reducer.keep=5", "reducer.fuse=3", "reducer.noise=0.3"), TWO),
    ],
    ids=["dp-sgd", "non-private", "dual-priv, two pictures a unit"],
)
def test_stacked_models_are_those_of_the_trainer(
    tiny: Path, tmp_path: Path, method: str, extra: tuple[str, ...], units: tuple
) -> None:
    wanted = config(tiny, method, *extra)
    shared = shared_of(wanted, tiny, units)
    assert shared.rows is not None
    rng = np.random.default_rng(1)
    members = [np.flatnonzero(rng.random(len(units)) < 0.7) for _ in range(3)]
    trials = [Trial(Key.from_seed(10 + index), mine) for index, mine in enumerate(members)]
    adapters = train_stack(shared, trials)
    for index in (2,):
        alone = wanted.model_copy(update={"seed": 10 + index})
        dataset = Dataset("x", "image", tuple(units[u] for u in members[index]), random_units(2, seed=9, prefix="e"))
        run = start_run(alone, tmp_path / f"run{index}", dataset=dataset)
        released = load_file(run.model / "adapter_model.safetensors")
        assert len(released) == len(adapters[index])
        for name, value in released.items():
            ours = adapters[index][short_name(name)]
            moved = float((value - initial_adapter(shared.model, trials[index].key)[short_name(name)]).abs().max())
            assert moved > 0 or method == "dual-priv"
            torch.testing.assert_close(ours, value, rtol=0, atol=2e-3 * moved + 1e-7)
        trained = load_model(run, "cpu")
        np.testing.assert_allclose(
            losses_under(shared, adapters[index], range(len(units))), losses(trained, units), rtol=1e-3, atol=1e-4
        )


def test_what_a_stack_cannot_do_is_left_to_the_trainer(tiny: Path, tmp_path: Path) -> None:
    wanted = config(tiny)
    shared = shared_of(wanted, tiny)
    dataset = Dataset("x", "image", UNITS, random_units(2, seed=9, prefix="e"))
    trial = Trial(Key.from_seed(1), np.arange(3, 15))
    fast = train_stack(shared, [trial])[0]
    plain = train_alone(shared, trial, tmp_path / "run", dataset)
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=0, atol=2e-3 * float(value.abs().max()))
    slow = losses_under(replace(shared, rows=None), fast, [0, 3])
    np.testing.assert_allclose(losses_under(shared, fast, [0, 3]), slow, rtol=1e-4)
    zeroth = resolve(
        {"method": "dp-zo"}, [f"model.path={tiny}", "privacy.noise-multiplier=1.0", "training.batch-size=2"]
    )
    assert shared_of(zeroth, tiny, UNITS[:3]).rows is None


def test_a_model_with_other_arithmetic_is_not_taken_for_ours(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    model.attach_lora(config(tiny).model.lora, generator=np.random.default_rng(0))
    inputs = UnitInputs(model, UNITS[:2])
    assert RowModel.of(model, inputs) is not None
    model.core.model.language_model.norm.register_forward_hook(lambda _m, _i, out: 1.05 * out)
    assert RowModel.of(model, inputs) is None


def ticking(costs: dict[int, float]) -> Callable[[], float]:
    """A clock by which a probe of the n-th stack size takes costs[n] seconds."""
    values = iter([second for cost in costs.values() for second in (0.0, cost)])
    return lambda: next(values)


def test_the_probe_takes_a_larger_stack_only_where_it_pays(tiny: Path) -> None:
    shared = shared_of(config(tiny), tiny)
    trials = [Trial(Key.from_seed(index), np.arange(20)) for index in range(5)]
    assert best_stack(shared, trials, clock=ticking({1: 1.0, 2: 1.9, 4: 3.7})) == 1
    assert best_stack(shared, trials, clock=ticking({1: 1.0, 2: 1.2, 4: 2.3})) == 2
    assert best_stack(shared, trials, clock=ticking({1: 1.0, 2: 1.2, 4: 1.6})) == 4
    assert best_stack(replace(shared, rows=None), trials) == 1
