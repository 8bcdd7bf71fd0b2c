"""Privacy losses of many steps: a convolution that is exact in the tail, with its rounding bounded.

The loss of T steps is the sum of T independent losses, so its distribution p_T is a convolution power, computed by FFT.
A plain FFT knows every probability to about 1e-16 *absolutely*, which drowns a delta of 1e-12 in noise. Here the
distribution of one step is tilted first: r(l) = p(l) e^(theta l) / M, with theta chosen so that the tilted sum lies
about the eps in question, and

    p_T(l) = M^T e^(-theta l) r_T(l)

is exact for every theta. The rounding of the FFT is now relative to the probabilities near eps, whatever their size
(Wilson and Keich 2016 for p-values; Alghamdi et al. 2023, arXiv 2208.09595, tilt for delta(eps)).

Everything that is not exact errs upwards:

- the lattice of one step leaks at least as much as the step (dpaudit.accounting.steps);
- P(loss > top of the window) is bounded by Chernoff and counts as an infinite loss; what wraps round from below the
  window is added to losses that are larger;
- rounding: with z the computed transform and e a bound on its error (Higham 2002, theorem 24.2, with a constant for
  mixed radices), |z^T - true| <= T e (|z| + e)^(T-1), so no probability is wrong by more than the mean of that over the
  frequencies plus the inverse's own rounding. That much is added to each of them (`Composed.allowance`). Losses are
  raised by what one step's may be too small, times T. Where hardly any step has a loss that counts, what one of them
  does is taken from the lattice itself, and the transform gives what is of second order (`_rare`).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft

from dpaudit.accounting.moments import Parts
from dpaudit.accounting.pairs import UNIT
from dpaudit.accounting.steps import Lattice

Floats = npt.NDArray[np.float64]

# Losses of at most so many grid steps are transformed term by term, in so many terms at most.
_BULK, _TERMS = 2_000, 4_000_000
_SMALL = 0.25  # sum of T |z - 1| up to which losses that count are rare
_FFT = (
    12.0  # units of roundoff per halving in an FFT; Higham's constant for radix 2 is 7, mixed radices differ a little
)


@dataclass(frozen=True)
class Composed:
    """The sum of losses from `first` * grid on: tilted probabilities (n,).

    Rounding made each of them at most `allowance`, and all of them together at most `together`, too small.
    P(l) = exp(log_scale - theta l) r(l), all of it wrong by at most a factor exp(`relative`). `infinite`: P(loss = inf)
    with everything above the window. `slack`: by how much all losses may be too small.
    """

    grid: float
    first: int
    tilted: Floats
    theta: float
    log_scale: float
    allowance: float
    together: float
    relative: float
    infinite: float
    slack: float

    @property
    def losses(self) -> Floats:
        return np.asarray((self.first + np.arange(self.tilted.size)) * self.grid, dtype=np.float64)


def compose(
    parts: Parts, grid: float, theta: float, window: tuple[float, float], beyond: float, *, careful: bool = False
) -> Composed:
    """All parts convolved on a window of losses (low, high); `beyond` bounds P(sum > high).

    careful: with a smaller allowance for rounding where most losses are small, for a tenth of a second.
    """
    low, first = window[0], math.floor(window[0] / grid)
    size = next_fast_len(max(16, math.ceil((window[1] - low) / grid) + 2), real=True)
    logarithm, log_scale = np.zeros(size // 2 + 1, dtype=np.complex128), 0.0
    factors: list[_Factor] = []
    once = np.zeros(size)  # what the sum is where no more than one loss counts, minus a certain 0
    relative, infinite, slack = 1e-9, 0.0, 0.0  # far more than the roundoff of any single number
    for part in parts:
        single = part.lattice(grid, theta)
        tilted, log_norm, exponent = _tilted(single, theta)
        change, norm, terms = _transform(tilted, single.first, size, part.times if careful else 0)
        log_z = _log1p(change)
        logarithm += part.times * log_z
        modulus = np.abs(1.0 + change)
        terms = terms + 4.0 * UNIT * modulus * np.minimum(np.abs(log_z), 700.0)
        factors.append(_Factor(modulus, norm, terms, part.times, change))
        once += part.times * np.bincount((single.first + np.arange(tilted.size)) % size, tilted, minlength=size)
        once[0] -= part.times * float(tilted.sum())
        log_scale += part.times * log_norm
        relative += part.times * (single.relative + UNIT * (8.0 + exponent))
        infinite += part.times * single.infinite
        slack += part.times * single.slack
    result = irfft(np.exp(logarithm), size)
    each, together = _rounding(factors, size)
    inverse = _FFT * math.log2(size) * UNIT * float(np.linalg.norm(result))
    each, together = each + inverse, together + math.sqrt(size) * inverse
    if careful and (rare := _rare(factors, once, logarithm)) is not None and rare[1] < each:
        result, each, together = rare
    tilted = np.clip(np.roll(result, -first), 0.0, None)
    infinite = min(1.0, infinite + beyond)
    return Composed(grid, first, tilted, theta, log_scale, each, together, relative, infinite, slack)


def _tilted(single: Lattice, theta: float) -> tuple[Floats, float, float]:
    """One step tilted: (r, ln M, largest |theta l| that matters)."""
    exponents = theta * single.losses
    top = float(np.max(np.where(single.probabilities > 0, exponents, -np.inf)))
    weights = single.probabilities * np.exp(np.minimum(exponents - top, 0.0))
    total = float(weights.sum())
    seen = weights > 1e-18 * total
    return weights / total, top + math.log(total), float(np.max(np.abs(exponents[seen])))


@dataclass(frozen=True)
class _Factor:
    """|z|, and bounds on its error: `norm` in the Euclidean norm over all frequencies plus `terms` at each of them."""

    modulus: Floats
    norm: float
    terms: Floats
    times: int
    change: npt.NDArray[np.complex128]


def _transform(tilted: Floats, first: int, size: int, times: int) -> tuple[npt.NDArray[np.complex128], float, Floats]:
    """(z - 1, bounds on its error as in `_Factor`), z the transform of probabilities at first, first + 1, ...

    times: T, or 0 for the FFT alone. T multiplies the error. With many steps only small frequencies keep a power that
    is not 0, and a step's loss is nearly always a few grid steps; there those probabilities are summed term by term,
    p_j (e^(-i w j) - 1), whose error is as small as the terms, and only the others go through the FFT, whose error is
    relative to their norm.
    """
    places = first + np.arange(tilted.size)
    change, norm, total = _fft(places, tilted, size)
    terms = np.full(change.size, 8.0 * UNIT * total)
    if times == 0:
        return change, norm, terms
    active = np.nonzero(times * np.log(np.abs(1.0 + change) + norm + terms) > -80.0)[0]
    near = np.abs(places) <= min(_BULK, _TERMS // max(1, 2 * active.size))
    if 2.0 * float(tilted[near].sum()) < float(tilted.sum()):
        return change, norm, terms
    rest, norm, total = _fft(places[~near], tilted[~near], size)
    exact, roundings = _term_by_term(
        places[near], tilted[near], np.asarray(2.0 * math.pi / size * active, dtype=np.float64)
    )
    change[active], terms[active] = rest[active] + exact, 8.0 * UNIT * total + roundings
    return change, norm, terms


def _fft(places: npt.NDArray[np.int64], values: Floats, size: int) -> tuple[npt.NDArray[np.complex128], float, float]:
    """(transform minus the sum of the values, bound on the norm of its error, the sum), folded to `size` places."""
    folded = np.bincount(places % size, values, minlength=size)
    total = float(folded.sum())
    norm = UNIT * _FFT * math.log2(size) * math.sqrt(size) * float(np.linalg.norm(folded))
    return rfft(folded) - total, norm, total


def _term_by_term(
    places: npt.NDArray[np.int64], values: Floats, omega: Floats
) -> tuple[npt.NDArray[np.complex128], Floats]:
    """sum of p_j (e^(-i w j) - 1) for each w, and a bound on its error."""
    kept = (places != 0) & (values > 0)
    angle = 0.5 * np.outer(omega, places[kept])
    half = np.sin(angle)
    found = -2.0 * ((half * half) @ values[kept] + 1j * ((half * np.cos(angle)) @ values[kept]))
    sizes = np.minimum(2.0, np.outer(omega, np.abs(places[kept]))) @ values[kept]
    return found, (16.0 + math.log2(1 + kept.sum())) * UNIT * sizes


def _log1p(change: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    """ln(1 + w), for small w (numpy's adds 1 first) and for w near -1."""
    with np.errstate(divide="ignore"):
        near = 0.5 * np.log1p(np.maximum(change.real * (2.0 + change.real) + change.imag**2, -0.9))
        modulus = np.abs(1.0 + change)
        real = np.where(modulus > 0.5, near, np.log(modulus))
    return np.asarray(np.maximum(real, -1e5) + 1j * np.arctan2(change.imag, 1.0 + change.real), dtype=np.complex128)


def _rounding(factors: list[_Factor], size: int) -> tuple[float, float]:
    """Bounds on the error of each composed probability, and on the sum of all errors.

    The sum of n numbers is at most sqrt(n) times their norm, which is that of the transform's error over sqrt(n).
    """
    each = together = 0.0
    with np.errstate(over="ignore", under="ignore"):
        for index, factor in enumerate(factors):
            rest = np.full(size // 2 + 1, float(factor.times))
            for other, beside in enumerate(factors):
                power = beside.times - 1 if other == index else beside.times
                rest *= (beside.modulus + beside.norm + beside.terms) ** power
            # Half of the transform is stored; the other half has the same moduli.
            each += 2.0 * float(((factor.norm + factor.terms) * rest).sum()) / size
            together += factor.norm * float(rest.max()) + math.sqrt(2.0) * float(np.linalg.norm(factor.terms * rest))
    return each, together


def _rare(
    factors: list[_Factor], once: Floats, logarithm: npt.NDArray[np.complex128]
) -> tuple[Floats, float, float] | None:
    """The composed probabilities where hardly any step has a loss that counts, and the bounds of `_rounding`.

    With w = z - 1 the product of all z^T is 1 + sum T w + R. The inverse of 1 + sum T w is known without any transform,
    and only R goes through one: it is of second order in sum T |w|, and so is its error, since the derivative of R by w
    is T (product over the others - 1). What is known is right to some units of roundoff of the result, of most of which
    it is; `Composed.relative` allows for that. None where sum T |w| is not small.
    """
    size, linear, moved = once.size, np.zeros_like(logarithm), np.zeros(logarithm.size)
    for factor in factors:
        linear += factor.times * factor.change
        moved += factor.times * (np.abs(factor.change) + factor.norm + factor.terms)
    if float(moved.max()) > _SMALL:
        return None
    # |ln(1 + w)| <= 1.4 |w| for |w| <= 1/2.
    others = np.expm1(1.4 * moved)
    result = irfft(np.expm1(logarithm) - linear, size)
    error = sum(factor.times * (factor.norm + factor.terms) for factor in factors) * others + 16.0 * UNIT * moved
    inverse = _FFT * math.log2(size) * UNIT * float(np.linalg.norm(result))
    each = 2.0 * float(error.sum()) / size + inverse
    together = math.sqrt(2.0) * float(np.linalg.norm(error)) + math.sqrt(size) * inverse
    result += once
    result[0] += 1.0
    return result, each, together


def epsilon_of(composed: Composed, delta: float, target: float) -> float:
    """The smallest eps >= 0 whose delta is at most `delta`, with every allowance; inf where there is none.

    target: about the answer; the weights are scaled to it.
    """
    budget = delta - composed.infinite
    if budget <= 0:
        return math.inf
    losses = composed.losses
    # All in units of exp(log_scale - theta target); losses far below the target would overflow and are not needed.
    keep = composed.theta * (losses - target) > -600.0
    losses = losses[keep]
    p = (composed.tilted[keep] + composed.allowance) * np.exp(-composed.theta * (losses - target))
    log_unit = composed.log_scale - composed.theta * target + composed.relative
    allowed = math.log(budget) - log_unit
    at, weight = _delta_at(losses, p, composed.grid, target)
    above = np.nonzero(np.log(np.maximum(at, 1e-300)) > allowed)[0]
    if above.size == 0:
        return max(0.0, float(losses[0]) + composed.slack)
    last = int(above[-1])
    if last + 1 >= losses.size:
        return max(0.0, float(losses[-1]) + composed.slack)
    # delta falls as A - e^eps B between two losses.
    share = (math.exp(allowed) - float(at[last + 1])) / float(weight[last])
    inside = math.log(math.exp(composed.grid) - share) if composed.grid < 700 else composed.grid
    return max(0.0, float(losses[last]) + inside * (1.0 + 1e-12) + composed.slack)


def _delta_at(losses: Floats, p: Floats, grid: float, target: float) -> tuple[Floats, Floats]:
    """delta at each loss, and sum over larger losses of p e^(loss - l): sums of positive terms, from the tail.

    With C_j = sum_{k > j} p_k e^(l_j - l_k): delta(l_j) = delta(l_(j+1)) + (e^h - 1) C_j.
    """
    scaled = np.clip(losses - target, -600.0, 600.0)
    with np.errstate(over="ignore"):  # inf is more than any budget
        under_q = np.r_[np.cumsum((p * np.exp(-scaled))[::-1])[::-1][1:], 0.0]
        weight = under_q * np.exp(scaled)
        at = np.r_[np.cumsum((math.expm1(grid) * weight)[::-1])[::-1]]
    return at, weight
