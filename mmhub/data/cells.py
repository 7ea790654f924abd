"""Cells of a row: a column, or several that make one input together, written as "premise+hypothesis"."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mmhub.errors import UsageError

PAIR = ("text", "text_pair")  # what a processor calls the parts


def parts_of(column: str, known: Collection[str]) -> tuple[str, ...]:
    """Return the columns that `column` is made of: itself, if there is one of that name.

    >>> parts_of("question+context", ["id", "question", "context"]), parts_of("a+b", ["a+b"])
    (('question', 'context'), ('a+b',))

    Raises:
        UsageError: they are more than two.
    """
    if column in known or "+" not in column:
        return (column,)
    parts = tuple(column.split("+"))
    if len(parts) > len(PAIR):
        raise UsageError(f"{column!r} names {len(parts)} columns for one input", "give one, or two for a pair of texts")
    return parts


def all_parts(columns: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the columns that all of `columns` are made of, each once."""
    return list(dict.fromkeys(part for column in columns for part in parts_of(column, known)))


def cell(row: Mapping[str, Any], column: str) -> Any:
    """Return the cell of a column, None if there is none; of a pair of columns {"text", "text_pair"}."""
    parts = (column,) if column.count("+") > 1 else parts_of(column, row)  # a pair has one
    return row.get(column) if len(parts) == 1 else join([row.get(part) for part in parts])


def join(values: list[Any]) -> Any:
    """Return the cells of several columns as one input, None where all are missing."""
    return None if all(value is None for value in values) else dict(zip(PAIR, values, strict=True))
