"""A stated claim against what it is made of: eps against (sigma, q, T), and the claim against the configuration.

A claim is a file that its owner wrote. Its eps is therefore computed again from its own mechanism wherever it is used
for a verdict or shown: a mechanism that costs more than what is claimed for it does not support the claim, whatever the
attacks find.
"""

import math
from dataclasses import dataclass

from dpaudit import accounting
from dpaudit.config import RunConfig
from dpaudit.documents import Claim, LedgerRow
from dpaudit.errors import UsageError

# Accountants round up differently, and grids change between versions; less than this is no mistake.
TOLERANCE = 0.01
MOST_STEPS = 10**8  # beyond, no accountant is asked
COST_ROW, CONFIGURATION_ROW = "claimed eps", "claim and configuration"


@dataclass(frozen=True)
class Cost:
    """What a claimed mechanism costs. epsilon: at the claim's own delta, None where there is no number, and then `why`.

    understated: a sentence for each pair (eps, delta) of the claim that its mechanism does not pay for.
    """

    epsilon: float | None
    why: str = ""
    understated: tuple[str, ...] = ()


def cost(claim: Claim) -> Cost:
    """eps of the claimed mechanism by dpaudit's accountant, at the claim's delta and at every other that it states."""
    events = _events(claim)
    if isinstance(events, str):
        return Cost(None, events)
    points = [(claim.delta, claim.epsilon), *((point.delta, point.epsilon) for point in claim.curve)]
    try:
        costs = [accounting.joint_epsilon(events, delta) for delta, _ in points]
    except UsageError as error:
        return Cost(None, str(error))
    wrong = [
        f"eps = {stated:.4g} is claimed at delta = {delta:g}, where the mechanism costs {own:.4g}"
        for (delta, stated), own in zip(points, costs, strict=True)
        if not stated >= own * (1 - TOLERANCE)
    ]
    return Cost(costs[0], "", tuple(wrong))


def _events(claim: Claim) -> list[accounting.DpSgd] | str:
    """What was composed, or why nothing can be."""
    sigma, steps, sampling = claim.noise_multiplier, claim.steps, claim.sampling
    if claim.mechanism == "correlated":
        return "the noise of its steps is correlated: no accountant here composes them"
    rate = 1.0 if sampling == "full" else claim.sample_rate
    if sigma is None or steps is None or rate is None or sampling is None:
        return "the claim names no sigma, q, T or sampling"
    if steps > MOST_STEPS or not math.isfinite(sigma):
        return "sigma is not finite" if steps <= MOST_STEPS else f"more than {MOST_STEPS:,} steps"
    noise = "laplace" if "laplace" in (claim.noise, claim.mechanism) else "gaussian"
    scheme: accounting.Scheme = "poisson" if sampling == "full" else sampling
    try:
        events = [accounting.DpSgd(float(sigma), float(rate), steps, claim.relation, noise, scheme, claim.epoch_steps)]  # type: ignore[arg-type]
        if claim.token_multiplier is not None:
            events.append(accounting.release_event(claim.token_multiplier, claim.relation))
    except UsageError as error:
        return str(error)
    return events


def rows(claim: Claim | None, config: RunConfig | None = None) -> tuple[LedgerRow, ...]:
    """UNACCOUNTED rows, each of which leaves the claim unsupported: too small an eps, another configuration's claim.

    No row where all that can be computed fits; `cost(claim).why` says where nothing can.
    """
    if claim is None:
        return ()
    found = []
    price = cost(claim)
    if price.understated:
        found.append(
            LedgerRow(
                path=COST_ROW,
                status="UNACCOUNTED",
                explanation="The claimed mechanism costs more than the eps that is claimed for it.",
                evidence=f"{'; '.join(price.understated[:4])} (sigma = {claim.noise_multiplier:g}, "
                f"q = {claim.sample_rate if claim.sample_rate is not None else 1:g}, T = {claim.steps}, "
                f"{claim.sampling}, {claim.relation}; {accounting.accountant_name()})",
            )
        )
    differing = differences(claim, config) if config is not None else ()
    if differing:
        found.append(
            LedgerRow(
                path=CONFIGURATION_ROW,
                status="UNACCOUNTED",
                explanation="The claim is not the one that this configuration makes.",
                evidence="; ".join(differing),
            )
        )
    return tuple(found)


def differences(claim: Claim, config: RunConfig) -> tuple[str, ...]:
    """Where a claim is not what its configuration says, field by field; what that leaves open is not asked."""
    privacy, training = config.privacy, config.training
    expected: dict[str, tuple[object, object]] = {
        "delta": (claim.delta, privacy.delta),
        "relation": (claim.relation, privacy.relation),
        "max-grad-norm": (claim.max_grad_norm, privacy.max_grad_norm),
        "noise-multiplier": (claim.noise_multiplier, privacy.noise_multiplier),
        "epsilon": (claim.epsilon, privacy.epsilon),
        "sampling": (claim.sampling, training.sampling),
        "draws": (_draws(claim), training.draws if training.sampling == "allocation" else None),
        "batch-size": (claim.expected_batch_size, training.batch_size),
        "steps": (claim.steps, training.steps),
    }
    if not config.claims:
        return ("the configuration adds no noise and makes no claim",)
    return tuple(
        f"{name}: {stated} is claimed, {own} configured"
        for name, (stated, own) in expected.items()
        if own is not None and not _same(stated, own)
    )


def _draws(claim: Claim) -> float | None:
    """k of a claim of allocation, as far as it says."""
    return None if claim.epoch_steps is None or claim.sample_rate is None else claim.sample_rate * claim.epoch_steps


def _same(one: object, two: object) -> bool:
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-9)
    return one == two
