"""What is checked, made runnable: a component built from its example, tiny inputs for it, and a model around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Items, Plan, pad_sequences
from mmhub.fusion.interleave import Interleave
from mmhub.fusion.streams import Streams
from mmhub.interfaces import TASKS, LanguageModel, Policy, Stream, TextDecoder, decode_config
from mmhub.layers import line_up
from mmhub.model import Model
from mmhub.plugins import Component, get_index
from mmhub.testing.catalogue import Check, role_of
from mmhub.testing.contract import ContractError, NotApplicableError, expect
from mmhub.testing.samples import built_in
from mmhub.testing.standins import (
    make_stand_in,
    map_features,
    random_features,
    rows_of,
    stand_in_component,
    stand_ins_installed,
)
from mmhub.testing.toys import TOYS, Toy

Outputs = dict[str, Tensor]
WIDTH = 16  # of the streams a decoder is given
STREAMS = {"text": (12, None), "image": (10, 8), "audio": (6, 6)}  # widths of tokens and of summaries


class Subject(ABC):
    """One component. `build` makes a fresh one; `run` gives its outputs by name for the inputs of `inputs`."""

    def __init__(self, check: Check) -> None:
        assert isinstance(check.target, Component)
        self.component = check.target
        self.samples = check.samples
        self.cls: Any = self.component.load()

    def config(self) -> Any:
        """The configuration of the manifest's `example`."""
        return decode_config(self.cls.Config, self.component.spec.example, f"the example of {self.component.id}")

    def complete(self) -> Any:
        """The example configuration with what is learned from data."""
        return self.config()

    @abstractmethod
    def build(self, config: Any = None) -> nn.Module:
        """Build with fresh weights, in training mode."""

    def part(self, seed: int = 0) -> Any:
        """Build in evaluation mode, or end the check: that it cannot be built is another check's finding."""
        torch.manual_seed(seed)
        try:
            return self.build().eval()
        except Exception as error:
            raise NotApplicableError("it cannot be built, see the check builds") from error

    def perturbed(self) -> Any:
        """Build in evaluation mode, every parameter a little off what it starts with."""
        module = self.part()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        return module

    @abstractmethod
    def inputs(self) -> Any:
        """Return small inputs for `run`, the same each time."""

    @abstractmethod
    def run(self, module: Any, inputs: Any) -> Outputs:
        """Run a part built here."""

    @abstractmethod
    def cast(self, inputs: Any, dtype: torch.dtype) -> Any:
        """Inputs with floating-point tensors in another precision."""

    @abstractmethod
    def single(self, inputs: Any) -> Any:
        """The first row of `inputs` alone."""

    @abstractmethod
    def tensors(self, inputs: Any) -> dict[str, Tensor]:
        """The tensors inside `inputs`."""

    @abstractmethod
    def model(self, module: Any) -> Model:
        """Put a part into a model with stand-ins around it."""

    def loss(self, outputs: Outputs) -> Tensor:
        """A number that depends on every output: the part's own loss, or a random sum."""
        if "loss" in outputs:
            return outputs["loss"]
        draw = torch.Generator().manual_seed(7)
        floats = [t for t in outputs.values() if t.is_floating_point()]
        return torch.stack([(t * torch.randn(t.shape, generator=draw).to(t)).sum() for t in floats]).sum()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let a model of `model` be saved and loaded inside the block."""
        with stand_ins_installed(self.stand_ins()):
            yield

    def stand_ins(self) -> Sequence[str]:
        return ()


class EncoderSubject(Subject):
    """An encoder with the processor it makes, fitted to the samples where that is needed."""

    @property
    def modality(self) -> str:
        return self.component.spec.kind.removesuffix("_encoder")

    def raws(self) -> Sequence[Any]:
        """Raw inputs of different lengths: the author's, the encoder's own, or the kit's."""
        found = list(self.samples.get(self.modality) or self.cls.examples() or built_in(self.modality))
        if len(found) < 2:
            raise ContractError(
                f"the kit has {len(found)} raw inputs of the modality {self.modality!r}; expected at least two of"
                " different lengths from Encoder.examples() or samples= [Encoder]"
            )
        return found

    def complete(self) -> Any:
        self.raws()  # without them, nothing can be checked
        return self.config()

    def processor(self, config: Any = None) -> Any:
        """Make a processor, fitted if it needs that."""
        processor = self.cls.make_processor(self.config() if config is None else config)
        if processor.needs_fit:
            processor.fit(self.raws())
        return processor

    def build(self, config: Any = None) -> nn.Module:
        config = self.config() if config is None else config
        encoder: nn.Module = self.cls(config, self.processor(config))
        return encoder

    def items(self, processor: Any = None) -> list[Tensor]:
        """What the processor reads from the raw inputs."""
        processor = processor or self.processor()
        return [processor.read(raw, Policy()) for raw in self.raws()]

    def inputs(self) -> tuple[Tensor, Tensor]:
        processor = self.processor()
        data, mask = processor.pack(self.items(processor))
        return data, mask

    def run(self, module: Any, inputs: tuple[Tensor, Tensor]) -> Outputs:
        return flatten(module(*inputs))

    def cast(self, inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return cast_tensor(inputs[0], dtype), inputs[1]

    def single(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return inputs[0][:1], inputs[1][:1]

    def tensors(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"data": inputs[0], "mask": inputs[1]}

    def model(self, module: Any) -> Model:
        decoder = core("decoder", "embedding")
        fusion = Streams(Streams.Config(), {self.modality: module.stream})
        cls: Any = decoder.load()
        sources = {f"{self.modality}_encoder": self.component, "fusion": core("fusion", "streams"), "decoder": decoder}
        made = cls(cls.Config(), fusion.outputs)
        return Model(TASKS["embedding"], {self.modality: module}, fusion, made, sources).eval()


class FusionSubject(Subject):
    """A fusion of two or three modalities of different widths, with and without a summary of their own."""

    def __init__(self, check: Check, names: Sequence[str] = ("text", "image", "audio")) -> None:
        super().__init__(check)
        wanted = self.component.spec.modalities
        self.names = tuple(name for name in names if name in wanted) if wanted else tuple(names)
        self.streams = {name: self.stream(name, *STREAMS.get(name, (9, None))) for name in self.names}

    def stream(self, name: str, width: int, pooled: int | None) -> Stream:
        """A stream of this width, with a summary of its own where such a stream may have one."""
        return Stream(width, pooled)

    def build(self, config: Any = None) -> nn.Module:
        fusion: nn.Module = self.cls(self.config() if config is None else config, self.streams)
        return fusion

    def lengths(self, rows: int = 5) -> dict[str, list[int]]:
        """Tokens of each modality in each row. Row 0 has all, the last one nothing, the others lack one each."""
        return {
            name: [0 if row == rows - 1 or row == place + 1 else 2 + (row + place) % 3 for row in range(rows)]
            for place, name in enumerate(self.names)
        }

    def bundle(self, streams: Mapping[str, Stream], lengths: Mapping[str, Sequence[int]]) -> Bundle:
        """Random features of these widths, with so many tokens in each row."""
        return {name: random_features(one, lengths[name], seed) for seed, (name, one) in enumerate(streams.items())}

    def inputs(self) -> Bundle:
        return self.bundle(self.streams, self.lengths())

    def rows(self, inputs: Bundle, rows: Sequence[int]) -> Bundle:
        """Some rows of a bundle, in this order."""
        return rows_of(inputs, rows)

    def run(self, module: Any, inputs: Bundle) -> Outputs:
        bundle = module(inputs)
        missing = [name for name in module.outputs if name not in bundle]
        expect(not missing, f"the bundle lacks {missing}", "every stream of `outputs`", "Fusion")
        return {f"{name}.{key}": tensor for name in module.outputs for key, tensor in flatten(bundle[name]).items()}

    def cast(self, inputs: Bundle, dtype: torch.dtype) -> Bundle:
        return {name: map_features(f, lambda t: cast_tensor(t, dtype)) for name, f in inputs.items()}

    def single(self, inputs: Bundle) -> Bundle:
        return self.rows(inputs, [0])

    def tensors(self, inputs: Bundle) -> dict[str, Tensor]:
        return bundle_tensors(inputs)

    def stand_ins(self) -> Sequence[str]:
        return self.names

    def model(self, module: Any) -> Model:
        return _model_around(self.streams, module, self.component, None, None)


class ItemFusionSubject(FusionSubject):
    """A fusion that gets the text of a language model by row, with its ids, and the items of other modalities one by
    one. The first row has two items of each."""

    def stream(self, name: str, width: int, pooled: int | None) -> Stream:
        return Stream(width, None if name == "text" else pooled)

    def lengths(self, rows: int = 5) -> dict[str, list[int]]:
        """As for any fusion, but there is no row without text."""
        found = super().lengths(rows)
        return found | {"text": [max(length, 1) for length in found["text"]]}

    def bundle(self, streams: Mapping[str, Stream], lengths: Mapping[str, Sequence[int]]) -> Bundle:
        found = super().bundle(streams, lengths)
        return {name: _with_ids(one) if name == "text" else _items(one) for name, one in found.items()}

    def rows(self, inputs: Bundle, rows: Sequence[int]) -> Bundle:
        return {
            name: _items_of_rows(features, rows) if features.rows is not None else rows_of({name: features}, rows)[name]
            for name, features in inputs.items()
        }


class DecoderSubject(Subject):
    """A decoder of the streams it needs, of two for pairs, or of a single one, with toy targets of its first task."""

    def __init__(self, check: Check) -> None:
        super().__init__(check)
        alone = ("text", "image") if self.cls.paired else ("text",)
        self.streams = {name: Stream(WIDTH) for name in self.cls.needs or alone}

    @property
    def task(self) -> str:
        return str(self.cls.tasks[0])

    def toy(self, task: str | None = None) -> Toy | None:
        return TOYS.get(task or self.task)

    def known_toy(self, task: str | None = None) -> Toy:
        """Return the toy problem of a task, or end the check."""
        toy = self.toy(task)
        if toy is None:
            raise NotApplicableError(f"the kit has no toy problem for the task {task or self.task!r}")
        return toy

    def targets(self, toy: Toy, rows: int = 8) -> list[Any]:
        """One raw target a row, of two kinds in turn."""
        pair = toy.targets(getattr(self.config(), "labels", ()))
        return [pair[row % 2] for row in range(rows)]

    def fitted(self, toy: Toy | None) -> Any:
        """The example configuration, completed by the toy targets."""
        return self.config() if toy is None else self.cls.fit(self.config(), self.targets(toy))

    def complete(self) -> Any:
        return self.fitted(self.toy())

    def build(self, config: Any = None) -> nn.Module:
        config = self.complete() if config is None else config
        decoder: nn.Module = self.cls(config, self.streams)
        return decoder

    def bundle(self, rows: int = 8, streams: Mapping[str, Stream] | None = None) -> Bundle:
        """Features of which rows of one kind of target have something in common."""
        bundle = {}
        for seed, (name, stream) in enumerate((streams or self.streams).items()):
            features = random_features(stream, [2 + row % 3 for row in range(rows)], seed)
            kind = 2.0 * (torch.arange(rows) % 2)[:, None] - 1
            features.tokens += kind[..., None] * features.mask[..., None]
            if features.pooled is not None:
                features.pooled += kind
            if self.cls.marks_words:  # two in each row
                features.marks = features.mask & (torch.arange(features.mask.shape[1]) < 2)
            bundle[name] = features
        return bundle

    def inputs(self) -> tuple[Bundle, Any]:
        toy = self.toy()
        if toy is None:
            return self.bundle(), None
        return self.bundle(), self.build().encode_targets(self.targets(toy))  # type: ignore[operator]

    def run(self, module: Any, inputs: tuple[Bundle, Any]) -> Outputs:
        output = module(*inputs)
        outputs = {"logits": output.logits}
        return outputs if output.loss is None else outputs | {"loss": output.loss}

    def cast(self, inputs: tuple[Bundle, Any], dtype: torch.dtype) -> tuple[Bundle, Any]:
        return {n: map_features(f, lambda t: cast_tensor(t, dtype)) for n, f in inputs[0].items()}, inputs[1]

    def single(self, inputs: tuple[Bundle, Any]) -> tuple[Bundle, Any]:
        bundle = {name: map_features(features, lambda t: t[:1]) for name, features in inputs[0].items()}
        return bundle, inputs[1][:1] if isinstance(inputs[1], (Tensor, list)) else None

    def tensors(self, inputs: tuple[Bundle, Any]) -> dict[str, Tensor]:
        targets = {"targets": inputs[1]} if isinstance(inputs[1], Tensor) else {}
        return bundle_tensors(inputs[0]) | targets

    def stand_ins(self) -> Sequence[str]:
        return tuple(self.streams)

    def model(self, module: Any) -> Model:
        return _model_around(self.streams, None, None, module, self.component, self.task)


class WriterSubject(DecoderSubject):
    """A decoder that writes texts about its streams, with the processor it makes, fitted to the samples."""

    def raws(self) -> Sequence[str]:
        """Texts of different lengths: the author's, or the kit's."""
        return list(self.samples.get("text") or built_in("text"))

    def processor(self, config: Any = None) -> Any:
        """Make a processor, fitted if it needs that."""
        processor = self.cls.make_processor(self.config() if config is None else config)
        if processor.needs_fit:
            processor.fit(self.raws())
        return processor

    def build(self, config: Any = None, streams: Mapping[str, Stream] | None = None) -> nn.Module:
        config = self.config() if config is None else config
        decoder: nn.Module = self.cls(config, streams or self.streams, self.processor(config))
        return decoder

    def items(self, processor: Any = None) -> list[Tensor]:
        """What the processor reads from the texts."""
        processor = processor or self.processor()
        return [processor.read(raw, Policy()) for raw in self.raws()]

    def given(self, decoder: Any) -> tuple[Bundle, Any]:
        """What `forward` and `token_losses` take: what is read, and the targets."""
        return self.bundle(), decoder.encode_targets(self.targets(self.known_toy()))

    def begun(self, decoder: Any) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Begin to write in each row: logits, state, the tokens that come next (B, steps), and what those cost."""
        bundle, targets = self.given(decoder)
        costs = decoder.token_losses(bundle, targets)
        steps = int(decoder.weigh(targets).min())
        return (*decoder.begin(bundle), targets[:, :steps], costs[:, :steps])


class LanguageSubject(WriterSubject):
    """A language model: what it is given are the ids of the texts in each row, which it embeds itself."""

    def __init__(self, check: Check) -> None:
        super().__init__(check)
        self.streams = {}

    def complete(self) -> Any:
        return self.config()

    def build(self, config: Any = None, streams: Mapping[str, Stream] | None = None) -> nn.Module:
        config = self.config() if config is None else config
        decoder: nn.Module = self.cls(config, {}, self.processor(config))
        return decoder

    def inputs(self) -> Any:
        """The texts of three rows; the first row has two, as packed training data have."""
        one, two, *others = self.items()
        return [[one, two], *([text] for text in others)]

    def run(self, module: Any, inputs: Any) -> Outputs:
        bundle, counts = stream_of(module, inputs), count_goals(module, inputs)
        return {"logits": module(bundle).logits, "loss": module(bundle, counts).loss}

    def cast(self, inputs: Any, dtype: torch.dtype) -> Any:
        return inputs

    def single(self, inputs: Any) -> Any:
        return inputs[-1:]

    def tensors(self, inputs: Any) -> dict[str, Tensor]:
        return {f"{row}.{place}": text for row, texts in enumerate(inputs) for place, text in enumerate(texts)}

    def bundle(self, rows: int = 8, streams: Mapping[str, Stream] | None = None) -> Bundle:
        """One text in each row."""
        texts = self.items()
        return stream_of(self.part(), [[texts[row % len(texts)]] for row in range(rows)])

    def given(self, decoder: Any) -> tuple[Bundle, Any]:
        return stream_of(decoder, self.inputs()), count_goals(decoder, self.inputs())

    def begun(self, decoder: Any) -> tuple[Tensor, Any, Tensor, Tensor]:
        """The texts begin with one, two or three of their tokens."""
        texts = [text for text in self.items() if len(text) > 1]
        costs = decoder.token_losses(stream_of(decoder, [[text] for text in texts]))
        begins = [min(1 + row % 3, len(text) - 1) for row, text in enumerate(texts)]
        steps = min(len(text) - first for text, first in zip(texts, begins, strict=True))
        rows = list(enumerate(zip(texts, begins, strict=True)))
        goals = torch.stack([text[first : first + steps] for _, (text, first) in rows])
        costs = torch.stack([costs[row, first : first + steps] for row, (_, first) in rows])
        prompts = stream_of(decoder, [[text[:first]] for _, (text, first) in rows])
        return (*decoder.begin(prompts), goals, costs)

    def stand_ins(self) -> Sequence[str]:
        return ()

    def model(self, module: Any) -> Model:
        fusion = Interleave(Interleave.Config(), {"text": Stream(module.dim)})
        sources = {"fusion": core("fusion", "interleave"), "decoder": self.component}
        return Model(TASKS[self.task], {}, fusion, module, sources).eval()


def stream_of(decoder: Any, rows: Sequence[Sequence[Tensor]], continues: Tensor | None = None) -> Bundle:
    """What a language model reads of texts, (S,) ids each; those of one row stand behind each other."""
    ids, mask = pad_sequences([torch.cat(list(texts)) for texts in rows])
    parts, _ = pad_sequences(
        [torch.cat([torch.full_like(text, place) for place, text in enumerate(texts)]) for texts in rows]
    )
    several = parts if any(len(texts) > 1 for texts in rows) else None
    tokens = decoder.embed(ids) * mask[..., None]
    return {"fused": Features(tokens, mask, ids=ids.masked_fill(~mask, -1), parts=several, continues=continues)}


def count_goals(decoder: Any, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """How many tokens of each row are to be predicted, by the decoder's own count."""
    data, mask = pad_sequences([text for texts in rows for text in texts])
    numbers = torch.tensor([row for row, texts in enumerate(rows) for _ in texts])
    counts: Tensor = decoder.count_targets(Items(data, mask, numbers, len(rows)))
    return counts


def lined_up(decoder: Any, rows: Sequence[Sequence[Tensor]], *, pack: bool = False) -> Bundle:
    """What a language model reads of rows in which ids (S,) and items, (t, D) features of its width, alternate."""
    texts = [torch.cat([part for part in parts if part.ndim == 1]) for parts in rows]
    found = [(row, part) for row, parts in enumerate(rows) for part in parts if part.ndim == 2]
    places = [_places_of(parts) for parts in rows]
    tokens, mask = pad_sequences([part for _, part in found])
    items = Features(tokens, mask, rows=torch.tensor([row for row, _ in found]))
    text = stream_of(decoder, [[text] for text in texts])["fused"]
    return {"fused": line_up(text, {"item": items}, Plan.of(places, ["item"]), pack=pack)}


def _places_of(parts: Sequence[Tensor]) -> list[tuple[str, int]]:
    """Where the items of a row stand, each of them and each id taking one place."""
    ends = torch.tensor([len(part) if part.ndim == 1 else 1 for part in parts]).cumsum(0).tolist()
    return [("item", end - 1) for part, end in zip(parts, ends, strict=True) if part.ndim == 2]


def subject_of(check: Check) -> Any:
    """Return the subject of a check of a component."""
    assert isinstance(check.target, Component)
    kinds: dict[str, Any] = {"encoder": EncoderSubject, "fusion": _fusion_subject, "decoder": _decoder_subject}
    role = role_of(check.target)
    if role not in kinds:
        raise ContractError(
            f"the kind is {check.target.spec.kind!r}; expected fusion, decoder or MODALITY_encoder [manifest]"
        )
    try:
        return kinds[role](check)
    except Exception as error:
        if check.id.endswith("/builds"):
            raise
        raise NotApplicableError("it cannot be imported, see the check builds") from error


def _fusion_subject(check: Check) -> FusionSubject:
    assert isinstance(check.target, Component)
    return ItemFusionSubject(check) if check.target.load().by_item else FusionSubject(check)


def _decoder_subject(check: Check) -> DecoderSubject:
    assert isinstance(check.target, Component)
    cls: Any = check.target.load()
    if issubclass(cls, LanguageModel):
        return LanguageSubject(check)
    return WriterSubject(check) if issubclass(cls, TextDecoder) else DecoderSubject(check)


def core(kind: str, name: str) -> Component:
    return get_index().find(kind, f"mmhub/{name}")


def flatten(features: Features) -> Outputs:
    """The tensors of features by name."""
    outputs = {"tokens": features.tokens, "mask": features.mask}
    return outputs if features.pooled is None else outputs | {"pooled": features.pooled}


def bundle_tensors(bundle: Bundle) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, features in bundle.items() for key, tensor in flatten(features).items()}


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def first_stray(features: Features) -> str:
    """Say which masked position of the tokens is the first that is not zero, and what it holds."""
    item, position = (features.tokens.abs().amax(-1) * ~features.mask).nonzero()[0].tolist()
    value = features.tokens[item, position].abs().max().item()
    return f"item {item}, position {position} of {features.mask.shape[1]} holds {value:.3g}"


def difference(one: Outputs, other: Outputs, tolerance: float = 1e-5) -> str:
    """Say how two sets of outputs differ, '' if they agree; `tolerance` is relative to the largest value or 1."""
    if one.keys() != other.keys():
        return f"{sorted(one)} against {sorted(other)}"
    for name, a in one.items():
        b = other[name]
        if a.shape != b.shape:
            return f"{name} {tuple(a.shape)} against {tuple(b.shape)}"
        if not a.numel():
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{name} has other values"
            continue
        gap = (a.double() - b.double()).abs().max().item()
        if not gap <= tolerance * max(1.0, b.double().abs().max().item()):  # NaN is a difference, too
            return f"{name} is off by {gap:.3g}"
    return ""


def _with_ids(text: Features) -> Features:
    """Text as a language model has it: a row of length 0 has nothing that could be predicted."""
    ids = (torch.arange(text.mask.shape[1]) % 5).expand(text.mask.shape)
    return replace(text, ids=ids.masked_fill(~text.mask, -1), loss=text.mask & (ids % 2 > 0))


def _items(features: Features) -> Features:
    """One item of each row that is not empty, two of the first one that is not."""
    rows = features.present.nonzero().squeeze(1)
    rows = torch.cat([rows[:1], rows])
    found = features.select(rows)
    found.tokens[:1] *= 0.5
    return replace(found, rows=rows)


def _items_of_rows(features: Features, rows: Sequence[int]) -> Features:
    assert features.rows is not None
    found = [
        (new, item) for new, row in enumerate(rows) for item in (features.rows == row).nonzero().flatten().tolist()
    ]
    chosen = features.select(torch.tensor([item for _, item in found], dtype=torch.long))
    return replace(chosen, rows=torch.tensor([new for new, _ in found], dtype=torch.long))


def _model_around(
    streams: Mapping[str, Stream],
    fusion: Any,
    fusion_source: Component | None,
    decoder: Any,
    decoder_source: Component | None,
    task: str = "embedding",
) -> Model:
    encoders = {name: make_stand_in(stream) for name, stream in streams.items()}
    sources = {f"{name}_encoder": stand_in_component(name) for name in streams}
    sources["fusion"] = fusion_source or core("fusion", "streams")
    fusion = Streams(Streams.Config(), streams) if fusion is None else fusion
    sources["decoder"] = decoder_source or core("decoder", "embedding")
    if decoder is None:
        cls: Any = sources["decoder"].load()
        decoder = cls(cls.Config(), fusion.outputs)
    return Model(TASKS[task], encoders, fusion, decoder, sources).eval()
