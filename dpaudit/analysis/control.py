"""The power of the tests of a score file, earned by the scores of a game with a known leak (a control).

Nothing in a score file shows that its scores could have carried a signal. The scores of a second game of the same kind,
whose leak is known, show it, and how often a test of this size would have refuted the claim there.
"""

from collections.abc import Sequence

import numpy as np

from dpaudit import verdict
from dpaudit.analysis import claim as claims
from dpaudit.analysis.claim import play
from dpaudit.analysis.tables import ScoreTable
from dpaudit.bounds import roc
from dpaudit.documents import Claim, Control, ScoreSummary, Test
from dpaudit.errors import UsageError
from dpaudit.evidence import calibrate

CONTROL_GAMES = 400
COMPLETE = 0.995  # lower limit of the AUC from which on a control is a game without any privacy


def with_power(
    tests: Sequence[Test], control: ScoreTable, claim: Claim, *, alpha: float, seed: int
) -> tuple[list[Test], tuple[Control, ...], str | None]:
    """The tests with the power that the control shows: how often games of this size, drawn from its scores, refute.

    Each drawn game has as many records as the real one, fair coins, and scores of the control's members and non-members
    (with replacement); guesses and level are those of the real test. The share that refutes has an exact interval.
    """
    if len({bool(member) for member in control.members}) < 2:
        raise UsageError("--control: needs members and non-members")
    inside, outside = control.scores[control.members], control.scores[~control.members]
    leak = roc.summarise("control", control.scores, control.members)
    if leak.auc_low is None or leak.auc_low <= 0.5:
        return _without_power(tests, leak)
    profile = claims.null_profile(claim)
    rng = np.random.default_rng([seed, 1])
    found, controls = [], list[Control]()
    for test in tests:
        if not verdict.counts(test) or test.guesses is None:
            found.append(test)
            continue
        top, bottom = test.guesses - test.guesses // 2, test.guesses // 2
        critical = claims.critical_errors(
            profile,
            canaries=test.n,
            guesses=test.guesses,
            alpha=calibrate.level(wanted=verdict.wanted(test.share, alpha)),
            separate=test.bound == "order-statistic",
        )
        refuted = 0
        for _ in range(CONTROL_GAMES):
            coins = rng.random(test.n) < 0.5
            drawn = np.where(coins, rng.choice(inside, test.n), rng.choice(outside, test.n))
            game = play(drawn, coins, top=top, bottom=bottom, rng=rng)
            refuted += game.guesses - game.correct <= critical
        low, high = roc.clopper_pearson_interval(refuted, CONTROL_GAMES, 0.99)
        earned = f"a known leak (AUC {leak.auc:.2f}) in {control.scores.size} scores"
        update = {"power": refuted / CONTROL_GAMES, "power_low": low, "control": earned}
        found.append(test.model_copy(update=update))
        controls.append(
            Control(
                name="known leak",
                outcome="earned",
                measured=f"{refuted} of {CONTROL_GAMES} games drawn from the control refute ({low:.0%} to {high:.0%})",
                allowed=f"at least {verdict.POWER_NEEDED:.0%} to support 'not refuted'",
                explanation=f"The power is against {known_leak(leak)}. That this is the leak to be found is "
                "its owner's statement.",
            )
        )
    return found, tuple(controls), known_leak(leak) if controls else None


def known_leak(leak: ScoreSummary) -> str:
    """What the scores of a control show, in words."""
    if leak.auc_low is not None and leak.auc_low > COMPLETE:
        return f"a game without any privacy, as the control is (AUC {leak.auc:.4f})"
    return f"a leak like the control's (AUC {leak.auc:.2f})"


def _without_power(tests: Sequence[Test], leak: ScoreSummary) -> tuple[list[Test], tuple[Control, ...], None]:
    """A control whose scores do not tell members from others shows nothing."""
    interval = "" if leak.auc_low is None else f" ({leak.auc_low:.3f} to {leak.auc_high:.3f})"
    measured = f"AUC {leak.auc:.3f}{interval}"
    why = f"not earned: the control shows no leak: {measured}"
    shown = [test.model_copy(update={"control": why}) if verdict.counts(test) else test for test in tests]
    control = Control(
        name="known leak",
        outcome="not earned",
        measured=measured,
        allowed="an AUC whose interval lies above 1/2",
        explanation="A control must have a leak that its scores show; otherwise it can't show that one would be seen.",
    )
    return shown, (control,), None
