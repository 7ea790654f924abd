"""Audio encoders and their classifier keep the contracts of `mmhub.testing`."""

from __future__ import annotations

import pytest

from mmhub.testing import Check, find_checks, parametrize_checks


@parametrize_checks("mmhub-audio", marks={"*/compile": pytest.mark.slow})
def test_contract(check: Check) -> None:
    check.run()


LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
UNMOVED = [one for one in find_checks("mmhub-audio") if one.id.startswith("audio_encoder:w") and "padding" in one.id]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("check", [pytest.param(one, id=one.id) for one in UNMOVED if "whisper" not in one.id])
def test_with_layer_norm_padding_changes_nothing(check: Check) -> None:
    config = {**check.target.spec.example["config"], **LAYER}  # type: ignore[union-attr]
    check.with_example({"config": config}).run()
