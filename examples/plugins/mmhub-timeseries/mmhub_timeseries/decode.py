"""From a raw input to the values of a series, (T, C) with NaN where one is missing. Nothing is rescaled here."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes

_KINDS = (".csv", ".npy", ".json")
_EXPECTED = "give a list of numbers, its JSON text, an array (T,) or (T, C), or a .csv, .npy or .json file"
_MISSING = ("", "?", "na", "nan", "none", "null")


def decode(raw: Any, policy: Policy) -> Tensor:
    """Return the values of a series, (T, C) float32, T and C at least 1, NaN where a value is missing.

    Raises:
        InputError: `raw` is no series, is empty or ragged, or holds an infinite or no value at all.
    """
    name = describe_raw(raw)
    values = torch.from_numpy(_array(raw, name, policy)).to(torch.float32)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise InputError(f"{name} has {values.ndim} dimensions, expected (T,) or (T, C)", _EXPECTED)
    if not values.numel():
        raise InputError(f"{name} is an empty series", "leave the input out where there is none")
    if bool(values.isinf().any()):
        step = int(values.isinf().any(1).nonzero()[0])
        raise InputError(f"{name} holds an infinite value at step {step}", "write a missing value as NaN or null")
    if bool(values.isnan().all()):
        raise InputError(f"{name} holds no value: all are missing", "leave the input out where there is none")
    return values


def _array(raw: Any, name: str, policy: Policy) -> np.ndarray:
    """The values as float64, of whatever shape."""
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu().to(torch.float64).numpy() if not raw.is_complex() else raw.numpy()
    if isinstance(raw, np.ndarray):
        return _floats(raw, name)
    if isinstance(raw, (list, tuple)):
        return _from_list(raw, name)
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        return _from_json(raw, name)
    if isinstance(raw, (str, os.PathLike)) and _kind(raw) not in _KINDS:
        raise InputError(f"{name} is no series", _EXPECTED)
    content = raw_bytes(raw, policy)
    if content is None:
        raise InputError(f"{name} is no series", _EXPECTED)
    return _from_content(content, name)


def _kind(raw: str | os.PathLike[str]) -> str:
    text = os.fspath(raw)
    return PurePath(urlsplit(text).path if "://" in text else text).suffix.lower()


def _from_content(content: bytes, name: str) -> np.ndarray:
    """Tell the format of a file by how it begins."""
    if content.startswith(b"\x93NUMPY"):
        try:
            return _floats(np.load(io.BytesIO(content), allow_pickle=False), name)
        except (ValueError, EOFError, MemoryError, OverflowError) as error:
            raise InputError(f"cannot read {name} as .npy: {str(error).splitlines()[0]}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is neither .npy nor text in UTF-8", _EXPECTED) from None
    return _from_json(text, name) if text.lstrip().startswith("[") else _from_csv(text, name)


def _floats(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name} has type {array.dtype}, expected real numbers", _EXPECTED)
    return array.astype(np.float64)


def _from_json(text: str, name: str) -> np.ndarray:
    try:
        return _from_list(json.loads(text), name)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON: {error}", _EXPECTED) from None


def _from_list(values: Sequence[Any], name: str) -> np.ndarray:
    """A list of numbers, or of one list a time step; None is a missing value, or a step of them."""
    widths = {len(step) for step in values if isinstance(step, (list, tuple))}
    if not widths:
        return np.array([_number(value, name) for value in values], np.float64)
    if len(widths) > 1:
        raise InputError(f"{name} has steps of {' and '.join(map(str, sorted(widths)[:3]))} values", _EXPECTED)
    width = widths.pop()
    steps = [[None] * width if step is None else step for step in values]
    if not all(isinstance(step, (list, tuple)) for step in steps):
        raise InputError(f"{name} mixes numbers with lists of numbers", _EXPECTED)
    return np.array([[_number(value, name) for value in step] for step in steps], np.float64).reshape(len(steps), width)


def _number(value: Any, name: str) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"{name} holds a number too large for a float") from None
    raise InputError(f"{name} holds {_short(value)} where a number should be", _EXPECTED)


def _from_csv(text: str, name: str) -> np.ndarray:
    """One line a step, one cell a channel, with or without a header; an empty cell is a missing value."""
    try:
        lines = [line or [""] for line in csv.reader(io.StringIO(text.rstrip()))]
    except csv.Error as error:
        raise InputError(f"cannot read {name} as csv: {error}") from None
    first = 1 if lines and _is_header(lines[0]) else 0
    steps = []
    for number, line in enumerate(lines[first:], first + 1):
        if len(line) != len(lines[0]):
            raise InputError(f"{name} line {number} has {len(line)} cells, the first line has {len(lines[0])}")
        steps.append([_cell(cell.strip(), f"{name} line {number}") for cell in line])
    return np.array(steps, np.float64).reshape(len(steps), len(lines[0]) if lines else 0)


def _is_header(line: Sequence[str]) -> bool:
    """Has a line words, and no number?"""
    words = [cell for cell in line if cell.strip().lower() not in _MISSING]
    return bool(words) and not any(map(_is_number, words))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _cell(cell: str, where: str) -> float:
    if cell.lower() in _MISSING:
        return float("nan")
    if not _is_number(cell):
        raise InputError(f"{where} holds {_short(cell)} where a number should be", _EXPECTED)
    return float(cell)


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, (str, bool)) else f"a {type(value).__name__}"
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
