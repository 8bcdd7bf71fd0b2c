"""Figures and sentences against formulas."""

import math
import re
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpaudit.accounting import gaussian_epsilon
from dpaudit.documents import LedgerRow, Metric
from reports.diagram import boxes, diagram, evidence_bar, scale_top, stage_rows, worst
from reports.figures import FrontierPoint, allowed_tpr, frontier, histogram, roc
from reports.prose import best_guess, ceiling_note, group_sentence, stated_guess
from reports.svg import StyleSheet
from tests.reports.fixtures import audit, claim, config, ledger_rows, score_summary


@given(st.floats(0.01, 12), st.floats(0, 1))
def test_allowed_rates_obey_both_inequalities_with_equality_in_one(epsilon: float, fpr: float) -> None:
    delta = 1e-5
    tpr = allowed_tpr(fpr, epsilon, delta)
    assert 0 <= tpr <= 1
    assert tpr <= math.exp(epsilon) * fpr + delta + 1e-12
    assert 1 - fpr <= math.exp(epsilon) * (1 - tpr) + delta + 1e-9
    tight = min(math.exp(epsilon) * fpr + delta, 1 - math.exp(-epsilon) * max(1 - fpr - delta, 0.0), 1.0)
    assert tpr == pytest.approx(tight)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
def test_best_guess_is_the_maximum_over_the_curve(epsilon: float) -> None:
    delta = 1e-5
    grid = [i / 20000 for i in range(20001)]
    best = max((1 + allowed_tpr(fpr, epsilon, delta) - fpr) / 2 for fpr in grid)
    assert best <= stated_guess(epsilon, delta) + 1e-12
    assert best == pytest.approx(stated_guess(epsilon, delta), abs=5e-4)
    assert stated_guess(0.0, 0.0) == 0.5 and stated_guess(math.inf, 1e-5) == 1.0


def test_a_guess_follows_from_the_mechanism_and_never_exceeds_eps_and_delta() -> None:
    full = claim().model_copy(update={"sampling": "full", "sample_rate": None, "steps": 4, "noise_multiplier": 2.0})
    assert best_guess(full) == pytest.approx(NormalDist().cdf(0.5))  # one Gaussian with mu = sqrt(4) / 2
    small = full.model_copy(update={"epsilon": 0.5})
    assert best_guess(small) == stated_guess(0.5, 1e-5) < best_guess(full)
    unknown = full.model_copy(update={"noise_multiplier": None})
    assert best_guess(unknown) == stated_guess(8.0, 1e-5)
    tokens = full.model_copy(update={"token_multiplier": 1.0})  # sigma alone does not cover what is published
    assert best_guess(tokens) == stated_guess(8.0, 1e-5)


def test_several_units_cost_more_than_their_number_times_eps() -> None:
    full = claim().model_copy(
        update={"sampling": "full", "sample_rate": None, "steps": 4, "noise_multiplier": 2.0, "epsilon": 4.377}
    )
    said = group_sentence(full)
    figures = [float(value) for value in re.findall(r"\d cost eps up to (\d+(?:\.\d+)?)", said)]
    assert figures == pytest.approx([gaussian_epsilon(float(k), 1e-5) for k in (2, 3, 5)], rel=5e-3)
    assert all(value > k * 4.377 for value, k in zip(figures, (2, 3, 5), strict=True)) and "by the mechanism" in said
    alone = group_sentence(full.model_copy(update={"noise_multiplier": None, "epsilon": 1.0}))
    assert "by the group lemma" in alone and "2 cost eps up to 2, at delta = 3.72e-5 only" in alone  # 1 + e
    assert "nothing useful is known for 5" in group_sentence(full.model_copy(update={"noise_multiplier": None}))


TEXT = re.compile(r'<text[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>')


def test_histogram_is_drawn_to_its_own_scale() -> None:
    """Read back from the drawing: the outline is as tall as the fullest bin's share on the axis' own ticks."""
    summary = score_summary("s", 1.0)
    styles = StyleSheet()
    svg = str(histogram(summary, key="h", styles=styles))
    assert svg.startswith("<svg") and "<title" in svg and "<desc" in svg and " style=" not in svg
    assert svg == str(histogram(summary, key="h", styles=StyleSheet()))
    numbers = [(float(x), float(y), float(t.replace("−", "-"))) for x, y, t in TEXT.findall(svg) if t[-1].isdigit()]
    column = min(x for x, _, _ in numbers)
    ticks = sorted((value, y) for x, y, value in numbers if x == column)
    pixels = (ticks[0][1] - ticks[-1][1]) / (ticks[-1][0] - ticks[0][0])  # per cent point
    name = next(name for text, name in styles.classes.items() if "stroke:var(--in)" in text and "fill:none" in text)
    outline = max(re.findall(rf'<path[^>]*?d="([^"]+)"[^>]*class="{name}"', svg), key=len)
    heights = [float(y) for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", outline)]
    tallest = 100 * max(summary.counts_in) / summary.n_in
    assert (max(heights) - min(heights)) / pixels == pytest.approx(tallest, abs=0.15)


def test_two_figures_share_no_id_and_refer_to_their_own() -> None:
    styles = StyleSheet()
    summary = score_summary("s", 0.5)
    both = str(roc(summary, claim(), key="one", styles=styles)) + str(roc(summary, claim(), key="two", styles=styles))
    ids = re.findall(r'\sid="([^"]+)"', both)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', both)) <= set(ids)
    used = set(re.findall(r'class="(v\d+)"', both))
    assert used <= set(styles.classes.values())
    assert "#" not in re.sub(r"url\(#|var\(", "", styles.css())  # every colour is a variable of the page


def test_frontier_draws_every_run_and_no_claim_at_the_right() -> None:
    metric = Metric(value=0.8, low=0.7, high=0.9, n=10)
    points = [FrontierPoint("A", math.inf, (3.0,), metric, "A"), FrontierPoint("B", 8.0, (0.0,), metric, "B")]
    svg = str(frontier(points, metric, key="f", styles=StyleSheet()))
    text = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"A", "B", "no claim", "8"} <= set(text)
    place = {label: float(x) for x, _, label in TEXT.findall(svg)}
    assert place["A"] == pytest.approx(place["no claim"], abs=0.2)  # a mark's letter stands over its tick
    assert place["B"] == pytest.approx(place["8"], abs=0.2)
    assert place["0"] < place["1"] < place["3"] < place["8"] < place["no claim"]
    unit = place["1"] - place["0"]  # log2(1 + eps)
    assert place["8"] - place["0"] == pytest.approx(math.log2(9) * unit, abs=0.5)
    lonely = str(frontier([FrontierPoint("A", math.inf, (), metric, "A")], None, key="g", styles=StyleSheet()))
    assert "no claim" in lonely


def test_rows_find_their_arrow() -> None:
    def row(path: str, stage: str | None, status: str = "accounted") -> LedgerRow:
        told = {"path": path, "stage": stage, "status": status, "explanation": "e", "evidence": "v"}
        return LedgerRow.model_validate(told)

    stages = stage_rows(
        [
            row("gradients", "gradients"),
            row("token pruning and fusion", "token reduction", "per-example preprocessing"),
            row("fusion noise", "fusion noise", "per-example preprocessing"),
            row("gradient-update pruning", "gradient pruning", "post-processing"),
            row("canaries", "canaries"),
            row("planted fault", "gradients", "UNACCOUNTED"),
            row("size of the training set", "data size"),
            row("gradients of the tokenizer", None, "UNACCOUNTED"),  # a name decides nothing
        ]
    )
    assert [r.path for r in stages["fusion"]] == ["token pruning and fusion", "fusion noise"]
    assert [r.path for r in stages["update"]] == ["gradient-update pruning"]
    assert [r.path for r in stages["gradients"]] == ["gradients", "canaries", "planted fault"]
    assert [r.path for r in stages["other"]] == ["size of the training set", "gradients of the tokenizer"]
    assert worst(stages["gradients"]) == "UNACCOUNTED" and worst(()) is None


def test_diagram_tells_private_from_protected_and_shows_a_bypass() -> None:
    dp = boxes(config("dual-priv"), claim(), ledger_rows("dual-priv"))
    assert [box.private for box in dp] == [True] * 5 + [False] * 3
    assert [box.status for box in dp if box.status] == [
        "per-example preprocessing",
        "accounted",
        "post-processing",
        "post-processing",
    ]
    plain = boxes(config("non-private"), None, ledger_rows("non-private"))
    assert all(box.private for box in plain) and {box.status for box in plain[4:7]} == {"UNACCOUNTED"}
    bad = LedgerRow(path="vocabulary <b>", status="UNACCOUNTED", explanation="e", evidence="v")
    drawn = str(diagram(config("dp-sgd"), claim(), (*ledger_rows("dp-sgd"), bad), key="d"))
    assert "UNACCOUNTED: vocabulary &lt;b&gt;" in drawn and "Around the noise" in drawn
    assert "Around the noise" not in str(diagram(config("dp-sgd"), claim(), ledger_rows("dp-sgd"), key="d"))
    silent = boxes(config("dual-priv"), claim(), ())
    assert silent[2].status == "missing"  # a reducer that the ledger does not mention


def test_evidence_bar_is_to_scale() -> None:
    test = audit("dual-priv").tests[0]
    top = scale_top([(test, claim())])
    bar = str(evidence_bar(test, claim(), top))
    ends = [float(x) for x in re.findall(r'class="(?:reach|found)" d="M4 10H([\d.]+)', bar)]
    mark = float(re.findall(r'class="mark" d="M([\d.]+)', bar)[0])
    scale = [4 + 192 * math.log2(1 + eps) / math.log2(1 + top) for eps in (3.66, 0.12, 8.0)]
    assert [*ends, mark] == pytest.approx(scale, abs=0.06)


def test_ceiling_notes() -> None:
    test = audit("non-private").tests[0]
    assert "more canaries needed" in (ceiling_note(test, None) or "")
    low = test.model_copy(update={"epsilon_lower": 1.0})
    assert ceiling_note(low, None) is None
    assert "cannot check 8" in (ceiling_note(low, claim()) or "")
    assert ceiling_note(low, claim(2.0)) is None
    assert ceiling_note(low.model_copy(update={"epsilon_lower": None}), claim()) is None
