"""A data set on the hub by name, through the optional `datasets` package.

The download runs in a process of its own with every cache folder pointed into the run (`datasets` fixes its cache
folders when it is imported, so setting them here would come too late), and leaves one flat Parquet file per split,
which then passes the same checks as any local file.
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from dpaudit import online, temporary
from dpaudit.config import DataConfig
from dpaudit.errors import EnvironmentFailure, UsageError, rejected
from trainers.data import formats
from trainers.data.local import load_local
from trainers.records import Dataset

NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
TIMEOUT_SECONDS = 3600

# Keeps pictures encoded (decode=False) and drops the columns that training doesn't need.
EXPORT = """
import sys
name, subset, revision, split, columns, target = sys.argv[1:7]
import datasets
from datasets.table import embed_table_storage
datasets.disable_progress_bars()
table = datasets.load_dataset(name, subset or None, split=split, revision=revision or None)
table = table.select_columns([column for column in table.column_names if column in columns.split("|")])
plain = datasets.Image(decode=False)
for column, feature in table.features.items():
    if isinstance(feature, datasets.Image):
        table = table.cast_column(column, plain)
    elif isinstance(getattr(feature, "feature", None), datasets.Image):
        table = table.cast_column(column, type(feature)(plain))
table = table.with_format("arrow").map(embed_table_storage, batched=True, batch_size=64)  # files become bytes
table.to_parquet(target)
"""


def _environment(cache: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_DATASETS")}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME"):
        keep.pop(name, None)
    return keep | {"HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}


def export_split(
    name: str, split: str, target: Path, cache: Path, columns: list[str], subset: str | None = None
) -> None:
    """Write one split of a set as a flat Parquet file. Raises EnvironmentFailure with one line."""
    bare, _, revision = name.partition("@")
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", EXPORT, bare, subset or "", revision, split, "|".join(columns), str(target)]
    try:
        # In the cache folder, so that a folder of the same name where the user works isn't taken for the set.
        done = subprocess.run(
            command, env=_environment(cache), cwd=cache, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFailure(f"data.name {name}: no answer from the hub in {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        # The last line of a traceback, reduced to the exception's type: its text may quote rows.
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].partition(":")[0]
        raise EnvironmentFailure(
            f"data.name {name}: split {split!r} can't be loaded from the hub ({reason}); without a network, download "
            "it elsewhere and use data.path"
        )


def load_hub(config: DataConfig, cache: Path | None = None) -> Dataset:
    """The hub set `config.name` (`owner/name` or `owner/name@revision`); `data.train` and `data.test` name its splits.

    Downloads go below `cache` and nowhere else; None uses a temporary folder that is removed at the end.
    """
    name = config.name
    if name is None or not NAME.fullmatch(name):
        raise rejected("data.name", name, "'digits', owner/name or owner/name@revision")
    if config.train_images is not None or config.test_images is not None:
        raise UsageError("data.train-images and data.test-images: only for local files (data.path)")
    if not online.allowed():
        raise UsageError(f"data.name: got {name!r}, a set on the hub; --online lets this command fetch it")
    if importlib.util.find_spec("datasets") is None:
        raise EnvironmentFailure(f"data.name {name}: needs the package datasets; pip install 'dpaudit[benchmark]'")
    if config.subset is not None and not re.fullmatch(r"[\w.-]{1,80}", config.subset):
        raise rejected("data.subset", config.subset, "the name of one of the set's configurations")
    columns = [*formats.COLUMNS, *([config.unit] if config.unit else [])]
    with temporary.folder("hub") as place:
        for split, given in (("train", config.train or "train"), ("test", config.test or "test")):
            target = place / f"{split}.parquet"
            export_split(name, given, target, cache or place / "cache", columns, config.subset)
        files = {"name": None, "subset": None, "path": str(place), "train": "train.parquet", "test": "test.parquet"}
        local = config.model_copy(update=files)
        return replace(load_local(local), name=name, source="hub")
