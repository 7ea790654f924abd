"""The .ts format of the UCR and UEA archives (Bagnall et al. 2018, arXiv:1811.00075), as sktime and aeon read it.

A header of `@name value` lines, then `@data`, then one case a line: its channels separated by `:`, their values by `,`,
and last the class or the target. `?` and `NaN` are missing values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmhub.errors import InputError, MmhubError

_MISSING = ("?", "nan", "NaN", "NAN", "")


def read_ts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the cases of a file: `timeseries`, an array (T, C) with NaN where a value is missing, and its truth.

    The truth is the text `label` where the file has classes, or the number `target` where it has targets.

    Raises:
        InputError: it is malformed; names the line. MmhubError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = ((number, line.strip()) for number, line in enumerate(file, 1))
            used = ((number, line) for number, line in lines if line and not line.startswith(("#", "%")))
            header = _read_header(path, used)
            for number, line in used:
                yield _read_case(f"'{path.name}' line {number}", line, header)
    except OSError as error:
        raise MmhubError(f"cannot read '{path.name}': {error.strerror}", "check its permissions") from None


def _read_header(path: Path, lines: Iterable[tuple[int, str]]) -> Mapping[str, str]:
    """Return the header, names in lower case, up to `@data`."""
    header: dict[str, str] = {}
    for number, line in lines:
        if not line.startswith("@"):
            raise InputError(f"'{path.name}' line {number} comes before @data and is no @ line", "is it a .ts file?")
        name, _, value = line[1:].partition(" ")
        if name.lower() == "data":
            if header.get("timestamps", "false").lower() == "true":
                raise InputError(f"'{path.name}' has time stamps, and only evenly spaced series can be read")
            return header
        header[name.lower()] = value.strip()
    raise InputError(f"'{path.name}' has no @data line", "is it a .ts file?")


def _read_case(where: str, line: str, header: Mapping[str, str]) -> dict[str, Any]:
    channels = line.split(":")
    truth: dict[str, Any] = {}
    if _says_true(header, "classlabel"):
        truth["label"] = channels.pop().strip()
    elif _says_true(header, "targetlabel"):
        truth["target"] = _number(channels.pop(), where)
    if not channels:
        raise InputError(f"{where} has a label and no values")
    values = [[_number(cell, where) for cell in channel.split(",")] for channel in channels]
    series = np.full((max(map(len, values)), len(values)), np.nan)
    for i, channel in enumerate(values):
        series[: len(channel), i] = channel  # a channel that ends early is missing from there
    return {"timeseries": series, **truth}


def _says_true(header: Mapping[str, str], name: str) -> bool:
    return header.get(name, "false").lower().startswith("true")


def _number(cell: str, where: str) -> float:
    cell = cell.strip()
    if cell in _MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        raise InputError(f"{where} holds {cell[:40]!r} where a number should be") from None
