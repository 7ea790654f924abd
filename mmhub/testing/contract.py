"""What a check says: a broken contract in one line, or why it does not apply. Nothing heavy is imported here."""

from __future__ import annotations

from unittest import SkipTest


class ContractError(AssertionError):
    """A component or plugin breaks a contract; the text is one line: what came, what was expected, which rule."""


class NotApplicableError(SkipTest):
    """The check says nothing about this component; the text is the reason. pytest shows it as skipped."""


def expect(holds: bool, came: str, expected: str, rule: str) -> None:
    """Raise ContractError unless `holds`.

    >>> expect(False, "tokens have width 7", "dim = 8", "Features")
    Traceback (most recent call last):
    mmhub.testing.contract.ContractError: tokens have width 7; expected dim = 8 [Features]
    """
    if not holds:
        raise ContractError(f"{one_line(came)}; expected {one_line(expected)} [{rule}]")


def one_line(text: str) -> str:
    """Put a text into one line of at most 400 characters."""
    words = " ".join(text.split())
    return words if len(words) <= 400 else words[:397] + "..."
