"""Recipes: the strict TOML description of a training run, its overrides, and its resolved form."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from mmhub.errors import InputError, NotFoundError, UsageError, did_you_mean


class _Table(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of a recipe: unknown keys are errors."""


class LoraRecipe(_Table):
    """Low-rank adapters (Hu et al., arXiv:2106.09685): they alone are trained of a part that wraps transformers.

    `targets` names the layers that get one, by the end of their names; none = the library's choice for the model.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = []


class PartRecipe(_Table):
    """One component: `use` names it, `config` is its own configuration, `init` a source of pretrained weights.

    `layer_decay` is an encoder's: layer l, of which 0 stands before all L blocks and 1 is the first, learns at
    `layer_decay` ** (L + 1 - l) times the rate of what follows them.
    """

    use: str = ""
    config: dict[str, Any] = {}
    init: str = ""
    freeze: bool = False
    lr_multiplier: float = 1.0
    layer_decay: float = 1.0
    lora: LoraRecipe | None = None


class ModelRecipe(_Table):
    """The parts of a model; or `base`, the name of a published model to go on training."""

    base: str = ""
    encoders: dict[str, PartRecipe] = {}
    fusion: PartRecipe | None = None
    decoder: PartRecipe | None = None
    tokenizer: dict[str, Any] | None = None


Source = str | list[str] | dict[str, str]


class MixRecipe(_Table):
    """One of several streamed sources; rows are drawn from it in proportion to `weight`."""

    source: Source
    weight: float = 1.0


class DataRecipe(_Table):
    """Where rows come from and which column feeds which modality.

    `valid_fraction` splits a validation set off the training rows when `valid` is not given. `stream` reads the
    training rows in passing instead of by position, shuffled among `shuffle_rows` neighbours; `mix` streams several.
    For a language model `document` says what one text is: "row", "file" (all rows, each a line), "blank-line"
    (rows up to an empty one), or a regular expression that begins with "^" and finds the first line of each; none says
    it is as for `model.base`, else a row.
    """

    train: Source = ""
    mix: list[MixRecipe] = []
    stream: bool = False
    shuffle_rows: int = 10_000
    valid: Source = ""
    valid_fraction: float = 0.0
    inputs: dict[str, str] = {}  # a list of columns, or "a+b", makes one input of several, such as a pair of texts
    target: str = ""
    columns: list[str] = []
    document: str = ""
    on_error: Literal["stop", "skip"] = "stop"
    allow_urls: bool | list[str] = False  # or the hosts that may be fetched from, as `Policy.hosts` says
    noise: str = ""  # folder of recordings for encoders that add noise in training
    workers: int | Literal["auto"] = "auto"


class StageData(_Table):
    """What a stage trains or validates on, where it is not what `[data]` says; `train` and `mix` replace both there."""

    train: Source = ""
    mix: list[MixRecipe] = []
    valid: Source = ""


class StageRecipe(_Table):
    """A stage of training: `parts` learn, "fusion", "decoder" and encoders by modality, and all others are frozen.

    `name` is what people and its folder call it, none is that of its parts. The other keys are as in `[train]`, for
    what the stage does differently.
    """

    parts: list[str] = []
    name: str = ""
    data: StageData | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | Literal["auto"] | None = None
    batch_tokens: int | None = None
    accumulate: int | None = None
    optimizer: Literal["adamw", "muon", "sgd"] | None = None
    learning_rate: float | None = None
    min_learning_rate: float | None = None
    schedule: Literal["cosine", "inverse-sqrt", "constant"] | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    ema: float | None = None
    activation_checkpointing: bool | None = None
    eval_every: int | None = None
    patience: int | None = None


class TrainRecipe(_Table):
    """The training loop. Steps are optimizer steps; `warmup` below 1 is a share of them, else their number.

    Batches are global: with several processes each gets its share of every batch, so that their number changes no
    result. `batch_size = "auto"` is 64 rows, computed in as many pieces as the memory asks for.
    """

    epochs: int = 5
    max_steps: int = 0  # 0 = no limit besides epochs
    batch_size: int | Literal["auto"] = 32  # rows; with batch_tokens their largest number
    batch_tokens: int = 0  # padded tokens of all modalities per batch, 0 = batches of batch_size rows
    block_size: int = 0  # tokens a language model predicts in one row of a batch, 0 = its context, or 64 for recurrent
    group_by_length: bool = True  # batch rows of like length together
    accumulate: int = 1  # batches per optimizer step
    cached_rows: int = 0  # rows of a contrastive batch that are computed at once, 0 = all
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    schedule: Literal["cosine", "inverse-sqrt", "constant"] = "cosine"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0 = off
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which the shares of two mixed pictures are drawn, 0 = off
    cutmix: float = 0.0  # the same where a box of one picture is put into another; with both, each has half the batches
    ema: float = 0.0  # decay of the average of the weights that is evaluated and saved, 0 = off
    unimodal_loss: float = 0.5  # share of a mixing fusion's loss that comes from each modality alone
    precision: Literal["auto", "fp32", "bf16", "bf16-pure"] = "auto"
    device: str = "auto"
    compile: Literal["off", "blocks", "model"] = "off"
    activation_checkpointing: bool = False
    fp8: bool = False  # matrix products of large layers in 8 bits, through torchao
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # how several processes share the work; auto = ddp
    cache_features: bool = True  # compute a frozen encoder's features once
    cache_gb: float = 20.0  # GB on disk that all cached features together may take
    profile: int = 0  # optimizer steps to trace, 0 = off
    eval_every: int = 0  # optimizer steps, 0 = once an epoch
    patience: int = 0  # evaluations without improvement before stopping, 0 = never
    checkpoint_every: int = 500  # optimizer steps between resumable checkpoints
    keep: int = 2  # resumable checkpoints kept
    log_every: int = 10  # optimizer steps
    stages: list[StageRecipe] = []  # one after the other, each from the best model of the one before


class CardRecipe(_Table):
    """What the model card says beyond what training knows; without the statements, sentences from what it knows."""

    license: str = ""
    summary: str = ""
    intended_use: str = ""
    limits: str = ""
    training_data: str = ""
    language: list[str] = []
    datasets: list[str] = []


class GuardRecipe(_Table):
    """A guard around the model's answers: `use` names it, `config` is its own configuration."""

    use: str = ""
    config: dict[str, Any] = {}


class Recipe(_Table):
    """A whole recipe."""

    task: str
    seed: int = 0
    guards: list[GuardRecipe] = []
    model: ModelRecipe = msgspec.field(default_factory=ModelRecipe)
    data: DataRecipe = msgspec.field(default_factory=DataRecipe)
    train: TrainRecipe = msgspec.field(default_factory=TrainRecipe)
    card: CardRecipe = msgspec.field(default_factory=CardRecipe)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check the recipe at `path`, with `key.path=value` overrides applied.

    Raises:
        NotFoundError, InputError, UsageError: each names the file and, where there is one, the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise NotFoundError(f"no recipe '{path}'", did_you_mean(path.name, near) or "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe '{path}': {getattr(error, 'strerror', None) or error}") from None
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    return check_recipe(table, str(path))


def override_recipe(recipe: Recipe | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as plain data, with overrides applied; a `Recipe` is copied first."""
    table = msgspec.to_builtins(recipe if isinstance(recipe, Recipe) else dict(recipe))
    for override in overrides:
        apply_override(table, override)
    return check_recipe(table)


def check_recipe(table: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Turn plain data into a checked `Recipe`."""
    from mmhub.interfaces.config import decode_config
    from mmhub.interfaces.task import find_task

    _decode_stages(table, where)
    recipe = decode_config(Recipe, _join_columns(table, where), where)
    paired = find_task(recipe.task).paired
    _check_ranges(recipe, where)
    _check_contrastive(recipe.train, recipe.task, paired, where)
    for number, stage in enumerate(recipe.train.stages, 1):
        place = f"{where}: train.stages {number}"
        _check_stage(stage, recipe.model, place)
        alone = stage_recipe(recipe, number)
        _check_ranges(alone, place)
        _check_contrastive(alone.train, recipe.task, paired, place)
    return recipe


# -- stages -----------------------------------------------------------------------------------------------------


def stage_name(stage: StageRecipe) -> str:
    """What a stage is called."""
    return stage.name or "+".join(stage.parts)


def stage_recipe(recipe: Recipe, number: int) -> Recipe:
    """The recipe of stage `number`, from 1, by itself: what it changes is changed, and no other stage is in it."""
    stage, replace = recipe.train.stages[number - 1], msgspec.structs.replace
    keys = [key for key in StageRecipe.__struct_fields__ if key not in ("parts", "name", "data")]
    changes: dict[str, Any] = {key: value for key in keys if (value := getattr(stage, key)) is not None}
    data, own = recipe.data, stage.data or StageData()
    if own.train or own.mix:
        data = replace(data, train=own.train, mix=own.mix)
    if own.valid:
        data = replace(data, valid=own.valid, valid_fraction=0.0)
    return replace(recipe, data=data, train=replace(recipe.train, **changes, stages=[stage]))


def check_parts(stage: StageRecipe, known: Sequence[str], where: str) -> None:
    """Raise UsageError for a part that the model, which has the `known` ones, lacks."""
    for part in stage.parts:
        if part not in known:
            hint = did_you_mean(part, known) or f"they are {', '.join(known)}"
            raise UsageError(f"{where}: this model has no part {part!r}", hint)


def _decode_stages(table: Mapping[str, Any], where: str) -> None:
    """Try each stage by itself first, for an error inside a list does not say which of it is wrong."""
    from mmhub.interfaces.config import decode_config

    train = table.get("train")
    stages = train.get("stages") if isinstance(train, Mapping) else None
    for number, stage in enumerate(stages if isinstance(stages, (list, tuple)) else (), 1):
        if isinstance(stage, Mapping):
            decode_config(StageRecipe, stage, f"{where}: train.stages {number}")


def _check_stage(stage: StageRecipe, model: ModelRecipe, where: str) -> None:
    """Check what can be said of a stage before a model is built; `check_parts` does the rest."""
    if not stage.parts:
        raise UsageError(f"{where} names no parts", 'say what learns in it, such as parts = ["fusion", "decoder"]')
    if model.encoders and not model.base:
        check_parts(stage, [*model.encoders, "fusion", "decoder"], where)
    frozen = [name for name, part in model.encoders.items() if part.freeze]
    frozen += ["decoder"] if model.decoder is not None and model.decoder.freeze else []
    for part in set(frozen) & set(stage.parts):
        place = "model.decoder" if part == "decoder" else f"model.encoders.{part}"
        raise UsageError(
            f"{where} trains {part!r}, and {place} has freeze = true", "remove it: what a stage does not name is frozen"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", stage_name(stage)):
        raise UsageError(f"{where}: {stage_name(stage)!r} cannot name a folder", "use letters, digits, '-' and '+'")


_AT_LEAST_ONE = ("epochs", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every")
_NOT_NEGATIVE = (
    "learning_rate", "min_learning_rate", "warmup", "weight_decay", "clip_norm", "max_steps", "patience", "eval_every",
    "batch_tokens", "block_size", "cache_gb", "profile", "mixup", "cutmix", "cached_rows",
)  # fmt: skip


def _join_columns(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Write several columns of one input as `mmhub.data.cells` does: "premise+hypothesis"."""
    data = table.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("inputs"), Mapping):
        return dict(table)
    for m, c in data["inputs"].items():
        if _are_texts(c) and len(c) > (2 if m == "text" else 1):
            problem = f"{where}: data.inputs.{m} names {len(c)} columns"
            raise UsageError(problem, "name two for a pair of texts" if m == "text" else "name one, only texts pair up")
    inputs = {m: "+".join(c) if _are_texts(c) else c for m, c in data["inputs"].items()}
    return {**table, "data": {**data, "inputs": inputs}}


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, str) for part in value)


def _check_ranges(recipe: Recipe, where: str) -> None:
    train, data = recipe.train, recipe.data
    at_least_one = {f"train.{key}": getattr(train, key) for key in _AT_LEAST_ONE} | {
        "data.shuffle_rows": data.shuffle_rows
    }
    for key, value in at_least_one.items():
        if value != "auto" and value < 1:
            raise UsageError(f"{where}: {key} is {value}", "it must be at least 1")
    not_negative = {f"train.{key}": getattr(train, key) for key in _NOT_NEGATIVE} | {"seed": recipe.seed}
    not_negative |= {f"model.encoders.{m}.lr_multiplier": p.lr_multiplier for m, p in recipe.model.encoders.items()}
    if data.workers != "auto":
        not_negative["data.workers"] = data.workers
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"{where}: {key} is {value}", "it must be finite and not negative")
    if not 0 <= data.valid_fraction < 1:
        raise UsageError(f"{where}: data.valid_fraction is {data.valid_fraction}", "it must be in [0, 1)")
    if not 0 <= train.unimodal_loss < 1:
        raise UsageError(f"{where}: train.unimodal_loss is {train.unimodal_loss}", "it must be in [0, 1)")
    if not 0 <= train.ema < 1:
        raise UsageError(f"{where}: train.ema is {train.ema}", "it must be in [0, 1), such as 0.999")
    for modality, encoder in recipe.model.encoders.items():
        if not 0 < encoder.layer_decay <= 1:
            problem = f"{where}: model.encoders.{modality}.layer_decay is {encoder.layer_decay}"
            raise UsageError(problem, "it must be above 0 and at most 1, such as 0.75")
    for role in ("fusion", "decoder"):
        if (getattr(recipe.model, role) or PartRecipe()).layer_decay != 1:
            raise UsageError(f"{where}: model.{role}.layer_decay is given", "it is for encoders, leave it out")
    if data.mix and data.train:
        raise UsageError(f"{where}: data.train and data.mix are both given", "keep one")
    for number, part in enumerate(data.mix, 1):
        if not 0 < part.weight < math.inf:
            raise UsageError(f"{where}: the weight of data.mix {number} is {part.weight}", "it must be above 0")
    if train.schedule == "inverse-sqrt" and not train.warmup:
        problem = f'{where}: train.schedule = "inverse-sqrt" falls from the end of the warm-up, and there is none'
        raise UsageError(problem, "set train.warmup")
    if train.batch_tokens and train.batch_size == "auto":
        raise UsageError(f'{where}: train.batch_tokens and batch_size = "auto" are both given', "keep one")
    if data.valid and data.valid_fraction:
        raise UsageError(f"{where}: data.valid and data.valid_fraction are both given", "keep one")


def _check_contrastive(train: TrainRecipe, task: str, paired: bool, where: str) -> None:
    """Rows that are each other's wrong answers cannot be computed in pieces, except by `cached_rows`."""
    if train.cached_rows and not paired:
        raise UsageError(f"{where}: train.cached_rows is for contrastive batches, not for {task}", "use accumulate")
    if train.cached_rows and train.parallel == "fsdp":
        raise UsageError(f'{where}: train.cached_rows and parallel = "fsdp" do not go together', 'use "ddp"')
    if paired and train.batch_size == "auto":
        problem = f'{where}: train.batch_size = "auto" would change which rows are compared'
        raise UsageError(problem, "give a number of rows, and train.cached_rows for those computed at once")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Apply one `--set key.path=value`; the value is TOML, and plain text where it is not."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override!r} is not of the form key=value", "e.g. --set train.epochs=3")
    steps = [step.strip() for step in key.split(".")]
    if not all(steps):
        raise UsageError(f"--set {override!r}: the key has an empty part", "e.g. --set train.epochs=3")
    inside: Any = table
    for step in steps[:-1]:
        inside = _step_into(inside, step, override)
        if not isinstance(inside, (dict, list)):
            raise UsageError(f"--set {override!r}: {step!r} is a value, not a table")
    if isinstance(inside, list):
        raise UsageError(f"--set {override!r}: {steps[-2]!r} is a list, and not a table", "name a key of one in it")
    inside[steps[-1]] = _toml_value(value.strip())


def _step_into(table: Any, step: str, override: str) -> Any:
    """What a table has under a key, or a list, such as that of stages, under a number from 1."""
    if isinstance(table, dict):
        return table.setdefault(step, {})
    if not step.isdecimal() or not 1 <= int(step) <= len(table):
        raise UsageError(f"--set {override!r}: {step!r} is none of the {len(table)} there are", "count from 1")
    return table[int(step) - 1]


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as TOML text."""
    import tomlkit

    return tomlkit.dumps(_without_none(msgspec.to_builtins(recipe)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
