"""Generators that a step seeds: public constants are left alone from the first step on, and noise is frozen.

Oracle: what the same generator draws outside of dpaudit. Covered are constants seeded by a literal, by torch's default,
by the training's own seed, by the number of the step or of a record, from a new generator, from one that is kept and
seeded anew, drawn in every step, in the first one, in every second one, or in empty batches alone. A constant that is
drawn for the first time after the rehearsal is not known (`test_what_the_rehearsal_has_not_met`), nor one whose seed
comes to a line by the same way as a secret one (`test_a_line_for_public_and_secret_seeds`).
"""

import copy
import secrets
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpaudit.claims import StepClaim
from dpaudit.under_test import opacus_loop, step_function
from trainers.adapters.under_test import rehearsal
from trainers.adapters.under_test.rehearsal import BATCHES, Rehearsal

CLAIM = StepClaim("gaussian", 1.0, 1.0, "poisson", 0.25, 3.0, "add-remove", "row", steps=40, delta=1e-5)
D = 7
COURSE: tuple[list[int], ...] = ([0, 5], [], [1, 2, 3], [0], [4], [], [7, 8])
Draw = Callable[[Any, list[Any]], Tensor | None]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def randn(generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(D, generator=generator)


class Foreign:
    """A hand-written step that draws by `draw` and then its noise by `noise`; `drawn` is all of it, a list a step."""

    def __init__(self, draw: Draw, noise: Draw | None = None) -> None:
        self.draw, self.noise = draw, noise or (lambda state, batch: randn())
        self.builds = self.steps = 0
        self.factory = step_function(init=self.init, step=self.step, records=list(range(12)), claim=CLAIM)

    def init(self, seed: int) -> Any:
        self.builds += 1
        model = nn.Linear(D, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return SimpleNamespace(
            model=model, optimizer=optimizer, seed=seed, t=0, held=hidden(seeded(99)), kept=None, drawn=[], noise=[]
        )

    def step(self, state: Any, batch: list[Any]) -> Any:
        self.steps += 1
        state.drawn.append(self.draw(state, batch))
        for _ in batch:
            state.optimizer.zero_grad()
            state.model(torch.ones(1, D)).sum().backward()
        state.noise.append(self.noise(state, batch))
        state.model.weight.grad = state.noise[-1][None].clone()
        state.optimizer.step()
        state.t += 1
        return state

    def train(self, seed: int, noise_seed: int | None) -> Any:
        trainer = self.factory(seed=seed, noise_seed=noise_seed)
        for batch in COURSE:
            trainer.step(batch)
        return trainer._state


def hidden(generator: torch.Generator) -> Callable[[], torch.Generator]:
    """In a closure the adapter does not look for it."""
    return lambda: generator


def by_helper(state: Any, batch: list[Any]) -> Tensor:
    return helped(3) if batch else helped(4)


def helped(number: int) -> Tensor:
    return randn(seeded(number))


def first(state: Any, batch: list[Any]) -> Tensor:
    if state.kept is None:
        state.kept = randn(seeded(7))
    kept: Tensor = state.kept
    return kept


def by_record(state: Any, batch: list[Any]) -> Tensor:
    return torch.stack([randn(seeded(record)) for record in batch]) if batch else torch.zeros(0, D)


def twice(state: Any, batch: list[Any]) -> Tensor:
    generator = seeded(7)
    return torch.stack([randn(generator), randn(generator)])


CONSTANTS: dict[str, Draw] = {
    "a literal": lambda state, batch: randn(seeded(7)),
    "two draws of one": twice,
    "never seeded": lambda state, batch: randn(torch.Generator()),
    "kept and seeded anew": lambda state, batch: randn(state.held().manual_seed(7)),
    "the seed of the training": lambda state, batch: randn(seeded(state.seed)),
    "the number of the step": lambda state, batch: randn(seeded(1000 + state.t)),
    "the number of a record": by_record,
    "the first step alone": first,
    "every second step": lambda state, batch: randn(seeded(7)) if state.t % 2 else None,
    "empty batches alone": lambda state, batch: None if batch else randn(seeded(7)),
    "a helper, by two ways": by_helper,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_what_it_is_outside_from_the_first_step_on(name: str) -> None:
    foreign = Foreign(CONSTANTS[name])
    for seed, noise_seed in ((3, 8), (3, 9), (4, 8)):
        state = foreign.train(seed, noise_seed)
        plain = SimpleNamespace(seed=seed, t=0, held=hidden(seeded(99)), kept=None)
        for drawn, batch in zip(state.drawn, COURSE, strict=True):
            expected = CONSTANTS[name](plain, batch)
            plain.t += 1
            assert torch.equal(drawn, expected) if expected is not None else drawn is None


@pytest.mark.parametrize("name", CONSTANTS)
def test_noise_beside_a_constant_is_frozen(name: str) -> None:
    foreign = Foreign(CONSTANTS[name])
    one, two, other = (torch.stack(foreign.train(3, noise_seed).noise) for noise_seed in (8, 8, 9))
    assert torch.equal(one, two)
    every = torch.cat([one, other])
    assert torch.unique(every, dim=0).shape == every.shape


def lazy(state: Any, batch: list[Any]) -> Tensor:
    if state.kept is None:
        state.kept = seeded(secrets.randbits(60))
    return randn(state.kept)


def late(state: Any, batch: list[Any]) -> Tensor:
    return randn(seeded(7 if state.t >= 3 else secrets.randbits(60)))


NOISES: dict[str, Draw] = {
    "made at construction": lambda state, batch: randn(state.held()),
    "made in the first step": lazy,
    "new in every step, secret": lambda state, batch: randn(seeded(secrets.randbits(60))),
    "new in every step, by torch": lambda state, batch: randn(seeded(int(torch.randint(2**60, ())))),
    "kept and seeded anew, secret": lambda state, batch: randn(state.held().manual_seed(secrets.randbits(60))),
    "the global one": lambda state, batch: randn(),
}
# A generator that is kept and seeded anew by its owner is left alone from the second step on: only the first repeats.
FROZEN = {name: 1 if name == "kept and seeded anew, secret" else len(COURSE) for name in NOISES}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("constant", ["a literal", "the seed of the training"])
def test_noise_of_other_generators_stays_frozen(name: str, constant: str) -> None:
    foreign = Foreign(CONSTANTS[constant], NOISES[name])
    one, two, other = (torch.stack(foreign.train(3, noise_seed).noise) for noise_seed in (8, 8, 9))
    count = FROZEN[name]
    assert torch.equal(one[:count], two[:count])
    assert torch.unique(torch.cat([one, other]), dim=0).shape[0] == 2 * len(COURSE)


def test_a_kept_generator_with_the_number_of_a_constant_is_told_from_it() -> None:
    """99 at construction for noise, and in every step for a constant."""
    foreign = Foreign(lambda state, batch: randn(seeded(99)), NOISES["made at construction"])
    one, two, other = (foreign.train(3, noise_seed) for noise_seed in (8, 8, 9))
    assert all(torch.equal(drawn, randn(seeded(99))) for drawn in one.drawn)
    assert torch.equal(torch.stack(one.noise), torch.stack(two.noise))
    assert not any(torch.equal(*pair) for pair in zip(one.noise, other.noise, strict=True))


@pytest.mark.parametrize("name", ["a literal", "never seeded", "kept and seeded anew", "the number of the step"])
def test_noise_of_a_public_number_is_the_same_under_every_noise_seed(name: str) -> None:
    """A fault, which is to be seen in the first step as well."""
    foreign = Foreign(lambda state, batch: None, CONSTANTS[name])
    one, other = foreign.train(3, 8).noise, foreign.train(3, 9).noise
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_noise_that_repeats_from_some_step_on_still_does() -> None:
    noise = Foreign(lambda state, batch: randn(seeded(7)), late).train(3, 8).noise
    assert torch.equal(noise[4], noise[5]) and not torch.equal(noise[1], noise[2])


def test_what_the_rehearsal_has_not_met() -> None:
    """A constant that is drawn for the first time later is noise in that step, and itself from the next one on."""
    start = len(BATCHES) + 1
    drawn = Foreign(lambda state, batch: randn(seeded(7)) if state.t >= start else None).train(3, 8).drawn
    known = [value is not None and torch.equal(value, randn(seeded(7))) for value in drawn]
    assert known == [False] * (start + 1) + [True] * (len(COURSE) - start - 1)


def test_a_line_for_public_and_secret_seeds() -> None:
    """Nothing is known of it, so it is as without a rehearsal: noise is frozen, the constant itself from step 2 on."""

    def both(state: Any, batch: list[Any]) -> Tensor:
        return torch.stack([randn(seeded(number)) for number in (7, secrets.randbits(60))])

    one, two = (Foreign(both).train(3, 8).drawn for _ in range(2))
    assert all(torch.equal(mine[1], theirs[1]) for mine, theirs in zip(one, two, strict=True))
    assert [torch.equal(drawn[0], randn(seeded(7))) for drawn in one] == [False] + [True] * (len(COURSE) - 1)


def test_production_is_not_rehearsed() -> None:
    foreign = Foreign(CONSTANTS["a literal"])
    one, two = foreign.train(3, None), foreign.train(3, None)
    assert not any(torch.equal(*pair) for pair in zip(one.noise, two.noise, strict=True))
    assert foreign.steps == 2 * len(COURSE) + 1  # and a trial step, to see whether gradients can be injected


@pytest.mark.parametrize(("draw", "rehearsals"), [(lambda state, batch: None, 1), (CONSTANTS["a literal"], 2)])
def test_a_factory_rehearses_once(draw: Draw, rehearsals: int) -> None:
    foreign = Foreign(draw)
    foreign.factory(seed=3)  # makes a trial step of its own, to see whether gradients can be injected
    builds, steps = foreign.builds, foreign.steps
    for noise_seed in range(3):
        foreign.factory(seed=3, noise_seed=noise_seed)
    assert foreign.builds - builds == 3 + rehearsals and foreign.steps - steps == rehearsals * len(BATCHES)


def test_a_slow_construction_is_not_repeated_under_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def build(seed: int, noise_seed: int) -> Any:
        asked.append(noise_seed)
        raise ValueError("no trainer")

    monkeypatch.setattr(rehearsal, "_time_left", lambda: 30.0)
    Rehearsal(build).make(0, 16.0)
    assert not asked
    Rehearsal(build).make(0, 1.0)
    assert asked == [0]


def test_what_a_step_raises_is_raised_where_it_is_asked_for() -> None:
    def broken(state: Any, batch: list[Any]) -> Tensor:
        raise ValueError("in the step")

    foreign = Foreign(lambda state, batch: None)
    foreign.factory(seed=0)
    foreign.draw = broken
    trainer = foreign.factory(seed=0, noise_seed=1)
    with pytest.raises(ValueError, match="in the step"):
        trainer.step([0])


def test_copies_share_what_was_found() -> None:
    frozen = Foreign(CONSTANTS["a literal"]).factory(seed=3, noise_seed=8)._frozen
    assert frozen is not None and frozen.public.numbers == {7} and copy.deepcopy(frozen.public) is frozen.public


def test_a_constant_in_an_opacus_loop() -> None:
    from opacus import PrivacyEngine

    drawn: list[Tensor] = []

    def build(records: Any) -> Any:
        model = nn.Linear(D, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(records, batch_size=3),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=seeded(5),
        )

    def train(model: nn.Module, optimizer: Any, loader: Any) -> None:
        for x in loader:
            drawn.append(randn(seeded(7)))
            optimizer.zero_grad()
            (model(x - drawn[-1]) - 1).square().mean().backward()
            optimizer.step()

    data = list(torch.randn(12, D, generator=seeded(1)))
    factory = opacus_loop(build, records=data, train=train)
    threads = threading.active_count()
    trainers = [factory(seed=0, noise_seed=noise_seed) for noise_seed in (1, 1, 2)]
    released = []
    drawn.clear()
    assert threading.active_count() == threads  # the rehearsals have ended
    for trainer in trainers:
        for batch in ([0, 1], [2], []):
            trainer.step(batch)
            released.append(torch.cat([value.flatten() for value in trainer.released().values() if value is not None]))
    assert len(drawn) == 9 and all(torch.equal(value, randn(seeded(7))) for value in drawn)
    assert torch.equal(torch.stack(released[:3]), torch.stack(released[3:6]))
    assert not any(torch.equal(*pair) for pair in zip(released[:3], released[6:], strict=True))
