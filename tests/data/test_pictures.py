"""Pictures of every kind become upright RGB; damaged ones are named, one sentence each."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epitaxy.core.errors import FormatError
from epitaxy.data.decode import decode_image
from epitaxy.data.splits import DataSpec, load_splits

Pixels = np.ndarray[Any, Any]


def scene(seed: int = 0) -> Pixels:
    """Smooth colours, so that lossy formats keep them, and no symmetry."""
    y, x = np.mgrid[0:48, 0:64]
    waves = [np.sin(x / (9 + seed) + phase) * 60 + np.cos(y / (11 + phase)) * 50 + 128 for phase in range(3)]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes, quick: bool = False) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(data, "x", quick)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_of_16_bits(values: Pixels) -> bytes:
    """An RGB PNG of 16 bits, which PIL reads and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RGB = Image.fromarray(scene())
GREY16 = (scene()[..., 0].astype(np.uint16) << 8) + 77
FORMATS: dict[str, tuple[bytes, int]] = {  # bytes, and how far a value may be off
    "png": (encoded(RGB, "PNG"), 0),
    "webp": (encoded(RGB, "WEBP", lossless=True), 0),
    "bmp": (encoded(RGB, "BMP"), 0),
    "tiff": (encoded(RGB, "TIFF", compression="tiff_lzw"), 0),
    "ppm": (encoded(RGB, "PPM"), 0),
    "jpeg": (encoded(RGB, "JPEG", quality=95), 12),
    "cmyk jpeg": (encoded(RGB.convert("CMYK"), "JPEG", quality=95), 14),
    "cmyk tiff": (encoded(RGB.convert("CMYK"), "TIFF"), 3),
    "gif": (encoded(RGB, "GIF"), 40),
    "palette": (encoded(RGB.quantize(256), "PNG"), 40),
    "palette, one colour transparent": (encoded(RGB.quantize(256), "PNG", transparency=3), 40),
    "palette, half transparent": (encoded(RGB.quantize(256), "PNG", transparency=bytes(range(256))), 40),
    "alpha": (encoded(Image.fromarray(np.dstack([scene(), scene()[..., 0]])), "PNG"), 0),
    "16 bits": (png_of_16_bits((scene().astype(np.uint16) << 8) + 99), 0),
    "frames": (encoded(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", RGB.size)]), 0),
}
GREYS: dict[str, tuple[bytes, int]] = {
    "grey": (encoded(Image.fromarray(scene()[..., 0]), "PNG"), 0),
    "grey with alpha": (encoded(Image.fromarray(scene()[..., :2], "LA"), "PNG"), 0),
    "grey jpeg": (encoded(Image.fromarray(scene()[..., 0]), "JPEG", quality=95), 6),
    "16 bits png": (encoded(Image.fromarray(GREY16), "PNG"), 0),
    "16 bits tiff": (encoded(Image.fromarray(GREY16), "TIFF"), 0),
    "32 bits tiff": (encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), 0),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_colours(kind: str) -> None:
    data, off = FORMATS[kind]
    found = decoded(data)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - scene()).max() <= off
    assert decoded(data, quick=True).shape[2] == 3


@pytest.mark.parametrize("kind", GREYS)
def test_greys(kind: str) -> None:
    data, off = GREYS[kind]
    assert np.abs(decoded(data) - scene()[..., :1]).max() <= off


def test_two_values() -> None:
    bits = np.array([[0, 255], [255, 0]], np.uint8)
    assert np.array_equal(decoded(encoded(Image.fromarray(bits).convert("1"), "PNG"))[..., 0], bits)


TURNS = {  # of the stored pixels, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_they_are_turned_upright(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(decoded(data), TURNS[orientation](scene()))


def test_an_orientation_that_is_none_is_passed_over() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(decoded(encoded(RGB, "PNG", exif=exif)), scene())


@pytest.mark.parametrize("kind", [kind for kind in (*FORMATS, *GREYS) if kind != "frames"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.filterwarnings("ignore")  # of PIL, about what it finds before it gives up
def test_cut_files_are_named(kind: str, share: float, quick: bool) -> None:
    """Also by the quick look before training, so that nothing is met for the first time in the middle of it."""
    data = {**FORMATS, **GREYS}[kind][0]
    with pytest.raises(FormatError, match=r"^x: \S") as caught:
        decode_image(data[: int(share * len(data))], "x", quick)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "x: the file is empty"),
        (b"<html>not found</html>", "x: not a picture in a known format"),
        (
            encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
            "x: pixels of mode F are not read; store 8 or 16",
        ),
        (
            encoded(Image.fromarray(np.full((4, 4), -3, np.int32)), "TIFF"),
            "x: pixels of mode I are not read; store 8 or 16",
        ),
    ],
)
def test_what_is_no_picture(data: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        decode_image(data, "x")


def test_too_many_pixels_are_refused_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(FormatError, match="x: more pixels than a picture can have"):
        decode_image(FORMATS["png"][0], "x")


def test_bad_pictures_stop_a_run_or_are_left_out_and_listed(tmp_path: Path) -> None:
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(6):
            Image.fromarray(scene(number + 10 * (label == "bee"))).save(tmp_path / label / f"{number}.png")
    (tmp_path / "ant" / "cut.jpg").write_bytes(FORMATS["jpeg"][0][:400])
    (tmp_path / "bee" / "page.png").write_bytes(b"<html>")
    (tmp_path / "bee" / "none.png").write_bytes(b"")
    with pytest.raises(FormatError, match=r"3 of 15 examples cannot be read: \S+cut.jpg \(.*on_bad: skip$"):
        load_splits(DataSpec(str(tmp_path)))
    splits = load_splits(DataSpec(str(tmp_path), on_bad="skip"))
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == 12
    left_out = dict(splits.skipped)
    assert sorted(Path(name).name for name in left_out) == ["cut.jpg", "none.png", "page.png"]
    assert set(left_out.values()) >= {"the file is empty", "not a picture in a known format"}
