"""The rule of a white-box game: its tests and their shares, fixed with the coins."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpaudit.evidence.coins import Posteriors
from dpaudit.evidence.noise import NoiseLevel

Bools = npt.NDArray[np.bool_]

# Shares of the game's evidence. All candidates together see a small deficit of noise; the loud ones alone see faulty
# clipping that hides the others; the spare directions see the noise itself, and whether every step has its own; single
# steps, blocks and coordinates see where noise is missing. What is not staked keeps a game that finds nothing from
# wiping out the evidence of earlier and later ones.
ALL, LOUD, NOISE, STEPS = "all canaries", "loud canaries", "noise level", "noise between steps"
PLACES = "noise of every step, block and coordinate"
SHARES = {ALL: 0.45, LOUD: 0.2, NOISE: 0.2, STEPS: 0.05, PLACES: 0.05}
KEPT = 0.05
SPARE = 256  # directions without canaries, where the model has room for them


@dataclass(frozen=True)
class Rule:
    """loud: (m,) which candidates arrive far above C. spare: K directions without canaries. known: whether what the
    other records contribute is subtracted; without it the coins' posterior is not known and only the noise level
    counts."""

    loud: Bools
    spare: int
    known: bool = True

    def parts(self, posteriors: Posteriors, coins: Bools, noise: NoiseLevel | None) -> dict[str, float]:
        """Log e-value of each test that is played."""
        found = {}
        if self.known:
            found[ALL] = float(posteriors.log_e(coins))
            if self.loud.any():
                found[LOUD] = float(posteriors.rows(self.loud).log_e(coins[self.loud]))
        if noise is not None:
            found[NOISE] = noise.log_e
        return found

    def log_e(self, posteriors: Posteriors, coins: Bools, noise: NoiseLevel | None) -> float:
        """Log e-value of the game: the average of its tests. A test that is not played counts as 0."""
        parts = self.parts(posteriors, coins, noise)
        return float(
            np.logaddexp.reduce([np.log(KEPT), *(np.log(SHARES[name]) + value for name, value in parts.items())])
        )
