"""The main job through the installed command: train, audit, benchmark, report, every document against its schema."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

DPAUDIT = Path(sys.executable).parent / "dpaudit"
SMALL = ["data.limit=60", "training.batch-size=16", "training.steps=6", "model.lora.rank=2"]


def dpaudit(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([str(DPAUDIT), *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def checked(kind: str, text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    schema = json.loads((files("dpaudit") / "schemas" / f"{kind}.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    return document


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {method: root / method for method in ("non-private", "dual-priv")}
    for method, path in made.items():
        text = dpaudit("train", f"method={method}", *SMALL, "--canaries", "30", "--out", str(path), "--json")
        claim = checked("claim", text)["claim"]
        assert (claim is None) == (method == "non-private")
    return made


def test_audit_benchmark_report(runs: dict[str, Path], tmp_path: Path) -> None:
    for method, path in runs.items():
        audit = checked("audit", dpaudit("audit", str(path), "--json"))
        assert audit["verdict"] == ("no claim" if method == "non-private" else "inconclusive")
        assert audit["fusion"]["training"] == "per-example preprocessing"
        for test in audit["tests"]:
            assert test["epsilon_lower"] is None or test["epsilon_lower"] <= test["ceiling"]
        assert (path / "release" / "audit.json").is_file()
    first = runs["non-private"]
    bench = checked("benchmark", dpaudit("benchmark", str(first), "--limit", "20", "--json"))
    assert bench["base"] is not None
    report = tmp_path / "report.html"
    dpaudit("report", *map(str, runs.values()), "-o", str(report))
    text = report.read_text(encoding="utf-8")
    assert len(text) < 500_000 and "can never prove privacy" in text
    for kind in ("claim", "ledger", "environment"):
        checked(kind, (first / "release" / f"{kind}.json").read_text(encoding="utf-8"))


def test_release_holds_no_coin_key_or_score(runs: dict[str, Path]) -> None:
    for path in runs.values():
        key = json.loads((path / "private" / "noise.key").read_text())["key"]
        for file in (path / "release").rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert key.encode() not in content and bytes.fromhex(key) not in content
        names = {file.name for file in (path / "release").rglob("*")}
        assert not names & {"coins.parquet", "scores.parquet", "metrics.jsonl", "noise.key"}
        assert (path / "private").stat().st_mode & 0o077 == 0


def test_fail_above_is_a_gate(runs: dict[str, Path]) -> None:
    dpaudit("audit", str(runs["dual-priv"]), "--canaries", "--fail-above", "5", code=0)
    dpaudit("audit", str(runs["dual-priv"]), "--canaries", "--strict", code=3)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "reducer.name=foo"], "reducer.name"),
        (["train", "--epsilon", "0"], "privacy.epsilon"),
        (["train", "--epsilon", "-1"], "privacy.epsilon"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--metod", "x"], "--metod"),
        (["train", "data.path=/nonexistent", "data.train=a.jsonl", "data.test=b.jsonl"], "data.path"),
        (["train", "training.batch-size=999999"], "training.batch-size"),
        (["train", "--model", "./nowhere"], "model.path"),
        (["audit", "nowhere"], "nowhere"),
        (["benchmark", "nowhere"], "nowhere"),
        (["report", "nowhere", "-o", "x.html"], "nowhere"),
        (["bogus"], "bogus"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], names: str) -> None:
    done = subprocess.run([str(DPAUDIT), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and names in done.stderr
