"""Labels as text: one canonical form and order, class numbers, answers, and errors that name what was known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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

    def encode(self, targets: Sequence[Any]) -> Tensor:
        """Turn raw labels into class numbers, (B,) long.

        Raises:
            InputError: a label is missing or unknown (`row` is set).
        """
        numbers = []
        for row, raw in enumerate(targets):
            try:
                numbers.append(self.number(label_text(raw)))
            except InputError as error:
                raise at_row(error, row) from None
        return torch.tensor(numbers, dtype=torch.long)

    def answers(self, logits: Tensor, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"label", "score"}` for logits (B, V), with every label's probability in `scores` if `details`."""
        answers: list[dict[str, Any]] = []
        for scores in logits.detach().float().softmax(-1).tolist():
            best = max(range(len(scores)), key=scores.__getitem__)
            answer: dict[str, Any] = {"label": self.names[best], "score": scores[best]}
            if details:
                answer["scores"] = dict(zip(self.names, scores, strict=True))
            answers.append(answer)
        return answers

    def _shown(self) -> str:
        more = ", ..." if len(self.names) > SHOWN else ""
        return f"{', '.join(self.names[:SHOWN])}{more} ({len(self.names)})"

    def _hint(self, name: str) -> str | None:
        return did_you_mean(name, self.names) if len(self.names) > SHOWN else None


def distinct_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Return labels of another library, which may name two classes alike, with a class number after each repeated one.

    >>> distinct_labels(["crane", "dog", "crane"])
    ('crane', 'dog', 'crane (2)')
    """
    seen: list[str] = []
    for number, name in enumerate(names):
        seen.append(f"{name} ({number})" if name in seen else name)
    return tuple(seen)


def class_names(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names in a transformers config.json, LABEL_0 and so on where it does not name them.

    >>> class_names({"id2label": {"0": "no", "1": "yes"}})
    ('no', 'yes')
    """
    named = table.get("id2label")
    if not isinstance(named, dict):
        return tuple(f"LABEL_{i}" for i in range(int(table.get("num_labels") or 2)))
    return distinct_labels([str(named.get(str(i), f"LABEL_{i}")) for i in range(len(named))])


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
