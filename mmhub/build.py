"""Put a model together from named parts: fresh, from another checkpoint's parts, or from a library's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch

from mmhub.checkpoint import load_decoder, load_encoder, read_config
from mmhub.config import GuardRecipe, ModelRecipe, PartRecipe
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.guard import read_guards
from mmhub.hub.pull import find_pretrained, load, pull
from mmhub.interfaces import Encoder, Stream, Task, TextDecoder, decode_config, encode_config, find_task
from mmhub.lineage import parent_of
from mmhub.model import Columns, Model
from mmhub.names import resolve
from mmhub.plugins import Component
from mmhub.registry import find_component

Values = Callable[[str], Iterable[Any]]  # modality, or "target", to all its training values


def compose(
    task: str = "classification",
    *,
    encoders: Mapping[str, str | Mapping[str, Any]] | None = None,
    fusion: str | Mapping[str, Any] | None = None,
    decoder: str | Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    values: Mapping[str, Iterable[Any]] | None = None,
    texts: Iterable[str] | None = None,
    guards: Sequence[str | Mapping[str, Any]] = (),
    seed: int = 0,
) -> Model:
    """Compose a model by names, untrained apart from parts with `init`.

    A part is a component name or a mapping with `use`, `config`, `init`, `freeze`. `values` are training inputs by
    modality, from which processors that need it learn (a vocabulary, a scale); `texts` is short for those of text. A
    decoder that learns from targets wants its `config` complete, e.g. `{"labels": ["no", "yes"]}`. `guards` are names
    or mappings with `use` and `config`, as in a recipe.

    >>> compose(encoders={"image": {"use": "timm", "config": {"architecture": "resnet18"}}},
    ...         decoder={"use": "classification", "config": {"labels": ["cat", "dog"]}})  # doctest: +SKIP
    """
    table = {
        "encoders": {name: _as_part(part) for name, part in (encoders or {}).items()},
        "fusion": None if fusion is None else _as_part(fusion),
        "decoder": None if decoder is None else _as_part(decoder),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
    }
    recipe = decode_config(ModelRecipe, table, "compose")
    given = dict(values or {}) | ({} if texts is None else {"text": list(texts)})
    said = ({"role": "user", "content": text} for text in given.get("text", ()))
    given.setdefault("messages", [[message] for message in said])
    model = build_model(find_task(task), recipe, lambda name: given.get(name, ()), seed=seed)
    tables = [{"use": guard} if isinstance(guard, str) else dict(guard) for guard in guards]
    add_guards(model, [decode_config(GuardRecipe, table, "compose: guards") for table in tables])
    return model


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

    `folder` is where relative paths in `init` and of the tokenizer start from.
    """
    torch.manual_seed(seed)
    recipe = msgspec.structs.replace(recipe, tokenizer=_tokenizer_beside(recipe.tokenizer, folder))
    if recipe.base:
        return _from_base(task, recipe, values, columns, folder)
    parts = _encoder_parts(task, recipe)
    if not parts and not reads_text_itself(task, recipe, folder):
        raise UsageError("the recipe names no encoder", "add [model.encoders.text], .image or .audio")
    encoders: dict[str, Encoder] = {}
    sources: dict[str, Component] = {}
    parents: list[dict[str, str]] = []
    words = _decoder_component(task, recipe, folder).load().marks_words
    for modality, part in parts.items():
        role, given = f"{modality}_encoder", _inputs_of(task, values)
        encoders[modality], sources[role], origin = _encoder(modality, part, recipe, given, folder, words)
        if origin is not None:
            parents.append(parent_of(resolve(local_name(part.init, folder)), origin, role))
    known = {*encoders, *(("text",) if reads_text_itself(task, recipe, folder) else ())}
    missing = [m for m in task.required if m not in known]
    if missing:
        raise UsageError(f"{task.name} needs the modality {missing[0]!r}", f"add [model.encoders.{missing[0]}]")
    streams = {modality: encoder.stream for modality, encoder in encoders.items()}
    fusion, decoder, origin = _fusion_and_decoder(task, recipe, values, folder, streams, sources)
    if origin is not None:
        assert recipe.decoder is not None
        parents.append(parent_of(resolve(local_name(recipe.decoder.init, folder)), origin, "decoder"))
    decoder.tie(encoders)
    if decoder.marks_words:
        _mark_words(encoders["text"].processor)
    model = Model(task, encoders, fusion, decoder, sources, columns)
    model.parents = parents
    _adapt(model, parts, recipe.decoder, folder)
    for modality, part in parts.items():
        if part.freeze:
            model.freeze(modality)
    if recipe.decoder is not None and recipe.decoder.freeze:
        decoder.requires_grad_(False)
    return model


def add_guards(model: Model, tables: Sequence[GuardRecipe], folder: Path | None = None) -> None:
    """Let guards {use, config} watch a model besides its own, and be saved with it; none stands there twice.

    Raises:
        PluginError, NotFoundError: nobody provides a guard. UsageError: its configuration is wrong.
    """
    known = [source.record for source in model.guards]
    model.guards = model.guards + [one for one in read_guards(tables, "recipe", folder) if one.record not in known]


def reads_text_itself(task: Task, recipe: ModelRecipe, folder: Path | None) -> bool:
    """Does the decoder read the text of a sample itself?"""
    found: bool = _decoder_component(task, recipe, folder).load().reads_text
    return found


def _decoder_component(task: Task, recipe: ModelRecipe, folder: Path | None) -> Component:
    """The decoder's component: the one that is named, or that of the checkpoint it starts from, or the task's."""
    part = recipe.decoder or PartRecipe()
    if part.init and not part.use:
        kind, path, _ = find_pretrained(local_name(part.init, folder))
        record = read_config(path).components.get("decoder") if kind == "mmhub" else None
        if record is not None:
            return find_component("decoder", record.use)
    return find_component("decoder", part.use or task.decoder)


def _encoder_parts(task: Task, recipe: ModelRecipe) -> dict[str, PartRecipe]:
    """The encoders to build; a pretrained sequence-to-sequence decoder without any brings its own model's."""
    decoder = recipe.decoder
    whole = decoder is not None and decoder.use.rpartition("/")[2] == "transformers-seq2seq"
    if recipe.encoders or not whole or task.required != ("text",):
        return recipe.encoders
    assert decoder is not None
    shared = {key: value for key, value in decoder.config.items() if key == "config"}
    return {"text": PartRecipe(use="transformers", init=decoder.init, config=shared, lora=decoder.lora)}


def _inputs_of(task: Task, values: Values) -> Values:
    """What processors learn from; where a text is turned into another, both share one vocabulary."""
    if task.name != "translation":
        return values
    return lambda name: chain(values("text"), values("target")) if name == "text" else values(name)


def _fusion_and_decoder(
    task: Task,
    recipe: ModelRecipe,
    values: Values,
    folder: Path | None,
    streams: Mapping[str, Stream],
    sources: dict[str, Component],
) -> tuple[Any, Any, Path | None]:
    """Build both; a decoder that reads text comes first, for it is its embeddings that the fusion joins with others."""
    component = _decoder_component(task, recipe, folder)
    if component.load().reads_text:
        if "text" in streams:
            raise UsageError(f"{component.id} reads the text itself", "remove [model.encoders.text]")
        decoder, sources["decoder"], origin = _decoder(task, recipe, values, {}, folder)
        fusion, sources["fusion"] = _fusion(recipe, {**streams, "text": Stream(decoder.dim)}, "interleave")
        return fusion, decoder, origin
    fusion, sources["fusion"] = _fusion(
        recipe, streams, task.fusion or ("streams" if len(streams) == 1 else "attention")
    )
    decoder, sources["decoder"], origin = _decoder(task, recipe, values, fusion.outputs, folder)
    return fusion, decoder, origin


def _mark_words(processor: Any) -> None:
    """Let the text processor mark where words begin, for a decoder that answers about them."""
    if not hasattr(processor, "words"):
        raise UsageError(f"the text encoder's {type(processor).__name__} cannot mark words", "use another text encoder")
    processor.words = True


def _adapt(
    model: Model,
    parts: Mapping[str, PartRecipe],
    decoder: PartRecipe | None,
    folder: Path | None,
    base: str = "",
) -> None:
    """Give the parts that ask for it low-rank adapters; `base` is the name of the whole model they are for, if any."""
    wanted = {f"{modality}_encoder": part for modality, part in parts.items()} | (
        {"decoder": decoder} if decoder is not None else {}
    )
    for role, part in wanted.items():
        if part.lora is None:
            continue
        if part.freeze:
            where = "model.decoder" if role == "decoder" else f"model.encoders.{role.removesuffix('_encoder')}"
            raise UsageError(f"{where}: freeze and lora are both given", "with lora the weights are frozen anyway")
        from mmhub.adapters import apply_lora

        apply_lora(model, role, part.lora, local_name(part.init, folder) if part.init else base)


def _from_base(task: Task, recipe: ModelRecipe, values: Values, columns: Columns | None, folder: Path | None) -> Model:
    """A published model to go on with; its encoders may be frozen, and a new decoder may replace its own."""
    own = any(part.use or part.config or part.init for part in recipe.encoders.values())
    if own or recipe.fusion or recipe.tokenizer:
        raise UsageError(
            "model.base brings its own encoders, tokenizer and fusion",
            "keep only freeze, lr_multiplier and layer_decay there",
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
    new = recipe.decoder is not None and (recipe.decoder.use or recipe.decoder.config or recipe.decoder.init)
    if new:
        model.decoder, model.sources["decoder"], _ = _decoder(task, recipe, values, model.fusion.outputs, folder)
        if model.decoder.marks_words:
            _mark_words(model.processors["text"])
    elif task.name not in model.decoder.tasks:
        raise UsageError(
            f"the decoder of {recipe.base!r}, {model.sources['decoder'].id}, does not serve the task {task.name!r}",
            f'give it a new one: [model.decoder] use = "{task.decoder}"',
        )
    unknown = [m for m in (columns.inputs if columns else ()) if m not in model.modalities]
    if unknown:
        raise UsageError(
            f"data.inputs feeds {unknown[0]!r}, and {recipe.base!r} has no such encoder",
            f"it has {', '.join(model.modalities)}",
        )
    model.columns = columns or model.columns
    _adapt(model, recipe.encoders, None if new else recipe.decoder, folder, base=name)
    if recipe.decoder is not None and recipe.decoder.freeze:
        model.decoder.requires_grad_(False)
    return model


def _encoder(
    modality: str, part: PartRecipe, recipe: ModelRecipe, values: Values, folder: Path | None, words: bool
) -> tuple[Encoder, Component, Path | None]:
    """An encoder, the component it was built from, and the folder or file its weights came from.

    `words`: the text processor has to mark where words begin.
    """
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
    if words and modality == "text":
        _mark_words(processor)
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


def _fusion(recipe: ModelRecipe, streams: Mapping[str, Any], default: str) -> tuple[Any, Component]:
    part = recipe.fusion or PartRecipe(use=default)
    _no_init(part, "model.fusion")
    component = find_component("fusion", part.use or default)
    cls: Any = component.load()
    config = decode_config(cls.Config, part.config, "model.fusion.config")
    return cls(config, streams), component


def _decoder(
    task: Task, recipe: ModelRecipe, values: Values, streams: Mapping[str, Any], folder: Path | None
) -> tuple[Any, Component, Path | None]:
    """A decoder, the component it was built from, and the folder or file its weights came from."""
    part = recipe.decoder or PartRecipe(use=task.decoder)
    kind, path, _ = find_pretrained(local_name(part.init, folder)) if part.init else ("", None, None)
    if kind == "mmhub":
        assert path is not None
        decoder, component = load_decoder(path, streams)
        _check_decoder(task, type(decoder), component)
        if decoder.reads_text and not task.reads_text:
            _with_template(decoder.processor)
        return decoder, component, path
    component = find_component("decoder", part.use or task.decoder)
    cls: Any = component.load()
    _check_decoder(task, cls, component)
    config = decode_config(cls.Config, part.config, "model.decoder.config")
    if path is not None:
        decoder = cls.from_library(config, path, streams, recipe.tokenizer)
        if isinstance(decoder, TextDecoder):
            _with_ends(decoder.processor)
        if cls.reads_text and not task.reads_text:
            _with_template(decoder.processor)
        return decoder, component, path
    if not issubclass(cls, TextDecoder):
        return cls(cls.fit(config, values("target")), streams), component, None
    processor = cls.make_processor(config, recipe.tokenizer)
    if cls.reads_text and not task.reads_text:
        _with_template(processor)
    if processor.needs_fit:
        texts = values("text") if cls.reads_text else values("target")
        if cls.reads_text and not task.reads_text:
            texts = map(processor.layout, values("messages"))
        if not cls.reads_text and task.name == "translation":
            texts = chain(values("text"), texts)
        processor.fit(_not_empty(texts, "text"))
    _with_ends(processor)
    return cls(config, streams, processor), component, None


def _with_template(processor: Any) -> None:
    """Let the tokenizer of a model that answers lay out conversations, in the plain layout if it knows none."""
    if not processor.chat_template:
        processor.take_template("plain")


def _with_ends(processor: Any) -> None:
    """Let documents end with the end token, if there is one: the model is trained on whole ones now."""
    processor.ends = processor.end_id is not None


def _check_decoder(task: Task, decoder: Any, component: Component) -> None:
    if task.name not in decoder.tasks:
        hint = did_you_mean(task.name, decoder.tasks) or f"it serves {', '.join(decoder.tasks)}"
        raise UsageError(f"the decoder {component.id} does not serve the task {task.name!r}", hint)


def _no_init(part: PartRecipe, where: str) -> None:
    if part.init or part.freeze or part.lora:
        raise UsageError(f"{where}: init, freeze and lora are for encoders and decoders", "leave them out")


def _tokenizer_beside(table: dict[str, Any] | None, folder: Path | None) -> dict[str, Any] | None:
    """A tokenizer's table with the files that it names, a tokenizer and a chat template, found beside the recipe."""
    if table is None or folder is None:
        return table
    found = dict(table)
    for key in ("name", "chat_template"):
        text = table.get(key)
        path = folder / text if isinstance(text, str) and text else None
        if path is not None and (path.exists() if key == "name" else path.suffix and path.is_file()):
            found[key] = str(path.resolve())
    return found


def local_name(name: str, folder: Path | None) -> str:
    """A relative path beside the recipe wins over one from the current folder."""
    if folder and name.startswith(("./", "../")) and (folder / name.partition("#")[0]).exists():
        return str((folder / name.partition("#")[0]).resolve()) + "".join(name.partition("#")[1:])
    return name
