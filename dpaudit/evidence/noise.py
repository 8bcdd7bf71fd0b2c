"""Evidence from spare directions: is the noise as large as claimed where no canary is?

y[k, t] is what the release shows along direction k that holds no canary, in units of C, once the known records are
subtracted. Under the claim the squares y^2 / sigma^2 add up to a chi-square variable S with n = K T degrees of freedom;
whatever else is left in y (other records that could not be subtracted, more noise than claimed) only makes S
stochastically larger. The likelihood ratio of "sigma' = r sigma" against the claim,

    r^-n exp(-(r^-2 - 1) S / 2),    r < 1,

falls in S and has mean 1 at the claim, so its mean is at most 1 for every noise that is at least as large, step by step
different or not: an e-value without any further assumption. The exact interval of the level (Cochran) is the control of
the channel: a level above the claim means that the channel is blurred, and the game earns no power.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from scipy.stats import chi2

SCALES = (0.99, 0.98, 0.95, 0.9, 0.8, 0.65, 0.5, 0.25, 0.1)  # wrong claims, equally weighted
CONTROL_LEVEL = 1e-4  # two-sided; a correct channel is called blurred, and its game loses its power, so rarely


@dataclass(frozen=True)
class NoiseLevel:
    """squares: S, the sum of squares over sigma^2. count: n = K T of them."""

    squares: float
    count: int

    @property
    def log_e(self) -> float:
        """Log e-value against "the noise is at least as large as claimed"."""
        scales = np.array(SCALES)
        each = -self.count * np.log(scales) - (scales**-2 - 1) * self.squares / 2
        return float(logsumexp(each) - np.log(scales.size))

    @property
    def p_value(self) -> float:
        """P[so little noise] under the claim."""
        return float(chi2.cdf(self.squares, self.count))

    @property
    def ratio(self) -> float:
        """Measured standard deviation over the claimed one."""
        return float(np.sqrt(self.squares / self.count))

    def upper(self, level: float) -> float:
        """Upper confidence limit of the true level over the claimed one, with error probability `level`: exact for
        white noise of one level, and only larger where anything else is in the squares."""
        low = float(chi2.ppf(level, self.count))
        return float(np.sqrt(self.squares / low)) if low > 0 else np.inf

    def interval(self, level: float = CONTROL_LEVEL) -> tuple[float, float]:
        """Exact interval of the true level over the claimed one, with confidence 1 - level."""
        low, high = chi2.ppf(1 - level / 2, self.count), chi2.ppf(level / 2, self.count)
        return float(np.sqrt(self.squares / low)), float(np.sqrt(self.squares / high)) if high > 0 else np.inf
