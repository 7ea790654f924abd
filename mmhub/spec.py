"""The records of which a plugin's manifest (`mmhub.toml`) is made. Reading manifests is left to `mmhub.discovery`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    import pluggy

API = 1  # the hook interface this core speaks; plugins declare theirs as `api`

__all__ = [
    "API",
    "Change",
    "CommandSpec",
    "ComponentSpec",
    "DataRequest",
    "DataSource",
    "Guard",
    "Manifest",
    "ModelSpec",
    "Refusal",
    "Tracker",
    "hookimpl",  # noqa: F822 - made on first use
]


class ComponentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part a plugin offers.

    `kind` is `<modality>_encoder`, `fusion`, `decoder` or `guard`; `factory` and `config` are `module:attribute`
    inside the plugin's own package; `schema` is the version of the component's configuration. `example` is a small
    configuration, with which `mmhub plugins check` builds the component; it may be left out where all keys have
    defaults.
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


class DataRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a data source is asked for.

    `find(path)` returns the absolute path of a local file or folder that the address names, looked for beside the
    recipe and then in the current folder, and notes it, so that the run records its hash; it raises NotFoundError with
    near misses where there is none. `split` is "train" or "validation", what the rows are wanted for; a source without
    splits ignores it.
    """

    address: str  # what follows "SCHEME:"
    split: str
    find: Callable[[str], Path]


class DataSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where rows come from when `train = "SCHEME:ADDRESS"` is written in a recipe (hook `mmhub_datasets`).

    `open` gives the rows in a fixed order, each a dict of column to value: text, number, bool, None, a list, or for
    media a path, bytes or `{bytes, path}`. It raises an error of `mmhub.errors` for an address it cannot read.
    """

    scheme: str  # two or more lower-case letters, digits, '+', '-' or '.', beginning with a letter
    open: Callable[[DataRequest], Iterable[Mapping[str, Any]]]
    summary: str = ""


class Tracker(Protocol):
    """What watches a training run (hook `mmhub_train_callbacks`); base classes are not needed.

    A method that fails costs one line on stderr, and the run goes on.
    """

    def on_start(self, run: Any) -> None:
        """Training begins or resumes."""

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Optimizer step `step` (from 1) is done; `metrics` is a flat dict name -> number."""

    def on_end(self, run: Any) -> None:
        """Training is over."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a guard refuses, and by which rule. Neither repeats what was said: both are logged.

    `beside` stands beside the reason in the answer, such as the scores of one that is withheld as uncertain.
    """

    reason: str
    rule: str = ""
    action: Literal["refused", "abstained"] = "refused"
    beside: Mapping[str, Any] = {}


class Change(msgspec.Struct, frozen=True):
    """A sample or an answer as a guard has changed it, and by which rule; the reason repeats nothing of what it was."""

    value: Mapping[str, Any]
    rule: str = ""
    reason: str = ""


class Guard(Protocol):
    """What stands between people and a model; base classes are not needed.

    Whatever goes wrong inside a guard refuses the sample: a guard that fails does not let through. What it refuses or
    changes is logged: the reason of a `Refusal` as it is, and not that of a text, which may repeat what was said.

    Besides what is below, a guard may have

    - `on`, a tuple of "input" and "output", both by default: where it watches. `rewrite` and `check` are called for
      inputs, `review` for outputs. Where no guard of a model watches outputs, texts are streamed as they are written.
    - `rewrite(sample) -> sample | Change`, called before its `check` and before later guards: the sample as it may
      reach the model, the same object if it stays as it is. A conversation is {"messages": [...]} there, and for
      `check` and `review` {"text": all that is said, ...}, where a guard watches inputs alone without what the model
      has said. `mmhub.guard.with_texts` changes texts of any shape.
    - `check_all(samples) -> list`, what `check` says of each of them, faster.
    - `media`, a tuple of modalities that it reads: of these it and the model get bytes that were read once, as
      {"bytes", "path"}, and an `InputError` about one is an error of the sample instead of a refusal.

    Guards come by the hook `mmhub_generation_guards`, for every model, or as components of the kind "guard", for models
    that name them: then a class with a `Config` is built as `cls(config, model=model, folder=folder)`, `folder` being
    that of the file which names it, or None.
    """

    name: str

    def check(self, sample: Mapping[str, Any]) -> str | Refusal:
        """Return why this sample (modality to raw input) must not be answered, or '' to let it pass."""

    def review(self, sample: Mapping[str, Any], answer: Mapping[str, Any]) -> Mapping[str, Any] | Change | Refusal:
        """Return the answer as it may be given: unchanged, or with something taken out or replaced; or a `Refusal`."""


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
