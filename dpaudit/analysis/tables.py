"""Scores from any system, as a file, a data frame or arrays: checked before anything is computed from them.

A file is a CSV, a Parquet or an .npz with the columns id, member, score under these or other names. Rows are joined by
id. Parquet may hold the id in its index; arrays without ids are told apart by their places.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpaudit import untrusted_tables
from dpaudit.errors import UsageError

LEAST_OF_A_CLASS = 10  # fewer, and no bound can say anything
LARGEST = 1e300  # of a score: beyond it differences overflow
BOTH = f"at least {LEAST_OF_A_CLASS} members and as many non-members"


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

    id: str = "id"
    member: str = "member"
    score: str = "score"


USUAL = Columns()


@dataclass(frozen=True)
class ScoreTable:
    """ids: (n,) text, unique; members: (n,) booleans; scores: (n,) finite, higher = was in training."""

    ids: npt.NDArray[np.str_]
    members: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]


def read_scores(path: Path, columns: Columns = USUAL) -> ScoreTable:
    """Read and check a score file; raises UsageError with one line that names what is wrong and where."""
    return from_frame(_read(path, columns), columns, where=str(path))


def from_frame(frame: pd.DataFrame, columns: Columns = USUAL, *, where: str = "scores") -> ScoreTable:
    """The same of a data frame. `where` names it in errors."""
    if len(set(astuple(columns))) < len(astuple(columns)):
        raise UsageError(f"{where}: columns {', '.join(astuple(columns))}; accepted: three different ones")
    _check(where, frame, astuple(columns))
    scores = _numbers(where, frame[columns.score])
    usable = np.abs(scores) <= LARGEST
    if not usable.all():
        row = int(np.argmin(usable))
        accepted = f"finite numbers of at most {LARGEST:g} in size"
        raise UsageError(f"{where}: {columns.score} in row {row + 1} is {scores[row]}; accepted: {accepted}")
    ids, members = _ids(where, frame[columns.id]), _members(where, frame[columns.member])
    both_classes(members, f"{where}:", "in", "rows")
    return ScoreTable(ids.to_numpy(dtype=np.str_), members, scores)


def read_coins(path: Path, where: str) -> pd.DataFrame:
    """id (text) and member (bool) of a coin file, in its order. where: what a UsageError calls it."""
    names = (USUAL.id, USUAL.member)
    frame = _read(path, USUAL, where=where, names=names)
    _check(where, frame, names)
    return pd.DataFrame({"id": _ids(where, frame["id"]).to_numpy(), "member": _members(where, frame["member"])})


def both_classes(members: npt.NDArray[np.bool_], where: str, of: str, what: str) -> None:
    """Raise UsageError, "WHERE 3 members OF 40 WHAT", where there are too few members or non-members."""
    n_in = int(members.sum())
    for count, kind in ((n_in, "members"), (members.size - n_in, "non-members")):
        if count < LEAST_OF_A_CLASS:
            said = f"{where} {count} {kind} {of} {members.size} {what}"
            raise UsageError(f"{said}; accepted: at least {LEAST_OF_A_CLASS}")


def from_arrays(scores: object, members: object, ids: object = None, *, where: str = "scores") -> ScoreTable:
    """The same of vectors of one length: numbers, truth values (or 0 and 1), and ids where there are any."""
    vectors = {"score": vector("scores", scores), "member": vector("member", members)}
    if ids is not None:
        vectors["id"] = vector("ids", ids)
    for name, values in vectors.items():
        if values.size != vectors["score"].size:
            field = {"member": "member", "id": "ids"}[name]
            raise UsageError(f"{field}: {values.size} values for {vectors['score'].size} scores; accepted: one a score")
    frame = pd.DataFrame({"id": np.arange(vectors["score"].size), **vectors})
    return from_frame(frame, where=where)


def vector(field: str, values: object) -> npt.NDArray[Any]:
    """Anything that numpy understands (lists, arrays, tensors on the CPU), in one dimension. Raises UsageError."""
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        raise UsageError(f"{field}: some values are masked; accepted: numbers throughout")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors with a gradient or on a device
        why = " ".join(str(error).split())
        raise UsageError(f"{field}: can't be read as an array ({why:.160})") from None
    if array.ndim != 1:
        kind = type(values).__name__
        raise UsageError(f"{field}: got {kind} of shape {array.shape}; accepted: one dimension, a value a record")
    return array


def read_features(path: Path, ids: npt.NDArray[np.str_], name: str = "id") -> npt.NDArray[np.float64]:
    """Numeric features for the blind baseline, one row per id of the scores, in their order; shape (n, columns)."""
    return features_of(_read(path, Columns(id=name)), ids, name, where=str(path))


def features_of(
    frame: pd.DataFrame, ids: npt.NDArray[np.str_], name: str = "id", *, where: str = "features"
) -> npt.NDArray[np.float64]:
    """The same of a data frame."""
    if name not in frame.columns or len(frame.columns) < 2:
        raise UsageError(f"{where}: needs a column {name!r} and at least one feature{_found(frame)}")
    frame = frame.assign(**{name: frame[name].astype(str)})
    if frame[name].duplicated().any():
        raise UsageError(f"{where}: {name} {frame[name][frame[name].duplicated()].iloc[0]!r} occurs more than once")
    table = frame.set_index(name)
    missing = np.setdiff1d(ids, table.index.to_numpy(dtype=np.str_))
    if missing.size:
        raise UsageError(f"{where}: id {str(missing[0])!r} of the scores has no features ({missing.size} missing)")
    rows = table.reindex(list(ids))
    values = np.column_stack([_numbers(where, rows[column]) for column in rows.columns])
    if not np.isfinite(values).all():
        raise UsageError(f"{where}: features must be finite numbers")
    return values


def with_id(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with its index as the column `name`, where it has no such column and one index."""
    if name in frame.columns or frame.index.nlevels != 1:
        return frame
    return frame.reset_index(names=name)


def _read(
    path: Path, columns: Columns, *, where: str | None = None, names: Sequence[str] | None = None
) -> pd.DataFrame:
    where = where or str(path)
    if not path.is_file():
        raise UsageError(f"{where}: no such file")
    try:
        kind = path.suffix.lower()
        if kind in (".parquet", ".pq"):
            frame = untrusted_tables.read_parquet(path)
            if not isinstance(frame.index, pd.RangeIndex) or frame.index.name is not None:  # stored on purpose
                frame = with_id(frame, columns.id)
        elif kind == ".npz":
            frame = _from_npz(path, columns)
        else:
            frame = untrusted_tables.read_csv(path, dtype={columns.id: str}, keep_default_na=True, low_memory=False)
    except pd.errors.EmptyDataError as error:
        header = ",".join(names or astuple(columns))
        raise UsageError(f"{where}: the file is empty; accepted: a header {header} and rows") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{where}: can't be read as a table ({' '.join(str(error).split()):.200})") from error
    frame.columns = pd.Index([str(column).strip() for column in frame.columns])
    return frame


def _from_npz(path: Path, columns: Columns) -> pd.DataFrame:
    """The vectors of an .npz file as columns; places are the ids where it holds none."""
    arrays = untrusted_tables.read_npz(path)
    lengths = {array.size for array in arrays.values()}
    for name, array in arrays.items():
        if array.ndim != 1 or len(lengths) != 1:
            shapes = ", ".join(f"{key} {value.shape}" for key, value in arrays.items())
            raise ValueError(f"array {name!r} does not fit: {shapes:.120}; accepted: vectors of one length")
    frame = pd.DataFrame(arrays)
    return frame if columns.id in arrays else frame.assign(**{columns.id: np.arange(len(frame))})


def _found(frame: pd.DataFrame) -> str:
    names = [str(column) for column in frame.columns]
    if len(names) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in names[0]:
                return f" (columns look separated by {name}, must be commas)"
    shown = ", ".join(names)
    return f" (found: {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _check(where: str, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise UsageError unless the frame has each of these columns once, rows, and no gaps in them."""
    for name in names:
        count = list(frame.columns).count(name)
        if count != 1:
            what = "is missing" if count == 0 else f"occurs {count} times"
            raise UsageError(f"{where}: column {name!r} {what}{_found(frame)}; accepted: {','.join(names)}")
    if frame.empty:
        raise UsageError(f"{where}: no rows; accepted: {BOTH}")
    for name in names:
        missing = frame[name].isna().to_numpy()
        if missing.any():
            raise UsageError(f"{where}: {name} in row {int(np.argmax(missing)) + 1} is missing or NaN")


def _ids(where: str, column: "pd.Series[Any]") -> "pd.Series[str]":
    ids = column.astype(str)
    if ids.duplicated().any():
        again = ids[ids.duplicated()].iloc[0]
        raise UsageError(f"{where}: {column.name} {again!r} occurs more than once; accepted: one row per id")
    return ids


def _numbers(where: str, column: "pd.Series[Any]") -> npt.NDArray[np.float64]:
    if column.dtype.kind in "cmM":
        kind = "complex numbers" if column.dtype.kind == "c" else "times"
        raise UsageError(f"{where}: {column.name} holds {kind}; accepted: real numbers")
    try:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    except (OverflowError, ValueError):  # an integer of hundreds of digits
        raise UsageError(f"{where}: {column.name} holds a number beyond 1e308; accepted: numbers") from None
    bad = np.isnan(numbers)
    if bad.any():
        row = int(np.argmax(bad))
        raise UsageError(
            f"{where}: {column.name} in row {row + 1} is {str(column.iloc[row])[:40]!r}; accepted: a number"
        )
    return numbers


def _members(where: str, column: "pd.Series[Any]") -> npt.NDArray[np.bool_]:
    if column.dtype == np.bool_:
        return np.asarray(column, dtype=np.bool_)
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        values = column.to_numpy()
        wrong = (values != 0) & (values != 1)
        members = values == 1
    else:
        text = column.astype(str).str.strip().str.lower()
        known = text.map({"1": True, "0": False, "true": True, "false": False, "1.0": True, "0.0": False})
        wrong = known.isna().to_numpy()
        members = (known == True).to_numpy()  # noqa: E712 - of a column
    if wrong.any():
        row = int(np.argmax(wrong))
        shown = str(column.iloc[row])[:40]
        raise UsageError(f"{where}: {column.name} in row {row + 1} is {shown!r}; accepted: 0, 1, true or false")
    return np.asarray(members, dtype=np.bool_)
