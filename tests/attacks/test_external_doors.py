"""`dpaudit audit-trainer`, `audit-model`: the same audits as by the flags of `audit`, with options of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpaudit.cli import app

TOY = "tests.attacks.external_toy:factory"


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = app.run(list(words))
    return code, *capsys.readouterr()


def test_the_same_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = []
    more = ["--white-box", "--seed", "1", "--json", "--out"]
    for words in (["audit-trainer", TOY], ["audit", "--trainer", TOY]):
        code, out, err = call(capsys, *words, *more, str(tmp_path / words[0]))
        assert code == 0, err
        document = json.loads(out)
        document["run"].pop("command")
        found.append({key: value for key, value in document.items() if key != "games"})
    assert found[0] == found[1] and found[0]["verdict"] == "not refuted"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit-trainer"], "Missing argument 'MODULE:FACTORY'"),
        (["audit-trainer", "nowhere"], "module:factory"),
        (["audit-trainer", TOY, "--mia"], "No such option: --mia"),
        (["audit-trainer", TOY, "--processes", "2"], "--processes: belongs to --runs N"),
        (["audit-trainer", TOY, "--executor", "ray"], "--executor: belongs to --runs N"),
        (["audit-trainer", TOY, "--runs", "20", "--executor", "moon"], "--executor: got 'moon'"),
        (["audit-trainer", TOY, "--runs", "3"], "--runs: got 3"),
        (["audit-trainer", TOY, "--set", "seed=3"], "--set: got 'seed=3'"),
        (["audit-trainer", TOY, "--fail-above", "-1"], "--fail-above"),
        (["audit-trainer", TOY, "--contract", "--count", "9"], "--count"),
        (["audit-model"], "Missing argument 'PATH'"),
        (["audit-model", "m", "--base", "b", "--records", "r", "--coins", "c"], "Missing option '--epsilon'"),
        (["audit-model", "m", "--base", "b", "--records", "r", "--coins", "c", "--epsilon", "0"], "--epsilon: got 0"),
        (["audit-model", "m", "--base", "b", "--records", "r", "--coins", "c", "--epsilon", "1", "--white-box"],
         "No such option: --white-box"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
