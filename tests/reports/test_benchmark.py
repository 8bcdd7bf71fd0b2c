"""The lmms-eval bridge against an oracle: targets are written so that the score is known beforehand."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: the utility bridge is NOT tested")

from attacks.training import start_run
from dpaudit.config import resolve
from dpaudit.documents import BenchmarkDocument
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.runs import RunFolder
from reports.benchmark import benchmark_many
from reports.heldout import export
from reports.process import worker_environment
from reports.worker import TASK
from tests import commands
from tests.tiny import save_tiny_llava
from trainers.records import Dataset, Picture, Question, Unit
from trainers.run import load_model

PICTURES = 12
KINDS = ("digit", "parity")
Rigged = tuple[RunFolder, dict[tuple[int, str], bool], float]  # run, which questions it gets right, base model's share


def picture(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder: Path, name: str, first: int, answers: dict[tuple[int, str], str]) -> None:
    lines = []
    for index in range(first, first + PICTURES):
        path = folder / f"{index}.png"
        path.write_bytes(picture(index))
        for kind in KINDS:
            row = {"image": path.name, "question": f"{kind} of it?", "kind": kind}
            lines.append(json.dumps({**row, "answer": answers.get((index, kind), "even")}))
    (folder / name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def rigged(tmp_path_factory: pytest.TempPathFactory) -> Rigged:
    """A finished run whose targets are, for known questions, what its model says (in capitals, with spaces)."""
    root = tmp_path_factory.mktemp("rigged")
    data, tiny = root / "data", save_tiny_llava(root / "tiny")
    data.mkdir()
    write_split(data, "train.jsonl", 100, {})
    write_split(data, "test.jsonl", 0, {})
    config = resolve(
        {
            "method": "dp-sgd",
            "seed": 1,
            "model": {"path": str(tiny), "device": "cpu", "lora": {"rank": 2}},
            "training": {"steps": 1, "batch_size": 4},
            "data": {"path": str(data), "train": "train.jsonl", "test": "test.jsonl"},
        }
    )
    run = start_run(config, root / "run")
    pixels = [np.asarray(Image.open(io.BytesIO(picture(index)))) for index in range(PICTURES)]
    asked = [(index, kind) for index in range(PICTURES) for kind in KINDS]
    questions = [f"{kind} of it?" for _, kind in asked]
    shown = [pixels[index] for index, _ in asked]
    said = [text.partition("\n")[0] for text in load_model(run, "cpu").answer(shown, questions)]
    base_said = [text.partition("\n")[0] for text in load_model(None, "cpu", config=config).answer(shown, questions)]
    answers, right = {}, {}
    for (index, kind), text in zip(asked, said, strict=True):
        usable = text.isprintable() and bool(text.strip()) and text.upper().lower() == text.lower()
        right[index, kind] = usable and (index % 3 != 0 if kind == "digit" else index % 2 == 0)
        answers[index, kind] = f"  {text.upper()} " if right[index, kind] else "wrong"
    pairs = zip(base_said, answers.values(), strict=True)
    base_right = sum(" ".join(a.casefold().split()) == " ".join(b.casefold().split()) for a, b in pairs) / len(asked)
    write_split(data, "test.jsonl", 0, answers)
    return run, right, base_right


def test_scores_are_the_rigged_ones(rigged: Rigged) -> None:
    run, right, base_right = rigged
    assert 5 <= sum(right.values()) <= 19  # of 24: the oracle itself is not trivial
    messages: list[str] = []
    document = benchmark_many([run], batch_size=5, device="cpu", progress=messages.append)[0]
    scores = document.tasks[TASK]
    for kind in KINDS:
        of_kind = [value for (_, own), value in right.items() if own == kind]
        assert scores[f"exact_match/{kind}"].value == pytest.approx(sum(of_kind) / PICTURES)
    overall = scores["exact_match"]
    assert overall.value == pytest.approx(sum(right.values()) / len(right))
    assert (overall.n, overall.pictures) == (2 * PICTURES, PICTURES)
    assert document.base is not None and document.base[TASK]["exact_match"].value == pytest.approx(base_right)
    assert document.lmms_eval_version.startswith("0.7") and "{question}" in document.prompt
    assert (document.precision, document.device, document.batch_size) == ("float32", "cpu", 5)
    assert BenchmarkDocument.read(run.benchmark) == document
    assert sorted(m for m in messages if m.startswith("measured")) == ["measured base model", "measured run"]
    assert sorted(path.name for path in run.private.glob("benchmark*")) == ["benchmark.log"]  # the export is gone


def test_command_line_agrees_and_the_batch_size_changes_nothing(rigged: Rigged, tmp_path: Path) -> None:
    run, right, _ = rigged
    words = ["benchmark", run.path, "--no-base", "--batch-size", "64", "--limit", "9", "--json"]
    done = commands.run(*words, cwd=tmp_path)
    assert done.code == 0, done.stderr
    document = BenchmarkDocument.model_validate_json(done.stdout)
    metric = document.tasks[TASK]["exact_match/parity"]
    assert metric.n == 9 and document.base is None
    assert metric.value == pytest.approx(sum(right[index, "parity"] for index in range(9)) / 9)
    assert list(tmp_path.iterdir()) == []  # lmms-eval wrote nothing where the user stands


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--limit", "1"], 2, "--limit"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--device", "cuda:9"], 4, "cuda"),
    ],
)
def test_bad_input_is_one_line(rigged: Rigged, arguments: list[str], code: int, words: str) -> None:
    run, _, _ = rigged
    done = commands.run("benchmark", run.path, *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpaudit: ")]
    assert done.code == code and len(lines) == 1 and words in lines[0] and "Traceback" not in done.stderr


def test_a_killed_benchmark_leaves_no_worker_and_the_next_one_cleans_up(rigged: Rigged, tmp_path: Path) -> None:
    run, right, _ = rigged
    arguments = ["benchmark", str(run.path), "--no-base"]
    process = commands.begin(arguments, stdout=tmp_path / "out", stderr=tmp_path / "err")
    deadline = time.monotonic() + 60
    while not (specs := list(run.private.glob("benchmark-*/worker-0/benchmark.log"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # alone, not what it started
    process.wait()
    place = str(specs[0].parent)

    def alive() -> bool:
        listing = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        with contextlib.suppress(OSError):
            return any(place in (entry / "cmdline").read_text() for entry in listing if (entry / "cmdline").exists())
        return True  # a process ended while the list was read: look again

    while alive() and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert not alive()
    assert list(run.private.glob("benchmark-*"))  # kill -9 cleans nothing
    document = benchmark_many([run], base=False, device="cpu")[0]
    assert document.tasks[TASK]["exact_match"].value == pytest.approx(sum(right.values()) / len(right))
    assert [path.name for path in run.private.glob("benchmark*")] == ["benchmark.log"]


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(UsageError):
        benchmark_many([run])


def test_without_lmms_eval_the_mend_is_named(rigged: Rigged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where lmms-eval is there and what it needs is not: one command brings both."""
    for present in ((), ("lmms_eval", "loguru")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, present=present: name in present or None)
        with pytest.raises(EnvironmentFailure, match="datasets") as caught:
            benchmark_many([rigged[0]])
        assert "pip install 'dpaudit[benchmark]' && pip install --no-deps 'lmms-eval" in str(caught.value)


def test_export_keeps_pixels_and_order_and_hashes_everything(tmp_path: Path) -> None:
    def units(answer: str, shade: int) -> tuple[Unit, ...]:
        pixels = np.full((5, 7, 3), shade, dtype=np.uint8)
        return (Unit("u", (Picture("p", pixels, (Question("q1", answer, "k"), Question("q2", "b", "k"))),)),)

    def dataset(answer: str, shade: int) -> Dataset:
        return Dataset("d", "image", train=(), test=units(answer, shade))

    first = export(dataset("a", 3), tmp_path / "x.parquet")
    assert first.targets == ("a", "b") and first.clusters == ("u", "u")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "x.parquet")
    image = Image.open(io.BytesIO(table.column("image")[1].as_py()["bytes"]))
    assert image.size == (7, 5) and np.asarray(image)[0, 0, 0] == 3
    hashes = {export(dataset(a, s), tmp_path / "y.parquet").sha256 for a, s in (("a", 3), ("c", 3), ("a", 4))}
    assert len(hashes) == 3 and first.sha256 in hashes
    with pytest.raises(UsageError, match="no test questions"):
        export(Dataset("d", "image", train=(), test=()), tmp_path / "z.parquet")


def test_the_worker_is_offline_and_keeps_its_caches_together(tmp_path: Path) -> None:
    environment = worker_environment(tmp_path, {"HF_HOME": "/somewhere", "PATH": "/bin"})
    assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
    assert environment["HF_HUB_CACHE"] == "/somewhere/hub"  # checkpoints that training fetched
    inside = [name for name, value in environment.items() if value.startswith(str(tmp_path))]
    assert {"HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "LMMS_EVAL_HOME"} <= set(inside)


def test_the_plugin_names_the_model_class() -> None:
    """In a process of its own: importing lmms-eval reseeds and patches."""
    code = (
        "from reports.plugin import manifests; from lmms_eval.models.registry_v2 import ModelRegistryV2 as R;"
        "r = R(); [r.register_manifest(m) for m in manifests()]; print(r.get_model_class('dpaudit').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("DpauditModel"), done.stderr[-500:]
