"""Update rules that a few numbers can't show."""

import numpy as np
import pytest

from attacks.bugs import correct_updates
from attacks.contract import rules, updates
from attacks.contract.bench import Bench
from attacks.contract.probe import Probe
from trainers.adapters.compact import Compact


@pytest.mark.parametrize(("factory", "seed"), [(correct_updates.NoisyFeedback, 21), (correct_updates.AdamW, 45)])
def test_a_rule_that_looks_like_another_one_among_few_releases_is_not_judged_beyond_them(
    factory: type[Compact], seed: int
) -> None:
    """Seeds under which both failed: noise of one number had one sign in all trainings, and small releases alone."""
    assert updates.update_rule(Bench(Probe(factory, seed=seed))).status == "pass"


def test_a_sign_is_predicted_within_the_releases_that_showed_it() -> None:
    learn = [(np.array([[x]]), np.array([0.1 * np.sign(x)])) for x in (-2.0, -1.0, 1.0, 1.5, 2.0)]
    predict = updates._signs(learn, 1e-6)
    assert predict is not None
    for x, move in ((1.2, 0.1), (-1.5, -0.1), (2.5, np.nan), (-0.5, np.nan), (0.0, np.nan)):
        np.testing.assert_equal(predict(np.array([[x]])), [move])


@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_learning_rate_and_a_weight_decay_that_one_sign_shows_together_are_not_known(spread: float) -> None:
    direction = 1.0 - spread * np.arange(8.0)[:, None]
    start = np.full((8, 1), 0.3)
    assert not rules._rates(direction, start, 0.1 * direction - 0.01 * start)[1]
    direction[3] *= -1
    rates, known = rules._rates(direction, start, 0.1 * direction - 0.01 * start)
    assert known and np.allclose(rates, [0.1, -0.01])
    rates, known = rules._rates(direction, 0 * start, 0.1 * direction)
    assert known and np.allclose(rates, [0.1, 0.0])
