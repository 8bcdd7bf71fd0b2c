"""A folder that is no whole checkpoint of a type that is known: one line, which names the way out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import Done, run_all
from tests.tiny import tiny_tokenizer
from tests.tiny_families import TINY
from tests.tiny_types import TYPES
from trainers.opened import open_checkpoint
from trainers.vlm import VisionLanguageModel

SIZES = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", **SIZES}


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


def edited(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: item for key, item in tree.items() if item is not None}))

    return change


def written(name: str, content: bytes, *gone: str) -> Callable[[Path], None]:
    """Puts a file there, and takes others away."""

    def change(folder: Path) -> None:
        if gone:
            without(*gone)(folder)
        (folder / name).write_bytes(content)

    return change


def llava_with(processor: dict[str, object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edited(dpaudit_template=None)(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))

    return change


def no_index(folder: Path) -> None:
    missing_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def other_tokenizer(folder: Path) -> None:
    tiny_tokenizer(size=2000, reserved=500).save_pretrained(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
UNFIT = "its picture processor does not fit its tower"
OWN = "put the checkpoint's own chat_template.jinja into the folder"
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no processor": ("idefics3", without("preprocessor_config.json"), "picture processor"),
    "no whole processor": ("llava_next", without("processor_config.json"), "picture processor"),
    "no processor of LLaVA": ("llava", edited(dpaudit_template=None), "how it was trained to see can't be guessed"),
    "another processor": ("qwen2_vl", another_processor, UNFIT),
    "another of LLaVA": ("llava", llava_with({"image_processor_type": "Qwen2VLImageProcessor"}), UNFIT),
    "a processor of nobody": ("llava", llava_with({"image_processor_type": "Nobody"}), "processor can't be made"),
    "an empty processor": ("qwen2_vl", written("preprocessor_config.json", b"{}"), UNFIT),
    "a damaged processor": ("qwen2_vl", written("preprocessor_config.json", b"{"), "not a JSON object; download it"),
    "no template": ("qwen2_vl", without("chat_template*"), "put its chat_template.jinja into the folder"),
    "no template here": ("gemma3", without("chat_template*"), "put its chat_template.jinja into the folder"),
    "a template for text": ("qwen2_vl", plain_template, OWN),
    "a template that fails": ("qwen2_vl", written("chat_template.jinja", b"{{ raise_exception('x') }}"), OWN),
    "half a template": ("qwen2_vl", written("chat_template.jinja", b"{% for x in"), OWN),
    "a missing shard": ("smolvlm", missing_shard, "a file of the checkpoint is missing (a shard?): download"),
    "shards without index": ("smolvlm", no_index, "index.json: is missing, which says where the weights are"),
    "weights cut off": ("smolvlm", cut, "damaged or unfinished"),
    "weights of nothing": ("smolvlm", written("model.safetensors", b""), "damaged or unfinished"),
    "a pointer": ("smolvlm", written("model.safetensors", POINTER), "a pointer of Git LFS, not the file itself"),
    "a tokenizer's pointer": ("smolvlm", written("tokenizer.json", POINTER), "a pointer of Git LFS"),
    "pickled": ("smolvlm", written("pytorch_model.bin", b"PK", "*.safetensors"), "are never opened; where you trust"),
    "GGUF": ("smolvlm", written("model.gguf", b"GGUF", "*.safetensors"), "GGUF is not read; take the checkpoint"),
    "no weights": ("smolvlm", without("*.safetensors"), "accepted: a whole checkpoint"),
    "an adapter": ("smolvlm", written("adapter_config.json", b"{}", "*"), "this is a PEFT adapter, not a model"),
    "no tokenizer": ("smolvlm", without("token*"), "tokenizer.json is missing; download it, or convert"),
    "another tokenizer": ("smolvlm", other_tokenizer, "tokenizer has a token 808; its model knows"),
    "text only": ("smolvlm", text_only, "is of type llama, a text-only model"),
    "unknown type": ("smolvlm", unknown, "a newer transformers may know it"),
    "no type": ("smolvlm", edited(model_type=None), "names no model_type"),
    "a tower alone": ("smolvlm", edited(model_type="clip"), "answers no questions about pictures"),
    "quantised": ("smolvlm", edited(quantization_config={"quant_method": "gptq"}), "that is not quantised"),
    "no configuration": ("smolvlm", without("config.json"), "config.json is missing; accepted: a whole checkpoint"),
    "nothing": ("smolvlm", without("*"), "the folder is empty"),
}
SECONDS = 60  # "within seconds", on a machine that does other things


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """`dpaudit train --model DIR` on every folder, and on what is no folder."""
    root = tmp_path_factory.mktemp("bad")
    made: dict[str, Path] = {}
    for name, (kind, change, _) in BAD.items():
        if kind not in made:
            (root / kind).mkdir()
            made[kind] = {**TINY, **TYPES}[kind](root / kind)
        change(Path(shutil.copytree(made[kind], root / name)))
    (root / "file").write_text("{}")
    names = [*BAD, "file", "gone/x/y"]
    commands = [["train", "--model", name, "--out", f"run-{place}"] for place, name in enumerate(names)]
    found = run_all(commands, cwd=root)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_wrong_is_one_line(said: dict[str, Done], name: str) -> None:
    words = BAD[name][2]
    assert words in said[name].line
    assert said[name].code == 2
    assert said[name].seconds < SECONDS
    assert said[name].line.startswith(("dpaudit: model.path: ", "dpaudit: model: "))


def test_what_is_no_folder(said: dict[str, Done]) -> None:
    assert "'file'; accepted: a folder, not a file" in said["file"].line
    assert "accepted: an existing folder, or a hub id" in said["gone/x/y"].line
    assert said["file"].code == said["gone/x/y"].code == 2


def test_a_processor_that_fits_but_is_of_another_tower_is_said(tmp_path: Path) -> None:
    """Sizes agree, so nothing fails; the pictures would be brought to the tower as another one wants them."""
    TINY["llava"](tmp_path)
    llava_with(SIGLIP)(tmp_path)
    (found,) = open_checkpoint(str(tmp_path)).warnings
    assert "of kind clip" in found
    assert "normalises as for siglip" in found
    llava_with({"image_processor_type": "CLIPImageProcessor", **SIZES})(tmp_path)
    assert open_checkpoint(str(tmp_path)).warnings == ()


def test_the_command_that_converts_pickled_weights_does(tmp_path: Path, said: dict[str, Done]) -> None:
    command = said["pickled"].line.partition('python -c "')[2].removesuffix('"')
    TINY["llava"](tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    before = load_file(weights)
    weights.unlink()
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
    after = load_file(weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    open_checkpoint(str(tmp_path / "pickled"))
