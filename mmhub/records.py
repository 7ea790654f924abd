"""What records of plugins and registries share: names in one spelling, causes in one line, checked tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mmhub.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import msgspec

Record = dict[str, Any]
Watched = list[list[Any]]  # [path, mtime in ns]
T = TypeVar("T", bound="msgspec.Struct")

CORE = "mmhub"


def canonical(distribution: str) -> str:
    """Return a distribution's name the way package indexes compare it: `Mmhub_X` -> `mmhub-x`."""
    import re

    return re.sub(r"[-_.]+", "-", distribution).lower()


def cause(error: BaseException) -> str:
    """Return an exception as one short line: its type and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def decode_record(cls: type[T], table: Any, where: str) -> T:
    """Build the struct `cls` from plain data.

    Raises:
        UsageError: naming `where`, the key, and the nearest known key.
    """
    import msgspec

    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table, got {type(table).__name__}")
    check_keys(table, cls.__struct_encode_fields__, where)
    try:
        return msgspec.convert(table, cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).replace("`", "'").partition(" - at '$")
        raise UsageError(f"{where}{path.rstrip(chr(39))}: {message[:1].lower()}{message[1:]}") from None


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise UsageError for the first key of `table` that is not among `known`."""
    names = set(known)
    for key in table:
        if key not in names:
            hint = did_you_mean(key, names) or f"known keys: {', '.join(sorted(names))}"
            raise UsageError(f"{where}: unknown key {key!r}", hint)
