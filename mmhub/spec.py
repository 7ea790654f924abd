"""The records of which a plugin's manifest (`mmhub.toml`) is made. Reading manifests is left to `mmhub.discovery`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import pluggy

API = 1  # the hook interface this core speaks; plugins declare theirs as `api`

__all__ = ["API", "CommandSpec", "ComponentSpec", "Manifest", "ModelSpec", "hookimpl"]  # noqa: F822 - hookimpl is made on first use


class ComponentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part a plugin offers.

    `kind` is `<modality>_encoder`, `fusion` or `decoder`; `factory` and `config` are `module:attribute` inside the
    plugin's own package; `schema` is the version of the component's configuration. `example` is a small configuration,
    with which `mmhub plugins check` builds the component; it may be left out where all keys have defaults.
    """

    kind: str
    name: str
    factory: str
    config: str = ""
    schema: int = 1
    modalities: tuple[str, ...] = ()
    summary: str = ""
    example: dict[str, Any] = {}


class CommandSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command a plugin adds to the `mmhub` command line; `factory` names a click command, imported when it runs."""

    name: str
    factory: str
    summary: str = ""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model name a plugin, or a registry.toml, provides: a reference to a checkpoint, or a composition."""

    ref: str = ""
    compose: dict[str, Any] = {}
    commit: str = ""
    task: str = ""
    license: str = ""
    requires: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    summary: str = ""
    deprecated: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of a plugin's `mmhub.toml`."""

    api: int
    requires_mmhub: str = ""
    components: tuple[ComponentSpec, ...] = ()
    commands: tuple[CommandSpec, ...] = ()
    models: dict[str, ModelSpec] = {}
    hooks: tuple[str, ...] = ()


def __getattr__(name: str) -> pluggy.HookimplMarker:
    # pluggy costs 40 ms, and only plugins that implement a hook need the marker.
    if name == "hookimpl":
        import pluggy

        return pluggy.HookimplMarker("mmhub")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
