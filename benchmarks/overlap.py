"""How much the real sets in shared/data overlap, how long finding out takes, and whether planted copies are found.

    python benchmarks/overlap.py SHARED/data [--words 2000000] [--out FILE]

Seconds are of one pass, with files in the system's cache; "planted" replaces a tenth of the evaluation rows by training
rows, so that its share has to grow by a tenth. The last row is a made text of so many words, for the speed alone.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.serve_client import about
from mmhub.data.sources import Rows, open_rows
from mmhub.overlap import measure_overlap

SETS: dict[str, tuple[Any, Any, dict[str, str], list[str] | None]] = {
    "sst2": ("sst2/train.tsv", "sst2/dev.tsv", {"text": "sentence"}, ["sentence", "label"]),
    "multi30k": ({"en": "multi30k/train.en.gz"}, {"en": "multi30k/val.en.gz"}, {"text": "en"}, None),
    "multi30k test": (
        {"en": "multi30k/train.en.gz"}, {"en": "multi30k/test_2016_flickr.en.gz"}, {"text": "en"}, None
    ),
    "cifar10-small": ("cifar10-small/train.parquet", "cifar10-small/valid.parquet", {"image": "image"}, None),
    "fsdd": ("fsdd/train.parquet", "fsdd/valid.parquet", {"audio": "audio"}, None),
    "emoji": ("emoji/train.parquet", "emoji/valid.parquet", {"image": "image", "text": "caption"}, None),
    "wikitext2-small lines": ("wikitext2-small/train.txt", "wikitext2-small/valid.txt", {"text": "text"}, None),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--words", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name, (train, test, inputs, columns) in SETS.items():
        known, new = (open_rows(source, columns=columns, base=given.data) for source in (train, test))
        rows.append({"set": name} | measured(known, new, inputs))
    known, new = (open_rows([{"text": text} for text in texts(given.words // part, part)]) for part in (1, 10))
    rows.append({"set": f"{given.words} made words"} | measured(known, new, {"text": "text"}))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = json.dumps({"rows": rows, "peak_mib": memory, "about": about(["mmhub", "numpy", "pillow"])}, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def measured(train: Rows, test: Rows, inputs: Mapping[str, str]) -> dict[str, Any]:
    since = time.perf_counter()
    found = measure_overlap(train, test, inputs)
    seconds = time.perf_counter() - since
    count = len(test) // 10
    mixed = [*(train[i] for i in range(count)), *(test[i] for i in range(count, len(test)))]
    planted = measure_overlap(train, open_rows(mixed), inputs)
    return found | {"seconds": round(seconds, 2), "planted_exact_share": planted["exact_share"]}


def texts(words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    known = [f"word{i}" for i in range(30_000)]
    return [" ".join(draw.choices(known, k=40)) for _ in range(words // 40)]


if __name__ == "__main__":
    main()
