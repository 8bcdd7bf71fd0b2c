"""Nothing private gets out: a data set whose questions, answers, ids, pictures and folder are marked, a run of every
command on it, and a search for the marks in all that may leave the house or be read over a shoulder.

The kind of a question is not marked: it is a public label by contract, and tables of accuracy are made by it."""

import base64
import io
import json
import re
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.faults import harness, in_process
from tests.faults.scenarios import DUAL_PRIV, SETTINGS
from tests.tiny import save_tiny_llava

MARK = "Zebra"  # in every text
PIXELS = np.frombuffer(b"STRIPEDPIXELS", dtype=np.uint8)  # in every picture, in a row of its own
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def picture(index: int) -> bytes:
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels.reshape(-1)[: len(PIXELS)] = PIXELS
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": base64.b64encode(picture(index)).decode(), "path": None},
            "question": f"which {MARK}question {LETTERS[index % 26]}?",
            "answer": f"{MARK}answer{index % 3}",
            "kind": "animals",
            "patient": f"{MARK}patient{index}",
        }
        for index in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    harness.warm_up()
    folder = Path(tempfile.mkdtemp(prefix="dpaudit-secrets-"))
    data = folder / f"{MARK}home" / "photos"
    data.mkdir(parents=True)
    for name, (first, count) in {"train": (0, 36), "test": (50, 8)}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(first, count)))
    save_tiny_llava(folder / f"{MARK}home" / "model", reserved=8)
    yield folder
    shutil.rmtree(folder)


def train(root: Path, *extra: str) -> list[str]:
    home = root / f"{MARK}home"
    data = [f"data.path={home / 'photos'}", "data.train=train.jsonl", "data.test=test.jsonl", "data.unit=patient"]
    return ["train", *DUAL_PRIV, f"model.path={home / 'model'}", *data, *SETTINGS, *extra]


def marks(content: bytes) -> list[str]:
    """The marks in some bytes, also in the pictures and base64 inside."""
    found = [MARK] if MARK.lower().encode() in content.lower() else []
    found += ["pixels"] if PIXELS.tobytes() in content else []
    for text in re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", content):
        try:
            inner = base64.b64decode(text[: len(text) // 4 * 4])
        except ValueError:
            continue
        found += ["base64"] if MARK.lower().encode() in inner.lower() else []
        if inner.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(inner)) as image:
                found += ["picture"] if PIXELS.tobytes() in np.asarray(image.convert("RGB")).tobytes() else []
    return found


def test_the_search_finds_what_it_looks_for() -> None:
    assert marks(json.dumps(rows(0, 1)).encode()) == [MARK, "picture"]
    assert marks(base64.b64encode(f"all about {MARK}s and their stripes in the sun".encode())) == ["base64"]
    assert marks(np.full(4, 7, np.uint8).tobytes() + PIXELS.tobytes()) == ["pixels"]
    assert marks(string.printable.encode()) == []


@pytest.mark.slow
def test_no_mark_leaves_a_run(root: Path) -> None:
    run, report = root / "run", root / "report.html"
    commands = [
        train(root, "canaries.count=12", "--out", str(run)),
        ["audit", str(run), "--json"],
        ["benchmark", str(run), "--limit", "4"],
        ["report", str(run), "-o", str(report)],
    ]
    for command in commands:
        ended = harness.run(command, [root], root)
        assert ended.code in (0, 1, 3), (command[0], ended.err)
        assert marks(ended.out.encode()) == [], (command[0], ended.out)
        assert marks(ended.err.encode()) == [], (command[0], ended.err)
    open_files = [path for path in (run / "release").rglob("*") if path.is_file()]
    logs = [run / "private" / "metrics.jsonl", *(run / "private").glob("*.log")]
    assert len(open_files) >= 9 and len(logs) >= 2, (open_files, logs)
    for path in (report, *open_files, *logs):
        assert marks(path.read_bytes()) == [], path
    shown = root / "examples.html"  # asked for by flag: then the page says so in its ledger
    harness.run(["report", str(run), "-o", str(shown), "--show-examples"], [root], root)
    assert "UNACCOUNTED" in shown.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("--mia", "--references", "2"), ("--white-box", "--count", "30"), ("--contract", "--fusion")],
    ids=lambda flags: flags[0],
)
def test_no_mark_leaves_an_audit(root: Path, flags: tuple[str, ...]) -> None:
    """Every further kind of audit: what it prints, for people and as JSON, what it releases, and its page."""
    run, report = root / f"audited{flags[0]}", root / "audited.html"
    command = train(root, "canaries.count=12", "--out", str(run))
    assert harness.run(command, [root], root).code == 0
    audits = [["audit", str(run), *flags, "--json"]]
    if "--contract" not in flags:  # half a minute
        audits.append(["audit", str(run), *flags])
    for typed in (*audits, ["report", str(run), "-o", str(report)]):
        ended = harness.run(typed, [root], root, prepare=in_process.patch)
        assert ended.code in (0, 1, 3), (typed, ended.err)
        assert marks(ended.out.encode()) == [] and marks(ended.err.encode()) == [], (typed, ended.out, ended.err)
    logs = [path for path in run.rglob("*") if path.suffix in (".jsonl", ".log") and path.is_file()]
    released = [path for path in run.rglob("release/**/*") if path.is_file()]  # of its twins too
    assert logs and len(released) >= 9
    for path in (report, *logs, *released):
        assert marks(path.read_bytes()) == [], path


@pytest.mark.slow
def test_no_mark_leaves_a_sweep(root: Path) -> None:
    """Its jobs are processes with their own logs. A sweep repeats its grid, so that names a folder without marks."""
    home, sweep, report = root / "home", root / "sweep", root / "sweep.html"
    shutil.copytree(root / f"{MARK}home", home)
    settings = [item for item in train(root, "privacy.epsilon=null")[1:] if not item.startswith("seed")]
    pairs = [item.replace(f"{MARK}home", "home").split("=", 1) for item in settings]
    grid = {"name": "small", "settings": {name: yaml.safe_load(value) for name, value in pairs}}
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = ["sweep", str(root / "grid.yaml"), "--out", str(sweep), "--audit", "fusion"]
    told = []
    for typed in (command, [*command, "--resume", "--json"], ["report", str(sweep), "-o", str(report)]):
        ended = harness.run(typed, [root], root)
        assert ended.code == 0, ended.err
        told += [ended.out.encode(), ended.err.encode()]
    logs = [path for path in sweep.rglob("*") if path.suffix in (".jsonl", ".log") and path.is_file()]
    released = [path for path in sweep.rglob("release/**/*") if path.is_file()]
    assert len(logs) >= 2 and len(released) >= 8
    for path in (report, sweep / "sweep.json", *logs, *released):
        assert marks(path.read_bytes()) == [], path
    assert [content for content in told if marks(content)] == []


BROKEN: dict[str, Any] = {
    "a long question": {"question": MARK * 1000},
    "a control character": {"answer": f"{MARK}\x07"},
    "no picture": {"image": {"bytes": base64.b64encode(MARK.encode() * 20).decode(), "path": None}},
    "a picture elsewhere": {"image": f"../{MARK}.png"},
    "a missing file": {"image": f"{MARK}.png"},
    "bytes that are no base64": {"image": {"bytes": f"{MARK}!", "path": None}},
    "an object for an answer": {"answer": {MARK: MARK}},
    "an object for a patient": {"patient": {MARK: MARK}},
    "a fraction for a patient": {"patient": 0.5},
    "half a surrogate pair": {"question": f"{MARK}\ud800"},
    "an answer too long for the context": {"answer": f"{MARK}" * 99, "question": f"{MARK} " * 300},
    "a nested picture": {"image": {"bytes": {MARK: [MARK]}, "path": {MARK: 1}}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_error_quotes_a_row(root: Path, name: str) -> None:
    home = root / f"{MARK}home" / "photos"
    changed = rows(0, 36)
    changed[5] = {**changed[5], **BROKEN[name]}
    (home / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    ended = harness.run(train(root, "data.train=broken.jsonl", "--out", str(root / "broken")), [root], root, timeout=60)
    shutil.rmtree(root / "broken", ignore_errors=True)
    assert ended.code == 2, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    assert MARK not in ended.err.replace(f"{MARK}home", ""), ended.err  # a path that the user typed
    assert "broken.jsonl, row 6" in ended.line or "positions" in ended.line, ended.line


def test_no_error_quotes_a_damaged_file(root: Path) -> None:
    home = root / f"{MARK}home" / "photos"
    good = "".join(json.dumps(row) + "\n" for row in rows(0, 36))
    for name, content in {
        "half.jsonl": good[: len(good) // 2].encode(),
        "list.jsonl": f'["{MARK}"]\n'.encode(),
        "deep.jsonl": (f'{{"{MARK}":' + "[" * 100_000).encode(),
        "latin.jsonl": f'{{"question": "{MARK}\xe9"}}'.encode("latin-1"),
        "text.parquet": MARK.encode() * 100,
        "half.parquet": b"PAR1" + MARK.encode() * 100 + b"PAR1",
        "empty.jsonl": b"",
    }.items():
        (home / name).write_bytes(content)
        command = train(root, f"data.train={name}", "--out", str(root / "broken"))
        ended = harness.run(command, [root], root, timeout=60)
        shutil.rmtree(root / "broken", ignore_errors=True)
        assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1, (name, ended.err)
        assert name in ended.err and MARK not in ended.err.replace(f"{MARK}home", ""), ended.err
