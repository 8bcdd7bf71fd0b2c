"""The whole analysis of a score file from any system: validity first, then what the scores show, then what they prove.

Which bounds apply depends on how the scores were obtained, which a file can't show: fair independent coins in one run
open the one-run bounds, independent runs open Clopper-Pearson; without either statement nothing is bounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dpaudit import blind, verdict
from dpaudit.analysis import claim as claims
from dpaudit.analysis.claim import ALTERNATIVE, Alternative, Game, claim_test, play
from dpaudit.analysis.control import with_power
from dpaudit.analysis.plan import bound_guesses, plan_test
from dpaudit.analysis.tables import ScoreTable
from dpaudit.bounds import bayes, mahloujifar, order_statistic, roc, selection, steinke
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.bounds.ranks import rank_p
from dpaudit.documents import Assumes, Check, Claim, Control, GameDocument, ScoresDocument, Test, Validity
from dpaudit.errors import UsageError
from dpaudit.evidence import calibrate

Coins = Literal["independent", "half", "unknown"]
SIGN_LEVEL = 0.001  # one-sided, for "members score lower than chance allows"; a guard outside the error budget
NOT_OF_RUNS = "the control speaks of the one-run test and is not used for independent runs"
COIN_LEVEL = 1e-6  # two-sided, for "so many heads from fair coins": a broken coin misses it by far


@dataclass(frozen=True)
class Options:
    """How the scores were obtained, and what is asked.

    coins: how membership was drawn. independent_runs: every row is a training of its own. separate: canaries act on
    separate directions of the noise. seed: for ties.
    """

    delta: float
    confidence: float = 0.95
    alpha: float = 0.001
    coins: Coins = "unknown"
    independent_runs: bool = False
    separate: bool = False
    claim: Claim | None = None
    alternative: Alternative = ALTERNATIVE
    seed: int = 0
    name: str = "scores"


def analyse(
    table: ScoreTable,
    options: Options,
    *,
    features: npt.NDArray[np.float64] | None = None,
    control: ScoreTable | None = None,
) -> ScoresDocument:
    """Everything that this file allows. Tests never choose guesses or thresholds by looking without paying for it.

    control: scores of the same kind from a game with a known leak. Without it no power is stated, because nothing shows
    that these scores carry any signal. Its power is that of the one-run tests; UsageError where only tests of
    independent runs are made.
    """
    if control is not None and options.independent_runs and options.coins != "independent":
        raise UsageError(control_without_coins("--control", "--independent-runs", "--coins independent"))
    rng = np.random.default_rng(options.seed)
    checks = validity_checks(table, options, features, rng)
    validity = Validity(sound=all(check.status != "fail" for check in checks), checks=tuple(checks))
    tests: list[Test] = []
    if validity.sound and options.coins == "independent":
        tests += one_run_tests(table, options, rng)
    if validity.sound and options.independent_runs:
        tests += independent_run_tests(table, options)
    controls: tuple[Control, ...] = ()
    alternative: str | None = None
    if control is not None and options.claim is not None:
        tests, controls, alternative = with_power(
            tests, table, control, options.claim, alpha=options.alpha, seed=options.seed
        )
        if options.independent_runs:
            tests = [
                test.model_copy(update={"control": f"{test.control}; {NOT_OF_RUNS}"}) if verdict.counts(test) else test
                for test in tests
            ]
    game = GameDocument(
        game="scores",
        alternative=alternative,
        number=1,
        previous_sha256=None,
        about="weights",
        claim=options.claim,
        coins_sha256=None,
        alpha=options.alpha,
        tests=tuple(tests),
        kept=0.0,
        validity=validity,
    )
    reasons: tuple[str, ...]
    found, reasons = verdict.decide(claim=options.claim, alpha=options.alpha, games=[game])
    return ScoresDocument(
        verdict=found,
        reasons=reasons,
        claim=options.claim,
        alternative=alternative,
        alpha=options.alpha,
        family_confidence=options.confidence,
        tests=verdict.marked(tests, options.alpha),
        validity=validity,
        controls=controls,
        # An unsound game may print no number about the model.
        scores=(roc.summarise(options.name, table.scores, table.members),) if validity.sound else (),
    )


def control_without_coins(control: str, runs: str, coins: str) -> str:
    """Why a control can't be used, with the names of the options as they were typed."""
    return (
        f"{control}: can't be used with {runs} without {coins}: the power that a control earns is that of the one-run "
        "tests, which need such coins; tests of independent runs have none"
    )


def validity_checks(
    table: ScoreTable,
    options: Options,
    features: npt.NDArray[np.float64] | None,
    rng: np.random.Generator,
) -> list[Check]:
    """Ids, coins, ties, sample size, blind baseline, and which bounds this game opens."""
    n, n_in = table.members.size, int(table.members.sum())
    ids = Check(
        name="ids",
        status="pass",
        measured=f"{n} rows, {n} ids",
        allowed="one row per id",
        explanation="Every record is counted once.",
    )
    checks = [ids, _coins(n, n_in, options), _ties(table, options), _sample_size(n - n_in)]
    if 0 < n_in < n:
        checks.append(sign_check(table.scores, table.members))
    checks.append(_blind(table, features, rng))
    if options.delta == 0 and (options.coins == "independent" or options.independent_runs):
        why = "No Gaussian mechanism has a finite eps at delta = 0, so bounds within that family need a larger delta."
        checks.append(_not_applicable("Gaussian bounds", "delta = 0", "--delta above 0", why))
    if options.coins != "independent":
        why = {
            "unknown": "A file can't show how its coins were drawn; if each was an independent fair toss before "
            "training, --coins independent opens the one-run bounds.",
            "half": "With exactly half of the records in, coins depend on each other and no one-run theorem applies.",
        }[options.coins]
        checks.append(_not_applicable("one-run bounds", f"coins {options.coins}", "coins independent", why))
    if not options.independent_runs:
        checks.append(
            _not_applicable(
                "bounds for independent runs",
                "not stated",
                "--independent-runs",
                "Rows of one training are not independent runs; if every row is a training of its own, "
                "--independent-runs enables Clopper-Pearson.",
            )
        )
    return checks


def _not_applicable(name: str, measured: str, allowed: str, why: str) -> Check:
    return Check(name=name, status="not applicable", measured=measured, allowed=allowed, explanation=why)


def _coins(n: int, n_in: int, options: Options) -> Check:
    measured = f"{n_in} of {n} in"
    if options.coins == "half":
        return Check(
            name="coins",
            status="pass" if abs(2 * n_in - n) <= 1 else "fail",
            measured=measured,
            allowed="exactly half (+- 1 for an odd number)",
            explanation="Stated as an exactly-half split.",
        )
    if options.coins == "unknown":
        why = "How the coins were drawn is not stated, so their number is not judged."
        return _not_applicable("coins", measured, "stated by --coins", why)
    p = heads_p_value(n_in, n)
    return Check(
        name="coins",
        status="fail" if p < COIN_LEVEL else "pass",
        measured=f"{measured} (p = {p:.2g})",
        allowed=f"p >= {COIN_LEVEL:g} for fair independent coins",
        explanation="So many heads must be plausible for fair coins.",
    )


def heads_p_value(heads: int, count: int) -> float:
    """Two-sided p-value of so many heads of fair coins.

    Normal approximation with continuity correction: at COIN_LEVEL and 20 coins or more it only decides gross cases.
    """
    far = max(0.0, abs(heads - count / 2) - 0.5) / (0.5 * np.sqrt(count))
    return 2 * float(ndtr(-far))


def _ties(table: ScoreTable, options: Options) -> Check:
    tied = table.scores.size - np.unique(table.scores).size
    return Check(
        name="ties",
        status="pass",
        measured=f"{tied} of {table.scores.size} scores repeat another ({tied / table.scores.size:.1%})",
        allowed="any",
        explanation=f"Ties are broken at random (seed {options.seed}), and thresholds never split them.",
    )


def sign_check(scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> Check:
    """Whether members score lower than non-members beyond chance: then the sign is turned, and the game is invalid.

    Mann-Whitney; exact coins make labels exchangeable given the scores.
    """
    p, below = rank_p(-scores, members)
    turned = p < SIGN_LEVEL
    return Check(
        name="sign of the scores",
        status="fail" if turned else "pass",
        measured=f"AUC {1 - below:.3f} (p = {p:.2g} for so low a value)",
        allowed=f"p >= {SIGN_LEVEL:g} one-sided",
        explanation="Members score lower than non-members: is the sign turned? Higher must mean 'was in training'."
        if turned
        else "Members do not score lower than non-members.",
    )


def _sample_size(n_out: int) -> Check:
    short = [f"{fpr:g}" for fpr in roc.FPRS if n_out * fpr < roc.LEAST_FALSE_POSITIVES]
    return Check(
        name="sample size",
        status="pass",
        measured=f"{n_out} non-members" + (f"; FPR {', '.join(short)} not resolvable" if short else ""),
        allowed=f"{roc.LEAST_FALSE_POSITIVES} expected false positives for a TPR at that FPR",
        explanation="A rate that too few records could show is reported as not resolvable.",
    )


def _blind(table: ScoreTable, features: npt.NDArray[np.float64] | None, rng: np.random.Generator) -> Check:
    allowed = f"p > {blind.LEVEL:g} one-sided for better than chance"
    if features is None:
        why = "Not checkable without features of the records (--features FILE): members may differ from non-members."
        return _not_applicable("blind baseline", "no features", allowed, why)
    return blind.baseline(features, table.members, rng=rng).check()


def one_run_tests(table: ScoreTable, options: Options, rng: np.random.Generator) -> list[Test]:
    """Bounds from fair coins, guesses planned from the number of records; the claim test if there is a claim."""
    n = table.scores.size
    delta, confidence = options.delta, options.confidence
    # Independent runs are the extreme of separate canaries.
    separate = options.separate or options.independent_runs
    tests = []
    rows: tuple[tuple[str, Assumes], ...] = (
        ("steinke", "none"),
        ("mahloujifar", "gaussian"),
        ("order-statistic", "gaussian"),
    )
    for method, assumes in rows:
        if assumes == "gaussian" and delta == 0:  # no Gaussian mechanism has a finite eps there
            continue
        guesses = bound_guesses(method, canaries=n, delta=delta, confidence=confidence)
        game, words = _play(table, guesses, options, rng)
        lower, top = (_one_run_bound(method, g, delta, confidence) for g in (game, game.perfect()))
        tests.append(
            Test(
                name=f"{options.name}: one run",
                statistic="score",
                bound=method,
                assumes=assumes,
                selection=words,
                confidence=confidence,
                delta=delta,
                n=n,
                guesses=guesses,
                correct=game.correct,
                epsilon_lower=lower,
                ceiling=top,
                statement=None
                if separate or method != "order-statistic"
                else "exact for canaries on separate directions of the noise, no theorem for canaries that interfere",
                decides=method == "steinke",
            )
        )
    if options.claim is not None:
        tests += _claim_tests(table, options, options.claim, separate, rng)
    return tests


def _play(table: ScoreTable, guesses: int, options: Options, rng: np.random.Generator) -> tuple[Game, str]:
    top, bottom = guesses - guesses // 2, guesses // 2
    game = play(table.scores, table.members, top=top, bottom=bottom, rng=rng)
    return game, f"fixed by the number of records: {top} top, {bottom} bottom (ties: seed {options.seed})"


def _one_run_bound(method: str, game: Game, delta: float, confidence: float) -> float:
    m, r, v = game.canaries, game.guesses, game.correct
    if method == "steinke":
        return steinke.epsilon_lower(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence)
    if method == "mahloujifar":
        return mahloujifar.epsilon_lower(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence)
    return order_statistic.epsilon_lower(canaries=m, guesses=r, errors=r - v, delta=delta, confidence=confidence)


def _claim_tests(
    table: ScoreTable, options: Options, claim: Claim, separate: bool, rng: np.random.Generator
) -> list[Test]:
    """The theory that fits these canaries, with a number of guesses planned from claim and alternative."""
    n = table.scores.size
    if claims.claimed_event(claim) is None:
        guesses = bound_guesses("steinke", canaries=n, delta=claim.delta, confidence=options.confidence)
        top, bottom = guesses - guesses // 2, guesses // 2
    else:
        words: dict[str, Any] = {"alternative": options.alternative, "separate": separate}
        row = plan_test(claim, canaries=n, alpha=options.alpha, share=1.0, **words)
        top, bottom = row.top, row.bottom
    found = claim_test(
        table.scores,
        table.members,
        claim=claim,
        top=top,
        bottom=bottom,
        rng=rng,
        name=f"{options.name}: claim",
        alpha=options.alpha,
        confidence=options.confidence,
        separate=separate,
    )
    selection = f"fixed by plan: {top} top, {bottom} bottom (ties: seed {options.seed})"
    return [test.model_copy(update={"selection": selection}) for test in found]


def independent_run_tests(table: ScoreTable, options: Options) -> list[Test]:
    """Bounds for rows that are trainings of their own: all thresholds at once through the exact band."""
    inside, outside = table.scores[table.members], table.scores[~table.members]
    delta, confidence = options.delta, options.confidence
    band = selection.OrderStatisticBand()
    far = float(np.ptp(table.scores)) + 1.0
    rows: Sequence[tuple[str, Assumes, selection.RateBound]] = (
        ("clopper-pearson", "none", selection.epsilon_of),
        ("gdp", "gaussian", selection.gaussian_epsilon_of),
    )
    tests = []
    for method, assumes, bound in rows:
        if assumes == "gaussian" and delta == 0:
            continue
        found, top = (
            selection.runs_lower(inside + shift, outside, bound, rule=band, delta=delta, confidence=confidence)
            for shift in (0.0, far)
        )
        tests.append(
            _runs_test(
                method, assumes, options, found.selection, table.scores.size, (found.epsilon_lower, top.epsilon_lower)
            )
        )
    if options.claim is not None and options.coins != "independent":
        lower = partial(
            selection.runs_lower, inside, outside, selection.epsilon_of, rule=band, delta=options.claim.delta
        )
        tests[0] = _with_p_value(tests[0], lambda c: lower(confidence=c).epsilon_lower, options.claim, options.alpha)
    # Threshold from the pooled median: fixed by the scores without their coins.
    middle = float(np.median(table.scores))
    tp, fp = int((inside >= middle).sum()), int((outside >= middle).sum())
    counts = Counts(tp, inside.size - tp, fp, outside.size - fp)
    pair = (
        bayes.epsilon_lower(counts, delta=delta, confidence=confidence),
        bayes.ceiling(counts, delta=delta, confidence=confidence),
    )
    tests.append(
        _runs_test("bayes", "prior", options, f"threshold {middle:g}, the pooled median", table.scores.size, pair)
    )
    return tests


def _with_p_value(test: Test, lower: Callable[[float], float], claim: Claim, alpha: float) -> Test:
    """The bound's own p-value of the claim: the smallest error probability at which it would lie above the claimed eps.

    Valid because a bound of confidence 1 - p exceeds the true eps with probability at most p, for every p.
    """
    low, high = 1e-12, 1.0  # refuting needs at least `high`, or is not reached at `low`
    if lower(1 - 1e-12) > claim.epsilon:
        high = 1e-12
    else:
        while high / low > 1.05:
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if middle < 1 and lower(1 - middle) > claim.epsilon else (middle, high)
    text = f"p-value of 'the training is ({claim.epsilon:g}, {claim.delta:g})-DP', by inversion of the bound"
    e = calibrate.e_value(high, wanted=verdict.wanted(1.0, alpha))
    return test.model_copy(update={"p_value": high, "e_value": e, "statement": text})


def _runs_test(
    method: str, assumes: Assumes, options: Options, words: str, n: int, bounds: tuple[float, float]
) -> Test:
    return Test(
        name=f"{options.name}: independent runs",
        statistic="score",
        bound=method,
        assumes=assumes,
        selection=words,
        confidence=options.confidence,
        delta=options.delta,
        n=n,
        guesses=None,
        epsilon_lower=bounds[0],
        ceiling=bounds[1],
        estimate=method == "bayes",
        # One test decides: with fair coins that is the one-run bound, which needs no independence.
        decides=method == "clopper-pearson" and options.coins != "independent",
    )


def advantage(table: ScoreTable) -> float:
    """max(TPR - FPR): descriptive, its threshold is chosen on the same records."""
    return roc.advantage(*roc.curve(table.scores, table.members))
