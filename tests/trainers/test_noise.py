"""Noise by threads and ahead of time: the same numbers, to the last bit."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attacks.training import start_run
from dpaudit.config import resolve
from dpaudit.randomness import Key
from tests.trainers.test_run import FAST, small
from trainers import noise, step
from trainers.gradients import UnitSum, add_sums
from trainers.noise import FEW, Noise, noise_like

KEY = Key.from_seed(4)
LIKE = {"a": torch.zeros(300, 400), "b": torch.zeros(7), "c": torch.zeros(250, 500), "d": torch.zeros(3, 2, 5)}
SHAPES = {name: tuple(value.shape) for name, value in LIKE.items()}


def by_hand(secure: bool, at: int, std: float) -> dict[str, torch.Tensor]:
    """One name after the other, from the key itself."""
    draw = KEY.secure_normal if secure else KEY.normal
    return {name: torch.from_numpy(draw(shape, step=at, name=name)) * std for name, shape in SHAPES.items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) and value.dtype == two[name].dtype for name, value in one.items()
    )


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_drawing_ahead_change_no_bit(threads: int, secure: bool) -> None:
    assert sum(value.numel() for value in LIKE.values()) > FEW
    source = Noise(KEY, secure=secure, threads=threads)
    assert same(source.of(LIKE, step=3, std=0.7), by_hand(secure, 3, 0.7))
    source.draw_ahead(SHAPES, step=4, std=0.7)
    assert same(source.of(LIKE, step=4, std=0.7), by_hand(secure, 4, 0.7))
    assert same(source.of(LIKE, step=4, std=0.7), by_hand(secure, 4, 0.7))  # drawn again where it is asked for again
    source.draw_ahead(SHAPES, step=5, std=0.7)
    assert same(source.of(LIKE, step=6, std=0.7), by_hand(secure, 6, 0.7))  # of another step: thrown away
    source.draw_ahead({"a": (3, 3), "b": SHAPES["b"]}, step=7, std=0.7)
    assert same(source.of(LIKE, step=7, std=0.7), by_hand(secure, 7, 0.7))  # other shapes, and names that are missing
    source.draw_ahead(SHAPES, step=8, std=0.1)
    assert same(source.of(LIKE, step=8, std=0.7), by_hand(secure, 8, 0.7))  # of another size
    source.close()
    assert same(noise_like(KEY, LIKE, step=3, std=0.7, secure=secure), by_hand(secure, 3, 0.7))


def test_close_ends_the_threads() -> None:
    def running() -> int:
        return sum(thread.name.startswith("noise") for thread in threading.enumerate())

    before = running()
    source = Noise(KEY, threads=3)
    source.draw_ahead(SHAPES, step=1, std=1.0)
    assert running() > before
    source.close()
    assert running() == before


def test_one_sum_is_kept_however_many_parts_there_are() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def parts() -> Iterator[UnitSum]:
        nonlocal most
        for index in range(6):
            value = torch.full((4,), float(index))
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
            yield UnitSum({"w": value}, torch.tensor([float(index)]), torch.tensor([0.5]))
            del value

    total = add_sums(parts(), {"w": torch.zeros(4)}, torch.device("cpu"))
    assert most <= 2
    assert total.gradient["w"].tolist() == [15.0] * 4 and total.norms.tolist() == [0, 1, 2, 3, 4, 5]
    assert total.losses.tolist() == [0.5] * 6
    empty = add_sums(iter(()), {"w": torch.zeros(4)}, torch.device("cpu"))
    assert empty.gradient["w"].tolist() == [0.0] * 4 and empty.norms.shape == empty.losses.shape == (0,)


TRAININGS = {
    "dp-sgd": ["method=dp-sgd"],
    "pruned ahead": [
        "method=dual-priv",
        "reducer.keep=4",
        "reducer.fuse=3",
        "pruning.by=previous",
        "pruning.keep=0.5",
    ],
    "zeroth order": ["method=dp-zo"],
    "secure": ["method=dp-sgd", "privacy.noise=secure"],
}


@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS)
def test_a_training_ends_with_the_same_weights(
    tiny: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for ahead in (False, True):
        monkeypatch.setattr(step, "worth_drawing_ahead", lambda device, ahead=ahead: ahead)
        monkeypatch.setattr(noise, "FEW", 1 if ahead else FEW)
        config = resolve({}, [f"model.path={tiny}", "seed=1", *FAST, *settings])
        run = start_run(config, tmp_path / str(ahead), dataset=small())
        ended.append(load_file(run.model / "adapter_model.safetensors"))
    assert same(*ended)
