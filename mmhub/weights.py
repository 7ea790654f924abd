"""Weights between modules and safetensors files: shards, shared tensors, strict filling, building without memory.

Whatever a file says is checked before it is used. What a checkpoint folder holds besides is left to `mmhub.checkpoint`.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mmhub.errors import MmhubError, TrustError
from mmhub.files import write_file
from mmhub.hashes import facts_of, remember
from mmhub.reading import INDEX_BYTES, Twice, no_constant, parse_json, read_plain, unique

SINGLE_FILE_BYTES = 64 * 2**20  # larger models are split by component, so that parts can be fetched alone
SHARD_BYTES = 5 * 10**9
ALIGNMENT = 64  # bytes, as torch's own memory
HEADER_BYTES, HEADER_TENSORS = 10_000_000, 100_000  # what a safetensors header may have

# -- writing ----------------------------------------------------------------------------------------------------


def state_of(parts: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors by `role.name`; of those that share memory the first, the others as `tied` {alias: first}."""
    state, tied = named_tensors(parts)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}, tied


def named_tensors(parts: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `state_of`, but the parameters and buffers themselves: on their device, sharded ones as they are."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    states = {role: part.state_dict(keep_vars=True) for role, part in parts.items()}  # all alive: no address is reused
    for role, tensors in states.items():
        for key, tensor in tensors.items():
            name = f"{role}.{key}"
            place = _memory(tensor)
            if tensor.numel() and place in seen:
                tied[name] = seen[place]
            else:
                seen[place] = name
                state[name] = tensor
    return state, tied


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies; what has no address, being sharded or on the meta device, is what it is."""
    if tensor.is_meta or hasattr(tensor, "device_mesh"):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def write_weights(state: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Write tensors named `role.name`; return the weights entry (file or index) of each role."""
    total = sum(t.nbytes for t in state.values())
    check_space(folder, total)
    shards = _shards(state)
    for file, names in shards.items():
        _write_aligned({name: state[name] for name in names}, folder / file)
    roles = {name.split(".", 1)[0] for name in state}
    if set(shards) == {"model.safetensors"}:
        return dict.fromkeys(roles, "model.safetensors")
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return dict.fromkeys(roles, "model.safetensors.index.json")


# -- 8 bits -----------------------------------------------------------------------------------------------------

SCALE = ":scale"  # ends the name of the scales of a tensor of codes; no tensor of a module has a colon in its name
_LEVELS = 127
_WORTHWHILE = 1024  # numbers from which on a parameter is quantised
_SHORTEST = 32  # numbers that share a scale at least: what rounding does to fewer is not worth the bytes
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quantized_state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """As the tensors of `state_of`, but larger matrices and convolutions as codes of 8 bits and as `NAME:scale`.

    weight = codes * scale, codes from -127 to 127. A scale belongs to an output channel of a convolution or of GPT-2's
    turned layers, and to a row of anything else: an output of a linear layer, a word of an embedding. It is fp32, and
    has the weight's number of dimensions. Vectors, buffers and what is small stay as they are.

    Raises:
        TrustError: a weight is infinite or not a number.
    """
    state, _ = state_of(parts)
    shared = _shared_along(parts)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        dims = shared.get(name, ())
        count = math.prod(tensor.shape[dim] for dim in dims)
        if tensor.numel() < _WORTHWHILE or count < _SHORTEST:
            found[name] = tensor
        else:
            found[name], found[name + SCALE] = _codes(name, tensor, dims)
    return found


def _shared_along(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Of each floating parameter with at least two dimensions, by full name, those along which a scale is shared."""
    found: dict[str, tuple[int, ...]] = {}
    for role, part in parts.items():
        for prefix, module in part.named_modules(prefix=role):
            for leaf, parameter in module._parameters.items():
                if parameter is None or parameter.ndim < 2 or not parameter.is_floating_point():
                    continue
                whole = isinstance(module, _CONVOLUTIONS) or parameter.shape[-1] < 8
                turned = type(module).__name__ == "Conv1D" and parameter.ndim == 2  # of GPT-2: (in, out)
                found[f"{prefix}.{leaf}"] = tuple(range(1, parameter.ndim)) if whole else (0,) if turned else (-1,)
    return found


def _codes(name: str, weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    largest = weight.float().abs().amax(dims, keepdim=True)
    if not torch.isfinite(largest).all():
        raise TrustError(f"the weight {name} is infinite or not a number", "fetch or train the model again")
    scale = (largest / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)  # fp16 has no room for those of small rows
    codes = (weight.float() / scale).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return codes, scale.contiguous()


def _restore(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Turn codes and scales back into weights, in place; return what does not fit together, which is left out.

    Codes that are no expected tensor's, or have another shape than it, stay as they are: they are refused later, and
    widened they would take four times the memory of a file that nobody made.
    """
    problems = []
    scales = {name: found.pop(name) for name in list(found) if name.endswith(SCALE)}
    for scale_name, scale in scales.items():
        name = scale_name.removesuffix(SCALE)
        codes, wanted = found.get(name), expected.get(name)
        problem = "has no codes" if codes is None else _unfit_scale(codes, scale)
        if codes is not None and not problem and wanted is not None and codes.shape == wanted.shape:
            found[name] = codes.to(torch.float32).mul_(scale.float()).to(wanted.dtype)
            narrow = found[name].itemsize < 4 and not _is_finite(found[name])
            problem = "holds a number that is too large" if narrow else None
        if problem:
            problems.append(f"{scale_name} {problem}")
            found.pop(name, None)
    return problems


def _expected(parts: Mapping[str, nn.Module], stored: Stored) -> dict[str, Tensor]:
    """What the parts have, and what they share, by full name."""
    state = {f"{role}.{key}": tensor for role, part in parts.items() for key, tensor in part.state_dict().items()}
    return {source: state[alias] for alias, source in stored.tied.items() if alias in state} | state


def _unfit_scale(codes: Tensor, scale: Tensor) -> str | None:
    """What is wrong with scales; codes times sound ones have the codes' shape and are finite."""
    if codes.dtype != torch.int8:
        return f"is for codes of type {codes.dtype}, not int8".replace("torch.", "")
    if scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"has type {scale.dtype}".replace("torch.", "")
    pairs = zip(scale.shape, codes.shape, strict=False)
    if scale.ndim != codes.ndim or any(mine not in (1, theirs) for mine, theirs in pairs):
        return f"has shape {list(scale.shape)}, which does not fit codes of shape {list(codes.shape)}"
    sound = bool(((scale >= 0) & torch.isfinite(scale.float() * 128)).all())
    return None if sound else "holds a number that is none, negative or too large"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors in CPU memory to one safetensors file."""
    check_space(path.parent, sum(t.nbytes for t in tensors.values()))
    _write_aligned(tensors, path)


def _write_aligned(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whose tensors can be mapped at multiples of 64 bytes.

    A matrix product may round its last bit by where in memory the weights stand, and a loaded model must answer as the
    saved one. The format has no gaps between tensors, so those whose size is no multiple come last, and are copied
    when they are read. The library's own writer aligns to 8 bytes.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT > 0, -tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind = _NAMES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_BYTES or len(names) > HEADER_TENSORS:
        raise MmhubError(f"{len(names):,} tensors are too many for one safetensors file", "join some into larger ones")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if tensors[name].nbytes:
                file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError where that many bytes do not fit on the disk."""
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


_DRAWS = (
    *((torch.Tensor, name) for name in ("normal_", "uniform_", "zero_", "fill_")),
    *((nn.init, name) for name in ("normal_", "uniform_", "zeros_", "ones_", "constant_", "trunc_normal_")),
    *((nn.init, name) for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")),
)


_patching = threading.RLock()


@contextmanager
def meta_parameters(limit: int | None = None) -> Iterator[None]:
    """Put every parameter that this thread registers inside the block on the meta device: no memory, no initialisation.

    Buffers stay real, because some are tables that no checkpoint holds (rotary angles, position indices). Nothing is
    drawn for meta tensors: torch imports its compiler for normal ones, which takes seconds. `limit` is that of
    `few_modules`.
    """
    thread = threading.get_ident()
    with _patching, ExitStack() as undo:
        if limit is not None:
            undo.enter_context(few_modules(limit))
        register = nn.Module.register_parameter

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and not param.is_meta and threading.get_ident() == thread:
                empty = torch.empty(param.shape, dtype=param.dtype, device="meta")
                param = nn.Parameter(empty, requires_grad=param.requires_grad)
            register(module, name, param)

        _replace(undo, nn.Module, "register_parameter", on_meta)
        # Classes and modules, not a TorchFunctionMode: that would take as long as all the rest of building a model.
        for owner, name in _DRAWS:
            _replace(undo, owner, name, _real_only(getattr(owner, name), thread))
        yield


@contextmanager
def few_modules(limit: int) -> Iterator[None]:
    """Raise TrustError once this thread has made more than `limit` modules inside the block.

    What a stranger's config.json asks for is built before its weights are read: three million layers would take hours.
    """
    thread, left = threading.get_ident(), [limit]
    start, register = nn.Module.__init__, nn.Module.register_parameter

    def count() -> None:
        left[0] -= threading.get_ident() == thread
        if left[0] < 0:
            what = f"config.json asks for more than {limit:,} layers and weights, far more than its weights are"
            raise TrustError(what, "fetch the checkpoint again")

    def counted_start(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        count()
        start(module, *args, **kwargs)

    def counted_register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        count()
        register(module, name, param)

    with _patching, ExitStack() as undo:
        _replace(undo, nn.Module, "__init__", counted_start)
        _replace(undo, nn.Module, "register_parameter", counted_register)
        yield


@dataclass(frozen=True)
class Amount:
    """What safetensors files hold, by their headers."""

    tensors: int
    numbers: int

    @property
    def modules(self) -> int:
        """How many modules and parameters a model of so many tensors may have."""
        return 10 * self.tensors + 3_000


def amount_in(paths: Iterable[Path]) -> Amount:
    """Return how much files hold, by their headers and sizes.

    Raises:
        TrustError: one is missing, or its header is not sound.
    """
    tensors = numbers = 0
    for path in paths:
        start, table = _checked_header(path)
        tensors += len(table)
        numbers += max(0, path.stat().st_size - start)  # the smallest take a byte
    return Amount(tensors, numbers)


_LARGE = 2**25  # a table of so many numbers takes 256 MB at most
_NO_SIZES = ("length", "theta", "seed", "rate")  # settings that may be large and make nothing large
_STATISTICS = ("mean", "std")  # of targets, in their own units


def check_sizes(table: Any, held: Amount, where: str) -> None:
    """Refuse settings with a size that no tensor among those `held` can have, before anything is built by them.

    Raises:
        TrustError: names the setting.
    """
    limit = max(_LARGE, held.numbers)
    todo: list[tuple[str, Any]] = [("", table)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(str(key), one) for key, one in value.items()]
        elif isinstance(value, list):
            todo += [(name, one) for one in value]
        elif isinstance(value, (int, float)) and value > limit and not _no_size(name):
            what = f"{where}: {name} is {str(value)[:24]}, and all its weights are {held.numbers:,} bytes"
            raise TrustError(what, "fetch the checkpoint again")


def _no_size(name: str) -> bool:
    return any(word in name for word in _NO_SIZES) or name.rpartition("_")[2] in _STATISTICS


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `undo` is closed; one that a class inherits becomes inherited again."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _real_only(draw: Callable[..., Any], thread: int) -> Callable[..., Any]:
    def real_only(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_meta and threading.get_ident() == thread:
            return tensor
        return draw(tensor, *args, **kwargs)

    return real_only


# -- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a folder keeps the weights of a model's parts."""

    folder: Path
    places: Mapping[str, str]  # role -> file or index, "" for a part without weights
    tied: Mapping[str, str]  # tensors that share another's memory, by full name
    listed: Set[str]  # the files that may be read
    quantized: bool = False  # some are codes of 8 bits: see `quantized_state`


def weight_files(stored: Stored, roles: Iterable[str]) -> set[str]:
    """Return the files that hold the tensors of these roles, and those that they share."""
    files: set[str] = set()
    shards: dict[str, dict[str, set[str]]] = {}
    for role in _roles_with_ties(stored, roles):
        weights = stored.places[role]
        if weights.endswith(".index.json"):
            if weights not in shards:
                shards[weights] = _read_index(stored, weights)
            files |= shards[weights].get(role, set())
        elif weights:
            files.add(weights)
    return files


def _roles_with_ties(stored: Stored, roles: Iterable[str]) -> set[str]:
    """These roles, and those that hold a tensor which one of them shares."""
    roles = set(roles)
    return roles | {
        source.partition(".")[0] for alias, source in stored.tied.items() if alias.partition(".")[0] in roles
    }


def _read_index(stored: Stored, name: str) -> dict[str, set[str]]:
    """The files of each role."""
    index = stored.folder / name
    found: dict[str, set[str]] = {}
    try:
        for tensor, file in parse_json(read_plain(index, INDEX_BYTES))["weight_map"].items():
            found.setdefault(tensor.partition(".")[0], set()).add(str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrustError(f"'{index}' is damaged: {error}", "fetch the checkpoint again") from None
    for file in set[str]().union(*found.values()) - stored.listed:
        raise TrustError(f"'{index}' points to {file!r}, which config.json does not list", "fetch the checkpoint again")
    return found


def fill(
    parts: Mapping[str, nn.Module],
    stored: Stored,
    *,
    allow_partial: bool,
    known: Mapping[str, Tensor] | None = None,
) -> None:
    """Assign the tensors of the files, and `known` ones from elsewhere, to the parts, strictly; tie what was tied.

    Raises:
        TrustError: a file is damaged, or what it holds does not fit (a warning alone with `allow_partial`), or a
            parameter is not a number (a warning alone with MMHUB_ALLOW_NONFINITE=1).
    """
    paths = [stored.folder / file for file in sorted(weight_files(stored, parts))]
    found, problems, whole = _read_parts(stored, parts, paths)
    _check_finite(stored, parts, found, paths, whole)
    problems += _restore(found, _expected(parts, stored)) if stored.quantized else []
    problems += [f"{name} is in '{stored.folder}' and in its base" for name in found.keys() & (known or {}).keys()]
    found |= known or {}
    tied = {alias: source for alias, source in stored.tied.items() if alias.partition(".")[0] in parts}
    for alias, source in tied.items():
        if source in found:
            found[alias] = found[source]
    mine: dict[str, dict[str, Tensor]] = {role: {} for role in parts}
    for name, tensor in found.items():
        role, _, key = name.partition(".")
        if role in mine:
            mine[role][key] = tensor
    for role, part in parts.items():
        problems += _assign(role, part, mine[role], allow_partial)
    names = {f"{role}.{key}" for role, part in parts.items() for key in part.state_dict()} if tied else set()
    problems += [f"{alias} is tied and unknown" for alias in tied if alias not in names]
    problems += [f"{one} is tied to and unknown" for one in tied.values() if _role(one) in parts and one not in names]
    if problems:
        line = _misfit_line(f"'{stored.folder}'", problems)
        if not allow_partial:
            raise TrustError(line, "fetch the checkpoint again")
        print(f"warning: {line}", file=sys.stderr)
    for alias, source in tied.items():
        if {alias, source} <= names:
            tie(parts, alias, source)


def _role(tensor: str) -> str:
    return tensor.partition(".")[0]


def assign(role: str, part: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Give a part exactly the tensors `found`, without copying them.

    Raises:
        TrustError: they are others than it has, or of other shapes; `source` says where they are from.
    """
    problems = _assign(role, part, found, allow_partial=False)
    if problems:
        raise TrustError(_misfit_line(source, problems), "fetch the checkpoint again")


def _misfit_line(source: str, problems: Sequence[str]) -> str:
    shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
    return f"the weights in {source} do not fit the model: {shown}"


def _read_parts(
    stored: Stored, roles: Iterable[str], paths: Sequence[Path]
) -> tuple[dict[str, Tensor], list[str], list[Path]]:
    """The tensors of these roles and those they share, by full name; what is wrong; the files read completely."""
    wanted = _roles_with_ties(stored, roles)
    found: dict[str, Tensor] = {}
    problems, whole = [], []
    for path in paths:
        complete = True
        for name, tensor in read_tensors(path):
            role = name.partition(".")[0]
            if role not in stored.places:
                problems.append(f"{name} is unexpected")
            elif name in found:
                problems.append(f"{name} is in two files")
            elif role in wanted:
                found[name] = tensor
            complete = complete and name in found
        if complete:
            whole.append(path)
    return found, problems, whole


def _check_finite(
    stored: Stored,
    parts: Mapping[str, nn.Module],
    found: Mapping[str, Tensor],
    paths: Sequence[Path],
    whole: Sequence[Path],
) -> None:
    """Refuse NaN anywhere and infinity in a parameter; buffers may hold it, as masks do.

    Reading every number costs about as much as hashing, so a file without any is remembered as such.
    """
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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is one; False says nothing, for buffers may hold infinity."""
    return all(map(_is_finite, tensors))


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
    places = _places(part)
    expected = part.state_dict() if places is None else {key: table[leaf] for key, (table, leaf) in places.items()}
    problems = [f"{role}.{key} is unexpected" for key in found if key not in expected]
    fitting = {}
    for key, wanted in expected.items():
        tensor = found.get(key)
        problem = _misfit(tensor, wanted)
        if tensor is None or problem:
            problems.append(f"{role}.{key} {problem}")
        else:
            fitting[key] = tensor if tensor.dtype == wanted.dtype else tensor.to(wanted.dtype)
    if problems and not allow_partial:
        return problems
    if places is None:
        part.load_state_dict(fitting, strict=False, assign=True)
    for key, (table, leaf) in (places or {}).items():
        if key in fitting:
            old, new = table[leaf], fitting[key]
            table[leaf] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return problems


def _places(part: nn.Module) -> dict[str, tuple[dict[str, Any], str]] | None:
    """Where a part keeps what its `state_dict` shows; None if one of its modules has a way of its own.

    `state_dict` and `load_state_dict` take most of the time of a load without copies, for the sake of such modules.
    """
    found: dict[str, tuple[dict[str, Any], str]] = {}
    todo = [("", part)]
    while todo:
        prefix, module = todo.pop()
        if not _is_plain(type(module)) or any(getattr(module, hooks) for hooks in _HOOKS):  # type: ignore[arg-type]
            return None
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found[prefix + leaf] = (module._parameters, leaf)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[prefix + leaf] = (module._buffers, leaf)
        todo += [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
    return found


_WAYS = (
    *("state_dict", "_save_to_state_dict", "get_extra_state", "load_state_dict", "_load_from_state_dict"),
    *("__setattr__", "register_parameter"),
)
_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


@functools.lru_cache(maxsize=512)  # torch makes a class for each parametrized module
def _is_plain(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in _WAYS)


def _misfit(tensor: Tensor | None, wanted: Tensor) -> str | None:
    if tensor is None:
        return "is missing"
    if tensor.shape != wanted.shape:
        return f"has shape {list(tensor.shape)}, not {list(wanted.shape)}"
    exact = tensor.is_floating_point() and torch.promote_types(tensor.dtype, wanted.dtype) == wanted.dtype
    if tensor.dtype != wanted.dtype and not exact:  # bf16 in the file and fp32 in the model lose nothing
        return f"has type {tensor.dtype}, not {wanted.dtype}".replace("torch.", "")
    return None


def tie(parts: Mapping[str, nn.Module], alias: str, source: str) -> None:
    """Let the tensor `alias` be the tensor `source`, both by full name."""

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
    """Yield the tensors of a safetensors file by name, mapped, not copied; what is written to them stays private.

    Raises:
        TrustError: the file is damaged or hostile.
    """
    from safetensors import SafetensorError, safe_open

    start, table = _checked_header(path)
    try:
        with safe_open(path, framework="pt") as sound, path.open("rb") as file:  # the library checks every offset
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name in sound.keys():  # noqa: SIM118 - a safe_open handle is no dict
                view = _view(mapped, start, table[name])
                yield name, sound.get_tensor(name) if view is None else view
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise TrustError(f"'{path}' is damaged: {error}", "fetch the checkpoint again") from None


# The usual ones, which are mapped; safetensors itself reads all others.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


def _view(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor | None:
    """A tensor in a mapped file, as `get_tensor` gives it in seven times the time; None where that is needed."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None or sys.byteorder != "little":
        return None
    begin, end = entry["data_offsets"]
    count = (end - begin) // dtype.itemsize
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    if (start + begin) % dtype.itemsize:
        return None
    view = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin).view(entry["shape"])
    ours = start % ALIGNMENT == 0  # other libraries' weights stand anywhere, and copying all of them would take long
    return view.clone() if ours and begin % ALIGNMENT else view


def check_header(path: Path) -> None:
    """Refuse a safetensors header that is too large, names a tensor twice, or would take long to parse."""
    _checked_header(path)


def _checked_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header, sound as JSON and of a sane size."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            table = _read_header(file, size)
    except OSError as error:
        table = str(error.strerror)
    if isinstance(table, str):
        raise TrustError(f"'{path}' is not a sound safetensors file: {table}", "fetch the checkpoint again")
    return 8 + size, table


def _read_header(file: BinaryIO, size: int) -> dict[str, Any] | str:
    """The header of `size` bytes, or what is wrong with it."""
    if size > HEADER_BYTES:
        return f"its header claims {size} bytes"
    head = file.read(size)
    if len(head) < size or size < 2:
        return "it is truncated"
    try:
        table = json.loads(head, object_pairs_hook=unique, parse_constant=no_constant)
    except Twice as error:
        return str(error)
    except (ValueError, RecursionError):
        return "its header is not JSON"
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        return "its header is not a table of tensors"
    if len(table) > HEADER_TENSORS:
        return f"it holds {len(table)} tensors"
    if not all(name.isprintable() for name in table):
        return "a tensor's name is not printable"
    shapes = [entry.get("shape", []) for entry in table.values()]
    if any(isinstance(shape, list) and len(shape) > 16 for shape in shapes):
        return "a tensor has more than 16 dimensions"
    return table
