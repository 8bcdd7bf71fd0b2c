"""Nothing gets in: no code of a checkpoint, a configuration or a data file is run, nothing is unpickled, nothing is
unpacked without a limit, and no file is read outside of what was named."""

import ast
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpaudit.config import DataConfig, read_yaml, resolve
from dpaudit.documents import AuditDocument
from dpaudit.errors import UsageError
from tests.tiny import save_tiny_llava
from trainers.data import load
from trainers.vlm import VisionLanguageModel

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dpaudit", "trainers", "attacks", "reports")

# What is never called, and why an exception stands.
FORBIDDEN = {
    "eval": "runs text", "exec": "runs text", "compile": "makes code of text", "os.system": "runs a shell",
    "os.popen": "runs a shell", "pickle.load": "runs what it reads", "pickle.loads": "runs what it reads",
    "pickle.dump": "pickles", "pickle.dumps": "pickles", "marshal.loads": "runs what it reads",
    "shelve.open": "pickles", "joblib.load": "unpickles", "torch.load": "unpickles", "torch.save": "pickles",
    "np.load": "may unpickle", "numpy.load": "may unpickle", "pd.read_pickle": "unpickles",
    "yaml.unsafe_load": "runs what it reads", "yaml.full_load": "makes objects", "shutil.unpack_archive": "can escape",
    "zipfile.ZipFile": "can escape", "tarfile.open": "can escape", "tempfile.mktemp": "a race",
}  # fmt: skip
# (file, module or call) -> why it stands: an archive is never unpacked onto the disk.
STANDING = {
    ("dpaudit/untrusted_tables.py", "zipfile"): "parts of an .npz file, read in memory after their sizes are known",
    ("dpaudit/untrusted_tables.py", "zipfile.ZipFile"): "the same",
}
IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "zipfile", "tarfile"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def faults(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            for item in named:
                if item.partition(".")[0] in IMPORTS and (name, item) not in STANDING:
                    yield f"{name}:{node.lineno}: imports {item}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (name, called) in STANDING:
            continue
        if called in FORBIDDEN and keywords.get("weights_only") != "True":
            yield f"{name}:{node.lineno}: {called} {FORBIDDEN[called]}"
        if keywords.get("shell") == "True":
            yield f"{name}:{node.lineno}: a shell"
        if keywords.get("trust_remote_code", "False") != "False":
            yield f"{name}:{node.lineno}: trust_remote_code"
        if called.startswith("Auto") and called.endswith(".from_pretrained") and "trust_remote_code" not in keywords:
            yield f"{name}:{node.lineno}: {called} without trust_remote_code=False asks on the terminal"
        if called == "yaml.load" and "_Loader" not in ast.unparse(node):
            yield f"{name}:{node.lineno}: yaml.load without a safe loader"


def test_no_module_runs_or_unpickles_what_it_reads() -> None:
    assert [fault for name, tree in modules() for fault in faults(name, tree)] == []


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from cloudpickle import dumps", "torch.load(path)", "eval(text)", "run(x, shell=True)",
     "AutoModel.from_pretrained(x)", "f(trust_remote_code=True)", "yaml.load(text, yaml.Loader)"],
)  # fmt: skip
def test_the_scan_sees_it(text: str) -> None:
    assert list(faults("x.py", ast.parse(text)))


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def test_code_and_pickles_of_a_checkpoint_are_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"import os\nos.mkdir({str(marker)!r})\nraise RuntimeError\n"
    with_code = save_tiny_llava(tmp_path / "code")
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((with_code / name).read_text())
        tree["auto_map"] = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"], "AutoModel": "evil.M"}
        (with_code / name).write_text(json.dumps({**tree, "model_type": "evil"} if name == "config.json" else tree))
    (with_code / "evil.py").write_text(code)
    pickled = save_tiny_llava(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (pickled / name).write_bytes(pickle.dumps(Evil(marker)))
    for folder in (with_code, pickled):
        with pytest.raises(UsageError) as caught:
            VisionLanguageModel.load(str(folder), device="cpu")
        assert "model.path" in str(caught.value) and "\n" not in str(caught.value)
        assert not marker.exists()


def png(width: int, height: int) -> bytes:
    """A valid PNG of one colour: a few kilobytes that unpack to width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write(folder: Path, rows: list[dict[str, Any]], **options: Any) -> DataConfig:
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", **options)
    small = [{"image": small_png(index), "question": "what?", "answer": "one"} for index in range(4)]
    pq.write_table(pa.Table.from_pylist(small), folder / "test.parquet")
    return DataConfig(path=str(folder), train="train.parquet", test="test.parquet")


def small_png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_decompression_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    bomb = png(4_097, 4_097)
    assert len(bomb) < 100_000
    config = write(tmp_path, [{"image": bomb, "question": "what?", "answer": "one"}] * 2)
    with pytest.raises(UsageError, match=r"row 1, image: .*pixels"):
        load(config)


def test_a_packed_column_is_refused_before_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.data.rows.MAX_UNPACKED", 1 << 22)  # for a small bomb
    rows = [{"image": small_png(0), "question": "x" * 1_000_000, "answer": str(index)} for index in range(8)]
    config = write(tmp_path, rows, compression="zstd", use_dictionary=False)
    assert (tmp_path / "train.parquet").stat().st_size < 10_000
    with pytest.raises(UsageError, match="unpacks from"):
        load(config)


def test_one_picture_named_by_many_rows_is_read_in_pieces(tmp_path: Path) -> None:
    from trainers.data import rows

    assert rows.ROWS_AT_ONCE * rows.MAX_PICTURE_BYTES <= 1 << 30


def test_devices_pipes_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)  # sparse: it takes no room
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "huge"):
        for read in (read_yaml, AuditDocument.read):
            with pytest.raises(UsageError) as caught:
                read(path)
            assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "/etc/passwd", "link.parquet", "a/../../outside.parquet", "nul\0.parquet", "..", "."]
)
def test_no_data_file_is_read_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path, [{"image": small_png(0), "question": "what?", "answer": "one"}] * 3)
    (tmp_path / "train.parquet").rename(tmp_path / "outside.parquet")
    (inside / "link.parquet").symlink_to(tmp_path / "outside.parquet")
    config = DataConfig(path=str(inside), train=name, test=name)
    with pytest.raises(UsageError, match=r"^data\.train"):
        load(config)


def test_no_picture_is_read_outside_of_the_folder_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(small_png(1))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        pd.DataFrame({"image": [name], "question": ["q"], "answer": ["a"]}).to_json(
            inside / "train.jsonl", orient="records", lines=True
        )
        (inside / "test.jsonl").write_bytes((inside / "train.jsonl").read_bytes())
        with pytest.raises(UsageError, match=r"row 1, image: its path") as caught:
            load(DataConfig(path=str(inside), train="train.jsonl", test="test.jsonl"))
        assert "secret" not in str(caught.value)


def test_yaml_makes_nothing_but_plain_values(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for text in (
        f"!!python/object/apply:os.mkdir [{str(marker)!r}]",
        f"method: !!python/object/apply:os.mkdir [{str(marker)!r}]",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "? {a: 1}\n: 2",
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UsageError):
            resolve(read_yaml(tmp_path / "run.yaml"))
    assert not marker.exists()
