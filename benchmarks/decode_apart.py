"""What decoding in a process of its own costs for each picture and recording, and what starting it costs.

    python -m benchmarks.decode_apart [--repeat 30] [--seconds 2] [--out FILE]

Pictures are noise that was blurred, so that JPEG and PNG have something to do; recordings are noise. Milliseconds are
medians of `--repeat` times, or of as many as fit into `--seconds`, but at least 3; those "apart" include sending the
bytes there and the pixels or samples back. With these defaults it takes less than a minute.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_client import about
from mmhub.interfaces import Policy
from mmhub.interfaces.raw import Bounds

SIZES = {"32x32": (32, 32), "224x224": (224, 224), "640x480": (640, 480), "4000x3000": (4000, 3000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each number")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from mmhub_audio.decode import decode
    from mmhub_image.decode import open_image

    apart = Policy(worker=Bounds(workers=1))
    start = seconds(lambda: open_image(picture(32, 32, "PNG"), apart))
    rows = []
    for name, (width, height) in SIZES.items():
        for kind in ("JPEG", "PNG"):
            rows.append(row(f"{kind} {name}", open_image, picture(width, height, kind), apart, given))
    for length in (1, 30):
        rows.append(row(f"FLAC {length} s at 16 kHz", decode, recording(length), apart, given))
    head = ["| input | bytes | here, ms | apart, ms |", "|---|---:|---:|---:|"]
    first = f"The first picture took {1000 * start:.0f} ms, with the start of the process."
    text = "\n".join([*about(("pillow", "soundfile", "numpy")), "", first, "", *head, *rows])
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def row(
    name: str, read: Callable[[bytes, Policy], Any], content: bytes, apart: Policy, given: argparse.Namespace
) -> str:
    here = median(lambda: read(content, Policy()), given)
    there = median(lambda: read(content, apart), given)
    return f"| {name} | {len(content):,} | {1000 * here:.2f} | {1000 * there:.2f} |"


def median(call: Callable[[], Any], given: argparse.Namespace) -> float:
    found: list[float] = []
    while len(found) < 3 or (len(found) < given.repeat and sum(found) < given.seconds):
        found.append(seconds(call))
    return statistics.median(found)


def seconds(call: Callable[[], Any]) -> float:
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


def picture(width: int, height: int, kind: str) -> bytes:
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def recording(length: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, length * 16_000), 16_000, format="FLAC")
    return file.getvalue()


if __name__ == "__main__":
    main()
