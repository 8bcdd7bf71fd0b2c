"""What the path from low-attention patches carries: exposure of fused-region canaries against their counterparts.

Exposure (Carlini et al. 2019) of a canary is log2 |R| - log2 rank, rank the place of its true word among |R| reference
words by how much lower the fine-tuned model's loss is than the base model's. A canary that was left out has the
exposure that chance gives; a canary that was learned approaches log2 |R|. The gain is the mean over inserted canaries
minus the mean over those left out, for codes in low-attention patches and for their counterparts in dominant ones.
Coins are fair and independent, so the two groups differ by nothing but training; intervals are Welch's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from attacks.canaries import Canary
from attacks.kinds import PUBLIC_WORDS
from attacks.kinds_region import DOMINANT, LOW
from attacks.scores import losses
from dpaudit.documents import Carried, Region
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]


def asking(unit: Unit, word: str) -> Unit:
    """The unit with another answer to its only question."""
    picture = unit.pictures[0]
    return replace(unit, pictures=(picture.derived(questions=(replace(picture.questions[0], answer=word),)),))


def exposures(
    base: VisionLanguageModel, tuned: VisionLanguageModel, units: Sequence[Unit], words: Sequence[str] = PUBLIC_WORDS
) -> Floats:
    """(n,) exposure in bits of each unit's answer among `words`. Ties count half."""
    out = []
    for unit in units:
        asked = [asking(unit, word) for word in words]
        score = losses(base, asked) - losses(tuned, asked)
        mine = score[list(words).index(unit.pictures[0].questions[0].answer)]
        rank = 1 + float((score > mine).sum()) + 0.5 * float((score == mine).sum() - 1)
        out.append(math.log2(len(words)) - math.log2(rank))
    return np.array(out)


@dataclass(frozen=True)
class Gain:
    """A difference of means with its variance. terms: (s^2 / n, n - 1) of every group in it."""

    value: float
    variance: float
    terms: tuple[tuple[float, int], ...]

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Welch-Satterthwaite; a group of one has no spread of its own, so the interval is then infinite."""
        if any(freedom < 1 for _, freedom in self.terms):
            return -math.inf, math.inf
        bottom = sum(part**2 / freedom for part, freedom in self.terms)
        if bottom == 0:
            return self.value, self.value
        half = float(stats.t.ppf(0.5 + confidence / 2, self.variance**2 / bottom)) * math.sqrt(self.variance)
        return self.value - half, self.value + half


def gain(inside: Floats, outside: Floats) -> Gain:
    """Mean of `inside` minus mean of `outside`."""
    terms = tuple(
        (float(group.var(ddof=1)) / len(group) if len(group) > 1 else 0.0, len(group) - 1)
        for group in (inside, outside)
    )
    return Gain(float(inside.mean() - outside.mean()), sum(part for part, _ in terms), terms)


def carried(canaries: Sequence[Canary], values: Floats) -> Carried | None:
    """The part of the document; None where a region has fewer than two canaries on either side."""
    regions, gains = [], []
    for region in (LOW, DOMINANT):
        mine = [place for place, canary in enumerate(canaries) if canary.description == region]
        inside = np.array([values[place] for place in mine if canaries[place].member])
        outside = np.array([values[place] for place in mine if not canaries[place].member])
        if min(len(inside), len(outside)) < 2:
            return None
        found = gain(inside, outside)
        low, high = found.interval()
        gains.append(found)
        regions.append(
            Region(
                region=region,
                inserted=len(inside),
                left_out=len(outside),
                exposure_in=float(inside.mean()),
                exposure_out=float(outside.mean()),
                gain=found.value,
                gain_low=low,
                gain_high=high,
            )
        )
    both = Gain(
        gains[1].value - gains[0].value, gains[0].variance + gains[1].variance, (*gains[0].terms, *gains[1].terms)
    )
    low, high = both.interval()
    return Carried(
        references=len(PUBLIC_WORDS),
        regions=tuple(regions),
        difference=both.value,
        difference_low=low,
        difference_high=high,
    )
