"""Foreign loops under test: frozen noise, injection, what is refused and why. Oracles: closed forms on tiny models."""

import gc
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainers.adapters.under_test as adapters
from attacks.contract.guard import MethodFailure
from attacks.contract.guard import call as guarded
from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError
from dpaudit.under_test import opacus_loop, step_function
from trainers.adapters.under_test import trees
from trainers.adapters.under_test.frozen import FrozenNoise, Streams
from trainers.adapters.under_test.loop import Loop
from trainers.protocol import lacking

N, B, C, SIGMA = 12, 3, 1.0, 0.5
CLAIM = StepClaim("gaussian", C, SIGMA, "poisson", B / N, float(B), "add-remove", "row", steps=5, delta=1e-5)


def rows() -> list[tuple[Tensor, int]]:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    return [(value, int(value.sum() > 0)) for value in x]


def builder(mode: str = "hooks", **options: Any) -> Callable[[list[Any]], Any]:
    from opacus import PrivacyEngine

    def build(records: list[Any]) -> Any:
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(records, batch_size=B),
            grad_sample_mode=mode,
            **{"noise_multiplier": SIGMA, "max_grad_norm": C, **options},
        )

    return build


def epoch(model: nn.Module, optimizer: Any, *rest: Any) -> None:
    criterion, loader = rest if len(rest) == 2 else (nn.CrossEntropyLoss(), rest[0])
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def in_pieces(model: nn.Module, optimizer: Any, loader: Any) -> None:
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small:
        epoch(model, optimizer, small)


def total(trainer: Any) -> Tensor:
    released = trainer.released()
    return trainer.claim.expected_batch_size * torch.cat([released[name].flatten() for name in sorted(released)])


def random_gradient(trainer: Any, norm: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    value = {name: torch.randn(part.shape, generator=generator) for name, part in trainer.parameters().items()}
    size = torch.sqrt(sum((part.square().sum() for part in value.values()), torch.zeros(())))
    return {name: part * (norm / size) for name, part in value.items()}


def flat(gradient: Any) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("train", [epoch, in_pieces])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_opacus_modes(mode: str, train: Any, reduction: str) -> None:
    """The sum moves by an injected gradient, clipped, also where a logical batch comes in pieces."""
    if reduction == "sum" and train is epoch:
        build: Any = builder(mode, loss_reduction="mean")
    else:
        build = builder(mode)
    factory = opacus_loop(build, records=rows, train=train)
    for batch in ([], [0, 1, 4, 7, 8]):
        for norm in (0.5, 100.0):
            plain, canary = factory(seed=1, noise_seed=2), factory(seed=1, noise_seed=2)
            gradient = random_gradient(canary, norm)
            canary.inject(gradient)
            plain.step(batch)
            canary.step(batch)
            expected = flat(gradient) * min(1.0, C / norm)
            assert torch.allclose(total(canary) - total(plain), expected, atol=2e-5)
            plain.step(batch)
            canary.step(batch)  # a canary joins one step only: the second differs by what the first has moved
            assert torch.isfinite(total(canary)).all()


def test_ghost_mode_gives_gradients_but_takes_none() -> None:
    """The gradient read off with clipping turned off is that of the hooks."""
    ghost = opacus_loop(builder("ghost"), records=rows, train=epoch)(seed=1, noise_seed=0)
    hooks = opacus_loop(builder("hooks"), records=rows, train=epoch)(seed=1, noise_seed=0)
    assert torch.allclose(flat(ghost.gradient(ghost.records[2])), flat(hooks.gradient(hooks.records[2])), atol=1e-5)
    assert not callable(ghost.inject) and "white-box" in lacking(ghost, "inject")


def test_public_size_holds_for_neighbours() -> None:
    free = opacus_loop(builder(), records=rows, train=epoch)
    public = opacus_loop(builder(), records=rows, train=epoch, public_size=N)
    half = rows()[: N // 2]
    assert free(half, seed=0).claim != free(seed=0).claim
    assert public(half, seed=0).claim == public(seed=0).claim
    with pytest.raises(UsageError, match="public_size: got 11"):
        opacus_loop(builder(), records=rows, train=epoch, public_size=11)(seed=0)


@pytest.mark.parametrize("batch", [[], [0, 1]])
def test_a_step_of_the_optimizer_inside_is_named(batch: list[int]) -> None:
    def bypassed(model: nn.Module, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.original_optimizer.step()

    factory = opacus_loop(builder(), records=rows, train=bypassed)
    with pytest.raises(UsageError, match="stepped the optimizer inside make_private's"):
        factory(seed=0, noise_seed=1).step(batch)


def test_without_noise_eps_is_infinite() -> None:
    trainer = opacus_loop(builder(noise_multiplier=0.0), records=rows, train=epoch)(seed=0, noise_seed=1)
    trainer.step([0, 1])
    assert trainer.epsilon(1e-5) == math.inf


def test_adaptive_clipping_has_no_c_to_claim() -> None:
    quantile = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "unclipped_num_std": 2.0}
    build = builder(clipping="adaptive", max_clipbound=2.0, min_clipbound=0.1, **quantile)
    with pytest.raises(UsageError, match="build, clipping: got 'adaptive'; accepted: flat or per_layer"):
        opacus_loop(build, records=rows, train=epoch)(seed=0)


def test_the_search_for_sigma_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus import PrivacyEngine, privacy_engine

    asked = []
    real = privacy_engine.get_noise_multiplier
    monkeypatch.setattr(privacy_engine, "get_noise_multiplier", lambda **a: asked.append(a) or real(**a))

    def build(records: list[Any]) -> Any:
        model = nn.Linear(4, 2)
        return PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(records, batch_size=B),
            target_epsilon=8.0,
            target_delta=1e-5,
            epochs=2,
            max_grad_norm=C,
        )

    factory = opacus_loop(build, records=rows, train=epoch, public_size=N)
    claims = {factory(records, seed=seed).claim for seed in range(3) for records in (None, rows()[:7])}
    assert len(claims) == 1 and len(asked) == 1


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda *parts: None, "returned without asking the loader for a batch"),
        (lambda model, optimizer, loader: list(zip(loader, range(3), strict=False)), "without an optimizer step"),
        (lambda model, optimizer, loader: [twice(model, optimizer, x, y) for x, y in loader], "2 optimizer steps"),
    ],
)
def test_loops_that_cannot_be_driven(train: Any, message: str) -> None:
    trainer = opacus_loop(builder(), records=rows, train=train)(seed=0, noise_seed=0)
    with pytest.raises(UsageError) as caught:
        trainer.step([0, 1])
    assert message.replace("optimizer", "optimi") in str(caught.value).replace("optimizer", "optimi").replace(
        "optimiser", "optimi"
    )


def twice(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_what_the_loop_raises_names_its_place() -> None:
    def broken(model: nn.Module, optimizer: Any, loader: Any) -> None:
        for _ in loader:
            raise KeyError("lost")

    trainer = opacus_loop(builder(), records=rows, train=broken)(seed=0, noise_seed=0)
    with pytest.raises(MethodFailure, match=r"KeyError: 'lost' \(test_under_test.py"):
        guarded("step([0])", trainer.step, [0])


def test_a_fault_that_starts_late_starts_late_here() -> None:
    """The loop runs on from step to step: its own counter counts."""
    seen = []

    def counting(model: nn.Module, optimizer: Any, loader: Any) -> None:
        for count, (x, y) in enumerate(loader):
            seen.append(count)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    trainer = opacus_loop(builder(), records=rows, train=counting)(seed=0, noise_seed=0)
    seen.clear()  # what a rehearsal has counted
    for _ in range(4):
        trainer.step([0, 1])
    assert seen == [0, 1, 2, 3]


def test_threads_end_with_their_trainers() -> None:
    factory = opacus_loop(builder(), records=rows, train=epoch)
    factory(seed=0, noise_seed=0).step([0])
    gc.collect()
    before = threading.active_count()
    held = [factory(seed=0, noise_seed=k) for k in range(5)]
    for trainer in held:
        trainer.step([0])
    assert threading.active_count() == before + 5
    held.clear()
    del trainer
    gc.collect()
    assert threading.active_count() == before


def test_a_closed_loop_is_over() -> None:
    loop = Loop("loop", lambda feed: list(zip(feed, range(2), strict=False)), lambda function: function)
    loop.advance([[1]])
    loop.close()
    with pytest.raises(UsageError, match="the loop is over"):
        loop.advance([[2]])


# -- Noise -----------------------------------------------------------------------------------------------------------


def test_frozen_noise_does_not_follow_what_else_is_drawn() -> None:
    def draw(before: int, step: int, seed: int = 7) -> Tensor:
        mode = FrozenNoise(seed)
        with Streams(0).active(), mode:
            mode.begin(step)
            torch.rand(before)
            nn.functional.dropout(torch.ones(before), 0.5)
            return torch.cat([torch.randn(3), torch.randn(3), torch.normal(0.0, 1.0, (3,))])

    first = draw(2, 1)
    assert torch.equal(first, draw(50, 1)) and not torch.equal(first, draw(2, 2))
    assert not torch.equal(first, draw(2, 1, seed=8)) and not torch.equal(first[:3], first[3:6])


def test_dropout_is_off_under_frozen_noise_and_on_otherwise() -> None:
    ones = torch.ones(1000)
    with FrozenNoise(1):
        assert torch.equal(nn.Dropout(0.5)(ones), ones)
    assert not torch.equal(nn.Dropout(0.5)(ones), ones)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_generator_seeded_in_the_step_stays_so(fresh: bool) -> None:
    """The same seed in every step is the same noise in every step, and must remain visible."""
    held, mode, drawn = torch.Generator(), FrozenNoise(3), []
    with Streams(0).active(), mode:
        for step in (1, 2, 3, 4):
            mode.begin(step)
            generator = torch.Generator() if fresh else held
            generator.manual_seed(42)
            drawn.append(torch.randn(5, generator=generator))
    assert torch.equal(drawn[2], drawn[3])


def test_the_callers_streams_are_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer = opacus_loop(builder(), records=rows, train=epoch)(seed=0, noise_seed=0)
    trainer.step([0, 1])
    trainer.sample()
    assert torch.equal(torch.rand(3), expected)


def test_production_noise_is_fresh_unless_the_construction_seeds_it() -> None:
    plain = opacus_loop(builder(), records=rows, train=epoch)

    def seeded(records: list[Any]) -> Any:
        torch.manual_seed(0)
        return builder()(records)

    fixed = opacus_loop(seeded, records=rows, train=epoch)
    for factory, same in ((plain, False), (fixed, True)):
        one, two = factory(seed=0), factory(seed=0)
        one.step([])
        two.step([])
        assert torch.equal(total(one), total(two)) == same


# -- Steps written by hand -------------------------------------------------------------------------------------------


class Hand:
    """numpy: logistic regression in a class of its own; `noisy` sees the gradients of all records."""

    @staticmethod
    def noisy(each: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        norm = np.sqrt(sum((value**2).sum(axis=1) for value in each.values()))
        factor = np.minimum(1.0, C / np.maximum(norm, 1e-12))
        return {
            name: ((factor[:, None] * value).sum(axis=0) + SIGMA * C * rng.standard_normal(value.shape[1])) / B
            for name, value in each.items()
        }

    @staticmethod
    def step(state: dict[str, Any], batch: list[Any]) -> dict[str, Any]:
        x = np.array([value.numpy() for value, _ in batch]).reshape(-1, 4)
        y = np.array([label for _, label in batch])
        w = state["params"]["w"]
        each = {"w": (1 / (1 + np.exp(-x @ w)) - y)[:, None] * x}
        mean = Hand.noisy(each, state["rng"])
        return {**state, "params": {"w": w - 0.1 * mean["w"]}}


def start(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"params": {"w": rng.standard_normal(4)}, "rng": rng}


def by_hand(**options: Any) -> Any:
    return step_function(init=start, step=Hand.step, records=rows, claim=CLAIM, **options)


def test_numpy_step() -> None:
    seen = (Hand, "noisy")
    factory = by_hand(released=seen, per_record_gradients=seen)
    one, two = factory(seed=0, noise_seed=1), factory(seed=0, noise_seed=1)
    two.inject({"w": torch.tensor([3.0, 0.0, 4.0, 0.0])})
    one.step([0, 1])
    two.step([0, 1])
    assert torch.allclose((total(two) - total(one)).float(), torch.tensor([0.6, 0.0, 0.8, 0.0]), atol=1e-6)
    x, y = rows()[3]
    w = factory(seed=0, noise_seed=1).parameters()["w"]
    expected = (torch.sigmoid(x.double() @ w) - y) * x
    assert torch.allclose(factory(seed=0, noise_seed=1).gradient(factory(seed=0).records[3])["w"], expected.double())


def torch_by_hand(start: Any, draw: Any) -> Any:
    """A step on one linear layer that takes its noise from what `start` returned beside the model, or globally."""

    def step(state: Any, batch: Any) -> Any:
        model, optimizer, source = state
        optimizer.zero_grad()
        for value in model.parameters():
            value.grad = draw(value, source)
        optimizer.step()
        return state

    return step_function(init=start, step=step, records=rows, claim=CLAIM)


def started(source: Any) -> Any:
    def start(seed: int | None = None) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        model = nn.Linear(4, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), source()

    return start


def constant(seed: int | None = None) -> Any:
    torch.manual_seed(7)
    return started(lambda: None)()


@pytest.mark.parametrize(
    ("start", "draw", "public"),
    [
        (started(lambda: None), lambda value, _: torch.randn_like(value), False),
        (constant, lambda value, _: torch.randn_like(value), True),
        (started(lambda: torch.Generator().manual_seed(1234)), None, True),
        (started(lambda: np.random.default_rng(42)), None, True),
        (started(lambda: np.random.RandomState(42)), None, True),
        (started(np.random.default_rng), None, False),
    ],
    ids=["global", "global, constant", "generator", "numpy", "RandomState", "numpy, from the system"],
)
def test_production_noise_that_a_constant_has_seeded_stays_public(start: Any, draw: Any, public: bool) -> None:
    def own(value: Tensor, source: Any) -> Tensor:
        if isinstance(source, torch.Generator):
            return torch.randn(value.shape, generator=source)
        return torch.tensor(source.normal(size=tuple(value.shape)), dtype=torch.float32)

    factory = torch_by_hand(start, draw or own)
    seen = []
    for _ in range(2):
        trainer = factory(seed=3)
        trainer.step([0])
        seen.append(total(trainer))
    assert torch.equal(*seen) == public
    again = [factory(seed=3, noise_seed=5) for _ in range(2)]
    for trainer in again:
        trainer.step([0])
    assert torch.equal(total(again[0]), total(again[1]))


def test_a_step_that_hides_its_gradients_says_so() -> None:
    trainer = by_hand(released=(Hand, "noisy"))(seed=0, noise_seed=0)
    trainer.step([0])
    assert trainer.inject is None and "closes the white-box game" in trainer.unavailable["inject"]
    assert "per_record_gradients" in trainer.unavailable["gradient"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "released: missing"),
        ({"released": "noisy"}, "released: got 'str'"),
        ({"released": (Hand, "nosy")}, "released: got 'nosy'"),
        ({"released": lambda state: {"v": state["params"]["w"]}}, "released: got 'v'"),
        ({"released": (Hand, "noisy"), "parameters": "theta.w"}, "parameters: got 'theta.w'"),
        ({"released": (np, "linspace")}, "was called 0 times"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        by_hand(**options)(seed=0, noise_seed=0).step([0])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrapped_method_is_put_back_as_it_was() -> None:
    class Base:
        share = 1.0

        @classmethod
        def noisy(cls, each: Any, rng: Any) -> Any:
            return {"w": cls.share * np.ones(4)}

        @classmethod
        def step(cls, state: Any, batch: Any) -> Any:
            cls.noisy(None, None)
            return state

    class Heir(Base):
        share = 0.5

    for owner in (Base, Heir, Base, Heir):
        factory = step_function(init=start, step=owner.step, records=rows, claim=CLAIM, released=(owner, "noisy"))
        trainer = factory(seed=0, noise_seed=0)
        trainer.step([0])
        assert torch.equal(trainer.released()["w"], torch.full((4,), owner.share, dtype=torch.float64))
    assert isinstance(vars(Base)["noisy"], classmethod) and "noisy" not in vars(Heir)


def test_trees_there_and_back() -> None:
    tree = {"a": [np.ones(2), torch.zeros(3)], "b": (np.float32(1.5), {"c": np.arange(2)}), "n": None}
    assert list(trees.tensors(tree)) == ["a.0", "a.1", "b.0"]
    doubled = trees.replace(
        tree, lambda path, leaf: trees.like(leaf, 2 * trees.to_torch(leaf)) if trees.is_floating(leaf) else leaf
    )
    assert type(doubled["b"]) is tuple and doubled["n"] is None
    assert np.array_equal(doubled["a"][0], [2, 2]) and float(doubled["b"][0]) == 3.0


def test_the_door_has_the_three() -> None:
    import dpaudit.under_test as door

    assert sorted(dir(door)) == ["hf_trainer", "opacus_loop", "step_function"] == sorted(adapters.__all__)


class _Drawing(torch.autograd.Function):
    """Draws the noise of the weights' gradient in the backward pass, as libraries with book-keeping do."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values @ weights

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[None, Tensor]:
        (values,) = ctx.saved_tensors
        each = values * given[0][:, None]
        clipped = each / each.norm(dim=1, keepdim=True).clamp(min=C)
        return None, clipped.sum(dim=0) + torch.normal(mean=0.0, std=SIGMA * C, size=(2000,))


def test_noise_that_is_drawn_in_the_backward_pass_is_frozen_a_step_at_a_time() -> None:
    data = [torch.randn(2000, generator=torch.Generator().manual_seed(number)) for number in range(N)]

    def start(seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(2000, 1, bias=False)
        return model, torch.optim.SGD(model.parameters(), lr=0.1 / B)

    def step(state: tuple[nn.Linear, torch.optim.Optimizer], batch: list[Tensor]) -> Any:
        model, optimizer = state
        values = torch.stack(batch) if batch else torch.zeros(0, 2000)
        (_Drawing.apply(values, model.weight[0]) - 1.0).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return state

    factory = step_function(init=start, step=step, records=lambda: data, claim=CLAIM)
    one, two, other = factory(seed=1, noise_seed=2), factory(seed=1, noise_seed=2), factory(seed=1, noise_seed=3)
    seen = []
    for batch in ([], [], [1, 2]):
        for trainer in (one, two, other):
            trainer.step(batch)
        assert torch.equal(total(one), total(two))
        seen += [total(one), total(other)]
    assert np.abs(np.corrcoef(torch.stack(seen[:4]).numpy()) - np.eye(4)).max() < 0.12  # 5.4 standard errors
