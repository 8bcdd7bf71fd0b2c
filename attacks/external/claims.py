"""The claim of a foreign trainer, and whether the eps that it states pays for the steps that it takes."""

import math

from dpaudit import accounting
from dpaudit.analysis.claim import claimed_event
from dpaudit.claims import StepClaim
from dpaudit.documents import Claim, LedgerRow
from dpaudit.errors import UsageError, rejected

# Accountants round up differently (an RDP accountant states far more than a PLD); less than this is not a mistake.
TOLERANCE = 0.01
ROW = "training steps"


def epoch_of(step: StepClaim) -> int | None:
    """t of a claim of random allocation, None for any other scheme."""
    return max(1, step.epoch_steps or round(1 / step.sample_rate)) if step.sampling == "allocation" else None


def claimed_delta(step: StepClaim, wanted: float | None) -> float:
    """--delta, else what the trainer says, else 1e-5."""
    return wanted if wanted is not None else step.delta if step.delta is not None else 1e-5


def claimed_steps(step: StepClaim, wanted: int | None) -> int:
    """--steps, else what the trainer says."""
    if wanted is not None:
        return wanted
    if step.steps is None:
        raise UsageError("--steps: missing, and the trainer's claim has no steps; how many steps does a training take?")
    return step.steps


def mechanism_epsilon(claim: Claim) -> float | None:
    """eps of the claimed mechanism by dpaudit's accountant; None where it has no number for it."""
    event = claimed_event(claim)
    return None if event is None else accounting.epsilon(event, claim.delta)


def make_claim(step: StepClaim, *, steps: int, delta: float, stated: float | None) -> Claim:
    """The claim under audit. `stated`: eps by --epsilon or by the trainer itself (None: neither says any).

    Raises UsageError when nobody states an eps, or the eps is infinite: such a claim has nothing to test.
    """
    claim = Claim(
        epsilon=0.0 if stated is None else stated,
        delta=delta,
        relation=step.relation,
        unit=step.unit,
        mechanism=step.mechanism,
        noise="laplace" if step.mechanism == "laplace" else "gaussian",
        noise_multiplier=step.noise_multiplier,
        max_grad_norm=step.max_grad_norm,
        sampling=step.sampling,
        sample_rate=step.sample_rate,
        epoch_steps=epoch_of(step),
        steps=steps,
        expected_batch_size=step.expected_batch_size,
        accountant="stated by the trainer" if stated is not None else accounting.accountant_name(),
    )
    if stated is None:
        own = mechanism_epsilon(claim)
        if own is None:
            raise UsageError(
                f"--epsilon: missing; the trainer offers no epsilon(delta), and dpaudit has no number for "
                f"{step.sampling} sampling with {step.mechanism} noise"
            )
        claim = claim.model_copy(update={"epsilon": own})
    if not math.isfinite(claim.epsilon):
        raise rejected("claim.epsilon", claim.epsilon, "a finite eps (an infinite one claims nothing to test)")
    return claim


def ledger_rows(claim: Claim) -> tuple[LedgerRow, ...]:
    """One row: does the stated eps pay for (sigma, q, T)? None where dpaudit has no accountant for the mechanism."""
    own = mechanism_epsilon(claim)
    if own is None:
        return ()
    enough = claim.epsilon >= own * (1 - TOLERANCE)
    figures = (
        f"stated eps = {claim.epsilon:.4g}; sigma = {claim.noise_multiplier:g}, q = {claim.sample_rate or 1:g}, T = "
        f"{claim.steps} ({claim.sampling}, {claim.relation}) cost eps = {own:.4g} at delta = {claim.delta:g} by "
        f"{accounting.accountant_name()}"
    )
    return (
        LedgerRow(
            path=ROW,
            stage="gradients",
            status="accounted" if enough else "UNACCOUNTED",
            explanation="Clipped gradients with noise, by what the trainer says of itself; the audits test whether it "
            "does so. The proof is for real-valued noise: finite precision and timing are not covered."
            if enough
            else "The claimed mechanism costs more than the eps that is claimed for it.",
            evidence=figures,
        ),
    )
