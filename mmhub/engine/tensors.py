"""The tensors that training goes on from, by name: copied out of a model and its optimizer, and put back into others.

A process holds either whole tensors or, of sharded ones (DTensors), a box; what was written as boxes of one layout is
read into any other. Files, folders and their order are left to `mmhub.engine.state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from mmhub.engine.ranks import Ranks
from mmhub.errors import MmhubError, TrustError
from mmhub.model import Model
from mmhub.weights import named_tensors, read_tensors

# What names begin with: model/NAME, optimizer/KEY/NAME, average/NAME and carried/NAME.
MODEL, OPTIMIZER, AVERAGE, CARRIED = "model/", "optimizer/", "average/", "carried/"
Number = float | int | bool | None


class Box(msgspec.Struct):
    """Where in a tensor of `shape` a piece begins."""

    shape: list[int]
    offset: list[int]


@dataclass(frozen=True)
class Copied:
    """What one process writes: tensors in CPU memory, and the boxes of those that are pieces."""

    tensors: dict[str, Tensor]
    boxes: dict[str, Box]
    numbers: dict[str, dict[str, Number]]  # optimizer state that is no tensor, by tensor name and key
    trained: list[str]  # the names of what the optimizer trains
    tied: dict[str, str]  # {alias: name}
    sharded: bool  # some tensors are in pieces, so that every process has some


# -- out of a model ---------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_tensors(
    model: Model,
    optimizer: Any,
    buffers: dict[str, Tensor],
    *,
    first: bool,
    carried: Mapping[str, Tensor] | None = None,
    averages: Mapping[str, Tensor] | None = None,
) -> Copied:
    """Copy what this process holds; whole tensors are the `first` one's to write.

    `carried` is what `gather_carried` gave, `averages` those of the weights. `buffers` keeps the memory for the next
    time; it is pinned where the tensors are on a GPU.
    """
    reshard(model)
    state, tied = named_tensors(model.parts())
    names = parameter_names(model)
    found = {MODEL + name: tensor for name, tensor in state.items()}
    numbers: dict[str, dict[str, Number]] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in values.items():
            if isinstance(value, Tensor):
                found[f"{OPTIMIZER}{key}/{name}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers.setdefault(name, {})[key] = value
            else:
                raise MmhubError(f"the optimizer keeps a {type(value).__name__} as {key!r}", "it may keep tensors only")
    found |= {CARRIED + name: tensor for name, tensor in (carried or {}).items()}
    found |= {AVERAGE + name: tensor for name, tensor in (averages or {}).items()}
    pieces = {name: _own_piece(tensor, name, first) for name, tensor in found.items()}
    written = {name: piece for name, piece in pieces.items() if piece is not None}
    tensors = {name: _copy(name, piece, buffers) for name, (piece, _) in written.items()}
    _await_copies(piece for piece, _ in written.values())
    boxes = {name: box for name, (_, box) in written.items() if box is not None}
    trained = _trained_names(optimizer, names)
    return Copied(tensors, boxes, numbers, trained, tied, any(map(_is_sharded, found.values())))


def gather_carried(model: Model, ranks: Ranks) -> dict[str, Tensor]:
    """Return the states that a recurrent language model carries from batch to batch, of the rows of all processes.

    Row i of a batch is process i % world's; every process must call this.
    """
    own: dict[str, Tensor] = getattr(model.decoder, "carried", {})
    if not ranks.several:
        return dict(own)
    said = {name: (str(tensor.dtype), list(tensor.shape[1:]), tensor.tolist()) for name, tensor in own.items()}
    parts = ranks.gather(said)
    found: dict[str, Tensor] = {}
    for name, (dtype, shape, _) in parts[0].items():  # the first process has as many rows as any
        rows = [part[name][2] if name in part else [] for part in parts]
        whole = torch.zeros(sum(map(len, rows)), *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for rank, values in enumerate(rows):
            whole[rank :: len(parts)] = torch.tensor(values, dtype=whole.dtype).reshape(-1, *shape)
        found[name] = whole
    return found


def fill_carried(model: Model, stored: Mapping[str, Stored], ranks: Ranks) -> None:
    """Give the decoder this process's rows of what `gather_carried` collected."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith(CARRIED):
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            _read_box(tensor, whole, [0] * whole.ndim, name)
            found[name.removeprefix(CARRIED)] = whole[ranks.rank :: ranks.world].to(model.device)
    if found:
        decoder: Any = model.decoder
        decoder.carried = found


@torch.no_grad()
def fill_averages(averages: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Copy the stored averages of the weights into these, in place.

    Raises:
        TrustError: there are others.
    """
    known = {name.removeprefix(AVERAGE) for name in stored if name.startswith(AVERAGE)}
    if known != averages.keys():
        odd = min(known ^ averages.keys())
        raise TrustError(f"the checkpoint's averages do not fit the model ({odd} is not in both)", "use another")
    for name, tensor in averages.items():
        _fill(tensor, stored[AVERAGE + name], name)


def reshard(model: Model) -> None:
    """Leave to every process its own pieces: after a forward pass alone, FSDP holds the last group whole."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def parameter_names(model: Model) -> dict[int, str]:
    """`role.name` by the parameter's id; of tied ones the first, as in `named_tensors`."""
    names: dict[int, str] = {}
    for role, part in model.parts().items():
        for key, parameter in part.named_parameters():
            names.setdefault(id(parameter), f"{role}.{key}")
    return names


def _trained_names(optimizer: Any, names: Mapping[int, str]) -> list[str]:
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing them, which one process alone never needs."""
    return hasattr(tensor, "device_mesh")


def _own_piece(tensor: Any, name: str, first: bool) -> tuple[Tensor, Box | None] | None:
    """What this process writes of a tensor, and where in it that lies; of equal copies one process writes the only."""
    if not _is_sharded(tensor):
        return (tensor, None) if first else None
    place, local = tensor.device_mesh.get_coordinate(), tensor.to_local()
    if place is None or any(at and p.is_replicate() for at, p in zip(place, tensor.placements, strict=True)):
        return None
    if not local.numel() and (tensor.numel() or any(place)):
        return None
    return local, Box(list(tensor.shape), _offset(tensor, name))


def _offset(tensor: Any, name: str) -> list[int]:
    """Where this process's piece of a DTensor begins.

    A dimension is cut as `torch.chunk` does, once for each dimension of the mesh that shards it, from left to right.

    Raises:
        MmhubError: the pieces are no boxes, as with tensor parallelism inside of FSDP.
    """
    from torch.distributed.tensor import Replicate, Shard

    shape, offset = list(tensor.shape), [0] * tensor.ndim
    places = tensor.device_mesh.get_coordinate()
    for size, place, placement in zip(tensor.device_mesh.shape, places, tensor.placements, strict=True):
        if type(placement) not in (Shard, Replicate):
            raise MmhubError(f"{name} is laid out as {placement}, which cannot be saved", "shard it in whole chunks")
        if type(placement) is Shard:
            chunk = -(-shape[placement.dim] // size)
            begin = min(shape[placement.dim], chunk * place)
            offset[placement.dim] += begin
            shape[placement.dim] = min(chunk, shape[placement.dim] - begin)
    assert shape == list(tensor.to_local().shape), f"{name}: {shape} is not {list(tensor.to_local().shape)}"
    return offset


def _copy(name: str, tensor: Tensor, buffers: dict[str, Tensor]) -> Tensor:
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)


def _await_copies(tensors: Iterable[Tensor]) -> None:
    """Wait for what was copied from each GPU; the current device's stream knows nothing of another's."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


# -- out of files -----------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor in files: its shape, and the pieces of it as (offset, mapped tensor)."""

    shape: list[int]
    dtype: torch.dtype
    pieces: list[tuple[list[int], Tensor]] = field(default_factory=list)


def add_stored(found: dict[str, Stored], path: Path, prefix: str, boxes: Mapping[str, Box]) -> None:
    """Add the tensors of a safetensors file, whole but for those with a box; nothing but its header is read yet."""
    for name, tensor in read_tensors(path):
        box = boxes.get(prefix + name) or Box(list(tensor.shape), [0] * tensor.ndim)
        stored = found.setdefault(prefix + name, Stored(box.shape, tensor.dtype))
        if stored.shape != box.shape or stored.dtype != tensor.dtype:
            raise TrustError(f"'{path}': {name} differs in shape or type from its other pieces", "use another")
        stored.pieces.append((box.offset, tensor))


def _read_box(stored: Stored, target: Tensor, offset: Sequence[int], name: str) -> None:
    """Fill `target`, which begins at `offset` of the stored tensor, from whatever pieces overlap it."""
    filled = 0
    for begin, piece in stored.pieces:
        low = [max(a, b) for a, b in zip(offset, begin, strict=True)]
        ends = zip(offset, target.shape, begin, piece.shape, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if all(i < j for i, j in zip(low, high, strict=True)):
            target[_slices(low, high, offset)].copy_(piece[_slices(low, high, begin)])
            filled += math.prod(j - i for i, j in zip(low, high, strict=True))
    if filled != target.numel():
        raise TrustError(f"{name} is not whole: {filled} of {target.numel()} numbers are there", "use another")


def _slices(low: Sequence[int], high: Sequence[int], offset: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i - o, j - o) for i, j, o in zip(low, high, offset, strict=True))


# -- into a model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device) -> None:
    """Give memory on `device` to whatever is on the meta device; the numbers in it are still to come.

    Parameters stay the same objects, so that ties, optimizers and FSDP still know them.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@torch.no_grad()
def fill_model(model: Model, stored: Mapping[str, Stored]) -> None:
    """Copy stored parameters and buffers into a model, strictly; of sharded ones what this process holds.

    Raises:
        TrustError: a tensor is missing, unexpected, or of another shape.
    """
    reshard(model)
    parts = model.parts()
    state, _ = named_tensors(parts)
    names = {name.removeprefix(MODEL) for name in stored if name.startswith(MODEL)}
    problems = [f"{name} is unexpected" for name in sorted(names - state.keys())]
    problems += [f"{name} is missing" for name in state if name not in names]
    common = {name: stored[MODEL + name] for name in state if name in names}
    problems += [f"{name} {text}" for name, found in common.items() for text in _misfits(found, state[name])]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise TrustError(f"the checkpoint does not fit the model: {'; '.join(problems[:4])}{more}", "use another")
    for name, tensor in state.items():
        _fill(tensor, common[name], name)
    for role, part in parts.items():
        own = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
        mine = {name.partition(".")[2]: tensor for name, tensor in state.items() if name.partition(".")[0] == role}
        if any(id(tensor) not in own for tensor in mine.values()):  # it shows copies, and has its own way to load
            part.load_state_dict(mine, strict=False)


def _misfits(stored: Stored, wanted: Tensor) -> Iterator[str]:
    if stored.shape != list(wanted.shape):
        yield f"has shape {stored.shape}, not {list(wanted.shape)}"
    elif torch.promote_types(stored.dtype, wanted.dtype) != wanted.dtype:
        yield f"has type {stored.dtype}, not {wanted.dtype}".replace("torch.", "")


def _fill(tensor: Any, stored: Stored, name: str) -> None:
    if not _is_sharded(tensor):
        _read_box(stored, tensor, [0] * tensor.ndim, name)
    elif tensor.to_local().numel():
        _read_box(stored, tensor.to_local(), _offset(tensor, name), name)


@torch.no_grad()
def fill_optimizer(
    optimizer: Any,
    names: Mapping[int, str],
    stored: Mapping[str, Stored],
    numbers: Mapping[str, Mapping[str, Number]],
    trained: Sequence[str],
) -> None:
    """Give an optimizer, which may not have made a step yet, the stored state, each tensor laid out as its parameter.

    `names` are those of `parameter_names`.

    Raises:
        MmhubError: it trains other tensors than the checkpoint.
    """
    here = _trained_names(optimizer, names)
    if {*here} != {*trained}:
        odd = min({*here} ^ {*trained}, default="")
        counts = f"the checkpoint trains {len(trained)} tensors, the recipe {len(here)}"
        raise MmhubError(f"{counts} ({odd} is not in both)", "use the same recipe")
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers.items()}
    parameters = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    for full, found in stored.items():
        if full.startswith(OPTIMIZER):
            _, key, name = full.split("/", 2)
            parameter, group = parameters[name]
            state.setdefault(name, {})[key] = _state_like(parameter, found, key, full, group)
    for name, (parameter, _) in parameters.items():
        if name in state:
            optimizer.state[parameter] = state[name]


def _state_like(parameter: Any, stored: Stored, key: str, name: str, group: Mapping[str, Any]) -> Tensor:
    """Make a state tensor where torch's optimizers make it: beside its parameter, and the count of steps on the CPU.

    A fused or capturable optimizer counts beside the parameter too.
    """
    parameter = parameter.detach()
    counts = key == "step" and not stored.shape
    if stored.shape == list(parameter.shape) and not counts:
        found = torch.empty_like(parameter, dtype=stored.dtype)
    else:
        away = counts and not (group.get("fused") or group.get("capturable"))
        found = torch.empty(stored.shape, dtype=stored.dtype, device="cpu" if away else parameter.device)
    _fill(found, stored, name)
    return found
