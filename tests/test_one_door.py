"""Files that somebody else may have made are opened through `dpaudit.untrusted` and, for tables,
`dpaudit.untrusted_tables`, and in no other way.

The scan looks at every call of our four packages that opens, reads, parses or decodes a file. What stands outside the
door is listed here with the reason; a new call anywhere else fails.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.test_nothing_let_in import modules

DOORS = ("dpaudit/untrusted.py", "dpaudit/untrusted_tables.py")
NAMES = {
    "open", "io.open", "os.open", "os.fdopen", "codecs.open", "Image.open", "safe_open", "load_file",
    "json.load", "yaml.safe_load", "yaml.safe_load_all", "np.fromfile", "np.memmap", "np.loadtxt", "np.genfromtxt",
    "numpy.fromfile", "mmap.mmap", "tomllib.load", "csv.reader", "csv.DictReader", "gzip.open", "bz2.open",
    "lzma.open", "zipfile.ZipFile", "shutil.copyfile", "shutil.copy", "shutil.copy2", "shutil.copytree",
    "snapshot_download", "hf_hub_download", "hashlib.file_digest", "ParquetFile", "read_schema", "read_table",
    "read_metadata", "cached_file", "linecache.getlines",
}  # fmt: skip
METHODS = {"read_text", "read_bytes", "from_pretrained", "read_csv", "read_parquet", "read_json", "read_feather",
           "read_excel", "read_hdf", "read_orc", "read_table", "read_schema", "read_metadata", "ParquetFile",
           "load_dataset", "load_from_disk", "memory_map", "OSFile", "open_stream", "open_file"}  # fmt: skip

# (file, what is called) -> why it is no file of somebody else, or why the call is safe.
OUTSIDE = {
    ("attacks/bugs/correct_updates.py", "load_file"): "what the same trainer saved, in an audit of its own",
    ("attacks/contract/process.py", "json.load"): "standard input, from the parent process",
    ("dpaudit/atomic.py", "os.open"): "what is being written, or its folder",
    ("dpaudit/atomic.py", "temporary.open"): "what is being written",
    ("dpaudit/cli/app.py", "os.open"): "/dev/null",
    ("dpaudit/cli/external.py", "yaml.safe_load"): "an argument as typed",
    ("dpaudit/environment.py", "Path('/proc/meminfo').read_text"): "the kernel's",
    ("dpaudit/environment.py", "Path('/sys/fs/cgroup/memory.max').read_text"): "the kernel's",
    ("dpaudit/environment.py", "Path('/sys/fs/cgroup/memory.current').read_text"): "the kernel's",
    ("dpaudit/executors.py", "os.fdopen"): "a job's own log, written",
    ("dpaudit/executors.py", "(job.folder / 'result.json').read_text"): "a job's own, in a folder made for it",
    ("dpaudit/executors.py", "job.log.read_text"): "a job's own",
    ("dpaudit/executors_ray.py", "outcome.log.read_bytes"): "a job's own",
    ("dpaudit/worker.py", "(folder / 'job.json').read_text"): "written by the parent process",
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


def calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every call that opens, reads or decodes a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        method = called.rpartition(".")[2]
        if called.startswith(("untrusted.", "untrusted_tables.")) or called == "open_regular":
            continue
        pathlike = isinstance(node.func, ast.Attribute) and method == "open" and _mode(node)
        if called in NAMES or (isinstance(node.func, ast.Attribute) and method in METHODS) or pathlike:
            yield node.lineno, called


def _mode(node: ast.Call) -> bool:
    """`path.open()` and `path.open("rb")`; not RunFolder.open(path), a class's own way to itself."""
    first = node.args[0] if node.args else None
    return first is None or (isinstance(first, ast.Constant) and isinstance(first.value, str))


def test_no_module_opens_a_foreign_file_any_other_way() -> None:
    own = {"read_text", "read_bytes", "read_json", "read_csv", "read_parquet"}  # imported from the door by name
    found = []
    for name, tree in modules():
        if name in DOORS or name.startswith("trainers/public/"):  # makes the reference model, by us alone
            continue
        found += [
            f"{name}:{line}: {called}"
            for line, called in calls(tree)
            if (name, called) not in OUTSIDE and called not in own
        ]
    assert found == []


def test_every_exception_is_still_there() -> None:
    seen = {(name, called) for name, tree in modules() for _, called in calls(tree)}
    assert set(OUTSIDE) <= seen, sorted(set(OUTSIDE) - seen)


@pytest.mark.parametrize(
    "text",
    ["open(path)", "path.open('rb')", "path.open()", "path.read_text()", "json.load(file)", "pd.read_csv(path)",
     "pq.ParquetFile(path)", "safe_open(path)", "load_file(path)", "Image.open(path)", "AutoModel.from_pretrained(x)",
     "PeftModel.from_pretrained(x)", "np.memmap(path)", "pyarrow.parquet.read_table(path)", "yaml.safe_load(file)"],
)  # fmt: skip
def test_the_scan_sees_it(text: str) -> None:
    assert list(calls(ast.parse(text)))
