"""The model card: metadata that YAML reads, sentences of the page, code that runs, and an owner's text."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer

from dpaudit.checksums import digest
from dpaudit.cli.app import run as command
from dpaudit.documents import ClaimDocument
from reports import card
from reports.glance import glances
from reports.inputs import load_runs
from tests.reports.fixtures import claim, write_audit, write_run, write_sums
from tests.reports.hostile import write_hostile_run
from trainers.public.synthetic import synthetic_pictures
from trainers.vlm import REFERENCE, VisionLanguageModel

FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def front(text: str) -> dict[str, Any]:
    """The metadata of a card."""
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def with_model(run: Path) -> Path:
    """A run of the fixtures with something in the place of its adapter, so that it is finished."""
    model = run / "release" / "model"
    model.mkdir(exist_ok=True)
    (model / "adapter_config.json").write_text("{}")
    (model / "complete.json").write_text(json.dumps({"sha256": {"adapter_config.json": digest(b"{}")}}))
    write_sums(run / "release")
    (run / "private").mkdir(mode=0o700, exist_ok=True)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return with_model(write_run(tmp_path, "dual-priv"))


def of(run: Path) -> str:
    (loaded,) = load_runs([run])
    return card.card(loaded)


# -- what it says ----------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Markdown text without escapes."""
    return re.sub(r"\\(.)", r"\1", text).replace("\u200b", "").replace("&amp;", "&")


@pytest.mark.parametrize("method", ["non-private", "dp-sgd", "dual-priv"])
def test_it_says_what_the_page_says(tmp_path: Path, method: str) -> None:
    (loaded,) = load_runs([write_run(tmp_path, method)])
    text = plain(card.card(loaded))
    (shown,) = glances([loaded], None)
    for line in (shown.lead, *shown.protects, *shown.tested, *shown.conclude):
        assert line in text or (loaded.claim is None and line in shown.protects)
    assert loaded.verdict is not None and f"**{loaded.verdict.upper()}.**" in text
    assert f"SHA-256 `{digest((tmp_path / method / 'release' / 'audit.json').read_bytes())}`" in text
    assert loaded.name not in text.replace(method, "") and "dpaudit verify" in text


def test_metadata_are_those_of_the_hub_and_leave_the_licence_to_the_owner(run: Path) -> None:
    text = of(run)
    told = front(text)
    assert told == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "differential-privacy", "dpaudit", "dual-priv"],
    }
    assert "# license: for the owner" in text and "To be filled in: licence" in text
    config = run / "release" / "config.yaml"
    config.write_text(
        config.read_text().replace("  path: null\n  device", "  path: llava-hf/llava-1.5-7b-hf\n  device")
    )
    assert front(of(run))["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert 'BASE = "llava-hf/llava-1.5-7b-hf"' in of(run)


def test_before_an_audit_it_is_the_claim_and_says_so(run: Path) -> None:
    for name in ("audit.json", "benchmark.json"):
        (run / "release" / name).unlink()
    shutil.rmtree(run / "release" / "games")
    write_sums(run / "release")
    text = of(run)
    assert "**NOT AUDITED.**" in text and "eps = 8 at delta = 1e-5" in text
    assert "Not measured" in text and "REFUTED" not in text


@pytest.mark.parametrize("base", ["a`b\n```", 'x"; import os  # ', "---\nlicense: mit", "<b>@all</b>", "ok"])
def test_foreign_text_is_no_markup(tmp_path: Path, base: str) -> None:
    hostile = write_hostile_run(tmp_path, "run")
    config = hostile / "release" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["model"]["path"] = base
    config.write_text(yaml.safe_dump(tree))
    text = of(hostile)
    assert set(front(text)) <= {"library_name", "pipeline_tag", "tags", "base_model", "datasets"}
    prose = FENCE.sub("", text.split("---\n", 2)[2])
    assert text.count("```") == 4 and len(FENCE.findall(text)) == 2
    for code in FENCE.findall(text):
        compile(code, "card", "exec")
        assert "import os" not in code
    shown = re.sub(r"`[^`\n]*`", "", prose.replace(card.END, ""))
    shown = re.sub(r"<!-- dpaudit [^\n]* -->\n", "", shown)
    assert not re.search(r"(?<!\\)[<>\[\]|]", shown) and not re.search(r"@\w|www\.|http:", shown)
    assert card.END in text and text.count("<!--") == 2
    assert card.card(load_runs([hostile])[0], text) == text  # no text of the documents is a mark


# -- who writes in it ------------------------------------------------------------------------------------------------


def test_what_the_owner_writes_stays(run: Path) -> None:
    card.renew(run, print)
    place = run / "release" / "model" / "README.md"
    first = place.read_text()
    mine = first.replace("library_name: peft", "library_name: peft\nlicense: mit") + "\nTrained by Ann.\n"
    place.write_text(mine)
    (loaded,) = load_runs([run])
    assert card.problem(run / "release", loaded) is None
    shutil.rmtree(run / "release" / "games")
    write_audit(run, "dual-priv", [])
    write_sums(run / "release")
    (loaded,) = load_runs([run])
    assert "does not say what the documents give" in (card.problem(run / "release", loaded) or "")
    card.renew(run, print)
    told = place.read_text()
    assert front(told)["license"] == "mit" and told.endswith("Trained by Ann.\n") and "**INCONCLUSIVE.**" in told
    (loaded,) = load_runs([run])
    assert card.problem(run / "release", loaded) is None


def test_a_card_without_marks_is_left_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run / "release" / "model" / "README.md"
    place.write_text("my own card\n")
    card.renew(run, print)
    assert "was not renewed" in capsys.readouterr().out and place.read_text() == "my own card\n"
    place.write_bytes(b"\xff\xfe")
    card.renew(run, print)
    assert "can't be read" in capsys.readouterr().out


def test_a_card_that_says_more_than_the_documents_is_said_and_not_signed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card.renew(run, print)
    place = run / "release" / "model" / "README.md"
    place.write_text(place.read_text().replace("**INCONCLUSIVE.**", "**PROVEN.**"))
    page, junit = tmp_path / "page.html", tmp_path / "junit.xml"
    both = ["--format", "html", "-o", str(page), "--format", "junit", "-o", str(junit)]
    assert command(["report", str(run), *both]) == 0
    assert "does not say what the documents give" in page.read_text() and "<failure" in junit.read_text()
    assert command(["keygen", str(tmp_path / "key")]) == 0
    assert command(["sign", str(run), "--key", str(tmp_path / "key")]) == 2
    assert "not signed: model/README.md" in capsys.readouterr().err
    assert command(["report", str(run), "--format", "card", "-o", str(place)]) == 0
    assert command(["sign", str(run), "--key", str(tmp_path / "key")]) == 0
    assert command(["verify", str(run), "--key", str(tmp_path / "key.pub")]) == 0
    capsys.readouterr()
    signed = place.read_bytes()
    assert command(["report", str(run), "--format", "card", "-o", str(place)]) == 2  # would break the signature
    assert "is signed" in capsys.readouterr().err and place.read_bytes() == signed
    assert command(["report", str(run), "--format", "card", "-o", str(tmp_path / "copy.md")]) == 0
    assert (tmp_path / "copy.md").read_bytes() == signed
    assert command(["verify", str(run), "--key", str(tmp_path / "key.pub")]) == 0
    card.renew(run, print)
    assert "sign again" in capsys.readouterr().out


def test_the_card_is_no_part_of_the_model(run: Path) -> None:
    card.renew(run, print)
    (loaded,) = load_runs([run])
    assert not [notice for notice in loaded.notices if "README" in notice]
    (run / "release" / "model" / "extra.md").write_text("x")
    (loaded,) = load_runs([run])
    assert [notice for notice in loaded.notices if "extra.md" in notice]


def test_an_unfinished_run_gets_none(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    (run / "private").mkdir(mode=0o700)
    card.renew(run, print)
    assert not (run / "release" / "model").exists()
    (run / "release" / "claim.json").write_text(
        ClaimDocument(claim=claim(), releasable=False, reasons=("seed",)).to_json()
    )
    assert "must not be released" in of(run)


# -- a real run ------------------------------------------------------------------------------------------------------


def test_the_card_of_a_training_loads_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, read the card, type its code: PEFT and transformers give dpaudit's answers."""
    settings = ["method=non-private", "reducer.name=none", "data.limit=40", "training.steps=12",
                "training.batch-size=20", "training.learning-rate=0.01", "--out", "run"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(["train", *settings]) == 0
    text = (tmp_path / "run" / "release" / "model" / "README.md").read_text()
    assert "**NOT AUDITED.**" in text and "makes no privacy claim" in text
    shown = synthetic_pictures("base", 6, np.random.default_rng(2))
    Image.fromarray(shown[0].pixels).save(tmp_path / "run" / "picture.png")
    with_peft, with_dpaudit = FENCE.findall(text)
    space: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "run")
    exec(with_peft, space)
    exec(with_dpaudit, space)
    model, vlm = space["model"], space["vlm"]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(REFERENCE))
    pairs = [(picture, question) for picture in shown for question in picture.questions]
    ours = vlm.answer([picture.pixels for picture, _ in pairs], [question.text for _, question in pairs])
    base = VisionLanguageModel.load(device="cpu")
    assert ours != base.answer([picture.pixels for picture, _ in pairs], [question.text for _, question in pairs])
    for (picture, question), answer in zip(pairs, ours, strict=True):
        ids = tokenizer("<s>" + "<image>" * 65 + question.text, return_tensors="pt")["input_ids"]
        pixels = torch.from_numpy(picture.pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer


def test_the_tokens_of_the_card_are_those_of_the_training(run: Path) -> None:
    (code,) = [code for code in FENCE.findall(of(run)) if "set_reducer" in code]
    (loaded,) = load_runs([run])
    assert loaded.config is not None
    space: dict[str, Any] = {}
    lines = [line for line in code.splitlines() if line.startswith(("from dpaudit", "vlm.set_reducer"))]
    taken: list[Any] = []
    exec("\n".join(lines), {"vlm": type("Vlm", (), {"set_reducer": staticmethod(taken.append)}), **space})
    assert taken[0].model_dump(exclude={"noise"}) == loaded.config.reducer.model_dump(exclude={"noise"})
