"""The power of the tests of a score file, earned by the scores of a game with a known leak (a control).

Nothing in a score file shows that its scores could have carried a signal. The scores of a second game of the same kind,
whose leak is known, show it, and how often a test of this size would have refuted the claim there. That holds for the
file only where its own scores tell members from others, look like the control's in scale and repeat each other as
seldom: dead, rounded or other scores would pass every test.

A control is a sample too: twenty scores that happen to lie apart say little about a thousand. So each simulated control
is drawn from what its scores leave possible (Rubin's Bayesian bootstrap, 1981, with one score of the other class added
to each class, by Laplace's rule of succession: after k members that looked like none, the next one may look like one).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpaudit import verdict
from dpaudit.analysis import claim as claims
from dpaudit.analysis.claim import play
from dpaudit.analysis.tables import ScoreTable
from dpaudit.bounds import roc
from dpaudit.bounds.ranks import rank_p
from dpaudit.documents import Claim, Control, ScoreSummary, Test
from dpaudit.errors import UsageError
from dpaudit.evidence import calibrate

RESAMPLED = 80  # controls drawn from what the control's scores leave possible
GAMES = 25  # games drawn from each
LOWER = 3  # resampled controls (4 % of them) that may have less power than the lower end
SIGNAL_LEVEL = 0.01  # one-sided, for "members score higher than chance allows"; a guard outside the error budget
APART = 100.0  # times the other's spread: scores of another unit or origin
MORE_TIES = 0.05  # share of scores that repeat another, beside the control's
LABELS = 4  # different values of a control that are classes beside scores with more (without noise scores do repeat)


def with_power(
    tests: Sequence[Test], table: ScoreTable, control: ScoreTable, claim: Claim, *, alpha: float, seed: int
) -> tuple[list[Test], tuple[Control, ...], str | None]:
    """The tests of `table` with the power that the control shows: how often games of this size, drawn from it, refute.

    Each drawn game has as many records as the real one, fair coins, and scores of the control's members and
    non-members; guesses and level are those of the real test. The power is the share that refutes over all resampled
    controls, its lower end that of the controls that refute least.
    """
    if len({bool(member) for member in control.members}) < 2:
        raise UsageError("--control: needs members and non-members")
    inside, outside = control.scores[control.members], control.scores[~control.members]
    leak = roc.summarise("control", control.scores, control.members)
    if leak.auc_low is None or leak.auc_low <= 0.5:
        interval = "" if leak.auc_low is None else f" ({leak.auc_low:.3f} to {leak.auc_high:.3f})"
        return _without_power(tests, f"the control shows no leak: AUC {leak.auc:.3f}{interval}")
    unlike = _unlike(table, control)
    if unlike is not None:
        return _without_power(tests, unlike)
    profile = claims.null_profile(claim)
    rng = np.random.default_rng([seed, 1])
    found, controls = [], list[Control]()
    for test in tests:
        if not verdict.counts(test) or test.guesses is None:
            found.append(test)
            continue
        critical = claims.critical_errors(
            profile,
            canaries=test.n,
            guesses=test.guesses,
            alpha=calibrate.level(wanted=verdict.wanted(test.share, alpha)),
            separate=test.bound == "order-statistic",
        )
        power, low = _power(test, inside, outside, critical, rng)
        earned = f"a known leak (AUC {leak.auc:.2f}) in {control.scores.size} scores"
        update = {"power": power, "power_low": low, "control": earned}
        found.append(test.model_copy(update=update))
        controls.append(
            Control(
                name="known leak",
                outcome="earned",
                measured=f"{power:.0%} of {RESAMPLED * GAMES} games drawn from the control refute (at least {low:.0%}, "
                f"allowing for its {control.scores.size} scores)",
                allowed=f"at least {verdict.POWER_NEEDED:.0%} to support 'not refuted'",
                explanation=f"The power is against {known_leak(leak)}. That the control is a game of the same kind, "
                "and this the leak to be found, is its owner's statement.",
            )
        )
    return found, tuple(controls), known_leak(leak) if controls else None


def _power(
    test: Test,
    inside: npt.NDArray[np.float64],
    outside: npt.NDArray[np.float64],
    critical: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Share of games like `test`, with scores like those of a control, that refute; and its lower end."""
    guesses = int(test.guesses or 0)
    refuted = np.zeros(RESAMPLED)
    for control in range(RESAMPLED):
        members = np.append(inside, rng.choice(outside))
        others = np.append(outside, rng.choice(inside))
        weights = rng.dirichlet(np.ones(members.size)), rng.dirichlet(np.ones(others.size))
        for _ in range(GAMES):
            coins = rng.random(test.n) < 0.5
            drawn = np.empty(test.n)
            drawn[coins] = rng.choice(members, int(coins.sum()), p=weights[0])
            drawn[~coins] = rng.choice(others, int((~coins).sum()), p=weights[1])
            game = play(drawn, coins, top=guesses - guesses // 2, bottom=guesses // 2, rng=rng)
            refuted[control] += game.guesses - game.correct <= critical
    return float(refuted.sum() / (RESAMPLED * GAMES)), float(np.sort(refuted)[LOWER] / GAMES)


def known_leak(leak: ScoreSummary) -> str:
    """What the scores of a control show, in words."""
    return f"a leak like the control's (AUC {leak.auc:.{4 if leak.auc > 0.99 else 2}f})"


def _unlike(table: ScoreTable, control: ScoreTable) -> str | None:
    """Why a control says nothing about these scores; None where it does."""
    p, area = rank_p(table.scores, table.members)
    if p > SIGNAL_LEVEL:
        return (
            f"these scores do not tell members from others (AUC {area:.3f}, p = {p:.2g}; at most {SIGNAL_LEVEL:g} "
            "needed), so they may be dead"
        )
    values, their_values = (np.unique(part.scores).size for part in (table, control))
    own, theirs = 1 - values / table.scores.size, 1 - their_values / control.scores.size
    if own > theirs + MORE_TIES:
        return f"{own:.0%} of these scores repeat another, {theirs:.0%} of the control's"
    if their_values <= LABELS < values:
        return (
            f"the control's scores have {their_values} different values and these {values}: it is scored in another way"
        )
    (middle, spread), (their_middle, their_spread) = (_place(part.scores) for part in (table, control))
    apart = abs(middle - their_middle) > APART * max(spread, their_spread)
    if apart or not 1 / APART <= spread / their_spread <= APART:
        return (
            f"the scores are of another scale (median {middle:.3g}, half of them within {spread:.3g}) than "
            f"the control's ({their_middle:.3g}, {their_spread:.3g})"
        )
    return None


def _place(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Median and range of the middle half; of all of them where that half is one value."""
    low, middle, high = np.quantile(scores, (0.25, 0.5, 0.75))
    return float(middle), float(high - low) or float(np.ptp(scores)) or float(np.finfo(float).tiny)


def _without_power(tests: Sequence[Test], why: str) -> tuple[list[Test], tuple[Control, ...], None]:
    """No power: what the control shows does not hold for these scores, or it shows nothing."""
    shown = [
        test.model_copy(update={"control": f"not earned: {why}"}) if verdict.counts(test) else test for test in tests
    ]
    control = Control(
        name="known leak",
        outcome="not earned",
        measured=why,
        allowed="a control with a leak, and scores that show one as well and are like the control's in scale and ties",
        explanation="Otherwise nothing shows that a leak would have been seen in these scores.",
    )
    return shown, (control,), None
