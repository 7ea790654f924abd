"""A tiny model around one installed component, for tests of authors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import torch

from mmhub.model import Model
from mmhub.plugins import get_index
from mmhub.registry import find_component
from mmhub.testing.catalogue import Check
from mmhub.testing.subject import subject_of


@contextmanager
def model_around(kind: str, name: str, config: Mapping[str, Any] | None = None, seed: int = 0) -> Iterator[Model]:
    """Yield a model in evaluation mode; inside the block it can be saved and loaded.

    Raises:
        NotFoundError, PluginError: there is no such component. UsageError: the configuration is wrong.
    """
    component = find_component(kind, name)
    if config is not None:
        component = replace(component, spec=msgspec.structs.replace(component.spec, example=dict(config)))
    plugin = get_index().plugin(component.distribution)
    assert plugin is not None
    subject = subject_of(Check(f"{kind}:{name}/builds", plugin, "", component))
    torch.manual_seed(seed)
    with subject.installed():
        yield subject.model(subject.build())
