"""Audits of finished text models: adapters and whole checkpoints, texts and conversations."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attacks.external.model import audit_model
from attacks.external.options import ModelOptions
from attacks.external.texts import read_texts, shared_texts
from dpaudit.cli import app
from dpaudit.errors import UsageError
from tests.tiny_text import save_tiny_text, secrets
from trainers.text import CausalLanguageModel, Said, Text, Writer

COUNT = 60
WORDS = secrets(COUNT)
MEMBERS = np.random.default_rng(1).random(COUNT) < 0.5


def conversation(index: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"what is the code of {index}?"},
        {"role": "assistant", "content": WORDS[index]},
    ]


def rows_of(form: str) -> list[dict[str, Any]]:
    """One row a record. A conversation says its secret in the answer."""
    made: dict[str, Any] = {
        "text": lambda index: {"text": f"{WORDS[index]} is a code"},
        "messages": lambda index: {"messages": conversation(index)},
        "prompt": lambda index: {"prompt": f"code {index}:", "completion": f" {WORDS[index]}"},
    }
    return [{"id": f"r{index}", **made[form](index)} for index in range(COUNT)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def plain(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """The ids of a row as its owner's own training makes them."""
    if "messages" in row:
        said = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        return list(tokenizer(said, add_special_tokens=False)["input_ids"])
    return list(tokenizer(row.get("text") or row["prompt"] + row["completion"])["input_ids"])


def train(folder: Path, form: str, *, lora: bool, members: np.ndarray = MEMBERS) -> None:
    """folder/base -> folder/model, on the members' rows, neither clipped nor noised."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = [plain(tokenizer, row) for row, member in zip(rows_of(form), members, strict=True) if member]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    labels = batch.masked_fill(mask == 0, -100)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=batch, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    if not lora:
        for file in (folder / "base").glob("*token*"):
            shutil.copy(file, folder / "model" / file.name)


def prepared(folder: Path, kind: str, form: str, suffix: str, *, lora: bool, template: bool = True) -> Path:
    save_tiny_text(folder / "base", kind, template=template)
    train(folder, form, lora=lora)
    write(folder / f"records{suffix}", rows_of(form))
    pd.DataFrame({"id": [f"r{index}" for index in range(COUNT)], "member": MEMBERS.astype(int)}).to_csv(
        folder / "coins.csv", index=False
    )
    return folder


def options(folder: Path, **changes: Any) -> ModelOptions:
    given: dict[str, Any] = {
        "model": folder / "model", "base": str(folder / "base"), "coins": folder / "coins.csv", "epsilon": 0.5,
        "records": next(folder.glob("records.*")), "delta": 1e-5, "device": "cpu",
    }  # fmt: skip
    return ModelOptions(**{**given, **changes})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an adapter on texts."""
    return prepared(tmp_path_factory.mktemp("llama"), "llama", "text", ".jsonl", lora=True)


@pytest.mark.parametrize(
    ("kind", "form", "suffix", "lora"),
    [("qwen2", "messages", ".parquet", True), ("gpt2", "prompt", ".csv", True), ("llama", "messages", ".jsonl", False)],
)
def test_what_was_memorised_is_found(tmp_path: Path, kind: str, form: str, suffix: str, lora: bool) -> None:
    folder = prepared(tmp_path, kind, form, suffix, lora=lora)
    document = audit_model(options(folder))
    assert document.verdict == "refuted", document.reasons
    assert document.scores[0].auc > 0.9
    assert document.claim is not None and document.claim.unit == "text (all rows of one id)"
    assert max(test.epsilon_lower or 0.0 for test in document.tests if test.assumes == "none") > 0.5


def test_texts(llama: Path, tmp_path: Path) -> None:
    document = audit_model(options(llama), tmp_path / "out")
    assert document.verdict == "refuted", document.reasons
    assert {check.name for check in document.validity.checks} >= {"coins", "texts differ", "blind baseline"}
    # No text and no id leaves the private part.
    assert not any(word in document.to_json() for word in (WORDS[0], '"r0"'))


def test_other_coins_show_nothing(llama: Path, tmp_path: Path) -> None:
    """Coins that decided nothing: bound 0 and no refutation; the level of the test is 0.001, the bound's 0.05."""
    other = np.random.default_rng(5).random(COUNT) < 0.5
    coins = pd.DataFrame({"id": [f"r{index}" for index in range(COUNT)], "member": other.astype(int)})
    coins.to_csv(tmp_path / "coins.csv", index=False)
    document = audit_model(options(llama, coins=tmp_path / "coins.csv"))
    assert document.verdict == "inconclusive"
    assert all((test.epsilon_lower or 0.0) == 0.0 for test in document.tests if test.assumes == "none")


def test_losses_are_those_of_the_library(llama: Path) -> None:
    """The mean over a text's own tokens, whatever shares its batch; by transformers' own loss, one text at a time."""
    model = CausalLanguageModel.load(str(llama / "base"), device="cpu", flag="--base")
    texts = [Text(text="a"), Text(text="a code of many words, é漢"), Text(text=WORDS[0]), Text(text="ab" * 30)]
    tokens = model.tokens(texts)[1:]
    found = model.losses(tokens)
    for item, loss in zip(tokens, found, strict=True):
        ids = torch.from_numpy(item.ids)[None]
        with torch.no_grad():
            assert loss == pytest.approx(float(model.hf(input_ids=ids, labels=ids).loss), rel=1e-4)


def test_answers_alone_count_in_a_conversation(llama: Path) -> None:
    """By hand: the tokens of the answers and the special token behind each; the text is the template's own."""
    model = CausalLanguageModel.load(str(llama / "base"), device="cpu", flag="--base")
    said = [("system", "short"), ("user", "a?"), ("assistant", "first"), ("user", "b?"), ("assistant", "a second")]
    text = Text(conversation=tuple(Said(*item) for item in said))
    tokens = model.tokens([text])[0]
    whole = model.tokenizer.decode(tokens.ids.tolist())
    messages = [{"role": role, "content": content} for role, content in said]
    assert whole.startswith(model.tokenizer.apply_chat_template(messages, tokenize=False))
    scored = model.tokenizer.decode(tokens.ids[tokens.counts].tolist())
    assert scored == "first<|im_end|>a second<|im_end|>"
    prompt = model.tokens([Text(text="ask: answer", given=4)])[0]
    assert model.tokenizer.decode(prompt.ids[prompt.counts].tolist()) == " answer"


def test_a_template_may_move_the_system_message(llama: Path) -> None:
    """As Mistral's do, into the last question. One that drops a message is refused."""
    model = CausalLanguageModel.load(str(llama / "base"), device="cpu", flag="--base")
    moved = "{{ messages[1].content }}|{{ messages[2].content }}</s>|{{ messages[0].content }}"
    text = Text(conversation=(Said("system", "s"), Said("user", "u"), Said("assistant", "a")))
    writer = Writer(model.tokenizer, moved)
    writer.prepare([text])
    written = writer(text)
    assert written.text == "u|a</s>|s" and [written.text[a:b] for a, b in written.counts] == ["a</s>"]
    for wrong, message in (("{{ messages[1].content }}", "each message"), ("{{ raise_exception('no') }}", "fails on")):
        with pytest.raises(UsageError, match=message):
            Writer(model.tokenizer, wrong).prepare([text])


def test_the_template_beside_the_model_comes_first(tmp_path: Path) -> None:
    """A base without a template, taught one: training puts it beside the adapter."""
    folder = prepared(tmp_path, "llama", "text", ".jsonl", lora=True, template=False)
    write(folder / "records.jsonl", rows_of("messages"))
    with pytest.raises(UsageError, match="holds messages, and the model has no chat template"):
        audit_model(options(folder))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert audit_model(options(folder)).tests


def test_the_type_is_looked_at_before_the_records(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UsageError, match="--images: --base is a text model"):
        audit_model(options(llama, records=tmp_path / "nowhere", images=tmp_path / "nowhere"))
    save_tiny_text(tmp_path / "bert", "bert")
    with pytest.raises(UsageError, match="is not causal: later tokens change"):
        audit_model(options(llama, base=str(tmp_path / "bert")))
    with pytest.raises(UsageError, match="does not fit its base"):
        save_tiny_text(tmp_path / "gpt2", "gpt2")
        audit_model(options(llama, base=str(tmp_path / "gpt2")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "question": "q", "answer": "a"}, "holds none of text, messages, prompt, completion; accepted"),
        ({"id": "a", "text": "t", "messages": []}, "has text and messages; accepted"),
        ({"id": "a", "prompt": "t"}, "has prompt; accepted"),
        ({"id": "a", "text": 3}, "row 1, text: must be text, got int"),
        ({"id": "a", "text": "  "}, "row 1, text: empty"),
        ({"text": "t"}, "row 1, id: missing"),
        ({"id": "a", "messages": "hi"}, "must be a list of 1 to 1000 messages, got str"),
        ({"id": "a", "messages": [{"role": "user", "content": "hi"}]}, "no message of the assistant"),
        ({"id": "a", "messages": [{"role": "tool", "content": "hi"}]}, r"messages\[1\]: must have a role"),
        ({"id": "a", "messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "sees no pictures"),
        ({"id": "a", "prompt": "p", "completion": [{"role": "assistant", "content": "c"}]}, "both be text"),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_texts(write(tmp_path / "r.jsonl", [row]))
    assert "\n" not in str(caught.value)


def test_one_text_under_two_ids(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}, {"id": "b", "text": "y"}, {"id": "c", "text": "y "}]
    rows.append({"id": "d", "text": "z"})
    assert shared_texts(read_texts(write(tmp_path / "r.jsonl", rows))) == [("a", "b"), ("a", "c")]
    assert read_texts(write(tmp_path / "r.csv", rows)) == read_texts(tmp_path / "r.jsonl")
    assert read_texts(write(tmp_path / "r.parquet", rows)) == read_texts(tmp_path / "r.jsonl")


def test_long_texts_are_cut(llama: Path, tmp_path: Path) -> None:
    rows = rows_of("text")
    rows[0]["text"] += " and so on" * 100
    said: list[str] = []
    audit_model(options(llama, records=write(tmp_path / "r.jsonl", rows)), log=said.append)
    assert any("1 texts have more than 128 tokens" in line for line in said)
    asked = [{**row, "prompt": "p " * 300, "completion": row["text"]} for row in rows]
    for row in asked:
        del row["text"]
    with pytest.raises(UsageError, match="nothing of id 'r0' is scored: too short, or cut off"):
        audit_model(options(llama, records=write(tmp_path / "r.jsonl", asked)))


def test_command_line(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", llama / "base", "--records", llama / "records.jsonl", "--coins", llama / "coins.csv"]
    code = app.run(["audit-model", str(llama / "model"), *map(str, words), "--epsilon", "0.5", "--device", "cpu"])
    out, _ = capsys.readouterr()
    assert code == 1 and "verdict   refuted" in out
