"""Stand-ins for the parts that are not being checked: random features, and an encoder of number lists.

The encoder is installed in this process's index while a check runs, so that models with it can be saved and loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmhub import plugins
from mmhub.batch import Bundle, Features
from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Encoder, Policy, Processor, Stream
from mmhub.layers import masked_mean
from mmhub.plugins import Component, Index, get_index
from mmhub.spec import ComponentSpec

NAME = "stand-in"


class Numbers(Processor):
    """A raw input is text such as "1 2 3"; each number is one position."""

    modality = "stand-in"

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        try:
            return torch.tensor([float(part) for part in raw.split()])
        except (AttributeError, ValueError):
            raise InputError(f"{raw!r} is no list of numbers") from None

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls()


class StandIn(Encoder):
    """One linear layer on each number, with a summary of width `pooled` unless that is 0."""

    class Config(ComponentConfig, frozen=True):
        dim: int = 16
        pooled: int = 0

    modality = "stand-in"
    padding_invariant = True

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim, self.pooled_dim = config.dim, config.pooled or None
        self.layer = nn.Linear(1, config.dim)
        self.summary = nn.Linear(config.dim, config.pooled) if config.pooled else None

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> Numbers:
        return Numbers()

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Numbers:
        return Numbers()

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        tokens = self.layer(data[..., None]) * mask[..., None]
        return Features(tokens, mask, pooled=self.summary(masked_mean(tokens, mask)) if self.summary else None)


def make_stand_in(stream: Stream) -> StandIn:
    """Build an encoder that gives features of these widths."""
    return StandIn(StandIn.Config(dim=stream.dim, pooled=stream.pooled or 0), Numbers())


def stand_in_component(modality: str) -> Component:
    core = get_index().plugins[0]
    spec = ComponentSpec(kind=f"{modality}_encoder", name=NAME, factory="mmhub.testing.standins:StandIn")
    return Component(spec, core.distribution, core.version)


@contextmanager
def stand_ins_installed(modalities: Sequence[str]) -> Iterator[None]:
    """Let names such as "mmhub/stand-in" be found among the encoders of `modalities` inside the block."""
    before = get_index()
    core, *others = before.plugins
    extra = tuple(stand_in_component(modality) for modality in modalities)
    plugins._index = Index((replace(core, components=(*core.components, *extra)), *others))
    try:
        yield
    finally:
        plugins._index = before


def random_features(stream: Stream, lengths: Sequence[int], seed: int) -> Features:
    """Features of these widths, (B, max length, D); a row of length 0 lacks the modality."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(max(lengths), 1)
    mask = torch.arange(longest)[None] < torch.tensor(list(lengths))[:, None]
    tokens = torch.randn(len(lengths), longest, stream.dim, generator=draw) * mask[..., None]
    pooled = None
    if stream.pooled:
        pooled = torch.randn(len(lengths), stream.pooled, generator=draw) * mask.any(1, keepdim=True)
    return Features(tokens, mask, pooled=pooled)


def rows_of(bundle: Bundle, rows: Sequence[int]) -> Bundle:
    """The given rows of every stream."""
    index = torch.tensor(list(rows), dtype=torch.long)
    return {name: map_features(features, lambda t: t[index]) for name, features in bundle.items()}


def map_features(features: Features, change: Any) -> Features:
    """Features with `change` done to each of their tensors."""
    return Features(**{name: change(part) for name, part in vars(features).items() if part is not None})
