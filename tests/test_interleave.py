from __future__ import annotations

import pytest
import torch

from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.fusion.interleave import Interleave
from mmhub.interfaces import Stream


def test_text_becomes_the_fused_stream_unchanged() -> None:
    fusion = Interleave(Interleave.Config(), {"text": Stream(4)})
    text = Features(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), ids=torch.ones(2, 3, dtype=torch.long))
    assert fusion({"text": text}) == {"fused": text}
    assert fusion.outputs == {"fused": Stream(4)}


@pytest.mark.parametrize(("inputs", "given"), [({"text": Stream(4), "image": Stream(4)}, "image"), ({}, "nothing")])
def test_other_modalities_are_refused_by_name(inputs: dict[str, Stream], given: str) -> None:
    with pytest.raises(UsageError, match=f"reads text alone, and gets {given}"):
        Interleave(Interleave.Config(), inputs)
