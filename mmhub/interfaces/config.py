"""Strict component configuration: frozen, keyword-only records whose unknown keys fail with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar, dataclass_transform

import msgspec

from mmhub.errors import UsageError, did_you_mean

T = TypeVar("T")

Width: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]  # for fields of a Config: a number of features, heads, layers
Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=1)]  # a share that is dropped


@dataclass_transform(frozen_default=True, kw_only_default=True)
class ComponentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a component's `Config`, which lives in the class it builds.

    Values are JSON: names and numbers, never import paths. Raise ValueError in `__post_init__` for a bad value.
    """

    @classmethod
    def arrange(cls, table: dict[str, Any]) -> dict[str, Any]:
        """Return a user's table in the shape of the fields. Override where a second way of writing it is welcome."""
        return table


def decode_config(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build `cls` from plain data, or raise UsageError naming `where`, the key, and the nearest known key.

    >>> class Config(ComponentConfig):
    ...     dim: int = 8
    >>> decode_config(Config, {"dmi": 4}, "model.fusion.config")
    Traceback (most recent call last):
    mmhub.errors.UsageError: model.fusion.config: unknown key 'dmi'; did you mean 'dim'?
    """
    table = cls.arrange(dict(table)) if issubclass(cls, ComponentConfig) else dict(table)
    try:
        return msgspec.convert(table, cls)
    except msgspec.ValidationError as error:
        raise _explain(cls, str(error), where, table) from None


def encode_config(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON data."""
    data = msgspec.to_builtins(config)
    assert isinstance(data, dict)
    return data


def _explain(cls: type, text: str, where: str, table: Any) -> UsageError:
    message, _, path = text.partition(" - at `$")
    steps = re.findall(r"\.([\w-]+)|\[(\.\.\.|\d+)\]", path.rstrip("`"))
    inside = _named_keys(cls, [name or index for name, index in steps], table)
    place = ".".join([where, *inside]) if inside else where
    unknown = re.search(r"unknown field `(.+?)`", message)
    if unknown:
        known = _fields_at(cls, inside)
        hint: str | None = did_you_mean(unknown[1], known) or f"known keys: {', '.join(sorted(known)) or 'none'}"
        return UsageError(f"{place}: unknown key {unknown[1]!r}", hint)
    missing = re.search(r"missing required field `(.+?)`", message)
    if missing:
        return UsageError(f"{place}: the key {missing[1]!r} is missing", f"add `{missing[1]} = ...`")
    choices = _choices_at(cls, inside)
    invalid = re.search(r"[Ii]nvalid enum value '(.*)'", message)
    hint = (did_you_mean(invalid[1], choices) if invalid and choices else None) or (
        f"choices: {', '.join(choices)}" if choices else None
    )
    return UsageError(f"{place}: {message[:1].lower()}{message[1:]}".replace("`", "'"), hint)


def _choices_at(cls: Any, path: list[str]) -> list[str]:
    """The texts that the field at `path` may hold, if there are only certain ones."""
    kind = msgspec.inspect.type_info(cls)
    for step in path:
        kind = _step(kind, step)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    return [str(value) for k in kinds if isinstance(k, msgspec.inspect.LiteralType) for value in k.values]


def _named_keys(cls: type, path: list[str], value: Any) -> list[str]:
    """msgspec writes `...` for a key of a mapping: put the key whose value is wrong in its place."""
    kind: Any = msgspec.inspect.type_info(cls)
    named = []
    for step in path:
        kind = _step(kind, step)
        if step == "..." and isinstance(value, Mapping):
            step = next((str(key) for key, item in value.items() if not _fits(item, _struct_in(kind))), step)
        named.append(step)
        value = value.get(step) if isinstance(value, Mapping) else None
    return named


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, msgspec.inspect.StructType):
        return True
    try:
        msgspec.convert(value, kind.cls)
    except msgspec.ValidationError:
        return False
    return True


def _fields_at(cls: Any, path: list[str]) -> list[str]:
    """The field names of the struct that `path` (keys and indices) leads to inside `cls`."""
    kind = msgspec.inspect.type_info(cls)
    for step in path:
        kind = _step(kind, step)
    kind = _struct_in(kind)
    return [field.encode_name for field in kind.fields] if isinstance(kind, msgspec.inspect.StructType) else []


def _struct_in(kind: Any) -> Any:
    if isinstance(kind, msgspec.inspect.UnionType):
        return next((t for t in kind.types if isinstance(t, msgspec.inspect.StructType)), kind)
    return kind


def _step(kind: Any, step: str) -> Any:
    kind = _struct_in(kind)
    if isinstance(kind, msgspec.inspect.StructType):
        return next((field.type for field in kind.fields if field.encode_name == step), kind)
    if isinstance(kind, msgspec.inspect.UnionType):
        return next((_step(t, step) for t in kind.types if hasattr(t, "value_type") or hasattr(t, "item_type")), kind)
    return getattr(kind, "value_type", None) or getattr(kind, "item_type", kind)
