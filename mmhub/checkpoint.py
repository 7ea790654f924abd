"""Checkpoint folders: config.json, safetensors weights and tokenizer files. Data only; code comes from plugins.

`save` writes one, `load` builds a model from one, strictly. Weights are left to `mmhub.weights`, cards and the Hub to
`mmhub.hub`.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
from packaging.version import Version
from torch import Tensor, nn

from mmhub import __version__
from mmhub.adapters import (
    AdapterRecord,
    BaseRecord,
    adapter_of,
    check_peft,
    inject,
    is_adapter,
    read_adapter,
    write_adapters,
)
from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError, UsageError, did_you_mean
from mmhub.files import disk_errors, new_folder, sha256, write_file
from mmhub.guard import GuardRecord, GuardSource
from mmhub.hashes import Facts, remember, sha256_of
from mmhub.interfaces import Encoder, Stream, TextDecoder, decode_config, encode_config, find_task
from mmhub.model import Columns, Model
from mmhub.plugins import Component, get_index
from mmhub.reading import CONFIG_BYTES, TOKENIZER_BYTES, parse_json, read_plain
from mmhub.records import cause
from mmhub.registry import find_component
from mmhub.requirements import explain_unmet, unmet_requirements
from mmhub.weights import (
    Amount,
    Stored,
    all_finite,
    amount_in,
    assign,
    check_sizes,
    few_modules,
    fill,
    meta_parameters,
    named_tensors,
    state_of,
    tie,
    weight_files,
    write_weights,
)

FORMAT = 3  # the newest that is read
PLAIN = 1  # what is written where no weight is quantised and nothing is guarded: older versions read it, too
QUANTIZED, GUARDED = 2, 3  # from which on checkpoints may be that: older versions must not read over it

ALLOWED = re.compile(
    r"README\.md|config\.json|provenance\.json|export\.json|model\.sig|eval/[\w.-]+\.json|LICENSE(\.txt|\.md)?"
    r"|model\.safetensors(\.index\.json)?|model-[A-Za-z0-9_-]+\.safetensors"
    r"|(tokenizer|tokenizer_config|preprocessor_config|processor_config|generation_config)(-[A-Za-z0-9_-]+)?\.json"
    r"|chat_template(-[A-Za-z0-9_-]+)?\.jinja|adapter_config(-[A-Za-z0-9_-]+)?\.json|adapter_model(-[A-Za-z0-9_-]+)?\.safetensors"
)
_PROCESSOR_FILE = re.compile(
    r"(tokenizer|tokenizer_config|preprocessor_config|processor_config)\.json|chat_template\.jinja"
)
_USERS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")  # a new save keeps them, and whatever is not ours
_UNHASHED = (*_USERS, "config.json", "provenance.json", "export.json", "model.sig")


class ProcessorRecord(msgspec.Struct):
    """A processor's state, and its files by their name in the folder."""

    state: dict[str, Any] = {}
    files: dict[str, str] = {}


class ComponentRecord(msgspec.Struct):
    """One part of the model: which component builds it, from what configuration, with weights from which file."""

    use: str
    schema: int = 1
    config: dict[str, Any] = {}
    weights: str = ""
    processor: ProcessorRecord | None = None
    adapter: AdapterRecord | msgspec.UnsetType = msgspec.UNSET


class FileRecord(msgspec.Struct):
    """What a file must be."""

    sha256: str
    bytes: int


class DataRecord(msgspec.Struct):
    """The recipe's mapping from columns to modalities."""

    inputs: dict[str, str] = {}
    target: str = ""
    columns: list[str] = []
    document: str = "row"


class CheckpointConfig(msgspec.Struct):
    """config.json."""

    mmhub_format: int
    task: str
    components: dict[str, ComponentRecord]
    library_name: str = "mmhub"
    library_version: str = ""
    tied: dict[str, str] = {}
    requires: list[dict[str, Any]] = []
    files: dict[str, FileRecord] = {}
    data: DataRecord = msgspec.field(default_factory=DataRecord)
    quantized: str | msgspec.UnsetType = msgspec.UNSET  # "int8": see `mmhub.weights.quantized_state`
    guards: list[GuardRecord] | msgspec.UnsetType = msgspec.UNSET


# -- saving -----------------------------------------------------------------------------------------------------


def save(
    model: Model, folder: Path, tensors: Mapping[str, Tensor] | None = None, *, quantized: Literal["", "int8"] = ""
) -> Path:
    """Write `model` to `folder` as a checkpoint; `tensors` are its weights where it does not hold them itself, whole.
    `quantized` says that they are those of `mmhub.weights.quantized_state`.

    A card, a licence and files of other kinds stay when an older checkpoint is replaced; measured results and
    provenance go, for they describe the old weights. What the model was loaded from is recorded.

    Raises:
        UsageError: the folder holds something that is no checkpoint.
        MmhubError: the disk is full or the folder not writable; an older checkpoint there is untouched.
    """
    if folder.exists() and not is_checkpoint(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is no mmhub checkpoint", "name another folder")
    if folder.exists() and folder.samefile(Path.cwd()):
        raise UsageError(f"'{folder}' is the current folder, which cannot be replaced", "name another folder")
    with disk_errors("the checkpoint", folder), new_folder(folder) as aside:
        facts = _write_checkpoint(model, aside, tensors, quantized)
        if model.parents:
            write_file(aside / "provenance.json", json.dumps({"parents": model.parents}, indent=2) + "\n")
        _keep_others(folder, aside)
    for name, known in facts.items():
        remember(folder / name, known, written_by_us=True)
    return folder


def _keep_others(old: Path, new: Path) -> None:
    """Copy what the user put beside an older checkpoint."""
    for path in old.iterdir() if old.is_dir() else ():
        ours = ALLOWED.fullmatch(path.name) or path.name == "eval" or path.name.endswith(".tmp")
        if ours and path.name not in _USERS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _write_checkpoint(
    model: Model, folder: Path, tensors: Mapping[str, Tensor] | None, quantized: str
) -> dict[str, Facts]:
    """Write all files, and return what is known of them."""
    state, tied = state_of(model.parts()) if tensors is None else (tensors, named_tensors(model.parts())[1])
    structure = structure_of(model, tied)
    if quantized:
        structure.config.mmhub_format = max(QUANTIZED, structure.config.mmhub_format)
        structure.config.quantized = quantized
    state, adapters = write_adapters(model.parts(), state, folder)
    for role, record in adapters.items():
        structure.config.components[role].adapter = record
    config = write_structure(structure, folder, state)
    finite: Facts = {"finite": True} if all_finite(state.values()) else {}
    return {
        name: {"sha256": record.sha256} | (finite if name.endswith(".safetensors") else {})
        for name, record in config.files.items()
    }


@dataclass(frozen=True)
class Structure:
    """A checkpoint without weights: what builds the model, and its processors' files by name."""

    config: CheckpointConfig
    files: Mapping[str, bytes]


def structure_of(model: Model, tied: Mapping[str, str]) -> Structure:
    """Describe a model, some of whose tensors are `tied` {alias: first}."""
    files: dict[str, bytes] = {}
    config = CheckpointConfig(
        mmhub_format=GUARDED if model.guards else PLAIN,
        task=model.task.name,
        components={
            role: msgspec.structs.replace(_record(model, role, part, files), adapter=adapter_of(part) or msgspec.UNSET)
            for role, part in model.parts().items()
        },
        library_version=__version__,
        tied=dict(tied),
        requires=_requires(model),
        data=DataRecord(
            inputs=dict(model.columns.inputs),
            target=model.columns.target,
            columns=list(model.columns.names),
            document=model.columns.document,
        ),
        guards=[source.record for source in model.guards] or msgspec.UNSET,
    )
    return Structure(config, files)


def write_structure(structure: Structure, folder: Path, state: Mapping[str, Tensor]) -> CheckpointConfig:
    """Write a checkpoint with the weights in `state`, without any if it is empty; return its config.json."""
    weights = write_weights(state, folder) if state else {}
    for name, content in structure.files.items():
        (folder / name).write_bytes(content)
    replace = msgspec.structs.replace
    records = structure.config.components.items()
    components = {role: replace(record, weights=weights.get(role, "")) for role, record in records}
    config = replace(structure.config, components=components, files=_file_records(folder))
    write_file(folder / "config.json", json.dumps(msgspec.to_builtins(config), indent=2, ensure_ascii=False) + "\n")
    return config


def _file_records(folder: Path) -> dict[str, FileRecord]:
    """Hashes of all files that loading reads; the card and results may be edited later."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _UNHASHED]
    return {path.name: FileRecord(sha256(path), path.stat().st_size) for path in files}


def _record(model: Model, role: str, part: nn.Module, shared: dict[str, bytes]) -> ComponentRecord:
    """Describe one part, and add its processor's files to those of the parts before."""
    component = model.sources[role]
    processor = None
    if isinstance(part, (Encoder, TextDecoder)):
        files = {}
        for name, content in part.processor.files().items():
            if not _PROCESSOR_FILE.fullmatch(name):
                raise PluginError(
                    f"{component.id} {component.version} wants to save the file {name!r}, which no checkpoint may hold",
                    "report it to the plugin's authors",
                )
            files[name] = _add_shared(shared, name, content, role)
        processor = ProcessorRecord(state=part.processor.state(), files=files)
    return ComponentRecord(
        use=component.id,
        schema=component.spec.schema,
        config=encode_config(part.config),
        processor=processor,
    )


def _add_shared(shared: dict[str, bytes], name: str, content: bytes, role: str) -> str:
    """Add a processor's file; where another part has a different one of that name, under a name of its own."""
    if shared.setdefault(name, content) != content:
        path = Path(name)
        name = path.with_stem(f"{path.stem}-{role}").name
        shared[name] = content
    return name


def _requires(model: Model) -> list[dict[str, Any]]:
    by_distribution: dict[str, list[str]] = {}
    versions = {}
    for component in (*model.sources.values(), *(source.component for source in model.guards)):
        by_distribution.setdefault(component.distribution, []).append(f"{component.spec.kind}:{component.spec.name}")
        versions[component.distribution] = component.version
    return [
        {
            "distribution": name,
            "specifier": compatible_range(versions[name]),
            "saved_with": versions[name],
            "components": sorted(set(parts)),
        }
        for name, parts in sorted(by_distribution.items())
    ]


def compatible_range(version: str) -> str:
    """Return the versions that can read what `version` wrote, such as '>=0.3,<1' for 0.3.2."""
    parsed = Version(version)
    early = ".dev0" if parsed.is_prerelease else ""  # 0.3.0.dev2 comes before 0.3
    return f">={parsed.major}.{parsed.minor}{early},<{parsed.major + 1}"


# -- loading ----------------------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Is there a config.json written by mmhub?"""
    try:
        table = json.loads(read_plain(folder / "config.json", CONFIG_BYTES))
    except (OSError, TrustError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and "mmhub_format" in table


def read_config(folder: Path) -> CheckpointConfig:
    """Read and validate config.json; nothing else is touched.

    Raises:
        NotFoundError: no such folder or no config.json. TrustError: it is damaged or not an mmhub checkpoint.
    """
    path = folder / "config.json"
    try:
        content = read_plain(path, CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise NotFoundError(f"'{folder}' {what}", "name the folder of an mmhub checkpoint") from None
    except OSError as error:
        raise MmhubError(f"cannot read '{path}': {error.strerror}", "check its permissions") from None
    return parse_config(content, str(path))


def parse_config(content: bytes, where: str) -> CheckpointConfig:
    """Validate the content of a config.json."""
    try:
        table = parse_json(content)
    except ValueError as error:
        raise TrustError(f"'{where}' is not valid JSON: {error}", "fetch the checkpoint again") from None
    if not isinstance(table, dict) or "mmhub_format" not in table:
        raise TrustError(f"'{where}' is not an mmhub checkpoint", "mmhub loads what `mmhub train` or `save` wrote")
    if isinstance(table["mmhub_format"], int) and table["mmhub_format"] > FORMAT:
        raise PluginError(
            f"'{where}' has format {table['mmhub_format']}, this mmhub reads up to {FORMAT}",
            "upgrade mmhub: pip install -U mmhub",
        )
    try:
        config = msgspec.convert(table, CheckpointConfig)
    except msgspec.ValidationError as error:
        raise TrustError(f"'{where}' is malformed: {error}", "fetch the checkpoint again") from None
    problem = _config_problem(config)
    if problem:
        raise TrustError(f"'{where}' {problem}", "fetch the checkpoint again")
    return config


_TASK = re.compile(r"[a-z0-9-]{1,64}")
_USE = re.compile(r"[A-Za-z0-9._?-]+/[A-Za-z0-9._-]+")
_MOST = {"components": 100, "requires": 1000, "files": 10_000}


def _config_problem(config: CheckpointConfig) -> str | None:
    """Say what in a config.json of the right form makes no sense, or None."""
    many = [key for key, most in _MOST.items() if len(getattr(config, key)) > most]
    if many:
        return f"holds more than {_MOST[many[0]]:,} {many[0]}"
    if not _TASK.fullmatch(config.task):
        return f"is for the task {config.task[:80]!r}, which is no name"
    if config.quantized is not msgspec.UNSET and (config.mmhub_format < QUANTIZED or config.quantized != "int8"):
        return f"says that its weights are quantised as {config.quantized!r}; format {QUANTIZED} knows 'int8' alone"
    if config.guards is not msgspec.UNSET and config.mmhub_format < GUARDED:
        return f"names guards, and has format {config.mmhub_format} instead of {GUARDED}"
    forbidden = [name for name in config.files if not ALLOWED.fullmatch(name)]
    if forbidden:
        return f"lists the file {forbidden[0]!r}, which no checkpoint may hold"
    for role, record in config.components.items():
        if role not in ("fusion", "decoder") and not role.endswith("_encoder"):
            return f"lists the component {role[:80]!r}, which is no encoder, fusion or decoder"
        if not _USE.fullmatch(record.use):
            return f"builds the {role} by {record.use[:80]!r}, which is not plugin/name"
        unlisted = sorted(part_files(record) - config.files.keys())
        if unlisted:
            return f"uses the file {unlisted[0]!r}, which it does not list"
        problem = _adapter_problem(record.adapter) if record.adapter else None
        if problem:
            return f"gives the {role} an adapter {problem}"
    tensors = (*config.tied, *config.tied.values())
    homeless = [name for name in tensors if name.partition(".")[0] not in config.components]
    if homeless:
        return f"ties the tensor {homeless[0]!r}, which belongs to no component"
    both = sorted(config.tied.keys() & set(config.tied.values()))
    if both:
        return f"ties the tensor {both[0]!r} to one that is tied itself"
    missing = {"fusion", "decoder"} - set(config.components)
    if missing:
        return f"lacks {' and '.join(sorted(missing))}"
    return None


def _adapter_problem(adapter: AdapterRecord) -> str | None:
    if adapter.rank < 1 or not 0 <= adapter.dropout < 1:
        return f"of rank {adapter.rank} and dropout {adapter.dropout}"
    if adapter.weights and adapter.base is None:
        return "without naming what it is for"
    base = adapter.base
    hub = base is None or re.fullmatch("[0-9a-f]{40}", base.commit)
    local = base is None or re.fullmatch("[0-9a-f]{64}", base.sha256)
    return None if hub or local else f"for {base.name!r} without its commit or sha256"  # type: ignore[union-attr]


def part_files(record: ComponentRecord) -> set[str]:
    """Return the files that one part uses: of its processor, and its weights or their index, and its adapter's."""
    processor = set(record.processor.files.values()) if record.processor else set()
    adapter = record.adapter.weights if record.adapter else ""
    return (processor | {record.weights, adapter}) - {""}


def check_requirements(name: str, config: CheckpointConfig, role: str | None = None) -> None:
    """Raise PluginError with one install line if a plugin the checkpoint, or one part of it, needs is missing."""
    if any(record.adapter for one, record in config.components.items() if role in (None, one)):
        check_peft()
    owner = config.components[role].use.rpartition("/")[0] if role else None
    requires = [entry for entry in config.requires if owner is None or entry.get("distribution") == owner]
    unmet = unmet_requirements(requires, get_index())
    if unmet:
        raise explain_unmet(f"{name}#{role}" if role and "#" not in name else name, unmet)


def find_encoder(config: CheckpointConfig, name: str, where: str) -> str:
    """Return the encoder called `name`, as in "image" or "image_encoder".

    Raises:
        NotFoundError: there is none; lists those there are.
    """
    encoders = [role for role in config.components if role.endswith("_encoder")]
    role = name if name.endswith("_encoder") else f"{name}_encoder"
    if role not in encoders:
        short = [role.removesuffix("_encoder") for role in encoders]
        hint = did_you_mean(name, [*encoders, *short]) or f"it has {', '.join(encoders)}"
        raise NotFoundError(f"'{where}' has no component {name!r}", hint)
    return role


def verify_files(folder: Path, config: CheckpointConfig, names: set[str] | None = None) -> None:
    """Compare files with the sizes and hashes in config.json; one nobody wrote to since is not read again.

    Raises:
        TrustError: one is missing or different, named with what was expected.
    """
    for name, record in config.files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise TrustError(f"'{path}' is missing from the checkpoint", "fetch the checkpoint again")
        size = status.st_size
        if size != record.bytes:
            raise TrustError(f"'{path}' has {size} bytes instead of {record.bytes}", "fetch the checkpoint again")
        found = sha256_of(path)
        if found != record.sha256:
            raise TrustError(
                f"'{path}' is damaged: its sha256 is {found[:12]}... instead of {record.sha256[:12]}...",
                "fetch the checkpoint again",
            )


def load(folder: Path, *, allow_partial: bool = False, name: str = "", verified: bool = False) -> Model:
    """Build the model in `folder`, in evaluation mode on the CPU, its weights mapped from the files.

    `verified` says that the caller compared the files with their hashes just now.

    Raises:
        NotFoundError, PluginError, TrustError: no checkpoint, a plugin is missing, or the files are damaged.
    """
    config = read_config(folder)
    check_requirements(name or str(folder), config)
    if not verified:
        verify_files(folder, config)
    stored = stored_weights(folder, config)
    limit = _checked_amount(stored, config, config.components).modules
    # What a partial load leaves without values must have started fresh, so that nothing is built on meta then.
    model = _build_model(config, folder, partial(few_modules if allow_partial else meta_parameters, limit))
    model.name = name or str(folder)
    known = _adapt(model.parts(), config, folder, model.fusion.outputs)
    fill(model.parts(), stored, allow_partial=allow_partial, known=known)
    return model.eval()


def load_structure(folder: Path) -> Model:
    """Build the model in `folder` without weights: its parameters are on the meta device, tied as they were saved.

    The files are taken as they are; their hashes must have been compared.

    Raises:
        NotFoundError, PluginError, TrustError: no checkpoint, a plugin is missing, or config.json makes no sense.
    """
    config = read_config(folder)
    check_requirements(str(folder), config)
    model = _build_model(config, folder, meta_parameters)
    model.name = str(folder)
    parts = model.parts()
    for role, record in config.components.items():
        if record.adapter:
            inject(parts[role], record.adapter, empty=True)
    for alias, source in config.tied.items():
        tie(parts, alias, source)
    return model.eval()


_ELSEWHERE = Amount(tensors=20_000, numbers=2**40)  # what the base of an adapter may hold


def _checked_amount(stored: Stored, config: CheckpointConfig, roles: Iterable[str]) -> Amount:
    """How much the weights of these parts are; nothing in their settings may be larger.

    Raises:
        TrustError: a size is. It is found before anything is built, for building takes what the settings say.
    """
    roles = set(roles)
    held = amount_in(stored.folder / file for file in weight_files(stored, roles))
    records = [config.components[role] for role in roles]
    if any(record.adapter and record.adapter.weights for record in records):
        held = _ELSEWHERE
    for record in records:
        state = record.processor.state if record.processor else {}
        check_sizes([record.config, state], held, f"'{stored.folder}' asks too much of {record.use}")
    return held


def _adapt(
    parts: Mapping[str, nn.Module], config: CheckpointConfig, folder: Path, streams: Mapping[str, Stream]
) -> dict[str, Tensor]:
    """Give parts the adapters they were saved with; return the weights of their bases and adapters, by `role.name`.

    Where an adapter has no file of its own, all of the part's weights are in the checkpoint, as of any other part.
    """
    known: dict[str, Tensor] = {}
    for role, part in parts.items():
        record = config.components[role].adapter
        if not record:
            continue
        if record.weights:
            assert record.base is not None
            _fill_from_base(role, part, record.base, streams)
        inject(part, record, empty=True)
        if record.weights:
            parameters = part.named_parameters(remove_duplicate=False)
            known |= {f"{role}.{key}": tensor.data for key, tensor in parameters if not is_adapter(key)}
            known |= read_adapter(role, part, folder / record.weights)
    return known


def _fill_from_base(role: str, part: Any, base: BaseRecord, streams: Mapping[str, Stream]) -> None:
    """Give a part the weights that its adapter is for: those of an mmhub checkpoint, or of another library's model.

    Raises:
        NotFoundError, NetworkError: they are not here. TrustError: they are not what they were, or do not fit.
    """
    from mmhub.hub.pull import find_base  # a base may have to be fetched; the hub stands above this module

    folder = find_base(base, role)
    if is_checkpoint(folder):
        config, theirs = read_config(folder), find_part(base, role)
        if theirs not in config.components:
            raise TrustError(f"the base '{base.name}' has no {theirs}", "fetch the checkpoint again")
        verify_files(folder, config, part_files(config.components[theirs]))
        stored = stored_weights(folder, config)
        verify_files(folder, config, weight_files(stored, {theirs}))
        fill({theirs: part}, stored, allow_partial=False)
        return
    read = type(part).from_library
    made = read(part.config, folder) if isinstance(part, Encoder) else read(part.config, folder, streams)
    assign(role, part, made.state_dict(), f"'{base.name}'")


def find_part(base: BaseRecord, role: str) -> str:
    """Return the role that the weights of a base have in a checkpoint of ours."""
    named = base.component or role
    return named if named == "decoder" or named.endswith("_encoder") else f"{named}_encoder"


def _build_model(config: CheckpointConfig, folder: Path, building: Callable[[], AbstractContextManager[None]]) -> Model:
    try:
        task = find_task(config.task)
    except UsageError as error:
        raise PluginError(f"'{folder}' is for an {error.message}", "upgrade mmhub: pip install -U mmhub") from None
    sources = {role: find_component(role, record.use) for role, record in config.components.items()}
    encoders = {
        role.removesuffix("_encoder"): _build_encoder(sources[role], record, folder, building)
        for role, record in config.components.items()
        if role.endswith("_encoder")
    }
    streams = {modality: encoder.stream for modality, encoder in encoders.items()}
    record = config.components["decoder"]
    with _buildable(folder), building():
        if sources["decoder"].load().reads_text:
            decoder = _build_decoder(sources["decoder"], record, folder, {})
            fusion = _build(sources["fusion"], config.components["fusion"], {**streams, "text": Stream(decoder.dim)})
        else:
            fusion = _build(sources["fusion"], config.components["fusion"], streams)
            decoder = _build_decoder(sources["decoder"], record, folder, fusion.outputs)
    columns = Columns(config.data.inputs, config.data.target, tuple(config.data.columns), config.data.document)
    model = Model(task, encoders, fusion, decoder, sources, columns)
    model.guards = _guards(config, folder)
    return model


def _guards(config: CheckpointConfig, folder: Path) -> list[GuardSource]:
    """The guards that a checkpoint names: a model is not loaded without them."""
    found = []
    for record in config.guards or ():
        component = find_component("guard", record.use)
        found.append(GuardSource(component, _decode(component, component.load(), record), folder))
    return found


def load_encoder(folder: Path, role: str) -> tuple[Encoder, Component]:
    """Build one encoder of the checkpoint in `folder`, reading no other part's weights."""
    config = read_config(folder)
    role = find_encoder(config, role, str(folder))
    check_requirements(str(folder), config, role)
    record = config.components[role]
    component = find_component(role, record.use)
    verify_files(folder, config, part_files(record))
    stored = stored_weights(folder, config)
    verify_files(folder, config, weight_files(stored, {role}))
    limit = _checked_amount(stored, config, {role}).modules
    encoder = _build_encoder(component, record, folder, partial(meta_parameters, limit))
    fill({role: encoder}, stored, allow_partial=False, known=_adapt({role: encoder}, config, folder, {}))
    return encoder, component


def load_decoder(folder: Path, streams: Mapping[str, Any]) -> tuple[Any, Component]:
    """Build the decoder of the checkpoint in `folder`, to read `streams`, with its own weights alone."""
    config, role = read_config(folder), "decoder"
    check_requirements(str(folder), config, role)
    record = config.components[role]
    component = find_component(role, record.use)
    verify_files(folder, config, part_files(record))
    stored = stored_weights(folder, config)
    verify_files(folder, config, weight_files(stored, {role}))
    limit = _checked_amount(stored, config, {role}).modules
    with _buildable(folder), meta_parameters(limit):
        decoder = _build_decoder(component, record, folder, streams)
    fill({role: decoder}, stored, allow_partial=False, known=_adapt({role: decoder}, config, folder, streams))
    return decoder, component


def stored_weights(folder: Path, config: CheckpointConfig) -> Stored:
    """Return where the folder keeps the weights of each part."""
    places = {role: record.weights for role, record in config.components.items()}
    return Stored(folder, places, config.tied, config.files.keys(), quantized=config.quantized == "int8")


def _build_encoder(
    component: Component,
    record: ComponentRecord,
    folder: Path,
    building: Callable[[], AbstractContextManager[None]],
) -> Encoder:
    cls: Any = component.load()
    config = _decode(component, cls, record)
    processor = _load_processor(component, cls, config, record, folder)
    with _buildable(folder), building():
        encoder: Encoder = cls(config, processor)
    return encoder


@contextmanager
def _buildable(folder: Path) -> Iterator[None]:
    """Say what torch makes of sizes that no memory has room for, or that overflow, as an error of the checkpoint."""
    try:
        yield
    except (MemoryError, OverflowError, RecursionError, RuntimeError) as error:
        what = f"'{folder}' asks for a model that cannot be built: {cause(error)}"
        raise TrustError(what, "fetch the checkpoint again") from error


def _load_processor(component: Component, cls: Any, config: Any, record: ComponentRecord, folder: Path) -> Any:
    saved = record.processor or ProcessorRecord()
    try:
        files = {name: read_plain(folder / place, TOKENIZER_BYTES) for name, place in saved.files.items()}
        return cls.load_processor(config, saved.state, files)
    except (UsageError, KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise TrustError(
            f"'{folder}' holds a state that the processor of {component.id} cannot read: {error!r}",
            "fetch the checkpoint again",
        ) from None


def _build_decoder(component: Component, record: ComponentRecord, folder: Path, streams: Mapping[str, Any]) -> Any:
    cls: Any = component.load()
    if not issubclass(cls, TextDecoder):
        return _build(component, record, streams)
    config = _decode(component, cls, record)
    return cls(config, streams, _load_processor(component, cls, config, record, folder))


def _build(component: Component, record: ComponentRecord, streams: Mapping[str, Any]) -> Any:
    cls: Any = component.load()
    return cls(_decode(component, cls, record), streams)


def _decode(component: Component, cls: Any, record: ComponentRecord | GuardRecord) -> Any:
    known = component.spec.schema
    if record.schema > known:
        raise PluginError(
            f"{component.id} {component.version} reads configurations up to schema {known}, not {record.schema}",
            f"upgrade it: mmhub plugins install -U {component.distribution}",
        )
    if record.schema < known:
        return _migrated(component, cls, record)
    try:
        return decode_config(cls.Config, record.config, f"config.json: {component.id}")
    except UsageError as error:
        changed = f"or {component.distribution} {component.version} changed its settings and kept schema {known}"
        raise TrustError(error.message, f"{error.hint or 'fetch the checkpoint again'}; {changed}") from None


def _migrated(component: Component, cls: Any, record: ComponentRecord | GuardRecord) -> Any:
    """Bring a configuration of an older schema up to date by the component's own `migrate`.

    Raises:
        PluginError: it has none, or it fails, or what it returns is no configuration of today's.
    """
    newest, name = component.spec.schema, f"{component.id} {component.version}"
    hint = f"install the version of {component.distribution} that saved it, and tell the plugin's authors"
    if not hasattr(cls, "migrate"):
        raise PluginError(f"{name} reads schema {newest} alone, and this was saved with schema {record.schema}", hint)
    try:
        return decode_config(cls.Config, cls.migrate(copy.deepcopy(record.config), record.schema), "its result")
    except Exception as error:
        raise PluginError(
            f"{name} fails to bring a configuration from schema {record.schema} to {newest}: {cause(error)}", hint
        ) from error
