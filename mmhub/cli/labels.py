"""The options of zero-shot classification: labels that a retrieval model was never trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mmhub.cli.options import parse_names
from mmhub.cli.writing import read_lines
from mmhub.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def labels_options(command: F) -> F:
    """Add `--labels` and `--template`."""
    labels = click.option(
        "--labels", metavar="A,B,…|@FILE", help="Labels for a retrieval model to tell apart; @FILE has one a line."
    )
    template = click.option(
        "--template", "templates", multiple=True, metavar="TEXT", help="A text with {} where the label goes."
    )
    return labels(template(command))


def read_labels(text: str | None, templates: tuple[str, ...]) -> list[str]:
    """Return the labels that `--labels` names, [] without the option.

    Raises:
        UsageError: there are templates alone. NotFoundError, InputError: a file of labels cannot be read.
    """
    if text is None:
        if templates:
            raise UsageError("--template is for labels, and there are none", "add --labels")
        return []
    names = [line.strip() for line in read_lines(Path(text[1:]))] if text.startswith("@") else parse_names(text)
    if not names:
        raise UsageError("--labels names no label", "e.g. --labels cat,dog")
    return names
