"""A data set on the hub by name, through the optional `datasets` package.

The download runs in a process of its own (`datasets` fixes its cache folders when it is imported, so setting them here
would come too late) and leaves one flat Parquet file per split, which then passes the same checks as any local file.
These files stay in the user's own Hugging Face cache, in `dpaudit/`: commands that read a run need no network, and see
the very rows that were trained on; where the network may be asked, the set is fetched anew. Of a download that broke
off, the files that came whole are kept.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dpaudit import online
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
name, subset, revision, columns, *pairs = sys.argv[1:]
import datasets
from datasets.table import embed_table_storage
datasets.disable_progress_bars()
plain = datasets.Image(decode=False)
for split, target in zip(pairs[::2], pairs[1::2]):
    table = datasets.load_dataset(name, subset or None, split=split, revision=revision or None)
    table = table.select_columns([column for column in table.column_names if column in columns.split("|")])
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, plain)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, type(feature)(plain))
    table = table.with_format("arrow").map(embed_table_storage, batched=True, batch_size=64)  # files become bytes
    table.to_parquet(target)
"""


def _environment(cache: Path) -> dict[str, str]:
    from huggingface_hub import constants

    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_DATASETS")}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME"):
        keep.pop(name, None)
    own = {"HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache), "HF_TOKEN_PATH": constants.HF_TOKEN_PATH}
    return keep | own | {"HF_HUB_DISABLE_TELEMETRY": "1"}


def export(name: str, targets: Mapping[str, Path], cache: Path, columns: list[str], subset: str | None = None) -> None:
    """Write splits of a set, each as a flat Parquet file. Raises EnvironmentFailure or UsageError with one line.

    targets: split of the set -> file.
    """
    bare, _, revision = name.partition("@")
    cache.mkdir(parents=True, exist_ok=True)
    pairs = [str(item) for pair in targets.items() for item in pair]
    command = [sys.executable, "-c", EXPORT, bare, subset or "", revision, "|".join(columns), *pairs]
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
        if reason.endswith(("DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError")):
            raise UsageError(
                f"data.name {name}: the hub has no such set or revision, or it is private: hf auth login, or HF_TOKEN "
                "in the environment, with a token that may read it"
            )
        raise EnvironmentFailure(
            f"data.name {name}: {' and '.join(targets)} can't be loaded from the hub ({reason}); try again (files "
            "that came whole are kept), or download it elsewhere and use data.path"
        )


def load_hub(config: DataConfig) -> Dataset:
    """The hub set `config.name` (`owner/name` or `owner/name@revision`); `data.train` and `data.test` name its splits.

    Raises UsageError or EnvironmentFailure.
    """
    name = config.name
    if name is None or not NAME.fullmatch(name):
        raise rejected("data.name", name, "'digits', owner/name or owner/name@revision")
    if config.train_images is not None or config.test_images is not None:
        raise UsageError("data.train-images and data.test-images: only for local files (data.path)")
    if config.subset is not None and not re.fullmatch(r"[\w.-]{1,80}", config.subset):
        raise rejected("data.subset", config.subset, "the name of one of the set's configurations")
    place = _fetched(config, name) if online.allowed() else _kept(config, name)
    files = {"name": None, "subset": None, "path": str(place), "train": "train.parquet", "test": "test.parquet"}
    local = config.model_copy(update=files)
    return replace(load_local(local), name=name, source="hub")


def _splits(config: DataConfig) -> dict[str, str]:
    found = {"train": config.train or "train", "test": config.test or "test"}
    if found["train"] == found["test"]:
        raise rejected("data.test", found["test"], "another split than data.train")
    return found


def _place(config: DataConfig, name: str) -> tuple[Path, list[str]]:
    """Where the exported splits of a set lie, and the columns that they have."""
    from huggingface_hub import constants

    columns = [*formats.COLUMNS, *([config.unit] if config.unit else [])]
    asked = json.dumps([name, config.subset, _splits(config), columns])
    return Path(constants.HF_HOME).expanduser() / "dpaudit" / hashlib.sha256(asked.encode()).hexdigest()[:24], columns


def _kept(config: DataConfig, name: str) -> Path:
    """The folder of an earlier download; UsageError where there is none."""
    place, _ = _place(config, name)
    if not all((place / f"{split}.parquet").is_file() for split in _splits(config)):
        raise UsageError(
            f"data.name: got {name!r}, a set on the hub that is not in the local cache; --online lets this command "
            "fetch it"
        )
    return place


def _fetched(config: DataConfig, name: str) -> Path:
    """The folder of the set, fetched now. What `datasets` keeps on the way goes when all of it is here."""
    if importlib.util.find_spec("datasets") is None:
        raise EnvironmentFailure(f"data.name {name}: needs the package datasets; pip install 'dpaudit[benchmark]'")
    place, columns = _place(config, name)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise EnvironmentFailure(f"data.name {name}: {place} can't be made ({error.strerror})") from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline and all((place / f"{split}.parquet").is_file() for split in _splits(config)):
        return place
    made = {given: place / f"{split}.parquet.tmp" for split, given in _splits(config).items()}
    export(name, made, place / "cache", columns, config.subset)
    for file in made.values():
        os.chmod(file, 0o600)
        file.replace(file.with_suffix(""))
    shutil.rmtree(place / "cache", ignore_errors=True)
    return place
