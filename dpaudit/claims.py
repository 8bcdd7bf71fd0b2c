"""Claims and verdicts.

An audit can refute a claim; it can never prove privacy. Hence the verdict that a correct run hopes for is
"not refuted", and only an audit that would have found a stated wrong claim may give it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dpaudit.accounting import DpSgd
from dpaudit.documents import Check, Claim, LedgerRow, Relation, Test, Validity, Verdict
from dpaudit.errors import rejected

Mechanism = Literal["gaussian", "laplace", "zeroth-order", "correlated"]
Sampling = Literal["poisson", "fixed", "shuffle", "full"]

POWER_NEEDED = 0.8

# A bound may refute when it assumes nothing, or nothing beyond what the claim itself states.
_DECISIVE = ("none", "claimed-mechanism", "dp-sgd(q,T)")


@dataclass(frozen=True)
class StepClaim:
    """What a trainer says about one of its DP steps; the `claim` of the trainer protocol.

    max_grad_norm: C. noise_multiplier: sigma / C, whatever the relation. sample_rate: q. expected_batch_size: the
    public number that the noisy sum is divided by. unit: in words, e.g. "image (with all its questions)".
    Raises UsageError for a field that can't be true, because it comes from foreign code.
    """

    mechanism: Mechanism
    max_grad_norm: float
    noise_multiplier: float
    sampling: Sampling
    sample_rate: float
    expected_batch_size: float
    relation: Relation
    unit: str
    steps: int | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        for field, accepted in (("mechanism", Mechanism), ("sampling", Sampling), ("relation", Relation)):
            if getattr(self, field) not in get_args(accepted):
                raise rejected(f"claim.{field}", getattr(self, field), get_args(accepted))
        _number("claim.max_grad_norm", self.max_grad_norm, above=0.0)
        _number("claim.noise_multiplier", self.noise_multiplier, at_least=0.0)
        _number("claim.sample_rate", self.sample_rate, above=0.0, at_most=1.0)
        _number("claim.expected_batch_size", self.expected_batch_size, above=0.0)
        if not isinstance(self.unit, str) or not self.unit:
            raise rejected("claim.unit", self.unit, "the privacy unit in words")
        if self.steps is not None and (isinstance(self.steps, bool) or not _whole(self.steps)):
            raise rejected("claim.steps", self.steps, "an integer >= 1, or None")
        if self.delta is not None:
            _number("claim.delta", self.delta, above=0.0, below=1.0)

    def event(self, steps: int | None = None) -> DpSgd | None:
        """The accountant's event over `steps` (default: all); None where Poisson accounting does not apply.

        An eps that was computed for Poisson batches must not be quoted for fixed-size or shuffled ones (Chua et al.
        2024; Annamalai et al. 2024). Theirs needs more than this claim says: that absent units leave their place empty.
        """
        count = steps if steps is not None else self.steps
        if count is None or self.mechanism != "gaussian" or self.sampling not in ("poisson", "full"):
            return None
        rate = 1.0 if self.sampling == "full" else self.sample_rate
        return DpSgd(self.noise_multiplier, rate, count, self.relation)


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _number(
    field: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and above < value and at_least <= value <= at_most and value < below):  # type: ignore[operator]
        limits = [f"above {above:g}"] * (above > -math.inf) + [f"at least {at_least:g}"] * (at_least > -math.inf)
        limits += [f"at most {at_most:g}"] * (at_most < math.inf) + [f"below {below:g}"] * (below < math.inf)
        raise rejected(field, value, "a finite number " + ", ".join(limits))


def decide(
    *,
    claim: Claim | None,
    alpha: float,
    family_confidence: float,
    validity: Validity,
    tests: Sequence[Test],
    ledger: Sequence[LedgerRow] = (),
    checks: Sequence[Check] = (),
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and its reasons, in plain sentences.

    Precedence: invalid > refuted > unsupported > inconclusive > not refuted; without a claim "no claim" (or invalid).
    Only tests with `decides` and without `estimate` count. They share two error budgets: the p-values of the claim
    share `alpha` (Bonferroni), the bounds share 1 - `family_confidence` through their own confidences. A correct
    claim is thus refuted with probability at most alpha + 1 - family_confidence.

    ledger: rows of the *training* (what a release of tokens would mean belongs into FusionAudit.release);
    UNACCOUNTED ones make the claim unsupported. checks: of the step contract; the failed ones count.
    """
    if not validity.sound:
        failed = [f"{check.name}: {check.explanation}" for check in validity.checks if check.status == "fail"]
        return "invalid", ("The game itself is unsound, so its numbers mean nothing.", *failed)
    if claim is None:
        return "no claim", ("The run makes no privacy claim, so there is none to refute.",)
    counted = [test for test in tests if test.decides and not test.estimate]
    refutations = _refutations(claim, alpha, family_confidence, counted)
    gaps = _gaps(ledger, checks)
    if refutations:
        return "refuted", (*refutations, *gaps)
    if gaps:
        return "unsupported", ("The proof behind the claim does not apply to what the code does.", *gaps)
    powered = [test for test in counted if _had_power(claim, test)]
    if powered:
        names = ", ".join(f"{test.name} (power {test.power:.0%})" for test in powered)
        return "not refuted", (
            f"No test refuted the claim, and one that would have found the stated alternative looked: {names}.",
            "This is no proof of privacy.",
        )
    return "inconclusive", _why_inconclusive(claim, counted)


def claimed_epsilon(claim: Claim, delta: float) -> float | None:
    """The eps that the claim states at `delta`; None when it says nothing there.

    (eps, delta) implies (eps, delta') for delta' >= delta, so the smallest eps over stated deltas <= `delta` holds.
    """
    stated = [(claim.delta, claim.epsilon)] + [(point.delta, point.epsilon) for point in claim.curve]
    holding = [epsilon for at, epsilon in stated if at <= delta * (1 + 1e-9)]
    return min(holding) if holding else None


def _refutations(claim: Claim, alpha: float, family_confidence: float, tests: Sequence[Test]) -> tuple[str, ...]:
    reasons = []
    with_p = [test for test in tests if test.p_value is not None]
    for test in with_p:
        level = alpha / len(with_p)
        assert test.p_value is not None
        if test.p_value <= level:
            what = test.statement or "so extreme a result under the claim"
            reasons.append(f"{test.name}: p = {test.p_value:.2g} <= {level:.2g} ({what}).")
    bounds = [test for test in tests if test.epsilon_lower is not None and test.assumes in _DECISIVE]
    budget = 1 - family_confidence + 1e-12
    # Confidences that add up to the family's may be split unevenly; otherwise each must afford an equal share.
    affordable = sum(1 - test.confidence for test in bounds) <= budget
    for test in bounds:
        claimed = claimed_epsilon(claim, test.delta)
        assert test.epsilon_lower is not None
        if claimed is None or not test.epsilon_lower > claimed:
            continue
        if affordable or (1 - test.confidence) * len(bounds) <= budget:
            reasons.append(
                f"{test.name}: eps is at least {test.epsilon_lower:.2f} at delta = {test.delta:g} with confidence "
                f"{test.confidence:.4g}, more than the claimed {claimed:.2f}."
            )
    return tuple(reasons)


def _gaps(ledger: Sequence[LedgerRow], checks: Sequence[Check]) -> tuple[str, ...]:
    rows = [f"UNACCOUNTED: {row.path}: {row.explanation}" for row in ledger if row.status == "UNACCOUNTED"]
    failed = [
        f"Contract check failed: {check.name}: measured {check.measured}, allowed {check.allowed}."
        for check in checks
        if check.status == "fail" and check.waived is None
    ]
    return (*rows, *failed)


def _can_refute(claim: Claim, test: Test) -> bool:
    """Whether any outcome of this test could have refuted the claim."""
    if test.p_value is not None:
        return True
    claimed = claimed_epsilon(claim, test.delta)
    return claimed is not None and test.ceiling is not None and test.assumes in _DECISIVE and test.ceiling > claimed


def _had_power(claim: Claim, test: Test) -> bool:
    return test.power is not None and test.power >= POWER_NEEDED and _can_refute(claim, test)


def _why_inconclusive(claim: Claim, tests: Sequence[Test]) -> tuple[str, ...]:
    if not tests:
        return ("No test that may decide was run.",)
    found: dict[str, list[str]] = {}
    for test in tests:
        if not _can_refute(claim, test):
            ceiling = "unknown" if test.ceiling is None else f"{test.ceiling:.2f}"
            reason = (
                f"the largest eps that this game could have shown (ceiling {ceiling}) does not exceed "
                f"the claimed {claim.epsilon:.2f}: more canaries, or a claim test, are needed."
            )
        elif test.power is None:
            reason = "its power against the alternative is not known."
        else:
            reason = f"power {test.power:.0%} against the alternative, {POWER_NEEDED:.0%} needed."
        found.setdefault(reason, []).append(test.name)
    reasons = (f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in found.items())
    return ("Nothing was refuted, but this audit could have missed the wrong claim it had to find.", *reasons)
