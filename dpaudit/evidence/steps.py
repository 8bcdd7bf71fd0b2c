"""Evidence from spare directions over the steps: is the noise of every step drawn anew?

y[t, k] is what the release of step t shows along direction k that holds no canary, over sigma. Under the claim the
noise is independent over steps, so for every fixed unit vector u over the steps the K sums of u[t] y[t, k] are again
standard normal, and whatever else is left in y only makes their squares stochastically larger: the e-value of
`dpaudit.evidence.noise` holds for them as it does for the single steps. Noise that repeats, cancels or follows earlier
noise shows less than the claimed level along some u: here all vectors of the cosine basis (the spectrum of a
stationary dependence falls below its mean somewhere), and sums and differences of neighbouring steps, in both
pairings. The e-value is their average, since all of them are looked at.

`dependence` is the control: correlations of any two steps, whatever the pattern. Records that can't be subtracted also
correlate the steps, so it takes a game's power away and refutes nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from scipy.special import logsumexp
from scipy.stats import beta, norm

from dpaudit.evidence.noise import NoiseLevel

Floats = npt.NDArray[np.float64]

LEVEL = 1e-6  # how often a correct channel is called dependent, in all
MOST_STEPS = 2000  # whose pairs are compared one by one; more steps are thinned evenly
MOST_LAGS = 50


def levels(shown: Floats) -> list[NoiseLevel]:
    """The noise level along every fixed combination of the steps; shown: (T, K) over sigma."""
    steps, width = shown.shape
    if steps < 2:
        return []
    found = [NoiseLevel(float(row @ row), width) for row in dct(shown, axis=0, norm="ortho")]
    for first in (0, 1):
        one, two = shown[first : steps - 1 : 2], shown[first + 1 : steps : 2]
        for pairs in ((one + two) / math.sqrt(2), (one - two) / math.sqrt(2)):
            if pairs.size:
                found.append(NoiseLevel(float(np.square(pairs).sum()), pairs.size))
    return found


def log_e(shown: Floats) -> float:
    """Log e-value against "the noise of the steps is independent and at least as large as claimed"; 0 for one step."""
    found = [level.log_e for level in levels(shown)]
    return float(logsumexp(found) - math.log(len(found))) if found else 0.0


@dataclass(frozen=True)
class Dependence:
    """p_value of "no two steps share their noise" by the most unusual of its tests, and what that one saw."""

    p_value: float
    seen: str

    @property
    def found(self) -> bool:
        """Beyond what chance explains."""
        return self.p_value < LEVEL


def dependence(shown: Floats) -> Dependence | None:
    """Correlations of all pairs of steps, and their sums over the lags; None with fewer than two steps.

    shown: (T, K), in any unit. A correlation of two independent Gaussian vectors of length K is beta distributed; the
    largest of all pairs is judged by Bonferroni's inequality, which needs no independence of the pairs. The sum over
    one lag is judged as normal (K (T - lag) terms).
    """
    steps, width = shown.shape
    if steps < 2 or width < 8:
        return None
    size = np.linalg.norm(shown, axis=1)
    if not size.all():
        return Dependence(0.0, f"nothing at all in step {int(np.argmin(size)) + 1}")
    unit = shown / size[:, None]
    place = np.unique(np.linspace(0, steps - 1, min(steps, MOST_STEPS)).astype(int))
    cosines = np.triu(unit[place] @ unit[place].T, 1)
    one, two = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
    largest, pairs = float(cosines[one, two]), place.size * (place.size - 1) / 2
    tail = 2 * float(beta.sf((1 + min(1.0, abs(largest))) / 2, (width - 1) / 2, (width - 1) / 2))
    text = f"correlation {largest:.3g} of steps {place[one] + 1} and {place[two] + 1}"
    tests = [(min(1.0, pairs * tail), text)]
    lags = range(1, min(steps, MOST_LAGS + 1))
    for lag in lags:
        values = np.einsum("tk,tk->t", unit[:-lag], unit[lag:])
        z = float(values.sum()) * math.sqrt(width / values.size)
        text = f"mean correlation {values.mean():.3g} of steps {lag} apart"
        tests.append((min(1.0, 2 * float(norm.sf(abs(z))) * len(lags)), text))
    p, text = min(tests)
    return Dependence(min(1.0, 2 * p), text)
