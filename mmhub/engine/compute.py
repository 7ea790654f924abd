"""How a model is computed: precision, memory layout, compilation, recomputation. Nothing here changes what it learns.

All of it happens in place and leaves the names of the weights alone, so that checkpoints fit whatever was chosen.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mmhub.config import TrainRecipe
from mmhub.device import keep_memory, use_fast_matmul
from mmhub.engine.blocks import find_blocks
from mmhub.errors import UsageError
from mmhub.model import Model

LARGE = 1024  # width from which products in 8 bits are faster than the conversions they need


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context to run forward passes in: products in `precision`, whatever the parameters are stored in."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def prepare_model(model: Model, options: TrainRecipe, device: torch.device, precision: torch.dtype) -> None:
    """Make the model, which is on its device, compute as the recipe says; before it is wrapped or sharded.

    Raises:
        UsageError: the recipe asks for what this machine, precision or model cannot do.
    """
    use_fast_matmul(device)
    keep_memory(device)
    if options.fp8:
        _use_fp8(model, device, precision)
    if options.precision == "bf16-pure" and not _is_sharded(options):
        _store_in(model, precision)
    if device.type == "cuda" and not _is_sharded(options):  # FSDP takes contiguous weights only
        for encoder in model.encoders.values():
            if _is_convolutional(encoder):  # weights are enough: a convolution's output has the layout of its weight
                encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.activation_checkpointing:
        for block in _blocks(model, "remove train.activation_checkpointing"):
            block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]
    if options.compile != "off":
        _compile(model, options.compile)


def _is_sharded(options: TrainRecipe) -> bool:
    """FSDP keeps fp32 shards and computes in bf16 itself; that is bf16 with master weights already."""
    return options.parallel == "fsdp" and torch.distributed.is_available() and torch.distributed.is_initialized()


# -- precision -----------------------------------------------------------------------------------------------------


def _store_in(model: nn.Module, precision: torch.dtype) -> None:
    """Store what is trained in `precision`, but for norms and recurrent layers: those take no mixture of types.

    Frozen weights stay as they are, or publishing the model would round them.
    """
    for module in model.modules():
        if "Norm" in type(module).__name__ or isinstance(module, nn.RNNBase):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(precision)


def _use_fp8(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UsageError(
            f"train.fp8 needs a GPU of compute capability 8.9 or newer, and this is '{device}'", "remove train.fp8"
        )
    if precision != torch.bfloat16:
        raise UsageError("train.fp8 is computed beside bf16, not fp32", 'set train.precision = "bf16"')
    try:
        from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("train.fp8 needs torchao", "run: pip install torchao") from None
    if not any(_is_large(module, name) for name, module in model.named_modules()):
        raise UsageError(f"no linear layer of this model is {LARGE} wide, as train.fp8 needs", "remove train.fp8")
    convert_to_float8_training(model, module_filter_fn=_is_large)


def _is_large(module: nn.Module, name: str) -> bool:
    """The kernels take multiples of 16."""
    if not isinstance(module, nn.Linear):
        return False
    widths = (module.in_features, module.out_features)
    return min(widths) >= LARGE and not any(width % 16 for width in widths)


# -- memory layout -------------------------------------------------------------------------------------------------


def _is_convolutional(module: nn.Module) -> bool:
    """Whether most weights are those of two-dimensional convolutions.

    Tensor cores read pixels with their channels side by side; a ViT has one such layer, and gains nothing.
    """
    sizes = [(parameter.ndim == 4) * parameter.numel() for parameter in module.parameters()]
    return 2 * sum(sizes) > sum(parameter.numel() for parameter in module.parameters())


# -- blocks --------------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, hint: str) -> list[nn.Module]:
    blocks = [block for _, block in find_blocks(model)]
    if not blocks:
        raise UsageError("this model has no repeated blocks", hint)
    return blocks


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep a block's input alone, and compute the rest once more in the backward pass, with the same dropout.

    Chen et al., arXiv:1604.06174.
    """
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def _compile(model: nn.Module, what: str) -> None:
    """Compile each block, all alike by one compilation, or the whole model; sizes that change become symbols."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"))):
        raise UsageError("train.compile needs a C++ compiler, and there is none", 'install g++, or set it to "off"')
    import torch._dynamo

    # the blocks of a CNN differ in width, and each is compiled for training and for evaluation
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for part in [model] if what == "model" else _blocks(model, 'set train.compile to "model" or "off"'):
        part.compile()
