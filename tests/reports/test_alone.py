"""A document that is shown without the games behind it: its stated verdict is held against its own fields."""

from pathlib import Path

import numpy as np
import pytest

import dpaudit
from dpaudit.documents import ScoresDocument
from reports.formats.findings import findings
from reports.subjects import load_page


def _scores_document(kind: str) -> ScoresDocument:
    """Of 400 records: inconclusive without a control, refuted where members lie 6 sigma apart, invalid when turned."""
    rng = np.random.default_rng(2)
    member = rng.random(400) < 0.5
    shift = {"inconclusive": 1.0, "refuted": 6.0, "invalid": -6.0}[kind]
    scores = dpaudit.Scores(shift * member + rng.normal(size=400), member, coins="independent", separate=True)
    document = scores.document(1e-5, claim=dpaudit.claim(sigma=1, rate=1, steps=1))
    assert document.verdict == kind
    return document


@pytest.mark.parametrize(
    ("kind", "stated", "tests"),
    [
        ("refuted", "not refuted", {}),
        ("refuted", "inconclusive", {"refutes": False}),
        ("refuted", "not refuted", {"p_value": 0.5, "e_value": 0.5, "refutes": False}),
        ("invalid", "inconclusive", {}),
        ("invalid", "not refuted", {}),
        ("inconclusive", "not refuted", {}),
        ("inconclusive", "refuted", {}),
        ("inconclusive", "no claim", {}),
    ],
)
def test_a_document_that_contradicts_itself_fails(
    tmp_path: Path, kind: str, stated: str, tests: dict[str, object]
) -> None:
    """Edited by hand: the page shows the verdict that the fields give, and says what the document stated."""
    honest = _scores_document(kind)
    (tmp_path / "honest.json").write_text(honest.to_json())
    assert not load_page([tmp_path / "honest.json"]).runs[0].notices
    edited = [test.model_copy(update=tests) if test.p_value is not None else test for test in honest.tests]
    lie = honest.model_copy(update={"verdict": stated, "tests": tuple(edited)})
    (tmp_path / "lie.json").write_text(lie.to_json())
    (run,) = load_page([tmp_path / "lie.json"]).runs
    gives = kind if "e_value" not in tests else "inconclusive"
    assert run.audit is not None
    if gives != stated:
        assert run.audit.verdict == gives and f"“{stated}”; its own fields give “{gives}”" in " ".join(run.notices)
    found = findings(load_page([tmp_path / "lie.json"]))
    assert any(f.rule == "documents" and f.outcome == "fail" for f in found)


def test_a_version_1_document_supports_nothing_and_keeps_its_refutation(tmp_path: Path) -> None:
    for stated, gives in (("not refuted", "inconclusive"), ("refuted", "refuted"), ("invalid", "invalid")):
        old = _scores_document("inconclusive").model_copy(update={"schema_version": 1, "verdict": stated})
        (tmp_path / "old.json").write_text(old.to_json())
        (run,) = load_page([tmp_path / "old.json"]).runs
        assert run.audit is not None and run.audit.verdict == gives
        assert bool(run.notices) == (stated != gives)
