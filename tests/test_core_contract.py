"""The fusions and the decoder of the core keep the contracts they ask of plugins."""

from __future__ import annotations

import pytest

from mmhub.fusion import attention
from mmhub.testing import Check, ContractError, find_checks, parametrize_checks


@parametrize_checks("mmhub", marks={"*/compile": pytest.mark.slow})
def test_contract(check: Check) -> None:
    check.run()


def attention_check(name: str) -> Check:
    (check,) = (one for one in find_checks("mmhub") if one.id == f"fusion:attention/{name}")
    return check


@pytest.mark.parametrize("name", ["gradients", "save-load", "missing-leak"])
def test_attention_over_summaries_alone_trains_all_it_has(name: str) -> None:
    attention_check(name).with_example({"dim": 16, "heads": 2, "tokens": False}).run()


def test_attention_puts_padding_behind_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_right_padded", lambda x, mask: (x, mask))
    with pytest.raises(ContractError, match="padding stands before real tokens"):
        attention_check("shapes").run()
