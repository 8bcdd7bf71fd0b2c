"""trainers.data.pictures and near: each odd picture has the right pixels, or one line."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainers.data import near
from trainers.data.pictures import Look, Refused, decode

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
PLAIN = Image.fromarray(PIXELS)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rotated(angle: int) -> Image.Image:
    return PLAIN.rotate(angle)


def signature(seed: int) -> Image.Image:
    """Black ink on a transparent ground: nothing differs but alpha."""
    pixels = np.zeros((24, 24, 4), np.uint8)
    places = np.random.default_rng(seed).integers(0, 24, (2, 40))
    pixels[places[0], places[1], 3] = 255
    return Image.fromarray(pixels)


def test_alpha_is_composited_by_the_formula_and_tells_pictures_apart() -> None:
    own = np.dstack([PIXELS, RNG.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)])
    for colour in ((255, 255, 255), (0, 0, 0), (10, 200, 30)):
        found = decode(encoded(Image.fromarray(own)), Look(background=colour))
        share = own[..., 3:].astype(float) / 255
        expected = own[..., :3] * share + np.array(colour) * (1 - share)
        assert np.abs(found.frames[0] - expected).max() <= 0.5 + 1e-9
        assert found.composited
    signatures = [decode(encoded(signature(seed))) for seed in range(30)]
    assert len({item.content for item in signatures}) == 30
    assert not any(item.blank for item in signatures)
    black = [decode(encoded(signature(seed)), Look(background=(0, 0, 0))) for seed in range(3)]
    assert all(item.blank for item in black)
    assert len({item.content for item in black}) == 3  # what the file holds differs, whatever can be seen of it


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF"])
def test_an_alpha_channel_without_transparency_changes_nothing(kind: str) -> None:
    full = Image.fromarray(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert decode(encoded(full, kind, **options)).content == decode(encoded(PLAIN)).content


def test_palettes_and_colour_keys_with_transparency() -> None:
    palette = PLAIN.quantize(8)
    shown = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    for options, share in (({"transparency": 0}, {0: 0}), ({"transparency": bytes([0, 128])}, {0: 0, 1: 128})):
        alpha = np.full(index.shape, 255)
        for place, value in share.items():
            alpha[index == place] = value
        expected = shown * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
        assert np.abs(decode(encoded(palette, **options)).frames[0] - expected).max() <= 0.5 + 1e-9
    key = tuple(int(value) for value in PIXELS[3, 4])
    found = decode(encoded(PLAIN, transparency=key)).frames[0]
    assert found[3, 4].tolist() == [255, 255, 255]
    assert (found != PIXELS).any(axis=2).sum() == 1


def test_exif_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(PLAIN, exif=exif)).frames[0]
    assert np.array_equal(turned, np.rot90(PIXELS, -1))
    damaged = encoded(PLAIN, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01\x02")
    assert decode(damaged).frames[0].shape == PIXELS.shape


def test_cmyk_has_its_colours_and_its_own_identity() -> None:
    inks = PLAIN.convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        found = decode(encoded(inks, kind, **options))
        assert np.abs(found.frames[0].astype(int) - PIXELS).mean() < 4
    black = [Image.fromarray(np.full((4, 4, 4), ink, np.uint8), "CMYK") for ink in (255, 254)]
    assert len({decode(encoded(item, "TIFF")).content for item in black}) == 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused_or_used_by_choice(kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    files = [encoded(PLAIN, kind, save_all=True, append_images=[rotated(angle)], **options) for angle in (90, 180)]
    with pytest.raises(Refused, match=r"2 (frames|pages); accepted: one picture, or data.frames=first"):
        decode(files[0])
    first = [decode(file, Look(frames="first")) for file in files]
    assert np.array_equal(first[0].frames[0], first[1].frames[0])
    assert first[0].content != first[1].content  # what was left out differs
    every = [decode(file, Look(frames="all")) for file in files]
    assert [len(item.frames) for item in every] == [2, 2]
    assert every[0].content != every[1].content
    if kind != "GIF":
        assert np.array_equal(every[1].frames[1], np.asarray(rotated(180)))


def test_a_phone_s_mpo_is_its_photograph() -> None:
    found = decode(encoded(PLAIN, "MPO", save_all=True, append_images=[rotated(9)]))
    assert len(found.frames) == 1
    assert np.array_equal(found.frames[0], decode(encoded(PLAIN, "JPEG")).frames[0])


SIXTEEN = np.array([[1, 2], [300, 65535]], dtype=np.uint16)
REFUSED: dict[str, tuple[bytes, str]] = {
    "grey of 16 bits": (encoded(Image.fromarray(SIXTEEN)), "16-bit"),
    "RGB of 16 bits": (raw_png(1, 1, 16, 2, b"\0" + b"\x12\x34" * 3), "16-bit"),
    "grey and alpha of 16 bits": (raw_png(1, 1, 16, 4, b"\0" + b"\x12\x34" * 2), "16-bit"),
    "PPM of 16 bits": (b"P6 1 1 65535\n\1\2\3\4\5\6", "16-bit"),
    "floating point": (encoded(PLAIN.convert("F"), "TIFF"), "floating-point"),
    "PNG cut off": (encoded(PLAIN)[:-200], "cut off"),
    "JPEG cut off": (encoded(PLAIN, "JPEG")[:-200], "cut off"),
    "GIF cut off": (encoded(PLAIN, "GIF")[:-200], "cut off"),
    "WebP cut off": (encoded(PLAIN, "WEBP")[:-100], "not a readable picture"),
    "TIFF cut off": (encoded(PLAIN, "TIFF")[:-100], "cut off"),
    "PNG of no width": (raw_png(0, 5, 8, 2, b""), "not a readable picture"),
    "PPM of no width": (b"P6 0 5 255\n", "not a readable picture"),
    "huge": (raw_png(100_000, 100_000, 8, 2, b"\0"), "more than 16777216 pixels"),
    "large": (raw_png(5_000, 5_000, 8, 2, b"\0"), "5000x5000 pixels"),
    "AVIF": (b"\0\0\0\x1cftypavif" + b"\0" * 40, "AVIF; convert it to PNG"),
    "HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC; convert it to PNG"),
    "JPEG XL": (b"\xff\x0a" + b"\0" * 40, "JPEG XL"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG"),
    "DICOM": (b"\0" * 128 + b"DICM" + b"\0" * 20, "DICOM"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html></html>", "HTML"),
    "empty": (b"", "not a readable picture"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_is_named(name: str) -> None:
    data, problem = REFUSED[name]
    with pytest.raises(Refused) as caught:
        decode(data)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def photograph(seed: int, side: int = 96) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side), 3)
    noise = rng.normal(0, 6, (side, side, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def marks(pictures: list[Image.Image]) -> list[near.Signature]:
    return [near.signature(np.asarray(item.convert("RGB"))) for item in pictures]


def test_saved_again_is_found_and_different_pictures_are_not() -> None:
    photographs = [photograph(seed) for seed in range(120)]
    again = [
        Image.open(io.BytesIO(encoded(item, "JPEG", quality=q)))
        for item, q in zip(photographs, [30, 60, 90] * 40, strict=True)
    ]
    smaller = [item.resize((70, 70)) for item in photographs]
    assert near.pairs(marks(photographs)) == []
    for copies in (again, smaller):
        assert near.pairs(marks(photographs), marks(copies)) == [(index, index) for index in range(120)]
    assert near.pairs(marks([*photographs[:5], again[2]])) == [(2, 5)]
    ink = [Image.fromarray(decode(encoded(signature(seed))).frames[0]) for seed in range(60)]
    assert near.pairs(marks(ink)) == []
