"""Pictures of very many parts: a few bytes each that Pillow walks over in Python, or that its slow decoders unpack."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping

from PIL import Image

SIZE = 1 << 25  # bytes of each


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(middle: bytes = b"", tail: bytes = b"") -> bytes:
    """A sound PNG of 8 x 8 pixels with chunks before and behind its data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress((b"\0" + bytes(24)) * 8))
    return b"\x89PNG\r\n\x1a\n" + header + middle + data + tail + png_chunk(b"IEND")


def many(part: bytes, size: int = SIZE) -> bytes:
    return part * (size // len(part))


def _saved(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, kind)
    return buffer.getvalue()


def jpeg(middle: bytes) -> bytes:
    """A sound JPEG with these bytes behind its first marker."""
    whole = _saved("JPEG")
    return whole[:2] + middle + whole[2:]


def gif(middle: bytes) -> bytes:
    """A sound GIF with these bytes behind its colours."""
    whole = _saved("GIF", "P")
    at = 13 + (3 << ((whole[10] & 7) + 1) if whole[10] & 0x80 else 0)
    return whole[:at] + middle + whole[at:]


def tiff(strips: int = 4_000_000) -> bytes:
    """A TIFF of one row a strip."""
    place = 8 + 2 + 12 * 9 + 4
    named = ((256, 1, 8), (257, 1, strips), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, strips, place), (277, 1, 1),
             (278, 1, 1), (279, strips, place))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in named)
    return b"II*\0" + struct.pack("<IH", 8, len(named)) + entries + bytes(4) + struct.pack("<I", place) * strips


def bmp(code: bytes) -> bytes:
    """A packed BMP of 4096 x 4096 pixels whose codes do nothing."""
    head = struct.pack("<IiiHHIIiiII", 40, 4096, 4096, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", SIZE, 0, 0, 54 + 1024) + head + bytes(1024) + many(code)


PARTS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "PNG of empty texts": (lambda: png(many(png_chunk(b"tEXt"))), "chunks in a picture"),
    "PNG of unknown chunks": (lambda: png(many(png_chunk(b"abCd"))), "chunks in a picture"),
    "PNG of empty data": (lambda: png(many(png_chunk(b"IDAT"))), "chunks in a picture"),
    "PNG with a tail": (lambda: png(b"", many(png_chunk(b"tEXt", b"a\0b"))), "chunks in a picture"),
    "PNG of frames": (lambda: png(png_chunk(b"acTL", bytes(8)) + many(png_chunk(b"fdAT", bytes(4)))), "chunks in a"),
    "JPEG of segments": (lambda: jpeg(many(b"\xff\xe5\x00\x02")), "segments in a picture"),
    "JPEG of comments": (lambda: jpeg(many(b"\xff\xfe\x00\x02")), "segments in a picture"),
    "JPEG of tables": (lambda: jpeg(many(b"\xff\xc4\x00\x02")), "segments in a picture"),
    "JPEG of filling": (lambda: jpeg(many(b"\xff")), "segments in a picture"),
    "GIF of comments": (lambda: gif(many(b"!\xfe\x01a\x00")), "blocks in a picture"),
    "GIF of one comment": (lambda: gif(b"!\xfe" + many(b"\x01a") + b"\0"), "blocks in a picture"),
    "GIF of nothing": (lambda: gif(bytes(SIZE)), "blocks in a picture"),
    "PPM of one comment": (lambda: b"P6\n#" + b"a" * SIZE + b"\n8 8 255\n" + bytes(192), "header of at most 64 KB"),
    "PPM of spaces": (lambda: b"P6\n" + b" " * SIZE + b"8 8 255\n" + bytes(192), "header of at most 64 KB"),
    "PPM of comments": (lambda: b"P3\n8 8 255\n" + many(b"#\n") + b"1 " * 192, "more than 1000 comments"),
    "PPM as text": (lambda: b"P3\n4096 4096 255\n" + many(b"1 "), "slow to decode"),
    "PPM of another scale": (lambda: b"P6\n4096 4096 254\n" + bytes(3 << 24), "slow to decode"),
    "TIFF of strips": (tiff, "strips or other values"),
    "BMP of moves": (lambda: bmp(b"\0\2\0\0"), "slow to decode"),
    "BMP of runs": (lambda: bmp(b"\1\5"), "slow to decode"),
}  # fmt: skip
