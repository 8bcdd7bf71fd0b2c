"""Pages over sweeps and bare documents, the checklist, and what changed since an earlier page."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.bugs.benchmark import BugRow, BugsDocument, ControlRow
from dpaudit.cli import app
from dpaudit.documents import AuditDocument, BenchmarkDocument, Check, CheckDocument, Metric, ScoresDocument
from dpaudit.errors import UsageError
from reports import html
from reports.changes import compare, read_earlier
from reports.checklist import QUESTIONS, answers, checklist
from reports.html import SIZE_LIMIT, SIZE_WANTED, render
from reports.subjects import Page, load_page
from tests.reports.fixtures import (
    audit,
    benchmark,
    canary_game,
    check_document,
    claim_test,
    token_game,
    white_box_game,
    write_audit,
    write_run,
    write_three,
)
from tests.reports.sweep.fakes import FakeExecutor, write_sweep
from tests.reports.test_html import Balance, embedded, visible


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.sweep.table.RESAMPLES", 50)
    monkeypatch.setattr("reports.metrics.RESAMPLES", 50)
    monkeypatch.setattr("dpaudit.atomic.os.fsync", lambda descriptor: None)


def bugs_document() -> BugsDocument:
    row = BugRow(
        name="noise off by B",
        catalogue="N3",
        what="noise divided twice",
        source="a public repository",
        caught=True,
        contract=("noise variance",),
        isolation=False,
        game_p=1e-9,
        game=True,
        seconds=1.0,
    )
    missed = row.model_copy(
        update={"name": "slow leak", "caught": False, "contract": (), "game": False, "game_p": None}
    )
    excused = missed.model_copy(update={"name": "out of reach", "why_not": "needs the key"})
    control = ControlRow(name="plain", seeds=50, alarms=0, verdicts={"pass": 50}, seconds=1.0)
    return BugsDocument(bugs=(row, missed, excused), caught=1, caught_by_contract=1, controls=(control,))


def scores_document() -> ScoresDocument:
    whole = audit("dp-sgd").model_dump()
    shared = {name: whole[name] for name in ScoresDocument.model_fields if name != "kind"}
    return ScoresDocument.model_validate(shared)


def write_documents(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    texts = {
        "scores.json": scores_document().to_json(),
        "audit.json": audit("dual-priv").to_json(),
        "check.json": check_document().to_json(),
        "bugs.json": bugs_document().to_json(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_a_sweep_has_its_table_frontier_and_claims(tmp_path: Path) -> None:
    document = write_sweep(tmp_path / "sweep")
    page = load_page([tmp_path / "sweep"])
    made, detail = render(page, title="T")
    assert render(load_page([tmp_path / "sweep"]), title="T")[0] == made and len(made.encode()) < SIZE_LIMIT
    parser = Balance()
    parser.feed(made)
    assert parser.open == [] and detail.scores_embedded
    text = visible(made)
    row = next(row for row in document.rows if row.configuration == "dual-priv, epsilon 8")
    assert row.exact_match is not None and row.difference is not None
    assert f"{100 * row.exact_match.value:.1f} %" in text and "against dp-sgd, epsilon 8" in text
    assert "95 % intervals over seeds and pictures" in text and "hyper-parameter tuning" in text
    assert made.count("Privacy-utility frontier</title>") == 1
    assert embedded(made)["sweeps"] == [json.loads((tmp_path / "sweep" / "sweep.json").read_text())]
    # the table alone can be shown without its runs; what they would have said is not invented
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "sweep.json").write_text((tmp_path / "sweep" / "sweep.json").read_text())
    alone = visible(render(load_page([tmp_path / "alone" / "sweep.json"]), title="T")[0])
    assert "against dp-sgd, epsilon 8" in alone and "No run was given, so no claim is stated." in alone


def test_a_sweep_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    document = write_sweep(tmp_path / "sweep", seeds=(0,))
    write_run(tmp_path, "dp-sgd", name="elsewhere")
    cells = [c.model_copy(update={"folder": "../../elsewhere"}) for c in document.cells]
    (tmp_path / "sweep" / "sweep.json").write_text(document.model_copy(update={"cells": tuple(cells)}).to_json())
    assert load_page([tmp_path / "sweep"]).described == ()


def test_an_unfinished_sweep_says_so(tmp_path: Path) -> None:
    def fail(function: str, payload: Any) -> str | None:
        return "out of memory" if payload.get("config", {}).get("method") == "non-private" else None

    write_sweep(tmp_path / "sweep", FakeExecutor(fail), seeds=(0,))
    text = visible(render(load_page([tmp_path / "sweep"]), title="T")[0])
    assert "This sweep is not finished" in text and "1 cell of the sweep failed" in text
    assert "Trained once only" in text and "pictures only" in text


def test_bare_documents_make_a_page(tmp_path: Path) -> None:
    paths = write_documents(tmp_path / "documents")
    made, _ = render(load_page(paths), title="T")
    parser = Balance()
    parser.feed(made)
    assert parser.open == []
    text = visible(made)
    for words in (
        "a file of scores from elsewhere",
        "noise off by B",
        "1 of 3 caught",
        "0 false alarms in 50 trials of 1 trainers",
        "needs the key",
        "clipping per unit",
        "What it could have detected",
    ):
        assert words in text, words
    data = embedded(made)
    assert [row["failed"] for row in data["checks"]] == [["clipping per unit"], ["slow leak", "out of reach"]]  # type: ignore[attr-defined]
    for path in paths:  # each alone is a page too
        assert visible(render(load_page([path]), title="T")[0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"verdict": "pa', "not JSON, or cut off"),
        ("[]", "not a document that a report shows"),
        ('{"name": "package", "version": 1}', "not a document that a report shows"),
        ('{"kind": "check", "verdict": "pass", "checks": 3}', "not a check document: checks"),
        ('{"schema_version": 1, "verdict": "refuted", "tests": [], "validity": {}}', "not a scores document"),
        ('{"schema_version": 2, "verdict": "pass", "checks": []}', "says no kind"),  # only version 1 may say none
        ('{"kind": "game", "verdict": "pass", "checks": []}', "is of kind 'game'"),
        ('{"kind": ["audit"], "schema_version": 1}', "is of kind"),
        ("[" * 100_000, "not JSON, or cut off"),
        (b"\xff\xfe\x00", "can't be read"),
        ("", "not JSON, or cut off"),
    ],
)
def test_foreign_and_truncated_documents_are_one_clear_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        load_page([path])
    assert words in str(caught.value) and "x.json" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "sweep").mkdir()
    path.rename(tmp_path / "sweep" / "sweep.json")
    with pytest.raises(UsageError, match=r"sweep\.json"):
        load_page([tmp_path / "sweep"])


@given(st.data())
@settings(max_examples=60)
def test_a_document_cut_or_flipped_anywhere_is_a_page_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    text = data.draw(st.sampled_from([scores_document(), check_document(), bugs_document()])).to_json()
    at = data.draw(st.integers(0, len(text)))
    kind = data.draw(st.sampled_from(["cut", "insert", "drop"]))
    piece = data.draw(st.text(max_size=3))
    changed = {"cut": text[:at], "insert": text[:at] + piece + text[at:], "drop": text[:at] + text[at + 1 :]}[kind]
    path.write_text(changed, encoding="utf-8", errors="replace")
    try:
        page = load_page([path])
    except UsageError as error:
        assert len(str(error).strip().splitlines()) == 1 or piece.strip("\x00") in changed
        return
    assert isinstance(page, Page)


def test_every_line_of_the_checklist_is_answered_from_data_or_not_stated(tmp_path: Path) -> None:
    page = load_page(write_three(tmp_path))
    lines = checklist(page.runs)
    assert [line.question for line in lines] == [question for _, question, _ in QUESTIONS]
    assert list(dict.fromkeys(line.group for line in lines)) == [
        "The guarantee",
        "Algorithms",
        "Utility and bias",
        "Deployment",
    ]
    for line in lines:
        assert sorted(key for answer in line.answers for key in answer.keys) == ["A", "B", "C"]
    dual = answers(page.runs[1])
    assert dual["Privacy parameters"] == ("stated", "eps = 8 at delta = 1e-5, approximate DP")
    assert dual["Evidence beside the claim"][0] == "measured" and "0.12" in dual["Evidence beside the claim"][1]
    assert dual["Source of randomness"][0] == "not covered"  # the fixture has a seed
    assert dual["Systemic and human bias"] == ("not stated", "")
    plain = answers(page.runs[2])
    assert plain["Privacy parameters"] == ("stated", "no claim is made") and plain["Unit of privacy"][0] == "not stated"
    empty = answers(
        load_page([write_run(tmp_path, "dp-sgd", name="bare", with_audit=False, with_benchmark=False)]).runs[0]
    )
    assert empty["Accuracy"][0] == "not stated" and empty["Evidence beside the claim"] == ("not stated", "not audited")


def test_ten_runs_and_a_sweep_of_many_lines_stay_under_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path / "sweep", seeds=(0,))
    runs = [write_run(tmp_path, "dual-priv", name=f"run-{index}") for index in range(10)]
    for run in runs:
        write_audit(run, "dual-priv", [canary_game("dual-priv"), token_game(), white_box_game()])
    page = load_page([*runs, tmp_path / "sweep"])
    made, detail = render(page, title="T")
    assert len(made.encode()) <= SIZE_WANTED and detail.informative
    assert len(re.findall(r'<g id="frame-\d+"', made)) < 6 and made.count('<use href="#frame-') > 15
    assert "<!--" not in made
    monkeypatch.setattr(html, "DETAILS", html.DETAILS[-1:])
    assert len(render(page, title="T")[0].encode()) <= 320_000  # room for what is yet to come


# -- comparison ------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def page_file(path: Path, *subjects: Path) -> Path:
    path.write_text(render(load_page(subjects), title="old")[0])
    return path


def test_nothing_changes_between_equal_pages(tmp_path: Path) -> None:
    runs = write_three(tmp_path / "runs")
    write_sweep(tmp_path / "sweep", seeds=(0,))
    documents = write_documents(tmp_path / "documents")
    old = page_file(tmp_path / "old.html", *runs, tmp_path / "sweep", *documents)
    page = load_page([*runs, tmp_path / "sweep", *documents])
    assert compare(page, read_earlier(old)) == ()
    assert "No value that both pages state has changed." in visible(render(page, title="T", changes=(), against="o")[0])


def test_better_and_worse_are_told_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd", name="mine")
    gone = write_run(tmp_path, "dp-sgd", name="gone")
    check = tmp_path / "check.json"
    check.write_text(check_document().to_json())
    old = page_file(tmp_path / "old.html", run, gone, check)

    before = canary_game("dp-sgd")
    more = (before.tests[0].model_copy(update={"epsilon_lower": 2.5}), claim_test(e_value=1e5), *before.tests[2:])
    failed = before.validity.checks[0].model_copy(update={"status": "fail"})
    checks = before.validity.model_copy(update={"checks": (failed, *before.validity.checks[1:])})
    write_audit(run, "dp-sgd", [before.model_copy(update={"tests": more, "validity": checks})])
    rewrite(
        run / "release" / "ledger.json",
        lambda tree: tree["rows"].append(
            {"path": "vocabulary", "status": "UNACCOUNTED", "explanation": "e", "evidence": "v"}
        ),
    )

    def more_accurate(tree: dict[str, Any]) -> None:
        for metric in tree["tasks"]["dpaudit_vqa"].values():
            metric.update(value=0.99, low=0.98, high=1.0)

    rewrite(run / "release" / "benchmark.json", more_accurate)
    mended = CheckDocument(
        verdict="pass", checks=tuple(item.model_copy(update={"status": "pass"}) for item in check_document().checks)
    )
    check.write_text(mended.to_json())
    changes = compare(load_page([run, check]), read_earlier(old))
    said = {(change.subject, change.what): change.direction for change in changes}
    assert said["mine", "verdict"] == "worse" and said["mine", "audited lower bound on eps"] == "worse"
    assert said["mine", "ledger: vocabulary"] == "worse" and said["mine", "check: coins"] == "worse"
    assert said["mine", "exact match"] == "better"
    assert said["check", "step contract"] == "better" and said["check", "check: clipping per unit"] == "better"
    assert said["gone", "run"] == "changed"
    page = load_page([run, check])
    text = visible(render(page, title="T", changes=changes, against="old.html")[0])
    assert "Changes since old.html" in text and "verdict inconclusive invalid worse" in text


@pytest.mark.parametrize(
    ("low", "high", "sample", "direction"),
    [
        (0.90, 0.95, None, "better"),
        (0.70, 0.75, None, "worse"),
        (0.85, 0.9, None, "within intervals"),
        (0.90, 0.95, "cd" * 32, "changed"),
    ],
)
def test_accuracy_changes_only_where_intervals_part(
    tmp_path: Path, low: float, high: float, sample: str | None, direction: str
) -> None:
    run = write_run(tmp_path, "dp-sgd", name="mine")
    path = run / "release" / "benchmark.json"
    before = benchmark(0.86)
    path.write_text(before.to_json())
    old = page_file(tmp_path / "old.html", run)
    metric = Metric(value=(low + high) / 2, low=low, high=high, n=1750, pictures=350)
    tasks = {"dpaudit_vqa": {**before.tasks["dpaudit_vqa"], "exact_match": metric}}
    hashes = before.sample_sha256 if sample is None else {"dpaudit_vqa": sample}
    after = BenchmarkDocument.model_validate({**before.model_dump(), "tasks": tasks, "sample_sha256": hashes})
    path.write_text(after.to_json())
    (change,) = compare(load_page([run]), read_earlier(old))
    assert (change.what, change.direction) == ("exact match", direction)


def test_the_json_of_an_earlier_report_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "dp-sgd", name="mine")
    html, told = tmp_path / "r.html", tmp_path / "old.json"
    assert app.run(["report", str(run), "-o", str(html), "--json"]) == 0
    told.write_text(capsys.readouterr().out)
    assert read_earlier(told) == read_earlier(html)
    (run / "release" / "audit.json").unlink()
    shutil.rmtree(run / "release" / "games")
    assert app.run(["report", str(run), "-o", str(html), "--against", str(html)]) == 0  # read before it is replaced
    assert "verdict: inconclusive -> not audited" in capsys.readouterr().out
    assert "Changes since r.html" in visible(html.read_text())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<html></html>",
        '{"runs": 3}',
        '{"runs": [{"key": "A"}]}',
        'id="dpaudit-report">{"runs": [',
        "\x00",
        "[]",
        '{"runs": [null]}',
        '{"runs": [], "sweeps": [{}]}',
        "{" * 50_000,
    ],
)
def test_a_foreign_earlier_page_is_one_clear_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.html"
    path.write_text(content)
    with pytest.raises(UsageError, match="--against") as caught:
        read_earlier(path)
    assert "\n" not in str(caught.value)


def test_scores_from_elsewhere_keep_their_verdict() -> None:
    assert {"verdict", "tests", "validity"} <= set(ScoresDocument.model_fields) <= set(AuditDocument.model_fields)
    assert isinstance(check_document().checks[0], Check)
