"""`dpaudit.tradeoff`: what a claim allows every attack, as a curve and as the readings that people ask for."""

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dpaudit import accounting
from dpaudit.analysis.claim import claimed_event
from dpaudit.analysis.tradeoff import Curve, curve_of
from dpaudit.api import html, plots
from dpaudit.api.claims import one_of
from dpaudit.documents import Claim
from dpaudit.errors import UsageError, rejected

Floats = npt.NDArray[np.float64]
RATES = (0.1, 0.01, 0.001)


@dataclass(frozen=True, repr=False)
class Tradeoff:
    """The trade-off curve of a claim: no attack on one record has a type II error below `beta(alpha)`.

    >>> import dpaudit
    >>> curve = dpaudit.tradeoff(sigma=0.8, rate=0.04, steps=60)
    >>> round(curve.advantage(), 3), round(curve.tpr(0.01), 3), round(curve.epsilon(1e-5), 2)
    (0.205, 0.049, 3.94)
    >>> curve.beta([0.0, 0.5, 1.0]).round(3)
    array([1.   , 0.297, 0.   ])
    """

    claim: Claim
    curve: Curve

    @overload
    def beta(self, alpha: float) -> float: ...
    @overload
    def beta(self, alpha: npt.ArrayLike) -> Any: ...
    def beta(self, alpha: npt.ArrayLike) -> Any:
        """The least type II error (false negative rate) at a type I error (false positive rate), or at several."""
        found = self.curve.beta(_rates("alpha", alpha))
        return float(found) if np.ndim(found) == 0 else found

    @overload
    def tpr(self, fpr: float) -> float: ...
    @overload
    def tpr(self, fpr: npt.ArrayLike) -> Any: ...
    def tpr(self, fpr: npt.ArrayLike) -> Any:
        """The highest true positive rate at a false positive rate, or at several."""
        found = 1.0 - self.curve.beta(_rates("fpr", fpr))
        return float(found) if np.ndim(found) == 0 else found

    def advantage(self) -> float:
        """The largest TPR - FPR of any attack."""
        return self.curve.advantage()

    def accuracy(self) -> float:
        """The most often that a fair coin of one record is guessed right."""
        return 0.5 * (1.0 + self.advantage())

    def epsilon(self, delta: float) -> float:
        """eps at `delta`, by the accountant. Raises UsageError for a bare (eps, delta) at another delta."""
        event = claimed_event(self.claim)
        if event is not None:
            return accounting.epsilon(event, delta)
        if delta != self.claim.delta:
            raise rejected("delta", delta, f"{self.claim.delta:g}, at which eps is stated; a mechanism has all of them")
        return float(self.claim.epsilon)

    def plot(self, ax: Any | None = None, *, log: bool = False) -> Any:
        """The curve on a matplotlib axis (default: that of a new figure); returns the axis. log: both axes.

        >>> import dpaudit
        >>> dpaudit.tradeoff(epsilon=1.0, delta=0.01).plot().get_ylabel()
        'type II error (false negative rate)'
        """
        alpha = self._grid()
        return plots.errors(ax, alpha, self.curve.beta(alpha), f"eps = {float(self.claim.epsilon):.3g}", log)

    def roc(self) -> tuple[Floats, Floats]:
        """(FPR, highest TPR), for plots."""
        fpr = self._grid()
        return fpr, 1.0 - self.curve.beta(fpr)

    def _grid(self) -> Floats:
        small = np.geomspace(1e-7, 0.1, 200)
        return np.unique(np.r_[0.0, small, np.linspace(0.0, 1.0, 301), 1 - small, 1.0])

    def _rows(self) -> dict[str, Any]:
        rates = ", ".join(f"{self.tpr(rate):.3g} at FPR {rate:g}" for rate in RATES)
        return {"advantage": f"{self.advantage():.4g} (TPR - FPR)", "TPR": f"at most {rates}"}

    def _title(self) -> str:
        found = self.claim
        stated = ""
        if found.noise_multiplier is not None:
            stated = f"sigma {found.noise_multiplier:g}, q {found.sample_rate:g}, T {found.steps}: "
        return f"Trade-off of {stated}eps = {float(found.epsilon):.4g} at delta = {found.delta:g}"

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {name:10} {value}" for name, value in self._rows().items())])

    def _repr_html_(self) -> str:
        return html.table(self._title(), self._rows())


def tradeoff(
    claim: Claim | None = None,
    *,
    epsilon: float | None = None,
    delta: float = 1e-5,
    sigma: float | None = None,
    rate: float | None = None,
    steps: int | None = None,
) -> Tradeoff:
    """The trade-off curve of a mechanism (sigma, rate, steps), of a bare (epsilon, delta), or of a `claim`.

    >>> import dpaudit
    >>> dpaudit.tradeoff(sigma=1.0, rate=0.05, steps=200)
    Trade-off of sigma 1, q 0.05, T 200: eps = 4.766 at delta = 1e-05
      advantage  0.333 (TPR - FPR)
      TPR        at most 0.349 at FPR 0.1, 0.083 at FPR 0.01, 0.0173 at FPR 0.001
    """
    found = one_of(claim, epsilon=epsilon, delta=delta, sigma=sigma, rate=rate, steps=steps)
    if found is None:
        raise UsageError("tradeoff: nothing is claimed; accepted: epsilon, or sigma, rate and steps, or a claim")
    return Tradeoff(found, curve_of(found))


def limit_of(claim: Claim | Tradeoff | None) -> tuple[Floats, Floats] | None:
    """What a ROC may not pass."""
    if claim is None:
        return None
    return (claim if isinstance(claim, Tradeoff) else tradeoff(claim)).roc()


def _rates(field: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.all((array >= 0) & (array <= 1)):
        raise rejected(field, values, "numbers from 0 to 1")
    return array
