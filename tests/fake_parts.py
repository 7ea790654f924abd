"""Tiny parts for tests of what surrounds them: an encoder of number lists and a decoder of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import InputError
from mmhub.fusion.streams import Streams
from mmhub.interfaces import TASKS, ComponentConfig, Decoder, Encoder, Policy, Processor, Stream
from mmhub.layers import summary
from mmhub.model import Model
from mmhub.plugins import Component
from mmhub.spec import ComponentSpec


class Numbers(Processor):
    """A raw input is text such as "1 2 3"; each number is one position."""

    modality = "numbers"
    augments = True

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        try:
            numbers = torch.tensor([float(part) for part in str(raw).split()])
        except ValueError:
            raise InputError(f"{raw!r} is no list of numbers") from None
        return numbers if rng is None else numbers + torch.rand(len(numbers), generator=rng)

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls()


class Sensitive(Encoder):
    """Normalises over all positions it is given, so that padding would change it; remembers what it was given."""

    class Config(ComponentConfig):
        dim: int = 4

    modality = "numbers"
    padding_invariant = False

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim = self.pooled_dim = config.dim
        self.layer = nn.Linear(1, config.dim)
        self.drop = nn.Dropout(0.5)
        self.seen: list[tuple[int, ...]] = []

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> Numbers:
        return Numbers()

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Numbers:
        return Numbers.from_state(state, files)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        self.seen.append(tuple(data.shape))
        x = data - data.mean(1, keepdim=True)
        tokens = self.drop(self.layer(x[..., None])) * mask[..., None]
        return Features(tokens, mask, pooled=tokens.sum(1) + data.shape[1])


class Scores(Decoder):
    """Answer the row's summary as it is."""

    class Config(ComponentConfig):
        pass

    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        (self.source,) = inputs
        self.scale = nn.Parameter(torch.ones(inputs[self.source].summary))

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        for row, target in enumerate(targets):
            if target is None:
                error = InputError("the target is missing")
                error.row = row
                raise error
        return torch.tensor([float(target) for target in targets])

    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        logits = summary(bundle[self.source]) * self.scale
        return Output(logits, None if targets is None else (logits.mean(1) - targets).pow(2).mean())

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        return [{"value": row} for row in output.logits.tolist()]


def component(kind: str, name: str, distribution: str = "mmhub-fake", version: str = "0.1.0") -> Component:
    return Component(ComponentSpec(kind=kind, name=name, factory="nowhere:Nothing"), distribution, version)


def fake_model(encoder: Encoder | None = None) -> Model:
    """A model of one fake encoder without fusion."""
    torch.manual_seed(0)
    encoder = encoder or Sensitive(Sensitive.Config(), Numbers())
    fusion = Streams(Streams.Config(), {"numbers": encoder.stream})
    parts = {"numbers_encoder": "sensitive", "fusion": "streams", "decoder": "scores"}
    sources = {role: component(role, name) for role, name in parts.items()}
    return Model(
        TASKS["regression"], {"numbers": encoder}, fusion, Scores(Scores.Config(), fusion.outputs), sources
    ).eval()
