"""Put a model together from named parts: fresh, from another checkpoint's parts, or from a library's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmhub.checkpoint import load_encoder
from mmhub.config import ModelRecipe, PartRecipe
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.hub.pull import find_pretrained, load, pull
from mmhub.interfaces import Encoder, Task, decode_config, encode_config, find_task
from mmhub.lineage import parent_of
from mmhub.model import Columns, Model
from mmhub.names import resolve
from mmhub.plugins import Component
from mmhub.registry import find_component

Values = Callable[[str], Iterable[Any]]  # modality, or "target", to all its training values


def compose(
    task: str = "classification",
    *,
    encoders: Mapping[str, str | Mapping[str, Any]],
    fusion: str | Mapping[str, Any] | None = None,
    decoder: str | Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    values: Mapping[str, Iterable[Any]] | None = None,
    texts: Iterable[str] | None = None,
    seed: int = 0,
) -> Model:
    """Compose a model by names, untrained apart from parts with `init`.

    A part is a component name or a mapping with `use`, `config`, `init`, `freeze`. `values` are training inputs by
    modality, from which processors that need it learn (a vocabulary, a scale); `texts` is short for those of text. A
    decoder that learns from targets wants its `config` complete, e.g. `{"labels": ["no", "yes"]}`.

    >>> compose(encoders={"image": {"use": "timm", "config": {"architecture": "resnet18"}}},
    ...         decoder={"use": "classification", "config": {"labels": ["cat", "dog"]}})  # doctest: +SKIP
    """
    table = {
        "encoders": {name: _as_part(part) for name, part in encoders.items()},
        "fusion": None if fusion is None else _as_part(fusion),
        "decoder": None if decoder is None else _as_part(decoder),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
    }
    recipe = decode_config(ModelRecipe, table, "compose")
    given = dict(values or {}) | ({} if texts is None else {"text": list(texts)})
    return build_model(find_task(task), recipe, lambda name: given.get(name, ()), seed=seed)


def _as_part(part: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"use": part} if isinstance(part, str) else dict(part)


def build_model(
    task: Task,
    recipe: ModelRecipe,
    values: Values,
    *,
    columns: Columns | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> Model:
    """Build the model a recipe describes; `values` gives the training data that tokenizers and label lists come from.

    `folder` is where relative paths in `init` start from.
    """
    torch.manual_seed(seed)
    if recipe.base:
        return _from_base(task, recipe, values, columns, folder)
    if not recipe.encoders:
        raise UsageError("the recipe names no encoder", "add [model.encoders.text], .image or .audio")
    encoders: dict[str, Encoder] = {}
    sources: dict[str, Component] = {}
    parents: list[dict[str, str]] = []
    for modality, part in recipe.encoders.items():
        role = f"{modality}_encoder"
        encoders[modality], sources[role], origin = _encoder(modality, part, recipe, values, folder)
        if origin is not None:
            parents.append(parent_of(resolve(local_name(part.init, folder)), origin, role))
    missing = [m for m in task.required if m not in encoders]
    if missing:
        raise UsageError(f"{task.name} needs the modality {missing[0]!r}", f"add [model.encoders.{missing[0]}]")
    streams = {modality: encoder.stream for modality, encoder in encoders.items()}
    fusion, sources["fusion"] = _fusion(recipe, streams)
    decoder, sources["decoder"] = _decoder(task, recipe, values, fusion.outputs)
    model = Model(task, encoders, fusion, decoder, sources, columns)
    model.parents = parents
    for modality, part in recipe.encoders.items():
        if part.freeze:
            model.freeze(modality)
    return model


def _from_base(task: Task, recipe: ModelRecipe, values: Values, columns: Columns | None, folder: Path | None) -> Model:
    """A published model to go on with; its encoders may be frozen, and a new decoder may replace its own."""
    own = any(part.use or part.config or part.init for part in recipe.encoders.values())
    if own or recipe.fusion or recipe.tokenizer:
        raise UsageError(
            "model.base brings its own encoders, tokenizer and fusion", "keep only freeze and lr_multiplier there"
        )
    name = local_name(recipe.base, folder)
    model = load(name)
    model.parents = [parent_of(resolve(name), pull(name), "model")]
    model.task = task
    for modality, part in recipe.encoders.items():
        if modality not in model.encoders:
            raise UsageError(f"{recipe.base!r} has no {modality!r} encoder", f"it has {', '.join(model.encoders)}")
        if part.freeze:
            model.freeze(modality)
    if recipe.decoder:
        model.decoder, model.sources["decoder"] = _decoder(task, recipe, values, model.fusion.outputs)
    elif task.name not in model.decoder.tasks:
        raise UsageError(
            f"the decoder of {recipe.base!r}, {model.sources['decoder'].id}, does not serve the task {task.name!r}",
            f'give it a new one: [model.decoder] use = "{task.decoder}"',
        )
    unknown = [m for m in (columns.inputs if columns else ()) if m not in model.encoders]
    if unknown:
        raise UsageError(
            f"data.inputs feeds {unknown[0]!r}, and {recipe.base!r} has no such encoder",
            f"it has {', '.join(model.encoders)}",
        )
    model.columns = columns or model.columns
    return model


def _encoder(
    modality: str, part: PartRecipe, recipe: ModelRecipe, values: Values, folder: Path | None
) -> tuple[Encoder, Component, Path | None]:
    """An encoder, the component it was built from, and the folder or file its weights came from."""
    where = f"model.encoders.{modality}"
    if not part.use and not part.init:
        raise UsageError(f"{where}: the key 'use' is missing", "name a component, see `mmhub plugins ls`")
    kind, path, role = find_pretrained(local_name(part.init, folder)) if part.init else ("", None, None)
    if kind == "mmhub":
        assert path is not None
        return *_from_checkpoint(modality, part, path, role, where), path
    if not part.use:
        raise UsageError(
            f"{where}: {part.init!r} is no mmhub checkpoint, and the key 'use' is missing",
            "name the component that reads it, see `mmhub plugins ls`",
        )
    component = find_component(f"{modality}_encoder", part.use)
    cls: Any = component.load()
    config = decode_config(cls.Config, part.config, f"{where}.config")
    if path is not None:
        return cls.from_library(config, path, recipe.tokenizer), component, path
    processor = cls.make_processor(config, recipe.tokenizer)
    if processor.needs_fit:
        processor.fit(_not_empty(values(modality), modality))
    return cls(config, processor), component, None


def _not_empty(values: Iterable[Any], modality: str) -> Iterable[Any]:
    values = [value for value in values if value is not None]
    if not values:
        raise InputError(f"no training {modality} to fit the {modality} processor on", "give training data")
    return values


def _from_checkpoint(
    modality: str, part: PartRecipe, path: Path, role: str | None, where: str
) -> tuple[Encoder, Component]:
    role = role or f"{modality}_encoder"
    encoder, component = load_encoder(path, role if role.endswith("_encoder") else f"{role}_encoder")
    if component.spec.kind != f"{modality}_encoder":
        raise UsageError(f"{where}: init holds an {component.spec.kind}, {component.id}", "name another component")
    if part.use and part.use not in (component.spec.name, component.id):
        raise UsageError(
            f"{where}: init holds a {component.id}, not a {part.use}", f'set use = "{component.spec.name}"'
        )
    saved = encode_config(encoder.config)
    wanted = encode_config(decode_config(type(encoder.config), saved | part.config, f"{where}.config"))
    for key in (key for key in part.config if wanted[key] != saved[key]):
        raise UsageError(
            f"{where}.config.{key} is {part.config[key]!r}, but init has {saved[key]!r}",
            "leave config out: the checkpoint's own is used",
        )
    return encoder, component


def _fusion(recipe: ModelRecipe, streams: Mapping[str, Any]) -> tuple[Any, Component]:
    part = recipe.fusion or PartRecipe(use="streams" if len(streams) == 1 else "attention")
    _no_init(part, "model.fusion")
    component = find_component("fusion", part.use or "attention")
    cls: Any = component.load()
    config = decode_config(cls.Config, part.config, "model.fusion.config")
    return cls(config, streams), component


def _decoder(task: Task, recipe: ModelRecipe, values: Values, streams: Mapping[str, Any]) -> tuple[Any, Component]:
    part = recipe.decoder or PartRecipe(use=task.decoder)
    _no_init(part, "model.decoder")
    component = find_component("decoder", part.use or task.decoder)
    cls: Any = component.load()
    _check_decoder(task, cls, component)
    config = decode_config(cls.Config, part.config, "model.decoder.config")
    config = cls.fit(config, values("target"))
    return cls(config, streams), component


def _check_decoder(task: Task, decoder: Any, component: Component) -> None:
    if task.name not in decoder.tasks:
        hint = did_you_mean(task.name, decoder.tasks) or f"it serves {', '.join(decoder.tasks)}"
        raise UsageError(f"the decoder {component.id} does not serve the task {task.name!r}", hint)


def _no_init(part: PartRecipe, where: str) -> None:
    if part.init or part.freeze:
        raise UsageError(f"{where}: init and freeze are for encoders", "use model.base to go on with a whole model")


def local_name(name: str, folder: Path | None) -> str:
    """A relative path beside the recipe wins over one from the current folder."""
    if folder and name.startswith(("./", "../")) and (folder / name.partition("#")[0]).exists():
        return str((folder / name.partition("#")[0]).resolve()) + "".join(name.partition("#")[1:])
    return name
