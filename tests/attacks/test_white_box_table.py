"""What `dpaudit audit --trainer … --white-box` says of each kind of fault, as a whole command.

A refutation here has an e-value above 1,000 by a margin that no seed takes away; a correct trainer is refuted with
probability at most 1e-6 (--alpha).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dpaudit.cli import app

WHERE = "tests.attacks.white_box_faults"
NOT_PASSED = {"refuted", "inconclusive", "invalid", "unsupported"}


def audited(
    name: str, out: Path, capsys: pytest.CaptureFixture[str], *more: str, module: str = WHERE
) -> tuple[int, dict[str, Any]]:
    code = app.run(
        ["audit", "--trainer", f"{module}:{name}", "--white-box", "--seed", "1", "--out", str(out), "--json", *more]
    )
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        "Half",
        "Ninety",
        "Tenth",
        "NoNoise",
        "LateHalf",
        "Unclipped",
        "NoNoiseNoGradient",
        "Repeats",
        "Cancels",
        "Telescopes",
        "Lagged",
        "Pool",
        "LastClean",
        "FirstClean",
        "Alternating",
        "SomeClean",
        "LowRank",
        "HeadClean",
    ],
)
def test_what_leaks_more_than_claimed_is_refuted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = audited(name, tmp_path / "a", capsys)
    assert (code, document["verdict"]) == (1, "refuted"), document["reasons"]


@pytest.mark.parametrize(
    "name", ["Dead", "DeadHalf", "DeadNoNoise", "DeadLater", "Faint", "LastOnly", "DeadBesideRecords", "Turned"]
)
def test_a_way_in_that_is_dead_makes_the_game_invalid(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = audited(name, tmp_path / "a", capsys)
    assert document["verdict"] in ("invalid", "refuted"), document["reasons"]
    said = " ".join(document["reasons"]) + json.dumps(document["validity"])
    assert "inject" in said and ("sign turned" in said) == (name == "Turned")
    assert not any(test["power"] for test in document["tests"])


def test_one_step_with_old_noise_takes_the_power_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = audited("OneAgain", tmp_path / "a", capsys)
    assert document["verdict"] in ("inconclusive", "refuted")
    assert not any(test["power"] for test in document["tests"])
    game = json.loads((tmp_path / "a" / "release" / "games" / "01-white-box.json").read_text())
    # The shares of one game are one: its evidence is then an e-value without any further division.
    assert game["kept"] + sum(test["share"] for test in game["tests"] if test["e_value"] is not None) == pytest.approx(
        1
    )
    (control,) = [item for item in game["controls"] if item["name"] == "independent steps"]
    assert control["outcome"] == "not earned" and "steps 5 and 18" in control["measured"]


@pytest.mark.parametrize("name", ["HalfNoGradient", "UnclippedNoGradient"])
def test_a_blurred_channel_earns_no_power(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = audited(name, tmp_path / "a", capsys)
    # That clipping is missing shows under frozen noise, however blurred the game is.
    missing = "unsupported" if name == "UnclippedNoGradient" else "inconclusive"
    assert document["verdict"] in ("refuted", missing), document["reasons"]
    assert document["verdict"] == "refuted" or not any(test["power"] for test in document["tests"])


@pytest.mark.parametrize("name", ["Toy", "NoGradient", "MoreNoise", "Arrays", "NoEmpty"])
def test_what_leaks_no_more_is_not_refuted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = audited(name, tmp_path / "a", capsys, "--alpha", "1e-6")
    assert code == 0 and document["verdict"] in ("not refuted", "inconclusive")
    if document["verdict"] == "not refuted":
        earned = [test["control"] for test in document["tests"] if test["power"]]
        assert earned and all(earned)


@pytest.mark.parametrize(
    "name, control, said",
    [
        ("SampleAll", "batch sizes", "sample() draws 20 per step, the claim says q n = 5"),
        ("SampleOften", "batch sizes", "the claim says q n = 5"),
        ("SampleInTurn", "batch sizes", "sample() draws batches"),
        ("HeadHidden", "released blocks", "head: without noise in released() (None)"),
    ],
)
def test_batches_and_blocks_that_are_not_those_of_the_claim_make_the_game_invalid(
    name: str, control: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = audited(name, tmp_path / "a", capsys)
    assert (code, document["verdict"]) == (3, "invalid"), document["reasons"]
    assert said in " ".join(document["reasons"])
    assert {item["name"]: item["outcome"] for item in document["controls"]}[control] == "failed"


@pytest.mark.parametrize("name, control", [("Signs", "law of the noise"), ("HeadFrozen", "released blocks")])
def test_what_was_not_looked_at_takes_the_power_away(
    name: str, control: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = audited(name, tmp_path / "a", capsys, "--alpha", "1e-6")
    assert (code, document["verdict"]) == (0, "inconclusive"), document["reasons"]
    assert {item["name"]: item["outcome"] for item in document["controls"]}[control] == "not earned"


def report(subject: str, **files: str) -> None:
    asked = [word for form, file in files.items() for word in ("--format", form, "-o", file)]
    assert app.run(["report", subject, *asked]) == 0


def outcomes(document: dict[str, Any]) -> dict[str, str]:
    return {control["name"]: control["outcome"] for control in document["controls"]}


@pytest.mark.parametrize("name", ["UnclippedBesideLarge", "HalvesClipped"])
def test_a_unit_that_moves_the_release_by_more_than_c_is_a_counterexample(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under frozen noise, so that nothing is left to chance: unsupported in every form, though no test refutes."""
    monkeypatch.chdir(tmp_path)
    code, document = audited(name, Path("a"), capsys, "--alpha", "1e-6")
    assert (code, document["verdict"]) == (1, "unsupported"), document["reasons"]
    assert outcomes(document)["liveness"] == "broken"
    assert any(reason.startswith("Control broken: liveness: measured moved by") for reason in document["reasons"])
    assert not any(test["power"] for test in document["tests"])
    assert not any(check["status"] == "fail" for check in document["validity"]["checks"])
    report("a", html="p.html", junit="p.xml", sarif="p.sarif", md="p.md", json="p.json")
    page, junit, markdown = (Path(f"p.{form}").read_text() for form in ("html", "xml", "md"))
    assert "liveness: broken" in page and "unsupported" in page
    assert "Control broken: liveness" in junit and 'classname="dpaudit.control"' in junit
    assert "| unsupported |" in markdown and "liveness" in markdown
    (run,) = json.loads(Path("p.sarif").read_text())["runs"]
    assert {"claim", "control"} <= {item["ruleId"] for item in run["results"] if item["level"] == "error"}
    (deployment,) = json.loads(Path("p.json").read_text())["deployments"]
    assert (deployment["evidence"]["verdict"], deployment["releasable"]) == ("unsupported", False)
    # A document without the games behind it says the same.
    report("a/release/audit.json", md="alone.md")
    assert "| unsupported |" in Path("alone.md").read_text()


def test_what_chance_refutes_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = audited("Unclipped", tmp_path / "a", capsys)
    assert (code, document["verdict"]) == (1, "refuted")
    assert any(reason.startswith("Control broken: liveness") for reason in document["reasons"])


@pytest.mark.parametrize("name", ["UnclippedNotFrozen", "UnclippedShifted"])
def test_a_trainer_that_is_not_frozen_is_no_counterexample(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = audited(name, tmp_path / "a", capsys)
    assert "broken" not in outcomes(document).values()
    assert not any(test["power"] for test in document["tests"])


@pytest.mark.parametrize("name, weight", [("HalfMore", 1.5), ("Twice", 2.0), ("Thrice", 3.0), ("WithoutRecords", 0.0)])
def test_records_that_count_more_or_less_than_once_take_the_power_away(
    name: str, weight: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = audited(name, tmp_path / "a", capsys, "--alpha", "1e-6")
    assert (code, document["verdict"]) == (0, "inconclusive"), document["reasons"]
    found = outcomes(document)
    assert found["liveness"] == found["amplitude"] == found["noise level"] == "earned"
    (control,) = [item for item in document["controls"] if item["name"] == "records"]
    low, high = (float(control["measured"].split()[place]) for place in (0, 2))
    assert control["outcome"] == "not earned" and low < weight < high and not low <= 1 <= high
    assert "clipping or counting of records is not as claimed" in control["explanation"]
    assert any("not earned: records" in reason for reason in document["reasons"])


def test_records_that_arrive_once_earn_their_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = audited("Alike", tmp_path / "a", capsys, "--alpha", "1e-6")
    assert (code, document["verdict"], outcomes(document)["records"]) == (0, "not refuted", "earned")
    assert any("how single records are clipped" in reason for reason in document["reasons"])
    # More noise than claimed makes the interval wider, and then it says nothing.
    _, document = audited("AlikeMoreNoise", tmp_path / "b", capsys, "--alpha", "1e-6")
    assert "records" not in outcomes(document)


def test_a_release_that_is_not_finite_makes_the_game_invalid_and_the_audit_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, document = audited("NotFinite", Path("a"), capsys, "--contract")
    assert (code, document["verdict"]) == (3, "invalid") and document["contract"]["checks"]
    assert document == json.loads(Path("a/release/audit.json").read_text())
    (check,) = [item for item in document["validity"]["checks"] if item["status"] == "fail"]
    assert check["name"] == "finite releases" and not document["tests"] and not document["scores"]
    assert check["measured"] == "step 6: 1 of 40 numbers in block head are not finite"
    assert check["measured"] in " ".join(document["reasons"])
    report("a", md="p.md")
    shown = Path("p.md").read_text()
    assert "| invalid |" in shown and "step 6" in shown and "documents of the run" not in shown


def test_what_a_white_box_game_does_not_look_at_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer that releases one thing and applies another passes the game; the verdict says what was left out, and
    the contract, which is played when no game is named, finds it."""
    _, document = audited("Lies", tmp_path / "a", capsys, "--alpha", "1e-6")
    assert document["verdict"] == "not refuted"
    assert any(reason.startswith("Not looked at: the update rule") for reason in document["reasons"])
    app.run(["audit", "--trainer", f"{WHERE}:Lies", "--white-box", "--contract", "--seed", "1",
             "--out", str(tmp_path / "b"), "--json"])  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "unsupported"
    assert not any(reason.startswith("Not looked at") for reason in document["reasons"])
