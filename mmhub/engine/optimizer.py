"""The optimizer of a recipe, and the fp32 copies through which it trains parameters in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.config import Recipe
from mmhub.engine.blocks import find_blocks
from mmhub.model import Model
from mmhub.optim import learning_rate_groups

_HALF = (torch.bfloat16, torch.float16)


def make_optimizer(model: Model, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over what is trained of a model that is on its device, prepared and sharded.

    Each group holds `base_lr`, its learning rate before the schedule. Parameters in half precision are trained through
    fp32 copies, kept in the optimizer's state of the parameter as `master` (Micikevicius et al., arXiv:1710.03740).

    Raises:
        MmhubError: every part is frozen.
    """
    options = recipe.train
    groups = learning_rate_groups(model, recipe.model, options.learning_rate, options.weight_decay)
    fused = device.type in ("cpu", "cuda")
    optimizer: torch.optim.Optimizer
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)  # the fused one knows no shards
    elif options.optimizer == "muon":
        optimizer = MuonAndAdamW(groups, hidden_matrices(model), fused=fused)
    else:
        optimizer = torch.optim.AdamW(groups, fused=fused)
    _keep_masters(optimizer)
    return optimizer


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices given, AdamW for all else, as one optimizer.

    Muon makes the update of a matrix orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Its step is
    scaled to that of AdamW (Liu et al., arXiv:2502.16982), so that one learning rate serves both.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], matrices: set[nn.Parameter], *, fused: bool = False) -> None:
        def split(muon: bool) -> list[dict[str, Any]]:
            parts = [group | {"params": [p for p in group["params"] if (p in matrices) == muon]} for group in groups]
            return [part | {"muon": muon} for part in parts if part["params"]]

        adamw, muon = split(muon=False), split(muon=True)
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if adamw:
            self._parts[False] = torch.optim.AdamW(adamw, fused=fused)
        if muon:
            self._parts[True] = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; both parts work on this optimizer's own groups and state."""
        assert closure is None, "a closure would be evaluated once for each part"
        for muon, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            part.step()
        return None


def hidden_matrices(model: Model) -> set[nn.Parameter]:
    """The matrices Muon is for: those between layers, not embeddings, and not a head that ends in answers."""
    blocks = {id(part) for _, block in find_blocks(model.decoder) for part in block.modules()}
    heads = {id(part) for part in model.decoder.modules()} - blocks
    return {
        parameter
        for part in model.modules()
        if id(part) not in heads and "embed" not in type(part).__name__.lower()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.ndim == 2 and "weight" in name
    }


def _keep_masters(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer see fp32 copies in place of parameters in half precision, whenever it works."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.dtype in _HALF for p in parameters):
        return
    masters = _Masters(optimizer)
    optimizer.register_step_pre_hook(lambda *_: masters.enter())
    optimizer.register_step_post_hook(lambda *_: masters.leave())
    optimizer.register_load_state_dict_pre_hook(lambda *_: masters.enter())  # or the state would be cast to half
    optimizer.register_load_state_dict_post_hook(lambda *_: masters.leave(restored=True))


class _Masters:
    """The fp32 copies of an optimizer's parameters; its state of a parameter holds the copy between steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: dict[nn.Parameter, Tensor] = {}

    def enter(self) -> None:
        """Put the copies, with the gradients, in the parameters' places."""
        state = self.optimizer.state
        for parameter in self._parameters():
            if parameter.dtype in _HALF:
                known = state.pop(parameter, {})
                copy = known.pop("master", None)
                self.copies[parameter] = copy = parameter.detach().float() if copy is None else copy
                copy.grad = None if parameter.grad is None else parameter.grad.float()
                state[copy] = known
        self._replace(self.copies)

    @torch.no_grad()
    def leave(self, *, restored: bool = False) -> None:
        """Put the parameters back, rounded from the copies unless those were just `restored` beside them."""
        state = self.optimizer.state
        self._replace({copy: parameter for parameter, copy in self.copies.items()})
        for parameter, copy in self.copies.items():
            known = state.pop(copy, {})
            if restored:
                copy = known.get("master", copy)
            elif copy.grad is not None:
                parameter.copy_(copy)
            copy.grad = None
            state[parameter] = known | {"master": copy}
        self.copies = {}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _replace(self, places: Mapping[Any, Any]) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [places.get(p, p) for p in group["params"]]
