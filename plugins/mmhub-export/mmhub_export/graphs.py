"""Cutting a model into graphs: modules that take tensors and give tensors, whose sizes depend on no value.

A model with one encoder and a head is one graph, `model`. Several encoders become a graph each, `<modality>_encoder`,
and `head`, the fusion and the decoder behind it, because which rows have which modality is known only when it runs.
What writes text is `decoder`, or `language_model` where media stand between the tokens; two sides of a shared space
are a `<side>_tower` each. Letters in shapes are those of `mmhub.batch`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Items
from mmhub.errors import UsageError
from mmhub.interfaces import LanguageModel, Policy, Stream, TextDecoder
from mmhub.model import Model
from mmhub.testing.samples import RATE, built_in

Tensors = dict[str, Tensor]
_MORE = 3  # positions of padding that some cases have beyond what they need


@dataclass
class Graph:
    """A part of a model that can be recorded.

    Attributes:
        name: of its file. module: takes the tensors of a case in order, gives a tuple.
        axes: by input, which of its dimensions may vary, and what they count.
        outputs: names of what it gives, with the names of their dimensions, "" for one that never varies.
        cases: inputs to compare with the model; the first is recorded.
        quiet: sounds with next to nothing in them, whose features are mostly rounding (`checks.compare_quiet`).
        most: by the name of a size, how large the model lets it be.
        padded: may rows of different lengths share a batch?
    """

    name: str
    module: nn.Module
    axes: dict[str, dict[int, str]]
    outputs: Mapping[str, tuple[str, ...]]
    cases: list[Tensors]
    most: dict[str, int] = field(default_factory=dict)
    padded: bool = True
    quiet: list[Tensors] = field(default_factory=list)
    given: list[tuple[Tensor, ...]] = field(default_factory=list)  # what the model gives in each case

    def answers(self) -> list[tuple[Tensor, ...]]:
        """Return what the model itself gives in each case."""
        if not self.given:
            with torch.no_grad():
                self.given = [self.module(*case.values()) for case in self.cases]
        return self.given


def cut(model: Model, samples: Sequence[Mapping[str, Any]] = ()) -> list[Graph]:
    """Cut a model, in evaluation mode and on the CPU, into graphs; `samples` are raw inputs to try them on.

    Raises:
        UsageError: a part of it cannot be a graph.
    """
    decoder: Any = model.decoder
    raws = {name: _raws(model, name, samples) for name in model.modalities}
    if decoder.paired:
        return [_tower(model, side, raws) for side in _towers(model)]
    if isinstance(decoder, TextDecoder) and not hasattr(decoder, "all_logits"):
        kind = type(decoder).__name__
        raise UsageError(
            f"the decoder {kind} has no `all_logits`, by which others could write with it", "ask its author"
        )
    if isinstance(decoder, LanguageModel):
        return _language_graphs(model, raws)
    if isinstance(decoder, TextDecoder):
        encoders = [_encoder(model, name, raws[name]) for name in model.encoders]
        return [*encoders, _writer(model, encoders)]
    if len(model.encoders) == 1:
        return [_whole(model, *raws.items())]
    encoders = [_encoder(model, name, raws[name]) for name in model.encoders]
    return [*encoders, _head(model, encoders)]


@contextmanager
def plain(model: Model) -> Iterator[Model]:
    """Yield the model in evaluation mode, on the CPU and in fp32: a copy, or itself where only its mode is changed."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors):
        yield copy.deepcopy(model).cpu().float().eval()
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


# -- modules -----------------------------------------------------------------------------------------------------------


class Encode(nn.Module):
    """Raw tensors of items -> tokens (N, T, D), mask (N, T) and, where there is one, pooled (N, P)."""

    def __init__(self, encoder: Any, masked: bool) -> None:
        super().__init__()
        self.encoder, self.masked = encoder, masked

    def features(self, data: Tensor, mask: Tensor | None = None) -> Features:
        if mask is None:
            mask = torch.ones(data.shape[0], 1, dtype=torch.bool, device=data.device)
        found: Features = self.encoder(data, mask)
        return found

    def forward(self, data: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return _tensors(self.features(data, mask))


class Project(nn.Module):
    """Raw tensors of items -> tokens (N, t, D) as the language model reads them, and their mask (N, t)."""

    def __init__(self, encode: Encode, fusion: Any, name: str) -> None:
        super().__init__()
        self.encode, self.fusion, self.name = encode, fusion, name

    def forward(self, data: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return _tensors(self.fusion.projected(self.name, self.encode.features(data, mask)))


class Whole(nn.Module):
    """Raw tensors of the only modality -> logits, and their mask where there is one a token."""

    def __init__(self, encode: Encode, name: str, fusion: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encode, self.name, self.fusion, self.decoder = encode, name, fusion, decoder

    def forward(self, data: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return _logits(self.decoder(self.fusion({self.name: self.encode.features(data, mask)})))


class Head(nn.Module):
    """Tokens, masks and summaries of all modalities -> logits; a mask without a True is a missing modality."""

    def __init__(self, names: Sequence[str], pooled: Sequence[bool], fusion: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.names, self.pooled, self.fusion, self.decoder = list(names), list(pooled), fusion, decoder

    def bundle(self, tensors: Sequence[Tensor]) -> Bundle:
        left, bundle = iter(tensors), {}
        for name, pooled in zip(self.names, self.pooled, strict=True):
            bundle[name] = Features(next(left), next(left), pooled=next(left) if pooled else None)
        fused: Bundle = self.fusion(bundle)
        return fused

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _logits(self.decoder(self.bundle(tensors)))


class Write(Head):
    """The ids written so far (B, L), and what was read, as for `Head` -> logits (B, L, V) after each of them."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        decoder: Any = self.decoder
        return (decoder.all_logits(self.bundle(tensors[1:]), tensors[0]),)


class Read(nn.Module):
    """Embedded tokens (B, T, D) or ids (B, T), with their mask -> logits (B, T, V) after each, zero behind a text."""

    def __init__(self, decoder: Any, ids: bool) -> None:
        super().__init__()
        self.decoder, self.ids = decoder, ids

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        tokens = self.decoder.embed(tokens) if self.ids else tokens
        tokens = tokens * mask[..., None].to(tokens.dtype)
        return (self.decoder.all_logits({"fused": Features(tokens, mask)}) * mask[..., None],)


class Embed(nn.Module):
    """Ids (B, T) -> embedded tokens (B, T, D)."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.decoder.embed(ids),)


class Tower(nn.Module):
    """Raw tensors of one side -> vectors of length 1 in the shared space (N, E)."""

    def __init__(self, encode: Encode, side: str, model: Model) -> None:
        super().__init__()
        self.encode, self.side, self.fusion, self.decoder = encode, side, model.fusion, model.decoder
        self.others: dict[str, Stream] = {name: stream for name, stream in model.fusion.inputs.items() if name != side}

    def forward(self, data: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        features = self.encode.features(data, mask)
        absent = {name: _absent(features, stream) for name, stream in self.others.items()}
        pair = {} if absent else {f"{self.side}_pair": features}
        decoder: Any = self.decoder
        return (decoder.vectors(self.fusion({self.side: features} | absent | pair))[self.side],)


def _absent(like: Features, stream: Stream) -> Features:
    rows = like.tokens.shape[0]
    pooled = like.tokens.new_zeros(rows, stream.pooled) if stream.pooled else None
    return Features(like.tokens.new_zeros(rows, 1, stream.dim), like.mask.new_zeros(rows, 1), pooled=pooled)


def _tensors(features: Features) -> tuple[Tensor, ...]:
    found = (features.tokens, features.mask)
    return found if features.pooled is None else (*found, features.pooled)


def _logits(output: Any) -> tuple[Tensor, ...]:
    """Logits, zero where the mask says that they mean nothing; and the mask, where there is one a token."""
    if output.mask is None or output.mask.dim() < 2:
        return (output.logits.float(),)
    return output.logits.float().masked_fill(~output.mask[..., None], 0.0), output.mask


# -- graphs ------------------------------------------------------------------------------------------------------------

_TOKENS = {"tokens": ("batch", "tokens", ""), "token_mask": ("batch", "tokens"), "pooled": ("batch", "")}


def _encoder(model: Model, name: str, raws: Sequence[Any]) -> Graph:
    graph = _items(model, name, raws)
    graph.name, graph.outputs = f"{name}_encoder", _named(graph, _TOKENS)
    return graph


def _projected(model: Model, name: str, raws: Sequence[Any]) -> Graph:
    graph = _encoder(model, name, raws)
    assert isinstance(graph.module, Encode)
    graph.module = Project(graph.module, model.fusion, name).eval()
    graph.given = []
    graph.outputs = _named(graph, _TOKENS)
    return graph


def _whole(model: Model, named: tuple[str, Sequence[Any]]) -> Graph:
    name, raws = named
    graph = _items(model, name, raws)
    assert isinstance(graph.module, Encode)
    graph.name, graph.module = "model", Whole(graph.module, name, model.fusion, model.decoder).eval()
    logits = graph.answers()[0][0]
    middle = ("tokens",) * (logits.dim() - 2)
    graph.outputs = _named(graph, {"logits": ("batch", *middle, ""), "logits_mask": ("batch", *middle)})
    return graph


def _tower(model: Model, side: str, raws: Mapping[str, Sequence[Any]]) -> Graph:
    graph = _items(model, side, raws[side])
    assert isinstance(graph.module, Encode)
    graph.name, graph.module = f"{side}_tower", Tower(graph.module, side, model).eval()
    graph.outputs = {"vectors": ("batch", "")}
    return graph


def _towers(model: Model) -> list[str]:
    decoder: Any = model.decoder
    return [side for side in decoder.sides if side in model.encoders]


def _head(model: Model, encoders: Sequence[Graph]) -> Graph:
    names, pooled, axes, cases = _streams(model, encoders)
    module = Head(names, pooled, model.fusion, model.decoder).eval()
    graph = Graph("head", module, axes, {}, cases)
    logits = graph.answers()[0][0]
    middle = ("tokens",) * (logits.dim() - 2)
    graph.outputs = _named(graph, {"logits": ("batch", *middle, ""), "logits_mask": ("batch", *middle)})
    return graph


def _writer(model: Model, encoders: Sequence[Graph]) -> Graph:
    names, pooled, axes, cases = _streams(model, encoders)
    decoder: Any = model.decoder
    module = Write(names, pooled, model.fusion, decoder).eval()
    several = []
    for number, case in enumerate(cases):
        rows = next(iter(case.values())).shape[0]
        several.append({"ids": _ids(decoder.start or 0, decoder.processor.vocab_size, rows, 5 + number)} | case)
    outputs = {"logits": ("batch", "written", "")}
    positions = getattr(decoder, "positions", None) or decoder.context  # `context` may leave out what begins a text
    most = {"written": positions} if positions else {}
    return Graph("decoder", module, {"ids": {0: "batch", 1: "written"}} | axes, outputs, several, most)


def _language_graphs(model: Model, raws: Mapping[str, Sequence[Any]]) -> list[Graph]:
    decoder: Any = model.decoder
    vocabulary, outputs = decoder.processor.vocab_size, {"logits": ("batch", "tokens", "")}
    cases: list[Tensors] = []
    for rows, width in ((2, 9), (1, 4), (3, 12)):
        mask = torch.ones(rows, width, dtype=torch.bool)
        mask[1:, width - 2 :] = False
        cases.append({"ids": _ids(0, vocabulary, rows, width) * mask, "mask": mask})
    both = {0: "batch", 1: "tokens"}
    most = {"tokens": decoder.context} if decoder.context else {}
    if not model.encoders:
        return [Graph("model", Read(decoder, ids=True).eval(), {"ids": both, "mask": both}, outputs, cases, most)]
    media = [_projected(model, name, raws[name]) for name in model.encoders]
    ids = [{"ids": case["ids"]} for case in cases]
    embed = Graph("embedding", Embed(decoder).eval(), {"ids": both}, {"tokens": ("batch", "tokens", "")}, ids)
    embedded = [
        {"tokens": tokens[0] * case["mask"][..., None], "mask": case["mask"]}
        for case, tokens in zip(cases, embed.answers(), strict=True)
    ]
    module = Read(decoder, ids=False).eval()
    return [*media, embed, Graph("language_model", module, {"tokens": both, "mask": both}, outputs, embedded, most)]


def _named(graph: Graph, known: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """As many of the known outputs as the module gives; a picture's tokens are always as many."""
    found = dict(list(known.items())[: len(graph.answers()[0])])
    widths = {tensors[0].shape[1] for tensors in graph.answers() if tensors[0].dim() == 3}
    if len(widths) > 1:
        return found
    return {name: tuple("" if axis == "tokens" else axis for axis in axes) for name, axes in found.items()}


# -- what they are tried on --------------------------------------------------------------------------------------------


def _raws(model: Model, name: str, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    own = [sample[name] for sample in samples if sample.get(name) is not None]
    reader: Any = model.readers[name]
    made = list(reader.samples() if hasattr(reader, "samples") else ()) or list(built_in(name))
    found = (own + made)[:8]
    if len(found) < 2:
        raise UsageError(f"there is nothing of the modality {name!r} to try the model on", "give two rows with --data")
    return found


def _items(model: Model, name: str, raws: Sequence[Any]) -> Graph:
    """The graph of an encoder by itself, with cases of one item and of several, and of more padding than they need."""
    encoder: Any = model.encoders[name]
    single = [encoder.processor([raw], Policy()) for raw in raws]
    varying = [axis for axis in range(1, single[0].data.dim()) if len({one.data.shape[axis] for one in single}) > 1]
    fixed = not varying and single[0].mask.shape[1] == 1
    invariant = bool(encoder.padding_invariant)
    picks = _picks(single, invariant)
    packed = [encoder.processor([raws[number] for number in pick], Policy()) for pick in picks]
    if varying == [1] and invariant:
        packed.append(_wider(packed[0]))
    quiet = []
    if name == "audio" and varying == [1] and single[0].data.is_floating_point():  # a waveform
        *quiet, steady = (encoder.processor([{"array": sound, "sampling_rate": RATE}], Policy()) for sound in _quiet())
        packed.append(steady)

    def tensors(items: Items) -> Tensors:
        return {"data": items.data} | ({} if fixed else {"mask": items.mask})

    axes = {"data": {0: "batch"} | dict.fromkeys(varying, "length")}
    if not fixed:
        axes["mask"] = {0: "batch"} | ({1: "length"} if len({one.mask.shape[1] for one in single}) > 1 else {})
    module = Encode(encoder, not fixed).eval()
    return Graph("", module, axes, {}, [*map(tensors, packed)], padded=invariant, quiet=[*map(tensors, quiet)])


def _quiet() -> Iterator[Any]:
    """Half a second of silence, of noise far below 16 bits, and of a steady pressure."""
    import numpy as np

    yield np.zeros(RATE // 2, np.float32)
    for loud in (1e-7, 1e-6, 1e-5):
        yield loud * np.random.default_rng(0).standard_normal(RATE // 2).astype(np.float32)
    yield np.full(RATE // 2, 0.05, np.float32)


def _picks(single: Sequence[Items], invariant: bool) -> list[list[int]]:
    """Which raw inputs each case holds: first two whose lengths differ, the longest one, one alone, and all.

    Those that padding would change are only put together with themselves.
    """
    lengths = [int(one.mask.sum()) for one in single]
    order = sorted(range(len(single)), key=lambda number: lengths[number])
    short, long = order[len(order) // 2], order[-1]
    if not invariant:
        return [[long, long], [short], [long], [short, short, short]]
    return [[long, short], [long], [short], order[:3], order]


def _wider(items: Items) -> Items:
    pad = torch.nn.functional.pad
    return Items(pad(items.data, (0, _MORE)), pad(items.mask, (0, _MORE)), items.rows, items.batch)


def _streams(
    model: Model, encoders: Sequence[Graph]
) -> tuple[list[str], list[bool], dict[str, dict[int, str]], list[Tensors]]:
    """Names, which have summaries, axes and cases of a head that reads what the encoders give.

    In each case but the first two, another modality is missing from the first row.
    """
    names = list(model.encoders)
    pooled = ["pooled" in graph.outputs for graph in encoders]
    axes: dict[str, dict[int, str]] = {}
    for name, graph in zip(names, encoders, strict=True):
        for output, dims in graph.outputs.items():
            axes[f"{name}_{output}"] = {
                place: f"{name}_tokens" if dim == "tokens" or (place == 1 and output != "pooled") else dim
                for place, dim in enumerate(dims)
                if dim or (place == 1 and output != "pooled")
            }
    return names, pooled, axes, list(_stream_cases(names, encoders))


def _stream_cases(names: Sequence[str], encoders: Sequence[Graph]) -> Iterator[Tensors]:
    """What encoders gave in their own cases 0, 1 and 3: two rows, one, and three."""
    missing = [None, None, *(names if len(names) > 1 else [None])]
    for number, absent in enumerate(missing):
        pick = min(number, 2) + (number > 1)
        rows = min(len(graph.answers()[pick][0]) for graph in encoders)
        case: Tensors = {}
        for name, graph in zip(names, encoders, strict=True):
            own = dict(zip(graph.outputs, graph.answers()[pick], strict=True))
            if number == 1 and len(names) > 1 and name == names[-1]:  # missing as a consumer would say it: one token
                own = {key: part * 0 if key == "pooled" else part[:, :1] * 0 for key, part in own.items()}
                own["token_mask"] = own["token_mask"].bool()
            if number == 0 and own["tokens"].shape[1] == 1:  # recorded sizes of 1 stay 1, and so do differences
                own = {key: part if key == "pooled" else _longer(part) for key, part in own.items()}
            for key, part in own.items():
                case[f"{name}_{key}"] = part[:rows].clone()
                if name == absent:
                    case[f"{name}_{key}"][0] = 0
        yield case


def _longer(part: Tensor) -> Tensor:
    """Two more tokens, which are not real: of two sizes, one less than the other may be 1 as well."""
    return torch.cat((part, torch.zeros_like(part), torch.zeros_like(part)), 1)


def _ids(first: int, vocabulary: int, rows: int, width: int) -> Tensor:
    """Ids that differ, from a fixed seed, the first of each row given: (rows, width) long."""
    ids = torch.randint(0, vocabulary, (rows, width), generator=torch.Generator().manual_seed(width))
    ids[:, 0] = first
    return ids
