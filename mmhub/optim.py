"""What decides an optimizer step besides the gradient: parameter groups, the learning-rate schedule, and seeds."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

from mmhub.config import ModelRecipe, PartRecipe, Recipe
from mmhub.data.loader import row_seed
from mmhub.errors import MmhubError, UsageError
from mmhub.model import Model


def learning_rate_groups(model: Model, recipe: ModelRecipe, rate: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices only, and each encoder's own learning-rate multiplier and decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    seen: set[int] = set()
    for role, part in model.parts().items():
        own = recipe.encoders.get(role.removesuffix("_encoder"), PartRecipe())
        shares = _layer_shares(part, role, own.layer_decay)
        for name, parameter in part.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                key = (own.lr_multiplier * shares.get(name, 1.0), decay if parameter.ndim > 1 else 0.0)
                groups.setdefault(key, []).append(parameter)
    if not groups:
        raise MmhubError("nothing to train: every part is frozen", "unfreeze an encoder, or just evaluate the model")
    return [
        {"params": parameters, "lr": rate * factor, "base_lr": rate * factor, "weight_decay": weight}
        for (factor, weight), parameters in groups.items()
    ]


def _layer_shares(part: Any, role: str, decay: float) -> dict[str, float]:
    """What the parameters of an encoder's layers learn at, as a share of what follows the last of them, by name.

    Layer l of L learns at decay ** (L + 1 - l), what stands before the first at decay ** (L + 1), as in ELECTRA (Clark
    et al., arXiv:2003.10555) and BEiT (Bao et al., arXiv:2106.08254).

    Raises:
        UsageError: the encoder has no layers that can be told apart.
    """
    if decay == 1:
        return {}
    numbers: dict[str, int] = part.layer_numbers()
    if not numbers:
        where = f"model.encoders.{role.removesuffix('_encoder')}.layer_decay"
        raise UsageError(f"{where}: {type(part).__name__} has no layers with numbers", "leave it out")
    last = max(numbers.values())
    return {name: decay ** (last + 1 - number) for name, number in numbers.items()}


def learning_rate_factor(step: int, total: int, recipe: Recipe) -> float:
    """Linear warm-up, then what the schedule says, never below the minimum.

    "cosine" is half a cosine down to it (Loshchilov and Hutter, arXiv:1608.03983), "inverse-sqrt" falls with the root
    of the step from where the warm-up ended (Vaswani et al. 2017, section 5.3), whatever the planned number of steps.
    """
    options = recipe.train
    warmup = options.warmup if options.warmup >= 1 else options.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    low = options.min_learning_rate / options.learning_rate if options.learning_rate else 0.0
    if options.schedule == "inverse-sqrt":
        return max(low, math.sqrt(warmup / step))
    done = (step - warmup) / max(1.0, total - warmup)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def seed_step(seed: int, step: int) -> None:
    """Seed every generator a module may draw from, so that a step's dropout depends on its number alone."""
    number = row_seed(seed, step)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # the legacy state is the one libraries draw from
