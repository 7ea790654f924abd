"""The regression head: one number a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Stream
from mmhub.interfaces.labels import at_row, is_missing, plain
from mmhub_heads.summary import SummaryHead, check_head


class Regression(Decoder):
    """A linear output trained with the mean squared error on standardised targets; answers are in the data's units."""

    tasks: ClassVar[tuple[str, ...]] = ("regression",)

    class Config(ComponentConfig, frozen=True):
        """Settings of the regression head. `mean` and `std` of the training targets are learned by `fit`."""

        mean: float | None = None
        std: float | None = None
        dropout: float = 0.1
        hidden: int = 0

        def __post_init__(self) -> None:
            check_head(self.dropout, self.hidden)
            if self.std is not None and not 0 < self.std < math.inf:
                raise ValueError(f"std must be above 0, got {self.std}")

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.mean = 0.0 if config.mean is None else config.mean
        self.std = 1.0 if config.std is None else config.std
        self.head = SummaryHead(inputs, 1, dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the mean and standard deviation of the targets; values given before stay.

        Raises:
            InputError: a target is not a finite number.
            UsageError: there is no target.
        """
        if config.mean is not None and config.std is not None:
            return config
        values = list(_numbers(targets))
        if not values:
            raise UsageError(
                "the training data hold no target", "check data.target, or give mean and std in the decoder's config"
            )
        mean = math.fsum(values) / len(values) if config.mean is None else config.mean
        std = config.std or math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return msgspec.structs.replace(config, mean=mean, std=std or 1.0)  # equal targets have no spread

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn raw numbers into standardised targets, (B,) float."""
        # Standardised in double precision: large offsets such as years or timestamps would drown in fp32.
        return torch.tensor([(value - self.mean) / self.std for value in _numbers(targets)], dtype=torch.float32)

    def references(self, targets: Sequence[Any]) -> list[float]:
        """Return the targets as numbers, as in the `value` of an answer."""
        return list(_numbers(targets))

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return standardised predictions (B, 1); the loss is their mean squared error to targets (B,)."""
        logits = self.head(bundle)
        loss = None if targets is None else F.mse_loss(logits.squeeze(1), targets)
        return Output(logits=logits, loss=loss)

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"value"}` in the units of the training targets."""
        return [{"value": value * self.std + self.mean} for (value,) in output.logits.detach().cpu().double().tolist()]


def _numbers(targets: Iterable[Any]) -> Iterable[float]:
    """Yield each raw target as a finite number; an InputError carries its row."""
    for row, raw in enumerate(targets):
        try:
            yield _number(raw)
        except InputError as error:
            raise at_row(error, row) from None


def _number(raw: Any) -> float:
    raw = plain(raw)
    if is_missing(raw):
        raise InputError("the target is missing", "give every row a number, or leave the row out")
    try:
        value = float(raw) if isinstance(raw, (int, float, str)) and not isinstance(raw, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        shown = repr(raw) if isinstance(raw, (int, float, str)) else f"a {type(raw).__name__}"
        raise InputError(f"a regression target must be a finite number, got {shown}")
    return value
