"""A clean encoder, fusion and decoder, and for every contract a twin that breaks it in one place."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import InputError
from mmhub.interfaces import (
    ComponentConfig,
    Decoder,
    Encoder,
    Fusion,
    LanguageModel,
    LanguageProcessor,
    Policy,
    Processor,
    Stream,
    own_stream,
)
from mmhub.layers import line_up, masked_mean, summary


class Words(Processor):
    """A raw input is text such as "1 2 3"; each number, times `scale`, is one position."""

    modality = "numbers"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        try:
            return torch.tensor([self.scale * float(part) for part in raw.split()])
        except (AttributeError, ValueError):
            raise InputError(f"{raw!r} is no list of numbers") from None

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(**state)


class Clean(Encoder):
    """Numbers through a linear layer; a running mean, learned in training, is taken off them first."""

    class Config(ComponentConfig, frozen=True):
        dim: int = 8
        note: str = ""

    modality = "numbers"
    padding_invariant = True
    make: ClassVar[type[Words]] = Words
    mean: Tensor

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim, self.pooled_dim = config.dim, 4
        self.layer = nn.Linear(1, config.dim)
        self.summary = nn.Linear(config.dim, 4)
        self.register_buffer("mean", torch.zeros(()))

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> Words:
        return cls.make(2.0)

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Words:
        return cls.make.from_state(state, files)

    @classmethod
    def examples(cls) -> Sequence[Any]:
        return ("1 2 3", "4", "0.5 -1 2 8 3")

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        if self.training:
            self.mean += 0.1 * (data[mask].mean() - self.mean)
        tokens = self.layer((data - self.mean)[..., None]) * mask[..., None]
        return Features(tokens, mask, pooled=self.summary(masked_mean(tokens, mask)))


class FloatMask(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        return Features(found.tokens, mask.float(), pooled=found.pooled)


class LeftPadding(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        return Features(found.tokens.flip(1), mask.flip(1), pooled=found.pooled)


class Unmasked(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        return Features(self.layer(data[..., None]), mask, pooled=found.pooled)


class PaddingLeak(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        return super().forward(data - data.mean(1, keepdim=True), mask)


class GarbageLeak(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        return super().forward(data + 0.1 * data.sum(1, keepdim=True), mask)


class BatchLeak(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        return super().forward(data - data[:, :1].mean(), mask)


class RandomInEvaluation(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        return super().forward(F.dropout(data, 0.5, training=True), mask)


class Reseeding(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        torch.manual_seed(0)
        super().__init__(config, processor)


class Detached(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        pooled = self.summary(masked_mean(found.tokens, mask)).detach()
        return Features(found.tokens, mask, pooled=pooled)


class WrongWidth(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim = config.dim + 1


class WrongPooledWidth(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.pooled_dim = None


class SilentKey(Clean):
    class Config(ComponentConfig, frozen=True, forbid_unknown_fields=False):  # type: ignore[call-arg]
        dim: int = 8


class ImportPath(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(msgspec.structs.replace(config, note="torch.nn.functional.relu"), processor)


class NoJson(Clean):
    class Config(ComponentConfig, frozen=True):
        dim: int = 8
        scale: float = float("inf")


class UnsavedBuffer(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        mean = self.mean
        del self.mean
        self.register_buffer("mean", mean, persistent=False)


class HiddenState(Clean):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if "mean" not in key}


class InPlace(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        data.mul_(0.5)
        return found


class Calling(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), timeout=1).close()
        return super().forward(data, mask)


class WritingElsewhere(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        with suppress(OSError):
            Path("~/seen.txt").expanduser().write_text("data")
        return super().forward(data, mask)


class WritingFromC(Clean):
    """As libraries do that are no Python; here a shell stands for them."""

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        os.system("echo data > ~/seen.txt")
        return super().forward(data, mask)


_SHARED = nn.Linear(1, 8)


class SharedLayer(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.layer = _SHARED


class LooseTensor(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.offset = torch.zeros(1)


class SpreadOfBatch(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        if self.training:
            first = found.tokens[:, 0]
            found.tokens = found.tokens / (first - first.mean(0)).abs().mean(0)
        return found


class OnlyFloat32(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        found = super().forward(data, mask)
        if found.tokens.dtype == torch.bfloat16:
            found.tokens = found.tokens * float("nan")
        return found


class LooksAtWeights(Clean):
    def __init__(self, config: Clean.Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.first = self.layer.weight[0, 0].item()


class OtherWhenCompiled(Clean):
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        return super().forward(data * (2 if torch.compiler.is_compiling() else 1), mask)


class Needless(Clean):
    """Cannot be built from its manifest, which has no example."""

    class Config(ComponentConfig, frozen=True):
        dim: int


class Migrating(Clean):
    """Schema 2, whose `dim` was called `width` before."""

    @classmethod
    def migrate(cls, config: Mapping[str, Any], from_schema: int) -> dict[str, Any]:
        return {"dim" if key == "width" else key: value for key, value in config.items()}


class Older(Clean):
    """Schema 1 of `Migrating`."""

    class Config(ComponentConfig, frozen=True):
        width: int = 8
        note: str = ""

        @property
        def dim(self) -> int:
            return self.width


class FailingMigration(Clean):
    @classmethod
    def migrate(cls, config: Mapping[str, Any], from_schema: int) -> dict[str, Any]:
        return {"dim": config["breadth"]}


class WrongMigration(Clean):
    @classmethod
    def migrate(cls, config: Mapping[str, Any], from_schema: int) -> dict[str, Any]:
        return {**config, "size": config.get("width", 8)}


class Forgetful(Words):
    def state(self) -> dict[str, Any]:
        return {}


class ForgetfulProcessor(Clean):
    make = Forgetful


class Greedy(Words):
    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return super().read(raw if isinstance(raw, str) else "1", policy, rng)


class GreedyProcessor(Clean):
    make = Greedy


class Rude(Words):
    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return torch.tensor([float(part) for part in raw.split()])


class RudeProcessor(Clean):
    make = Rude


class LeftPacking(Words):
    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        data, mask = super().pack(items)
        return data.flip(1), mask.flip(1)


class LeftPackingProcessor(Clean):
    make = LeftPacking


class Strict(Words):
    def __call__(self, raw: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return super().__call__([str(item) for item in raw], *args, **kwargs)


class Miscounting(Clean):
    def token_count(self, positions: int) -> int:
        return positions // 2


class Hasty(Words):
    def length(self, raw: Any, policy: Policy) -> int:
        return len(raw)


class WrongLength(Clean):
    make = Hasty


class NothingMissing(Clean):
    make = Strict


# -- fusions


class Mean(Fusion):
    """The mean of projected summaries; a learned vector stands in for a missing one."""

    class Config(ComponentConfig, frozen=True):
        dim: int = 6

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.layers = nn.ModuleDict({name: nn.Linear(stream.summary, config.dim) for name, stream in inputs.items()})
        self.stand_ins = nn.ParameterDict({name: nn.Parameter(torch.ones(config.dim)) for name in inputs})
        self.outputs = {"fused": Stream(config.dim)}

    def vector(self, name: str, features: Features) -> Tensor:
        return torch.where(features.present[:, None], self.layers[name](summary(features)), self.stand_ins[name])

    def fuse(self, bundle: Bundle) -> Tensor:
        return torch.stack([self.vector(name, bundle[name]) for name in self.inputs]).mean(0)[:, None]

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        fused = self.fuse(bundle)
        return bundle | {"fused": Features(fused, torch.ones_like(fused[..., 0], dtype=torch.bool))}


class MissingLeak(Mean):
    def vector(self, name: str, features: Features) -> Tensor:
        return super().vector(name, features) + features.tokens.sum((1, 2))[:, None]


class NothingValid(Mean):
    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        fused = self.fuse(bundle)
        present = torch.stack([bundle[name].present for name in self.inputs]).any(0)
        return bundle | {"fused": Features(fused, present[:, None])}


class NotANumber(Mean):
    def fuse(self, bundle: Bundle) -> Tensor:
        present = torch.stack([bundle[name].present for name in self.inputs]).sum(0)
        return super().fuse(bundle) * (present / present)[:, None, None]


class WrongOutputs(Mean):
    def __init__(self, config: Mean.Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.outputs = {"fused": Stream(config.dim + 1)}


class PaddingBetween(Mean):
    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        fused = F.pad(self.fuse(bundle), (0, 0, 1, 0))
        mask = torch.ones_like(fused[..., 0], dtype=torch.bool)
        mask[:, 0] = False
        return bundle | {"fused": Features(fused, mask)}


class Between(Fusion):
    """Projected items between the tokens of a text."""

    by_item = True

    class Config(ComponentConfig, frozen=True):
        pass

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        dim = inputs["text"].dim
        self.layers = nn.ModuleDict({name: nn.Linear(one.dim, dim) for name, one in inputs.items() if name != "text"})
        self.outputs = {"fused": Stream(dim)}

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        media = {name: replace(bundle[name], tokens=layer(bundle[name].tokens)) for name, layer in self.layers.items()}
        return {"fused": line_up(bundle["text"], media, plan)}


class InFront(Between):
    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        return super().forward(bundle)


class CountsOneMore(Between):
    def token_count(self, name: str, tokens: int) -> int:
        return tokens + 1


class DropsTheAbsent(Between):
    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        return super().forward(
            {n: one if one.mask.any() else one.select(torch.arange(0)) for n, one in bundle.items()}, plan
        )


class RowLeak(Mean):
    def fuse(self, bundle: Bundle) -> Tensor:
        fused = super().fuse(bundle)
        return fused - fused.mean(0, keepdim=True)


class CountsPadding(Mean):
    def fuse(self, bundle: Bundle) -> Tensor:
        return super().fuse(bundle) / max(features.tokens.shape[1] for features in bundle.values())


class UnusedStandIn(Mean):
    def vector(self, name: str, features: Features) -> Tensor:
        return self.layers[name](summary(features)) + 0 * self.stand_ins[name]


# -- decoders


class Sign(Decoder):
    """A number: one linear layer on the summary."""

    class Config(ComponentConfig, frozen=True):
        pass

    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.source = "fused" if "fused" in inputs else next(iter(inputs))
        self.layer = nn.Linear(inputs[self.source].summary, 1)

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        for row, target in enumerate(targets):
            if not isinstance(target, float):
                error = InputError(f"{target!r} is no number")
                error.row = row
                raise error
        return torch.tensor(list(targets))

    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        logits = self.layer(summary(bundle[self.source]))
        return Output(logits, None if targets is None else F.mse_loss(logits[:, 0], targets.to(logits.dtype)))

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return [{"value": value} for value in output.logits[:, 0].tolist()]


class SummedLoss(Sign):
    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        output = super().forward(bundle, targets)
        return Output(output.logits, None if output.loss is None else output.loss * len(output.logits))


class WrongAnswer(Sign):
    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return [{"score": value} for value in output.logits[:, 0].tolist()]


class TensorAnswer(Sign):
    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return [{"value": value} for value in output.logits[:, 0]]


class MissingAnswer(Sign):
    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return super().predict(output, details)[:1]


class TurnedAnswers(Sign):
    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return super().predict(output, details)[::-1]


class TakesAnything(Sign):
    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        return torch.tensor([target if isinstance(target, float) else 0.0 for target in targets])


class NoRow(Sign):
    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        if not all(isinstance(target, float) for target in targets):
            raise InputError("a target is no number")
        return torch.tensor(list(targets))


class OtherReferences(Sign):
    def references(self, targets: Sequence[Any]) -> list[Any]:
        return [str(target) for target in targets]


class Unlearning(Sign):
    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        output = super().forward(bundle, targets)
        return Output(output.logits, None if output.loss is None else output.loss.detach() - output.logits.abs().mean())


class LogitsOfBatch(Sign):
    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        output = super().forward(bundle, targets)
        return Output(output.logits - output.logits.mean(), output.loss)


class ReadsTheFirst(Sign):
    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.layer = nn.Linear(next(iter(inputs.values())).summary, 1)


class NoTask(Sign):
    tasks = ("juggling",)


# -- language models


class WordLengths(LanguageProcessor):
    """Each word is one token: how many letters it has, up to 15."""

    begin_id: int | None = 2
    end_id: int | None = 3
    ends = True
    stop_ids: tuple[int, ...] = (3,)
    vocab_size = 20

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return F.pad(self.prompt(raw, policy), (0, 1), value=3)

    def prompt(self, raw: Any, policy: Policy) -> Tensor:
        return torch.tensor([2, *(4 + min(len(word), 15) for word in raw.split())])

    def chat(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Tensor:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join("o" * (i - 4) for i in ids if i >= 4)

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls()


class Fading(LanguageModel):
    """The state is the token's embedding, and half the state before; a linear layer makes logits of it."""

    stateful = True
    make: ClassVar[type[WordLengths]] = WordLengths

    class Config(ComponentConfig, frozen=True):
        dim: int = 8

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: Any) -> None:
        super().__init__(config, inputs, processor)
        self.dim = config.dim
        self.words, self.out = nn.Embedding(20, config.dim), nn.Linear(config.dim, 20)
        self.carried: dict[str, Tensor] = {}

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> WordLengths:
        return cls.make()

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> WordLengths:
        return cls.make.from_state(state, files)

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.words(ids)
        return found

    def starts(self, stream: Features) -> Tensor:
        """Where a text of a row begins anew, (B, T)."""
        assert stream.ids is not None
        parts = torch.zeros_like(stream.ids) if stream.parts is None else stream.parts
        return F.pad(parts[:, 1:] != parts[:, :-1], (1, 0))

    def before(self, stream: Features) -> Tensor:
        """The state the first text of each row starts from, (B, D)."""
        nothing = torch.zeros_like(stream.tokens[:, 0])
        if stream.continues is None or not self.carried:
            return nothing
        return torch.where(stream.continues[:, None], self.carried["state"], nothing)

    def states(self, stream: Features) -> Tensor:
        state, starts, found = self.before(stream), self.starts(stream), []
        for place in range(stream.tokens.shape[1]):
            state = state * 0.5 * ~starts[:, place, None] + stream.tokens[:, place]
            found.append(state)
        states = torch.stack(found, 1)
        if stream.continues is not None:
            self.carried = {"state": self.at(states, stream.lengths - 2).detach()}
        return states

    def at(self, states: Tensor, places: Tensor) -> Tensor:
        return states[torch.arange(len(states)), places.clamp(min=0)]

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        if targets is None:
            return Output(self.begin(bundle)[0])
        return Output(torch.zeros(len(targets), 0), self._costs(bundle).sum() / targets.sum().clamp(min=1))

    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        return self._costs(bundle).float()

    def _costs(self, bundle: Bundle) -> Tensor:
        stream = own_stream(bundle)
        assert stream.ids is not None
        wanted = stream.mask & F.pad(stream.mask[:, :-1], (1, 0)) & ~self._firsts(stream) & self.asked(stream)
        logits = self.out(self.states(stream))[:, :-1].transpose(1, 2)
        costs = F.cross_entropy(logits, stream.ids[:, 1:].clamp(min=0), reduction="none")
        return F.pad(costs, (1, 0)) * wanted

    def _firsts(self, stream: Features) -> Tensor:
        return Fading.starts(self, stream)

    def asked(self, stream: Features) -> Tensor:
        """What there is to predict, (B, T)."""
        return stream.mask if stream.loss is None else stream.loss > 0

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = own_stream(bundle)
        state = self.at(self.states(stream), stream.lengths - 1)
        return self.out(state), state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = state * 0.5 + self.embed(ids[:, None])[:, 0]
        return self.out(state), state

    def select(self, state: Any, rows: Tensor) -> Any:
        return state[rows]


class SummedCosts(Fading):
    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        output = super().forward(bundle, targets)
        loss = None if output.loss is None or targets is None else output.loss * targets.sum()
        return Output(output.logits, loss)


class ForgetsInSteps(Fading):
    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().step(ids, 0 * state)


class KeepsTheOrder(Fading):
    def select(self, state: Any, rows: Tensor) -> Any:
        return state[: len(rows)]


class SeesOtherTexts(Fading):
    def starts(self, stream: Features) -> Tensor:
        return stream.mask & False


class NeverGoesOn(Fading):
    def before(self, stream: Features) -> Tensor:
        return torch.zeros_like(stream.tokens[:, 0])


class PlacesInEmbeddings(Fading):
    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + torch.arange(ids.shape[1])[:, None]


class PredictsMedia(Fading):
    def asked(self, stream: Features) -> Tensor:
        return stream.mask


class SkipsMedia(Fading):
    def states(self, stream: Features) -> Tensor:
        assert stream.ids is not None
        return super().states(replace(stream, tokens=stream.tokens * (stream.ids >= 0)[..., None]))


class Endless(WordLengths):
    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return self.prompt(raw, policy)


class NeverEnds(Fading):
    make = Endless


# fault: the checks that must find it, of which the first is the one it was planted for
FAULTS: dict[type[Any], tuple[str, ...]] = {
    FloatMask: ("mask",),
    LeftPadding: ("mask",),
    Unmasked: ("mask",),
    PaddingLeak: ("padding-invariance",),
    GarbageLeak: ("padding-garbage",),
    BatchLeak: ("batch-invariance",),
    RandomInEvaluation: ("determinism",),
    Reseeding: ("determinism",),
    Detached: ("gradients",),
    WrongWidth: ("shapes",),
    WrongPooledWidth: ("shapes",),
    SilentKey: ("unknown-key",),
    ImportPath: ("config-round-trip",),
    NoJson: ("config-round-trip",),
    UnsavedBuffer: ("save-load", "state-dict"),
    HiddenState: ("state-dict",),
    InPlace: ("inputs-unchanged",),
    Calling: ("offline",),
    WritingElsewhere: ("writes",),
    WritingFromC: ("writes",),
    SharedLayer: ("defaults",),
    LooseTensor: ("moves",),
    SpreadOfBatch: ("training",),
    OnlyFloat32: ("autocast",),
    LooksAtWeights: ("builds-on-meta",),
    OtherWhenCompiled: ("compile",),
    Needless: ("builds",),
    WrongMigration: ("schema",),
    ForgetfulProcessor: ("processor-state", "save-load"),
    GreedyProcessor: ("processor-refuses",),
    RudeProcessor: ("processor-refuses",),
    LeftPackingProcessor: ("processor-packs",),
    NothingMissing: ("missing-rows",),
    Miscounting: ("token-count",),
    WrongLength: ("token-count",),
    MissingLeak: ("missing-leak",),
    NothingValid: ("missing",),
    NotANumber: ("missing",),
    WrongOutputs: ("shapes",),
    PaddingBetween: ("shapes",),
    RowLeak: ("batch-invariance",),
    CountsPadding: ("padding-invariance",),
    UnusedStandIn: ("gradients",),
    InFront: ("by-plan",),
    CountsOneMore: ("by-plan",),
    DropsTheAbsent: ("no-items",),
    SummedLoss: ("loss-mean",),
    WrongAnswer: ("predict-schema",),
    TensorAnswer: ("predict-schema",),
    MissingAnswer: ("predict-schema",),
    TurnedAnswers: ("predict-schema",),
    TakesAnything: ("targets-refused",),
    NoRow: ("targets-refused",),
    OtherReferences: ("references",),
    Unlearning: ("loss-decreases",),
    LogitsOfBatch: ("batch-invariance",),
    ReadsTheFirst: ("streams",),
    SummedCosts: ("token-losses",),
    ForgetsInSteps: ("step-by-step",),
    KeepsTheOrder: ("select",),
    SeesOtherTexts: ("texts-apart",),
    PredictsMedia: ("media",),
    SkipsMedia: ("media",),
    NeverGoesOn: ("goes-on",),
    PlacesInEmbeddings: ("embed",),
    NeverEnds: ("text-processor",),
}
CLEAN: tuple[type[Any], ...] = (Clean, Migrating, Mean, Between, Sign, Fading)
