"""Structure of noise beyond correlations: exact laws under the claim, and each planted fault seen by its own check."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from attacks.bugs import correct, structured
from attacks.contract import independence, influence, noise, structure
from attacks.contract import statistics as stats
from attacks.contract.bench import Bench
from attacks.contract.noise_table import Tables
from attacks.contract.probe import Probe, Vector
from attacks.contract.seeds import Draws
from dpaudit.documents import Check
from trainers.adapters import compact, zeroth_order
from trainers.adapters.compact import Compact

Checks = Callable[[Bench], Iterable[Check]]
Squares = structure.Squares


def structures(bench: Bench) -> list[Check]:
    draws = Draws(bench)
    tables = Tables(draws)
    return [noise.law(draws, tables=tables), *independence.checks(draws, tables=tables)]


def named(name: str) -> Checks:
    return lambda bench: [check for check in structures(bench) if check.name == name]


OVER_STEPS, OVER_PARAMETERS = named(independence.OVER_STEPS), named(independence.OVER_PARAMETERS)
WITHIN, LAW = named(independence.WITHIN), named(noise.LAW)


def every_size(bench: Bench) -> list[Check]:
    return [influence.additivity(bench)]


def normalisation(bench: Bench) -> list[Check]:
    return [noise.normalisation(Draws(bench))]


EXPECTED: list[tuple[type[Compact], Checks, str]] = [
    (structured.NoiseOfASubspace, OVER_PARAMETERS, "directions of least noise"),
    (structured.NoiseMissesADirection, OVER_PARAMETERS, "all blocks in step 1, 1 directions of least noise"),
    (structured.NoiseRotated, OVER_STEPS, "two steps"),
    (structured.NoiseOnASphere, LAW, "norms of the noise of all blocks"),
    (structured.NoiseCentred, WITHIN, "sum of w1"),
    (structured.ColumnNoiseCentred, WITHIN, "x the claimed variance"),
    (structured.NoiseSumsToZero, OVER_STEPS, "over"),
    (structured.NoiseInBfloat16, LAW, "noise of a coarser type"),
    (structured.NoiseInFloat16, LAW, "noise of a coarser type"),
    (structured.LessNoiseInARemainder, normalisation, "noise x 0.7"),
    (structured.LastOfARemainderTwice, every_size, "a batch of"),
]


@pytest.mark.parametrize(("factory", "checks", "words"), EXPECTED, ids=lambda value: getattr(value, "__name__", ""))
def test_its_check_sees_it_and_names_it(factory: Any, checks: Checks, words: str) -> None:
    bench = Bench(Probe(factory, seed=1))
    bench.training.quick = True  # whatever else runs on this machine
    failed = [check for check in checks(bench) if check.status == "fail"]
    assert failed and any(words in check.measured for check in failed), [check.measured for check in failed]


def test_every_planted_bug_has_a_row_here() -> None:
    assert {factory for factory, *_ in EXPECTED} == {bug.factory for bug in structured.BUGS}


class RoundedRelease(Compact):
    """Correct: sum and noise are added, and what is released is rounded to bfloat16 as a whole."""

    def normalise(self, noisy_sum: Tensor, realised: int) -> Tensor:
        return super().normalise(noisy_sum, realised).to(torch.bfloat16).float()


@pytest.mark.parametrize(
    "factory", [compact.Compact, compact.Pruned, compact.Laplace, zeroth_order.dp_zo, RoundedRelease]
)
def test_correct_trainers_have_no_structure(factory: Any) -> None:
    assert not [check for check in structures(Bench(Probe(factory, seed=1))) if check.status == "fail"]


def test_blocks_that_are_not_noised_in_every_step_are_left_out() -> None:
    draws = Draws(Bench(Probe(correct.LateHead, seed=1)))
    tables = Tables(draws)
    assert 0 < len(tables.blocks) < len(draws.bench.series.blocks)
    assert np.isfinite(tables.together).all()


class Correlated(Compact):
    """Correct: noise of step t is that of t minus half of that of t - 1, and says so."""

    @property
    def claim(self) -> Any:
        return type(super().claim)(**{**super().claim.__dict__, "mechanism": "correlated"})

    epsilon = None  # type: ignore[assignment]

    def mixing(self, steps: int) -> Tensor:
        return torch.eye(steps) - 0.5 * torch.diag(torch.ones(steps - 1), -1)

    def block_noise(self, name: str) -> Tensor:
        step = self.step_count
        shape = compact.SHAPES[name]
        drawn = [torch.from_numpy(self.key.normal(shape, step=t, name=name)) for t in (step, step - 1)]
        return drawn[0] - 0.5 * drawn[1] * (step > 1)


class CorrelatedCentred(Correlated):
    """Its white noise is centred in w1."""

    def block_noise(self, name: str) -> Tensor:
        noise = super().block_noise(name)
        return (noise - noise.mean()) * (48 / 47) ** 0.5 if name == "w1" else noise


def test_correlated_noise_is_whitened_first() -> None:
    assert not [check for check in structures(Bench(Probe(Correlated, seed=1))) if check.status == "fail"]
    failed = [check for check in structures(Bench(Probe(CorrelatedCentred, seed=1))) if check.status == "fail"]
    assert any("sum of w1" in check.measured for check in failed), failed


def test_structure_is_not_looked_for_where_the_level_is_wrong() -> None:
    draws = Draws(Bench(Probe(Compact, seed=1)))
    for check in independence.checks(draws, tables=None):
        assert check.status == "pass" and "directions" not in check.measured


RUNS = 300


def uniform(p: list[float]) -> float:
    """p of independent p-values against the uniform law, and against one that is smaller."""
    return float(kstest(p, "uniform").pvalue)


Statistic = Callable[[np.random.Generator], Squares]

NULL: dict[str, Statistic] = {
    "few rows": lambda rng: structure.directions(rng.standard_normal((40, 30)), "x", 0),
    "many rows": lambda rng: structure.directions(rng.standard_normal((120, 16)), "x", 0, tested=24),
    "wide": lambda rng: structure.directions(rng.standard_normal((20, 300)), "x", 0),
    "each step": lambda rng: structure.each_step(rng.standard_normal((8, 5, 12)), "x"),
    "sums": lambda rng: structure.sums(rng.standard_normal((24, 12)), (3, 4), "x"),
}


@pytest.mark.parametrize("name", NULL)
def test_each_statistic_has_the_claimed_law(name: str) -> None:
    rng = np.random.default_rng(11)
    found: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for label, (total, freedom) in NULL[name](rng).items():
            found.setdefault(label, []).append(stats.variance_p(total, freedom))
    assert found
    for label, p in found.items():
        assert uniform(p) > 1e-7, label


@pytest.mark.parametrize("laplace", [False, True])
def test_norms_have_the_claimed_law(laplace: bool) -> None:
    rng = np.random.default_rng(13)
    draws = [rng.laplace(size=(24, 7)) if laplace else rng.standard_normal((24, 7)) for _ in range(RUNS)]
    sizes = [(np.abs(rows) if laplace else rows**2).sum(axis=1) for rows in draws]
    found = np.array([[p for p, _ in structure.norms(size, 7, laplace=laplace)] for size in sizes])
    assert min(uniform(list(column)) for column in found.T) > 1e-7


def test_norms_of_two_sizes_and_capped_norms_are_seen() -> None:
    rng = np.random.default_rng(17)
    sizes = (rng.standard_normal((200, 61)) ** 2).sum(axis=1)
    for wrong in (np.where(np.arange(200) % 2, 74.0, 48.0), np.minimum(sizes, 64.0)):
        assert min(p for p, _ in structure.norms(wrong, 61)) < stats.ALPHA / 100


def brute_windows(rows: Vector) -> tuple[float, int]:
    """Smallest p and number of tests, one by one."""
    steps, width = rows.shape
    found = []
    for start in range(steps):
        for end in range(start + 2, steps + 1):
            found.append(stats.variance_p(float((rows[start:end].sum(axis=0) ** 2).sum()) / (end - start), width))
    for size in range(2, steps // 3 + 1):
        for first in range(min(size, steps - 2 * size + 1)):
            parts = [rows[at : at + size].sum(axis=0) for at in range(first, steps - size + 1, size)]
            total = sum(float((part**2).sum()) for part in parts) / size
            found.append(stats.variance_p(total, width * len(parts)))
    return min(found), len(found)


@pytest.mark.parametrize(("steps", "width"), [(7, 3), (24, 5), (30, 1)])
def test_windows_are_those_of_brute_force(steps: int, width: int) -> None:
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((steps, width))
        least, tests = brute_windows(rows)
        assert structure.windows(rows, "x", 0)[0] == pytest.approx(min(1.0, least * tests), rel=1e-6)


def test_windows_alarm_no_more_often_than_they_say() -> None:
    rng = np.random.default_rng(5)
    p = [structure.windows(rng.standard_normal((40, 6)), "x", 0)[0] for _ in range(400)]
    assert np.mean(np.array(p) <= 0.2) <= 0.2 + 5 * (0.2 * 0.8 / 400) ** 0.5


@pytest.mark.parametrize("law", ["standard_normal", "laplace"])
def test_equal_numbers_are_bounded_and_coarse_types_seen(law: str) -> None:
    rng = np.random.default_rng(7)
    values = getattr(rng, law)(size=(100, 2000)).astype(np.float32)
    assert structure.ties(values.astype(np.float64))[0] > 1e-3
    for kind in (torch.float16, torch.bfloat16):
        coarse = torch.from_numpy(values[:, :61]).to(kind).double().numpy()
        assert structure.ties(coarse)[0] < stats.ALPHA


def test_a_large_model_of_half_the_dimensions_is_seen_from_few_draws() -> None:
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((2000, 1000)))[0]
    table = np.sqrt(2.0) * rng.standard_normal((8, 24, 1000)) @ basis.T
    assert structure.worst_of(structure.directions(table.reshape(-1, 2000), "x", 0))[0] < stats.ALPHA
    assert structure.worst_of(structure.each_step(table, "x"))[0] < stats.ALPHA
