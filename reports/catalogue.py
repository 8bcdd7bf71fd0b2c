"""Tasks by name: a run's own questions, lmms-eval's tasks, local sets; and where the data of each is.

lmms-eval's tasks name sets on the hub. With `--data TASK=PATH` the same task, with its own prompt and metric code,
reads a local copy in the hub set's columns. Nothing here imports lmms-eval.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpaudit.errors import EnvironmentFailure, UsageError, rejected
from reports import copies

OWN_TASKS = Path(__file__).parent / "tasks"
HELD_OUT = "dpaudit_vqa"
LOCAL_SETS = ("dpaudit_open_closed", "dpaudit_pathvqa", "dpaudit_vqa_rad", "dpaudit_yes_no")
VQA_COLUMNS = ("image", "question", "answers", "question_id")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}(@[A-Za-z0-9_.-]{1,40})?")


@dataclass(frozen=True)
class BuiltIn:
    """A task of lmms-eval: its folder there, its set on the hub, its split, and the columns that its code reads."""

    folder: str
    hub: str
    split: str
    columns: tuple[str, ...]
    members: tuple[str, ...] = ()  # of a group


BUILT_IN: Mapping[str, BuiltIn] = {
    "scienceqa_img": BuiltIn(
        "scienceqa", "lmms-lab-encoder/ScienceQA", "test", ("image", "question", "choices", "answer", "hint")
    ),
    "textvqa_val": BuiltIn("textvqa", "lmms-lab-encoder/textvqa", "validation", VQA_COLUMNS),
    "gqa": BuiltIn("gqa", "lmms-lab-encoder/GQA", "testdev", ("image", "question", "answer")),
    "vizwiz_vqa_val": BuiltIn("vizwiz_vqa", "lmms-lab-encoder/VizWiz-VQA", "val", VQA_COLUMNS),
    "ok_vqa_val2014": BuiltIn("ok_vqa", "lmms-lab-encoder/OK-VQA", "val2014", VQA_COLUMNS),
    "vqav2_val": BuiltIn("vqav2", "lmms-lab-encoder/VQAv2", "validation", VQA_COLUMNS),
    "pope": BuiltIn("pope", "lmms-lab-encoder/POPE", "test", ("image", "question", "answer", "question_id")),
    "slake": BuiltIn(
        "slake",
        "BoKelvin/SLAKE",
        "test",
        ("image", "question", "answer", "answer_type", "q_lang"),
        ("slake_en", "slake_zh"),
    ),
}
LANGUAGES = {"slake_en": "en", "slake_zh": "zh"}


@dataclass(frozen=True)
class TaskSpec:
    """One task for the worker. name: in documents; task: in lmms-eval; override: entries of its configuration.

    image_column_of: a Parquet file whose `image` column must be declared a picture, because the file does not say so.
    """

    name: str
    task: str
    folder: str | None  # of its YAML; None: any of lmms-eval's
    data: str
    own: bool
    override: dict[str, Any] = field(default_factory=dict)
    image_column_of: str | None = None
    limit: int | None = None


def parse_data(values: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` pairs; UsageError for anything else."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise rejected("--data", value, "TASK=PATH")
        if name in found:
            raise rejected("--data", value, f"one PATH for each task; {name} is given twice")
        found[name] = Path(path).expanduser()
        if not found[name].exists():
            raise UsageError(f"--data {name}: no file or folder {path!r}")
    return found


def choose(tasks: Sequence[str], data: Mapping[str, Path]) -> tuple[str, ...]:
    """The tasks to measure, in order: those named, else those with data, else the held-out questions."""
    names = tuple(dict.fromkeys(tasks)) or tuple(data) or (HELD_OUT,)
    for name in names:
        if not _NAME.fullmatch(name):
            raise rejected("--tasks", name, accepted())
        if base(name) in LOCAL_SETS and name not in data:
            raise UsageError(f"--tasks {name}: scores a local set; give it with --data {name}=PATH")
    for name in data:
        if name not in names:
            raise rejected("--data", name, "a task that --tasks names")
        if name == HELD_OUT:
            raise rejected("--data", name, "another task; this one asks the run's own test questions")
    return names


def base(name: str) -> str:
    """The rules of a local set's name: `dpaudit_yes_no@wards` are the rules `dpaudit_yes_no` for a set `wards`."""
    rules, _, label = name.partition("@")
    return rules if label and rules in LOCAL_SETS else name


def accepted() -> str:
    """What `--tasks` takes, in words."""
    own = ", ".join((HELD_OUT, *LOCAL_SETS))
    return f"{own}; {', '.join(BUILT_IN)}; or another task of lmms-eval with one picture a question"


def specify(
    names: Sequence[str], data: Mapping[str, Path], *, online: bool, limit: int | None, workplace: Path
) -> list[TaskSpec]:
    """The tasks for the worker, apart from the held-out questions; local copies are checked, and joined where needed.

    Raises UsageError for a bad copy, EnvironmentFailure where data would have to come from the hub and `online` is
    false.
    """
    found: list[TaskSpec] = []
    for name in names:
        if name == HELD_OUT:
            continue
        if base(name) in LOCAL_SETS:
            target = workplace / f"{len(found)}.parquet"
            copies.export_set(name, data[name], target, closed=base(name) == "dpaudit_yes_no")
            override = {"dataset_kwargs": {"data_files": {"test": str(target)}}}
            found.append(
                TaskSpec(name, base(name), str(OWN_TASKS), "local set", own=True, override=override, limit=limit)
            )
        elif name in data:
            found += _local(name, data[name], limit, workplace / f"{len(found)}")
        else:
            found += _hub(name, limit, online)
    return found


def _folder(entry: BuiltIn | None) -> str | None:
    package = find_spec("lmms_eval")
    if entry is None or package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "tasks" / entry.folder)


def _entry(name: str) -> BuiltIn | None:
    group = next((entry for entry in BUILT_IN.values() if name in entry.members), None)
    return BUILT_IN.get(name, group)


def _hub(name: str, limit: int | None, online: bool) -> list[TaskSpec]:
    entry = _entry(name)
    where = f" ({entry.hub})" if entry is not None else ""
    if not online:
        raise EnvironmentFailure(
            f"--tasks {name}: its data is on the Hugging Face hub{where}; give --online to fetch it, or a local copy "
            f"with --data {name}=PATH"
        )
    members = entry.members if entry is not None and entry.members and name not in entry.members else (name,)
    return [TaskSpec(m, m, _folder(entry), f"hub{where}", own=False, limit=limit) for m in members]


def _local(name: str, path: Path, limit: int | None, workplace: Path) -> list[TaskSpec]:
    entry = _entry(name)
    split = entry.split if entry is not None else None
    columns = entry.columns if entry is not None else ("image",)
    copy = copies.find(name, path, split, columns, workplace)
    override: dict[str, Any] = {"dataset_name": None}
    if copy.disk is not None:
        override |= {"dataset_path": str(copy.disk), "dataset_kwargs": {"load_from_disk": True}}
    else:
        files = {split or "*": [str(file) for file in copy.files]}  # the worker knows an unlisted task's split
        override |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": files}}
    if name == "gqa":
        override["process_docs"] = None  # fetches the pictures from the hub, whatever the data is; here they are
    members: Sequence[str] = (name,)
    if entry is not None and entry.members:
        asked = entry.members if name not in entry.members else (name,)
        spoken = copies.values(copy, "q_lang") if copy.disk is None else set(LANGUAGES.values())
        members = [member for member in asked if LANGUAGES[member] in spoken]
        if not members:
            raise rejected(f"--data {name}", path.name, "a set whose column q_lang holds en or zh")
    declared = str(copy.files[0]) if copy.undeclared else None
    return [
        TaskSpec(
            member,
            member,
            _folder(entry),
            "local copy",
            own=False,
            override=override,
            image_column_of=declared,
            limit=limit,
        )
        for member in members
    ]
