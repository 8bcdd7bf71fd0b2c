"""The judge: precedence, shares, products of games with fresh coins, and what "not refuted" needs."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from dpaudit import verdict
from dpaudit.documents import (
    Check,
    Claim,
    Control,
    GameDocument,
    LedgerRow,
    RunInfo,
    ScoresDocument,
    Test,
    Validity,
    Verdict,
)
from dpaudit.evidence.calibrate import e_value

CLAIM = Claim(epsilon=8.0, delta=1e-5, relation="add-remove", unit="image")
ALPHA = 0.001
BEAT = Check(name="blind baseline", status="fail", measured="p=0", allowed="0.001", explanation="It beat chance.")
GAP = LedgerRow(path="vocabulary", status="UNACCOUNTED", explanation="From private answers.", evidence="-")
FINE = LedgerRow(path="gradients", status="accounted", explanation="Clipped and noised.", evidence="-")
BROKEN = Check(name="clipping", status="fail", measured="2C", allowed="C", explanation="Per tile.")
GOOD = Check(name="clipping", status="pass", measured="C", allowed="C", explanation="Per unit.")


def a_test(**changes: Any) -> Test:
    """A test of the claim that found nothing, with earned power."""
    fields: dict[str, Any] = {
        "name": "canaries",
        "statistic": "loss difference",
        "bound": "f-dp",
        "assumes": "claimed-mechanism",
        "selection": "fixed",
        "confidence": 0.999,
        "delta": 1e-5,
        "n": 1000,
        "guesses": 100,
        "epsilon_lower": None,
        "ceiling": None,
        "p_value": 0.4,
        "e_value": 0.3,
        "power": 0.95,
        "power_low": 0.9,
        "control": "liveness",
    }
    return Test(**{**fields, **changes})


def a_game(*tests: Test, coins: str = "a", number: int = 1, **changes: Any) -> GameDocument:
    fields: dict[str, Any] = {
        "game": "canaries",
        "number": number,
        "previous_sha256": None,
        "about": "weights",
        "claim": CLAIM,
        "coins_sha256": coins,
        "alpha": ALPHA,
        "tests": tests,
        "kept": 0.0,
    }
    return GameDocument(**{**fields, **changes})


def decided(*games: GameDocument, **changes: Any) -> Verdict:
    arguments: dict[str, Any] = {"claim": CLAIM, "alpha": ALPHA, "games": games}
    return verdict.decide(**{**arguments, **changes})[0]


REFUTING, QUIET, WEAK = a_test(e_value=1001.0), a_test(), a_test(power=0.5, power_low=0.4)


@pytest.mark.parametrize(
    "sound, claimed, test, ledger, checks",
    itertools.product(
        (True, False), (True, False), (REFUTING, QUIET, WEAK, None), ([FINE], [FINE, GAP]), ([GOOD], [GOOD, BROKEN])
    ),
)
def test_precedence(
    sound: bool, claimed: bool, test: Test | None, ledger: list[LedgerRow], checks: list[Check]
) -> None:
    """All 64 combinations against the order written in design.md."""
    expected: Verdict
    if not sound:
        expected = "invalid"
    elif not claimed:
        expected = "no claim"
    elif test is REFUTING:
        expected = "refuted"
    elif GAP in ledger or BROKEN in checks:
        expected = "unsupported"
    elif test is QUIET:
        expected = "not refuted"
    else:
        expected = "inconclusive"
    game = a_game(*([test] if test else []), validity=Validity(sound=sound, checks=() if sound else (BEAT,)))
    claim = CLAIM if claimed else None
    got, reasons = verdict.decide(claim=claim, alpha=ALPHA, games=[game], ledger=ledger, checks=checks)
    assert got == expected
    assert reasons and all(reason and "\n" not in reason for reason in reasons)
    if expected == "invalid":
        assert any("blind baseline" in reason for reason in reasons)
    if expected == "unsupported":
        assert ("vocabulary" in " ".join(reasons)) == (GAP in ledger)
        assert ("clipping" in " ".join(reasons)) == (BROKEN in checks)


@pytest.mark.parametrize("test, expected", [(QUIET, "unsupported"), (None, "unsupported"), (REFUTING, "refuted")])
def test_a_broken_control_leaves_the_claim_unsupported(test: Test | None, expected: Verdict) -> None:
    found = Control(name="liveness", outcome="broken", measured="100 C", allowed="1 C", explanation="No clipping.")
    game = a_game(*([test] if test else []), controls=(found,))
    got, reasons = verdict.decide(claim=CLAIM, alpha=ALPHA, games=[game])
    assert got == expected
    assert "Control broken: liveness: measured 100 C, allowed 1 C: No clipping." in reasons
    assert verdict.decide(claim=None, alpha=ALPHA, games=[game])[0] == "no claim"
    unsound = game.model_copy(update={"validity": Validity(sound=False, checks=(BEAT,))})
    assert verdict.decide(claim=CLAIM, alpha=ALPHA, games=[unsound])[0] == "invalid"


def test_a_bound_above_the_claim_asks_for_what_every_game_can_give() -> None:
    bound = a_test(e_value=None, p_value=None, epsilon_lower=9.0, ceiling=20.0, assumes="none")
    _, reasons = verdict.decide(claim=CLAIM, alpha=ALPHA, games=[a_game(bound)])
    assert reasons[0].endswith("more evidence is needed, a game with fresh coins or more records.")


@pytest.mark.parametrize(
    "test, expected",
    [
        (None, "inconclusive"),
        # Neither estimates, nor informative tests, nor bounds decide, in either direction.
        (a_test(e_value=1e9, estimate=True), "inconclusive"),
        (a_test(e_value=1e9, decides=False), "inconclusive"),
        (a_test(e_value=None, p_value=None, epsilon_lower=1e3, ceiling=2e3, assumes="none"), "inconclusive"),
        (a_test(e_value=1000.0), "refuted"),
        (a_test(e_value=math.inf), "refuted"),
        (a_test(e_value=999.0), "not refuted"),
        (a_test(e_value=1000.0, share=0.5), "not refuted"),
        (a_test(e_value=2000.0, share=0.5), "refuted"),
        # Power counts only where a control earned it, by its lower limit, and not beside a p-value of nearly 1.
        (a_test(power=None, power_low=None), "inconclusive"),
        (a_test(power=0.81, power_low=0.79), "inconclusive"),
        (a_test(power_low=0.8), "not refuted"),
        (a_test(p_value=0.9995), "inconclusive"),
        (a_test(p_value=0.99), "not refuted"),
    ],
)
def test_what_decides(test: Test | None, expected: Verdict) -> None:
    assert decided(a_game(*([test] if test is not None else []))) == expected


def test_a_twin_that_was_supplied_earns_no_power_but_can_refute() -> None:
    assert decided(a_game(QUIET, supplied=True)) == "inconclusive"
    assert decided(a_game(REFUTING, supplied=True)) == "refuted"


def test_a_game_against_another_claim_supports_nothing() -> None:
    """Somebody lowers the claim after the game: what was not refuted then is not the claim of today."""
    other = CLAIM.model_copy(update={"epsilon": 2.0})
    assert decided(a_game(QUIET), claim=other) == "inconclusive"
    assert decided(a_game(REFUTING), claim=other) == "refuted"


def test_games_with_fresh_coins_multiply_and_games_on_the_same_coins_add() -> None:
    first, second = a_test(e_value=40.0, share=0.45), a_test(e_value=60.0, share=0.45)
    together = verdict.evidence([a_game(first, kept=0.1), a_game(second, kept=0.1, number=2)])
    assert together.products == pytest.approx([math.log(0.1 + 18), math.log(0.1 + 18 + 27)])
    apart = verdict.evidence([a_game(first, kept=0.1), a_game(second, kept=0.1, number=2, coins="b")])
    assert apart.products == pytest.approx([math.log(18.1), math.log(18.1) + math.log(27.1)])
    assert decided(a_game(first, kept=0.1), a_game(second, kept=0.1, number=2)) == "not refuted"
    assert decided(*[a_game(a_test(e_value=11.0), coins=str(n), number=n) for n in (1, 2, 3)]) == "refuted"


def test_one_game_recorded_twice_is_not_counted_twice() -> None:
    """The same coins with all of their evidence staked again: the mean of both, never the product or the sum."""
    found = verdict.evidence([a_game(a_test(e_value=600.0)), a_game(a_test(e_value=600.0), number=2)])
    assert found.products == pytest.approx([math.log(600), math.log(600)])


def test_a_refutation_is_not_lost_by_later_games() -> None:
    quiet = a_game(a_test(e_value=1e-9), number=2, coins="b")
    assert decided(a_game(REFUTING), quiet) == "refuted"
    assert decided(quiet, a_game(REFUTING, number=1)) == "not refuted"  # played the other way round: never at 1000


def test_an_auditor_who_stops_at_the_first_refutation_is_wrong_rarely() -> None:
    """2,000 auditors of a correct claim, up to ten games with fresh coins, level 0.05: log-normal e-values of mean 1.
    By Ville's inequality at most 5 % refute; the 0.999999 quantile of that binomial is the limit."""
    rng, alpha = np.random.default_rng(1), 0.05
    refuted = 0
    for _ in range(2000):
        logs = np.cumsum(rng.normal(-0.5, 1.0, size=10))
        games = [
            a_game(a_test(e_value=float(np.exp(step))), coins=str(n), number=n + 1)
            for n, step in enumerate(np.diff(logs, prepend=0.0))
        ]
        refuted += verdict.evidence(games).best >= -math.log(alpha)
    assert 20 < refuted <= binom.ppf(1 - 1e-6, 2000, alpha)


def test_small_claims_hold_their_level_with_bounds_included() -> None:
    """eps = 0.1: 95 % bounds lie above it in up to 5 % of correct games, and refute in none of them."""
    small = CLAIM.model_copy(update={"epsilon": 0.1})
    bound = a_test(e_value=None, p_value=None, epsilon_lower=0.5, ceiling=4.0, assumes="none", power=None)
    game = a_game(bound, a_test(p_value=0.03, e_value=e_value(0.03, wanted=1000)), claim=small)
    assert decided(game, claim=small) == "inconclusive"


def test_confidences_of_all_bounds_add_up() -> None:
    spent = sum(1 - verdict.confidence_of(number, 0.95) for number in range(1, 60))
    assert spent == pytest.approx(0.05)


def test_reasons_tell_the_numbers_and_the_control() -> None:
    _, reasons = verdict.decide(
        claim=CLAIM, alpha=ALPHA, games=[a_game(a_test(e_value=5e6, p_value=1e-9))], ledger=[GAP]
    )
    text = " ".join(reasons)
    assert "e = 5e+06" in text and "1e-09" in text and "vocabulary" in text and "these weights" in text
    _, reasons = verdict.decide(claim=CLAIM, alpha=ALPHA, games=[a_game(QUIET)])
    assert "no proof of privacy" in " ".join(reasons) and "95%" in reasons[0] and "liveness" in reasons[0]
    lost = a_test(power=None, power_low=None, control=None)
    _, reasons = verdict.decide(claim=CLAIM, alpha=ALPHA, games=[a_game(lost)])
    assert "no control" in " ".join(reasons)


def test_the_document_is_a_function_of_its_games() -> None:
    run = RunInfo(name="r", method="dp-sgd", config_sha256="0" * 64)
    control = Control(name="liveness", outcome="earned", measured="1 C", allowed="1 C", explanation="-")
    games = [a_game(QUIET, controls=(control,)), a_game(a_test(e_value=1e6), number=2, coins="b", about="procedure")]
    made = [
        verdict.document(run=run, claim=CLAIM, alpha=ALPHA, confidence=0.95, games=games, ledger=[FINE]) for _ in (1, 2)
    ]
    assert made[0] == made[1] and made[0].verdict == "refuted"
    assert [entry.about for entry in made[0].games] == ["weights", "procedure"]
    assert [test.refutes for test in made[0].tests] == [False, True]
    assert made[0].games[1].sha256 == games[1].sha256()
    assert made[0].run is not None and made[0].run.about == "procedure"
    assert any("2 games" in reason for reason in made[0].reasons)


def test_headline_is_the_best_bound_that_assumes_nothing() -> None:
    def bound(low: float, assumes: str, **changes: Any) -> Test:
        return a_test(epsilon_lower=low, ceiling=9.0, assumes=assumes, confidence=0.975, **{"e_value": None, **changes})

    tests = (bound(1.0, "none"), bound(2.0, "none"), bound(7.0, "dp-sgd(q,T)", bound="exact likelihood", decides=False))
    fields: dict[str, Any] = {
        "verdict": "no claim",
        "reasons": (),
        "alpha": ALPHA,
        "validity": Validity(sound=True, checks=()),
    }
    document = ScoresDocument(family_confidence=0.95, tests=tests, **fields)
    best = verdict.headline(document)
    assert best is not None and best.epsilon_lower == 2.0
    within = verdict.within_mechanism(document)
    assert within is not None and within.epsilon_lower == 7.0
    # Three bounds that spend more than the document's error: the best of them is no bound, so the first stands.
    greedy = ScoresDocument(family_confidence=0.95, tests=(*tests, bound(3.0, "none")), **fields)
    assert verdict.headline(greedy) == tests[0]
    assert verdict.exceeds(document, 1.9) and not verdict.exceeds(document, 2.0)
