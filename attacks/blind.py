"""The blind baseline: can a classifier that sees the records but never the model tell members from the rest?

If it can, records were not chosen by a fair coin (or a candidate depends on its coin), every membership score may be
measuring that difference, and the game is invalid. With fair coins nobody can, whatever the features: labels are then
independent of everything that the classifier sees, which makes the test exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpaudit.bounds.roc import auc_interval
from dpaudit.documents import Check
from trainers.records import Unit

ALPHA = 0.001  # a guard, outside the error budget of the bounds
FOLDS = 5
PERMUTATIONS = 1999  # smallest p-value 0.0005, half of ALPHA
SIDE = 12  # pictures are shrunk to SIDE x SIDE
TEXT_FEATURES = 64
LEAST = 20  # records; with fewer, five folds hold too few of a class to fit anything
MOST = 4000  # records; a random subset of more, because the work grows with the square
_RIDGE = 1.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BlindBaseline:
    """auc: out-of-fold, 0.5 = chance, with a descriptive interval. p_value: one-sided, by permutation."""

    auc: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def beats_chance(self) -> bool:
        return self.p_value < ALPHA

    def check(self) -> Check:
        """The entry of the audit's validity."""
        return Check(
            name="blind baseline",
            status="fail" if self.beats_chance else "pass",
            measured=f"AUC {self.auc:.3f} ({self.low:.3f} to {self.high:.3f}), p = {self.p_value:.4f}, n = {self.n}",
            allowed=f"p >= {ALPHA:g}",
            explanation="A classifier that sees pictures and texts of the candidates but never the model "
            + (
                "tells members from non-members: they were not chosen by a fair coin alone."
                if self.beats_chance
                else "does no better than chance, as it must when a fair coin alone decides."
            ),
        )


def features(units: Sequence[Unit]) -> Floats:
    """(n, d) standardised features of records: small pictures, colour statistics, hashed characters, counts."""
    rows = np.stack([np.concatenate([_picture_features(unit), _text_features(unit)]) for unit in units])
    spread = rows.std(axis=0)
    kept = rows[:, spread > 0]
    standard: Floats = (kept - kept.mean(axis=0)) / kept.std(axis=0)
    return standard


def _picture_features(unit: Unit) -> Floats:
    found = []
    for picture in unit.pictures:
        small = Image.fromarray(picture.pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        values = picture.pixels.astype(np.float64)
        height, width = picture.pixels.shape[:2]
        edges = np.abs(np.diff(values, axis=1)).mean() if width > 1 else 0.0
        found.append(
            np.concatenate(
                [np.asarray(small, dtype=np.float64).ravel(), values.mean(axis=(0, 1)), values.std(axis=(0, 1)),
                 [edges, height, width]]
            )
        )  # fmt: skip
    return np.concatenate([np.mean(found, axis=0), [len(found)]])


def _text_features(unit: Unit) -> Floats:
    """Counts of hashed character pairs of questions and of answers, and their lengths."""
    counts = np.zeros(2 * TEXT_FEATURES)
    lengths = np.zeros(3)
    for picture in unit.pictures:
        for question in picture.questions:
            for half, text in enumerate((question.text, question.answer)):
                codes = np.array([ord(sign) for sign in f" {text} "], dtype=np.int64)
                slots = (codes[:-1] * 31 + codes[1:]) % TEXT_FEATURES
                np.add.at(counts, half * TEXT_FEATURES + slots, 1.0)
                lengths[half] += len(text)
            lengths[2] += 1
    return np.concatenate([counts, lengths])


def _hat(rows: Floats, folds: npt.NDArray[np.intp]) -> Floats:
    """(n, n) matrix that maps labels to out-of-fold ridge predictions.

    Ridge regression is linear in its labels, so all permutations share one matrix: 2,000 refits cost one.
    """
    n, width = rows.shape
    gram = rows @ rows.T / max(1, width)
    hat = np.zeros((n, n))
    for fold in np.unique(folds):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        inner = gram[np.ix_(train, train)] + _RIDGE * np.eye(len(train))
        weights = np.linalg.solve(inner, gram[np.ix_(train, test)]).T
        # The mean of the training labels is taken out, so that a fold's balance carries no signal.
        hat[np.ix_(test, train)] = weights - weights.mean(axis=1, keepdims=True)
    return hat


def _auc_within_folds(predictions: Floats, labels: npt.NDArray[np.bool_], folds: npt.NDArray[np.intp]) -> Floats:
    """(arrangements,) mean over folds of the AUC inside a fold, since different folds come from different fits.

    predictions, labels: (arrangements, n). Records with equal predictions count in the order given, which the caller
    has drawn at random.
    """
    total = np.zeros(len(predictions))
    used = np.zeros(len(predictions))
    for fold in np.unique(folds):
        values, inside = predictions[:, folds == fold], labels[:, folds == fold]
        ranks = values.argsort(axis=1, kind="stable").argsort(axis=1) + 1.0
        positives = inside.sum(axis=1)
        negatives = inside.shape[1] - positives
        ok = (positives > 0) & (negatives > 0)
        above = (ranks * inside).sum(axis=1) - positives * (positives + 1) / 2
        total[ok] += above[ok] / (positives * negatives)[ok]
        used[ok] += 1
    return np.where(used > 0, total / np.maximum(used, 1), 0.5)


def blind_baseline(
    units: Sequence[Unit],
    members: npt.ArrayLike,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> BlindBaseline | None:
    """Cross-validated ridge classifier on features of the records; None with fewer than 20 records.

    p-value: labels are permuted within kinds (given the number of heads in each kind, fair coins make all arrangements
    equally likely), the whole procedure is repeated, and p = (1 + arrangements at least as good) / (1 + all), which is
    exact at any sample size. units, members (booleans), kinds: one a record.
    """
    labels = np.asarray(members, dtype=bool)
    if len(units) < LEAST or not 0 < labels.sum() < len(labels):
        return None
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(units))[:MOST]
    units, labels = [units[index] for index in chosen], labels[chosen]
    groups = np.asarray(kinds)[chosen] if kinds is not None else np.zeros(len(chosen), dtype=np.int64)
    folds = rng.permutation(len(units)) % FOLDS
    hat = _hat(features(units), folds)
    shuffled = np.tile(labels, (PERMUTATIONS, 1))
    for group in np.unique(groups):
        mine = np.flatnonzero(groups == group)
        shuffled[:, mine] = rng.permuted(shuffled[:, mine], axis=1)
    everything = np.concatenate([labels[None], shuffled])
    areas = _auc_within_folds(everything.astype(np.float64) @ hat.T, everything, folds)
    observed = float(areas[0])
    at_least = int((areas[1:] >= observed - 1e-12).sum())
    low, high = auc_interval(observed, int(labels.sum()), int((~labels).sum()))
    return BlindBaseline(observed, low, high, (1 + at_least) / (1 + PERMUTATIONS), len(units))
