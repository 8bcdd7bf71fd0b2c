"""Picture files of very many parts: refused before Pillow, which walks over them in Python, sees the first.

A megabyte holds ninety thousand empty chunks of a PNG. So parts are counted here, up to what encoders make: PNGs have
chunks of kilobytes, GIFs blocks of 255 bytes, JPEGs a few dozen segments, and a header of a PPM is a line.
"""

import re
import struct
from collections.abc import Iterator

FREE = 1000  # parts that any picture may have
CHUNK, BLOCK = 1 << 10, 1 << 6  # bytes a part, above that: half of what the least of usual encoders writes, or less
MOST_HEADER = 1 << 16  # bytes of a PPM's header, and of filling between the segments of a JPEG's
MOST_SLOW_BYTES, MOST_SLOW_PIXELS = 1 << 22, 1 << 20  # for Pillow's decoders in Python: about a second
MAX_PAGES = 1000  # of a TIFF; Pillow takes a time that grows with their square to count them
MOST_VALUES = 1 << 17  # of its numbers in one entry of a page: one a row and strip
MOST_ENTRIES = 1 << 16  # of all its pages
_BYTES = (1, 2, 7)  # kinds of entries that Pillow keeps as they are
_COMMENT = rb"#[^\r\n]*+[\r\n]"
_TOKEN = rb"(?:\s|" + _COMMENT + rb")*+[^\s#](?:[^\s#]|" + _COMMENT + rb")*+(?=\s)"
_SEGMENT = re.compile(rb"\xff[\x01-\xfe]")


def too_many(data: bytes) -> str | None:
    """Why Pillow should not open these bytes; None where nothing speaks against it."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _beyond(_chunks(data), len(data) // CHUNK, "chunks")
    if data.startswith(b"\xff\xd8"):
        return _beyond(_segments(data), len(data) // CHUNK, "segments")
    if data[:4] == b"GIF8":
        return _beyond(_blocks(data), len(data) // BLOCK, "blocks")
    if data[:2] in (b"II", b"MM"):
        # A file that says it is a BigTIFF is followed as either kind: which it is depends on who reads it.
        return _pages(data, "H", "HHL", 12, "L", 4) or (
            _pages(data, "Q", "HHQ", 20, "Q", 8) if 43 in data[2:4] else None
        )
    if re.match(rb"P[1-6fy0]", data):
        tokens = 2 if data[1:2] in b"14" else 3
        if re.match(rb"P\w{1,5}\s(?:" + _TOKEN + rb"){%d}" % tokens, data[:MOST_HEADER]) is None:
            return f"a PPM without a header of at most {MOST_HEADER >> 10} KB"
        if data[1:2] in b"123" and data.count(b"#") > FREE:
            return f"more than {FREE} comments"
    return None


def _beyond(parts: Iterator[int], more: int, name: str) -> str | None:
    most = FREE + more
    count = 0
    for number in parts:
        count += number
        if count > most:
            return f"more than {most} {name} in a picture of this size; save it again"
    return None


def _chunks(data: bytes) -> Iterator[int]:
    at = 8
    while at + 8 <= len(data):
        yield 1
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _segments(data: bytes) -> Iterator[int]:
    """One for each segment up to the first scan, and the share that filling between them takes."""
    at = 2
    while (found := _SEGMENT.search(data, at)) and data[found.end() - 1] != 0xDA:
        yield 1 + (found.start() - at) * FREE // MOST_HEADER
        at = found.end()
        if data[at - 1] not in (0x01, *range(0xD0, 0xDA)):
            at += max(2, int.from_bytes(data[at : at + 2], "big"))


def _blocks(data: bytes) -> Iterator[int]:
    """One for each block of blocks, and for each byte between them."""
    at = 13 + _colours(data[10] if len(data) > 10 else 0)
    while at < len(data) and data[at] != 0x3B:
        yield 1
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C:
            at += 11 + _colours(data[at + 9] if at + 9 < len(data) else 0)
        else:
            at += 1
            continue
        while at < len(data) and data[at]:
            yield 1
            at += 1 + data[at]
        at += 1


def _colours(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _pages(data: bytes, number: str, entry: str, size: int, pointer: str, first: int) -> str | None:
    """Why not, of a TIFF whose directories are many, name one another in a circle, or hold very many values.

    number, entry, pointer: types of a directory's number of entries, of an entry's beginning (tag, kind, values) and of
    a place in the file. size: bytes of an entry. first: place of the first pointer.
    """
    order = "<" if data[:2] == b"II" else ">"
    head, reach = struct.calcsize(order + number), struct.calcsize(order + pointer)
    if len(data) < first + reach:
        return None
    place: int = struct.unpack_from(order + pointer, data, first)[0]
    entries = 0
    for _ in range(MAX_PAGES):
        if not 0 < place <= len(data) - head:
            return None  # the last, or damaged: Pillow's to say
        count = int(struct.unpack_from(order + number, data, place)[0])
        place += head
        entries += count
        if entries > MOST_ENTRIES:
            return f"a TIFF of more than {MOST_ENTRIES} entries"
        for at in range(place, min(place + size * count, len(data) - size + 1), size):
            _, kind, values = struct.unpack_from(order + entry, data, at)
            if values > MOST_VALUES and kind not in _BYTES:
                return f"a TIFF with more than {MOST_VALUES} strips or other values in an entry"
        place += size * count
        if place > len(data) - reach:
            return None
        place = struct.unpack_from(order + pointer, data, place)[0]
    return f"more than {MAX_PAGES} pages" if place > 0 else None
