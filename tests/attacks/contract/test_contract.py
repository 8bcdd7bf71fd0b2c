"""The contract on correct trainers, on those that can't be fully judged, and on factories that break the protocol."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.contract import MethodFailure, assert_contract, check, check_names
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe
from attacks.contract.units import injected
from dpaudit.documents import Check, CheckDocument
from dpaudit.errors import UsageError
from trainers.adapters import compact, foreign, zeroth_order
from trainers.adapters.compact import SHAPES, Compact, Record

CORRECT = [
    compact.dp_sgd,
    compact.pruned,
    compact.adam,
    compact.fixed_size,
    compact.shuffled,
    compact.allocated,
    compact.full_batch,
    compact.laplace,
    zeroth_order.dp_zo,
]


def by_name(document: CheckDocument) -> dict[str, Check]:
    return {item.name: item for item in document.checks}


@pytest.mark.parametrize("factory", CORRECT, ids=lambda factory: factory.__name__)
def test_correct_trainers_pass(factory: Any) -> None:
    # false alarm: below 2e-6 a trainer (attacks.contract), and the seed is fixed
    document = check(factory, seed=1)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]
    assert tuple(item.name for item in document.checks) == tuple(by_name(document))
    assert set(by_name(document)) == set(check_names())
    for item in document.checks:
        assert item.explanation and item.measured


def test_an_opacus_loop_passes() -> None:
    assert_contract(foreign.opacus)


class Outside(Compact):
    """Not all that the protocol offers: no extreme records, clip norm far above every gradient.

    A small learning rate keeps it so: noise of 1e4 would carry the weights to where gradients are as large.
    """

    max_grad_norm, learning_rate = 1e4, 1e-6
    extreme_records = None  # type: ignore[assignment]


def test_a_pass_that_says_too_little_is_inconclusive() -> None:
    document = check(Outside)
    assert document.verdict == "inconclusive"
    item = by_name(document)["influence of one unit"]
    assert item.status == "not applicable" and "not put to the test" in item.measured


class Restless(Compact):
    """Ignores noise_seed: truly random noise every time, so nothing can be frozen."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=None)


def test_frozen_noise_checks_do_not_apply_where_seeds_do_not_repeat() -> None:
    checks = by_name(document := check(Restless))
    assert document.verdict == "inconclusive"
    assert checks["influence of one unit"].status == "not applicable"
    assert checks["noise level"].status == "pass" and checks["noise law"].status == "pass"
    assert checks["sampling rate of each unit"].status == "pass" and checks["eps reported"].status == "pass"


class Quiet(Restless):
    """The same with 30 % less noise: the level is judged all the same."""

    def noise_std(self) -> float:
        return 0.7 * super().noise_std()


def test_too_little_noise_is_found_without_frozen_noise() -> None:
    item = by_name(check(Quiet))["noise level"]
    # The noise is truly random here; 0.04 is more than six standard deviations of the measured ratio.
    assert item.status == "fail" and abs(float(item.measured.split()[0]) - 0.7) < 0.04


def test_one_coordinate_that_never_changes_sign_is_no_affine_rule() -> None:
    """A false alarm that the controls found: Adam's first move looked constant in a block of one coordinate."""
    assert by_name(check(compact.adam, seed=17))["update follows the released gradient"].status == "pass"


class Turned(Compact):
    """An injected gradient is taken away from the sum, by exactly its clipped size."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        super().inject({name: -value for name, value in gradient.items()})


@pytest.mark.parametrize(("factory", "status"), [(Compact, "pass"), (Turned, "fail")])
def test_an_injected_gradient_moves_the_sum_its_own_way(factory: Any, status: str) -> None:
    found = injected(Bench(Probe(factory)))
    assert found.status == status and "moved the sum by 1 C" in found.measured
    assert ("against its direction" in found.measured) == (status == "fail")


class Clipped(Compact):
    """Updates are clamped: affine for small releases, saturated for large ones; still post-processing."""

    def update(self, noisy: Tensor, clean_sum: Tensor) -> None:
        self.updated = set(SHAPES)
        self.weights = self.weights - 0.05 * noisy.clamp(-0.4, 0.4)


@pytest.mark.parametrize("seed", range(3))
def test_an_update_rule_that_saturates_is_no_fault(seed: int) -> None:
    document = check(Clipped, seed=seed)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]


def test_influence_is_the_clip_norm_exactly() -> None:
    """Oracle: the extreme records are all clipped to C, so the measured sensitivity is 1.0 C."""
    item = by_name(check(Compact))["influence of one unit"]
    assert "largest move 1 C" in item.measured


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_small_noise_errors_in_a_large_sum_are_found(scale: float) -> None:
    """61 coordinates x 199 seeds: an error of 10 % of the standard deviation is far outside the exact interval."""

    class Wrong(Compact):
        def noise_std(self) -> float:
            return scale * super().noise_std()

    assert by_name(check(Wrong))["noise level"].status == "fail"


class Correlated(Compact):
    """Noise of step t = z_t - z_(t-1) / 2, claimed as correlated; `mixing` says so."""

    @property
    def claim(self) -> Any:
        return type(super().claim)(**{**super().claim.__dict__, "mechanism": "correlated"})

    def mixing(self, steps: int) -> Tensor:
        return torch.eye(steps) - 0.5 * torch.diag(torch.ones(steps - 1), -1)

    def block_noise(self, name: str) -> Tensor:
        now = super().block_noise(name)
        if self.step_count == 1:
            return now
        self.step_count -= 1
        before = super().block_noise(name)
        self.step_count += 1
        return now - 0.5 * before

    epsilon = None  # type: ignore[assignment]


class Undeclared(Correlated):
    """The same noise, claimed as independent."""

    @property
    def claim(self) -> Any:
        return Compact.claim.fget(self)  # type: ignore[attr-defined]


class Silent(Correlated):
    """Correlated by claim, without saying how."""

    mixing = None  # type: ignore[assignment]


def test_correlated_noise_is_judged_by_its_own_rules() -> None:
    declared = check(Correlated)
    assert declared.verdict == "pass", [item for item in declared.checks if item.status == "fail"]
    assert by_name(declared)["noise over steps"].status == "pass"
    assert by_name(check(Undeclared))["noise over steps"].status == "fail"
    silent = check(Silent)
    assert silent.verdict == "inconclusive" and by_name(silent)["noise level"].status == "not applicable"


class RankOne(zeroth_order.DpZo):
    """The release as rank-one tensors; the contract finds the number by `direction`."""

    def released(self) -> Mapping[str, Tensor | None]:
        number = self.last["number"]
        assert number is not None
        return {name: number * z for name, z in self.direction().items()}


class OffTheLine(zeroth_order.DpZo):
    """Moves the last weight by the clean loss as well."""

    def step(self, indices: Sequence[int]) -> None:
        super().step(indices)
        self.weights[-1] += 0.1 * self.losses(self.weights, [self.records[index] for index in indices]).sum()


def test_zeroth_order_trainers_are_judged_by_the_number_and_the_line() -> None:
    assert check(RankOne).verdict == "pass"
    assert by_name(check(OffTheLine))["moves along the public line"].status == "fail"


def test_one_assert_tells_a_test_suite_what_is_wrong() -> None:
    class Faint(Compact):
        def noise_std(self) -> float:
            return super().noise_std() / 4

    with pytest.raises(AssertionError, match=r"noise level: measured 0\.2\d* x the claimed noise in"):
        assert_contract(Faint)


# -- factories that break the protocol -----------------------------------------------------------------------------


def lacking(name: str) -> type:
    class Trainer:
        records = compact.own_records()
        claim = Compact(seed=0).claim

        def step(self, indices: Sequence[int]) -> None: ...

        def released(self) -> dict[str, Tensor]:
            return {}

        def parameters(self) -> dict[str, Tensor]:
            return {}

        def __init__(self, records: Any = None, *, seed: int, noise_seed: int | None = None) -> None: ...

    delattr(Trainer, name)
    return Trainer


@pytest.mark.parametrize("name", ["records", "claim", "step", "released", "parameters"])
def test_a_missing_method_is_named(name: str) -> None:
    with pytest.raises(MethodFailure, match=f"^{name}: missing; the trainer must offer") as failure:
        check(lacking(name))
    assert "\n" not in str(failure.value)


class Slow(Compact):
    def step(self, indices: Sequence[int]) -> None:
        while True:
            with contextlib.suppress(Exception):  # the kind of code that swallows everything
                time.sleep(0.01)


class Raising(Compact):
    def step(self, indices: Sequence[int]) -> None:
        raise RuntimeError("out of\nmemory")


class Leaving(Compact):
    def parameters(self) -> Mapping[str, Tensor]:
        raise SystemExit(0)


class WrongShape(Compact):
    def released(self) -> Mapping[str, Tensor | None]:
        return {**super().released(), "w1": torch.zeros(3)}


class WrongName(Compact):
    def released(self) -> Mapping[str, Tensor | None]:
        return {"w9": torch.zeros(3)}


class NotATensor(Compact):
    def released(self) -> Any:
        return dict.fromkeys(SHAPES, "zeros")


class NoClaim(Compact):
    claim = ("sigma", 1)  # type: ignore[assignment]


class NegativeC(Compact):
    max_grad_norm = -1.0


class OddSampler(Compact):
    def sample(self) -> list[int]:
        return [999]


class OddEpsilon(Compact):
    def epsilon(self, delta: float) -> float:
        return float("nan")


class Blind(Compact):
    def gradient(self, record: Record) -> dict[str, torch.Tensor]:
        raise ValueError("no gradient")


class TwoRecords(Compact):
    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(compact.own_records()[:2], seed=seed, noise_seed=noise_seed)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Slow, r"step\(\[0, 1, 2\]\): did not return within 0.3 s"),
        (Raising, r"step\(\[0, 1, 2\]\): raised RuntimeError: out of memory \(test_contract.py:\d+\)"),
        (Leaving, r"parameters\(\): raised SystemExit"),
        (WrongShape, r"released\(\): 'w1' has shape \(3,\), the parameter has \(6, 8\)"),
        (WrongName, r"released\(\): names 'w9'"),
        (NotATensor, r"released\(\): '(w1|b1)' is str; accepted: a floating-point tensor or array"),
        (NoClaim, "claim: got tuple; accepted: dpaudit.claims.StepClaim"),
        (Blind, r"^gradient\(a Record\): raised ValueError: no gradient"),  # and nothing of the record
        (NegativeC, r"^claim.max_grad_norm: got -1.0; accepted: a finite number above 0"),
        (OddSampler, r"sample\(\): returned an index outside 0 to 39"),
        (OddEpsilon, r"epsilon\(1e-05\): returned nan"),
        (TwoRecords, "records: holds 2 units; accepted: at least 3"),
        (lambda **_: 1 / 0, r"factory: raised (TypeError|ZeroDivisionError)"),
        (lambda records=None, *, seed, noise_seed=None: None, "records: missing"),
    ],
)
def test_hostile_factories_get_one_line_that_names_the_method(factory: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        check(factory, time_limit=0.3 if factory is Slow else 20.0)
    assert "\n" not in str(failure.value)


def test_a_factory_must_be_callable() -> None:
    with pytest.raises(UsageError, match="factory: got 3"):
        check(3)  # type: ignore[arg-type]


def test_observations_are_those_of_fresh_trainers() -> None:
    """Two questions never share a trainer: the first step is always a first step."""
    probe = Probe(Compact)
    one = probe.observe([0, 1])
    probe.observe([2])
    again = probe.observe([0, 1], again=True)
    assert np.array_equal(one.vector, again.vector)
    assert not np.array_equal(one.vector, probe.observe([0, 1], noise=1).vector)


def test_the_frozen_difference_is_the_clipped_gradient() -> None:
    """Oracle: contribution = min(1, C / norm) g, computed here from the trainer's own gradient."""
    probe = Probe(Compact)
    bench = Bench(probe)
    trainer = Compact(seed=0)
    for unit in bench.picks.group:
        flat = torch.cat([trainer.gradient(trainer.records[unit])[name].reshape(-1) for name in sorted(SHAPES)])
        wanted = (flat * min(1.0, trainer.max_grad_norm / float(flat.norm()))).double().numpy()
        found = bench.contribution(unit, [bench.picks.anchor])
        assert np.abs(found - wanted).max() < 1e-5


class Arrays(Compact):
    """The protocol in numpy arrays instead of tensors."""

    def released(self) -> dict[str, Any]:
        return {name: None if value is None else value.numpy() for name, value in super().released().items()}

    def parameters(self) -> dict[str, Any]:
        return {name: value.numpy() for name, value in super().parameters().items()}

    def assign(self, parameters: Mapping[str, Any]) -> None:
        assert all(isinstance(value, np.ndarray) for value in parameters.values())
        super().assign({name: torch.from_numpy(value) for name, value in parameters.items()})

    def select(self, noisy: Mapping[str, Any]) -> set[str]:
        return super().select({name: torch.as_tensor(value) for name, value in noisy.items()})


def test_arrays_will_do() -> None:
    one, two = check(Arrays), check(Compact)
    assert one.verdict == "pass"
    assert [(item.name, item.status) for item in one.checks] == [(item.name, item.status) for item in two.checks]


class Whole(Compact):
    def parameters(self) -> dict[str, Any]:
        return {name: value.to(torch.int64) for name, value in super().parameters().items()}


def test_whole_numbers_are_no_parameters() -> None:
    with pytest.raises(MethodFailure, match="accepted: a floating-point tensor or array"):
        check(Whole)


class UnclippedLater(Compact):
    """In production alone, and from the second step on, nothing is clipped."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.live, self.taken = noise_seed is None, 0

    def step(self, indices: Sequence[int]) -> None:
        self.taken += 1
        if self.live and self.taken > 1:
            self.max_grad_norm, kept = 1e6, self.max_grad_norm
            self.noise_multiplier, sigma = self.noise_multiplier * kept / 1e6, self.noise_multiplier
            super().step(indices)
            self.max_grad_norm, self.noise_multiplier = kept, sigma
        else:
            super().step(indices)


class NoiselessBatchesLater(Compact):
    """In production alone batches of later steps have a tenth of the noise; empty ones have it all."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.live, self.taken = noise_seed is None, 0

    def step(self, indices: Sequence[int]) -> None:
        self.taken += 1
        kept = self.noise_multiplier
        if self.live and self.taken > 1 and len(indices):
            self.noise_multiplier = kept / 10
        super().step(indices)
        self.noise_multiplier = kept


@pytest.mark.parametrize("kind", [UnclippedLater, NoiselessBatchesLater])
@pytest.mark.parametrize("lacking", [(), ("assign",), ("assign", "gradient")])
def test_production_is_looked_at_in_later_batches(kind: type[Compact], lacking: tuple[str, ...]) -> None:
    """By parameters set alike, or by clipped gradients; where neither is offered the check says so."""
    subject = type("Lacking", (kind,), dict.fromkeys(lacking))
    item = by_name(check(subject))["batches without a seed"]
    if lacking == ("assign", "gradient"):
        assert item.status == "not applicable" and "neither assign() nor a gradient()" in item.measured
    else:
        assert item.status == "fail" and "a later batch" in item.measured, item.measured
