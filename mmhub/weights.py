"""Weights between modules and safetensors files: shards, shared tensors, strict filling, building without memory.

Whatever a file says is checked before it is used. What a checkpoint folder holds besides is left to `mmhub.checkpoint`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmhub.errors import TrustError
from mmhub.files import write_file
from mmhub.hashes import facts_of, remember

SINGLE_FILE_BYTES = 64 * 2**20  # larger models are split by component, so that parts can be fetched alone
SHARD_BYTES = 5 * 10**9

# -- writing ----------------------------------------------------------------------------------------------------


def state_of(parts: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors by `role.name`; of those that share memory the first, the others as `tied` {alias: first}."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    states = {role: part.state_dict() for role, part in parts.items()}  # all alive: no address is used twice
    for role, tensors in states.items():
        for key, tensor in tensors.items():
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

    total = sum(t.nbytes for t in state.values())
    _check_space(folder, total)
    shards = _shards(state)
    for file, names in shards.items():
        (folder / file).touch()
        mode = (folder / file).stat().st_mode & 0o777  # what the umask gives; the library's own files are 0600
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
    roles = {name.split(".", 1)[0] for name in state}
    if set(shards) == {"model.safetensors"}:
        return dict.fromkeys(roles, "model.safetensors")
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return dict.fromkeys(roles, "model.safetensors.index.json")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free", str(folder))


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


# -- building ---------------------------------------------------------------------------------------------------


class _NoInitialValues(TorchFunctionMode):
    """Draw no numbers for meta tensors: torch imports its compiler for normal ones, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


# By name: transformers puts functions of its own in the place of torch's while it builds a model.
_DRAWS = {
    *("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"),
    *("xavier_normal_", "zeros_", "ones_", "constant_", "zero_", "fill_"),
}


_patching = threading.RLock()


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Put every parameter that this thread registers inside the block on the meta device: no memory, no initialisation.

    Buffers stay real, because some are tables that no checkpoint holds (rotary angles, position indices).
    """
    thread = threading.get_ident()
    with _patching:
        register = nn.Module.register_parameter

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and not param.is_meta and threading.get_ident() == thread:
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            register(module, name, param)

        nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
        try:
            with _NoInitialValues():
                yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


# -- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a folder keeps the weights of a model's parts."""

    folder: Path
    places: Mapping[str, str]  # role -> file or index, "" for a part without weights
    tied: Mapping[str, str]  # tensors that share another's memory, by full name
    listed: Set[str]  # the files that may be read


def weight_files(stored: Stored, roles: Iterable[str]) -> set[str]:
    """Return the files that hold the tensors of these roles, and those that they share."""
    files = set()
    for role in _roles_with_ties(stored, roles):
        weights = stored.places[role]
        if weights.endswith(".index.json"):
            files |= _shards_of(stored, weights, role)
        elif weights:
            files.add(weights)
    return files


def _roles_with_ties(stored: Stored, roles: Iterable[str]) -> set[str]:
    """These roles, and those that hold a tensor which one of them shares."""
    roles = set(roles)
    return roles | {
        source.partition(".")[0] for alias, source in stored.tied.items() if alias.partition(".")[0] in roles
    }


def _shards_of(stored: Stored, name: str, role: str) -> set[str]:
    index = stored.folder / name
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        found = {str(file) for tensor, file in places.items() if tensor.startswith(f"{role}.")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrustError(f"'{index}' is damaged: {error}", "fetch the checkpoint again") from None
    for file in found - stored.listed:
        raise TrustError(f"'{index}' points to {file!r}, which config.json does not list", "fetch the checkpoint again")
    return found


def fill(parts: Mapping[str, nn.Module], stored: Stored, *, allow_partial: bool) -> None:
    """Assign the tensors of the files to the parts, strictly, and tie again what was tied.

    Raises:
        TrustError: a file is damaged, or what it holds does not fit (a warning alone with `allow_partial`), or a
            parameter is not a number (a warning alone with MMHUB_ALLOW_NONFINITE=1).
    """
    found, problems, whole = _read_parts(stored, parts)
    _check_finite(stored, parts, found, whole)
    tied = {alias: source for alias, source in stored.tied.items() if alias.partition(".")[0] in parts}
    for alias, source in tied.items():
        if source in found:
            found[alias] = found[source]
    for role, part in parts.items():
        mine = {name.split(".", 1)[1]: t for name, t in found.items() if name.startswith(f"{role}.")}
        problems += _assign(role, part, mine, allow_partial)
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        line = f"the weights in '{stored.folder}' do not fit the model: {shown}"
        if not allow_partial:
            raise TrustError(line, "fetch the checkpoint again")
        print(f"warning: {line}", file=sys.stderr)
    names = {f"{role}.{key}" for role, part in parts.items() for key in part.state_dict()} if tied else set()
    for alias, source in tied.items():
        if {alias, source} <= names:
            _tie(parts, alias, source)


def _read_parts(stored: Stored, roles: Iterable[str]) -> tuple[dict[str, Tensor], list[str], list[Path]]:
    """The tensors of these roles and those they share, by full name; what is wrong; the files read completely."""
    wanted = _roles_with_ties(stored, roles)
    found: dict[str, Tensor] = {}
    problems, whole = [], []
    for file in sorted(weight_files(stored, roles)):
        complete = True
        for name, tensor in read_tensors(stored.folder / file):
            role = name.partition(".")[0]
            if role not in stored.places:
                problems.append(f"{name} is unexpected")
            elif name in found:
                problems.append(f"{name} is in two files")
            elif role in wanted:
                found[name] = tensor
            complete = complete and name in found
        if complete:
            whole.append(stored.folder / file)
    return found, problems, whole


def _check_finite(
    stored: Stored, parts: Mapping[str, nn.Module], found: Mapping[str, Tensor], whole: Sequence[Path]
) -> None:
    """Refuse NaN anywhere and infinity in a parameter; buffers may hold it, as masks do.

    Reading every number costs about as much as hashing, so a file without any is remembered as such.
    """
    paths = [stored.folder / file for file in weight_files(stored, parts)]
    if all(facts_of(path).get("finite") is True for path in paths):
        return
    odd = [name for name, tensor in found.items() if not _is_finite(tensor)]
    if not odd:
        for path in whole:
            remember(path, {"finite": True})
        return
    parameters = {f"{role}.{key}" for role, part in parts.items() for key, _ in part.named_parameters()}
    bad = [name for name in odd if name in parameters or torch.isnan(found[name]).any()]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        line = f"the weights in '{stored.folder}' hold NaN or infinity: {bad[0]}{more}"
        if os.environ.get("MMHUB_ALLOW_NONFINITE", "") in ("", "0"):
            raise TrustError(line, "the model was saved broken: use another; MMHUB_ALLOW_NONFINITE=1 loads it anyway")
        print(f"warning: {line}", file=sys.stderr)


def _is_finite(tensor: Tensor) -> bool:
    """One pass without a temporary: a sum of finite numbers is finite, save for an overflow that is looked into."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # 8-bit floats cannot be summed
        tensor = tensor.to(torch.float32)
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _assign(role: str, part: nn.Module, found: Mapping[str, Tensor], allow_partial: bool) -> list[str]:
    """Give a part the tensors that fit, all or (partially) some; return what does not fit."""
    expected = part.state_dict()
    problems = [f"{role}.{key} is unexpected" for key in found if key not in expected]
    fitting = {}
    for key, wanted in expected.items():
        problem = _misfit(found.get(key), wanted)
        if problem:
            problems.append(f"{role}.{key} {problem}")
        else:
            fitting[key] = found[key].to(wanted.dtype)
    if not problems or allow_partial:
        part.load_state_dict(fitting, strict=False, assign=True)
    return problems


def _misfit(tensor: Tensor | None, wanted: Tensor) -> str | None:
    if tensor is None:
        return "is missing"
    if tensor.shape != wanted.shape:
        return f"has shape {list(tensor.shape)}, not {list(wanted.shape)}"
    exact = tensor.is_floating_point() and torch.promote_types(tensor.dtype, wanted.dtype) == wanted.dtype
    if tensor.dtype != wanted.dtype and not exact:  # bf16 in the file and fp32 in the model lose nothing
        return f"has type {tensor.dtype}, not {wanted.dtype}".replace("torch.", "")
    return None


def _tie(parts: Mapping[str, nn.Module], alias: str, source: str) -> None:
    def owner(name: str) -> tuple[nn.Module, str]:
        role, key = name.split(".", 1)
        path, _, leaf = key.rpartition(".")
        return parts[role].get_submodule(path), leaf

    (module, leaf), (original, name) = owner(alias), owner(source)
    setattr(module, leaf, getattr(original, name))


def copy_parameters(model: nn.Module) -> None:
    """Replace memory-mapped tensors by private copies, so that training never depends on the files it came from."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


# -- safetensors ------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file by name, mapped, not copied.

    Raises:
        TrustError: the file is damaged or hostile.
    """
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is no dict
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TrustError(f"'{path}' is damaged: {error}", "fetch the checkpoint again") from None


def check_header(path: Path) -> None:
    """Refuse a safetensors header that is too large, names a tensor twice, or would take long to parse."""
    try:
        with path.open("rb") as file:
            problem = _header_problem(file)
    except OSError as error:
        problem = error.strerror
    if problem:
        raise TrustError(f"'{path}' is not a sound safetensors file: {problem}", "fetch the checkpoint again")


def _header_problem(file: BinaryIO) -> str | None:
    size = int.from_bytes(file.read(8), "little")
    if size > 10_000_000:
        return f"its header claims {size} bytes"
    head = file.read(size)
    if len(head) < size or size < 2:
        return "it is truncated"
    try:
        table = json.loads(head, object_pairs_hook=_unique, parse_constant=no_constant)
    except _Twice as error:
        return f"it names {error.args[0]!r} twice"
    except (ValueError, RecursionError):
        return "its header is not JSON"
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        return "its header is not a table of tensors"
    if len(table) > 100_000:
        return f"it holds {len(table)} tensors"
    if not all(name.isprintable() for name in table):
        return "a tensor's name is not printable"
    shapes = [entry.get("shape", []) for entry in table.values()]
    return "a tensor has more than 16 dimensions" if any(isinstance(s, list) and len(s) > 16 for s in shapes) else None


class _Twice(Exception):
    """A JSON table has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return table


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's reader takes for JSON."""
    raise ValueError(f"{name} is not JSON")
