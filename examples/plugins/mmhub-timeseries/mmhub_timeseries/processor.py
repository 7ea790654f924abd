"""The processor both encoders share: decode, standardise, and mark what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, Self, TypeAlias

import msgspec
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Policy, Processor, decode_config, describe_raw, encode_config
from mmhub_timeseries.decode import decode

Standardize: TypeAlias = Literal["training", "series", "none"]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Channels: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=4096)]


class SeriesProcessor(Processor):
    """Turn series into (T, 2C): C channels of values, missing ones zero, then C of indicators, 1 = missing.

    The number of channels and each channel's mean and standard deviation come from the training data.
    """

    modality = "timeseries"

    class Config(ComponentConfig, frozen=True):
        """The whole state. `mean` and `std`: one number a channel; `channels` 0: learned from the training data."""

        channels: Channels = 0
        standardize: Standardize = "training"
        max_length: Count = 100_000  # steps
        mean: tuple[float, ...] = ()
        std: tuple[float, ...] = ()

        def __post_init__(self) -> None:
            if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.channels):
                raise ValueError("mean and std must have one number a channel")
            if any(value <= 0 for value in self.std):
                raise ValueError("std must be positive")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs_fit = not config.channels or (config.standardize == "training" and not config.mean)

    @property
    def channels(self) -> int:
        return self.config.channels

    def is_item(self, raw: Sequence[Any]) -> bool:
        """Is this list one series? A list of paths, arrays or texts is several."""
        return all(value is None or isinstance(value, (Real, list, tuple)) for value in raw)

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        values = self._values(raw, policy)
        missing = values.isnan()
        scaled = torch.where(missing, 0.0, (values - self._mean(values)) / self._std(values))
        return torch.cat([scaled, missing.to(scaled.dtype)], dim=1)

    def fit(self, raws: Iterable[Any]) -> None:
        """Learn channels, means and deviations; what cannot be read is left to the loader, which knows its row."""
        policy, seen, first_error = Policy(), _Moments(), None
        for raw in raws:
            for item in self.items_of(raw):
                try:
                    values = self._values(item, policy)
                except InputError as error:
                    first_error = first_error or error
                    continue
                self.config = msgspec.structs.replace(self.config, channels=values.shape[1])
                seen.add(values)
        if first_error and not seen.found:
            raise first_error
        if not seen.found:
            raise InputError("no training series to learn channels and scale from", "give training data")
        if self.config.standardize == "training":
            mean, std = seen.result()
            self.config = msgspec.structs.replace(self.config, mean=mean, std=std)
        self.needs_fit = False

    def state(self) -> dict[str, Any]:
        return encode_config(self.config)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Config, state, "time series processor"))

    def _values(self, raw: Any, policy: Policy) -> Tensor:
        values = decode(raw, policy)
        steps, channels = values.shape
        if self.channels and channels != self.channels:
            other = "its rows must be time steps and its columns channels" if steps == self.channels else None
            raise InputError(f"{describe_raw(raw)} has {channels} channel(s), expected {self.channels}", other)
        if steps > self.config.max_length:
            raise InputError(
                f"{describe_raw(raw)} has {steps} steps, more than the limit of {self.config.max_length}",
                "shorten it, or train with a larger max_length",
            )
        return values

    def _mean(self, values: Tensor) -> Tensor:
        if self.config.standardize == "training":
            return torch.tensor(self.config.mean)
        return values.nanmean(0).nan_to_num() if self.config.standardize == "series" else torch.zeros(self.channels)

    def _std(self, values: Tensor) -> Tensor:
        """One positive number a channel; 1 for a channel of a series that does not vary."""
        if self.config.standardize == "training":
            return torch.tensor(self.config.std)
        if self.config.standardize == "none":
            return torch.ones(self.channels)
        std = (values - self._mean(values)).square().nanmean(0).nan_to_num().sqrt()
        return torch.where(std > _SMALLEST, std, 1.0)


_SMALLEST = 1e-8


class _Moments:
    """Mean and standard deviation of each channel over all steps of all series, missing values left out."""

    def __init__(self) -> None:
        self.found = False

    def add(self, values: Tensor) -> None:
        """Merge the moments of (T, C) `values` (Chan et al. 1979, "Updating formulae", eq. 2.1)."""
        values = values.double()
        count = (~values.isnan()).sum(0)
        mean = values.nanmean(0).nan_to_num()
        squares = (values - mean).square().nansum(0)
        if not self.found:
            self.found, self.count, self.mean, self.squares = True, count, mean, squares
            return
        total = (self.count + count).clamp(min=1)
        change = mean - self.mean
        self.squares += squares + change.square() * self.count * count / total
        self.mean += change * count / total
        self.count += count

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        std = (self.squares / self.count.clamp(min=1)).sqrt()
        return tuple(self.mean.tolist()), tuple(torch.where(std > _SMALLEST, std, 1.0).tolist())
