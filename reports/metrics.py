"""Exact match, and intervals that respect that questions about one picture go right or wrong together."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from dpaudit.documents import Metric

RESAMPLES = 2000
CONFIDENCE = 0.95


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, outer white space gone, inner runs one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(answer: str, target: str) -> float:
    """1.0 if the normalised texts are equal, else 0.0. No synonyms, no numbers-as-words, no partial credit."""
    return float(normalise(answer) == normalise(target))


def cluster_metric(correct: npt.ArrayLike, clusters: Sequence[str], *, seed: int = 0) -> Metric:
    """Share of correct answers with a 95 % percentile bootstrap interval over clusters.

    correct: (n,) zeros and ones; clusters: n ids of what was drawn independently (the privacy unit, by default the
    picture). Whole clusters are drawn with replacement (2,000 resamples), which keeps the dependence within them; the
    share is a ratio of sums, so clusters may differ in size (Davison & Hinkley 1997, section 3.8). Where every cluster
    is all right (or all wrong) the bootstrap knows no variation and would answer with an interval of length zero:
    there the exact Clopper-Pearson limit for that many clusters stands instead. One cluster has no interval.
    """
    right = np.asarray(correct, dtype=np.float64)
    if right.shape != (len(clusters),) or not len(clusters):
        raise ValueError(f"{right.shape} results for {len(clusters)} questions")
    _, member = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    count = int(member.max()) + 1
    hits = np.bincount(member, weights=right, minlength=count)
    sizes = np.bincount(member, minlength=count).astype(np.float64)
    value = float(right.mean())
    if count < 2:
        return Metric(value=value, low=None, high=None, n=len(right), pictures=count)
    if value in (0.0, 1.0):
        edge = (1 - CONFIDENCE) / 2
        exact = float(stats.beta.ppf(edge, count, 1))  # Clopper-Pearson lower limit of `count` successes in `count`
        low, high = (exact, 1.0) if value == 1.0 else (0.0, 1.0 - exact)
        return Metric(value=value, low=low, high=high, n=len(right), pictures=count)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    shares = (drawn @ hits) / (drawn @ sizes)
    low, high = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Metric(value=value, low=float(low), high=float(high), n=len(right), pictures=count)


def by_kind(
    correct: Sequence[float], kinds: Sequence[str], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Metric]:
    """`exact_match` over everything and `exact_match/KIND` for each kind, kinds in alphabetical order."""
    metrics = {"exact_match": cluster_metric(correct, clusters, seed=seed)}
    for kind in sorted(set(kinds)):
        chosen = [index for index, own in enumerate(kinds) if own == kind]
        metrics[f"exact_match/{kind}"] = cluster_metric(
            [correct[index] for index in chosen], [clusters[index] for index in chosen], seed=seed
        )
    return metrics


def commonest(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The commonest normalised answer of each kind, from (kind, answer) pairs; ties go to the first in the alphabet."""
    counts: dict[str, Counter[str]] = {}
    for kind, answer in pairs:
        counts.setdefault(kind, Counter())[normalise(answer)] += 1
    return {kind: min(counter, key=lambda answer: (-counter[answer], answer)) for kind, counter in counts.items()}


def constant_answers(targets: Sequence[str], kinds: Sequence[str], answers: Mapping[str, str]) -> list[float]:
    """Exact match of always giving `answers[kind]`; a kind without one is never right."""
    return [exact_match(answers[k], t) if k in answers else 0.0 for t, k in zip(targets, kinds, strict=True)]
