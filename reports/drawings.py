"""All drawings of a page, made before its style sheet is hashed."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dpaudit import verdict
from dpaudit.documents import ABOUT, GameDocument, Metric, RocPoint, ScoreSummary
from reports import allowed, figures, rates, utility
from reports.diagram import diagram
from reports.evidence import Step, growth
from reports.games import game_rows, log_threshold, mechanism, score_summaries
from reports.inputs import Curve, RunReport
from reports.subjects import Page, SweepReport
from reports.sweep.document import Averaged

MOST_CURVES = 8
MOST_GAMES = 4


@dataclass(frozen=True)
class ScoreFigures:
    """The figures of a game and the numbers of their data tables. spoken: what they speak of, in words; claimed, shown:
    whether the curves of the claim and of the evidence are drawn."""

    summary: ScoreSummary
    histogram: Markup
    tradeoff: Markup
    roc: Markup
    bins: tuple[tuple[float, float, int, int], ...]
    banded: bool
    spoken: str
    claimed: bool
    shown: bool

    def points(self, most: int) -> tuple[RocPoint, ...]:
        """At most about `most` points of the curve, evenly thinned; the page's JSON has all."""
        return self.summary.roc[:: max(1, math.ceil(len(self.summary.roc) / most))]


@dataclass(frozen=True)
class Frontier:
    """One frontier: the drawing, its points, and the legend as (mark, name, letters)."""

    title: str
    measure: str
    svg: Markup
    points: tuple[figures.FrontierPoint, ...]
    names: dict[str, str]
    legend: tuple[tuple[Markup, str, str], ...]
    base: Metric | None
    of_sweep: bool


@dataclass(frozen=True)
class Drawings:
    """By run letter; frontiers in the order of the page."""

    diagrams: dict[str, Markup]
    growth: dict[str, Markup]
    scores: dict[str, tuple[ScoreFigures, ...]]
    frontiers: tuple[Frontier, ...]
    curves: dict[str, tuple[tuple[Curve, Markup], ...]]


def draw(page: Page, tables: Sequence[utility.TaskTable]) -> Drawings:
    """Every figure of a page; drawing takes most of a page's time, so a page that leaves some out uses these again."""
    diagrams, grown, scores, curves = {}, {}, {}, {}
    for run in page.described:
        if run.ledger:
            diagrams[run.key] = diagram(run.config, run.claim, run.ledger, key=f"flow-{run.key.lower()}")
    for run in page.runs:
        key = run.key.lower()
        if run.audit is not None and run.claim is not None:
            steps = [
                Step(row.entry.name, row.entry.log_product, row.entry.about == "procedure") for row in game_rows(run)
            ]
            grown[run.key] = growth(steps, log_threshold(run.audit), key=f"growth-{key}")
        if run.audit is not None and run.audit.scores:
            scores[run.key] = tuple(
                _score_figures(run, summary, game, f"{key}-{index}")
                for index, (summary, game) in enumerate(score_summaries(run)[:MOST_GAMES])
            )
        if run.curves:
            curves[run.key] = tuple(
                (data, figures.curve(data, key=f"curve-{key}-{index}"))
                for index, data in enumerate(run.curves[:MOST_CURVES])
            )
    frontiers = [_runs_frontier(page.runs, table, index) for index, table in enumerate(tables)]
    frontiers += [_sweep_frontier(sweep, index) for index, sweep in enumerate(page.sweeps)]
    return Drawings(diagrams, grown, scores, tuple(found for found in frontiers if found is not None), curves)


def _score_figures(run: RunReport, summary: ScoreSummary, game: GameDocument | None, key: str) -> ScoreFigures:
    claim = game.claim if game is not None else run.claim
    theirs = game.tests if game is not None else run.audit.tests if run.audit is not None else ()
    shown = allowed.shown_event(claim, verdict.best_within(theirs))
    return ScoreFigures(
        summary=summary,
        histogram=rates.histogram(summary, key=f"scores-{key}"),
        tradeoff=rates.tradeoff(summary, claim, shown, key=f"tradeoff-{key}"),
        roc=rates.roc(summary, claim, shown, key=f"roc-{key}"),
        bins=tuple(zip(summary.edges, summary.edges[1:], summary.counts_in, summary.counts_out, strict=False)),
        banded=any(point.tpr_low is not None and point.tpr_high is not None for point in summary.roc),
        spoken="" if game is None else f" (game {game.name}: {ABOUT[game.about]}; {mechanism(claim)})",
        claimed=claim is not None,
        shown=shown is not None,
    )


def _runs_frontier(runs: Sequence[RunReport], table: utility.TaskTable, index: int) -> Frontier | None:
    points = utility.frontier_points(runs, table)
    if not points:
        return None
    names = {run.key: run.name for run in runs}
    measure = re.sub(r"[^\w ]", "", table.headline.replace("_", " "))[:40]  # a label must not become a formula
    drawing = figures.frontier(points, table.base, measure=measure, key=f"frontier-{index}")
    legend = tuple((figures.legend_mark(place), names[p.key], p.key) for place, p in enumerate(points))
    return Frontier(f"Task {table.task}", measure, drawing, points, names, legend, table.base, False)


def _sweep_frontier(sweep: SweepReport, index: int) -> Frontier | None:
    """One point a configuration; those that differ in the grid's values alone are joined and share colour and mark."""
    points = []
    base: Metric | None = None
    for line in sweep.lines:
        row = line.row
        if row.exact_match is None:
            continue
        if row.method is None:
            base = _metric(row.exact_match)
            continue
        cells = [c for c in sweep.document.cells if c.configuration == row.configuration]
        audited = tuple(cell.epsilon_lower for cell in cells if cell.epsilon_lower is not None)
        claimed = row.epsilon if row.epsilon is not None else math.inf
        points.append(figures.FrontierPoint(line.key, claimed, audited, _metric(row.exact_match), row.series))
    if not points:
        return None
    series = list(dict.fromkeys(point.series for point in points))
    drawing = figures.frontier(points, base, key=f"sweep-{index}")
    legend = tuple(
        (figures.legend_mark(place), name, " ".join(p.key for p in points if p.series == name))
        for place, name in enumerate(series)
    )
    names = {line.key: line.row.configuration for line in sweep.lines}
    return Frontier(f"Sweep {sweep.name}", "exact match", drawing, tuple(points), names, legend, base, True)


def _metric(averaged: Averaged) -> Metric:
    fields: dict[str, Any] = {name: getattr(averaged, name) for name in ("value", "low", "high", "n", "pictures")}
    return Metric(**fields)
