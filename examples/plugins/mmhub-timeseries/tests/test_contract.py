"""The contract that every mmhub plugin keeps, checked by mmhub's own kit."""

from __future__ import annotations

from mmhub.testing import Check, parametrize_checks


@parametrize_checks("mmhub-timeseries")
def test_contract(check: Check) -> None:
    check.run()
