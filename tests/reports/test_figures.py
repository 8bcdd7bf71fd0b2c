"""Figures and sentences against formulas."""

import math
import re
from itertools import pairwise
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpaudit.accounting import epsilon, gaussian_epsilon, stated_largest_tpr
from dpaudit.documents import LedgerRow, Metric
from reports.allowed import best_guess, shown_event, stated_guess
from reports.diagram import boxes, diagram, stage_rows, worst
from reports.evidence import Row, Step, axis, growth, guess_bar, scale_top
from reports.figures import FrontierPoint, curve, frontier
from reports.inputs import Curve
from reports.plot import _path, _thinned, decades, linear
from reports.prose import ceiling_note, group_sentence
from reports.rates import histogram, tradeoff
from tests.reports.fixtures import audit, claim, claim_test, config, ledger_rows, score_summary


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0, 8.0])
def test_best_guess_is_the_maximum_over_the_curve(eps: float) -> None:
    delta = 1e-5
    grid = [i / 20000 for i in range(20001)]
    rates = stated_largest_tpr(eps, delta, grid)
    best = max((1 + float(tpr) - fpr) / 2 for fpr, tpr in zip(grid, rates, strict=True))
    assert best <= stated_guess(eps, delta) + 1e-12
    assert best == pytest.approx(stated_guess(eps, delta), abs=5e-4)
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


def frame(svg: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Ticks of a plot as (value, pixel): of x, and of y."""
    found = {}
    for kind, content in re.findall(r'<g text-anchor="(middle|end)">(.*?)</g>', svg):
        texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', content)
        found[kind] = [(float(x), float(y), float(text.replace("−", "-"))) for x, y, text in texts]
    return [(value, x) for x, _, value in found["middle"]], [(value, y - 3.5) for _, y, value in found["end"]]


def pixels(svg: str, kind: str) -> list[tuple[float, float]]:
    """Corners of a line as they are drawn."""
    drawn = re.findall(rf'<path class="line k-{kind}" d="([^"]+)"/>', svg)[0]
    return walk(drawn)


def walk(drawn: str) -> list[tuple[float, float]]:
    """The points of a path: one absolute start, then relative steps."""
    found: list[tuple[float, float]] = []
    for command, text in re.findall(r"([MhvlZ])([^MhvlZ]*)", drawn):
        numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", text)]
        if command == "M":
            found.append((numbers[0], numbers[1]))
        steps = {"h": [(n, 0.0) for n in numbers], "v": [(0.0, n) for n in numbers], "M": [], "Z": []}
        for across, up in steps.get(command, list(zip(numbers[::2], numbers[1::2], strict=False))):
            found.append((found[-1][0] + across, found[-1][1] + up))
    return found


def value_at(pixel: float, ticks: list[tuple[float, float]]) -> float:
    """Read a linear axis at a pixel, by its first and last ticks."""
    (low, first), (high, last) = ticks[0], ticks[-1]
    return low + (high - low) * (pixel - first) / (last - first)


def test_histogram_is_drawn_to_its_own_scale() -> None:
    """Read back from the drawing: the outline is as tall as the fullest bin's share on the axis' own ticks."""
    summary = score_summary("s", 1.0)
    svg = str(histogram(summary, key="h"))
    assert svg.startswith("<svg") and "<title" in svg and "<desc" in svg and " style=" not in svg
    assert svg == str(histogram(summary, key="h")) and f"in (n = {summary.n_in})" in svg
    across, up = frame(svg)
    outline = pixels(svg, "in")
    assert value_at(min(y for _, y in outline), up) == pytest.approx(100 * max(summary.counts_in) / 150, abs=0.15)
    assert value_at(outline[0][0], across) == pytest.approx(summary.edges[0], abs=0.03)
    assert value_at(outline[-1][0], across) == pytest.approx(summary.edges[-1], abs=0.03)


def test_the_claims_curve_is_the_mechanisms_and_the_attack_its_own() -> None:
    """One Gaussian: type II = Phi(z - mu) where type I = Phi(-z); read back from the drawing."""
    full = claim().model_copy(update={"sampling": "full", "sample_rate": None, "steps": 4, "noise_multiplier": 2.0})
    summary, normal = score_summary("s", 1.0), NormalDist()
    svg = str(tradeoff(summary, full, None, key="t"))
    across, up = frame(svg)
    for x, y in pixels(svg, "claim")[1:-1]:
        first, second = value_at(x, across), value_at(y, up)
        if 0.02 < first < 0.98:
            assert second == pytest.approx(normal.cdf(-normal.inv_cdf(first) - 1.0), abs=0.02)
    points = {(round(point.fpr, 2), round(1 - point.tpr, 2)) for point in summary.roc}
    drawn = [(value_at(x, across), value_at(y, up)) for x, y in pixels(svg, "attack")[::2]]
    assert all(min(abs(a - x) + abs(b - y) for a, b in points) < 0.02 for x, y in drawn)
    assert "evidence" not in svg
    sampled = claim()
    shown = shown_event(sampled, claim_test(assumes="dp-sgd(q,T)", epsilon_lower=4.0))
    assert shown is not None and epsilon(shown, 1e-5) == pytest.approx(4.0, rel=2e-3)
    assert "evidence" in str(tradeoff(summary, sampled, shown, key="t"))
    assert shown_event(sampled, claim_test(assumes="dp-sgd(q,T)", epsilon_lower=0.0)) is None


@given(
    st.lists(st.tuples(st.floats(0, 300), st.floats(-50, 250)), min_size=2, max_size=60),
    st.sampled_from([0, 1]),
)
def test_a_path_is_its_points_to_half_a_unit(points: list[tuple[float, float]], digits: int) -> None:
    """Every point lies on the drawn line within rounding, however long the path: steps are of rounded places."""
    drawn = walk(_path(points, digits))
    half = 0.51 * 10.0**-digits
    assert math.dist(drawn[0], points[0]) <= 2 * half and math.dist(drawn[-1], points[-1]) <= 2 * half
    pieces = list(pairwise(drawn)) or [(drawn[0], drawn[0])]
    for point in points:
        assert min(from_piece(point, one, two) for one, two in pieces) <= 1.5 * half


def from_piece(point: tuple[float, float], one: tuple[float, float], two: tuple[float, float]) -> float:
    """Distance of a point from a piece of a line."""
    along, up = two[0] - one[0], two[1] - one[1]
    square = along**2 + up**2
    share = (
        0.0 if square == 0 else min(1.0, max(0.0, ((point[0] - one[0]) * along + (point[1] - one[1]) * up) / square))
    )
    return math.hypot(point[0] - one[0] - share * along, point[1] - one[1] - share * up)


def test_a_thinned_curve_is_off_by_a_fifth_of_a_pixel_at_most() -> None:
    points = [(x / 4, 100 + 80 * math.sin(x / 90)) for x in range(1200)]
    kept = _thinned(points)
    assert kept[0] == points[0] and kept[-1] == points[-1] and len(kept) < 80
    pieces = list(pairwise(kept))
    assert max(min(from_piece(point, *piece) for piece in pieces) for point in points) <= 0.2 + 1e-9


def test_two_figures_share_no_id_and_bring_no_colour() -> None:
    metric = Metric(value=0.8, low=0.7, high=0.9, n=10)
    points = [FrontierPoint("A", 8.0, (3.0,), metric, "A")]
    both = "".join(str(frontier(points, metric, key=key)) for key in ("one", "two"))
    both += str(curve(Curve("loss", (1.0, 2.0, 3.0), (2.0, math.nan, 1.0)), key="three"))
    ids = re.findall(r'\sid="([^"]+)"', both)
    assert len(ids) == len(set(ids)) == 6
    assert " style=" not in both and "#" not in both and "fill=" not in both and "nan" not in both


def test_axes_have_round_ticks_within_their_ends() -> None:
    for low, high in ((0.0, 1.0), (-3.2, 4.7), (80.1, 97.3), (0.0, 1e-6), (5.0, 5.0)):
        ticks = linear("x", low, high).ticks
        assert len(ticks) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert linear("x", 0.0, 1.0).ticks == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert decades("x", 0.001).ticks == pytest.approx([0.001, 0.01, 0.1, 1.0])
    assert decades("x", 0.001).share(0.1) == pytest.approx(2 / 3) and decades("x", 0.001).share(0.0) == 0.0


def test_frontier_draws_every_run_and_no_claim_at_the_right() -> None:
    metric = Metric(value=0.8, low=0.7, high=0.9, n=10)
    points = [FrontierPoint("A", math.inf, (3.0,), metric, "A"), FrontierPoint("B", 8.0, (0.0,), metric, "B")]
    svg = str(frontier(points, metric, key="f"))
    text = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"A", "B", "no claim", "8"} <= set(text)
    place = {label: float(x) for x, _, label in TEXT.findall(svg)}
    assert place["A"] == pytest.approx(place["no claim"], abs=0.2)  # a mark's letter stands over its tick
    assert place["B"] == pytest.approx(place["8"], abs=0.2)
    assert place["0"] < place["1"] < place["3"] < place["8"] < place["no claim"]
    unit = place["1"] - place["0"]  # log2(1 + eps)
    assert place["8"] - place["0"] == pytest.approx(math.log2(9) * unit, abs=0.5)
    lonely = str(frontier([FrontierPoint("A", math.inf, (), metric, "A")], None, key="g"))
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


def test_the_axis_holds_every_bound_at_its_place_and_says_it() -> None:
    rows = [
        Row("claim", "Claim: at most", 8.0, None),
        Row("found", "Released weights", 0.12, 3.66),
        Row("within", "Within <b>", 7.7, math.inf),
    ]
    top = scale_top([8.0, 3.66, math.inf])
    svg = str(axis(rows, top, key="a"))
    left, right = 6.0, 312.0
    scale = {eps: left + (right - left) * math.log2(1 + eps) / math.log2(1 + top) for eps in (8.0, 3.66, 0.12, 7.7)}
    ends = re.findall(r'class="(allowed|reach|found|within)" d="M6 \d+H([\d.]+)', svg)
    wanted = [("allowed", 8.0), ("reach", 3.66), ("found", 0.12), ("reach", None), ("within", 7.7)]
    for (kind, x), (name, eps) in zip(ends, wanted, strict=True):
        assert kind == name and float(x) == pytest.approx(right if eps is None else scale[eps], abs=0.06)
    assert "at least 0.12, could show up to 3.66" in svg and "Within &lt;b&gt;" in svg
    (ticks,) = re.findall(r'<g class="tick" text-anchor="middle">(.*?)</g>', svg)
    assert re.findall(r">(\d+)</text>", ticks) == ["0", "1", "2", "4", "8"]
    assert axis([], top, key="a") == ""


def test_evidence_climbs_game_by_game_and_repeats_show() -> None:
    steps = [Step("01-canaries", math.log(0.5), False), Step("02-white-box", math.log(100), True)]
    steps += [Step("03-white-box", math.log(1e12), True), Step("04-white-box", -math.inf, True)]
    svg = str(growth(steps, math.log(1000), key="g"))
    assert "01-canaries: 0.5; 02-white-box: 100; 03-white-box: 10^12; 04-white-box: 0." in svg
    assert "refuted from 1,000" in svg and re.findall(r'y="126" text-anchor="middle">(\d)', svg) == ["1", "2", "3", "4"]
    heights = [float(y) for y in re.findall(r"V([\d.]+)", re.findall(r'class="stairs" d="([^"]+)"', svg)[0])]
    line = float(re.findall(r'class="refuted" d="M46 ([\d.]+)', svg)[0])
    assert heights[2] < line < heights[1] < heights[0] < heights[3]
    unit = (heights[0] - heights[1]) / (math.log10(100) - math.log10(0.5))  # of a power of ten
    assert heights[1] - line == pytest.approx(unit, abs=0.1)
    assert svg.count("h9v9h-9Z") == 3  # squares are twins


def test_a_guess_is_drawn_beside_the_coin() -> None:
    assert 'class="right" d="M2 8H149.0"' in guess_bar(0.75) and 'class="coin" d="M100 2V14"' in guess_bar(0.75)


def test_ceiling_notes() -> None:
    test = audit("non-private").tests[0]
    assert "more canaries needed" in (ceiling_note(test, None) or "")
    low = test.model_copy(update={"epsilon_lower": 1.0})
    assert ceiling_note(low, None) is None
    assert "cannot check 8" in (ceiling_note(low, claim()) or "")
    assert ceiling_note(low, claim(2.0)) is None
    assert ceiling_note(low.model_copy(update={"epsilon_lower": None}), claim()) is None
