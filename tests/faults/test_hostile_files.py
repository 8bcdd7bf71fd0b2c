"""Files and models of hostile hands: each ends with one line and exit code 2, in seconds and below 2 GiB.

Whole commands, each in a fork of a process that has imported everything, with a limit on its processor time; its peak
of memory, that of its children included, is read from the operating system. Some cases run the installed command.
"""

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults import harness
from tests.faults import hostile_files as hands
from tests.faults.hostile_files import Damage, audit_words, content, cut, gone, settings
from tests.faults.hostile_pictures import PARTS

SECONDS, MEMORY = 45, 2 << 30
CONFIG, TOKENIZER, WEIGHTS = "base/config.json", "base/tokenizer.json", "base/model.safetensors"
ADAPTER, TENSORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
PICTURES = "tiles/preprocessor_config.json"
LONG = "a" * 40


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    harness.warm_up()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-hostile-"))
    hands.handed_over(root / "sound")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def place(world: Path) -> Path:
    """A copy of everything that was handed over."""
    copy = world / "case"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world / "sound", copy)
    return copy


def run(arguments: list[str], place: Path) -> harness.Ended:
    def prepare() -> None:
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))

    return harness.run(arguments, [place], place.parent, prepare=prepare, timeout=600)


def refused(arguments: list[str], place: Path, message: str, code: int = 2) -> str:
    """One line, the exit code, in time and room."""
    ended = run(arguments, place)
    assert ended.code == code, (ended.code, ended.err[-2000:])
    told = [line for line in ended.err.splitlines() if line.startswith("dpaudit: ")]
    assert told == [ended.line] and "Traceback" not in ended.err, ended.err
    assert message in ended.line and len(ended.line) < 1000, ended.line
    assert ended.memory < MEMORY, f"{ended.memory / 1e9:.2f} GB"
    assert not ended.foreign, ended.foreign
    return ended.line


def test_what_is_sound_is_audited(place: Path) -> None:
    for changed in ({}, {"base": "tiles", "model": "tiles"}):
        ended = run(audit_words(place, **changed), place)
        said = ended.out + ended.err
        expected = "answers every record exactly as --base does" if changed else "verdict "
        assert expected in said, ended.err
        assert ended.memory < MEMORY


METHODS = (
    "XLORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING",
    "ADAPTION_PROMPT", "POLY", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "HRA", "BONE", "TRAINABLE_TOKENS", "lora",
    "Lora ", "LORA\u200b", None, 5, ["LORA"], {"LORA": 1}, True, "../LORA", "somebody/LORA",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_adapter_but_plain_lora_is_loaded(place: Path, method: object) -> None:
    settings(ADAPTER, peft_type=method, adapters={"0": "somebody/else"}, base_model_name_or_path="somebody/else")(place)
    refused(audit_words(place), place, "peft_type: got")


MODEL_CASES: dict[str, tuple[Damage, str]] = {
    "xlora": (settings(ADAPTER, peft_type="XLORA", adapters={"0": "somebody/else"}), "peft_type: got 'XLORA'"),
    "other method": (settings(ADAPTER, peft_type="IA3"), "peft_type: got 'IA3'; accepted: LORA"),
    "module by name": (settings(ADAPTER, megatron_config={"a": 1}, megatron_core="os"), "'megatron_config'"),
    "endless pattern": (settings(ADAPTER, target_modules="(([a-z_.0-9]+)*)*!"), "a pattern that takes more than"),
    "broken exclusion": (settings(ADAPTER, exclude_modules="(("), "exclude_modules: got '((', a pattern that"),
    "pattern of ranks": (settings(ADAPTER, rank_pattern={"((a+)+)+b": 2}), "rank_pattern: got"),
    "huge rank": (settings(ADAPTER, r=10_000), "names a rank of 10000"),
    "kernel of the hub": (settings(CONFIG, attn_implementation="somebody/kernel"), "attn_implementation: got"),
    "kernel within": (settings(CONFIG, text_config__attn_implementation="somebody/kernel"), "attn_implementation: got"),
    "hidden kernel": (settings(CONFIG, _attn_implementation="flash_attention_2"), "_attn_implementation: got"),
    "quantiser": (settings(CONFIG, quantization_config={"quant_method": "bitsandbytes"}), "quantization_config: got"),
    "backbone of the hub": (settings(CONFIG, vision_config__model_type="timm_wrapper"), "model_type: got"),
    "ten million layers": (settings(CONFIG, text_config__num_hidden_layers=10**7), "asks for 10000000 layers"),
    "million layers": (settings(CONFIG, vision_config__num_hidden_layers=10**6), "asks for 1000000 layers"),
    "huge vocabulary": (settings(CONFIG, text_config__vocab_size=10**9), "asks for a model of"),
    "huge width": (settings(CONFIG, text_config__hidden_size=1 << 20), "asks for a model of"),
    "huge picture": (settings(CONFIG, vision_config__image_size=10**6), "asks for a model of"),
    "labels without end": (settings(CONFIG, num_labels=10**9), "of memory before any weight is read"),
    "number beyond all": (settings(CONFIG, text_config__max_position_embeddings=10**18), "max_position_embeddings"),
    "text for a number": (settings(CONFIG, text_config__hidden_size="many"), "can't be loaded"),
    "no heads": (settings(CONFIG, text_config__num_attention_heads=0), "can't be loaded"),
    "negative layers": (settings(CONFIG, text_config__num_hidden_layers=-3), "fails on a picture of noise"),
    "unknown family": (settings(CONFIG, model_type="evil"), "accepted: a checkpoint of model type"),
    "other text model": (settings(CONFIG, text_config__model_type="nothing"), "can't be loaded"),
    "doubling": (hands.replaces(*[({"String": "a"}, "a" * 10)] * 12), "takes more than"),
    "doubling of a rare word": (hands.replaces(*[({"String": "digit"}, "digit" * 10)] * 9), "base/tokenizer.json"),
    "bomb of one word": (hands.replaces(({"String": "three"}, "x" * 300_000)), "characters into"),
    "endless search": (hands.splits(f"((({LONG}|a)+)+)+!"), "base/tokenizer.json"),
    "endless padding": (settings(TOKENIZER, padding={
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>"}), "takes more than"),
    "no tokenizer": (settings(TOKENIZER, model={"type": "Nothing"}), "base/tokenizer.json"),
    "tokenizer gone": (gone(TOKENIZER), "tokenizer.json is missing"),
    "weights gone": (gone(WEIGHTS), "holds no .safetensors file"),
    "weights cut": (cut(WEIGHTS), "damaged or unfinished"),
    "header of a gigabyte": (content(WEIGHTS, (1 << 30).to_bytes(8, "little") + b"{" * 100), "damaged or unfinished"),
    "tensors overlap": (content(WEIGHTS, b"\x53" + bytes(7) + b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                                b'"b":{"dtype":"U8"}}' + bytes(20)), "damaged or unfinished"),
    "other weights": (lambda place: shutil.copy(place / "tiles/model.safetensors", place / WEIGHTS) and None,
                      "weights, the first is"),
    "weights of another rank": (hands.tensors("adapter", "q_proj.lora_A", (10_000, 1)), "size mismatch"),
    "more tokens than rows": (settings(CONFIG, image_token_index=310), "does not know <image>"),
    "link that leads out": (lambda place: (place / CONFIG).unlink() or (place / CONFIG).symlink_to("/etc/hostname"),
                            "leads out of its folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_hostile_model_is_refused(place: Path, name: str) -> None:
    damage, message = MODEL_CASES[name]
    damage(place)
    refused(audit_words(place), place, message)


PICTURE_CASES: dict[str, tuple[Damage, str]] = {
    "huge": (settings(PICTURES, size={"longest_edge": 10**6}), "longest_edge: got 1000000"),
    "countless tiles": (settings(PICTURES, max_image_size={"longest_edge": 1}), "cuts pictures of"),
    "negative": (settings(PICTURES, size={"longest_edge": -5}), "longest_edge: got -5"),
    "text": (settings(PICTURES, size={"longest_edge": "x"}), "picture processor does not fit its tower"),
    "other class": (settings(PICTURES, image_processor_type="Evil"), "can't be"),
}


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_hostile_preprocessing_is_refused(place: Path, name: str) -> None:
    damage, message = PICTURE_CASES[name]
    damage(place)
    refused(audit_words(place, base="tiles", model="tiles"), place, message)


READ = {
    "base/config.json": "", "base/tokenizer.json": "", "base/model.safetensors": "", "base/tokenizer_config.json": "",
    "base/generation_config.json": "", "adapter/adapter_config.json": "", "adapter/adapter_model.safetensors": "",
    "records.parquet": "", "coins.csv": "--coins",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in hands.KINDS if kind not in ("gone", "text")])
def test_anything_in_place_of_a_file_is_refused(world: Path, place: Path, kind: str) -> None:
    """Every file that `audit --model` reads, one after the other."""
    for name, option in READ.items():
        hands.KINDS[kind](name)(place)
        line = refused(audit_words(place), place, "")
        assert Path(name).name in line or (option and option in line), line
        _restore(world, place, name)


def _restore(world: Path, place: Path, name: str) -> None:
    path = place / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy(world / "sound" / name, path)


def test_a_pickle_is_never_opened(place: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hands.pickled_only("adapter", marker)(place)
    refused(audit_words(place), place, "adapter_model.bin is a pickle, which dpaudit never opens")
    (place / "adapter/adapter_config.json").unlink()
    refused(audit_words(place), place, "adapter_model.bin is a pickle, which dpaudit never opens")
    assert not marker.exists()


PICKLE = b"cposix\nmkdir\n(V%s\ntR."


@pytest.mark.parametrize(
    "name",
    ["base/model.safetensors", "base/pytorch_model.bin", "base/tokenizer.json", "adapter/adapter_model.safetensors",
     "adapter/adapter_model.bin", "records.parquet", "coins.csv", "base/optimizer.pt", "adapter/training_args.bin"],
)  # fmt: skip
def test_a_pickle_is_never_opened_whatever_its_name(place: Path, tmp_path: Path, name: str) -> None:
    """In place of a file, or beside those that are there: an answer either way, and nothing was run."""
    content(name, PICKLE % str(tmp_path / "marker").encode())(place)
    ended = run(audit_words(place), place)
    assert ended.code in (0, 2) and "Traceback" not in ended.err, ended.err
    assert not (tmp_path / "marker").exists()


def test_a_pickle_among_scores_is_never_opened(place: Path, tmp_path: Path) -> None:
    for name in ("scores.npz", "scores.npy", "scores.csv", "scores.parquet", "scores.pkl"):
        content(name, PICKLE % str(tmp_path / "marker").encode())(place)
        refused(["scores", name, "--delta", "1e-5"], place, name)
    np.savez(place / "objects.npz", scores=np.array([{"a": 1}], dtype=object), member=np.ones(1, dtype=bool))
    refused(["scores", "objects.npz", "--delta", "1e-5"], place, "objects.npz")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}<image>{question}",
        "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
        "{{ 'x' * 10**10 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('stop') }}",
        "{% for",
        "no picture and no question",
    ],
    ids=["loops", "doubles", "product", "classes", "include", "raises", "broken", "empty"],
)
def test_a_chat_template_ends(place: Path, template: str) -> None:
    (place / "tiles/chat_template.jinja").write_text(template)
    line = refused(audit_words(place, base="tiles", model="tiles"), place, "template")
    assert "passwd:" not in line and "root:" not in line


DATA_CASES: dict[str, tuple[Damage, str]] = {
    "solid pictures": (hands.solid_pictures(), "MB of pictures unpack to"),
    "JPEG of countless scans": (hands.pictured(hands.scans), "a JPEG of more than 64 scans"),
    "TIFF of countless pages": (hands.pictured(hands.pages), "more than 1000 pages"),
    "TIFF in a circle": (hands.pictured(lambda: hands.pages(circle=True)), "more than 1000 pages"),
    "one question of all rows": (hands.named_again("question", "x" * (1 << 20), 60_000), "1048576 characters"),
    "one picture of all rows": (hands.named_again("image", hands.png(4096, 4096) + bytes(1 << 25), 60_000), "row "),
    "one id of all rows": (hands.named_again("id", "x" * (1 << 20), 60_000), "--records"),
    "no picture": (hands.named_again("image", b"no picture", 3), "not a readable picture"),
    "one coin of all rows": (hands.named_again("id", "x" * (1 << 20), 60_000, "coins.csv"), "--coins"),
    "a line without end": (content("coins.csv", b"id,member\n" + b"," * (1 << 25)), "a line of more than"),
    "ten thousand columns": (content("coins.csv", b"," * 20_000), "--coins"),
    "too many rows": (content("coins.csv", b"id,member\n" + b"a,1\n" * (1 << 25)), "larger than 64 MB"),
}


DATA_CASES |= {name: (hands.pictured(make), message) for name, (make, message) in PARTS.items()}


@pytest.mark.parametrize("name", DATA_CASES)
def test_hostile_data_are_refused(place: Path, name: str) -> None:
    damage, message = DATA_CASES[name]
    damage(place)
    refused(audit_words(place), place, message)


def test_a_table_of_coins_that_unpacks_to_gigabytes_is_refused(place: Path) -> None:
    hands.named_again("id", "x" * (1 << 20), 60_000, "coins.parquet")(place)
    assert (place / "coins.parquet").stat().st_size < 1 << 16
    refused(audit_words(place, coins="coins.parquet"), place, "unpacks to more than 256 MB")
    hands.named_again("id", "x" * (1 << 20), 60_000, "scores.parquet")(place)
    refused(["scores", "scores.parquet", "--delta", "1e-5"], place, "unpacks to more than 256 MB")


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_no_command_waits_for_a_pipe_or_reads_a_device(place: Path, kind: str) -> None:
    hands.scores_csv(place)
    for name in ("scores.csv", "run.yaml", "grid.yaml", "audit.json"):
        hands.KINDS[kind](name)(place)
    for arguments in (
        ["scores", "scores.csv", "--delta", "1e-5"],
        ["train", "-c", "run.yaml", "--dry-run"],
        ["sweep", "grid.yaml", "--dry-run"],
        ["report", "audit.json", "-o", "report.html"],
    ):
        refused(arguments, place, arguments[1] if arguments[1] != "-c" else "run.yaml")


def test_configurations_of_any_size_end_at_once(place: Path) -> None:
    hands.quadratic_yaml(place)
    refused(["train", "-c", "run.yaml", "--dry-run"], place, "larger than")
    hands.cubic_grid(place)
    refused(["sweep", "grid.yaml", "--dry-run"], place, "grid: got '27000000 cells'; accepted: at most 10000")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lora.rank=1000000000", "model.lora.rank: got 1000000000; accepted: at most"),
        ("privacy.noise-multiplier=1e-300", "privacy.noise-multiplier: got"),
        ("privacy.noise-multiplier=1e300", "privacy.noise-multiplier: got"),
        (f"model.path=/{'x' * 9000}", "model.path: got"),
    ],
)
def test_numbers_and_names_of_any_size_are_refused(place: Path, setting: str, message: str) -> None:
    base = [] if setting.startswith("model.path") else [f"model.path={place / 'base'}"]
    steps = ["training.steps=2", "privacy.epsilon=null"] if "noise" in setting else ["training.steps=2"]
    refused(["train", "--dry-run", "--method", "dp-sgd", *base, *steps, setting], place, message)


class Listener:
    """A server that counts who calls."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.calls = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            connection.close()

    def environment(self, home: Path) -> dict[str, str]:
        """The hub is at this server, and so is every proxy."""
        url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), url)
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "", "no_proxy": ""}
        return {**os.environ, **proxies, **settings}  # `make` would keep the tests off any hub


RUN_CASES: dict[str, tuple[Damage, str]] = {
    "xlora": (settings(ADAPTER, peft_type="XLORA", adapters={"0": "somebody/else"}), "peft_type: got 'XLORA'"),
    "pattern": (settings(ADAPTER, target_modules="(([a-z_.0-9]+)*)*!"), "a pattern that takes more than"),
    "pickle": (hands.pickled_only("adapter", Path("/nowhere")), "adapter_model.bin is a pickle"),
    "base": (settings(CONFIG, attn_implementation="somebody/kernel"), "attn_implementation: got"),
}


@pytest.mark.parametrize("name", RUN_CASES)
def test_a_hostile_run_is_refused(place: Path, name: str) -> None:
    damage, message = RUN_CASES[name]
    damage(place)
    refused(["audit", str(hands.run_folder(place, str(place / "base"))), "--fusion"], place, message)


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, True])
def test_the_hub_is_asked_for_a_run_only_where_the_auditor_says_so(place: Path, tmp_path: Path, online: bool) -> None:
    listener = Listener()
    run = hands.run_folder(place, "somebody/model")
    shutil.rmtree(run / "private")  # as a release is handed over
    words = ["audit", str(run), "--fusion", *(["--online"] if online else [])]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dpaudit")), *words],
        env=listener.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = done.stderr.splitlines()[-1]
    assert told.startswith("dpaudit: model.path: ") and "'somebody/model'" in told, done.stderr
    assert ("--online fetches it" in told) is not online
    assert (listener.calls > 0) is online


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adapter", "kernel", "base"])
def test_nobody_is_asked(place: Path, tmp_path: Path, case: str) -> None:
    """The installed command, with a hub that counts: no file makes it call. `--base ID` as typed does."""
    listener = Listener()
    words = audit_words(place)
    if case == "adapter":
        settings(ADAPTER, peft_type="XLORA", adapters={"0": "somebody/else"}, base_model_name_or_path="a/b")(place)
    if case == "kernel":
        settings(CONFIG, attn_implementation="somebody/kernel", _name_or_path="a/b")(place)
    if case == "base":
        words[words.index("--base") + 1] = "somebody/model"
    program = Path(sys.executable).with_name("dpaudit")
    done = subprocess.run(
        [str(program), *words], env=listener.environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == (4 if case == "base" else 2) and done.stderr.splitlines()[-1].startswith("dpaudit: "), (
        done.stderr
    )
    assert (listener.calls > 0) == (case == "base")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10 < MEMORY
