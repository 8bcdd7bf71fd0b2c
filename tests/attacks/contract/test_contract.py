"""The contract on trainers that can't be fully judged, and what single checks measure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.contract import assert_contract, check
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe
from attacks.contract.units import injected
from tests.contract import by_name, one
from trainers.adapters import compact, zeroth_order
from trainers.adapters.compact import SHAPES, Compact, Record


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
    item = one(Quiet, "noise level")
    # The noise is truly random here; 0.04 is more than six standard deviations of the measured ratio.
    assert item.status == "fail" and abs(float(item.measured.split()[0]) - 0.7) < 0.04


def test_one_coordinate_that_never_changes_sign_is_no_affine_rule() -> None:
    """A false alarm that the controls found: Adam's first move looked constant in a block of one coordinate."""
    assert one(compact.adam, "update follows the released gradient", seed=17).status == "pass"


class Turned(Compact):
    """An injected gradient is taken away from the sum, by exactly its clipped size."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        super().inject({name: -value for name, value in gradient.items()})


@pytest.mark.parametrize(("factory", "status"), [(Compact, "pass"), (Turned, "fail")])
def test_an_injected_gradient_moves_the_sum_its_own_way(factory: Any, status: str) -> None:
    found = injected(Bench(Probe(factory)))
    assert found.status == status and "moved the sum by 1 C" in found.measured
    assert ("against its direction" in found.measured) == (status == "fail")


def test_influence_is_the_clip_norm_exactly() -> None:
    """Oracle: the extreme records are all clipped to C, so the measured sensitivity is 1.0 C."""
    item = one(Compact, "influence of one unit")
    assert "largest move 1 C" in item.measured


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_small_noise_errors_in_a_large_sum_are_found(scale: float) -> None:
    """61 coordinates x 199 seeds: an error of 10 % of the standard deviation is far outside the exact interval."""

    class Wrong(Compact):
        def noise_std(self) -> float:
            return scale * super().noise_std()

    assert one(Wrong, "noise level").status == "fail"


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
    assert one(OffTheLine, "moves along the public line").status == "fail"


def test_one_assert_tells_a_test_suite_what_is_wrong() -> None:
    class Faint(Compact):
        def noise_std(self) -> float:
            return super().noise_std() / 4

    with pytest.raises(AssertionError, match=r"noise level: measured 0\.2\d* x the claimed noise in"):
        assert_contract(Faint)


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
    item = one(subject, "batches without a seed")
    if lacking == ("assign", "gradient"):
        assert item.status == "not applicable" and "neither assign() nor a gradient()" in item.measured
    else:
        assert item.status == "fail" and "a later batch" in item.measured, item.measured
