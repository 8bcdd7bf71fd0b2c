"""Columns of the hub's sets, twenty synthetic rows of each: the units, question and answer that they mean."""

# ruff: noqa: C408

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dpaudit.config import DataConfig
from trainers.data import load
from trainers.data.formats import LETTER, SHORT


def image(seed: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ScienceQA": lambda i: dict(
        image=image(i) if i % 3 else None,
        question=f"q{i}?",
        choices=["a", "b", "c"],
        answer=i % 3,
        hint="h" if i % 2 else "",
        task="closed choice",
        grade="grade2",
        subject="s",
        topic="t",
        category="c",
        skill="k",
        lecture="l",
        solution="s",
    ),
    "TextVQA": lambda i: dict(
        image_id=f"x{i}",
        question_id=i,
        question=f"q{i}?",
        question_tokens=["q"],
        image=image(i),
        image_width=8,
        image_height=8,
        flickr_original_url="u",
        flickr_300k_url="u",
        answers=["a"] * 9 + ["b"],
        image_classes=["c"],
        set_name="train",
        ocr_tokens=["t"],
    ),
    "OK-VQA": lambda i: dict(
        question_id=i, image=image(i), question=f"q{i}?", answers=["a", "b"] * 5, question_type="t", answer_type="o"
    ),
    "VizWiz": lambda i: dict(
        question_id=str(i),
        image=image(i),
        question=f"q{i}?",
        answers=["a"] * 6 + ["unanswerable"] * 4,
        category="other",
    ),
    "DocVQA": lambda i: dict(
        questionId=str(i),
        question=f"q{i}?",
        question_types=["f"],
        image=image(i),
        docId=i,
        ucsf_document_id="u",
        ucsf_document_page_no="1",
        answers=["a", "A"],
        data_split="train",
    ),
    "VQAv2": lambda i: dict(
        question_type="t",
        multiple_choice_answer="a",
        answers=[dict(answer="a", answer_confidence="yes", answer_id=k) for k in range(10)],
        image_id=i,
        answer_type="other",
        question_id=i,
        question=f"q{i}?",
        image=image(i),
    ),
    "ChartQA-M4": lambda i: dict(image=image(i), query=f"q{i}?", label=["7"], human_or_machine=0),
    "ChartQA-lmms": lambda i: dict(type="h", question=f"q{i}?", answer="7", image=image(i)),
    "PathVQA": lambda i: dict(image=image(i), question=f"q{i}?", answer="yes"),
    "VQA-RAD": lambda i: dict(image=image(i), question=f"q{i}?", answer="yes"),
}

EXPECTED = {
    "ScienceQA": (13, f"Context: h\nq1?\nA. a\nB. b\nC. c{LETTER}", "B"),
    **dict.fromkeys(["TextVQA", "OK-VQA", "VizWiz", "DocVQA", "VQAv2"], (20, f"q0?{SHORT}", "a")),
    "ChartQA-M4": (20, f"q0?{SHORT}", "7"),
    "ChartQA-lmms": (20, "q0?", "7"),
    **dict.fromkeys(["PathVQA", "VQA-RAD"], (20, "q0?", "yes")),
}


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_a_local_copy_of_a_set_of_the_hub(tmp_path: Path, name: str) -> None:
    (tmp_path / "CONFIG").mkdir()
    for split, first, count in (("train", 0, 20), ("validation", 100, 5)):
        rows = [SCHEMAS[name](first + index) for index in range(count)]
        pd.DataFrame(rows).to_parquet(tmp_path / "CONFIG" / f"{split}-00000-of-00001.parquet")
    data = load(DataConfig(path=str(tmp_path), train="CONFIG/train", test="CONFIG/validation"))
    question = data.train[0].pictures[0].questions[0]
    assert (len(data.train), question.text, question.answer) == EXPECTED[name]


def test_questions_and_pictures_in_configurations_of_their_own(tmp_path: Path) -> None:
    """GQA: two questions a picture, joined by imageId."""
    for name, first in (("train", 0), ("val", 100)):
        asked = [
            {"id": str(i), "imageId": f"n{first + i // 2}", "question": f"q{i}?", "answer": "yes"} for i in range(20)
        ]
        shown = [{"id": f"n{first + i}", "image": image(first + i)} for i in range(10)]
        for kind, rows in (("instructions", asked), ("images", shown)):
            folder = tmp_path / f"{name}_{kind}"
            folder.mkdir()
            pd.DataFrame(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    names = {"train": "train_instructions/train", "test": "val_instructions/val"}
    names |= {"train_images": "train_images/train", "test_images": "val_images/val"}
    data = load(DataConfig(path=str(tmp_path), **names))
    assert [len(unit.pictures[0].questions) for unit in data.train] == [2] * 10
