"""Which attack may speak: chosen on one half of the records, reporting on the other.

The best of many attacks on the records that report it is no bound. Here a random half of the records, fixed by a seed
that was hashed with the coins, is for development: its coins may be looked at as often as one likes, to compare attacks
and to fit a combination of them. The other half is untouched by the choice, its coins stay fair and independent given
those of the first, and the number of guesses on it is fixed beforehand. So its bound keeps its confidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.canaries import Plan
from attacks.membership.members import KIND, member_plan
from attacks.scores import standardise
from dpaudit.bounds.roc import auc, curve

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

COMBINED = "combined"
COMBINE_FROM = 100  # development records; with fewer a fitted combination is mostly noise
FOLDS = 5
STRENGTH = 0.05  # of scikit-learn's C: strong ridge, since attacks are many and much alike
CUT = 5.0  # robust standard deviations: one absurd score must not steer the fit


@dataclass(frozen=True)
class Choice:
    """name: of the attack that reports. scores (m,): its scores of all records, only those of the report half count.
    development (m,): the half that chose. auc: of each attack on that half."""

    name: str
    scores: Floats
    development: Bools
    auc: dict[str, float]


def halves(count: int, seed: int) -> Bools:
    """(count,) True for the development half: a random half, a function of the seed alone."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng([seed, count]).permutation(count)[: count // 2]] = True
    return chosen


def on_common_scale(scores: Floats, kinds: npt.NDArray[np.str_]) -> Floats:
    """(m,) scores in robust standard deviations of their kind, cut at five."""
    return np.clip(standardise(pd.DataFrame({"score": scores, "kind": kinds})), -CUT, CUT)


def area(scores: Floats, members: Bools) -> float:
    """AUC; one half when a class is empty."""
    if not 0 < members.sum() < members.size:
        return 0.5
    return auc(*curve(scores, members))


def choose(
    scores: Mapping[str, Floats], members: Bools, kinds: npt.NDArray[np.str_], *, seed: int, default: str
) -> Choice:
    """The attack with the largest AUC on the development half, the fitted combination among them.

    scores: (m,) for each attack. members: the coins, of which only those of the development half are used. default:
    wins ties, and stands alone when the development half holds one class only.
    """
    development = halves(len(members), seed)
    scaled = {name: on_common_scale(value, kinds) for name, value in scores.items()}
    labels = members[development]
    if not 0 < labels.sum() < labels.size:
        return Choice(default, scaled[default], development, {})
    found = {name: area(value[development], labels) for name, value in scaled.items()}
    if development.sum() >= COMBINE_FROM and len(scaled) > 1 and min(labels.sum(), (~labels).sum()) >= FOLDS:
        columns = np.stack(list(scaled.values()), axis=1)
        found[COMBINED], scaled[COMBINED] = _combine(columns, members, development, seed)
    best = max(found, key=lambda name: (found[name], name == default))
    return Choice(best, scaled[best], development, found)


def _combine(columns: Floats, members: Bools, development: Bools, seed: int) -> tuple[float, Floats]:
    """Logistic regression of the development half's coins on all attacks: its out-of-fold AUC there, and everybody's
    scores under the fit on the whole half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LogisticRegression(C=STRENGTH, max_iter=500)
    inside, x = members[development], columns[development]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**31)
    held_out = cross_val_predict(model, x, inside, cv=folds, method="decision_function")
    return area(held_out, inside), model.fit(x, inside).decision_function(columns)


def report_plan(kinds: npt.NDArray[np.str_], tie_seed: int) -> Plan:
    """Guesses on a report half with these kinds: a function of how many records of each kind it holds.

    Real records follow the one-run bound's own optimum, canaries the shares of their kind (attacks.canaries.GUESSED).
    """
    sizes = {str(kind): int((kinds == kind).sum()) for kind in dict.fromkeys(kinds.tolist())}
    if set(sizes) == {KIND}:
        return member_plan(sizes[KIND], tie_seed)
    return Plan.default(sizes, tie_seed)
