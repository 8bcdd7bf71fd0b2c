"""docs/audit-your-own.md: its code is taken from the page, put where the page says, and audited as the page says."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attacks.contract import check
from attacks.contract.loading import load_factory
from attacks.external.options import TrainerOptions
from attacks.external.trainer import audit_trainer
from dpaudit.cli.app import LazyGroup
from dpaudit.documents import AuditDocument
from trainers.progress import Silent

PAGE = Path(__file__).parents[2] / "docs" / "audit-your-own.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks() -> dict[str, str]:
    """Python blocks by their first line, which says where they go."""
    found = re.findall(r"```python\n# ([^\n]+)\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) == TEXT.count("```python")
    return dict(found)


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    code = blocks()
    (tmp_path / "my_training.py").write_text(code["my_training.py"])
    (tmp_path / "audited.py").write_text(code["audited.py"] + "\n" + code["audited.py, inside the class"])
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in ("my_training", "audited"):
        sys.modules.pop(name, None)


def audit(out: Path, **options: Any) -> AuditDocument:
    asked = TrainerOptions("audited:Audited", audits=("white-box",), seed=1, alpha=1e-6, confidence=1 - 1e-6, **options)
    return audit_trainer(asked, out, reporter=lambda _: Silent())[0]


def test_the_step_of_the_page_keeps_the_contract(folder: Path) -> None:
    """As the page says, before and after the optional methods are added."""
    code = blocks()
    (folder / "minute_five.py").write_text(code["audited.py"])
    for module in ("minute_five", "audited"):
        document = check(load_factory(f"{module}:Audited"))
        assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]
    sys.modules.pop("minute_five", None)


def test_the_page_ends_as_it_says(folder: Path) -> None:
    """Level 1e-6 for the correct training, which is the false-alarm rate of this test."""
    assert audit(folder / "right").verdict in ("not refuted", "inconclusive")
    assert audit(folder / "wrong", arguments={"wrong": 0.5}).verdict == "refuted"


def test_options_on_the_page_exist() -> None:
    """Every --flag of every dpaudit command on the page is one that the command has."""
    commands = re.findall(r"dpaudit (audit-trainer|audit-model|check|scores|plan|report)((?: +[^\s`|)]+)*)", TEXT)
    assert len(commands) >= 10
    group = LazyGroup(name="dpaudit")
    for name, words in commands:
        command = group.get_command(None, name)
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for flag in re.findall(r"--[a-z-]+", words):
            assert flag in known, (name, flag)
