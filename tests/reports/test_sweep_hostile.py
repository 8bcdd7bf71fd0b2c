"""A sweep that somebody handed over: few rows and cells, each run read once, nothing through a link."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpaudit.errors import UsageError
from reports import subjects
from tests.reports import fixtures

CELL = {"folder": "x", "configuration": "c", "seed": 0, "config_sha256": "0", "state": "finished"}
ROW = {"configuration": "c", "series": "x", "method": "dp-sgd", "swept": {}, "seeds": [0]} | dict.fromkeys(
    ("epsilon", "delta", "exact_match")
)


def sweep(place: Path, rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Path:
    tree = {"kind": "sweep", "schema_version": 2, "name": "x", "finished": True, "grid": {}, "overrides": [],
            "seeds": [0], "rows": rows, "cells": cells, "sample_sha256": None, "ledger": []}  # fmt: skip
    (place / "runs").mkdir(parents=True)
    (place / "sweep.json").write_text(json.dumps(tree))
    return place


def test_a_release_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = sweep(tmp_path / "sweep", [ROW] * 400, [CELL] * 5000)
    fixtures.write_run(place / "runs", "dp-sgd", name="x")
    real, read = subjects.load_release, list[Path]()
    monkeypatch.setattr(subjects, "load_release", lambda path, **named: read.append(path) or real(path, **named))
    page = subjects.load_page([place])
    assert len(read) == 1 and len({line.key for line in page.sweeps[0].lines}) == 400


@pytest.mark.parametrize(
    ("rows", "cells", "field"),
    [([ROW] * 501, [CELL], "rows"), ([ROW], [CELL] * 10_001, "cells"),
     ([ROW], [CELL | {"folder": "x" * 5000}], "folder"),
     ([ROW | {"exact_match": {"value": 1e308, "low": None, "high": None, "seeds": 1, "pictures": 1, "n": 1,
                              "covers": "none"}}], [CELL], "value")],
    ids=["rows", "cells", "folder", "value"],
)  # fmt: skip
def test_what_no_sweep_holds_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], cells: list[dict[str, Any]], field: str
) -> None:
    with pytest.raises(UsageError, match=rf"sweep\.json: not a sweep document: .*{field}"):
        subjects.load_page([sweep(tmp_path / "sweep", rows, cells)])


def test_a_linked_table_is_refused(tmp_path: Path) -> None:
    other = sweep(tmp_path / "other", [ROW], [CELL])
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").symlink_to(other / "sweep.json")
    with pytest.raises(UsageError, match="is a symbolic link"):
        subjects.load_page([tmp_path / "sweep"])
