"""`read_npz`: arrays of numbers and text, and nothing that is unpickled, cut off or unpacks to gigabytes."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dpaudit import untrusted_tables


def test_what_numpy_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"x": np.arange(5.0), "y": np.array([True, False]), "id": np.array(["a", "b"]), "m": np.ones((2, 3))}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        found = untrusted_tables.read_npz(path)
        assert set(found) == set(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)


def member(content: bytes, name: str = "x.npy") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def npy(array: object, **options: object) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)  # type: ignore[arg-type]
    return out.getvalue()


def header(text: str) -> bytes:
    """An array whose header is some other text."""
    content = text.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no archive",
        *(member(header(text)) for text in ("{'descr': (", "(" * 3000, "{'\xb5\xe4': ", " {\n  'a'")),
        npy(np.arange(3.0)),  # a bare .npy
        member(b""),
        member(b"text"),
        member(npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)),
        member(npy(np.zeros(3, dtype=[("a", "f8")]))),
        member(npy(np.arange(4.0))[:-8]),
        member(npy(np.arange(4.0)).replace(b"(4,)", b"(9,)")),
        member(npy(np.arange(4.0)) + b"more"),
        member(npy(np.arange(4.0)).replace(b"'<f8'", b"'<f9'")),
        member(npy(np.arange(4.0)).replace(b"{", b"[")),
        member(npy(np.arange(4.0)))[:-30],
    ],
)
def test_everything_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        untrusted_tables.read_npz(path)


def test_nothing_unpacks_to_more_than_it_may(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros(1 << 20))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match="unpacks to more"):
        untrusted_tables.read_npz(path, most=1 << 20)
