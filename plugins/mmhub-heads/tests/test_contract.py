"""Task heads keep the contracts of `mmhub.testing`."""

from __future__ import annotations

import pytest

from mmhub.testing import Check, parametrize_checks


@parametrize_checks("mmhub-heads", marks={"*/compile": pytest.mark.slow})
def test_contract(check: Check) -> None:
    check.run()
