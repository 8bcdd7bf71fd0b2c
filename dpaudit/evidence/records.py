"""Do the known records arrive in a release as often as the claim says, clipped as it says?

Canaries of a white-box game enter by a way of their own, so they do not show that every record is clipped to C and
counted once. The records themselves do, where what they should contribute is known: u[t] is the predicted sum of the
clipped gradients of step t over C, and r[t] what the release shows beyond that sum and the canaries, over C. If the
records arrive as x times the prediction, r[t] = (x - 1) u[t] + noise, and the least-squares estimate of x over the
whole game is

    x = 1 + S / V,    S = sum_t <r[t], u[t]>,    V = sum_t |u[t]|^2.

**Validity.** Let F_t be everything before the noise of step t. u[t] is a function of the parameters before that step
and of its batch, hence of F_t, and under the claim r[t] is given F_t an N(0, sigma^2 I) vector. So S / sigma is a sum
of increments that given F_t are N(0, |u[t]|^2): a martingale whose variance process is V, which is random, since later
gradients depend on earlier noise. For every fixed l, exp(l S / sigma - l^2 V / 2) is a martingale of mean 1; so is its
mixture over l ~ N(0, 1 / rho) (the method of mixtures: Robbins 1970; de la Pena, Klass and Lai 2004),

    sqrt(rho / (V + rho)) exp((S / sigma)^2 / (2 (V + rho))),

and by Ville's inequality it ever reaches 1 / a with probability at most a. Therefore

    P[at some step |S| >= sigma sqrt((V + rho) (2 ln(1 / a) + ln((V + rho) / rho)))] <= a,

for any rho that is fixed beforehand. Here it is (sigma / WIDEST)^2, from the claim alone: of all rho it makes x best
known at about the V where the half-width is WIDEST, that is where the interval begins to say something. More noise than
claimed makes S vary more; `level` widens the interval by it.
"""

import math
from dataclasses import dataclass

ERROR = 7e-6  # two-sided: how often a correct training is said to deviate, as 4.5 standard errors
WIDEST = 0.25  # half-width of an interval that still says something when it holds 1


@dataclass(frozen=True)
class Arrival:
    """x with its interval, at every moment of the game at once."""

    estimate: float
    half_width: float
    steps: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.estimate - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.estimate + self.half_width

    @property
    def deviates(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1 <= self.high

    @property
    def known(self) -> bool:
        """Whether the interval is narrow enough to say that the records arrive as they should."""
        return self.half_width <= WIDEST


@dataclass
class Records:
    """Running sums over the steps of a game. covariance: S. variance: V. steps: those whose batch contributed."""

    covariance: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def add(self, covariance: float, variance: float) -> None:
        """Of one step: <r, u> and |u|^2."""
        self.covariance += covariance
        self.variance += variance
        self.steps += variance > 0

    def arrival(self, sigma: float, level: float = 1.0) -> Arrival | None:
        """None where no record contributed anything. level: of the noise over the claimed one, used where it is above
        1."""
        if not (self.variance > 0 and math.isfinite(self.covariance) and math.isfinite(self.variance)):
            return None
        rho = (sigma / WIDEST) ** 2
        together = self.variance + rho
        limit = math.sqrt(together * (2 * math.log(1 / ERROR) + math.log(together / rho)))
        half = sigma * max(1.0, level) * limit / self.variance
        return Arrival(1 + self.covariance / self.variance, half, self.steps)
