"""lmms-eval's own tasks on local copies, and local sets of any kind, against numbers worked out by hand.

A tiny model says what it says; the copies are written so that known annotators agree with it. All tasks are measured in
one start of lmms-eval, and once more through lmms-eval's own command line, in other batches.
"""

import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image as DatasetImage
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: the utility bridge is NOT tested")

from attacks.training import start_run
from dpaudit.cli.app import run as command_line
from dpaudit.config import resolve
from dpaudit.documents import BenchmarkDocument
from dpaudit.runs import RunFolder
from reports.benchmark import benchmark
from reports.heldout import export, write_questions
from reports.process import worker_environment
from tests import commands
from tests.tiny import save_tiny_llava
from trainers.data import load
from trainers.run import load_model

PICTURES = 8
SHORT = "\nAnswer the question using a single word or phrase."
# Annotators (of ten) who say what the model says -> soft accuracy, by hand. With k of them, each of the k has k - 1
# others who agree, each of the 10 - k has k: mean of min(1, others / 3) over the ten. k = 2: (2 * 1/3 + 8 * 2/3) / 10.
SOFT = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 7: 1.0}
AGREE = [0, 1, 2, 3, 4, 7, 2, 0]


def pixels(index: int) -> Any:
    return np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def picture(index: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels(index)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def speaking(folder: Path) -> Path:
    """A tiny model that says small letters and spaces only: the other rows of its output matrix are zero."""
    save_tiny_llava(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    spoken = [index for token, index in vocabulary.items() if re.fullmatch("Ġ?[a-z]+", token)]
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "embed_tokens" in name or "lm_head" in name:
            kept = tensor[spoken].clone()
            tensor.zero_()
            tensor[spoken] = kept
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run on pictures of three wards."""
    root = tmp_path_factory.mktemp("run")
    data = root / "data"
    data.mkdir()
    for name, first in (("train.jsonl", 100), ("test.jsonl", 0)):
        lines = []
        for index in range(first, first + 12):
            (data / f"{index}.png").write_bytes(picture(index)["bytes"])
            for kind in ("digit", "parity"):
                row = {"image": f"{index}.png", "question": f"{kind} of it?", "answer": "even", "kind": kind}
                lines.append(json.dumps({**row, "ward": "north" if index % 2 else "south"}))
        (data / name).write_text("\n".join(lines) + "\n")
    settings = {
        "method": "dp-sgd",
        "seed": 1,
        "model": {"path": str(speaking(root / "tiny")), "device": "cpu", "lora": {"rank": 2}},
        "training": {"steps": 1, "batch_size": 4},
        "data": {"path": str(data), "train": "train.jsonl", "test": "test.jsonl"},
    }
    return start_run(resolve(settings), root / "run")


class Copies:
    """Local copies for the model of `run`, with the scores that they must give."""

    def __init__(self, run: RunFolder, folder: Path) -> None:
        self.folder = folder
        self.model = load_model(run, "cpu")
        self.expected: dict[str, dict[str, float]] = {}
        self.paths: dict[str, Path] = {}

    def says(self, texts: list[str], tokens: int = 12, until: str | None = None) -> list[str]:
        shown = [pixels(index) for index in range(len(texts))]
        said = self.model.answer(shown, texts, max_new_tokens=tokens)
        return [text.partition(until)[0].strip() if until else text.strip() for text in said]

    def textvqa(self) -> None:
        """As on the hub: validation files, ten annotators; they write capitals and articles, which do not count."""
        questions = [f"what is written on sign {index}?" for index in range(PICTURES)]
        said = self.says([question.capitalize() + SHORT for question in questions], until="ASSISTANT:")
        assert len(set(said)) > 3 and all(re.fullmatch("[a-z ]+", text) for text in said)
        answers = []
        for k, text in zip(AGREE, said, strict=True):
            spelt = [f"The {text.upper()}", f"{text}.", text, f" {text.title()} "]
            answers.append([spelt[place % 4] for place in range(k)] + ["wrong"] * (10 - k))
        target = self.folder / "textvqa" / "data"
        target.mkdir(parents=True)
        for part, chosen in enumerate((range(5), range(5, PICTURES))):
            rows = {
                "image": [picture(index) for index in chosen],
                "question": [questions[index] for index in chosen],
                "answers": [answers[index] for index in chosen],
                "question_id": list(chosen),
            }
            # No word in the file says that `image` is a picture.
            pq.write_table(pa.table(rows), target / f"validation-0000{part}-of-00002.parquet")
        pq.write_table(pa.table({"image": [picture(0)]}), target / "train-00000-of-00001.parquet")
        self.paths["textvqa_val"] = self.folder / "textvqa"
        self.expected["textvqa_val"] = {"exact_match": sum(SOFT[k] for k in AGREE) / PICTURES}

    def slake(self) -> None:
        """As on the hub: test.json and pictures beside it, English and Chinese."""
        questions = [f"which organ {index}?" for index in range(PICTURES)]
        said = self.says([question + SHORT for question in questions], tokens=32)
        folder = self.folder / "slake"
        (folder / "imgs").mkdir(parents=True)
        listed, right = [], []
        for index, (question, text) in enumerate(zip(questions, said, strict=True)):
            (folder / "imgs" / f"{index}.png").write_bytes(picture(index)["bytes"])
            right.append(index % 3 == 0)
            row = {"qid": index, "img_name": f"{index}.png", "question": question, "q_lang": "en"}
            row |= {"answer": text if right[-1] else "wrong", "modality": "CT" if index < 4 else "MRI"}
            listed.append({**row, "answer_type": "OPEN" if index % 2 else "CLOSED", "content_type": "Organ"})
        (folder / "test.json").write_text(json.dumps(listed))
        self.paths["slake"] = folder
        self.expected["slake_en"] = {
            "slake_accuracy": sum(right) / PICTURES,
            "slake_closed_accuracy": sum(right[::2]) / 4,
            "slake_ct_accuracy": sum(right[:4]) / 4,
        }

    def gqa(self) -> None:
        """As on the hub: questions and pictures apart; two questions about each picture."""
        questions = [f"is it red {index}?" for index in range(PICTURES)]
        shown = [pixels(index // 2) for index in range(PICTURES)]
        said = [t.strip() for t in self.model.answer(shown, [q + SHORT for q in questions], max_new_tokens=16)]
        answers = [text if index < 3 else "wrong" for index, text in enumerate(said)]
        for part, columns in (
            ("instructions", {"id": [str(i) for i in range(8)], "imageId": [f"n{i // 2}" for i in range(8)]}),
            ("images", {"id": [f"n{i}" for i in range(4)], "image": [picture(i) for i in range(4)]}),
        ):
            folder = self.folder / "gqa" / f"testdev_balanced_{part}"
            folder.mkdir(parents=True)
            if part == "instructions":
                columns |= {"question": questions, "answer": answers}
            pq.write_table(pa.table(columns), folder / "testdev-00000-of-00001.parquet")
        self.paths["gqa"] = self.folder / "gqa"
        self.expected["gqa"] = {"exact_match": 3 / PICTURES}

    def rad(self) -> None:
        """JSONL with pictures beside it; an answer counts without case, articles and a point at its end."""
        asked = ["where is it"] * PICTURES
        said = self.says(asked, tokens=24)
        folder = self.folder / "rad"
        folder.mkdir()
        lines = []
        for index, text in enumerate(said):
            (folder / f"{index}.png").write_bytes(picture(index)["bytes"])
            right = {"answer": f"The {text.upper()}.", "answer_type": "OPEN"}
            wrong = {"answer": "yes" if index % 2 else "qqq zzz"}  # yes without a word on its type: closed
            row = {"image": f"{index}.png", "question": asked[index], "kind": "where" if index < 5 else "what"}
            lines.append(json.dumps({**row, **(right if index < 2 else wrong)}))
        (folder / "test.jsonl").write_text("\n".join(lines))
        self.paths["dpaudit_vqa_rad"] = folder / "test.jsonl"
        # open: 0, 1 (right), 2, 4, 6; closed: 3, 5, 7
        self.expected["dpaudit_vqa_rad"] = {
            "exact_match": 2 / 8,
            "open_accuracy": 2 / 5,
            "closed_accuracy": 0.0,
            "exact_match/where": 2 / 5,
            "exact_match/what": 0.0,
        }

    def wards(self) -> None:
        """A yes/no set that this model can't read: it says neither."""
        columns = {
            "question": [f"is there a stone {index}?" for index in range(6)],
            "answer": ["Yes", "no"] * 3,
            "group": ["north", "south"] * 3,
            "image": [picture(index) for index in range(6)],
        }
        write_questions(self.folder / "wards.parquet", columns)
        self.paths["dpaudit_yes_no@wards"] = self.folder / "wards.parquet"
        self.expected["dpaudit_yes_no@wards"] = {"accuracy": 0.0, "yes_rate": 0.0, "recall": 0.0, "f1": 0.0}

    def scienceqa(self) -> None:
        columns = {
            "image": [picture(index) for index in range(4)],
            "question": ["which one?"] * 4,
            "choices": [["a cat", "a dog"]] * 4,
            "answer": [0, 1, 0, 1],
            "hint": ["", "look closely", "", ""],
        }
        pq.write_table(pa.table(columns), self.folder / "scienceqa.parquet")
        self.paths["scienceqa_img"] = self.folder / "scienceqa.parquet"
        self.expected["scienceqa_img"] = {"exact_match": 0.0}

    def pope(self) -> None:
        columns = {
            "image": [picture(index // 2) for index in range(6)],
            "question": [f"is there a cat {index}?" for index in range(6)],
            "answer": ["yes", "yes", "yes", "yes", "no", "no"],
            "question_id": [str(index) for index in range(6)],
            "category": ["popular", "random", "adversarial"] * 2,
        }
        pq.write_table(pa.table(columns), self.folder / "pope.parquet")
        self.paths["pope"] = self.folder / "pope.parquet"
        # The "yes ratio" of lmms-eval's POPE counts true answers, not the model's: 4 of 6, whatever is said.
        self.expected["pope"] = {"pope_accuracy": 0.0, "pope_recall": 0.0, "pope_yes_ratio": 4 / 6}


@pytest.fixture(scope="module")
def copies(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    made = Copies(run, tmp_path_factory.mktemp("copies"))
    for write in (made.textvqa, made.slake, made.gqa, made.rad, made.wards, made.scienceqa, made.pope):
        write()
    return made


@pytest.fixture(scope="module")
def document(run: RunFolder, copies: Copies) -> BenchmarkDocument:
    names = ("dpaudit_vqa", *copies.paths)
    return benchmark(run, tasks=names, data=copies.paths, group="ward", base=False, batch_size=3, device="cpu")


def test_every_task_gives_the_number_worked_out_by_hand(document: BenchmarkDocument, copies: Copies) -> None:
    assert list(document.tasks) == ["dpaudit_vqa", *copies.expected]  # slake's Chinese half has no row here
    assert copies.expected["textvqa_val"]["exact_match"] == pytest.approx(4.4 / 8)
    for task, metrics in copies.expected.items():
        found = {name: document.tasks[task][name].value for name in metrics}
        assert found == pytest.approx(metrics), task


def test_numbers_carry_what_it_takes_to_measure_them_again(document: BenchmarkDocument, run: RunFolder) -> None:
    assert BenchmarkDocument.read(run.benchmark) == document
    about = document.about["textvqa_val"]
    assert (about.headline, about.data, about.scored_by) == ("exact_match", "local copy", "lmms-eval, task textvqa_val")
    assert about.prompt.count("{question}") == 1 and "{question}" + SHORT in about.prompt
    assert (about.batch_size, about.questions, about.pictures, about.limit) == (3, PICTURES, PICTURES, None)
    assert (about.precision, about.device) == ("float32", "cpu") and about.lmms_eval_version.startswith("0.7")
    assert document.about["dpaudit_yes_no@wards"].scored_by == "dpaudit, task dpaudit_yes_no"
    assert set(document.sample_sha256) == set(document.tasks)
    assert len(set(document.sample_sha256.values())) == len(document.tasks)


def test_intervals_count_pictures(document: BenchmarkDocument) -> None:
    scored = document.tasks["gqa"]["exact_match"]
    assert (scored.n, scored.pictures) == (8, 4)  # two questions about each picture stand or fall together
    soft = document.tasks["textvqa_val"]["exact_match"]
    assert soft.low is not None and soft.high is not None and 0.0 < soft.low < soft.value < soft.high < 1.0
    closed = document.tasks["dpaudit_vqa_rad"]["closed_accuracy"]
    assert (closed.low, closed.high) == (None, None)  # all wrong: no resample moves it, so its spread is unknown
    absent = document.tasks["slake_en"]
    assert "slake_xray_accuracy" not in absent and absent["slake_ct_accuracy"].n == 4  # lmms-eval itself says 0
    assert "precision" not in document.tasks["dpaudit_yes_no@wards"]  # nothing was called yes


def test_groups_of_units_and_their_gap(document: BenchmarkDocument) -> None:
    own = document.tasks["dpaudit_vqa"]
    assert {own[f"exact_match/unit group: {ward}"].n for ward in ("north", "south")} == {12}
    gap = next(gap for gap in document.gaps if (gap.task, gap.grouping) == ("dpaudit_vqa", "unit group"))
    assert (
        gap.value
        == own[f"exact_match/unit group: {gap.best}"].value - own[f"exact_match/unit group: {gap.worst}"].value
    )


def test_lmms_evals_own_command_line_agrees(
    run: RunFolder, copies: Copies, document: BenchmarkDocument, tmp_path: Path
) -> None:
    """Built-in task and held-out questions through `lmms-eval --model dpaudit`, in other batches."""
    package = find_spec("lmms_eval")
    assert package is not None and package.origin is not None
    export(load(run.read_config().data), tmp_path / "held-out.parquet")
    files = sorted((copies.folder / "textvqa" / "data").glob("validation-*"))
    whole = load_dataset("parquet", data_files=[str(file) for file in files], split="train", cache_dir=tmp_path / "hf")
    whole.cast_column("image", DatasetImage()).to_parquet(tmp_path / "textvqa.parquet")
    tasks = Path(package.origin).parent / "tasks"
    ours = Path(find_spec("reports").submodule_search_locations[0]) / "tasks"  # type: ignore[union-attr, index]
    for name, yaml, split, file in (
        ("hand_textvqa", tasks / "textvqa" / "textvqa_val.yaml", "validation", "textvqa.parquet"),
        ("hand_vqa", ours / "dpaudit_vqa.yaml", "test", "held-out.parquet"),
    ):
        lines = [f"include: {yaml}", f"task: {name}", "dataset_path: parquet"]
        lines += ["dataset_kwargs:", "  data_files:", f"    {split}: {tmp_path / file}"]
        if name == "hand_textvqa":
            lines += ["metric_list:", "  - {metric: exact_match, aggregation: mean, higher_is_better: true}"]
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "dpaudit", "--model_args", f"run={run.path}"]
    command += ["--tasks", "hand_textvqa,hand_vqa", "--include_path", str(tmp_path), "--batch_size", "7"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env=worker_environment(tmp_path, os.environ), capture_output=True, text=True, check=False
    )
    found = list((tmp_path / "out").rglob("*_results.json"))
    assert len(found) == 1, done.stderr[-2000:]  # its exit code is 0 whatever happens
    results = json.loads(found[0].read_text())["results"]
    for name, task in (("hand_textvqa", "textvqa_val"), ("hand_vqa", "dpaudit_vqa")):
        assert results[name]["exact_match,none"] == document.tasks[task]["exact_match"].value  # identical, not near


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tasks", "pope"], 4, "--data pope=PATH"),
        (["--tasks", "dpaudit_pathvqa"], 2, "--data dpaudit_pathvqa=PATH"),
        (["--data", "pope"], 2, "TASK=PATH"),
        (["--data", "pope=/no/such/place"], 2, "no file or folder"),
        (["--data", "pope={wards}"], 2, "question_id"),
        (["--data", "dpaudit_yes_no={rad}"], 2, "row 1, answer: must be yes or no"),
        (["--tasks", "pope", "--data", "gqa={wards}"], 2, "a task that --tasks names"),
        (["--group", "no_such_column"], 2, "no_such_column"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    run: RunFolder,
    copies: Copies,
    arguments: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"wards": copies.paths["dpaudit_yes_no@wards"], "rad": copies.paths["dpaudit_vqa_rad"]}
    given = [text.format(**places) for text in arguments]
    assert command_line(["benchmark", str(run.path), *given]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpaudit: ")]
    assert len(lines) == 1 and words in lines[0]


def test_a_question_without_a_picture_and_an_unknown_task_are_one_line(run: RunFolder, tmp_path: Path) -> None:
    columns = {"question": ["which?"], "choices": [["a", "b"]], "answer": [0], "hint": [""]}
    image = pa.array([None], type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({**columns, "image": image}), tmp_path / "x.parquet")
    data = f"scienceqa_img={tmp_path / 'x.parquet'}"
    done = commands.run("benchmark", run.path, "--no-base", "--device", "cpu", "--data", data)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpaudit: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "got '0 pictures'; accepted: 1 to 16 pictures a question" in lines[0]
