"""What the tests of several modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from torch import nn


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, and leave buffers real, as the model loader does."""
    register = nn.Module.register_parameter

    def to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = to_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@pytest.fixture
def parameters_on_meta() -> Callable[[], AbstractContextManager[None]]:
    return _parameters_on_meta
