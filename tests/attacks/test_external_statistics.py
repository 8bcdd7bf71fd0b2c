"""What the audits of foreign trainers compute: e-process, privacy curve, contents of records, claims."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from attacks.external import claims, contents, evidence
from dpaudit import accounting
from dpaudit.claims import StepClaim
from dpaudit.documents import Claim
from dpaudit.errors import UsageError

STEP = StepClaim("gaussian", 1.0, 1.0, "poisson", 0.1, 5.0, "add-remove", "record", 50, 1e-5)


def claim(**changes: object) -> Claim:
    return claims.make_claim(STEP, steps=50, delta=1e-5, stated=None).model_copy(update=changes)


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_privacy_curve_meets_the_accountant() -> None:
    mine = claim()
    for epsilon, delta in evidence.privacy_curve(mine)[1:]:
        event = accounting.DpSgd(1.0, 0.1, 50)
        assert accounting.epsilon(event, delta) == pytest.approx(epsilon, rel=1e-3)


def test_privacy_curve_of_bare_epsilon_delta_is_that_of_the_worst_pair() -> None:
    bare = Claim(epsilon=2.0, delta=1e-3, relation="add-remove", unit="record")
    curve = dict(evidence.privacy_curve(bare))
    assert curve[2.0] == pytest.approx(1e-3)
    # Randomised response that tells the truth with probability e^2 / (1 + e^2), and the coin itself with delta.
    truth = (1 - 1e-3) / (1 + np.exp(-2.0))
    assert curve[1.0] == pytest.approx(1e-3 + truth - np.exp(1.0) * (1 - 1e-3 - truth))


def test_e_process_is_fair_under_the_claim() -> None:
    """Ville: P[e-process ever reaches 20] <= 1/20 for the claimed mechanism at its worst, 400 audits of 60 runs.

    More than 42 of 400 has probability below 1e-6 at a rate of 5 %.
    """
    rng = np.random.default_rng(0)
    bare = Claim(epsilon=1.0, delta=0.0001, relation="add-remove", unit="record")
    alarms = 0
    for _ in range(400):
        members = rng.random(60) < 0.5
        told = rng.random(60) < 1 / (1 + np.exp(-1.0))  # randomised response at eps = 1: the most that is allowed
        scores = np.where(told == members, 1.0, 0.0) + 1e-3 * rng.random(60)
        alarms += evidence.gather(scores, members, bare).p_value <= 0.05
    assert alarms <= 42


def test_e_process_finds_what_is_too_much() -> None:
    rng = np.random.default_rng(1)
    members = rng.random(100) < 0.5
    scores = members + 0.1 * rng.normal(size=100)
    found = evidence.gather(scores, members, claim())
    assert found.p_value < 1e-3 and found.right == found.guesses >= 90
    turned = evidence.gather(-scores, members, claim())
    assert turned.p_value < 1e-3


def test_guesses_use_the_past_alone() -> None:
    rng = np.random.default_rng(2)
    scores, members = rng.normal(size=30), rng.random(30) < 0.5
    whole = evidence.guess_in_order(scores, members)
    for end in (5, 17, 29):
        assert evidence.guess_in_order(scores[:end], members[:end]) == whole[:end]
    flipped = members.copy()
    flipped[20:] = ~flipped[20:]
    assert evidence.guess_in_order(scores, flipped)[:21] == whole[:21]


# -- contents ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    picture: object
    text: str
    label: int


def row(value: float = 1.0, text: str = "seven", label: int = 7) -> Row:
    return Row(torch.full((4, 4), value), text, label)


def test_fingerprints_follow_contents() -> None:
    prints = [contents.fingerprint(item) for item in (row(), row(2.0), row(text="six"), row(label=6))]
    assert len(set(prints)) == 4
    assert contents.fingerprint(row()) == prints[0]
    assert contents.fingerprint({"a": 1, "b": 2}) == contents.fingerprint({"b": 2, "a": 1})
    assert contents.fingerprint([1, 2]) != contents.fingerprint([[1], 2])
    assert contents.fingerprint("1") != contents.fingerprint(1)
    image = Image.new("L", (3, 3), 9)
    assert contents.fingerprint(image) == contents.fingerprint(image.copy())


def test_opaque_records_are_told() -> None:
    assert contents.visible([row(), {"x": [1.0, None]}])
    assert not contents.visible([object()])
    assert not contents.visible([np.array([object()])])


def test_features_see_pictures_texts_numbers_and_lengths() -> None:
    rng = np.random.default_rng(0)
    items = [
        {
            "picture": rng.random((40, 40)),
            "tokens": torch.tensor(rng.integers(0, 99, size=3 + place % 4)),
            "label": place,
        }
        for place in range(12)
    ]
    found = contents.features(items)
    assert found is not None and found.shape[0] == 12 and np.isfinite(found).all()
    means = np.array([item["picture"].mean() for item in items])
    assert any(np.allclose(found[:, column], means) for column in range(found.shape[1]))
    assert contents.features([{"a": 1, "b": "x"}] * 5) is None
    odd = contents.features([torch.tensor([1.0, float("nan")]), torch.tensor([2.0, float("inf")])])
    assert odd is not None and np.isfinite(odd).all()


# -- claims ------------------------------------------------------------------------------------------------------------


def test_claim_from_trainer_command_line_and_accountant() -> None:
    own = claims.make_claim(STEP, steps=50, delta=1e-5, stated=None)
    assert own.epsilon == pytest.approx(accounting.epsilon(accounting.DpSgd(1.0, 0.1, 50), 1e-5))
    assert claims.make_claim(STEP, steps=50, delta=1e-5, stated=3.0).epsilon == 3.0
    laplace = StepClaim("laplace", 1.0, 1.0, "poisson", 0.1, 5.0, "add-remove", "record", 50)
    with pytest.raises(UsageError, match="--epsilon: missing"):
        claims.make_claim(laplace, steps=50, delta=1e-5, stated=None)
    with pytest.raises(UsageError, match="infinite"):
        claims.make_claim(STEP, steps=50, delta=1e-5, stated=float("inf"))
    with pytest.raises(UsageError, match="--steps: missing"):
        claims.claimed_steps(StepClaim("gaussian", 1.0, 1.0, "poisson", 0.1, 5.0, "add-remove", "record"), None)
    assert claims.claimed_delta(STEP, None) == 1e-5


def test_ledger_says_whether_the_stated_eps_pays() -> None:
    paid = claim().epsilon
    assert claims.ledger_rows(claim())[0].status == "accounted"
    assert claims.ledger_rows(claim(epsilon=0.995 * paid))[0].status == "accounted"
    assert claims.ledger_rows(claim(epsilon=0.9 * paid))[0].status == "UNACCOUNTED"
    assert claims.ledger_rows(claim(mechanism="laplace", noise="laplace")) == ()
