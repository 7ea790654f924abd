"""timm backbones and their classifier keep the contracts of `mmhub.testing`."""

from __future__ import annotations

import pytest

from mmhub.testing import Check, parametrize_checks


@parametrize_checks("mmhub-image", marks={"*/compile": pytest.mark.slow})
def test_contract(check: Check) -> None:
    check.run()
