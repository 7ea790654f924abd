"""The plugin keeps the contracts of `mmhub.testing`."""

from __future__ import annotations

from mmhub.testing import Check, parametrize_checks


@parametrize_checks("mmhub-ui")
def test_contract(check: Check) -> None:
    check.run()
