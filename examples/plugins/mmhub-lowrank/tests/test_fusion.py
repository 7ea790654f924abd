"""The product of all modalities, and what happens where one is missing."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmhub.batch import Bundle, Features
from mmhub.errors import UsageError
from mmhub.interfaces import Stream, encode_config
from mmhub_lowrank.fusion import LowRank

STREAMS = {"image": Stream(5), "audio": Stream(3, pooled=4), "text": Stream(2)}


def fusion(**settings: float) -> LowRank:
    torch.manual_seed(0)
    config = LowRank.Config(**({"dim": 6, "rank": 3} | settings))  # type: ignore[arg-type]
    return LowRank(config, STREAMS).eval()


def bundle(present: Tensor) -> Bundle:
    """Features of two tokens in the rows (B, 3) where a modality is present, others fully masked."""
    rng = torch.Generator().manual_seed(1)
    parts: Bundle = {}
    for i, (name, stream) in enumerate(STREAMS.items()):
        mask = present[:, i, None].expand(-1, 2)
        tokens = torch.randn(len(present), 2, stream.dim, generator=rng) * mask[..., None]
        pooled = torch.randn(len(present), stream.pooled, generator=rng) if stream.pooled else None
        parts[name] = Features(tokens, mask, pooled=pooled)
    return parts


EVERY = torch.tensor(list(product([True, False], repeat=3)))


def test_it_equals_the_full_outer_product_with_the_tensor_of_its_factors() -> None:
    """Equation 2 of the paper, with the weight tensor of equation 4 put together."""
    part, given = fusion(), bundle(torch.ones(4, 3, dtype=torch.bool))
    vectors = []
    for name in STREAMS:
        features = given[name]
        pooled = features.pooled if features.pooled is not None else features.tokens.mean(1)
        vectors.append(torch.cat([part.norms[name](pooled), torch.ones(4, 1)], dim=1))
    outer = torch.einsum("bi,bj,bk->bijk", *vectors)
    tensor = torch.einsum("rid,rjd,rkd,r->ijkd", *(part.factors[name] for name in STREAMS), part.weights)
    expected = torch.einsum("bijk,ijkd->bd", outer, tensor) + part.bias
    fused = part(given)["fused"]
    assert torch.allclose(fused.tokens[:, 0], expected, atol=1e-5)
    assert fused.tokens.shape == (4, 1, 6) and fused.mask.all() and fused.pooled is None
    assert part.outputs == {"fused": Stream(6)}


def test_rows_of_one_batch_do_not_depend_on_each_other_and_any_subset_is_finite() -> None:
    part, given = fusion(), bundle(EVERY)
    fused = part(given)["fused"].tokens
    assert fused.isfinite().all()
    for row in range(len(EVERY)):
        alone = {
            name: Features(f.tokens[row, None], f.mask[row, None], pooled=None if f.pooled is None else f.pooled[[row]])
            for name, f in given.items()
        }
        assert torch.allclose(part(alone)["fused"].tokens[0], fused[row], atol=1e-6)


def test_the_stand_in_speaks_for_a_missing_modality_and_what_lies_there_does_not() -> None:
    part, given = fusion(), bundle(torch.tensor([[True, False, True]]))
    before = part(given)["fused"].tokens
    assert given["audio"].pooled is not None
    given["audio"].pooled += 100.0  # a missing modality's summary is not read
    assert torch.equal(part(given)["fused"].tokens, before)
    with torch.no_grad():
        part.stand_ins["audio"] += 1.0
    assert not torch.allclose(part(given)["fused"].tokens, before)


def test_every_parameter_learns_from_a_batch_with_missing_modalities() -> None:
    part = fusion()
    part(bundle(EVERY))["fused"].tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_evaluation_is_not_random_and_training_is() -> None:
    part, given = fusion(dropout=0.0, modality_dropout=0.5), bundle(torch.ones(8, 3, dtype=torch.bool))
    assert torch.equal(part(given)["fused"].tokens, part(given)["fused"].tokens)
    part.train()
    assert not torch.equal(part(given)["fused"].tokens, part(given)["fused"].tokens)


def test_a_model_without_encoders_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one encoder"):
        LowRank(LowRank.Config(), {})


def test_the_readme_lists_every_option_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    assert listed == {key: str(value) for key, value in encode_config(LowRank.Config()).items()}
