"""Labels as text: one canonical form, one order, and errors that name the row and what was known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mmhub.errors import InputError, did_you_mean

SHOWN = 10  # labels listed in an error message


def is_missing(raw: Any) -> bool:
    """Whether a target cell holds nothing: None, NaN or an empty text."""
    return raw is None or (isinstance(raw, str) and not raw) or (isinstance(raw, float) and math.isnan(raw))


def plain(raw: Any) -> Any:
    """Return the Python value of a numpy scalar or one-element tensor, anything else as it is."""
    return raw.item() if hasattr(raw, "item") and getattr(raw, "ndim", None) == 0 else raw


def label_text(raw: Any) -> str:
    """Return the text a label goes by: `true`, `3` for 3 and 3.0, a text as it is.

    >>> [label_text(raw) for raw in (True, 3, 3.0, 2.5, " yes")]
    ['true', '3', '3', '2.5', ' yes']

    Raises:
        InputError: the label is missing, or is neither text, number nor bool.
    """
    raw = plain(raw)
    if is_missing(raw):
        raise InputError("the target is missing", "give every row a label, or leave the row out")
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)
    if isinstance(raw, (str, int, float)):
        return str(raw)
    raise InputError(f"a label must be text, a number or true/false, got a {type(raw).__name__}")


def label_order(label: str) -> tuple[bool, float, str]:
    """Sort key for labels: numbers by value, then all others by spelling.

    >>> sorted(["10", "b", "2", "a"], key=label_order)
    ['2', '10', 'a', 'b']
    """
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    return (False, value, label) if math.isfinite(value) else (True, 0.0, label)


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError if a label occurs twice."""
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice:
        raise ValueError(f"the label {twice[0]!r} is listed twice")


class Labels:
    """The known labels and their class numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(names)}

    def number(self, name: str) -> int:
        """Return the class number of a label in canonical form.

        Raises:
            InputError: the label is unknown.
        """
        if name not in self._index:
            raise InputError(
                f"label {name!r} was not seen in training; known labels: {self._shown()}", self._hint(name)
            )
        return self._index[name]

    def _shown(self) -> str:
        more = ", ..." if len(self.names) > SHOWN else ""
        return f"{', '.join(self.names[:SHOWN])}{more} ({len(self.names)})"

    def _hint(self, name: str) -> str | None:
        return did_you_mean(name, self.names) if len(self.names) > SHOWN else None


def at_row(error: InputError, row: int) -> InputError:
    """Note on an error which row of the batch it is about."""
    error.row = row
    return error


def label_texts(targets: Iterable[Any]) -> Iterable[str]:
    """Yield the canonical text of each target; an InputError carries its row."""
    for row, raw in enumerate(targets):
        try:
            yield label_text(raw)
        except InputError as error:
            raise at_row(error, row) from None
