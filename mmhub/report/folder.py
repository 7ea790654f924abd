"""The folder of a report: where it may go, and index.html, report.json and confusion.png written at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmhub.errors import PluginError, UsageError
from mmhub.evaluation import Answered
from mmhub.files import disk_errors, new_folder
from mmhub.model import Model
from mmhub.report.content import describe
from mmhub.report.mistakes import check_comparable
from mmhub.report.page import write_page
from mmhub.report.pictures import draw_confusion

PAGE, NUMBERS, CONFUSION = "index.html", "report.json", "confusion.png"
_INSTALL = "pip install 'mmhub[report]', or pip install matplotlib jinja2"


def check_report(folder: str | os.PathLike[str], task: str = "") -> None:
    """Check, before an evaluation is run, that a report on it could be written to `folder`.

    Of a `task` that is known, what compares its answers is looked for, too. Nothing is left behind.

    Raises:
        UsageError: it holds something else than an older report, or cannot be made.
        PluginError: matplotlib, Jinja, or what compares the answers is not installed.
        MmhubError: the folder cannot be written: its name is too long, or its disk full.
    """
    for library in ("matplotlib", "jinja2"):
        if find_spec(library) is None:
            raise PluginError(f"a report is drawn with {library}, which is not installed", _INSTALL)
    check_comparable(task)
    with disk_errors("the report", Path(folder)):
        _check_folder(Path(folder))
        _try_folder(Path(folder))


def _check_folder(path: Path) -> None:
    """Raise UsageError for a folder that holds something else, or lies where nothing may be written."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"'{path}' is a file, and a report is a folder", "name another folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(
            f"no report can be written to '{path}': '{above}' is no folder you may write to", "name another"
        )
    strange = {entry.name for entry in path.iterdir()} - {PAGE, NUMBERS, CONFUSION} if path.exists() else set()
    if strange:
        raise UsageError(
            f"'{path}' holds '{min(strange)}', which is no part of a report", "name a new folder, or one with a report"
        )


def _try_folder(path: Path) -> None:
    """Make a folder under a name as long as the one that is written to, and remove it again."""
    target = Path(os.path.realpath(path))
    missing = [parent for parent in target.parents if not parent.exists()]
    trial = target.with_name(f".{target.name}.{os.getpid()}.try")
    try:
        trial.mkdir(parents=True)
    finally:
        for made in (trial, *missing):
            with suppress(OSError):
                made.rmdir()


def write_report(
    folder: str | os.PathLike[str], model: Model, report: Mapping[str, Any], answered: Answered | None, data: str
) -> Path:
    """Write what `evaluate` reported and, if kept, answered; return the path of the page. An older report goes.

    `data` is what the data are called. The page is at most about 6 MB, whatever the rows hold.

    Raises:
        UsageError, PluginError: as `check_report`. MmhubError: the disk is full, or the folder may not be written to.
    """
    check_report(folder)
    content = describe(model, report, answered, data)
    confusion = draw_confusion(content.labels, content.confusion) if content.confusion else None
    page = write_page(content, confusion)
    numbers = json.dumps(_plain(content.numbers), indent=2, ensure_ascii=False, allow_nan=False)
    with disk_errors("the report", Path(folder)), new_folder(Path(folder)) as aside:
        (aside / PAGE).write_text(page, encoding="utf-8", errors="replace")
        (aside / NUMBERS).write_text(numbers + "\n", encoding="utf-8", errors="replace")
        if confusion is not None:
            (aside / CONFUSION).write_bytes(confusion)
    return Path(folder) / PAGE


def _plain(value: Any) -> Any:
    """Return JSON data: numbers that are not finite become null, and what JSON does not know a text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
