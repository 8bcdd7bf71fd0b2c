"""From the answers of all cells to one line per configuration, with intervals that say what they cover.

A mean accuracy varies with the training (seed: sampling, noise, initial adapter) and with the held-out pictures. Both
are crossed: every training answers the same questions. With S trainings and P pictures, and the usual two-way model
accuracy(s, p) = mu + a_s + b_p + e_sp, the grand mean has variance va/S + vb/P + ve/(SP). The variance of the S seed
means over S estimates va/S + ve/(SP), and a bootstrap over pictures of the seed-averaged answers vb/P + ve/(SP). Their
sum counts ve/(SP) twice, so the interval errs on the wide side. Its t quantile has the degrees of freedom of
Satterthwaite (1946), which for three seeds keeps it honest: 2 where seeds dominate. A single training shows nothing of
the first part; its interval covers pictures only, and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from reports.metrics import CONFIDENCE, RESAMPLES, cluster_metric
from reports.sweep.document import Averaged


@dataclass(frozen=True)
class Answers:
    """Correctness of one training on the held-out questions, in their order. clusters: the privacy unit of each."""

    correct: npt.NDArray[np.float64]
    clusters: tuple[str, ...]
    kinds: tuple[str, ...]
    sample_sha256: str


def averaged(trainings: Sequence[Answers]) -> Averaged:
    """Mean accuracy of one configuration over its trainings, which share their questions."""
    first = trainings[0]
    values = np.stack([training.correct for training in trainings])
    if len(trainings) == 1 or np.all(values == values.flat[0]):
        # One training, or no variation at all: the exact limits of cluster_metric stand in.
        metric = cluster_metric(values.mean(axis=0), first.clusters)
        return Averaged(
            value=metric.value,
            low=metric.low,
            high=metric.high,
            seeds=len(trainings),
            pictures=metric.pictures or 0,
            n=metric.n,
            covers="none" if metric.low is None else "pictures",
        )
    return crossed(values, first.clusters, low=0.0, high=1.0)


def difference(one: Sequence[Answers], other: Sequence[Answers]) -> Averaged:
    """Accuracy of `one` minus that of `other`, trainings paired in order, questions the same."""
    values = np.stack([a.correct - b.correct for a, b in zip(one, other, strict=True)])
    return crossed(values, one[0].clusters, low=-1.0, high=1.0)


def by_kind(trainings: Sequence[Answers]) -> dict[str, Averaged]:
    """`averaged` for each question kind, in alphabetical order."""
    kinds = np.asarray(trainings[0].kinds, dtype=object)
    found = {}
    for kind in sorted(set(trainings[0].kinds)):
        chosen = np.flatnonzero(kinds == kind)
        part = [
            Answers(
                training.correct[chosen],
                tuple(training.clusters[index] for index in chosen),
                (kind,) * len(chosen),
                training.sample_sha256,
            )
            for training in trainings
        ]
        found[kind] = averaged(part)
    return found


def crossed(
    values: npt.NDArray[np.float64], clusters: Sequence[str], *, low: float, high: float, seed: int = 0
) -> Averaged:
    """The mean of values (S trainings, Q questions) with the interval of the module's docstring, cut to [low, high]."""
    trainings, questions = values.shape
    member = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)[1]
    count = int(member.max()) + 1
    mean = float(values.mean())
    if count < 2:
        return Averaged(value=mean, low=None, high=None, seeds=trainings, pictures=count, n=questions, covers="none")
    sums = np.bincount(member, weights=values.mean(axis=0), minlength=count)
    sizes = np.bincount(member, minlength=count).astype(np.float64)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    pictures = float(np.var((drawn @ sums) / (drawn @ sizes), ddof=1))
    seeds = float(np.var(values.mean(axis=1), ddof=1)) / trainings if trainings > 1 else 0.0
    total = pictures + seeds
    reach = 0.0
    if total > 0:
        spread = pictures**2 / (count - 1) + (seeds**2 / (trainings - 1) if trainings > 1 else 0.0)
        freedom = total**2 / spread
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * total**0.5
    return Averaged(
        value=mean,
        low=max(low, mean - reach),
        high=min(high, mean + reach),
        seeds=trainings,
        pictures=count,
        n=questions,
        covers="seeds and pictures" if trainings > 1 else "pictures",
    )
