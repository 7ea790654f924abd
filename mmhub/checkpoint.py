"""Checkpoint folders: config.json, safetensors weights and tokenizer files. Data only; code comes from plugins.

`save` writes one, `load` builds a model from one, strictly. Cards and the Hub are left to `mmhub.hub`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from mmhub import __version__
from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError, UsageError, did_you_mean
from mmhub.files import disk_errors, new_folder, sha256, write_file
from mmhub.interfaces import Encoder, decode_config, encode_config, find_task
from mmhub.model import Columns, Model
from mmhub.plugins import Component, explain_unmet, get_index, unmet_requirements
from mmhub.registry import find_component

FORMAT = 1
SINGLE_FILE_BYTES = 64 * 2**20  # larger models are split by component, so that parts can be fetched alone
SHARD_BYTES = 5 * 10**9

ALLOWED = re.compile(
    r"README\.md|config\.json|provenance\.json|eval/[\w.-]+\.json|LICENSE(\.txt|\.md)?"
    r"|model\.safetensors(\.index\.json)?|model-[a-z0-9_]+(-\d{5}-of-\d{5})?\.safetensors"
    r"|tokenizer(-[a-z0-9_]+)?\.json|tokenizer_config\.json|preprocessor_config\.json|processor_config\.json"
    r"|chat_template\.jinja|generation_config\.json|adapter_config\.json|adapter_model\.safetensors"
)
_KEPT = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "provenance.json", "eval")  # a new save keeps the old


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


class FileRecord(msgspec.Struct):
    """What a file must be."""

    sha256: str
    bytes: int


class DataRecord(msgspec.Struct):
    """The recipe's mapping from columns to modalities."""

    inputs: dict[str, str] = {}
    target: str = ""
    columns: list[str] = []


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


# -- saving -----------------------------------------------------------------------------------------------------


def save(model: Model, folder: Path) -> Path:
    """Write `model` to `folder` as a checkpoint.

    Raises:
        UsageError: the folder holds something that is no checkpoint.
        MmhubError: the disk is full or the folder not writable; an older checkpoint there is untouched.
    """
    if folder.exists() and not is_checkpoint(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is no mmhub checkpoint", "name another folder")
    with disk_errors("the checkpoint", folder), new_folder(folder) as aside:
        for name in _KEPT:
            _keep(folder / name, aside / name)
        _write_checkpoint(model, aside)
    return folder


def _keep(old: Path, new: Path) -> None:
    if old.is_dir():
        shutil.copytree(old, new)
    elif old.is_file():
        shutil.copy2(old, new)


def _write_checkpoint(model: Model, folder: Path) -> None:
    state, tied = _state(model)
    weights = write_weights(state, folder)
    records = {role: _record(model, role, part, weights, folder) for role, part in model.parts().items()}
    config = CheckpointConfig(
        mmhub_format=FORMAT,
        task=model.task.name,
        components=records,
        library_version=__version__,
        tied=tied,
        requires=_requires(model),
        data=DataRecord(
            inputs=dict(model.columns.inputs), target=model.columns.target, columns=list(model.columns.names)
        ),
    )
    config.files = _file_records(folder)
    write_file(folder / "config.json", json.dumps(msgspec.to_builtins(config), indent=2, ensure_ascii=False) + "\n")


def _file_records(folder: Path) -> dict[str, FileRecord]:
    """Hashes of all files that loading reads; the card and results may be edited later."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (*_KEPT, "config.json")]
    return {path.name: FileRecord(sha256(path), path.stat().st_size) for path in files}


def _state(model: Model) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by `role.name`; of tensors that share memory the first, the others as `tied` {alias: first}."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for role, part in model.parts().items():
        for key, tensor in part.state_dict().items():
            name = f"{role}.{key}"
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in seen:
                tied[name] = seen[place]
            else:
                seen[place] = name
                state[name] = tensor.detach().to("cpu").contiguous()
    return state, tied


def write_weights(state: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Write tensors named `role.name`; return the weights entry (file or index) of each role."""
    from safetensors.torch import save_file

    shards = _shards(state)
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    roles = {name.split(".", 1)[0] for name in state}
    if len(shards) <= 1:
        return dict.fromkeys(roles, "model.safetensors")
    total = sum(t.nbytes for t in state.values())
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return dict.fromkeys(roles, "model.safetensors.index.json")


def _shards(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    if sum(t.nbytes for t in state.values()) <= SINGLE_FILE_BYTES:
        return {"model.safetensors": list(state)}
    shards: dict[str, list[str]] = {}
    for role in dict.fromkeys(name.split(".", 1)[0] for name in state):
        groups: list[list[str]] = [[]]
        size = 0
        for name in (n for n in state if n.startswith(f"{role}.")):
            if groups[-1] and size + state[name].nbytes > SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += state[name].nbytes
        for i, group in enumerate(groups):
            part = f"-{i + 1:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            shards[f"model-{role}{part}.safetensors"] = group
    return shards


def _record(model: Model, role: str, part: nn.Module, weights: Mapping[str, str], folder: Path) -> ComponentRecord:
    component = model.sources[role]
    processor = None
    if isinstance(part, Encoder):
        files = {}
        for name, content in part.processor.files().items():
            stem, _, ending = name.partition(".")
            free = not (folder / name).exists() or (folder / name).read_bytes() == content
            files[name] = name if free else f"{stem}-{role}.{ending}"
            (folder / files[name]).write_bytes(content)
        processor = ProcessorRecord(state=part.processor.state(), files=files)
    return ComponentRecord(
        use=component.id,
        schema=component.spec.schema,
        config=encode_config(part.config),
        weights=weights.get(role, ""),
        processor=processor,
    )


def _requires(model: Model) -> list[dict[str, Any]]:
    by_distribution: dict[str, list[str]] = {}
    versions = {}
    for component in model.sources.values():
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
    numbers = [*re.findall(r"\d+", version), "0", "0"]
    return f">={numbers[0]}.{numbers[1]},<{int(numbers[0]) + 1}"


# -- loading ----------------------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Is there a config.json written by mmhub?"""
    try:
        return "mmhub_format" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> CheckpointConfig:
    """Read and validate config.json; nothing else is touched.

    Raises:
        NotFoundError: no such folder or no config.json. TrustError: it is damaged or not an mmhub checkpoint.
    """
    path = folder / "config.json"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise NotFoundError(f"'{folder}' {what}", "name the folder of an mmhub checkpoint") from None
    return parse_config(content, str(path))


def parse_config(content: bytes, where: str) -> CheckpointConfig:
    """Validate the content of a config.json."""
    try:
        table = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
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
    names = [*config.files, *(f for c in config.components.values() if c.processor for f in c.processor.files.values())]
    for name in names:
        if not ALLOWED.fullmatch(name):
            raise TrustError(f"'{where}' lists the file {name!r}, which no checkpoint may hold")
    return config


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def check_requirements(name: str, config: CheckpointConfig) -> None:
    """Raise PluginError with one install line if a plugin the checkpoint needs is missing or incompatible."""
    unmet = unmet_requirements(config.requires, get_index())
    if unmet:
        raise explain_unmet(name, unmet)


def verify_files(folder: Path, config: CheckpointConfig, names: set[str] | None = None) -> None:
    """Compare files with the sizes and hashes in config.json.

    Raises:
        TrustError: one is missing or different, named with what was expected.
    """
    for name, record in config.files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise TrustError(f"'{path}' is missing from the checkpoint", "fetch the checkpoint again")
        size = path.stat().st_size
        if size != record.bytes:
            raise TrustError(f"'{path}' has {size} bytes instead of {record.bytes}", "fetch the checkpoint again")
        found = sha256(path)
        if found != record.sha256:
            raise TrustError(
                f"'{path}' is damaged: its sha256 is {found[:12]}... instead of {record.sha256[:12]}...",
                "fetch the checkpoint again",
            )


def load(folder: Path, *, allow_partial: bool = False, name: str = "") -> Model:
    """Build the model in `folder`, in evaluation mode on the CPU, its weights mapped from the files.

    Raises:
        NotFoundError, PluginError, TrustError: no checkpoint, a plugin is missing, or the files are damaged.
    """
    config = read_config(folder)
    check_requirements(name or str(folder), config)
    verify_files(folder, config)
    encoders: dict[str, Encoder] = {}
    sources: dict[str, Component] = {}
    for role, record in config.components.items():
        sources[role] = find_component(_kind(role), record.use)
        if role.endswith("_encoder"):
            encoders[role.removesuffix("_encoder")] = _build_encoder(sources[role], record, folder)
    if not {"fusion", "decoder"} <= set(config.components):
        raise TrustError(f"'{folder}' lacks a fusion or decoder in config.json", "fetch the checkpoint again")
    streams = {modality: encoder.stream for modality, encoder in encoders.items()}
    with meta_parameters():
        fusion = _build(sources["fusion"], config.components["fusion"], streams)
        decoder = _build(sources["decoder"], config.components["decoder"], fusion.outputs)
    columns = Columns(config.data.inputs, config.data.target, tuple(config.data.columns))
    model = Model(find_task(config.task), encoders, fusion, decoder, sources, columns)
    model.name = name or str(folder)
    _fill(model.parts(), config, folder, allow_partial)
    return model.eval()


def load_encoder(folder: Path, role: str) -> tuple[Encoder, Component]:
    """Build one encoder of the checkpoint in `folder`, reading no other part's weights."""
    config = read_config(folder)
    if role not in config.components:
        encoders = [name for name in config.components if name.endswith("_encoder")]
        hint = did_you_mean(role, encoders) or f"it has {', '.join(encoders)}"
        raise NotFoundError(f"'{folder}' has no component {role!r}", hint)
    record = config.components[role]
    component = find_component(_kind(role), record.use)
    files = set(record.processor.files.values()) if record.processor else set()
    verify_files(folder, config, files | _weight_files(folder, record.weights, role))
    encoder = _build_encoder(component, record, folder)
    _fill({role: encoder}, config, folder, allow_partial=False)
    return encoder, component


def _kind(role: str) -> str:
    return role if role.endswith("_encoder") else role.split("_")[0]


def _build_encoder(component: Component, record: ComponentRecord, folder: Path) -> Encoder:
    cls: Any = component.load()
    config = _decode(component, cls, record)
    saved = record.processor or ProcessorRecord()
    files = {name: (folder / place).read_bytes() for name, place in saved.files.items()}
    processor = cls.load_processor(config, saved.state, files)
    with meta_parameters():
        encoder: Encoder = cls(config, processor)
    return encoder


def _build(component: Component, record: ComponentRecord, streams: Mapping[str, Any]) -> Any:
    cls: Any = component.load()
    return cls(_decode(component, cls, record), streams)


def _decode(component: Component, cls: Any, record: ComponentRecord) -> Any:
    known = component.spec.schema
    if record.schema > known:
        raise PluginError(
            f"{component.id} {component.version} reads configurations up to schema {known}, not {record.schema}",
            f"upgrade it: pip install -U {component.distribution}",
        )
    table = record.config
    if record.schema < known and hasattr(cls, "migrate"):
        table = cls.migrate(table, record.schema)
    try:
        return decode_config(cls.Config, table, f"config.json: {component.id}")
    except UsageError as error:
        raise TrustError(error.message, error.hint) from None


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Put every parameter registered inside the block on the meta device: no memory, no initialisation.

    Buffers stay real, because some are tables that no checkpoint holds (rotary angles, position indices).
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _weight_files(folder: Path, weights: str, role: str) -> set[str]:
    if not weights.endswith(".index.json"):
        return {weights} if weights else set()
    try:
        places = json.loads((folder / weights).read_bytes())["weight_map"]
        found = {str(file) for name, file in places.items() if name.startswith(f"{role}.")}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrustError(f"'{folder / weights}' is damaged: {error}", "fetch the checkpoint again") from None
    for file in found:
        if not ALLOWED.fullmatch(file):
            raise TrustError(f"'{folder / weights}' points to {file!r}, which no checkpoint may hold")
    return found


def _fill(parts: Mapping[str, nn.Module], config: CheckpointConfig, folder: Path, allow_partial: bool) -> None:
    """Assign the tensors of the files to the parts, strictly, and tie again what was tied."""
    files = {f for role in parts for f in _weight_files(folder, config.components[role].weights, role)}
    found: dict[str, dict[str, Tensor]] = {role: {} for role in parts}
    for file in sorted(files):
        for name, tensor in read_tensors(folder / file, tuple(f"{role}." for role in parts)):
            role, key = name.split(".", 1)
            found[role][key] = tensor
    tied = {a: b for a, b in config.tied.items() if a.split(".", 1)[0] in parts}
    for alias, source in tied.items():
        (role, key), (other, original) = alias.split(".", 1), source.split(".", 1)
        if other in found and original in found[other]:
            found[role][key] = found[other][original]
    problems = [p for role, part in parts.items() for p in _assign(role, part, found[role], allow_partial)]
    if problems and not allow_partial:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise TrustError(f"the weights in '{folder}' do not fit the model: {shown}", "fetch the checkpoint again")
    for alias, source in tied.items():
        _tie(parts, alias, source)


def _assign(role: str, part: nn.Module, found: dict[str, Tensor], allow_partial: bool) -> list[str]:
    expected = part.state_dict()
    problems = [f"{role}.{key} is missing" for key in expected if key not in found]
    problems += [f"{role}.{key} is unexpected" for key in found if key not in expected]
    for key in [k for k in found if k in expected]:
        if found[key].shape != expected[key].shape:
            problems.append(f"{role}.{key} has shape {list(found[key].shape)}, not {list(expected[key].shape)}")
            del found[key]
    if problems and not allow_partial:
        return problems
    part.load_state_dict({key: t for key, t in found.items() if key in expected}, strict=False, assign=True)
    for module in part.modules():  # what a partial load left without values starts fresh
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            reset = getattr(module, "reset_parameters", None)
            if not callable(reset):
                raise MmhubError(f"{role}: cannot initialise {type(module).__name__} for a partial load")
            reset()
    return problems


def _tie(parts: Mapping[str, nn.Module], alias: str, source: str) -> None:
    def owner(name: str) -> tuple[nn.Module, str]:
        role, key = name.split(".", 1)
        path, _, leaf = key.rpartition(".")
        return parts[role].get_submodule(path), leaf

    (module, leaf), (original, name) = owner(alias), owner(source)
    setattr(module, leaf, getattr(original, name))


# -- safetensors ------------------------------------------------------------------------------------------------


def read_tensors(path: Path, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file whose names start with one of `prefixes`, mapped, not copied.

    Raises:
        TrustError: the file is damaged or hostile.
    """
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is no dict
                if name.startswith(prefixes):
                    yield name, file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise TrustError(f"'{path}' is damaged: {error}", "fetch the checkpoint again") from None


def check_header(path: Path) -> None:
    """Refuse a safetensors header that is too large, names a tensor twice, or would take long to parse."""
    problem = _header_problem(path)
    if problem:
        raise TrustError(f"'{path}' is not a sound safetensors file: {problem}", "fetch the checkpoint again")


def _header_problem(path: Path) -> str | None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 10_000_000:
            return f"its header claims {size} bytes"
        head = file.read(size)
    if len(head) < size or size < 2:
        return "it is truncated"
    try:
        pairs = json.loads(head, object_pairs_hook=list, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return "its header is not JSON"
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        return "its header is not a table"
    names = [name for name, _ in pairs]
    if len(names) > 100_000:
        return f"it holds {len(names)} tensors"
    if len(set(names)) < len(names):
        return "it names a tensor twice"
    if not all(name.isprintable() for name in names):
        return "a tensor's name is not printable"
    deep = any(len(v) > 16 for _, entry in pairs for k, v in entry if k == "shape")
    return "a tensor has more than 16 dimensions" if deep else None


def copy_parameters(model: nn.Module) -> None:
    """Replace memory-mapped tensors by private copies, so that training never depends on the files it came from."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
