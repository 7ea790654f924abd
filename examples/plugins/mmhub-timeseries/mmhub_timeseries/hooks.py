"""The hook of this plugin: data addresses such as `ts:data/ItalyPowerDemand_TRAIN.ts`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmhub.spec import DataRequest, DataSource, hookimpl


@hookimpl
def mmhub_datasets() -> Iterable[DataSource]:
    """Read the `.ts` files of the UCR and UEA archives."""
    return [DataSource(scheme="ts", open=_open, summary="time series in the .ts format of the UCR and UEA archives")]


def _open(request: DataRequest) -> Iterable[Mapping[str, Any]]:
    """A file is one split: training and test files are named apart."""
    from mmhub_timeseries.ts_files import read_ts

    return read_ts(request.find(request.address))
