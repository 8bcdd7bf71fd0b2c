"""Exact match, and intervals that respect that questions about one picture go right or wrong together."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from dpaudit.documents import Metric

RESAMPLES = 2000
FEWER_RESAMPLES = 1000  # where every resample calls somebody else's Python
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1 << 22  # numbers in memory while resampling
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, outer white space gone, inner runs one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(answer: str, target: str) -> float:
    """1.0 if the normalised texts are equal, else 0.0. No synonyms, no numbers-as-words, no partial credit."""
    return float(normalise(answer) == normalise(target))


def words(text: str) -> str:
    """Text for comparing answers in sentences: `normalise`, then without punctuation and English articles.

    After Rajpurkar et al. 2016 (SQuAD), except that a point, comma or minus before a digit stays: 1.5 is not 15.
    """
    plain = normalise(text)
    kept = (
        sign
        for at, sign in enumerate(plain)
        if not unicodedata.category(sign).startswith("P") or (sign in ".,-" and plain[at + 1 : at + 2].isdigit())
    )
    return " ".join(ARTICLES.sub(" ", "".join(kept)).split())


def token_f1(answer: str, target: str) -> float:
    """F1 of the words that answer and target share, each as often as both have it; 1.0 if both have no words left."""
    said, wanted = words(answer).split(), words(target).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def yes_no(answer: str) -> str | None:
    """'yes' or 'no' as the first word of an answer; None when it is neither."""
    first = words(answer).partition(" ")[0]
    return first if first in ("yes", "no") else None


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
    shares = np.concatenate([(drawn @ hits) / (drawn @ sizes) for drawn in drawings(count, RESAMPLES, seed)])
    low, high = _limits(shares)
    return Metric(value=value, low=low, high=high, n=len(right), pictures=count)


def drawings(count: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each of `count` clusters is drawn, in pieces of (resamples, count) that together are one sequence."""
    generator = np.random.default_rng(seed)
    step = max(1, DRAWN_AT_ONCE // count)
    for at in range(0, resamples, step):
        yield generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - at))


def _limits(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def resampled(
    statistic: Callable[[list[Any]], float], items: Sequence[Any], clusters: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap limits, over clusters, of any statistic of a list of per-question results.

    For metrics that are no mean (precision, F1): 1,000 times whole clusters are drawn with replacement and `statistic`
    is taken of all their items. None: one cluster, a statistic that is never finite, or one that no resample moves
    (all right, all wrong): its spread is unknown then, not zero.
    """
    members: dict[str, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    if len(members) < 2:
        return None
    rows = list(members.values())
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(FEWER_RESAMPLES):
        drawn = generator.integers(0, len(rows), len(rows))
        values.append(float(statistic([items[index] for cluster in drawn for index in rows[cluster]])))
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if not len(finite) or finite.min() == finite.max():
        return None
    return _limits(finite)


def difference_of_means(
    values: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike, clusters: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap limits, over clusters, of mean(values where first) - mean(values where second).

    values: (n,) numbers; first, second: (n,) masks. A resample without a question of either group says nothing and is
    left out. None: fewer than two clusters, or no resample that moves.
    """
    numbers = np.asarray(values, dtype=np.float64)
    _, member = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    count = int(member.max()) + 1
    if count < 2:
        return None
    masks = [np.asarray(mask, dtype=np.float64) for mask in (first, second)]
    hits = [np.bincount(member, weights=numbers * mask, minlength=count) for mask in masks]
    sizes = [np.bincount(member, weights=mask, minlength=count) for mask in masks]
    parts = []
    for drawn in drawings(count, RESAMPLES, seed):
        totals = [drawn @ size for size in sizes]
        usable = (totals[0] > 0) & (totals[1] > 0)
        means = [(drawn @ hit)[usable] / total[usable] for hit, total in zip(hits, totals, strict=True)]
        parts.append(means[0] - means[1])
    differences = np.concatenate(parts)
    if not len(differences) or differences.min() == differences.max():
        return None
    return _limits(differences)


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
    """The most common normalised answer of each kind, from (kind, answer) pairs; ties go to the first by alphabet."""
    counts: dict[str, Counter[str]] = {}
    for kind, answer in pairs:
        counts.setdefault(kind, Counter())[normalise(answer)] += 1
    return {kind: min(counter, key=lambda answer: (-counter[answer], answer)) for kind, counter in counts.items()}


def constant_answers(targets: Sequence[str], kinds: Sequence[str], answers: Mapping[str, str]) -> list[float]:
    """Exact match of always giving `answers[kind]`; a kind without one is never right."""
    return [exact_match(answers[k], t) if k in answers else 0.0 for t, k in zip(targets, kinds, strict=True)]
