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

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"mmhub.testing.{_HOMES[name]}"), name)
    return value
