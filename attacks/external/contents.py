"""What a record of foreign type holds, as far as one can see: fingerprints, and features for the blind baseline.

A record is anything that its trainer understands. Tensors, arrays, pictures, numbers, text, and lists, tuples, dicts,
dataclasses and plain objects of them are looked into; nothing of a record is ever called or unpickled.
"""

import dataclasses
import hashlib
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Floats = npt.NDArray[np.float64]
Leaf = tuple[str, object]  # where in the record, and an array, a number, a text, bytes, None, or the name of a type

DEEPEST = 8
CELLS = 256  # an array is averaged into so many numbers
BUCKETS = 64  # of hashed characters or token ids
MOST_COLUMNS = 4096


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Something that can't be looked into."""

    kind: str


def leaves(record: Any, path: str = "", depth: int = 0) -> Iterator[Leaf]:
    """Everything in a record that carries information, in a fixed order."""
    if isinstance(record, Tensor):
        yield path, record.detach().to("cpu").float().numpy() if record.is_floating_point() else record.cpu().numpy()
    elif isinstance(record, np.ndarray | np.generic):
        yield path, np.asarray(record) if record.dtype.kind in "biuf" else Opaque(str(record.dtype))
    elif isinstance(record, Image.Image):
        yield path, np.asarray(record.convert("RGB"))
    elif record is None or isinstance(record, bool | int | float | str | bytes):
        yield path, record
    elif depth >= DEEPEST:
        yield path, Opaque(type(record).__name__)
    else:
        yield from _inside(record, path, depth)


def _inside(record: Any, path: str, depth: int) -> Iterator[Leaf]:
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        parts = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    elif isinstance(record, Mapping | UserDict):
        parts = {str(key): record[key] for key in sorted(record, key=str)}
    elif isinstance(record, list | tuple):
        if len(record) > 16 and all(isinstance(item, int | float) for item in record):
            yield path, np.asarray(record)
            return
        yield f"{path}#", len(record)
        parts = {str(index): item for index, item in enumerate(record)}
    elif vars(record) if hasattr(record, "__dict__") else False:
        parts = dict(sorted(vars(record).items()))
    else:
        yield path, Opaque(type(record).__name__)
        return
    for name, part in parts.items():
        yield from leaves(part, f"{path}.{name}", depth + 1)


def fingerprint(record: Any) -> str:
    """SHA-256 of all that can be seen of a record: equal for equal contents."""
    digest = hashlib.sha256()
    for path, leaf in leaves(record):
        digest.update(f"{len(path)}:{path}:{type(leaf).__name__};".encode())
        if isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape};".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def visible(records: Sequence[Any]) -> bool:
    """Whether fingerprints tell these records apart at all: nothing in them is opaque."""
    return not any(isinstance(leaf, Opaque) for record in records[:50] for _, leaf in leaves(record))


def features(records: Sequence[Any]) -> Floats | None:
    """(n, columns) numbers for a classifier that sees the records alone; None where nothing in them varies.

    Arrays of one shape are averaged into at most CELLS numbers, others are summarised; text and whole numbers of any
    length are counted in hashed buckets. What only some of the records have counts as present or absent.
    """
    rows = [dict(leaves(record)) for record in records]
    paths = list(dict.fromkeys(path for row in rows for path in row))
    columns: list[Floats] = []
    for path in paths:
        column = _column([row.get(path) for row in rows])
        varying = column[:, np.ptp(column, axis=0) > 0]
        if varying.shape[1]:
            columns.append(varying)
        if sum(part.shape[1] for part in columns) > MOST_COLUMNS:
            break
    if not columns:
        return None
    return np.concatenate(columns, axis=1)[:, :MOST_COLUMNS]


def _column(values: list[object]) -> Floats:
    arrays = [np.asarray(value) for value in values if isinstance(value, np.ndarray | bool | int | float)]
    if len(arrays) == len(values) and len({array.shape for array in arrays}) == 1:
        return np.stack([_cells(array) for array in arrays])
    return np.stack([_summary(value) for value in values])


def _clean(array: npt.NDArray[Any]) -> Floats:
    """Finite float64: a record may hold NaN or infinities on purpose."""
    return np.clip(np.nan_to_num(array.astype(np.float64).reshape(-1), posinf=1e30, neginf=-1e30), -1e30, 1e30)


def _cells(array: npt.NDArray[Any]) -> Floats:
    flat = _clean(array)
    means = flat if flat.size <= CELLS else np.array([part.mean() for part in np.array_split(flat, CELLS)])
    extra = [flat.mean(), flat.std(), flat.min(), flat.max()] if flat.size > 1 else []
    return np.concatenate([means, extra])


def _summary(value: object) -> Floats:
    """BUCKETS + 5 numbers of any leaf."""
    out = np.zeros(BUCKETS + 5)
    out[0] = value is not None
    if isinstance(value, str | bytes):
        codes = np.frombuffer(value.encode() if isinstance(value, str) else value, dtype=np.uint8).astype(np.int64)
        pairs = (codes[:-1] * 31 + codes[1:]) % BUCKETS
        np.add.at(out, 5 + pairs, 1.0)
        out[1] = codes.size
    elif isinstance(value, np.ndarray | bool | int | float):
        flat = _clean(np.asarray(value))
        if flat.size:
            out[1:5] = [flat.size, flat.mean(), flat.std(), flat.max()]
        if np.asarray(value).dtype.kind in "iu":
            np.add.at(out, 5 + (flat.astype(np.int64) % BUCKETS), 1.0)
    return out
