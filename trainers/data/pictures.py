"""Encoded pictures of untrusted files as pixels, and what tells two of them apart.

A picture is what its file holds: EXIF orientation is applied, a palette and its transparency are resolved, an alpha
channel is composited onto a stated background. What would need guessing is refused with one line: more than 8 bits a
channel, several frames or pages (unless `Look.frames` says which to use), formats without a safe decoder.

Two files are the same picture where their pixels are equal *and decoding lost nothing*. Where something was lost (an
alpha channel, further frames, CMYK inks), identity is that of the content before the loss: thirty signatures in black
ink on a transparent ground differ in nothing but alpha.
"""

import contextlib
import hashlib
import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from trainers.data import parts
from trainers.records import Pixels

# A picture larger than this is a mistake or a decompression bomb: it would take 50 MB once decoded.
MAX_PIXELS = 1 << 24
MAX_FRAMES = 16
# A progressive JPEG is decoded once for each of its scans, and a scan of 33 bytes may touch every pixel. Encoders make
# up to a dozen of them; a file of a megabyte could hold thirty thousand.
MAX_SCANS, USUAL_SCANS = 64, 12
# Decoders for other formats (EPS runs a program, for one) are never started on untrusted bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Turning these into RGB would cut them off at 255 (a 12-bit scan becomes white) and NaN into black, without a word.
DEEP = {"F": "floating-point", "I": "32-bit", "I;16": "16-bit", "I;16L": "16-bit", "I;16B": "16-bit", "I;16N": "16-bit"}
PLAIN = ("1", "L", "P", "RGB", "RGBX")
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
INKS = ("CMYK", "YCbCr")
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)  # not a stuffed 0xFF00, a restart or filling
_ALONE = (0x01, 0xD8, 0xD9)  # markers without a length
# How files of other formats begin, to name what they are.
FOREIGN = (
    (4, b"ftypavi", "AVIF"), (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"), (4, b"ftyp", "MP4 (a video)"), (0, b"%PDF", "PDF"), (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "XML or SVG"), (0, b"8BPS", "Photoshop"), (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"), (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x01\x00", "ICO"), (0, b"\x1f\x8b", "gzip"), (0, b"PK\x03\x04", "ZIP"), (128, b"DICM", "DICOM"),
    (0, b"version https://git-lfs", "Git LFS pointer (fetch the file itself with git lfs pull)"),
    (0, b"<!DOCTYPE", "HTML (a failed download?)"), (0, b"<html", "HTML (a failed download?)"),
)  # fmt: skip
NAMED = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
Colour = tuple[int, int, int]
Frames = Literal["refuse", "first", "all"]
Count = Callable[[int, int], str | None]


@dataclass(frozen=True)
class Look:
    """How to look at what is no plain RGB picture. background: the colour behind transparency, RGB of 0..255."""

    background: Colour = NAMED["white"]
    frames: Frames = "refuse"


PLAINLY = Look()


@dataclass(frozen=True)
class Decoded:
    """A picture. frames: uint8 (height, width, 3) each, one unless all frames were asked for. content: its identity.

    composited: an alpha channel was laid over the background. blank: nothing but one colour was left by that.
    partial: frames or pages were left out.
    """

    frames: tuple[Pixels, ...]
    content: str
    composited: bool = False
    blank: bool = False
    partial: bool = False


class Refused(Exception):
    """A picture that is not taken; the text says why, without a value of the row."""


def colour(text: str) -> Colour:
    """'white', 'black', 'grey' or '#rrggbb' as RGB; ValueError otherwise."""
    if text in NAMED:
        return NAMED[text]
    if len(text) == 7 and text[0] == "#":
        red, green, blue = bytes.fromhex(text[1:])
        return red, green, blue
    raise ValueError("must be white, black, grey or #rrggbb")


def content_sha256(pixels: Pixels) -> str:
    """Hash of plain pixels: equal for the same pixels in any file format."""
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _whole_alone() -> Iterator[None]:
    """A picture that is cut off stays an error, also where a library (lmms-eval) lets Pillow fill it up with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(data: bytes, look: Look = PLAINLY, count: Count | None = None) -> Decoded:
    """Encoded picture -> pixels, upright, RGB; the size is checked before anything is decoded. Raises Refused.

    count: told of the bytes before and after decoding, before a frame is decoded; its answer is why not, or None.
    """
    many = parts.too_many(data)
    if many is not None:
        raise Refused(many)
    try:
        with _whole_alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return _decode(picture, data, look, count)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"more than {MAX_PIXELS} pixels") from None
    except (
        OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError,
        struct.error, MemoryError, RuntimeError, NotImplementedError,
    ) as error:  # fmt: skip
        raise Refused(_unreadable(data, error)) from None


def _unreadable(data: bytes, error: Exception) -> str:
    for at, magic, name in FOREIGN:
        if data[at : at + len(magic)].lower() == magic.lower():
            return f"not a readable picture: {name}; convert it to PNG (accepted: {', '.join(FORMATS)})"
    if not isinstance(error, UnidentifiedImageError) and "truncated" in str(error).lower():
        return "not a readable picture: it is cut off; copy the file again"
    return f"not a readable picture; accepted formats: {', '.join(FORMATS)}"


def _decode(picture: Image.Image, data: bytes, look: Look, count: Count | None) -> Decoded:
    width, height = picture.size
    if width * height == 0:
        raise Refused(f"{width}x{height} pixels; at least 1x1 is needed")
    if width * height > MAX_PIXELS:
        raise Refused(f"{width}x{height} pixels; at most {MAX_PIXELS} are accepted")
    _check_decoder(picture, data)
    _counted(count, len(data), picture, passes(data) if picture.format in ("JPEG", "MPO") else 1)
    _check_depth(picture, data)
    _scale_key(picture, data)
    # A phone's MPO is one photograph with a thumbnail or depth map behind it: every viewer shows the first alone.
    several = bool(getattr(picture, "is_animated", False)) and picture.format != "MPO"
    kind = "pages" if picture.format == "TIFF" else "frames"
    if several and look.frames == "refuse":
        accepted = "one picture, or data.frames=first (the first alone) or data.frames=all (all, in order)"
        raise Refused(f"{getattr(picture, 'n_frames', 2)} {kind}; accepted: {accepted}")
    upright = [_upright(part) for part in _parts(picture, look, several, kind, count)]
    shown = [_composite(part, look.background) for part in upright]
    partial = several and look.frames == "first"
    composited = any(has_alpha for _, has_alpha in shown)
    pixels = tuple(item for item, _ in shown)
    if partial or picture.format == "MPO":
        content = f"file:{hashlib.sha256(data).hexdigest()}"
    elif len(upright) > 1:
        content = "frames:" + hashlib.sha256("|".join(map(_identity, upright)).encode()).hexdigest()
    else:
        content = _identity(upright[0])
    blank = composited and all(bool((item == item[0, 0]).all()) for item in pixels)
    return Decoded(pixels, content, composited, blank, partial)


def _check_decoder(picture: Image.Image, data: bytes) -> None:
    """Refuse large pictures that Pillow decodes in Python: text, packed BMPs, unusual scales of grey."""
    slow = any(tile[0] in Image.DECODERS for tile in getattr(picture, "tile", []))
    pixels = picture.size[0] * picture.size[1]
    if slow and (len(data) > parts.MOST_SLOW_BYTES or pixels > parts.MOST_SLOW_PIXELS):
        what = f"{picture.format} in a form that is slow to decode"
        raise Refused(f"{what}: above {parts.MOST_SLOW_PIXELS} pixels save it as PNG")


def _counted(count: Count | None, packed: int, picture: Image.Image, times: int = 1) -> None:
    too_much = None if count is None else count(packed, 3 * picture.size[0] * picture.size[1] * times)
    if too_much is not None:
        raise Refused(too_much)


def passes(data: bytes) -> int:
    """How often a JPEG is decoded, a usual one counting as once. Raises Refused for one of more than MAX_SCANS scans.

    Marker by marker: an application's segment (a thumbnail) is no scan, and within a scan 0xFF is never followed by
    another marker's second byte.
    """
    scans, at = 0, 2
    while found := _MARKER.search(data, at):
        kind, at = data[found.end() - 1], found.end()
        if kind == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise Refused(f"a JPEG of more than {MAX_SCANS} scans; save it again, or as PNG")
        if kind not in _ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return max(1, -(-scans // USUAL_SCANS))


def _parts(picture: Image.Image, look: Look, several: bool, kind: str, count: Count | None) -> Iterator[Image.Image]:
    if not several or look.frames == "first":
        yield picture
        return
    total = int(getattr(picture, "n_frames", 1))
    if total > MAX_FRAMES:
        raise Refused(f"{total} {kind}; data.frames=all takes at most {MAX_FRAMES}")
    size = picture.size
    for index in range(total):
        picture.seek(index)
        if picture.size[0] * picture.size[1] > MAX_PIXELS:
            raise Refused(f"{kind[:-1]} {index + 1}: at most {MAX_PIXELS} pixels are accepted")
        if picture.size != size and kind == "frames":
            raise Refused(f"frame {index + 1} has another size than the first")
        if index:  # the first is counted already
            _counted(count, 0, picture)
        _check_depth(picture, b"")
        yield picture.copy()


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error, OSError):
        picture.load()  # a damaged picture is refused as that; damaged EXIF data alone say nothing of how it stands
        turned = picture
    if turned.mode in DEEP:
        raise Refused(f"{DEEP[turned.mode]} pixels; accepted: 8 bits a channel")
    if turned.mode not in (*PLAIN, *ALPHA, *INKS):
        raise Refused(
            f"colours of mode {turned.mode}; accepted: grey, RGB, palette, YCbCr, CMYK, with or without alpha"
        )
    return turned


def _check_depth(picture: Image.Image, data: bytes) -> None:
    """Refuse more than 8 bits a channel, also where Pillow would cut them off without a word (RGB of 16 bits)."""
    if picture.mode in DEEP:
        raise Refused(f"{DEEP[picture.mode]} pixels; accepted: 8 bits a channel")
    bits = 8
    if picture.format == "PNG" and len(data) > 24:
        bits = data[24]
    elif picture.format == "TIFF":
        said: Any = getattr(picture, "tag_v2", {}).get(258, (8,))
        bits = max(said) if isinstance(said, tuple) else int(said)
    elif picture.format == "PPM":
        arguments = [tile[3] for tile in getattr(picture, "tile", [])]
        most = max(
            (a[1] for a in arguments if isinstance(a, tuple) and len(a) > 1 and isinstance(a[1], int)), default=0
        )
        bits = 16 if most > 255 else 8
    if bits > 8:
        raise Refused(f"{bits}-bit pixels; accepted: 8 bits a channel (which of the {bits} matter is yours to choose)")


def _scale_key(picture: Image.Image, data: bytes) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow scales the pixels; it leaves the key as it is."""
    key = picture.info.get("transparency")
    if picture.format == "PNG" and picture.mode == "L" and len(data) > 24 and data[24] in (2, 4):
        levels = (1 << data[24]) - 1
        if isinstance(key, int) and key <= levels:
            picture.info["transparency"] = key * 255 // levels


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ALPHA or picture.info.get("transparency") is not None


def _composite(picture: Image.Image, background: Colour) -> tuple[Pixels, bool]:
    """(pixels, whether anything was transparent)."""
    if not _has_alpha(picture):
        return np.asarray(picture.convert("RGB"), dtype=np.uint8), False
    own = _rgba(picture)
    alpha = own[..., 3:].astype(np.uint32)
    if bool((alpha == 255).all()):
        return np.ascontiguousarray(own[..., :3]), False
    behind = np.asarray(background, dtype=np.uint32)
    mixed = (own[..., :3].astype(np.uint32) * alpha + behind * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8), True


def _rgba(picture: Image.Image) -> Pixels:
    if picture.mode == "La":
        picture = picture.convert("LA")
    return np.asarray(picture.convert("RGBA"), dtype=np.uint8)


def _identity(picture: Image.Image) -> str:
    """Equal for equal content: of RGB pixels where that is all there is, of everything that RGB does not hold else."""
    if picture.mode in INKS:
        return f"{picture.mode}:{content_sha256(np.asarray(picture, dtype=np.uint8))}"
    if _has_alpha(picture):
        own = _rgba(picture)
        if bool((own[..., 3] != 255).any()):
            return f"RGBA:{content_sha256(own)}"
        return content_sha256(np.ascontiguousarray(own[..., :3]))
    return content_sha256(np.asarray(picture.convert("RGB"), dtype=np.uint8))
