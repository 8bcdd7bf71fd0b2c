"""Published scores against independent derivations from the papers' formulas, on the same losses.

Nothing of attacks.membership.formulas is called by the oracles: loops over records, written from the papers.
"""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from attacks.membership import formulas
from attacks.membership.selection import area
from dpaudit.errors import UsageError

Floats = npt.NDArray[np.float64]


def game(k: int, m: int, seed: int = 0) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Losses of m records under a target and k references, every record IN and OUT of at least two of them."""
    rng = np.random.default_rng(seed)
    inside = rng.random((k, m)) < 0.5
    inside[:2], inside[2:4] = True, False
    hard = rng.gamma(3.0, 0.4, size=m)
    losses = hard * np.exp(rng.normal(0, 0.3, size=(k, m)) - 0.5 * inside)
    return hard * np.exp(rng.normal(0, 0.3, size=m)), losses, inside


def logit(loss: float) -> float:
    p = math.exp(-loss)
    return math.log(p / (1 - p))


def normal_log_density(x: float, mean: float, sd: float) -> float:
    return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))


def within_sd(columns: list[list[float]]) -> float:
    """Pooled standard deviation around each record's own mean."""
    squares = sum((x - sum(c) / len(c)) ** 2 for c in columns for x in c)
    return math.sqrt(squares / sum(len(c) - 1 for c in columns))


@pytest.mark.parametrize("own", [True, False])
def test_lira_is_the_likelihood_ratio_of_algorithm_1(own: bool) -> None:
    target, losses, inside = game(12, 30)
    sides = [
        [[logit(losses[j, i]) for j in range(12) if inside[j, i] == side] for i in range(30)] for side in (True, False)
    ]
    online, offline = [], []
    for i in range(30):
        phi, terms = logit(target[i]), []
        for columns in sides:
            mean = sum(columns[i]) / len(columns[i])
            sd = within_sd([columns[i]]) if own else within_sd(columns)
            terms.append((mean, sd))
        online.append(normal_log_density(phi, *terms[0]) - normal_log_density(phi, *terms[1]))
        offline.append(1 - stats.norm.sf(phi, *terms[1]))  # 1 - Pr[N(mu_out, s_out) > phi]
    np.testing.assert_allclose(formulas.lira_online(target, losses, inside, own_variance=own), online, rtol=1e-8)
    ours = formulas.lira_offline(target, losses, inside, own_variance=own)
    np.testing.assert_allclose(stats.norm.cdf(ours), offline, rtol=1e-7, atol=1e-12)


def test_lira_takes_one_variance_below_64_models_and_its_own_from_there_on() -> None:
    for k, own in ((63, False), (64, True)):
        target, losses, inside = game(k, 8)
        expected = formulas.lira_online(target, losses, inside, own_variance=own)
        np.testing.assert_array_equal(formulas.lira_online(target, losses, inside), expected)


@pytest.mark.parametrize(("gamma", "a"), [(1.0, None), (2.0, None), (1.0, 0.3)])
def test_rmia_is_the_share_of_pairwise_ratios(gamma: float, a: float | None) -> None:
    """Equation by equation: ratio of ratios, pair by pair, with probabilities and not their logarithms."""
    target, losses, inside = game(10, 25)
    rng = np.random.default_rng(3)
    z_target, z_losses = rng.gamma(3.0, 0.4, size=40), rng.gamma(3.0, 0.4, size=(10, 40))

    def mean_probability(column: Floats, member: npt.NDArray[np.bool_]) -> float:
        out = float(np.mean(np.exp(-column[~member])))
        if a is not None:
            return 0.5 * ((1 + a) * out + (1 - a))
        return 0.5 * (float(np.mean(np.exp(-column[member]))) + out) if member.any() else out

    nobody = np.zeros(10, bool)
    expected = []
    for i in range(25):
        ratio = math.exp(-target[i]) / mean_probability(losses[:, i], inside[:, i])
        beaten = [
            ratio / (math.exp(-z_target[z]) / mean_probability(z_losses[:, z], nobody)) >= gamma for z in range(40)
        ]
        expected.append(sum(beaten))
    ours = formulas.rmia(target, losses, inside, (z_target, z_losses), gamma=gamma, offline_a=a)
    np.testing.assert_array_equal(np.floor(41 * ours + 1e-12), expected)


def test_rmia_orders_records_that_beat_equally_many_by_their_ratio() -> None:
    """With a population of one, or all of it beaten, the order is that of the ratio: no ties at the top."""
    target, losses, inside = game(10, 25)
    ratio = -target - formulas.log_reference_probability(losses, inside)
    for n, gain in ((1, 0.0), (40, 0.0), (40, 50.0), (40, -50.0)):
        z = np.random.default_rng(n).gamma(3.0, 0.4, size=(10, n))
        ours = formulas.rmia(target, losses, inside, (z[0] + gain, z))
        assert np.array_equal(np.argsort(ours, kind="stable"), np.argsort(ratio, kind="stable"))
        assert ((ours >= 0) & (ours < 1)).all()
    assert (formulas.rmia(target, losses, inside, (np.empty(0), np.empty((10, 0)))) == 0).all()


def test_informia_is_a_bayes_factor_and_a_divergence_in_bits() -> None:
    target, losses, inside = game(10, 25)
    rng = np.random.default_rng(4)
    z_target, z_losses = rng.gamma(3.0, 0.4, size=40), rng.gamma(3.0, 0.4, size=(10, 40))
    divergence = np.mean([math.log2(np.mean(np.exp(-z_losses[:, z])) / math.exp(-z_target[z])) for z in range(40)])
    expected = []
    for i in range(25):
        both = 0.5 * np.mean(np.exp(-losses[inside[:, i], i])) + 0.5 * np.mean(np.exp(-losses[~inside[:, i], i]))
        expected.append(math.log2(math.exp(-target[i]) / both) + divergence)
    np.testing.assert_allclose(formulas.informia(target, losses, inside, (z_target, z_losses)), expected, rtol=1e-9)


def test_bavaria_is_the_predictive_law_of_its_prior() -> None:
    """The Student t against the integral over (mu, s^2) of likelihood times normal-inverse-gamma posterior."""
    prior = formulas.NormalInverseGamma(mean=0.3, weight=0.7, a=2.5, b=1.2)
    seen = np.array([0.9, -0.4, 1.3])
    found = formulas.moments(seen[:, None], np.ones((3, 1), bool))
    centre, scale, freedom = prior.predictive(found)

    def joint(values: Floats) -> float:
        """Evidence of values: integral over s^2 of the marginal normal given s^2 times InvGamma(a, b)."""
        n = len(values)
        cover = np.eye(n) + np.ones((n, n)) / prior.weight

        def integrand(variance: float) -> float:
            normal = stats.multivariate_normal(np.full(n, prior.mean), variance * cover).pdf(values)
            return float(normal * stats.invgamma(prior.a, scale=prior.b).pdf(variance))

        return float(integrate.quad(integrand, 0, np.inf, limit=200)[0])

    for x in (-1.0, 0.5, 2.0):
        expected = joint(np.append(seen, x)) / joint(seen)
        ours = stats.t.pdf((x - centre[0]) / scale[0], freedom[0]) / scale[0]
        assert ours == pytest.approx(expected, rel=1e-5)


def test_bavaria_finds_the_prior_that_made_the_data() -> None:
    rng = np.random.default_rng(5)
    m, k, a, b, weight, mean = 4000, 12, 6.0, 5.0, 0.5, -1.0
    variance = stats.invgamma(a, scale=b).rvs(m, random_state=rng)
    centre = rng.normal(mean, np.sqrt(variance / weight))
    values = rng.normal(centre, np.sqrt(variance), size=(k, m))
    found = formulas.NormalInverseGamma.fit(formulas.moments(values, np.ones((k, m), bool)))
    assert found.mean == pytest.approx(mean, abs=0.1)
    assert found.weight == pytest.approx(weight, rel=0.15)
    assert found.b / (found.a - 1) == pytest.approx(b / (a - 1), rel=0.05)
    assert found.a == pytest.approx(a, rel=0.35)


def test_few_references_favour_bavaria_over_per_record_variances() -> None:
    """Its reason to exist: with 6 models a record's own variance is noise. Means over 10 games, paired."""
    better = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        members, inside = rng.random(400) < 0.5, rng.random((6, 400)) < 0.5
        hard = rng.normal(0, 2, 400)
        spread = stats.invgamma(4, scale=3).rvs(400, random_state=rng) ** 0.5
        # The loss whose confidence is phi is log(1 + exp(-phi)).
        target, references = (
            np.log1p(np.exp(-(hard + spread * rng.normal(size=coins.shape) + 1.0 * coins)))
            for coins in (members, inside)
        )
        better.append(
            area(formulas.bavaria(target, references, inside), members)
            - area(formulas.lira_online(target, references, inside, own_variance=True), members)
        )
    assert np.mean(better) > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_every_formula_is_finite_for_any_coins(k: int, m: int, seed: int) -> None:
    """Also for records that no model saw, or all did, and for saturated losses."""
    rng = np.random.default_rng(seed)
    inside = rng.random((k, m)) < rng.random()
    losses, target = rng.exponential(size=(k, m)), rng.exponential(size=m)
    losses[rng.random((k, m)) < 0.1] = 0.0
    target[rng.random(m) < 0.1] = 60.0
    population = rng.exponential(size=7), rng.exponential(size=(k, 7))
    found = [
        formulas.lira_online(target, losses, inside),
        formulas.lira_offline(target, losses, inside),
        formulas.attack_r(target, losses, inside),
        formulas.rmia(target, losses, inside, population),
        formulas.informia(target, losses, inside, population),
        formulas.bavaria(target, losses, inside),
        formulas.bavaria(target, losses, inside, offline=True),
    ]
    assert all(scores.shape == (m,) and np.isfinite(scores).all() for scores in found)


def test_attack_r_counts_out_models() -> None:
    losses = np.array([[1.0, 5.0], [2.0, 1.0], [3.0, 3.0]])
    inside = np.array([[True, False], [False, False], [False, False]])
    np.testing.assert_allclose(formulas.attack_r(np.array([2.0, 2.0]), losses, inside), [0.75, 2 / 3])


@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_min_k_is_the_mean_of_the_smallest(records: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(records), rng.integers(0, records, 20)])
    values = rng.normal(size=owner.size)
    expected = []
    for record in range(records):
        mine = sorted(values[owner == record])
        kept = mine[: max(1, math.floor(share * len(mine) + 1e-9))]
        expected.append(sum(kept) / len(kept))
    np.testing.assert_allclose(formulas.min_k(values, owner, records, share), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    target, losses, inside = game(6, 5)
    with pytest.raises(UsageError, match="reference losses"):
        formulas.lira_online(target[:4], losses, inside)
    with pytest.raises(UsageError, match="references"):
        formulas.bavaria(target, losses[:0], inside[:0])
