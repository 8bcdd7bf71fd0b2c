"""A folder that is no whole checkpoint of a type that is known: one line, which names the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpaudit.errors import UsageError
from tests.tiny import tiny_tokenizer
from tests.tiny_families import TINY
from tests.tiny_types import TYPES
from trainers.vlm import VisionLanguageModel

SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}


def without(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        gone = [file for pattern in patterns for file in folder.glob(pattern)]
        assert gone
        for file in gone:
            file.unlink()

    return change


def missing_shard(folder: Path) -> None:
    VisionLanguageModel.load(str(folder), device="cpu").hf.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    VisionLanguageModel.load(str(folder), device="cpu")
    sorted(folder.glob("model-0*"))[1].unlink()


def unknown(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"model_type": "nobody_knows"}))


def text_only(folder: Path) -> None:
    tree = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(tree))
    tiny_tokenizer().save_pretrained(folder)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def another_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(SIGLIP))


def plain_template(folder: Path) -> None:
    text = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)


BAD = {
    "no processor": ("idefics3", without("preprocessor_config.json"), "picture processor"),
    "no whole processor": ("llava_next", without("processor_config.json"), "picture processor"),
    "another processor": ("qwen2_vl", another_processor, "its picture processor does not fit its tower"),
    "no template": ("qwen2_vl", without("chat_template*"), "put its chat_template.jinja into the folder"),
    "no template here": ("gemma3", without("chat_template*"), "put its chat_template.jinja into the folder"),
    "a template for text": ("qwen2_vl", plain_template, "chat template"),
    "a missing shard": ("smolvlm", missing_shard, "a file of the checkpoint is missing (a shard?)"),
    "weights cut off": ("smolvlm", cut, "damaged or unfinished"),
    "no tokenizer": ("smolvlm", without("token*"), "tokenizer.json is missing"),
    "text only": ("smolvlm", text_only, "is of type llama, a text-only model"),
    "unknown type": ("smolvlm", unknown, "a newer transformers may know it"),
    "no configuration": ("smolvlm", without("config.json"), "config.json: can't be read"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_wrong_is_one_line(tmp_path: Path, name: str) -> None:
    kind, change, words = BAD[name]
    {**TINY, **TYPES}[kind](tmp_path)
    change(tmp_path)
    with pytest.raises(UsageError) as caught:
        VisionLanguageModel.load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)
