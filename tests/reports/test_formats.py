"""The page for machines: JUnit XML against a schema of its readers, SARIF against its own, foreign text in all."""

import io
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from dpaudit.cli import app
from reports import formats
from reports.embedded import Change
from reports.formats.findings import RULES, Finding, counts, findings
from reports.formats.markdown import escape
from reports.subjects import load_page
from tests.reports.fixtures import (
    canary_game,
    check_document,
    claim_test,
    white_box_game,
    write_audit,
    write_run,
    write_three,
)
from tests.reports.hostile import HOSTILE, write_hostile_run
from tests.reports.sweep.fakes import FakeExecutor, write_sweep
from tests.reports.test_subjects import write_documents

SCHEMAS = sorted((Path(sys.prefix) / "npm").glob("*sarif*/lib/schemas/sarif-2.1.0*.json"))
LOUD = "NO SARIF SCHEMA: SARIF was checked by structure only; fetch it with: make npm"
if not SCHEMAS:
    warnings.warn(LOUD, stacklevel=1)

# What Jenkins, GitLab and GitHub's reporters agree on: order and names of elements, required attributes, whole numbers.
XSD = """<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">
<xs:attributeGroup name="numbers"><xs:attribute name="name" type="xs:string" use="required"/>
 <xs:attribute name="tests" type="xs:nonNegativeInteger" use="required"/>
 <xs:attribute name="failures" type="xs:nonNegativeInteger" use="required"/>
 <xs:attribute name="errors" type="xs:nonNegativeInteger" use="required"/>
 <xs:attribute name="skipped" type="xs:nonNegativeInteger"/><xs:attribute name="time" type="xs:decimal"/>
</xs:attributeGroup>
<xs:complexType name="said"><xs:simpleContent><xs:extension base="xs:string">
 <xs:attribute name="message" type="xs:string"/><xs:attribute name="type" type="xs:string"/>
</xs:extension></xs:simpleContent></xs:complexType>
<xs:element name="testsuites"><xs:complexType><xs:sequence>
 <xs:element name="testsuite" minOccurs="0" maxOccurs="unbounded"><xs:complexType><xs:sequence>
  <xs:element name="testcase" minOccurs="0" maxOccurs="unbounded"><xs:complexType><xs:sequence>
   <xs:choice minOccurs="0"><xs:element name="skipped" type="said"/><xs:element name="failure" type="said"/></xs:choice>
   <xs:element name="system-out" type="xs:string" minOccurs="0"/>
  </xs:sequence>
  <xs:attribute name="classname" type="xs:string" use="required"/>
  <xs:attribute name="name" type="xs:string" use="required"/><xs:attribute name="time" type="xs:decimal"/>
  </xs:complexType></xs:element>
 </xs:sequence><xs:attributeGroup ref="numbers"/></xs:complexType></xs:element>
</xs:sequence><xs:attributeGroup ref="numbers"/></xs:complexType></xs:element></xs:schema>"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.sweep.table.RESAMPLES", 50)
    monkeypatch.setattr("reports.metrics.RESAMPLES", 50)
    monkeypatch.setattr("dpaudit.atomic.os.fsync", lambda descriptor: None)


def check_junit(text: str, found: tuple[Finding, ...]) -> ElementTree.Element:
    """Valid by the schema, with the numbers that its cases have."""
    schema = etree.XMLSchema(etree.parse(io.StringIO(XSD)))
    tree = etree.fromstring(text.encode())
    schema.assertValid(tree)
    root = ElementTree.fromstring(text)
    number = counts(found)
    for suite in (root, *root.iter("testsuite")):
        cases = list(suite.iter("testcase"))
        assert int(suite.get("tests", "")) == len(cases)
        assert int(suite.get("failures", "")) == sum(case.find("failure") is not None for case in cases)
        assert int(suite.get("skipped", "")) == sum(case.find("skipped") is not None for case in cases)
    undecided = number["skip"] + number["warn"]
    assert (int(root.get("failures", "")), int(root.get("skipped", ""))) == (number["fail"], undecided)
    plain = [case for case in root.iter("testcase") if not len(case)]
    assert len(plain) == number["pass"]  # nothing but a pass looks like one
    return root


def check_sarif(text: str, found: tuple[Finding, ...]) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(text)
    for path in SCHEMAS:
        jsonschema.Draft7Validator(json.loads(path.read_text())).validate(tree)
    (run,) = tree["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert tree["version"] == "2.1.0" and len(set(rules)) == len(rules) and set(rules) <= set(RULES)
    wanted = [(f.rule, "error" if f.outcome == "fail" else "warning") for f in found if f.outcome in ("fail", "warn")]
    assert [(result["ruleId"], result["level"]) for result in run["results"]] == wanted
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"] and result["message"]["text"].strip()
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9%._/~-]+", uri) and not uri.startswith("/")
    return tree


def test_a_page_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(function: str, payload: Any) -> str | None:
        return "out of memory" if payload.get("config", {}).get("method") == "non-private" else None

    write_sweep(tmp_path / "sweep", FakeExecutor(fail), seeds=(0,))
    page = load_page([*write_three(tmp_path / "runs"), tmp_path / "sweep", *write_documents(tmp_path / "documents")])
    found = findings(page)
    by = {(finding.subject, finding.rule, finding.name): finding for finding in found}
    assert by["dp-sgd", "claim", "claim"].outcome == "warn"  # inconclusive
    assert by["non-private", "claim", "claim"].outcome == "skip"
    assert by["non-private", "ledger", "gradients"].outcome == "warn"  # UNACCOUNTED, and no claim is made
    assert by["check", "step-contract", "clipping per unit"].outcome == "fail"
    assert by["check", "step-contract", "resume"].outcome == "skip"
    assert by["bugs", "planted-bug", "slow leak"].outcome == "fail"
    assert by["bugs", "planted-bug", "out of reach"].outcome == "skip"
    assert by["small", "sweep", "non-private, seed 0"].outcome == "fail"
    assert by["small", "ledger", "hyper-parameter tuning"].outcome == "warn"
    root = check_junit(formats.junit(found), found)
    assert {suite.get("name") for suite in root} == {finding.subject for finding in found}
    tree = check_sarif(formats.sarif(found), found)
    places = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in tree["runs"][0]["results"]}
    assert {"runs/dp-sgd/release/audit.json", "documents/check.json", "sweep/sweep.json"} <= places
    prints = [result["partialFingerprints"]["dpaudit/v1"] for result in tree["runs"][0]["results"]]
    assert len(set(prints)) == len(prints)
    again = findings(load_page([tmp_path / "runs" / "dp-sgd"]))
    assert formats.sarif(again) in formats.sarif(again) and formats.junit(again) == formats.junit(again)
    text = formats.markdown(page, found, title="Nightly")
    assert "| dp-sgd | 8 at 1e-5 | 0 (ceiling 3.66) | inconclusive | 86.1 %" in text
    assert "**fails** check: clipping per unit" in text and "never prove privacy" in text


def test_a_refuted_claim_and_an_unaccounted_path_fail(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd", name="mine")
    game = canary_game("dp-sgd")
    bound = game.tests[0].model_copy(update={"name": "bound", "epsilon_lower": 9.0, "ceiling": 10.0})
    quiet = claim_test(name="quiet", e_value=1.0, p_value=1e-9)  # a small p-value alone decides nothing
    tests = (bound, claim_test(e_value=1e5, p_value=0.9), quiet, *game.tests[2:])
    write_audit(run, "dp-sgd", [game.model_copy(update={"tests": tests})])
    ledger = run / "release" / "ledger.json"
    rows = json.loads(ledger.read_text())
    rows["rows"].append({"path": "vocabulary", "status": "UNACCOUNTED", "explanation": "e", "evidence": "v"})
    ledger.write_text(json.dumps(rows))
    said = {f.name: f.message for f in findings(load_page([run])) if f.rule == "claim-test"}
    assert "; refutes by itself at level" in said["canaries: all kinds (f-dp)"]
    assert "; does not refute by itself at level" in said["quiet (f-dp)"]
    found = {(f.rule, f.name): f.outcome for f in findings(load_page([run]))}
    assert found["claim", "claim"] == "fail" and found["ledger", "vocabulary"] == "fail"
    assert found["claim-test", "canaries: all kinds (f-dp)"] == "fail"
    assert found["claim-test", "quiet (f-dp)"] == "skip"
    assert found["bound", "bound (steinke)"] == "warn"  # above the claim; a bound refutes nothing by itself
    # tests outside the error budget decide nothing here either
    assert not any("mislabelled" in name for _, name in found)


def test_changes_for_the_worse_are_warnings(tmp_path: Path) -> None:
    page = load_page([write_run(tmp_path, "dp-sgd")])
    worse = Change(subject="x", what="verdict", before="not refuted", after="refuted", direction="worse")
    found = findings(page, [worse, worse.model_copy(update={"direction": "better"})])
    assert [(f.rule, f.outcome) for f in found if f.rule == "change"] == [("change", "warn")]
    check_junit(formats.junit(found), found)
    check_sarif(formats.sarif(found), found)


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    page = load_page([write_hostile_run(tmp_path, "<img src=x onerror=alert(1)> \"'&")])
    found = findings(page)
    root = check_junit(formats.junit(found), found)
    assert root.find("script") is None and "<script" not in formats.junit(found)
    check_sarif(formats.sarif(found), found)
    text = formats.markdown(page, found, title=HOSTILE[1])
    assert not re.search(r"(?<!\\)<", text)
    for made in (formats.junit(found), formats.sarif(found), text, formats.disclosure(page).to_json()):
        assert len(made) < 200_000
    for made in (formats.junit(found), formats.sarif(found), text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made) and "x" * 1000 not in made


TEXT = st.one_of(st.text(max_size=60), st.sampled_from(HOSTILE))


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, st.sampled_from(["pass", "fail", "not applicable"])), max_size=4), TEXT)
@settings(max_examples=60)
def test_any_text_makes_valid_files(rows: list[tuple[str, str, str, str]], title: str) -> None:
    from dpaudit.documents import Check, CheckDocument
    from dpaudit.documents.games import FactorySource
    from reports.inputs import ReleasedFile
    from reports.subjects import CheckReport, Page

    def shown(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    checks = tuple(
        Check.model_validate(
            {"name": shown(n), "status": s, "measured": shown(m), "allowed": shown(a), "explanation": shown(n)}
        )
        for n, m, a, s in rows
    )
    whose = FactorySource(name=shown(title) or "a:b")
    document = CheckDocument(verdict="fail", checks=checks, factory=whose)
    page = Page((), checks=(CheckReport("A", "check", document, ReleasedFile("c.json", "0" * 64, 1), "c.json"),))
    found = findings(page)
    check_junit(formats.junit(found), found)
    check_sarif(formats.sarif(found), found)
    text = formats.markdown(page, found, title=title)
    lines = text.split("\n")[1:]
    table = next(place for place, line in enumerate(lines) if line.startswith("| step contract |"))
    assert [len(re.findall(r"(?<!\\)[|]", line)) for line in lines[table : table + 3]] == [6, 6, 6]
    assert not re.search(r"(?<!\\)[<|]", "\n".join(lines[:table] + lines[table + 3 :])) and "\r" not in text


def test_the_summary_names_a_contract_and_its_verdict() -> None:
    from dpaudit.documents import Check, CheckDocument
    from dpaudit.documents.games import FactorySource
    from reports.inputs import ReleasedFile
    from reports.subjects import CheckReport, Page

    made = [
        ("noise level", "pass"),
        ("noise law", "pass"),
        ("claim is public", "fail"),
        ("repeated unit", "not applicable"),
    ]
    checks = tuple(
        Check.model_validate({"name": n, "status": s, "measured": "1", "allowed": "1", "explanation": "-"})
        for n, s in made
    )
    document = CheckDocument(verdict="fail", checks=checks, factory=FactorySource(name="audited:factory"))
    page = Page((), checks=(CheckReport("A", "check", document, ReleasedFile("c.json", "0" * 64, 1), "c.json"),))
    text = formats.markdown(page, findings(page), title="t")
    assert "| check: audited:factory | fail | 2 | 1 | 1 |" in text.replace("\\", "").replace("\u200b", "")
    assert "claim is public" in text


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "<b>",
        "[x](http://evil)",
        "![p](http://evil/p.png)",
        "`code`",
        "@octocat",
        "#1",
        "www.evil.com",
        "**b**",
        "&lt;",
        "a\nb",
        "~~s~~",
        "http://evil.example",
    ],
)
def test_markdown_of_foreign_text_has_no_markup(text: str) -> None:
    made = escape(text)
    assert not re.search(r"(?<!\\)[|<>\[\]`*_~!]", made) and "\n" not in made
    assert not re.search(r"@\w|#\d|www\.|http:", made) and "&lt" not in made
    assert made.replace("\\", "").replace("\u200b", "").replace("&amp;", "&") == text.replace("\n", " ")


def test_the_disclosure_states_what_is_known_and_lists_what_is_missing(tmp_path: Path) -> None:
    document = formats.disclosure(load_page(write_three(tmp_path)))
    assert [item.name for item in document.deployments] == ["dp-sgd", "dual-priv"]  # non-private claims nothing
    first = document.deployments[0]
    assert first.privacy_loss.epsilon == 8.0 and first.privacy_loss.neighbours == "add-remove"
    assert first.evidence.verdict == "inconclusive" and first.hyperparameter_tuning is None
    assert all(getattr(first, name) is None for name in first.missing) and "justification" in first.missing
    again = formats.DisclosureDocument.model_validate_json(document.to_json())
    assert again == document
    jsonschema.Draft202012Validator(formats.DisclosureDocument.json_schema()).validate(json.loads(document.to_json()))


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_refuted_or_unstated_is_called_releasable(whole: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "dp-sgd", with_benchmark=False)
    for e_value, verdict, expected in ((0.5, "not refuted", True if whole else None), (1e9, "refuted", False)):
        write_audit(run, "dp-sgd", [white_box_game(e_value=e_value, number=1)])
        alone = tmp_path / "audit.json"  # without claim.json beside it
        alone.write_bytes((run / "release" / "audit.json").read_bytes())
        (found,) = formats.disclosure(load_page([run if whole else alone])).deployments
        assert (found.evidence.verdict, found.releasable) == (verdict, expected)


def test_the_command_writes_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "check.json").write_text(check_document().to_json())
    names = {"junit": "j.xml", "sarif": "s.sarif", "md": "m.md", "json": "d.json", "html": "r.html"}
    options = [part for form, name in names.items() for part in ("--format", form, "-o", name)]
    assert app.run(["report", "check.json", *options]) == 0
    for name in names.values():
        assert (tmp_path / name).stat().st_size > 20
    assert app.run(["report", "check.json", *[part for form in names for part in ("--format", form)]]) == 0
    for name in ("junit.xml", "dpaudit.sarif", "summary.md", "disclosure.json", "report.html"):
        assert (tmp_path / name).stat().st_size > 20
    assert app.run(["report", "check.json", "--format", "junit", "-o", "no/such/folder/j.xml"]) == 4


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--format", "pdf"], "got 'pdf'; accepted: one of html, card, md, junit, sarif, json"),
        (["--format", "md", "--format", "junit", "-o", "x"], "--format: 2 and -o: 1; accepted: one -o for each"),
        (["-o", "x", "-o", "y"], "--format: 1 and -o: 2"),
        (["--format", "md", "--format", "md"], "one is given twice"),
        (["--format", "md", "--format", "junit", "-o", "x", "-o", "x"], "-o (junit) x: is the file of -o (md) too"),
        (["--format", "card"], "accepted: exactly one SUBJECT, a run folder"),
        (["--watch", "--json"], "accepted: without --json"),
    ],
)
def test_a_form_or_a_place_that_can_not_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "check.json").write_text(check_document().to_json())
    assert app.run(["report", "check.json", *more]) == 2
    said = capsys.readouterr().err
    assert told in " ".join(said.split()) and len(list(tmp_path.iterdir())) == 1
