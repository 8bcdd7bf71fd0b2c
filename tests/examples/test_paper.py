"""docs/paper.md: every command is typed, with a tiny LLaVA of the real kind and twenty rows of the set's columns."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from dpaudit.documents import ClaimDocument, LedgerDocument
from dpaudit.runs import RunFolder
from reports.sweep.document import SweepDocument
from reports.sweep.grid import make_plan, read_grid
from tests.tiny import save_tiny_llava

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
DPAUDIT = Path(sys.executable).parent / "dpaudit"
SMALL = [
    "model.lora.rank=2", "model.lora.alpha=4", "model.precision=float32", "model.device=cpu", "training.batch-size=6",
    "training.steps=2", "seed=1", "privacy.delta=1e-3",
]  # fmt: skip


def commands() -> list[list[str]]:
    """The page's commands, without the lines' ends."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    lines = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    return [shlex.split(line) for block in lines for line in block.strip().splitlines()]


def png(value: int) -> bytes:
    rng = np.random.default_rng(value)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40 + value, 32, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def rows(name: str, seed: int) -> list[dict[str, Any]]:
    """Twenty rows about ten pictures, as the set has them."""
    found: list[dict[str, Any]] = []
    for index in range(20):
        number = 20 * seed + index // 2
        picture = {"bytes": png(number), "path": None}
        if name == "derek-thomas/ScienceQA":
            choices = ["an acid", "a base", "a salt"]
            more = {
                "hint": "" if index % 3 else "Look at it.",
                "subject": "natural science",
                "solution": "",
                "grade": "grade2",
            }
            shown = None if index % 10 == 9 else picture
            found.append(
                {"image": shown, "question": f"Which is it ({index})?", "choices": choices, "answer": index % 3, **more}
            )
        else:
            found.append(
                {"image": picture, "question": f"is finding {index} there?", "answer": "yes" if index % 2 else "no"}
            )
    return found


def slake(folder: Path) -> None:
    (folder / "imgs").mkdir(parents=True)
    for split, seed in (("train", 0), ("test", 1)):
        made = []
        for index in range(20):
            name = f"xmlab{10 * seed + index // 2}/source.jpg"
            (folder / "imgs" / name).parent.mkdir(exist_ok=True)
            (folder / "imgs" / name).write_bytes(png(20 * seed + index // 2))
            made.append(
                {
                    "img_id": index // 2, "img_name": name, "question": f"Is organ {index} shown?", "answer": "Yes",
                    "q_lang": "en" if index % 2 else "zh", "location": "Lung", "modality": "CT", "base_type": "vqa",
                    "answer_type": "CLOSED", "content_type": "Organ", "triple": ["vhead", "_", "_"], "qid": index,
                }
            )  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(made))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint as `llava-med`, and the sets as they lie after a download."""
    home = tmp_path_factory.mktemp("paper")
    model = save_tiny_llava(home / "llava-med", strategy="default")
    tree = json.loads((model / "config.json").read_text())
    del tree["dpaudit_template"]  # the chat template and the processor of a real checkpoint instead
    (model / "config.json").write_text(json.dumps(tree))
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(model)
    for name in ("derek-thomas/ScienceQA", "flaviagiammarino/path-vqa", "flaviagiammarino/vqa-rad"):
        folder = home / name / "data"
        folder.mkdir(parents=True)
        for split, seed in (("train", 0), ("test", 1)):
            pd.DataFrame(rows(name, seed)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    slake(home / "SLAKE")
    return home


def local(words: list[str]) -> list[str]:
    """The same command without a network: the hub's names are folders here."""
    here = [word.replace("data.name=", "data.path=").replace("llava-hf/llava-1.5-7b-hf", "llava-med") for word in words]
    return [str(DPAUDIT), *here[1:]]


TRAININGS = [words for words in commands() if words[:2] == ["dpaudit", "train"]]


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: words[-1])
def test_the_trainings_run(place: Path, words: list[str]) -> None:
    done = subprocess.run([*local(words), *SMALL], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(place / words[-1])
    config, claim = run.read_config(), ClaimDocument.read(run.claim).claim
    assert (claim is None) == (config.privacy.epsilon == "inf") == ("inf" in words)
    evidence = {row.path: row.evidence for row in LedgerDocument.read(run.ledger).rows}
    if config.method == "dual-priv":  # 16 patches: 54 and 10 of 576 in proportion
        assert "K = 2, k = 1, attention of layer -2, features of layer -2" in evidence["token pruning and fusion"]


def test_the_grid_has_the_rows_of_the_table(place: Path) -> None:
    (words,) = [words for words in commands() if words[:2] == ["dpaudit", "sweep"] and "--preset" not in words]
    assert words[2] == "examples/paper/grid.yaml"
    overrides = [word for word in words[3:] if "=" in word]
    plan = make_plan(read_grid(ROOT / words[2]), overrides=overrides)
    assert len(plan.points) == 14 and len(plan.cells) == 3 * 13
    noiseless = [cell for cell in plan.cells if cell.config.privacy.epsilon == "inf" and cell.seed == 0]
    assert [cell.config.method for cell in noiseless] == ["dp-sgd", "dual-priv", "dp-zo"]
    assert not any(cell.config.claims for cell in noiseless)


def test_the_sweep_runs(place: Path) -> None:
    """One seed, and one finite eps in place of three."""
    (words,) = [words for words in commands() if words[:2] == ["dpaudit", "sweep"] and "--preset" not in words]
    grid = (ROOT / words[2]).read_text().replace("[1, 3, 8, inf]", "[8, inf]")
    (place / "grid.yaml").write_text(grid)
    command = [*local(words), *[item for item in SMALL if not item.startswith("seed")], "--seeds", "0"]
    command[2] = "grid.yaml"
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    document = SweepDocument.read(place / words[-1] / "sweep.json")
    assert len(document.rows) == 8 and all(row.failed == 0 for row in document.rows)
    claimed = {row.configuration: row.epsilon for row in document.rows}
    assert claimed["dp-sgd, epsilon 8"] == 8 and claimed["dp-sgd, epsilon inf"] is None
    (report,) = [words for words in commands() if words[:2] == ["dpaudit", "report"]]
    done = subprocess.run([str(DPAUDIT), *report[1:]], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (place / report[-1]).stat().st_size > 10_000
