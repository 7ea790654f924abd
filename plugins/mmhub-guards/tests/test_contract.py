"""The contract kit, run on this plugin."""

from __future__ import annotations

from mmhub.testing import Check, parametrize_checks


@parametrize_checks("mmhub-guards")
def test_contract(check: Check) -> None:
    check.run()
