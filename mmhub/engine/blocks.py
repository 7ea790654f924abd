"""The repeated blocks of a model: what is compiled once for all, recomputed in the backward pass, or sharded."""

from __future__ import annotations

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks with their names, in the model's order.

    Blocks are the members of a list or sequence of at least two modules that are all of one class and have parts
    themselves. The outermost list counts: a block within a block is none.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    _collect(model, "", found)
    return list(found.values())


def _collect(module: nn.Module, prefix: str, found: dict[int, tuple[str, nn.Module]]) -> None:
    repeated = _is_repeated(module)
    for name, child in module.named_children():
        if repeated:
            found.setdefault(id(child), (prefix + name, child))
        else:
            _collect(child, f"{prefix}{name}.", found)


def _is_repeated(module: nn.Module) -> bool:
    children = list(module.children())
    if not isinstance(module, _LISTS) or len(children) < 2:
        return False
    kind = type(children[0])
    alike = all(type(child) is kind for child in children)
    return alike and not issubclass(kind, _LISTS) and any(True for _ in children[0].children())
