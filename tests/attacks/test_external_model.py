"""Audits of a model that is already trained, with its owner's records and coins."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from attacks.external.model import audit_model
from attacks.external.options import ModelOptions
from attacks.external.records import read_coins, read_units, shared_pictures
from dpaudit import atomic
from dpaudit.cli import app
from dpaudit.config import LoraConfig
from dpaudit.documents import AuditDocument
from dpaudit.errors import UsageError
from tests.tiny import random_units, save_tiny_llava
from trainers.gradients import unit_losses
from trainers.inputs import UnitInputs
from trainers.records import Picture, Unit
from trainers.vlm import VisionLanguageModel

COUNT = 80


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_records(path: Path, units: tuple[Unit, ...]) -> Path:
    rows = [
        {"id": unit.id, "image": png(picture.pixels), "question": question.text, "answer": question.answer}
        for unit in units
        for picture in unit.pictures
        for question in picture.questions
    ]
    pd.DataFrame(rows).to_parquet(path)
    return path


def write_coins(path: Path, units: tuple[Unit, ...], members: np.ndarray) -> Path:
    pd.DataFrame({"id": [unit.id for unit in units], "member": members.astype(int)}).to_csv(path, index=False)
    return path


def random_answers(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """Answers that can only be memorised."""
    rng = np.random.default_rng(7)

    def changed(picture: Picture) -> Picture:
        answers = rng.choice(["one", "two", "three", "seven", "odd", "even", "yes", "no"], len(picture.questions))
        asked = zip(picture.questions, answers.tolist(), strict=True)
        return replace(picture, questions=tuple(replace(item, answer=word) for item, word in asked))

    return tuple(replace(unit, pictures=tuple(changed(picture) for picture in unit.pictures)) for unit in units)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ trained without privacy on the members, records.parquet, coins.csv."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_tiny_llava(folder / "base")
    units = random_answers(random_units(COUNT, seed=3))
    members = np.random.default_rng(1).random(COUNT) < 0.5
    write_records(folder / "records.parquet", units)
    write_coins(folder / "coins.csv", units, members)
    model = VisionLanguageModel.load(str(folder / "base"), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=8), generator=np.random.default_rng(0))
    inputs = UnitInputs(model, [unit for unit, member in zip(units, members, strict=True) if member])
    optimizer = torch.optim.Adam(list(parameters.values()), lr=0.005)
    for _ in range(250):
        optimizer.zero_grad()
        torch.autograd.backward(unit_losses(model, inputs.select(range(int(members.sum())))).mean())
        optimizer.step()
    model.save_adapter(folder / "adapter")
    return folder


def options(folder: Path, **changes: Any) -> ModelOptions:
    given = {
        "model": folder / "adapter",
        "base": str(folder / "base"),
        "records": folder / "records.parquet",
        "coins": folder / "coins.csv",
        "epsilon": 0.5,
        "delta": 1e-5,
        "device": "cpu",
    }
    return ModelOptions(**{**given, **changes})


def test_a_memorising_model_is_refuted(trained: Path, tmp_path: Path) -> None:
    document = audit_model(options(trained), tmp_path / "out")
    assert document.verdict == "refuted", document.reasons
    assert document.run is not None and document.run.about == "weights"
    assert document.run.coins_sha256 == atomic.sha256_file(trained / "coins.csv")
    assert document.scores[0].auc > 0.8
    written = AuditDocument.read(tmp_path / "out" / "release" / "audit.json")
    assert written == document
    plan = json.loads((tmp_path / "out" / "private" / "plan.json").read_text())
    free = next(test for test in document.tests if test.assumes == "none" and test.bound == "steinke")
    assert sum(plan["guesses"]["record"]) == free.guesses
    scores = pd.read_parquet(tmp_path / "out" / "private" / "record-scores.parquet")
    assert len(scores) == COUNT and set(scores.columns) == {"id", "member", "score"}
    assert not any(name in document.to_json() for name in ('"u0"', '"u1"'))


def test_a_full_checkpoint_gives_the_same_scores_as_its_adapter(trained: Path, tmp_path: Path) -> None:
    model = VisionLanguageModel.load(str(trained / "base"), device="cpu")
    model.load_adapter(trained / "adapter")
    merged = model.hf.merge_and_unload()
    merged.save_pretrained(tmp_path / "full")
    for file in (trained / "base").glob("*token*"):
        shutil.copy(file, tmp_path / "full" / file.name)
    for name, path in (("a", trained / "adapter"), ("b", tmp_path / "full")):
        audit_model(options(trained, model=path), tmp_path / name)
    frames = [pd.read_parquet(tmp_path / name / "private" / "record-scores.parquet") for name in "ab"]
    np.testing.assert_allclose(frames[0]["score"], frames[1]["score"], rtol=1e-3, atol=1e-4)


def test_coins_that_a_classifier_can_guess_are_invalid(trained: Path, tmp_path: Path) -> None:
    units = tuple(read_units(trained / "records.parquet").values())
    questions = np.array([len(unit.pictures[0].questions) for unit in units])
    coins = write_coins(tmp_path / "coins.csv", units, questions >= 2)
    document = audit_model(options(trained, coins=coins))
    assert document.verdict == "invalid" and not document.tests and not document.scores


@pytest.mark.parametrize("equal", [False, True])
def test_one_picture_under_two_ids_is_invalid(equal: bool, trained: Path, tmp_path: Path) -> None:
    units = random_units(COUNT - 1, seed=3)
    twice = (*units, Unit("again", units[0].pictures))
    records = write_records(tmp_path / "r.parquet", twice)
    members = np.arange(COUNT) % 2 == 0
    members[-1] = members[0] == equal
    said: list[str] = []
    document = audit_model(
        options(trained, records=records, coins=write_coins(tmp_path / "c.csv", twice, members)), log=said.append
    )
    assert document.verdict == "invalid" and not document.tests
    (check,) = [item for item in document.validity.checks if item.name == "pictures differ"]
    counted = (
        "0 with different coins and 1 with equal ones" if equal else "1 with different coins and 0 with equal ones"
    )
    assert check.measured == f"1 pair of ids holds the same picture, {counted}"
    assert ("is in and out at the same time" in check.explanation) != equal
    assert ("is a group" in check.explanation) == equal
    assert said == ["warning: ids 'u0' and 'again' hold the same picture"]
    assert shared_pictures({unit.id: unit for unit in units}) == []


def test_a_claimed_mechanism_that_costs_more_is_unsupported(trained: Path) -> None:
    document = audit_model(
        options(trained, epsilon=1e-3, sigma=1.0, rate=0.1, steps=10, alpha=1e-12, confidence=1 - 1e-12)
    )
    assert document.verdict == "unsupported"
    assert document.ledger[0].status == "UNACCOUNTED"
    with pytest.raises(UsageError, match="--claim-rate: missing"):
        audit_model(options(trained, sigma=1.0))


def drop(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_targets(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace("q_proj", "elsewhere_proj").replace("|k_proj", ""))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("adapter_model.safetensors"), "an unfinished adapter, adapter_model.safetensors is missing"),
        (drop("adapter_config.json"), "an unfinished adapter, adapter_config.json is missing"),
        (cut, "damaged or unfinished"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "damaged, not a JSON object"),
        (other_targets, "leaves out modules that its weights have tensors for"),
    ],
)
def test_unfinished_adapters_are_refused(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(UsageError, match=message) as caught:
        audit_model(options(trained, model=tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_a_wrong_base_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not fit its base: size mismatch"):
        audit_model(options(trained, base="reference"))
    with pytest.raises(UsageError, match="is not what --model was fine-tuned from"):
        audit_model(options(trained, model=trained / "base", base="reference"))
    with pytest.raises(UsageError, match="answers every record exactly as --base does"):
        audit_model(options(trained, model=trained / "base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.iloc[1:], "1 ids of --records have no coin, the first is 'u0'"),
        (lambda frame: pd.concat([frame, frame.iloc[:1]]), "id 'u0' occurs more than once"),
        (lambda frame: frame.assign(id=["x", *frame["id"][1:]]), "have no coin"),
        (
            lambda frame: pd.concat([frame, frame.iloc[:1].assign(id="x")]),
            "1 ids are not in --records, the first is 'x'",
        ),
        (lambda frame: frame.assign(member="maybe"), "member in row 1 is 'maybe'; accepted: 0, 1, true or false"),
        (lambda frame: frame.assign(member=1), "0 non-members of 80 records; accepted: at least 10"),
        (lambda frame: frame.rename(columns={"member": "in"}), "column 'member' is missing"),
        (lambda frame: frame.assign(id=[None, *frame["id"][1:]]), "id in row 1 is missing"),
    ],
)
def test_coins_that_do_not_fit_are_refused(
    trained: Path, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    change(pd.read_csv(trained / "coins.csv")).to_csv(tmp_path / "coins.csv", index=False)
    with pytest.raises(UsageError, match=message):
        audit_model(options(trained, coins=tmp_path / "coins.csv"))


def test_records_may_have_their_pictures_apart(trained: Path, tmp_path: Path) -> None:
    whole = pd.read_parquet(trained / "records.parquet")
    names = {content: f"p{place}" for place, content in enumerate(dict.fromkeys(whole["image"]))}
    apart = whole.assign(image_id=whole["image"].map(names)).drop(columns="image")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in apart.to_dict("records")))
    pd.DataFrame({"image_id": list(names.values()), "image": list(names)}).to_parquet(tmp_path / "pictures.parquet")
    joined = read_units(tmp_path / "rows.jsonl", tmp_path / "pictures.parquet")
    flat = read_units(trained / "records.parquet")
    assert list(joined) == list(flat)
    for name, unit in flat.items():
        assert unit.pictures[0].questions == joined[name].pictures[0].questions
        assert np.array_equal(unit.pictures[0].pixels, joined[name].pictures[0].pixels)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    for name, content in (("empty.csv", ""), ("noise.parquet", "PAR1?"), ("one.csv", "a\n1\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="--coins"):
            read_coins(tmp_path / name)
    with pytest.raises(UsageError, match="no such file"):
        read_coins(tmp_path / "missing.csv")
    with pytest.raises(UsageError, match="--records"):
        read_units(tmp_path / "one.csv")


def test_command_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "--model": trained / "adapter",
        "--base": trained / "base",
        "--records": trained / "records.parquet",
        "--coins": trained / "coins.csv",
        "--epsilon": 0.5,
    }

    def call(*more: str, leave: str = "") -> tuple[int, str, str]:
        words = [str(word) for flag, value in given.items() if flag != leave for word in (flag, value)]
        code = app.run(["audit", *words, "--device", "cpu", *more])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, _ = call("--json")
    assert code == 1 and json.loads(out)["verdict"] == "refuted"
    # The door of its own prints the same document.
    words = [str(word) for flag, value in list(given.items())[1:] for word in (flag, value)]
    code = app.run(["audit-model", str(given["--model"]), *words, "--device", "cpu", "--json"])
    assert code == 1 and json.loads(capsys.readouterr().out)["tests"] == json.loads(out)["tests"]
    for more, leave, message in (
        ((), "--coins", "--coins: missing; --model needs --base, --records, --coins and --epsilon"),
        ((), "--epsilon", "--epsilon: missing"),
        (("--white-box",), "", "--white-box: has no effect with --model"),
        (("--runs", "30"), "", "--runs: has no effect with --model"),
        (("--trainer", "a:b"), "", "exactly one of RUN, --trainer MODULE:FACTORY and --model PATH"),
        (("--delta", "2"), "", "--delta: got 2.0; accepted: a number in (0, 1)"),
    ):
        code, out, err = call(*more, leave=leave)
        assert code == 2 and out == "" and message in err, (more, leave, err)
        assert err.count("\n") == 1
