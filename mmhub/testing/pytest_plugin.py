"""The pytest plugin (entry point `pytest11`): a fixture for tests of one component, and failures of one line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mmhub.model import Model

MakeModel = Callable[..., "Model"]


@pytest.fixture
def mmhub_model() -> Iterator[MakeModel]:
    """Build a tiny model around one installed component: `mmhub_model(kind, name, config=None, seed=0)`.

    `config` defaults to the `example` of the manifest. An encoder's model only embeds; a fusion or decoder gets
    stand-in encoders, whose raw inputs are texts of numbers such as "1 2 3". The model can be saved, and loaded again
    by `mmhub.load`, for as long as the test runs.
    """
    from contextlib import ExitStack

    from mmhub.testing.model import model_around

    with ExitStack() as stack:

        def make(kind: str, name: str, config: dict[str, Any] | None = None, seed: int = 0) -> Model:
            return stack.enter_context(model_around(kind, name, config, seed))

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show a broken contract as its one line, without the kit's own frames; `--full-trace` brings them back."""
    report = yield
    from mmhub.testing.contract import ContractError

    if report.failed and call.excinfo is not None and isinstance(call.excinfo.value, ContractError):
        error = call.excinfo.value
        if not item.config.getoption("fulltrace", False):
            report.longrepr = f"{type(error).__name__}: {error}"
    return report
