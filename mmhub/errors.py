"""The exception tree and the exit code each error ends the command line with.

An error says what was given, what was expected and what to do next, in one line. Everything a user can cause is an
`MmhubError`; anything else that escapes is a bug in mmhub.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `mmhub` command; part of the public interface."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    PLUGIN = 4
    TRUST = 5
    NETWORK = 6
    INTERRUPTED = 130


class MmhubError(Exception):
    """An error the user can act on: `message` says what is wrong, `hint` what to do next."""

    exit_code: int = ExitCode.FAILURE

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(MmhubError):
    """The command, recipe or arguments are wrong."""

    exit_code = ExitCode.USAGE


class NotFoundError(MmhubError):
    """A model, component, file or repository does not exist."""

    exit_code = ExitCode.NOT_FOUND


class PluginError(MmhubError):
    """A plugin is missing, broken or incompatible."""

    exit_code = ExitCode.PLUGIN


class TrustError(MmhubError):
    """Something is not what it claims to be: a damaged, forged or forbidden file."""

    exit_code = ExitCode.TRUST


class NetworkError(MmhubError):
    """A server could not be reached, or offline mode forbids asking it."""

    exit_code = ExitCode.NETWORK


class Interrupted(MmhubError):
    """The user (130) or the system (143, SIGTERM) asked to stop; what was done so far is saved."""

    exit_code: int = ExitCode.INTERRUPTED

    def __init__(self, message: str, hint: str | None = None, exit_code: int = ExitCode.INTERRUPTED) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class InputError(MmhubError):
    """One raw input cannot be used: an empty, truncated or non-media file, or a value of the wrong type.

    `row` is the position in the list of samples that was being processed, filled in by `Processor.__call__`.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.row: int | None = None
        self.modality: str | None = None


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """Return `did you mean 'x'?` for the closest of `options`, or None when nothing is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, sorted(set(options)), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in close)}?" if close else None
