"""The claim that somebody states beside scores: a mechanism, whose eps the accountant computes, or a bare eps."""

from collections.abc import Callable

from dpaudit import accounting, validate
from dpaudit.bounds.pld import check_dp_sgd
from dpaudit.documents import Claim
from dpaudit.errors import UsageError

MOST_EPSILON = 500.0


def stated_claim(
    *,
    epsilon: float | None = None,
    sigma: float | None = None,
    rate: float | None = None,
    steps: int | None = None,
    epoch: int | None = None,
    delta: float,
    named: Callable[[str], str] = str,
) -> Claim | None:
    """(sigma, q, T) as a claim with its eps at `delta`, or eps alone; None if nothing is given.

    epoch: steps of an epoch of random allocation, of which each record is in rate * epoch; None: Poisson batches.
    Neighbours differ in one record that is there or not (add-remove), since that is what a coin decides. `named` says
    what a field is called where it was given: "sigma" in Python, "--claim-sigma" in the shell. Raises UsageError for a
    part of a mechanism, for both a mechanism and an eps, and for a value outside its domain.
    """
    mechanism = {"sigma": sigma, "rate": rate, "steps": steps}
    if epsilon is None and epoch is None and all(value is None for value in mechanism.values()):
        return None
    names = [named(field) for field in mechanism]
    if epsilon is not None:
        if epoch is not None or any(value is not None for value in mechanism.values()):
            raise UsageError(
                f"{named('epsilon')}: given beside {names[0]}, whose eps dpaudit computes; give one of the two"
            )
        eps = validate.real(named("epsilon"), epsilon, low=0.0, high=MOST_EPSILON, open_low=True)
        return Claim(epsilon=eps, delta=validate.delta(delta), relation="add-remove", unit="record")
    for field, value in mechanism.items():
        if value is None:
            raise UsageError(f"{named(field)}: missing; a claim needs {names[0]}, {names[1]} and {names[2]}")
    assert sigma is not None and rate is not None and steps is not None
    s, q, times = check_dp_sgd(sigma, rate, steps)
    scheme: accounting.Scheme = "poisson" if epoch is None else "allocation"
    return Claim(
        epsilon=accounting.epsilon(accounting.DpSgd(s, q, times, sampling=scheme, epoch=epoch), delta),
        delta=delta,
        relation="add-remove",
        unit="record",
        noise_multiplier=s,
        sampling=scheme,
        sample_rate=q,
        epoch_steps=epoch,
        steps=times,
        accountant=accounting.accountant_name(),
    )
