"""Pictures as they are found in the wild: the right pixels, or one line that names the file; never other pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mmhub.errors import InputError
from mmhub.interfaces import Policy
from mmhub_image.decode import open_image
from mmhub_image.processor import ImageProcessor

SOLID = (200, 30, 60)
Chunk = tuple[bytes, bytes]


def picture(width: int = 61, height: int = 47) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, *levels: int, chunks: Sequence[Chunk] = (), side: int = 1) -> bytes:
    """A PNG written by hand, of one pixel unless `side` promises more."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    row = struct.pack(f">{len(levels)}{'H' if depth == 16 else 'B'}", *levels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def promising(side: int, kind: str) -> bytes:
    """A small file whose header promises side x side pixels."""
    if kind == "PNG":
        return png(8, 2, *[0] * 30, side=side)
    content = bytearray(encoded(Image.new("RGB", (8, 8)).convert("P" if kind == "GIF" else "RGB"), kind))
    where, how = {"JPEG": (content.find(b"\xff\xc0") + 5, ">HH"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}[kind]
    struct.pack_into(how, content, where, side, side)
    return bytes(content)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def frames(kind: str) -> bytes:
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    return encoded(first, kind, save_all=True, append_images=others)


def with_profile(kind: str) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(Image.new("RGB", (8, 8), SOLID), kind, icc_profile=profile)


# --- the right pixels ----------------------------------------------------------------------------------------------

HALF = Image.new("LA", (8, 8), (0, 128))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(encoded(Image.new("RGB", (1, 1), SOLID)), SOLID, id="one pixel"),
        pytest.param(
            encoded(Image.new("RGB", (8, 8), SOLID).convert("CMYK"), "JPEG", quality=100), SOLID, id="CMYK JPEG"
        ),
        pytest.param(encoded(Image.new("RGB", (8, 8), SOLID).convert("CMYK"), "TIFF"), SOLID, id="CMYK TIFF"),
        pytest.param(encoded(Image.new("L", (8, 8), 90), "JPEG", quality=100), (90,) * 3, id="grey JPEG"),
        pytest.param(encoded(Image.new("1", (8, 8), 1)), (255,) * 3, id="one bit"),
        pytest.param(encoded(HALF), (127,) * 3, id="grey and alpha"),
        pytest.param(encoded(HALF.convert("RGBA"), "WEBP", lossless=True), (127,) * 3, id="WebP with alpha"),
        pytest.param(encoded(Image.new("P", (8, 8), 0), transparency=0), (255,) * 3, id="clear palette entry"),
        pytest.param(encoded(Image.new("P", (8, 8), 0), "GIF", transparency=0), (255,) * 3, id="clear GIF"),
        pytest.param(png(8, 0, 0x80, chunks=[(b"tRNS", b"\0\x80")]), (255,) * 3, id="clear grey"),
        pytest.param(png(16, 0, 0x8040), (0x80,) * 3, id="16-bit grey"),
        pytest.param(png(16, 0, 0x8040, chunks=[(b"tRNS", b"\x80\x40")]), (255,) * 3, id="clear 16-bit grey"),
        pytest.param(png(16, 0, 0x8040, chunks=[(b"tRNS", b"\x80\x41")]), (0x80,) * 3, id="another clear 16-bit grey"),
        pytest.param(png(16, 4, 0x8040, 0xFFFF), (0x80,) * 3, id="16-bit grey and alpha"),
        pytest.param(png(16, 2, 0x8040, 0x1020, 0xFF00), (0x80, 0x10, 0xFF), id="16-bit colours"),
        pytest.param(png(16, 6, 0x8040, 0x1020, 0xFF00, 0), (255,) * 3, id="16-bit colours, clear"),
        pytest.param(png(2, 0, 0x80), (170,) * 3, id="two bits"),
        pytest.param(with_profile("PNG"), SOLID, id="PNG with a colour profile"),
        pytest.param(with_profile("WEBP"), None, id="WebP with a colour profile"),
        pytest.param(encoded(Image.new("RGB", (4, 4), SOLID), "PNG", save_all=True), SOLID, id="APNG of one frame"),
        pytest.param(encoded(Image.new("RGB", (8, 8), SOLID), "BMP") + b"more", SOLID, id="bytes behind the picture"),
        pytest.param(encoded(Image.new("RGB", (8, 8), SOLID), "JPEG", exif=b"Exif\0\0garbage"), None, id="broken EXIF"),
    ],
)
def test_a_picture_of_any_kind_has_its_colours(content: bytes, expected: tuple[int, ...] | None) -> None:
    image = open_image(content, Policy())
    assert image.mode == "RGB"
    pixel, slack = image.getpixel((0, 0)), 0 if expected else 4  # of what lossy formats keep of the solid colour
    assert all(abs(a - b) <= slack for a, b in zip(pixel, expected or SOLID, strict=True)), pixel  # type: ignore[arg-type]


# EXIF orientation -> where the upper left corner of the stored picture belongs
CORNERS = {1: "upper left", 2: "upper right", 3: "lower right", 4: "lower left"}
CORNERS |= {5: "upper left", 6: "upper right", 7: "lower right", 8: "lower left"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (24, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(open_image(encoded(image, kind, exif=exif), Policy())).mean(2)
    assert pixels.shape == ((24, 16) if orientation > 4 else (16, 24))
    found = {
        f"{up} {left}": pixels[y, x]
        for up, y in (("upper", 2), ("lower", -3))
        for left, x in (("left", 2), ("right", -3))
    }
    assert [corner for corner, level in found.items() if level > 128] == [CORNERS[orientation]]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".txt", ""])
def test_a_file_is_known_by_its_content_whatever_it_is_called(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"some{suffix}"
    path.write_bytes(encoded(picture(), "WEBP", lossless=True))
    assert np.array_equal(np.asarray(open_image(path, Policy())), np.asarray(picture()))


# --- one line that names the file ----------------------------------------------------------------------------------

WHOLE = {
    "PNG": encoded(picture()),
    "palette PNG": encoded(picture().convert("P")),
    "JPEG": encoded(picture(), "JPEG"),
    "progressive JPEG": encoded(picture(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(picture().convert("CMYK"), "JPEG"),
    "WebP": encoded(picture(), "WEBP"),
    "lossless WebP": encoded(picture(), "WEBP", lossless=True),
    "GIF": encoded(picture(), "GIF"),
    "TIFF": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "BMP": encoded(picture(), "BMP"),
    "PPM": encoded(picture(), "PPM"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_that_was_cut_anywhere_is_refused_or_shows_the_whole_picture(kind: str) -> None:
    content = WHOLE[kind]
    whole = np.asarray(open_image(content, Policy()))
    ends = np.linspace(1, len(content) - 1, 40).astype(int)
    shown = {int(end): found for end in ends if (found := pixels_of(content[:end])) is not None}
    assert all(np.array_equal(found, whole) for found in shown.values()), f"wrong when cut to {sorted(shown)} bytes"
    assert len(shown) <= 2


def pixels_of(content: bytes) -> Any:
    """The pixels of a file, None where it is refused."""
    try:
        return np.asarray(open_image(content, Policy()))
    except InputError:
        return None


@pytest.mark.parametrize("kind", ["PNG", "palette PNG", "JPEG", "progressive JPEG", "CMYK JPEG", "TIFF", "GIF"])
def test_a_download_that_stopped_in_a_file_made_in_advance_is_refused(kind: str) -> None:
    """Its end is zeros."""
    content = WHOLE[kind]
    for share in (0.3, 0.6, 0.95):
        kept = int(len(content) * share)
        with pytest.raises(InputError, match=r"is (a damaged|not an image)"):
            open_image(content[:kept] + bytes(len(content) - kept), Policy())


@pytest.mark.parametrize("back", [5, 20, 300, 5000])
def test_a_png_of_which_a_bit_is_wrong_is_refused(back: int) -> None:
    """The checksum of the pixels, what these end with, and pixels."""
    content = WHOLE["PNG"]
    with pytest.raises(InputError, match="damaged PNG"):
        open_image(flipped(content, len(content) - 12 - back + 4), Policy())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"a dog on the beach\n", "is not an image", id="text"),
        pytest.param(b"<html><img src='a.png'></html>", "is not an image", id="a web page"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image", id="SVG"),
        pytest.param(encoded(picture(), "ICO"), "is not an image", id="an icon"),
        pytest.param(WHOLE["PNG"][:8], "damaged|not an image", id="a signature alone"),
        pytest.param(frames("GIF"), "is animated", id="animated GIF"),
        pytest.param(frames("PNG"), "is animated", id="APNG"),
        pytest.param(frames("WEBP"), "is animated", id="animated WebP"),
        pytest.param(frames("TIFF"), "has pages", id="TIFF of two pages"),
        *(pytest.param(promising(20_000, kind), "too many pixels", id=f"{kind} of 20000x20000")
          for kind in ("PNG", "JPEG", "GIF", "BMP")),
        pytest.param(promising(8_000, "JPEG"), "more than the limit of 50000000", id="JPEG of 8000x8000"),
        pytest.param(promising(8_000, "PNG"), "more than the limit of 50000000", id="PNG of 8000x8000"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_picture_is_refused_by_name(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "some.png"
    path.write_bytes(content)
    reader = ImageProcessor.from_state({"image_size": (8, 8), "mean": (0, 0, 0), "std": (1, 1, 1)}, {})
    with pytest.raises(InputError, match=reason) as caught:
        reader([None, path], Policy())
    assert "some.png" in str(caught.value) and "\n" not in str(caught.value)
    assert (caught.value.row, caught.value.modality) == (1, "image")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("a dog on the beach", "no file 'a dog on the beach'"),
        ("", "is a folder|no file"),
        ("half\0way", "cannot read"),
        (3.5, "is not an image"),
        ({"text": "a dog"}, "neither bytes nor a path"),
        (["a"], "is not an image"),
    ],
)
def test_text_and_numbers_in_the_image_column_are_refused(raw: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_image(raw, Policy())
