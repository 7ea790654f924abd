"""The README lists the options there are, with their defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmhub.interfaces import encode_config
from mmhub_timeseries.encoder import SeriesConfig
from mmhub_timeseries.inception import InceptionTime
from mmhub_timeseries.patches import PatchTransformer

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("config", [InceptionTime.Config(), PatchTransformer.Config()], ids=["inception", "patches"])
def test_every_option_is_listed_with_its_default(config: Any) -> None:
    name = "inception" if isinstance(config, InceptionTime.Config) else "patches"
    shared = _table("Of both encoders:")
    assert shared.keys() == encode_config(SeriesConfig()).keys()
    assert shared | _table(f"`{name}` is ") == {k: str(v) for k, v in encode_config(config).items()}


def _table(start: str) -> dict[str, str]:
    table = TEXT[TEXT.index(f"\n{start}") :].partition("|---|---|---|\n")[2].partition("\n\n")[0]
    return {key: value.strip('`"') for key, value in re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", table, re.MULTILINE)}
