"""Files that somebody else may have made are opened through `dpaudit.untrusted` and, for tables,
`dpaudit.untrusted_tables`, and in no other way.

The scan looks at every call of our four packages that opens, reads, parses or decodes a file. What stands outside the
door is listed here with the reason; a new call anywhere else fails.
"""

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.test_nothing_let_in import modules

DOORS = ("dpaudit/untrusted.py", "dpaudit/untrusted_tables.py")
OURS = ("dpaudit", "trainers", "attacks", "reports")

# Functions by their full names, whatever a module calls them.
FUNCTIONS = {
    "open", "json.load", "yaml.safe_load", "yaml.safe_load_all", "yaml.load", "yaml.load_all", "numpy.load",
    "numpy.fromfile", "numpy.memmap", "numpy.loadtxt", "numpy.genfromtxt", "numpy.DataSource", "torch.load",
    "torch.from_file", "torch.jit.load", "tomllib.load", "csv.reader", "csv.DictReader", "io.FileIO", "os.popen",
    "safetensors.safe_open", "shutil.copyfile", "shutil.copy", "shutil.copy2", "shutil.copytree", "shutil.move",
    "shutil.unpack_archive", "huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download",
    "hashlib.file_digest", "os.read", "os.pread", "os.readv", "os.sendfile", "os.link", "os.fdopen", "os.execv",
    "matplotlib.pyplot.imread", "matplotlib.image.imread", "scipy.io.loadmat", "ctypes.CDLL", "logging.FileHandler",
    "runpy.run_path", "pyarrow.dataset.dataset", "importlib.util.spec_from_file_location", "asyncio.open_connection",
}  # fmt: skip
# Methods and functions that only readers of files are called.
METHODS = {
    "read_text", "read_bytes", "from_pretrained", "from_file", "read_csv", "read_parquet", "read_json", "read_feather",
    "read_excel", "read_hdf", "read_orc", "read_pickle", "read_table", "read_pandas", "read_schema", "read_metadata",
    "read_image", "imread", "ParquetFile", "ParquetDataset", "load_dataset", "load_from_disk", "memory_map", "OSFile",
    "open_stream", "open_file", "load_file", "safe_open", "snapshot_download", "hf_hub_download", "cached_file",
    "load_peft_weights", "getlines", "copyfileobj", "fromfile", "memmap", "file_digest",
}  # fmt: skip
LAST = METHODS | {name.rpartition(".")[2] for name in FUNCTIONS} | {"open"}
# Modules that are for reading files, or whose every use is one: each import is listed.
READERS = {
    "mmap", "tarfile", "zipfile", "gzip", "bz2", "lzma", "zlib", "sqlite3", "dbm", "shelve", "fileinput", "linecache",
    "configparser", "plistlib", "runpy", "codecs", "tokenize", "subprocess", "pty", "h5py", "cv2", "imageio",
    "torchvision", "datasets", "builtins", "_io", "posix", "urllib.request", "requests", "httpx", "fsspec",
}  # fmt: skip
IMPORTED = {
    ("dpaudit/environment.py", "subprocess"): "asks git and the driver for versions",
    ("dpaudit/forks.py", "subprocess"): "starts our own worker",
    ("trainers/data/hub.py", "subprocess"): "starts the child that downloads",
    ("trainers/limited.py", "subprocess"): "starts the child with limits, which opens no file",
    ("attacks/contract/production.py", "subprocess"): "starts our own command",
    ("reports/process.py", "subprocess"): "starts our own worker",
    ("reports/worker.py", "datasets"): "makes a table of its own records for lmms-eval",
}

# (file, what is called) -> why it is no file of somebody else, or why the call is safe.
OUTSIDE = {
    ("attacks/bugs/correct_updates.py", "load_file"): "what the same trainer saved, in an audit of its own",
    ("attacks/contract/process.py", "json.load"): "standard input, from the parent process",
    ("dpaudit/atomic.py", "os.pread"): "the end of a log of this run, opened as an ordinary file there",
    ("dpaudit/cli/supervised.py", "os.read"): "a pipe from our own child",
    ("dpaudit/cli/supervised.py", "ctypes.CDLL"): "the C library of this process, for one system call",
    ("dpaudit/config/reading.py", "yaml.load"): "text of the door, with a loader that knows no tags",
    ("dpaudit/runs.py", "os.pread"): "the lock of this run, opened as an ordinary file there",
    ("trainers/data/stored.py", "os.pread"): "a nameless file that this process wrote",
    ("dpaudit/forks.py", "os.read"): "a pipe from our own worker",
    ("dpaudit/worker.py", "os.read"): "standard input and pipes of its own",
    ("dpaudit/worker.py", "os.open"): "/dev/null, and a job's own log, written",
    ("dpaudit/worker.py", "os.execv"): "this module again",
    ("dpaudit/worker.py", "(tasks / number / 'comm').read_text"): "the kernel's",
    ("dpaudit/atomic.py", "os.open"): "what is being written, or its folder",
    ("dpaudit/atomic.py", "temporary.open"): "what is being written",
    ("dpaudit/cli/app.py", "os.open"): "/dev/null",
    ("dpaudit/cli/app.py", "os.fdopen"): "/dev/null",
    ("dpaudit/cli/external.py", "yaml.safe_load"): "an argument as typed",
    ("dpaudit/environment.py", "Path('/proc/meminfo').read_text"): "the kernel's",
    ("dpaudit/environment.py", "Path('/sys/fs/cgroup/memory.max').read_text"): "the kernel's",
    ("dpaudit/environment.py", "Path('/sys/fs/cgroup/memory.current').read_text"): "the kernel's",
    ("dpaudit/executors.py", "os.fdopen"): "a job's own log, written",
    ("dpaudit/executors.py", "(job.folder / 'result.json').read_text"): "a job's own, in a folder made for it",
    ("dpaudit/executors.py", "job.log.read_text"): "a job's own",
    ("dpaudit/executors_ray.py", "outcome.log.read_bytes"): "a job's own",
    ("dpaudit/worker.py", "(place / 'job.json').read_text"): "written by the parent process",
    ("dpaudit/temporary.py", "os.open"): "a folder of this user, to lock it; nothing of it is read",
    ("reports/html.py", "(TEMPLATES / 'style.css').read_text"): "part of the package",
    ("reports/html.py", "(TEMPLATES / 'sort.js').read_text"): "part of the package",
    ("reports/process.py", "part.read_text"): "our workers' logs, in a folder made for them",
    ("reports/process.py", "Path(entry['out']).read_text"): "our worker's result",
    ("reports/process.py", "own.open"): "a log, written",
    ("reports/process.py", "own.read_text"): "our worker's log",
    ("reports/worker.py", "pq.read_schema"): "a table that this benchmark wrote",
    ("reports/worker.py", "Path(sys.argv[1]).read_text"): "written by the parent process",
    ("trainers/data/pictures.py", "Image.open"): "bytes of the door; formats and sizes are checked there",
    ("reports/copies.py", "Image.open"): "bytes that trainers.data.pictures decoded a moment ago",
    ("trainers/limited.py", "open"): "/proc/self/statm",
    ("trainers/fetched.py", "snapshot_download"): "into the local cache; the folder is checked before it is read",
    ("trainers/run.py", "settings.read_text"): "written by this process a moment ago",
    ("trainers/run.py", "file.read_bytes"): "written by this process a moment ago",
    ("trainers/opened.py", "AutoTokenizer.from_pretrained"): "a folder that passed trainers.model_files",
    ("trainers/text.py", "AutoTokenizer.from_pretrained"): "a folder that passed trainers.model_files",
    ("trainers/model_files.py", "architecture.from_pretrained"): "a folder that passed trainers.model_files",
    ("trainers/opened.py", "AutoImageProcessor.from_pretrained"): "a folder that passed trainers.model_files",
    ("trainers/families/processors.py", "source.from_pretrained"): "the same folder, transformers' own classes alone",
}  # fmt: skip


def names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, in full."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                root = item.name.partition(".")[0]
                found[item.asname or root] = item.name if item.asname else root
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                found[item.asname or item.name] = f"{node.module}.{item.name}"
    return found


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every use of something that opens, reads or decodes a file: a call, or handed on as a value."""
    known = names(tree)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "__import__", "operator.methodcaller"):
            asked = [item.value for item in node.args if isinstance(item, ast.Constant)]
            if any(isinstance(item, str) and (item in METHODS | READERS or item == "open") for item in asked):
                yield node.lineno, ast.unparse(node)
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load) or id(node) in inner:
            continue
        last = node.attr if isinstance(node, ast.Attribute) else known.get(node.id, node.id).rpartition(".")[2]
        if last not in LAST:
            continue
        text = ast.unparse(node)
        root = text.partition(".")[0].partition("(")[0]
        full = known.get(root, root) + text[len(root) :]
        if full.startswith(("dpaudit.untrusted.", "dpaudit.untrusted_tables.")):
            continue
        method = full.rpartition(".")[2] if "." in full else ""
        ours = method == "open" and known.get(root, "").startswith(OURS)  # RunFolder.open, a class's way to itself
        if full in FUNCTIONS or method in METHODS or (method == "open" and not ours):
            yield node.lineno, text


def readers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every import of a module of READERS."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{item.name}" for item in node.names]
        else:
            continue
        for name in named:
            parts = name.split(".")
            module = next((m for n in range(1, len(parts) + 1) if (m := ".".join(parts[:n])) in READERS), None)
            if module is not None:
                yield node.lineno, module


Found = list[tuple[str, int, str]]


@cache
def scanned() -> tuple[Found, Found]:
    """(uses, imports of readers) of every module, as (module, line, text)."""
    trees = list(modules())
    return (
        [(name, line, text) for name, tree in trees for line, text in uses(tree)],
        [(name, line, text) for name, tree in trees for line, text in readers(tree)],
    )


def test_no_module_opens_a_foreign_file_any_other_way() -> None:
    found = []
    for seen, known, what in zip(scanned(), (OUTSIDE, IMPORTED), ("", "imports "), strict=True):
        for name, line, text in seen:
            if name in DOORS or name.startswith("trainers/public/"):  # makes the reference model, by us alone
                continue
            if (name, text) not in known:
                found.append(f"{name}:{line}: {what}{text}")
    assert found == []


def test_every_exception_is_still_there() -> None:
    for seen, known in zip(scanned(), (OUTSIDE, IMPORTED), strict=True):
        assert set(known) <= (there := {(name, text) for name, _, text in seen}), sorted(set(known) - there)


@pytest.mark.parametrize(
    "text",
    ["open(path)", "path.open('rb')", "path.open()", "path.open(mode)", "path.read_text()",
     "json.load(open(path))", "import pandas as pd; pd.read_csv(path)", "pq.ParquetFile(path)",
     "from safetensors import safe_open; safe_open(p)", "import safetensors.torch as st; st.load_file(path)",
     "Image.open(path)", "from PIL import Image as I; I.open(path)", "import PIL.Image; PIL.Image.open(path)",
     "AutoModel.from_pretrained(x)", "PeftModel.from_pretrained(x)", "import numpy as np; np.memmap(path)",
     "from numpy import load as get; get(path)", "import numpy as n; n.load(p)",
     "import pyarrow.parquet as q; q.read_table(path)", "from pyarrow.parquet import read_table as r; r(path)",
     "q.read_pandas(path)", "import yaml; yaml.safe_load(file)", "map(Path.read_bytes, paths)",
     "partial(open, path)", "from pathlib import Path; Path.open(path)", "from os import open as o; o(path, 0)",
     "import os; os.open(path, 0)", "import os; os.read(3, 9)", "import io; io.FileIO(path)",
     "getattr(path, 'read_bytes')()", "getattr(os, 'open')(path)", "Tokenizer.from_file(path)",
     "import shutil; shutil.copyfileobj(a, b)", "import torch; torch.from_file(path)"],
)  # fmt: skip
def test_the_scan_sees_it(text: str) -> None:
    assert list(uses(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    ["import subprocess", "from subprocess import run", "import tarfile", "from mmap import mmap", "import gzip as g",
     "import builtins", "from torchvision.io import read_image", "import urllib.request", "from urllib import request",
     "import sqlite3"],
)  # fmt: skip
def test_the_scan_sees_the_import(text: str) -> None:
    assert list(readers(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["RunFolder.open(path)", "untrusted.read_text(path, 9)", "read_json(path)", "reader.opened", "np.load_all"]
)
def test_the_door_and_what_is_called_alike_pass(text: str) -> None:
    ours = (
        "from dpaudit import untrusted\nfrom dpaudit.runs import RunFolder\nfrom dpaudit.untrusted import read_json\n"
    )
    assert not list(uses(ast.parse(ours + text)))
