"""Cases by grammar: what people and programs might hand to the command line, from nearly right to hostile.

A case is a set of files and a command line. Each strategy starts from something valid and bends it: values of another
type, at and beyond the limits, odd text, missing and doubled parts, bytes flipped, cut off or repeated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from dpaudit.config import RunConfig

# Nothing here may make a valid command run for long: trainings lack their data, sweeps and plans are dry.
NO_DATA = ("data.path=nowhere", "data.train=a.jsonl", "data.test=b.jsonl")


@dataclass(frozen=True)
class Case:
    """Files (relative names) and a command line. `{run}` in an argument is the path of the damaged run folder,
    `{key}` that of a private key whose signature the run has."""

    family: str
    arguments: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...] = ()
    damage: tuple[tuple[str, str, int], ...] = ()  # (file of the run, what is done to it, where)
    handed: tuple[tuple[str, str, int], ...] | None = (
        None  # the same of a model, its records and coins; None: not there
    )

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={content[:300]!r}" for name, content in self.files)
        return f"dpaudit {' '.join(map(repr, self.arguments))}  {shown} {self.damage or self.handed or ''}"


ODD = (
    "", " ", "\t", "\n", "é", "\u202e", "😀", "<script>alert(1)</script>", "null", "~", "..", "../..", "/",
    "/etc/passwd",
    "a" * 3000, "%s%n", "{}", "{x}", "[]", "true", "no", "1e400", "-0", "nan", ".nan", "inf", "-.inf", "0x10", "1_000",
    "1,5", "٣", "2020-01-01", "!!python/object/apply:os.system [ls]", "&a", "*a", "|", ">", "@", "`", "'", '"', "\\",
    "#",
    ":", "- -", "? ", "a: b", "=", "\x07", "\x7f", "\ufeff", "\ud800", "--", "-", "-h", "--json", "NUL", "con", "a=b",
    "..=1", "cuda:99", "dp-sgd ",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "2", "7", "0.5", "-0.5", "1e-5", "1e-300", "1e300", "1e-400", "inf", "-inf", "nan", "9" * 30,
    "-" + "9" * 30, "4294967296", "9223372036854775808", "0.999999999999", "1.0000001", "100", "1e2", "1.", ".5",
    "+1", "1e", "0b1",
)  # fmt: skip
text = st.sampled_from(ODD) | st.text(max_size=20)
tokens = st.sampled_from(ODD + NUMBERS) | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=15)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.integers(-2, 3), text, st.just(10**4000)
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=5
)


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        dashed = prefix + name.replace("_", "-")
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _leaves(inner, dashed + ".")
        else:
            found.append(dashed)
    return found


LEAVES = _leaves(RunConfig)
SECTIONS = sorted({name.rpartition(".")[0] for name in LEAVES} - {""})
GOOD: Mapping[str, tuple[Any, ...]] = {
    "method": ("dp-sgd", "dual-priv", "non-private", "dp-zo"),
    "reducer.name": ("none", "visionzip", "random", "cls-topk"),
    "privacy.relation": ("add-remove", "replace", "zero-out"),
    "privacy.epsilon": (8, 1.5, None),
    "privacy.noise-multiplier": (1.0, None),
    "training.batch-size": (1, 64),
    "training.steps": (3, None),
    "canaries.count": (0, 12),
    "canaries.kinds": (["noise"], []),
    "seed": (0, 7),
}

keys = (
    st.sampled_from(LEAVES) | st.sampled_from(LEAVES).map(lambda name: name.replace("-", "_"))
    | st.sampled_from(SECTIONS) | st.sampled_from(LEAVES).map(lambda name: name + ".x") | text
)  # fmt: skip


@st.composite
def settings_(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Some settings: half of them fields with values that could be right."""
    chosen = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(GOOD)))
            chosen.append((name, draw(st.sampled_from(GOOD[name]))))
        else:
            chosen.append((draw(keys), draw(trees)))
    return chosen


def nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`a.b: c` as a nested mapping."""
    tree: dict[str, Any] = {}
    for name, value in pairs:
        at = tree
        *path, last = name.split(".")
        for part in path:
            inner = at.get(part)
            if not isinstance(inner, dict):
                inner = at[part] = {}
            at = inner
        at[last] = value
    return tree


def _yaml(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, UnicodeError):
        return repr(tree).encode("utf-8", "surrogatepass")


@st.composite
def bent(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few faults: flipped, cut off, repeated, replaced, lines doubled or dropped."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("flip", "cut", "repeat", "insert", "line", "drop"))):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "repeat":
                data += data[at : at + 200]
            case "insert":
                data[at:at] = draw(
                    st.sampled_from(
                        [b"\0", b"\xff\xfe", b"\n", b"\t", b",", b'"', b": ", b"- ", b"{" * 3000, b"[[", b"&a "]
                    )
                )
            case "line":
                lines = bytes(data).splitlines(keepends=True)
                data = bytearray(b"".join(lines + lines[at % len(lines) :])) if lines else data
            case "drop":
                lines = bytes(data).splitlines(keepends=True)
                data = bytearray(b"".join(lines[1:]))
    return bytes(data)


@st.composite
def configurations(draw: st.DrawFn) -> Case:
    """`dpaudit train`: a YAML file, overrides, flags. There is no data, so that a good one ends quickly as well."""
    files: list[tuple[str, bytes]] = []
    arguments = ["train"]
    if draw(st.booleans()):
        tree = draw(settings_().map(nested) | trees)
        files.append(("run.yaml", draw(bent(_yaml(tree)))))
        arguments += ["-c", draw(st.sampled_from(["run.yaml"] * 5 + ["missing.yaml", ".", "/dev/null"]))]
    for name, value in draw(settings_()):
        arguments.append(f"{name}={value if isinstance(value, str) else json.dumps(value, default=str)}")
    for flag in draw(
        st.lists(st.sampled_from(["--epsilon", "--delta", "--seed", "--canaries", "--device", "--method"]), max_size=2)
    ):
        arguments += [flag, draw(tokens)]
    arguments += NO_DATA
    arguments += draw(st.sampled_from([["--dry-run"], ["--dry-run", "--json"], ["--out", "run"], ["--resume", "run"]]))
    return Case("configuration", tuple(_typed(item) for item in arguments), tuple(files))


def _typed(item: str) -> str:
    """As it could be typed: a command line holds no NUL and no half surrogate pair."""
    return item.replace("\0", "").encode("utf-8", "replace").decode()


@st.composite
def score_files(draw: st.DrawFn) -> Case:
    """`dpaudit scores`: tables of a few rows as CSV or Parquet, with every kind of fault."""
    count = draw(st.integers(24, 40) | st.integers(24, 40) | st.integers(0, 24))
    columns = draw(
        st.sampled_from(
            [["id", "member", "score"]] * 6
            + [["id", "score"], ["ID", "member", "score"], ["id", "member", "score", "x"]]
        )
    )
    good = draw(st.booleans())
    members = st.sampled_from(["0", "1"] if good else ["0", "1", "true", "False", "1.0", "", "2", "yes"])
    odd = not good and draw(st.booleans())
    rows = []
    for place in range(count):
        cells = {
            "id": draw(tokens) if odd and draw(st.integers(0, 9)) == 0 else f"r{place}",
            "member": draw(members),
            "score": draw(st.sampled_from(NUMBERS))
            if odd and draw(st.integers(0, 9)) == 0
            else str(draw(st.integers(-50, 50)) / 10),
        }
        rows.append([cells.get(name.lower(), "5") for name in columns])
    mark = "," if good else draw(st.sampled_from([","] * 8 + [";", "\t", "|"]))
    lines = [mark.join(columns)] + [mark.join(cell.replace("\n", " ") for cell in row) for row in rows]
    plain = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    content = plain if good else draw(bent(plain))
    name = draw(st.sampled_from(["scores.csv"] * 8 + ["scores.parquet", "scores", "missing.csv"]))
    arguments = ["scores", name, "--delta", draw(st.sampled_from(["1e-5"] * 5 + list(NUMBERS)))]
    for flag in draw(
        st.lists(st.sampled_from(["--confidence", "--alpha", "--coins", "--claim-sigma", "--seed"]), max_size=2)
    ):
        usual = {"--coins": ["independent", "half", "unknown"], "--claim-sigma": ["1"], "--seed": ["3"]}.get(
            flag, ["0.9"]
        )
        arguments += [flag, draw(st.sampled_from(usual * 3 + ["0", "-1", "nan", "x"]))]
    arguments += draw(st.sampled_from([[], ["--json"], ["--separate"], ["--independent-runs"], ["--features", name]]))
    return Case(
        "score file", tuple(_typed(item) for item in arguments), ((name, content),) if name != "missing.csv" else ()
    )


@st.composite
def data_files(draw: st.DrawFn) -> Case:
    """`dpaudit train` on JSONL files whose rows are bent; the batch is larger than all of them: nothing is trained."""
    picture = {"bytes": draw(st.sampled_from(PICTURES)), "path": None}
    rows: list[Any] = []
    for place in range(draw(st.integers(0, 5))):
        row: Any = {"image": picture, "question": "what is it?", "answer": f"a{place}", "kind": "k"}
        if draw(st.integers(0, 2)) == 0:
            row[draw(st.sampled_from(["image", "question", "answer", "kind", "patient"]))] = draw(trees)
        if draw(st.integers(0, 9)) == 0:
            row = draw(trees)
        rows.append(row)
    content = "".join(_json(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    name = draw(st.sampled_from(["train.jsonl"] * 8 + ["train.parquet", "train.json"]))
    files = [(f"data/{name}", draw(bent(content))), ("data/test.jsonl", content)]
    given = draw(st.sampled_from([name] * 8 + ["../secret.jsonl", "/etc/passwd", "missing.jsonl", "..", ""]))
    extra = draw(
        st.sampled_from(
            [[], ["data.unit=patient"], ["data.reserve=1"], ["data.limit=2"], ["data.train-images=train.jsonl"]]
        )
    )
    arguments = ["train", "data.path=data", f"data.train={given}", "data.test=test.jsonl", *extra]
    return Case("data file", (*arguments, "training.batch-size=1000000", "--out", "run"), tuple(files))


def _json(tree: Any) -> str:
    try:
        return json.dumps(tree, ensure_ascii=False)
    except ValueError:  # an integer of thousands of digits
        return "[" * 2000


PICTURES = (
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAFklEQVR4nGP8z8DAwMDAxAADCBYABQAlCAED2C7IFAAAAABJRU5ErkJggg==",
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkp", "", "!!!!", "AAAA" * 100,
)  # fmt: skip

RUN_FILES = (
    "release/config.yaml", "release/claim.json", "release/ledger.json", "release/audit.json",
    "release/environment.json", "release/SHA256SUMS", "release/model/complete.json",
    "release/model/adapter_config.json", "private/folders.json",
    "release/model/adapter_model.safetensors", "private/coins.parquet", "private/noise.key", "private/metrics.jsonl",
    "private/scores.parquet", "release/games/GAME", "release/games/GAME", "private/lock", "private/checkpoints/LAST",
    "release/signature.json",
)  # fmt: skip
DAMAGES = ("flip", "half", "empty", "remove", "folder", "link", "number", "null", "rubbish", "sealed", "mode", "pipe",
           "sparse", "deep", "extra", "moved", "twice", "key")  # fmt: skip


@st.composite
def run_folders(draw: st.DrawFn) -> Case:
    """Commands that read a run, on one whose files are damaged.

    'sealed' damages a document and mends its checksum, 'extra' plants a file beside it, 'moved' makes its folder a
    link, 'twice' gives it a second name, 'key' changes one value and mends nothing.
    """
    damage = draw(
        st.lists(
            st.tuples(st.sampled_from(RUN_FILES), st.sampled_from(DAMAGES), st.integers(0, 10**6)),
            min_size=1,
            max_size=2,
        )
    )
    command = draw(
        st.sampled_from(
            [
                ["report", "{run}", "-o", "report.html"],
                ["report", "{run}", "-o", "report.html", "--include-private"],
                ["report", "{run}/release", "-o", "report.html", "--json"],
                ["audit", "{run}", "--white-box", "--count", "0"],
                ["audit", "{run}", "--contract", "--confidence", "2"],
                ["audit", "{run}", "--count", "7", "--canaries"],
                ["train", "--resume", "{run}"],
                ["benchmark", "{run}", "--limit", "1"],
                ["report", "{run}", "--show-examples", "--format", "html", "--format", "sarif", "--format", "md"],
                ["report", "{run}", "--format", "card", "-o", "card.md"],
                ["report", "{run}", "--format", "card", "-o", "{run}/release/model/README.md"],
                ["report", "{run}", "-o", "{run}/release/audit.json"],
                ["audit", "{run}", "--white-box", "--count", "7"],
                ["audit", "{run}", "--json"],
                ["sign", "{run}", "--key", "{key}"],
                ["verify", "{run}", "--key", "{key}.pub", "--json"],
                ["verify", "{run}/release", "--key", "{key}.pub"],
            ]
        )
    )
    return Case("run folder", tuple(command), damage=tuple(damage))


HANDED_FILES = (
    "base/config.json", "base/config.json", "base/tokenizer.json", "base/tokenizer.json", "base/tokenizer_config.json",
    "base/generation_config.json", "base/model.safetensors", "adapter/adapter_config.json",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "records.parquet", "coins.csv",
    "full/config.json", "full/model.safetensors", "tiles/config.json", "tiles/preprocessor_config.json",
    "tiles/tokenizer.json",
)  # fmt: skip
HANDED_DAMAGES = (*DAMAGES, "key", "key", "key", "key", "key", "names", "header")


@st.composite
def handed_over(draw: st.DrawFn) -> Case:
    """`dpaudit audit --model` on an adapter or a checkpoint, a base, records and coins, some of them bent.

    'key' changes, adds or removes a value of a JSON file, 'names' renames a tensor, 'header' bends the part of a file
    that says what it holds.
    """
    base, model = draw(st.sampled_from([("base", "adapter")] * 5 + [("base", "full"), ("tiles", "tiles")]))
    mine = [name for name in HANDED_FILES if name.split("/")[0] in (base, model, "records.parquet", "coins.csv")]
    how = st.tuples(st.sampled_from(mine), st.sampled_from(HANDED_DAMAGES), st.integers(0, 10**6))
    damage = draw(st.lists(how, min_size=1, max_size=2))
    named = {"--model": model, "--base": base, "--records": "records.parquet", "--coins": "coins.csv", "--epsilon": "1"}
    odd = draw(st.sampled_from([None] * 12 + sorted(named)))
    if odd is not None:
        named[odd] = draw(st.sampled_from(["nowhere", ".", "a/b/c", "/dev/zero", "base", "coins.csv", "x", ""]))
    arguments = ["audit", *(word for pair in named.items() for word in pair), "--device", "cpu"]
    arguments += draw(st.sampled_from([[], [], ["--json"]]))
    return Case("handed over", tuple(arguments), handed=tuple(damage))


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "bound": ("--tp", "--fn", "--fp", "--tn", "--canaries", "--guesses", "--correct", "--errors", "--sample-rate",
              "--steps", "--delta", "--confidence"),
    "plan": ("--claim-sigma", "--claim-rate", "--claim-steps", "--alternative", "--canaries", "--delta", "--alpha"),
    "audit": ("--count", "--fail-above", "--confidence", "--alpha", "--device", "--references", "--runs", "--processes",
              "--executor", "--address", "--gpus-per-trial"),
    "benchmark": ("--limit", "--batch-size", "--device", "--data", "--tasks"),
    "report": ("-o", "--title"),
    "check": ("--seed", "--time-limit"),
    "sweep": ("--preset", "--processes", "--threads", "--seeds", "--audit", "--out", "--executor", "--address",
              "--gpus-per-trial"),
    "train": ("--resume", "--out", "--config"),
}  # fmt: skip
WORDS: Mapping[str, tuple[str, ...]] = {
    "bound": ("clopper-pearson", "gdp", "bayes", "steinke", "mahloujifar", "order-statistic", "nothing"),
    "check": ("nowhere:x", "json:loads", "json", ":", "a:b:c", "math:pi", "x.py:f", "json:JSONDecoder", "os:getcwd"),
    "sweep": ("grid.yaml", "privacy.epsilon=1", "nowhere.yaml", "="),
    "audit": ("nowhere", ".", "file"), "benchmark": ("nowhere", ".", "file"), "report": ("nowhere", ".", "file"),
}  # fmt: skip
SMALL = (
    "0",
    "1",
    "-1",
    "2",
    "5",
    "50",
    "100",
    "0.5",
    "0.05",
    "1e-5",
    "0.9",
    "nan",
    "inf",
    "x",
    "",
    "1e400",
    "-0.1",
    "1.5",
)


WHOLE = (
    "bound clopper-pearson --tp 40 --fn 10 --fp 3 --tn 47", "bound gdp --tp 40 --fn 10 --fp 3 --tn 47",
    "bound bayes --tp 40 --fn 10 --fp 3 --tn 47", "bound steinke --canaries 100 --guesses 60 --correct 50",
    "bound mahloujifar --canaries 100 --guesses 60 --correct 50",
    "bound order-statistic --canaries 100 --guesses 60 --errors 5",
    "plan --claim-sigma 1 --claim-rate 0.1 --claim-steps 20 --canaries 50,100 --alternative 30%",
    "sweep grid.yaml --seeds 0-2", "sweep --preset frontier --out s", "report run -o r.html --title x",
    "check json:loads --seed 1 --time-limit 2", "train method=dual-priv privacy.epsilon=3 --seed 1",
)  # fmt: skip


@st.composite
def bent_lines(draw: st.DrawFn) -> Case:
    """A right command line with one or two words changed, doubled or left out."""
    arguments = draw(st.sampled_from(WHOLE)).split()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(1, len(arguments) - 1)) if len(arguments) > 1 else 1
        match draw(st.sampled_from(("change", "change", "change", "drop", "double"))):
            case "change":
                arguments[at : at + 1] = [draw(st.sampled_from(SMALL) | tokens)]
            case "drop":
                del arguments[at : at + 1]
            case "double":
                arguments += arguments[at : at + 2]
    if arguments[0] == "sweep":
        arguments.append("--dry-run")
    if arguments[0] == "train":
        arguments += [*NO_DATA, "--dry-run"]
    grid = _yaml({"name": "x", "settings": {"training.steps": 3}, "grid": {"privacy.epsilon": [1, 3]}, "seeds": [0]})
    arguments += draw(st.sampled_from([[], ["--json"]]))
    return Case("command line", tuple(_typed(item) for item in arguments), (("grid.yaml", draw(bent(grid))),))


@st.composite
def wild_lines(draw: st.DrawFn) -> Case:
    """Any command with flags and words of its own, of others, and of nobody."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = [command]
    for _ in range(draw(st.integers(0, 2))):
        arguments.append(draw(st.sampled_from(WORDS.get(command, ("x",))) if draw(st.integers(0, 4)) else tokens))
    own = COMMANDS[command]
    for _ in range(draw(st.integers(0, 5))):
        flag = draw(
            st.sampled_from(own) if draw(st.integers(0, 9)) else st.sampled_from(["--json", "--nothing", "-x", "--"])
        )
        arguments.append(flag)
        if draw(st.integers(0, 9)):
            arguments.append(draw(st.sampled_from(SMALL) if draw(st.integers(0, 3)) else tokens))
    grid = draw(bent(_yaml({"name": "x", "grid": nested(draw(settings_())), "seeds": draw(trees)})))
    if command == "sweep":
        arguments.append("--dry-run")
    if command == "train":
        arguments += [*NO_DATA, "--dry-run"]
    arguments += draw(st.sampled_from([[], ["--json"]]))
    return Case("command line", tuple(_typed(item) for item in arguments), (("grid.yaml", grid), ("file", b"\x00\x01")))


FAMILIES = {
    "configuration": configurations(), "score file": score_files(), "data file": data_files(),
    "run folder": run_folders(), "handed over": handed_over(),
    "command line": wild_lines() | bent_lines() | bent_lines(),
}  # fmt: skip
