"""Move files in and out of an environment so that it can be taken back at any moment.

This file imports nothing but the standard library: every environment that mmhub changes keeps a copy of it as
`share/mmhub/transactions/undo.py`, for the case that mmhub was killed while it moved itself or something it imports,
and no longer starts. `python ENV/share/mmhub/transactions/undo.py` then puts everything back.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPEN = ("started", "undoing")  # states of a transaction that is to be taken back


def move(file: str, source: Path, target: Path) -> None:
    """Rename a file from one root to the other; nothing happens where it is not there (any more)."""
    if not os.path.lexists(source / file):
        return
    end = target / file
    end.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source / file, end)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        aside = _aside(end)  # a link inside the environment leads to another disk
        shutil.copy2(source / file, aside, follow_symlinks=False)
        os.replace(aside, end)
        try:
            os.unlink(source / file)
        except OSError:  # that disk is read-only
            os.unlink(end)
            raise


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.mmhub")


def take_out(record: Mapping[str, Any], folder: Path, root: Path) -> None:
    """Move the files that a transaction adds, as far as they are in the environment `root`, back to its `new/`."""
    kept, replaced = folder / "new", set(record["remove"])
    for file in record["add"]:
        _aside(root / file).unlink(missing_ok=True)
        if not os.path.lexists(kept / file):
            move(file, root, kept)
        elif file not in replaced and os.path.lexists(root / file):  # copied to another disk, and killed before the end
            os.unlink(root / file)


def put_back(record: Mapping[str, Any], folder: Path, root: Path) -> None:
    """Move the files that a transaction removes, as far as they are in its `old/`, back into the environment."""
    for file in record["remove"]:
        move(file, folder / "old", root)


def main() -> None:
    """Take back what is unfinished beside this file; mmhub itself ends that when it starts again."""
    here = Path(os.path.abspath(__file__)).parent
    for path in sorted(here.glob("*/record.json"), key=lambda path: int(path.parent.name), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["state"] in OPEN:
            take_out(record, path.parent, here.parents[2])
            put_back(record, path.parent, here.parents[2])
            print(f"change {path.parent.name} was taken back", file=sys.stderr)


if __name__ == "__main__":
    main()
