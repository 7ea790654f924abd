"""Text encoders and the classification heads of transformers keep the contracts of `mmhub.testing`."""

from __future__ import annotations

import pytest

from mmhub.testing import Check, find_checks, parametrize_checks


@parametrize_checks("mmhub-text", marks={"*/compile": pytest.mark.slow})
def test_contract(check: Check) -> None:
    check.run()


def test_a_model_that_bf16_would_break_runs_in_full_precision_under_autocast() -> None:
    (check,) = (one for one in find_checks("mmhub-text") if one.id == "text_encoder:transformers/autocast")
    deberta = {**check.target.spec.example["config"], "model_type": "deberta"}  # type: ignore[union-attr]
    check.with_example({"config": deberta}).run()
