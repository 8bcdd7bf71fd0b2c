"""Reference trainings as trials of their own: an e-process that may stop the study.

Trial t is an independent training on fresh coins, so it can be a target too, with the trials before it as references.
Its p-value for the claim is computed on guesses whose number was fixed beforehand; given everything before it, it is
uniform or larger under a true claim. It becomes an e-value (1 / (2 sqrt p), Shafer et al. 2011) and the product over
trials is an e-process: whenever it reaches 1 / alpha the claim is refuted at level alpha, however often one looked
(Ville). References are trials of the past only: a score that used coins of later trials would break the conditioning.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attacks.membership import formulas
from attacks.membership.members import member_plan
from attacks.membership.references import Study
from attacks.membership.selection import on_common_scale
from dpaudit import verdict
from dpaudit.analysis.claim import Game, null_profile, play
from dpaudit.bounds.sequential import calibrate, merge_by_multiplying
from dpaudit.documents import Claim, Test
from dpaudit.evidence.calibrate import e_value

TITLE = "membership: reference trainings"
SHARE = 0.1  # of the evidence of the membership game
STATEMENT = (
    "anytime-valid p-value of 'every coin of every reference training satisfies the claimed trade-off curve', one over "
    "the largest product of e-values so far"
)


@dataclass(frozen=True)
class Trials:
    """claim: what is tested, None = nothing. kinds (m,): of the records, for a common scale of scores. seed: for ties.
    alpha: where the e-process stops the study."""

    claim: Claim | None
    kinds: npt.NDArray[np.str_]
    seed: int
    alpha: float

    def e_values(self, study: Study) -> list[float]:
        """One e-value for each trial but the first, which has no references, in order."""
        if self.claim is None:
            return []
        profile = null_profile(self.claim)
        out = []
        for row in range(1, len(study.index)):
            losses, inside = study.losses[:row], study.inside[:row]  # only coins of the past may be looked at
            target = study.losses[row]
            scores = np.zeros_like(target)
            for kind in np.unique(self.kinds):
                mine = self.kinds == kind
                scores[mine] = formulas.bavaria(target[mine], losses[:, mine], inside[:, mine])
            scores = on_common_scale(scores, self.kinds)
            rng = np.random.default_rng([self.seed, int(study.index[row])])
            top, bottom = member_plan(target.size, self.seed).guesses["all"]
            game: Game = play(scores, study.inside[row], top=top, bottom=bottom, rng=rng)
            out.append(calibrate(game.read_by(separate=False).p_value(profile)))
        return out

    def p_value(self, study: Study) -> float:
        """One over the largest wealth that the e-process ever had; 1 before it started."""
        values = self.e_values(study)
        best = max((merge_by_multiplying(values[: count + 1]) for count in range(len(values))), default=1.0)
        return 1.0 / max(1.0, best) if math.isfinite(best) else 0.0

    def decided(self, study: Study) -> bool:
        """Whether the trials so far refute the claim. Only an unbroken sequence from trial 0 on counts: which trials
        finish first may depend on their data."""
        return self.claim is not None and verdict.reached(self.p_value(_unbroken(study)), self.alpha)

    def tests(self, study: Study) -> tuple[Test, ...]:
        """The e-process as a test of the claim; none without a claim or trials."""
        done = _unbroken(study)
        whole = len(done.index)
        if self.claim is None or whole < 2:
            return ()
        top, bottom = member_plan(done.losses.shape[1], self.seed).guesses["all"]
        return (
            Test(
                name=TITLE,
                statistic="bavaria against the trainings before",
                bound="f-dp",
                assumes="claimed-mechanism",
                selection=f"fixed by the number of records: {top} top, {bottom} bottom in each of {whole - 1} runs",
                confidence=1 - self.alpha,
                delta=self.claim.delta,
                n=done.losses[1:].size,
                guesses=(whole - 1) * (top + bottom),
                epsilon_lower=None,
                ceiling=None,
                p_value=self.p_value(done),
                e_value=e_value(self.p_value(done), wanted=verdict.wanted(SHARE, self.alpha)),
                share=SHARE,
                statement=STATEMENT,
            ),
        )


def _unbroken(study: Study) -> Study:
    """The trials from number 0 on up to the first gap."""
    count = int((study.index == np.arange(len(study.index))).cumprod().sum())
    return Study(study.losses[:count], study.inside[:count], study.population[:count], study.index[:count])
