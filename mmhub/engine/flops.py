"""Training FLOPs of a batch, every tower counted, and how many a second a GPU can do: what MFU is made of.

What a part costs is measured: PyTorch's flop counter runs over the forward of one item at three lengths, and
a + b T + c T^2 goes through the three. Only real positions count, so padding is no work; a multiply-add is two.
docs/watching.md has the formulas.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmhub.batch import Batch, Bundle, Features, Items, only, rows_with
from mmhub.model import Model

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# Dense TFLOP/s in (bf16, TF32) by the name that CUDA gives, from NVIDIA's data sheets and architecture white papers
# (A100, H100, H200, L4, L40S, HGX B200; GA102, Ada and Blackwell for GeForce, with fp32 accumulation). Figures with
# sparsity are twice these. Partitioned, laptop and cut-down cards have other names, and other peaks: none is guessed.
_PEAKS = {
    r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe|A100-SXM-(40|80)GB": (312.0, 156.0),
    r"H100 (80|96)GB HBM3|H200": (989.4, 494.7),
    r"H100 PCIe": (756.0, 378.0),
    r"H100 NVL|H200 NVL": (835.5, 417.8),
    r"B200": (2250.0, 1125.0),
    r"L4": (121.0, 60.0),
    r"L40S": (362.0, 183.0),
    r"GeForce RTX 3090": (71.0, 35.6),
    r"GeForce RTX 4090": (165.2, 82.6),
    r"GeForce RTX 5090": (209.5, 104.8),
}


def peak_flops(name: str, precision: torch.dtype, fast_fp32: bool = True) -> float | None:
    """Return the dense FLOP/s that the GPU called `name` can do, None where it is not known.

    `fast_fp32`: products of fp32 run in TF32, as they do in training here.

    >>> peak_flops("NVIDIA H200", torch.bfloat16), peak_flops("NVIDIA GH200 480GB", torch.bfloat16)
    (989400000000000.0, None)
    """
    card = name.removeprefix("NVIDIA ").strip()
    known = next((peaks for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, card)), None)
    if known is None or (precision == torch.float32 and not fast_fp32):
        return None
    return known[1 if precision == torch.float32 else 0] * 1e12


@dataclass
class Sizes:
    """How much a batch holds, by modality: the length of each item and its row, both (N,)."""

    size: int  # rows
    items: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # in positions
    features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # in tokens, of what was encoded before


class TrainingCost:
    """What training on a batch costs: 3 x forward of trained parts, 1 x of frozen ones, 2 x where gradients pass.

    `measure` learns it from a batch and may be called again; it changes no random state, gradient or module.
    """

    def __init__(self, model: Model, precision: torch.dtype = torch.float32) -> None:
        self._model, self._precision = model, precision
        self._encoders: dict[str, _Quadratic] = {}  # FLOPs by item length
        self._tokens: dict[str, _Quadratic] = {}  # output tokens by item length
        self._streams: dict[str, Features] = {}  # one row of each stream that was seen
        self._projected: dict[str, tuple[_Quadratic, _Quadratic]] = {}  # FLOPs and tokens by an item's encoded tokens
        self._targets: Any = None
        self._mix: tuple[list[str], _Quadratic] | None = None  # fusion and decoder, by tokens of the named streams

    def measure(self, batch: Batch) -> None:
        """Measure what this batch has for the first time: encoders by its longest item, then what joins them."""
        new = present(batch) - set(self._streams)
        if not new:
            return
        if self._targets is None and isinstance(batch.targets, Tensor):
            self._targets = batch.targets[:1]
        with _untouched(self._model, self._precision):
            for name in sorted(new):
                if name in batch.features:
                    self._streams[name] = _longest(batch.features[name].features)
                elif name not in self._model.encoders:  # text that the decoder reads itself
                    self._streams[name] = self._model.text_stream(_longest_item(batch.items[name]), 1)
                else:
                    self._streams[name] = self._measure_encoder(name, _longest_item(batch.items[name]))
                if self._model.fusion.by_item and name in self._model.encoders:
                    self._streams[name] = self._measure_projector(name, self._streams[name])
            self._measure_mix()

    def of(self, sizes: Sizes) -> float:
        """Return the FLOPs of one training step on a batch of these sizes; what was never measured counts nothing."""
        total, tokens = 0.0, {}
        encoded = {name: (counts.double().cpu(), rows) for name, (counts, rows) in sizes.features.items()}
        for name, (lengths, rows) in sizes.items.items():
            if name in self._encoders:
                points = lengths.double().cpu()[:, None]
                total += float(self._encoders[name](points).sum())
                encoded[name] = self._tokens[name](points), rows
            elif name not in self._model.encoders:
                # texts in one row never see each other: without encoders each is counted by itself
                alone, found = not len(self._model.encoders), lengths.double().cpu()
                tokens[name] = found if alone else _by_row(found, rows, sizes.size)
        absent = torch.zeros(sizes.size, dtype=torch.double)
        for name, (counts, rows) in encoded.items():
            tokens[name] = _by_row(counts, rows, sizes.size)
            if name in self._projected:
                flops, becomes = (found(counts[:, None]) * (counts > 0) for found in self._projected[name])
                total += float(flops.sum())
                tokens["media"] = tokens.get("media", absent) + _by_row(becomes, rows, sizes.size)
        if self._mix is not None:
            names, cost = self._mix
            points = torch.stack([tokens.get(name, absent) for name in names] or [absent], 1)
            total += float(cost(points[:, : len(names)]).sum())
        return total

    def _measure_encoder(self, name: str, item: Items) -> Features:
        encoder: Any = self._model.encoders[name]
        longest = int(item.lengths[0])
        lengths = sorted({max(1, longest * third // 3) for third in (1, 2, 3)})
        costs, counts = [], []
        for length in lengths:
            with _counting(self._model) as counter:
                features = self._model.encode_items(name, _crop_item(item, length))
            costs.append(_with_backward(counter, (encoder,), flowing=False))
            counts.append(float(features.mask.sum()))
        points = torch.tensor(lengths, dtype=torch.double)[:, None]
        self._encoders[name], self._tokens[name] = _Quadratic(points, costs), _Quadratic(points, counts)
        return replace(features, marks=item.marks)

    def _measure_projector(self, name: str, item: Features) -> Features:
        """What a fusion that reads media item by item makes of one: its cost and its tokens, by those of the encoder.
        A square grid of tokens is cut to smaller squares, for not every fusion takes others."""
        model, nobody = self._model, torch.zeros(1, dtype=torch.long, device=item.mask.device)
        item, everyone = replace(item, marks=None, pooled=None, rows=nobody), model.encode({}, 1)
        flowing = any(p.requires_grad for p in model.encoders[name].parameters())
        lengths, costs, counts = _thirds(max(1, int(item.mask.sum()))), [], []
        for length in lengths:
            with _counting(model) as counter:
                read = model.fusion(everyone | {name: _crop(item, length)})["fused"]
            costs.append(_with_backward(counter, (model.fusion,), flowing))
            counts.append(float(read.mask.sum()))
        points = torch.tensor(lengths, dtype=torch.double)[:, None]
        self._projected[name] = _Quadratic(points, costs), _Quadratic(points, counts)
        return Features(read.tokens[read.mask][None], read.mask[read.mask][None])

    def _measure_mix(self) -> None:
        model = self._model
        bundle = self._in_line() if model.fusion.by_item else model.encode({}, 1) | self._streams
        full = {name: int(stream.mask.sum()) for name, stream in bundle.items() if len(stream.mask)}
        names = [name for name, count in full.items() if count >= 3]  # shorter ones have one size
        before = (model.encoders, model.fusion) if model.fusion.by_item else (model.encoders,)
        flowing = any(p.requires_grad for part in before for p in part.parameters())
        points, costs = [], []
        for steps in combinations_with_replacement(range(len(names) + 1), 2):
            point = [full[name] - full[name] // 3 * (2 - steps.count(i)) for i, name in enumerate(names)]
            cropped = {name: _crop(bundle[name], count) for name, count in zip(names, point, strict=True)}
            with _counting(model) as counter:
                self._join(bundle | cropped)
            points.append(point)
            costs.append(_with_backward(counter, (model.fusion, model.decoder), flowing))
        self._mix = names, _Quadratic(torch.tensor(points, dtype=torch.double).reshape(len(points), len(names)), costs)

    def _in_line(self) -> Bundle:
        """The text of a row, and all media together as a fusion has read them: one counts as much as another."""
        media = [stream for name, stream in self._streams.items() if name in self._projected]
        text = self._streams.get("text") or self._model.text_stream(None, 1)
        if not media:
            return {"text": text}
        joined = [torch.cat([getattr(stream, part) for stream in media], 1) for part in ("tokens", "mask")]
        return {"media": Features(*joined), "text": text}

    def _join(self, bundle: Bundle) -> None:
        """Fusion and decoder, and once more for each modality alone where that is part of the loss."""
        model = self._model
        if model.fusion.by_item:
            model.decoder({"fused": _lined_up(bundle)}, self._targets)
            return
        model.decode(bundle, self._targets)
        mixes = len(bundle) > 1 and "fused" in model.fusion.outputs and not model.decoder.reads_text
        if model.unimodal_loss and mixes:
            for name in bundle:
                rows = rows_with(bundle, [name])
                if len(rows):
                    model.decode(only(bundle, [name], rows), self._targets)


class _Quadratic:
    """The polynomial of second degree in K variables through measured points (P, K); never below zero."""

    def __init__(self, points: Tensor, values: Sequence[float]) -> None:
        self._scale = points.amax(0).clamp(min=1)
        wanted = torch.tensor(values, dtype=torch.double)[:, None]
        self._weights = torch.linalg.lstsq(self._powers(points), wanted).solution

    def __call__(self, points: Tensor) -> Tensor:
        """(N, K) -> (N,)."""
        return (self._powers(points) @ self._weights).squeeze(1).clamp(min=0)

    def _powers(self, points: Tensor) -> Tensor:
        columns = [torch.ones(len(points), dtype=torch.double), *(points / self._scale).unbind(1)]
        return torch.stack([a * b for a, b in combinations_with_replacement(columns, 2)], 1)


# One item, one row.


def present(batch: Batch) -> set[str]:
    """Modalities that a batch holds; asks no GPU."""
    return {name for parts in (batch.items, batch.features) for name, part in parts.items() if len(part)}


def _by_row(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """Add up what belongs to the same row: (N,) -> (B,)."""
    return torch.zeros(size, dtype=torch.double).index_add(0, rows.cpu(), values.cpu())


def _longest_item(items: Items) -> Items:
    index = int(items.lengths.argmax())
    one = slice(index, index + 1)
    marks = None if items.marks is None else items.marks[one]
    return Items(items.data[one], items.mask[one], torch.zeros_like(items.rows[:1]), 1, marks)


def _thirds(length: int) -> list[int]:
    """A third, two thirds and the whole of a sequence, or the squares of those of the side of a square grid."""
    side = math.isqrt(length)
    whole, power = (side, 2) if side**2 == length else (length, 1)
    return sorted({max(1, whole * third // 3) ** power for third in (1, 2, 3)})


def _crop_item(items: Items, length: int) -> Items:
    along = items.data.ndim > 1 and items.data.shape[1] == items.mask.shape[1]  # pixels (N, C, H, W) have a mask (N, 1)
    data = items.data[:, :length] if along else items.data
    return replace(items, data=data, mask=items.mask[:, :length])


def _longest(features: Features) -> Features:
    index = int(features.mask.sum(1).argmax())
    one, length = slice(index, index + 1), int(features.mask[index].sum())
    pooled = None if features.pooled is None else features.pooled[one]
    return Features(features.tokens[one, :length], features.mask[one, :length], pooled=pooled)


def _crop(features: Features, count: int) -> Features:
    along = ("tokens", "mask", "ids", "loss", "marks", "parts")
    known = {name: part for name in along if (part := getattr(features, name)) is not None}
    return replace(features, **{name: part[:, :count] for name, part in known.items()})


def _lined_up(bundle: Bundle) -> Features:
    """One row of media before its text."""
    text = bundle["text"]
    if "media" not in bundle:
        return text
    media, ids = bundle["media"], text.ids
    assert ids is not None
    before = media.mask.shape[1], 0
    loss = None if text.loss is None else torch.nn.functional.pad(text.loss, before)
    tokens = torch.cat([media.tokens.to(text.tokens.dtype), text.tokens], 1)
    return Features(tokens, torch.cat([media.mask, text.mask], 1), torch.nn.functional.pad(ids, before, value=-1), loss)


# Counting.


@contextmanager
def _untouched(model: Model, precision: torch.dtype) -> Iterator[None]:
    """Run the model for its FLOPs alone: no gradient, no dropout, no compiling, and everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    fast_path = torch.backends.mha.get_fastpath_enabled()
    python, legacy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, precision, enabled=precision != torch.float32))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer, which nobody can count
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python)
            np.random.set_state(legacy)
            for module, training in modes:
                module.training = training


@contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count what runs inside, with nothing to be trained: PyTorch's counter looks for the gradient function of what a
    module is given, and a view of a trained parameter has none here."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a third of a second, and only GPUs want it

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
            yield counter
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """2 T S D for the scores and 2 T S D for the sums of (B, H, T, D) with (B, H, S, D); causal is not halved."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _varlen_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """The same for one packed sequence, (T, H, D)."""
    length, heads, width = query
    return 2 * heads * length * key[0] * (width + value[2])


def _mkldnn_rnn(data: Sequence[int], first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Every matrix of a recurrent layer works once a position; data (S, N, D)."""
    return 2 * data[0] * data[1] * (first[0] * first[1] + second[0] * second[1])


def _cudnn_rnn(data: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """The same for all layers and directions; data (S, N, D), or (positions, D) when packed."""
    positions = data[0] if len(data) == 2 else data[0] * data[1]
    return 2 * positions * sum(shape[0] * shape[1] for shape in weights if len(shape) == 2)


def _missing_formulas() -> dict[Any, Any]:
    """Formulas for operations that PyTorch's counter does not know."""
    aten: Any = torch.ops.aten
    found = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten.mkldnn_rnn_layer: _mkldnn_rnn,
        aten._cudnn_rnn: _cudnn_rnn,
    }
    if "torch.nn.attention.varlen" in sys.modules:
        found[torch.ops.torch_attn._varlen_attn] = _varlen_attention
    return found


def _with_backward(counter: FlopCounterMode, roots: Sequence[nn.Module], flowing: bool) -> float:
    """Forward and backward FLOPs, module by module in the order of their definition, those inside first.

    A module costs its forward; as much again for the gradient of its input, if something before it learns
    (`flowing`: something before all of these does), and for that of its weights, if those learn. The first trained
    module counts three times as any other, as in everybody's formulas. A module without weights of its own multiplies
    what both has a gradient, as attention does, or, by `mm`, by the weights of a module inside it that does nothing
    else: a tied head.
    """
    found = counter.get_flop_counts()
    every = _own_counts({name: float(sum(ops.values())) for name, ops in found.items()})
    by_weights = _own_counts({name: float(sum(ops.get(op, 0) for op in _BY_WEIGHTS)) for name, ops in found.items()})
    own, total = dict(every), 0.0
    for root in roots:
        for name, module in _inner_first(type(root).__name__, root):
            parameters = list(module.parameters(recurse=False))
            learns = any(parameter.requires_grad for parameter in parameters)
            flowing = flowing or learns
            total += own.pop(name, 0.0) * (3 if learns or (flowing and not parameters) else 2 if flowing else 1)
            if flowing and not parameters and by_weights.get(name) and not _lends_trained(name, module, every):
                total -= by_weights[name]
    return total + sum(own.values()) * (3 if flowing else 1)


def _lends_trained(name: str, module: nn.Module, counts: Mapping[str, float]) -> bool:
    """Whether a matrix is trained that is inside a module, of a part that multiplies nothing by itself."""
    idle = (part for inner, part in _inner_first(name, module) if not counts.get(inner))
    return any(p.requires_grad and p.ndim == 2 for part in idle for p in part.parameters(recurse=False))


_BY_WEIGHTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def _inner_first(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for inner, child in module.named_children():
        yield from _inner_first(f"{name}.{inner}", child)
    yield name, module


def _own_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """What each module does itself, without the modules inside it; names as the counter gives them."""
    own = dict(counts)
    for name, count in counts.items():
        above = name.rpartition(".")[0]
        while above and above not in counts:
            above = above.rpartition(".")[0]
        if name != "Global":
            own[above or "Global"] -= count
    return own
