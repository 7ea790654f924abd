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


def test_media_without_a_text_to_stand_in_are_refused() -> None:
    with pytest.raises(UsageError, match="joins media to the text of a language model, and there is none"):
        Interleave(Interleave.Config(), {"image": Stream(4)})
