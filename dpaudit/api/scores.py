"""`dpaudit.Scores`: from score arrays to bounds, the test of a claim and plots, by the code behind `dpaudit scores`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpaudit import extras, validate, verdict
from dpaudit.analysis import tables
from dpaudit.analysis.scores import Coins, Options, analyse, control_without_coins
from dpaudit.analysis.tables import Columns, ScoreTable
from dpaudit.api import html, plots
from dpaudit.api.claims import one_of
from dpaudit.api.curves import Tradeoff, limit_of
from dpaudit.api.results import Bound, ClaimTest, Estimate
from dpaudit.bounds import roc
from dpaudit.documents import Claim, ScoresDocument, ScoreSummary
from dpaudit.errors import InvalidGame, UsageError, rejected

COINS = ("independent", "half", "unknown")
OPENS = (
    "coins='independent' if each record was in or out by a fair toss of its own before training, or "
    "independent_runs=True if every row is a training of its own; without one of them nothing can be bounded"
)


class Scores:
    """Scores of records (higher = "was in training") and the coins that decided who was.

    scores, member: two vectors of one length (lists, arrays, Series, tensors); or one data frame or file (CSV, Parquet,
    .npz) with the columns id, member and score, or those named. in_scores, out_scores: members and non-members apart.
    coins: how membership was drawn: "independent" (a fair toss each, before training), "half" (exactly half) or
    "unknown"; a statement that no array can show. independent_runs: every row is a training of its own. separate:
    canaries act on separate directions of the noise (the owner vouches). features: (n, k), a data frame or a file, for
    the blind baseline. seed: breaks ties. Raises UsageError, one line that names what is wrong.

    >>> import numpy as np, dpaudit
    >>> rng = np.random.default_rng(0)
    >>> member = rng.random(1000) < 0.5
    >>> s = dpaudit.Scores(rng.normal(size=1000) + 2 * member, member, coins="independent")
    >>> s
    Scores: 473 in, 527 out, coins independent, AUC 0.915 (0.895 to 0.932 at 95 %)
    >>> round(float(s.epsilon(delta=1e-5)), 2)
    3.1
    >>> s.test(epsilon=0.5, delta=1e-5).verdict
    'refuted'
    """

    def __init__(
        self,
        scores: Any = None,
        member: Any = None,
        *,
        in_scores: Any = None,
        out_scores: Any = None,
        ids: Any = None,
        coins: Coins = "unknown",
        independent_runs: bool = False,
        separate: bool = False,
        features: Any = None,
        id_column: str = "id",
        member_column: str = "member",
        score_column: str = "score",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if coins not in COINS:
            raise rejected("coins", coins, COINS)
        columns = Columns(id_column, member_column, score_column)
        self._table = _table(scores, member, in_scores, out_scores, ids, columns)
        self.coins: Coins = coins
        self.independent_runs, self.separate = (
            _truth("independent_runs", independent_runs),
            _truth("separate", separate),
        )
        self._features = _features(features, self._table, id_column)
        self.seed = validate.count("seed", seed)
        self.name = name if name is not None else Path(scores).stem if isinstance(scores, str | Path) else "scores"
        self._documents: dict[Any, ScoresDocument] = {}

    # ---- what they prove

    def epsilon(self, delta: float = 1e-5, *, confidence: float = 0.95, method: str | None = None) -> Bound:
        """A lower bound on eps at `delta` that holds with `confidence`; printed with its ceiling.

        method None: the bound that was chosen beforehand and assumes nothing. Others ("mahloujifar", "order-statistic";
        "gdp", "bayes" for independent runs) inform: the best of several is no bound at this confidence. Raises
        InvalidGame for an unsound game, UsageError where nothing says how coins fell.

        >>> import numpy as np, dpaudit
        >>> rng = np.random.default_rng(1)
        >>> member = rng.random(500) < 0.5
        >>> s = dpaudit.Scores(rng.normal(size=500) + 2 * member, member, coins="independent")
        >>> bound = s.epsilon(delta=1e-5)
        >>> bound.method, bound.confidence, bound.value < bound.ceiling
        ('steinke', 0.95, True)
        """
        document = self._sound(delta, confidence)
        bounds = {test.bound: test for test in document.tests if test.epsilon_lower is not None}
        if not bounds:
            raise UsageError(f"coins: got {self.coins!r}; accepted: {OPENS}")
        if method is None:
            best, sure = verdict.headline(document), verdict.headline_confidence(document)
            if best is not None and sure is not None:
                return Bound.of(best, sure)
        elif method in bounds:
            return Bound.of(bounds[method], bounds[method].confidence)
        raise rejected("method", method, tuple(bounds))

    def bounds(self, delta: float = 1e-5, *, confidence: float = 0.95) -> pd.DataFrame:
        """Every bound that these scores allow, a row each; `decides` marks the one that was chosen beforehand.

        >>> import numpy as np, dpaudit
        >>> rng = np.random.default_rng(1)
        >>> member = rng.random(500) < 0.5
        >>> s = dpaudit.Scores(rng.normal(size=500) + 2 * member, member, coins="independent")
        >>> list(s.bounds().index)
        ['steinke', 'mahloujifar', 'order-statistic']
        """
        document = self._sound(delta, confidence)
        rows = [
            {
                "method": test.bound,
                "epsilon_lower": float(test.epsilon_lower),
                "ceiling": float(test.ceiling or 0.0),
                "assumes": test.assumes,
                "confidence": test.confidence,
                "decides": test.decides and not test.estimate,
            }
            for test in document.tests
            if test.epsilon_lower is not None
        ]
        if not rows:
            raise UsageError(f"coins: got {self.coins!r}; accepted: {OPENS}")
        return pd.DataFrame(rows).set_index("method")

    def test(
        self,
        claim: Claim | None = None,
        *,
        epsilon: float | None = None,
        delta: float = 1e-5,
        sigma: float | None = None,
        rate: float | None = None,
        steps: int | None = None,
        alpha: float = 0.001,
        control: "Scores | None" = None,
    ) -> ClaimTest:
        """Do the scores contradict a claim: (eps, delta), or the mechanism (sigma, rate, steps) itself?

        control: scores of the same kind from a game with a known leak. It earns the power without which the verdict is
        never "not refuted". An unsound game (a turned sign, coins that are not fair) is "invalid", with no p-value.

        >>> import numpy as np, dpaudit
        >>> rng = np.random.default_rng(2)
        >>> member = rng.random(1000) < 0.5
        >>> def game(mu): return dpaudit.Scores(rng.normal(size=1000) + mu * member, member, coins="independent",
        ...                                     separate=True)
        >>> honest = game(1.0)
        >>> honest.test(sigma=1, rate=1, steps=1).verdict
        'inconclusive'
        >>> honest.test(sigma=1, rate=1, steps=1, control=game(2.0)).verdict
        'not refuted'
        >>> game(2.0).test(sigma=1, rate=1, steps=1).verdict
        'refuted'
        """
        found = one_of(claim, epsilon=epsilon, delta=delta, sigma=sigma, rate=rate, steps=steps)
        if found is None:
            raise UsageError("test: nothing is claimed; accepted: epsilon, or sigma, rate and steps, or a claim")
        if control is not None and not isinstance(control, Scores):
            raise rejected("control", type(control).__name__, "dpaudit.Scores of a game with a known leak")
        return ClaimTest(found, self.document(found.delta, claim=found, alpha=alpha, control=control))

    def document(
        self,
        delta: float = 1e-5,
        *,
        claim: Claim | None = None,
        confidence: float = 0.95,
        alpha: float = 0.001,
        control: "Scores | None" = None,
    ) -> ScoresDocument:
        """All of it, as `dpaudit scores --json` prints it; never raises for an unsound game, which it describes.

        >>> import dpaudit
        >>> dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).document().verdict
        'no claim'
        """
        if claim is not None and claim.relation == "replace":
            raise UsageError("claim.relation: got 'replace'; accepted: add-remove or zero-out, since coins decide "
                             "whether a record is there")  # fmt: skip
        options = Options(
            delta=validate.delta(delta),
            confidence=validate.confidence(confidence),
            alpha=validate.real("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True),
            coins=self.coins,
            independent_runs=self.independent_runs,
            separate=self.separate,
            claim=claim,
            seed=self.seed,
            name=self.name,
        )
        if control is not None and self.independent_runs and self.coins != "independent":
            raise UsageError(control_without_coins("control", "independent_runs=True", 'coins="independent"'))
        key = (options, control)
        if key not in self._documents:
            leak = None if control is None else control._table
            self._documents[key] = analyse(self._table, options, features=self._features, control=leak)
        return self._documents[key]

    # ---- what they show

    def auc(self) -> Estimate:
        """P[score of a member > score of a non-member], ties one half, with its 95 % interval. Raises InvalidGame.

        >>> import dpaudit
        >>> float(dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).auc())
        0.875
        """
        found = self._summary()
        return Estimate(found.auc, found.auc_low or 0.0, found.auc_high or 1.0, 0.95, "AUC")

    def tpr(self, fpr: float, *, confidence: float = 0.95) -> Estimate:
        """TPR at the largest FPR not above `fpr`, with its exact interval. Raises UsageError for too small an FPR.

        >>> import dpaudit
        >>> dpaudit.Scores(in_scores=range(100, 400), out_scores=range(200)).tpr(0.1)
        0.733 (0.679 to 0.783 at 95 %)
        """
        self._sound(1e-5, 0.95)
        wanted = validate.real("fpr", fpr, low=0.0, high=1.0, open_low=True)
        n_in, n_out = self._counts()
        curve = roc.curve(self._table.scores, self._table.members)
        point = roc.tpr_at(*curve, wanted, n_in=n_in, n_out=n_out, confidence=confidence)
        if point is None:
            least = roc.LEAST_FALSE_POSITIVES / n_out
            raise rejected("fpr", fpr, f"at least {least:.3g} with {n_out} non-members ({roc.LEAST_FALSE_POSITIVES} of "
                           "them beyond the threshold)")  # fmt: skip
        assert point.tpr_low is not None and point.tpr_high is not None
        return Estimate(point.tpr, point.tpr_low, point.tpr_high, confidence, f"TPR at FPR {point.fpr:g}")

    def plot_roc(self, ax: Any | None = None, *, claim: Claim | Tradeoff | None = None, log: bool = False) -> Any:
        """ROC with a simultaneous 95 % band, on a matplotlib axis (default: that of a new figure); returns the axis.

        claim: draws the most that it allows an attack on one record. log: both axes, for small FPR. Several
        scores go on one axis, each under its `name`.

        >>> import dpaudit
        >>> dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).plot_roc().get_xlabel()
        'false positive rate'
        """
        return plots.roc(ax, self._summary(), limit_of(claim), log)

    def plot_scores(self, ax: Any | None = None) -> Any:
        """Histograms of members' and non-members' scores, on a matplotlib axis; returns the axis.

        >>> import dpaudit
        >>> dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).plot_scores().get_ylabel()
        'density'
        """
        return plots.histogram(ax, self._summary())

    # ---- inside

    def _sound(self, delta: float, confidence: float) -> ScoresDocument:
        document = self.document(delta, confidence=confidence)
        if not document.validity.sound:
            failed = [check for check in document.validity.checks if check.status == "fail"]
            why = "; ".join(f"{check.name}: {check.measured}. {check.explanation}" for check in failed)
            raise InvalidGame(f"the game is invalid, so its numbers mean nothing: {why}")
        return document

    def _summary(self) -> ScoreSummary:
        return self._sound(1e-5, 0.95).scores[0]

    def _counts(self) -> tuple[int, int]:
        n_in = int(self._table.members.sum())
        return n_in, self._table.members.size - n_in

    def __len__(self) -> int:
        return self._table.scores.size

    def __repr__(self) -> str:
        return f"Scores: {self._about()}"

    def _about(self) -> str:
        n_in, n_out = self._counts()
        try:
            shown = f"AUC {self.auc()!r}"
        except InvalidGame as error:
            shown = str(error)
        runs = ", independent runs" if self.independent_runs else ""
        return f"{n_in} in, {n_out} out, coins {self.coins}{runs}, {shown}"

    def _repr_html_(self) -> str:
        n_in, n_out = self._counts()
        rows = {"records": f"{n_in} in, {n_out} out", "coins": self.coins}
        checks = {check.name: f"{check.status}: {check.measured}" for check in self.document().validity.checks}
        try:
            rows["AUC"] = repr(self.auc())
        except InvalidGame as error:
            return html.verdict("Scores", "invalid", rows | checks, [str(error)])
        return html.table("Scores", rows | checks)


def _table(scores: Any, member: Any, in_scores: Any, out_scores: Any, ids: Any, columns: Columns) -> ScoreTable:
    """Whatever was given, checked."""
    if in_scores is not None or out_scores is not None:
        if in_scores is None or out_scores is None or scores is not None or member is not None:
            raise UsageError("in_scores, out_scores: belong together, and to no scores or member")
        inside, outside = tables.vector("in_scores", in_scores), tables.vector("out_scores", out_scores)
        coins = np.repeat([True, False], [inside.size, outside.size])
        return tables.from_arrays(np.concatenate([inside, outside]), coins, ids)
    if scores is None:
        raise UsageError("scores: missing; accepted: scores and member, in_scores= and out_scores=, a data frame or a "
                         "file")  # fmt: skip
    if isinstance(scores, str | Path | pd.DataFrame):
        for field, value in (("member", member), ("ids", ids)):
            if value is not None:
                raise UsageError(f"{field}: given beside a table; name its column by {field.removesuffix('s')}_column=")
        if isinstance(scores, pd.DataFrame):
            return tables.from_frame(tables.with_id(scores, columns.id), columns, where="data frame")
        with extras.named("scores"):
            return tables.read_scores(Path(scores), columns)
    if member is None:
        raise UsageError("member: missing; accepted: one truth value (or 0, 1) a score")
    if isinstance(scores, pd.Series) and isinstance(member, pd.Series) and not scores.index.equals(member.index):
        raise UsageError("member: its index is not that of scores; accepted: the same rows in the same order (join "
                         "them by id, or pass .to_numpy() of both)")  # fmt: skip
    return tables.from_arrays(scores, member, ids)


def _features(features: Any, table: ScoreTable, name: str) -> npt.NDArray[np.float64] | None:
    """(n, k) in the order of the scores."""
    if features is None:
        return None
    if isinstance(features, str | Path):
        with extras.named("scores"):
            return tables.read_features(Path(features), table.ids, name)
    if isinstance(features, pd.DataFrame):
        return tables.features_of(tables.with_id(features, name), table.ids, name)
    values = _floats(lambda: np.asarray(features, dtype=np.float64))
    if values is None or values.ndim != 2 or len(values) != table.scores.size or not np.isfinite(values).all():
        shape = "no numbers" if values is None else f"shape {values.shape}"
        raise UsageError(f"features: got {shape}; accepted: finite numbers, ({table.scores.size}, k)")
    return values


def _floats(read: Callable[[], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64] | None:
    try:
        return read()
    except (ValueError, TypeError, RuntimeError):
        return None


def _truth(field: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise rejected(field, value, "True or False")
    return bool(value)
