"""The contract kit: checks that a plugin keeps the promises of its interfaces. See docs/contract.md.

In a plugin's own tests:

    from mmhub.testing import Check, parametrize_checks

    @parametrize_checks("mmhub-x")
    def test_contract(check: Check) -> None:
        check.run()

On the command line: `mmhub plugins check mmhub-x`. Names load on first use, because pytest imports this package
wherever mmhub is installed; none of them imports torch or pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmhub.lazy import lazy

if TYPE_CHECKING:
    from mmhub.testing.catalogue import Check, checks_of, find_checks
    from mmhub.testing.contract import ContractError, NotApplicableError
    from mmhub.testing.parametrize import parametrize_checks

__all__ = ["Check", "ContractError", "NotApplicableError", "checks_of", "find_checks", "parametrize_checks"]

_HOMES = {
    "Check": "catalogue",
    "ContractError": "contract",
    "NotApplicableError": "contract",
    "checks_of": "catalogue",
    "find_checks": "catalogue",
    "parametrize_checks": "parametrize",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
