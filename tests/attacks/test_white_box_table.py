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
