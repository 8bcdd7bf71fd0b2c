"""Score files from any system: `id,member,score` as CSV or Parquet, checked before anything is computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpaudit import untrusted
from dpaudit.errors import UsageError

COLUMNS = ("id", "member", "score")
LEAST_OF_A_CLASS = 10  # fewer, and no bound can say anything


@dataclass(frozen=True)
class ScoreTable:
    """ids: (n,) text, unique; members: (n,) booleans; scores: (n,) finite, higher = was in training."""

    ids: npt.NDArray[np.str_]
    members: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]


def read_scores(path: Path) -> ScoreTable:
    """Read and check a score file; raises UsageError with one line that names what is wrong and where."""
    frame = _checked(str(path), _read(path), COLUMNS)
    scores = _numbers(path, frame["score"])
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores)))
        raise UsageError(f"{path}: score in row {row + 1} is {scores[row]}; accepted: finite numbers")
    ids, members = _ids(str(path), frame), _members(str(path), frame["member"])
    both_classes(members, f"{path}:", "in", "rows")
    return ScoreTable(ids.to_numpy(dtype=np.str_), members, scores)


def read_coins(path: Path, label: str) -> pd.DataFrame:
    """id (text) and member (bool) of a coin file, in its order. label: what a UsageError calls it."""
    frame = _checked(label, _read(path, label, COLUMNS[:2]), COLUMNS[:2])
    return pd.DataFrame({"id": _ids(label, frame).to_numpy(), "member": _members(label, frame["member"])})


def both_classes(members: npt.NDArray[np.bool_], label: str, of: str, what: str) -> None:
    """Raise UsageError, "LABEL 3 members OF 40 WHAT", where there are too few members or non-members."""
    n_in = int(members.sum())
    for count, kind in ((n_in, "members"), (members.size - n_in, "non-members")):
        if count < LEAST_OF_A_CLASS:
            raise UsageError(
                f"{label} {count} {kind} {of} {members.size} {what}; accepted: at least {LEAST_OF_A_CLASS}"
            )


def read_features(path: Path, ids: npt.NDArray[np.str_]) -> npt.NDArray[np.float64]:
    """Numeric features for the blind baseline, one row per id of the scores, in their order; shape (n, columns)."""
    frame = _read(path)
    if "id" not in frame.columns or len(frame.columns) < 2:
        raise UsageError(f"{path}: needs a column 'id' and at least one feature{_found(frame)}")
    frame = frame.assign(id=frame["id"].astype(str))
    if frame["id"].duplicated().any():
        raise UsageError(f"{path}: id {frame['id'][frame['id'].duplicated()].iloc[0]!r} occurs more than once")
    table = frame.set_index("id")
    missing = np.setdiff1d(ids, table.index.to_numpy(dtype=np.str_))
    if missing.size:
        raise UsageError(f"{path}: id {missing[0]!r} of the scores has no features ({missing.size} missing)")
    rows = table.reindex(list(ids))
    columns = [_numbers(path, rows[name]) for name in rows.columns]
    values = np.column_stack(columns)
    if not np.isfinite(values).all():
        raise UsageError(f"{path}: features must be finite numbers")
    return values


def _read(path: Path, label: str | None = None, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    label = label or str(path)
    if not path.is_file():
        raise UsageError(f"{label}: no such file")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = untrusted.read_parquet(path)
        else:
            frame = untrusted.read_csv(path, dtype={"id": str}, keep_default_na=True, low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise UsageError(f"{label}: the file is empty; accepted: a header {','.join(columns)} and rows") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{label}: can't be read as a table ({' '.join(str(error).split()):.200})") from error
    frame.columns = [str(column).strip() for column in frame.columns]
    return frame


def _found(frame: pd.DataFrame) -> str:
    names = [str(column) for column in frame.columns]
    if len(names) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in names[0]:
                return f" (columns look separated by {name}, must be commas)"
    shown = ", ".join(names)
    return f" (found: {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _checked(label: str, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table, if it has these columns and no gaps in them."""
    for name in columns:
        if name not in frame.columns:
            raise UsageError(f"{label}: column {name!r} is missing{_found(frame)}; accepted: {','.join(columns)}")
    if frame.empty:
        raise UsageError(f"{label}: no rows; accepted: at least {LEAST_OF_A_CLASS} members and as many non-members")
    for name in columns:
        missing = frame[name].isna().to_numpy()
        if missing.any():
            raise UsageError(f"{label}: {name} in row {int(np.argmax(missing)) + 1} is missing or NaN")
    return frame


def _ids(label: str, frame: pd.DataFrame) -> "pd.Series[str]":
    ids = frame["id"].astype(str)
    if ids.duplicated().any():
        first = ids[ids.duplicated()].iloc[0]
        raise UsageError(f"{label}: id {first!r} occurs more than once; accepted: one row per id")
    return ids


def _numbers(path: Path, column: "pd.Series[Any]") -> npt.NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.isnan(numbers)
    if bad.any():
        row = int(np.argmax(bad))
        raise UsageError(
            f"{path}: {column.name} in row {row + 1} is {str(column.iloc[row])[:40]!r}; accepted: a number"
        )
    return numbers


def _members(label: str, column: "pd.Series[Any]") -> npt.NDArray[np.bool_]:
    if column.dtype == np.bool_:
        return np.asarray(column, dtype=np.bool_)
    text = column.astype(str).str.strip().str.lower()
    values = text.map({"1": 1, "0": 0, "true": 1, "false": 0, "1.0": 1, "0.0": 0})
    if values.isna().any():
        row = int(np.argmax(values.isna().to_numpy()))
        shown = str(column.iloc[row])[:40]
        raise UsageError(f"{label}: member in row {row + 1} is {shown!r}; accepted: 0, 1, true or false")
    return np.asarray(values, dtype=np.bool_)
