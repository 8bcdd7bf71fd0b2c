"""trainers.data.pictures and near: each odd picture has the right pixels, or one line."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from tests.commands import run_all
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


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("keyed", [False, True])
def test_grey_of_few_bits_with_and_without_a_transparent_one(depth: int, keyed: bool) -> None:
    """By hand: value v of b bits is v * 255 / (2^b - 1), the key becomes the background."""
    values = np.arange(8) % 2**depth
    packed = int("".join(format(value, f"0{depth}b") for value in values), 2).to_bytes(depth, "big")
    file = raw_png(8, 1, depth, 0, b"\0" + packed)
    expected = np.repeat((values * 255 // (2**depth - 1))[None, :, None], 3, 2)
    if keyed:
        file = with_chunk(file, b"tRNS", struct.pack(">H", 1))
        expected[0, values == 1] = 255
    found = decode(file)
    assert np.array_equal(found.frames[0], expected)
    assert found.composited == keyed


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk(kind, body) + png[at:]


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
OPAQUE = Image.fromarray(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]))
GREY = Image.fromarray(PIXELS[..., 0])
BITS = PIXELS[..., 0] > 127
GREY3 = np.repeat(PIXELS[..., :1], 3, axis=2)
BITS3 = np.repeat(BITS[..., None], 3, axis=2) * np.uint8(255)
# Name -> file, pixels that it shows. Colour profiles and gamma are not applied: the model sees the numbers of the file.
RIGHT: dict[str, tuple[bytes, Any]] = {
    "PNG with a profile": (encoded(PLAIN, icc_profile=PROFILE), PIXELS),
    "PNG with gamma": (with_chunk(encoded(PLAIN), b"gAMA", struct.pack(">I", 100_000)), PIXELS),
    "PNG, interlaced": (encoded(PLAIN, interlace=1), PIXELS),
    "PNG, one frame of an animation": (encoded(PLAIN, save_all=True), PIXELS),
    "PNG of 1 bit": (encoded(Image.fromarray(BITS)), BITS3),
    "PNG, grey": (encoded(GREY), GREY3),
    "TIFF of 1 bit, as a fax": (encoded(Image.fromarray(BITS), "TIFF", compression="group4"), BITS3),
    "TIFF, LZW": (encoded(PLAIN, "TIFF", compression="tiff_lzw"), PIXELS),
    "BMP": (encoded(PLAIN, "BMP"), PIXELS),
    "BMP of 32 bits": (encoded(OPAQUE, "BMP"), PIXELS),
    "PPM": (encoded(PLAIN, "PPM"), PIXELS),
    "WebP": (encoded(PLAIN, "WEBP", lossless=True), PIXELS),
    "GIF": (encoded(GREY, "GIF"), GREY3),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), np.array([[[1, 2, 3]]])),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_is_shown_is_what_the_file_holds(name: str) -> None:
    data, expected = RIGHT[name]
    found = decode(data)
    assert len(found.frames) == 1
    assert np.array_equal(found.frames[0], expected)
    assert not found.composited


def test_grey_with_alpha() -> None:
    both = np.dstack([PIXELS[..., 0], PIXELS[..., 1]])
    share = both[..., 1:].astype(float) / 255
    expected = both[..., :1] * share + 255 * (1 - share)
    assert np.abs(decode(encoded(Image.fromarray(both))).frames[0] - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_turns_the_picture(kind: str) -> None:
    """All eight orientations, by the definition of where row 0 and column 0 lie."""
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }
    options = {"lossless": True} if kind == "WEBP" else {}
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decode(encoded(PLAIN, kind, exif=exif, **options)).frames[0], expected)
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
    "a real AVIF": (encoded(PLAIN, "AVIF") if features.check("avif") else b"\0\0\0\x1cftypavif", "AVIF"),
    "JPEG 2000": (encoded(PLAIN, "JPEG2000"), "JPEG 2000"),
    "ICO": (encoded(PLAIN.resize((16, 16)), "ICO"), "ICO"),
    "PostScript": (encoded(PLAIN, "EPS"), "PostScript"),
    "LAB": (encoded(PLAIN.convert("LAB"), "TIFF"), "colours of mode LAB"),
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


def test_the_command_names_file_row_and_field(tmp_path: Path) -> None:
    """Wrong suffixes do not matter; 30 signatures in black ink on a transparent ground are 30 units."""
    shown = [encoded(signature(seed)) for seed in range(30)] + [encoded(rotated(90 * turn)) for turn in range(4)]
    rows = [{"image": f"{i}.jpg", "question": "whose?", "answer": f"name {i}"} for i in range(len(shown))]
    for row, data in zip(rows, shown, strict=True):
        (tmp_path / row["image"]).write_bytes(data)
    names = ["huge", "JPEG cut off", "HEIC", "a real AVIF", "grey of 16 bits", "PNG of no width", "empty"]
    files = {name: REFUSED[name] for name in names}
    files["pages"] = encoded(PLAIN, "TIFF", save_all=True, append_images=[PLAIN]), "2 pages; accepted: one picture"
    for name, (data, _) in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        odd = [*rows, {"image": f"{name}.png", "question": "q?", "answer": "a"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, odd)))
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = ["--dry-run", "--json", f"data.path={tmp_path}", "data.test=all.jsonl", "training.batch-size=2"]
    commands = [["train", *small, f"data.train={name}.jsonl", "training.steps=2"] for name in [*files, "all"]]
    *refused, taken = run_all(commands, cwd=tmp_path)
    for (name, (_, problem)), done in zip(files.items(), refused, strict=True):
        assert done.code == 2
        assert done.line.startswith(f"dpaudit: {name}.jsonl, row 35, image: ")
        assert problem in done.line or (name == "empty" and done.line.endswith("image: empty"))
    assert json.loads(taken.stdout)["claim"]["sample_rate"] == pytest.approx(2 / 34)
    assert "30 pictures with transparency on white" in taken.stderr


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
