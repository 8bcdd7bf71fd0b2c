"""A stated claim against what it is made of: eps against (sigma, q, T), and the claim against the configuration.

A claim is a file that its owner wrote. Its eps is therefore computed again from its own mechanism wherever it is used
for a verdict or shown: a mechanism that costs more than what is claimed for it does not support the claim, whatever the
attacks find. Nor does a mechanism of which no cost can be computed.
"""

import math
from dataclasses import dataclass

from dpaudit import accounting
from dpaudit.config import RunConfig, TrainingConfig
from dpaudit.documents import Claim, LedgerDocument, LedgerRow
from dpaudit.errors import UsageError
from dpaudit.verdict import MISSING_CLAIM

# Accountants round up differently, and grids change between versions; less than this is no mistake.
TOLERANCE = 0.01
MOST_STEPS = 10**8  # beyond, no accountant is asked
COST_ROW, CONFIGURATION_ROW = "claimed eps", "claim and configuration"
ROWS = (COST_ROW, CONFIGURATION_ROW, MISSING_CLAIM)


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
    except (ArithmeticError, ValueError, MemoryError):  # figures that no training has
        return Cost(None, "no accountant here can compute its cost")
    if not all(math.isfinite(value) or value == math.inf for value in costs):
        return Cost(None, "no accountant here can compute its cost")
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


def rows(
    claim: Claim | None,
    config: RunConfig | None = None,
    *,
    ledger: LedgerDocument | None = None,
    named: bool = False,
    own: bool = False,
) -> tuple[LedgerRow, ...]:
    """UNACCOUNTED rows, each of which leaves the claim unsupported: too small an eps or none that can be computed,
    another configuration's claim, a claim that was taken out.

    config, ledger: of the run. named: whether a game names a claim. own: whether it is a run of dpaudit's, whose claim
    always names its mechanism; the claim of a foreign trainer may be an eps alone, and then nothing is said of it.
    """
    own = own or config is not None
    if claim is None:
        missing = named or (config is not None and config.claims)
        return (
            _row(MISSING_CLAIM, "The run states no claim, though its configuration or its games name one."),
        ) * missing
    found, price = [], cost(claim)
    if price.understated:
        figures = (
            f"sigma = {claim.noise_multiplier:g}, "
            f"q = {claim.sample_rate if claim.sample_rate is not None else 1:g}, T = {claim.steps}, "
            f"{claim.sampling}, {claim.relation}; {accounting.accountant_name()}"
        )
        why = f"{'; '.join(price.understated[:4])} ({figures})"
        found.append(_row(COST_ROW, "The claimed mechanism costs more than the eps that is claimed for it.", why))
    if own and price.epsilon is None:
        found.append(_row(COST_ROW, "The claimed eps can't be computed from the claimed mechanism.", price.why))
    differing = (*(differences(claim, config) if config is not None else ()), *_spent(claim, ledger))
    if differing:
        found.append(
            _row(CONFIGURATION_ROW, "The claim is not the one that this configuration makes.", "; ".join(differing))
        )
    return tuple(found)


def _row(path: str, explanation: str, evidence: str = "release/claim.json: missing, or claim: null") -> LedgerRow:
    return LedgerRow(path=path, status="UNACCOUNTED", explanation=explanation, evidence=evidence)


def _spent(claim: Claim, ledger: LedgerDocument | None) -> tuple[str, ...]:
    """Steps of the ledger that are not the claim's."""
    spent = ledger.spent if ledger is not None else None
    if spent is None or claim.steps is None or spent.steps_planned == claim.steps:
        return ()
    return (f"steps: {claim.steps} are claimed, the ledger plans {spent.steps_planned}",)


def differences(claim: Claim, config: RunConfig) -> tuple[str, ...]:
    """Where a claim is not what its configuration says, field by field; what that leaves open is not asked.

    q and T follow from the batch size and the candidates, which the claim states and the size of the data decides.
    """
    if not config.claims:
        return ("the configuration makes no claim",)
    privacy, training = config.privacy, config.training
    places = claim.candidates
    if config.data.public_size is not None:
        places = config.data.public_size + config.canaries.count
    if places is None or places < training.batch_size:
        return (f"candidates: {claim.candidates} are claimed, for batches of {training.batch_size}",)
    rate, steps = _public(training, places)
    expected: dict[str, tuple[object, object]] = {
        "delta": (claim.delta, privacy.delta),
        "relation": (claim.relation, privacy.relation),
        "mechanism": (claim.mechanism, "zeroth-order" if config.method == "dp-zo" else "gaussian"),
        "noise": (claim.noise, config.zeroth_order.noise),
        "max-grad-norm": (claim.max_grad_norm, privacy.max_grad_norm),
        "sampling": (claim.sampling, training.sampling),
        "draws": (_draws(claim), training.draws if training.sampling == "allocation" else None),
        "batch-size": (claim.expected_batch_size, training.batch_size),
        "candidates": (claim.candidates, places),
        "sample-rate": (claim.sample_rate, rate),
        "steps": (claim.steps, steps),
        "token-multiplier": (claim.token_multiplier, config.fusion.multiplier),
    }
    if privacy.noise_multiplier is not None:
        expected["noise-multiplier"] = (claim.noise_multiplier, privacy.noise_multiplier)
    if privacy.epsilon is not None:
        expected["epsilon"] = (claim.epsilon, privacy.epsilon)
    return tuple(
        f"{name}: {stated} is claimed, {own} configured"
        for name, (stated, own) in expected.items()
        if not _same(stated, own)
    )


def _draws(claim: Claim) -> float | None:
    """k of a claim of allocation, as far as it says."""
    return None if claim.epoch_steps is None or claim.sample_rate is None else claim.sample_rate * claim.epoch_steps


def _public(training: TrainingConfig, places: int) -> tuple[float, int]:
    """(q, T), as trainers.sampling.Sampler has them."""
    size, draws = training.batch_size, training.draws
    if training.sampling == "allocation":
        batches = math.ceil(draws * places / size)
        epochs = max(1, math.ceil(round(training.epochs / draws, 9)))
        return draws / batches, training.steps or batches * epochs
    rate = 1.0 / math.ceil(places / size) if training.sampling == "shuffle" else size / places
    return rate, training.steps or max(1, round(training.epochs / rate))


def _same(one: object, two: object) -> bool:
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-9)
    return one == two
