"""Weights of language models in 8 or 4 bits: less to keep and to read for each token that is written.

Products run in PyTorch's own kernels for packed weights; on GPUs those of 4 bits are torchao's. What is quantised is
neither trained nor saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.adapters import adapter_of, merge
from mmhub.errors import PluginError, TrustError, UsageError, did_you_mean
from mmhub.interfaces import TextDecoder
from mmhub.model import Model

KINDS = ("int8", "int4")
GROUP = 32  # weights that share a scale and a zero in 4 bits
_FEW = 32  # rows up to which the kernel of 8 bits is faster than a product of fp32 with weights unpacked for it
_LANES = 16  # what that kernel reads at once; it does not stop at the end of narrower rows


def quantize(model: Model, kind: str) -> Model:
    """Store the linear layers in the blocks of a model's text decoder in 8 or 4 bits, in place.

    int8 has a scale for each output, int4 a scale and a zero for each 32 weights of one. Products are computed in bf16.
    Embeddings, norms, heads, encoders and layers whose widths do not fit stay as they are; adapters are merged first.

    Raises:
        UsageError: `kind` is none, there is nothing to quantise, or the device cannot compute it.
        TrustError: a weight is infinite or not a number.
        PluginError: torchao is not installed, for int4 on a GPU.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no quantization {kind!r}", did_you_mean(kind, KINDS) or f"use {' or '.join(KINDS)}")
    if not isinstance(model.decoder, TextDecoder):
        raise UsageError(
            f"quantization is for models that write texts, and this one is for {model.task.name}",
            "load it without quantize",
        )
    device = model.device.type
    if kind == "int4" and device not in ("cpu", "cuda"):
        raise UsageError(f"int4 runs on a CPU or a CUDA GPU, and this is '{device}'", "use int8, or --device cpu")
    if adapter_of(model.decoder) is not None:
        merge(model)
    found = list(_layers(model.decoder, kind))
    if not found:
        raise UsageError("no linear layer of this model fits into blocks of 8 or 4 bits", "load it without quantize")
    make = Int8Linear if kind == "int8" else Int4Linear if device == "cpu" else _TorchaoInt4
    made: dict[int, nn.Module] = {}  # a layer that stands in two places is one
    with torch.no_grad():
        for owner, name, layer in found:
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
            made[id(layer)] = made.get(id(layer)) or make(weight.float().contiguous(), layer.bias)
            setattr(owner, name, made[id(layer)])
    return model.requires_grad_(False).eval()


def _layers(part: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str, Any]]:
    """(owner, name, layer) of every linear layer within a numbered list of blocks: heads are in none."""
    for prefix, owner in part.named_modules():
        if not any(word.isdigit() for word in prefix.split(".")):
            continue
        for name, layer in owner.named_children():
            if type(layer) is nn.Linear:
                outputs, inputs = layer.weight.shape
            elif type(layer).__name__ == "Conv1D" and layer.weight.ndim == 2:  # of GPT-2, with turned weights
                inputs, outputs = layer.weight.shape
            else:
                continue
            if kind == "int8" or (inputs % GROUP == 0 and outputs % 16 == 0):
                yield owner, name, layer


class _Packed(nn.Module):
    """A linear layer without a plain weight, for inference alone."""

    weight = None  # transformers asks T5's layers for the type of theirs
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        low, high = weight.aminmax()
        if not torch.isfinite(high - low):
            raise TrustError("a weight to be quantised is infinite or not a number", "fetch or train the model again")
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), of the type of `x`."""
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)
        found = self.product(flat).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias.to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), both bf16."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("a quantised model cannot be saved or trained on", "load it without quantize for that")


class Int8Linear(_Packed):
    """weight (out, in) as integers from -127 to 127, times one scale for each output."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        scale = (weight.abs().amax(1).clamp(min=1e-8) / 127).to(torch.bfloat16)
        codes = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("scale", scale)
        self.register_buffer("codes", codes.to(torch.int8))

    def product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            if len(x) <= _FEW and self.in_features % _LANES == 0:
                return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)  # type: ignore[no-any-return]
            return (F.linear(x.float(), self.codes.float()) * self.scale.float()).to(x.dtype)
        return F.linear(x, self.codes.to(x.dtype)) * self.scale


class Int4Linear(_Packed):
    """weight (out, in) as integers from 0 to 15, two in a byte, `GROUP` of them with a scale and a zero; on CPUs."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low).clamp(min=1e-8) / 15).to(torch.bfloat16)
        zero = (low + 8 * scale.float()).to(torch.bfloat16)  # of code 8
        codes = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", torch.stack([scale, zero], 2).transpose(0, 1).contiguous())

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise UsageError("these weights of 4 bits were packed for a CPU", "load the model with device='cuda'")
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.scales)
        return found


class _TorchaoInt4(_Packed):
    """A linear layer whose weight torchao packs for the tensor cores of a CUDA GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        try:
            from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found]
        except ImportError:
            raise PluginError(
                "int4 on a GPU is computed by torchao, which is not installed", "run: pip install torchao"
            ) from None
        self.inner = nn.Linear(self.in_features, self.out_features, bias=False, device=weight.device)
        self.inner.weight.data = weight.to(torch.bfloat16).contiguous()
        quantize_(self.inner, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))

    def product(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
