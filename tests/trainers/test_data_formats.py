"""trainers.data.formats and files: every format gives the questions it means, and what is nearly one says how."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dpaudit.config import DataConfig
from dpaudit.errors import UsageError
from trainers.data import load
from trainers.data.formats import LETTER, SHORT
from trainers.records import Dataset, Question


def png(value: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value in range(6):
        (tmp_path / f"{value}.png").write_bytes(png(value))
    test = [{"image": "4.png", "question": "q?", "answer": "a"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, test)))
    return tmp_path


def read(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl", **more: Any) -> Dataset:
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return load(DataConfig(path=str(folder), train=name, test="test.jsonl", **more))


def refused(call: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turns(*texts: str, human: str = "human", model: str = "gpt") -> list[dict[str, str]]:
    return [{"from": model if place % 2 else human, "value": text} for place, text in enumerate(texts)]


FILLER = {"image": "5.png", "question": "f?", "answer": "f"}
DIALOGUE = (Question("what?", "dog"), Question("sure?", "yes", history=(("what?", "dog"),)))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_conversations(folder: Path, name: str) -> None:
    rows = [
        {"id": "1", "image": "0.png", "conversations": turns("<image>\nwhat?", "dog", "sure?", "yes")},
        {"id": "2", "image": "1.png", "conversations": turns("what?\n<image>", "cat")},
        {"id": "3", "image": ["2.png", "3.png"], "conversations": turns("<image>\n<image>\nsame?", "no")},
        {"id": "4", "conversations": turns("hello", "hi")},
    ]
    data = read(folder, rows, name)
    assert data.train[0].pictures[0].questions == DIALOGUE
    assert data.train[1].pictures[0].questions == (Question("what?", "cat"),)
    assert len(data.train[2].pictures[0].shown) == 2
    assert f"train: conversations ({'JSON' if name.endswith('.json') else 'JSONL'}); test: flat (JSONL)" in data.notes
    warnings = " ".join(data.warnings)
    assert "1 row without a picture left out" in warnings
    assert "1 text with a picture inside or behind" in warnings


def test_a_picture_shown_later_is_not_seen_before(folder: Path) -> None:
    said = turns("<image>\nwhat?", "dog", "<image>\nand this?", "cat")
    data = read(
        folder, [{"image": ["0.png", "1.png"], "conversations": said}, {"image": "2.png", "conversations": said[:2]}]
    )
    first, second = data.train[0].pictures
    assert (len(first.shown), len(second.shown)) == (1, 2)
    assert second.questions == (Question("and this?", "cat", history=(("what?", "dog"),)),)


def test_rows_that_share_a_picture_are_one_unit_whatever_they_show_beside(folder: Path) -> None:
    """Against connected components by hand: {0, 1}, {1, 2}, {3} are two units."""
    same = turns("<image><image>same?", "no")
    rows = [
        {"image": ["0.png", "1.png"], "conversations": same},
        {"image": ["3.png"], "conversations": turns("<image>what?", "dog")},
        {"image": ["1.png", "2.png"], "conversations": same},
    ]
    data = read(folder, rows)
    assert [len(unit.pictures) for unit in data.train] == [2, 1]
    assert "part of another's unit" in " ".join(data.warnings)


@pytest.mark.parametrize("place", ["images", "content", "struct", "data url", "prompt"])
def test_chat_messages(folder: Path, place: str) -> None:
    data = base64.b64encode(png(0)).decode()
    inside: dict[str, Any] = {"type": "image"}
    if place == "content":
        inside["image"] = "0.png"
    if place == "data url":
        inside = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    asked = [{"role": "user", "content": [inside, {"type": "text", "text": "what?"}]}]
    rest = [
        {"role": "assistant", "content": [{"type": "text", "text": "dog"}]},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    row: dict[str, Any] = {"messages": [*asked, *rest]}
    if place == "prompt":
        row = {"prompt": [*asked, *rest[:2]], "completion": rest[2:]}
    if place in ("images", "prompt"):
        row["images"] = ["0.png"]
    if place == "struct":
        row["images"] = [{"bytes": data, "path": None}]
    other = json.loads(json.dumps(row).replace("0.png", "1.png").replace(data, base64.b64encode(png(1)).decode()))
    found = read(folder, [row, other])
    assert found.train[0].pictures[0].questions[:2] == DIALOGUE
    assert found.notes[0].startswith("train: messages")


def test_the_cauldron_and_chartqa(folder: Path) -> None:
    said = [{"user": "what?", "assistant": "dog"}, {"user": "sure?", "assistant": "yes"}]
    rows = [{"images": [f"{i}.png"], "texts": said} for i in (0, 1)]
    assert read(folder, rows).train[0].pictures[0].questions == DIALOGUE
    chart = [{"image": f"{i}.png", "query": "how many?", "label": ["7"]} for i in (0, 1)]
    assert read(folder, chart).train[0].pictures[0].questions == (Question(f"how many?{SHORT}", "7", accepted=("7",)),)


def test_lists_of_answers_teach_the_commonest_and_keep_all(folder: Path) -> None:
    plain = {"image": "0.png", "question": "q?", "answers": ["cat", "dog", "dog", ""]}
    annotated = {"image": "1.png", "question": "q?", "answers": [{"answer": "no", "answer_id": 1}, {"answer": "yes"}]}
    data = read(folder, [plain, annotated])
    assert data.train[0].pictures[0].questions[0] == Question(f"q?{SHORT}", "dog", accepted=("cat", "dog", "dog"))
    assert data.train[1].pictures[0].questions[0].answer == "no"
    assert read(folder, [plain, annotated], post_prompt="").train[0].pictures[0].questions[0].text == "q?"
    assert "all of its answers are empty" in refused(lambda: read(folder, [plain | {"answers": [""]}, annotated]))


def test_scoring_takes_all_accepted_answers() -> None:
    from reports.tasks.utils import process_results

    ten = ["dog"] * 2 + ["cat"] * 5 + ["hound"] * 3
    for said, wanted in (("dog", 2 / 3), ("cat", 1.0), ("hound", 1.0), ("cow", 0.0)):
        assert process_results({"answer": "cat", "answers": json.dumps(ten)}, [said])["exact_match"] == pytest.approx(
            wanted
        )
    assert process_results({"answer": "a", "answers": json.dumps(["a", "b"])}, ["b"])["exact_match"] == 1
    assert process_results({"answer": "a", "answers": None}, ["b"])["exact_match"] == 0


def test_choices_are_asked_as_lmms_eval_asks_them(folder: Path) -> None:
    rows = [
        {"image": "0.png", "question": "q?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "look"},
        {"image": "1.png", "question": "q?", "choices": ["a cat", "a dog"], "answer": "A", "hint": ""},
        {"image": None, "question": "q?", "choices": ["a", "b"], "answer": 0, "hint": ""},
    ]
    data = read(folder, rows)
    first, second = (unit.pictures[0].questions[0] for unit in data.train)
    assert first == Question(f"Context: look\nq?\nA. a cat\nB. a dog{LETTER}", "B")
    assert second.answer == "A"
    utils = pytest.importorskip("lmms_eval.tasks.scienceqa.utils")
    kwargs = {"format": "default", "pre_prompt": "", "post_prompt": LETTER}
    assert [utils.sqa_doc_to_text(row | {"answer": 0}, kwargs) for row in rows[:2]] == [first.text, second.text]
    assert "number (from 0)" in refused(lambda: read(folder, [rows[0] | {"answer": 2}, rows[1]]))


def test_saved_folders_and_shards(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    rows = [{"image": {"bytes": png(i), "path": None}, "question": f"{i}?", "answer": "a"} for i in range(4)]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(
        folder / "saved", num_shards={"train": 2, "test": 1}
    )
    (folder / "hub" / "data").mkdir(parents=True)
    for index in range(2):
        frame = pd.DataFrame(rows[index * 2 : index * 2 + 2])
        frame.to_parquet(folder / "hub" / "data" / f"train-0000{index}-of-00002.parquet")
    expected = read(folder, [row | {"image": f"{i}.png"} for i, row in enumerate(rows)])
    for name, words in (
        ("saved/train", "save_to_disk, 2 shards"),
        ("hub/train", "Parquet, 2 shards"),
        ("hub/data", "Parquet"),
    ):
        data = load(DataConfig(path=str(folder), train=name, test="test.jsonl"))
        assert words in data.notes[0]
        assert [unit.pictures[0].questions for unit in data.train] == [u.pictures[0].questions for u in expected.train]
    (folder / "hub" / "data" / "train-00001-of-00002.parquet").unlink()
    gone = refused(lambda: load(DataConfig(path=str(folder), train="hub/train", test="test.jsonl")))
    assert "1 of 2 shards are here; missing: train-00001-of-00002" in gone
    whole = refused(lambda: load(DataConfig(path=str(folder), train="saved", test="test.jsonl")))
    assert "saved/test, saved/train" in whole


def test_the_command_that_converts_does(folder: Path) -> None:
    rows = [{"picture": f"{i}.png", "instruction": f"{i}?", "response": "a"} for i in range(3)]
    message = refused(lambda: read(folder, rows, "near.jsonl"))
    assert "no columns 'image', 'question', 'answer'; columns: picture, instruction, response" in message
    command = message.partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True)
    data = load(DataConfig(path=str(folder), train="near-flat.jsonl", test="test.jsonl"))
    assert [unit.pictures[0].questions[0].text for unit in data.train] == ["0?", "1?", "2?"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "0.png", "conversations": turns("<image>a?")}, "must alternate"),
        ({"image": "0.png", "conversations": turns("<image>a?", "b", "c?")}, "must alternate"),
        ({"image": "0.png", "conversations": turns("<image><image>a?", "b")}, "2 times <image> for 1 pictures"),
        ({"image": ["0.png", "1.png"], "conversations": turns("<image>a?", "b")}, "1 times <image> for 2 pictures"),
        (
            {"image": "0.png", "conversations": turns("a?", "b", "<image>c?", "d")},
            "a question before the first picture",
        ),
        ({"image": "0.png", "conversations": turns("<image>a?", "b <image>")}, "an answer shows no picture"),
        ({"image": "0.png", "conversations": turns("<image>a?", "b", model="tool")}, "its role must be"),
        ({"image": "0.png", "conversations": turns("<image>", "b")}, "empty"),
        ({"image": "0.png", "conversations": []}, "must be a list of messages"),
        ({"image": "0.png", "conversations": "text"}, "must be a list of messages"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": 3}]}, "must be text or a list of parts"),
        ({"image": "https://x.org/0.png", "conversations": turns("<image>a?", "b")}, "a link to the web"),
        ({"image": ["0.png", None], "conversations": turns("a?", "b")}, "one of its pictures is nothing"),
        ({"image": ["0.png"] * 17, "conversations": turns("a?", "b")}, "at most 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_conversation_names_its_row(folder: Path, row: dict[str, Any], problem: str) -> None:
    good = {"image": "1.png", "conversations": turns("<image>a?", "b")}
    message = refused(lambda: read(folder, [good, row]))
    assert message.startswith("train.jsonl, row 2, ")
    assert problem in message


def test_files_that_are_nearly_one(folder: Path) -> None:
    rows = [FILLER, FILLER | {"image": "0.png"}]
    (folder / "list.jsonl").write_text(json.dumps(rows, indent=1))
    (folder / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "two.json").write_text(json.dumps({"a": rows, "b": []}))
    (folder / "table.csv").write_text("image,question,answer\n")
    words = {
        "list.jsonl": "Rename it to list.json",
        "lines.json": "rename it to lines.jsonl",
        "two.json": "2 lists (a, b); accepted: a list of rows, e.g. jq '.a' two.json > rows.json",
        "table.csv": "p.read_csv('table.csv').to_parquet('table.parquet')",
        "nothing": "no file 'nothing'",
    }
    for name, problem in words.items():
        message = refused(lambda name=name: load(DataConfig(path=str(folder), train=name, test="test.jsonl")))
        assert problem in message
    (folder / "wrapped.json").write_text(json.dumps({"data": rows}))
    assert len(load(DataConfig(path=str(folder), train="wrapped.json", test="test.jsonl")).train) == 2


def test_merged_files_are_said_by_name_and_shared_ones_are_not_held_out(folder: Path) -> None:
    (folder / "copy.png").write_bytes(png(0))
    rows = [FILLER | {"image": name} for name in ("0.png", "copy.png", "1.png")]
    data = read(folder, rows)
    assert len(data.train) == 2
    assert "2 files show 1 picture, each one record now (0.png = copy.png)" in " ".join(data.warnings)
    assert data.facts is not None
    assert data.facts.held_out == "yes"
    (together,) = (row for row in data.ledger if row.path == "records that belong together")
    assert together.explanation.startswith("Several files show the same picture")
    assert "2" not in together.explanation  # numbers stay with the owner
    assert "test pictures in train" not in {row.path for row in data.ledger}
    shared = read(folder, [FILLER | {"image": "4.png"}, FILLER])
    assert shared.facts is not None
    assert shared.facts.held_out == "no: every picture was in train"
    assert "test pictures in train" in {row.path for row in shared.ledger}
