"""Every fusion, with any subset of modalities: finite, unmoved by padding and batching, with stand-ins that learn."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from mmhub.batch import Bundle, Features, pad_sequences
from mmhub.errors import UsageError
from mmhub.fusion import attention, missing
from mmhub.fusion.attention import Attention
from mmhub.fusion.concat import Concat
from mmhub.fusion.gated import Gated
from mmhub.fusion.missing import keep_modalities
from mmhub.fusion.streams import Streams
from mmhub.interfaces import Fusion, Stream, decode_config
from mmhub.weights import meta_parameters

INPUTS = {"text": Stream(4), "image": Stream(6, pooled=5), "audio": Stream(3)}
MIXING: list[Any] = [Concat, Gated, Attention]
SUBSETS = [set(names) for size in range(4) for names in combinations(INPUTS, size)]


def build(cls: Any, inputs: dict[str, Stream] = INPUTS, **config: Any) -> Fusion:
    torch.manual_seed(0)
    small = {"dim": 8} | ({"heads": 2} if cls is Attention else {})
    fusion: Fusion = cls(decode_config(cls.Config, {} if cls is Streams else small | config, "fusion"), inputs)
    return fusion.eval()


def stream(name: str, lengths: list[int], seed: int = 1) -> Features:
    torch.manual_seed(seed)
    tokens, mask = pad_sequences([torch.randn(n, INPUTS[name].dim) for n in [*lengths, 1]])
    tokens, mask = tokens[:-1], mask[:-1]
    pooled = None
    if INPUTS[name].pooled:
        pooled = torch.randn(len(lengths), INPUTS[name].pooled or 0) * mask.any(1, keepdim=True)
    return Features(tokens, mask, pooled=pooled)


def bundle(rows: list[set[str]]) -> Bundle:
    return {
        name: stream(name, [(2 + i % 3) * (name in row) for i, row in enumerate(rows)], seed)
        for seed, name in enumerate(INPUTS)
    }


def one_row(given: Bundle, row: int) -> Bundle:
    """A row as it would come alone: without the padding its batch needs."""
    found = {}
    for name, part in given.items():
        length = max(int(part.lengths[row]), 1)
        pooled = None if part.pooled is None else part.pooled[row : row + 1]
        found[name] = Features(part.tokens[row : row + 1, :length], part.mask[row : row + 1, :length], pooled=pooled)
    return found


def padded(part: Features, extra: int) -> Features:
    pad = torch.nn.functional.pad
    return replace(part, tokens=pad(part.tokens, (0, 0, 0, extra)), mask=pad(part.mask, (0, extra)))


def pooled(fused: Features) -> torch.Tensor:
    return fused.tokens[:, 0] if fused.pooled is None else fused.pooled


@pytest.mark.parametrize("cls", MIXING)
def test_every_subset_of_modalities_gives_a_finite_summary_also_none_at_all(cls: Any) -> None:
    fusion = build(cls)
    found = fusion(bundle(SUBSETS))["fused"]
    assert pooled(found).shape == (len(SUBSETS), fusion.outputs["fused"].summary)
    assert pooled(found).isfinite().all()
    assert found.present.all()
    assert found.tokens.shape[-1] == fusion.outputs["fused"].dim
    summaries = {tuple(row) for row in pooled(found).round(decimals=4).tolist()}
    assert len(summaries) == len(SUBSETS), "different subsets of modalities give different summaries"


@pytest.mark.parametrize("cls", MIXING)
def test_a_row_gives_the_same_alone_as_in_its_batch(cls: Any) -> None:
    fusion, given = build(cls), bundle(SUBSETS)
    together = pooled(fusion(given)["fused"])
    alone = torch.cat([pooled(fusion(one_row(given, row))["fused"]) for row in range(len(SUBSETS))])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("cls", MIXING)
def test_more_padding_changes_nothing(cls: Any) -> None:
    fusion, given = build(cls), bundle(SUBSETS)
    more = {name: padded(part, 5) for name, part in given.items()}
    assert torch.allclose(pooled(fusion(given)["fused"]), pooled(fusion(more)["fused"]), atol=1e-5)


@pytest.mark.parametrize("cls", MIXING)
def test_what_stands_in_the_tokens_of_a_missing_modality_has_no_effect(cls: Any) -> None:
    fusion, given = build(cls), bundle([{"text", "image"}, {"image"}])
    noise = replace(given["audio"], tokens=torch.full_like(given["audio"].tokens, 9.0))
    garbled = given | {"audio": noise, "text": replace(given["text"], tokens=given["text"].tokens.clone())}
    garbled["text"].tokens[1] = -5.0
    assert torch.equal(pooled(fusion(given)["fused"]), pooled(fusion(garbled)["fused"]))


@pytest.mark.parametrize("cls", MIXING)
def test_real_tokens_do_have_an_effect(cls: Any) -> None:
    fusion, given = build(cls), bundle([set(INPUTS)])
    for name, part in given.items():
        other = replace(part, tokens=torch.randn_like(part.tokens))
        other = replace(other, pooled=None if part.pooled is None else torch.randn_like(part.pooled))
        assert not torch.allclose(pooled(fusion(given)["fused"]), pooled(fusion(given | {name: other})["fused"]))


@pytest.mark.parametrize("cls", MIXING)
def test_stand_ins_and_projections_get_gradients(cls: Any) -> None:
    fusion = build(cls, modality_dropout=0.0).train()
    given = bundle([{"text", "image"}, {"text", "audio"}, {"image", "audio"}])
    pooled(fusion(given)["fused"]).pow(3).sum().backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("cls", MIXING)
def test_it_works_for_a_single_modality(cls: Any) -> None:
    fusion = build(cls, {"text": INPUTS["text"]}).train()
    found = pooled(fusion({"text": stream("text", [2, 0])})["fused"])
    assert found.shape == (2, 8)
    assert found.isfinite().all()


@pytest.mark.parametrize("cls", MIXING)
def test_the_inputs_stay_in_the_bundle(cls: Any) -> None:
    given = bundle([set(INPUTS)])
    found = build(cls)(given)
    assert set(found) == {*INPUTS, "fused"}
    assert all(found[name] is given[name] for name in INPUTS)


def test_attention_without_tokens_reads_summaries_alone() -> None:
    fusion, given = build(Attention, tokens=False), bundle([set(INPUTS)])
    found = fusion(given)["fused"]
    assert found.tokens.shape == (1, 4, 8)
    other = replace(given["image"], tokens=torch.randn_like(given["image"].tokens))
    assert torch.equal(pooled(found), pooled(fusion(given | {"image": other})["fused"]))


def test_gated_gives_a_missing_modality_no_weight() -> None:
    fusion, given = build(Gated), bundle([{"text"}])
    vectors, _ = fusion.summaries(given)  # type: ignore[operator]
    assert torch.allclose(pooled(fusion(given)["fused"]), torch.tanh(vectors[:, 0]))


def test_streams_passes_everything_on() -> None:
    fusion, given = build(Streams), bundle([{"text"}, set()])
    assert fusion(given) is given
    assert fusion.outputs == INPUTS


@pytest.mark.parametrize("cls", MIXING)
def test_modality_dropout_works_in_training_and_never_in_evaluation(cls: Any) -> None:
    fusion, given = build(cls, dropout=0.0, modality_dropout=0.5), bundle([set(INPUTS)] * 16)
    fixed = pooled(fusion(given)["fused"])
    assert torch.equal(fixed, pooled(fusion(given)["fused"]))
    fusion.train()
    changed = (pooled(fusion(given)["fused"]) - fixed).abs().amax(1) > 1e-6
    assert 2 <= int(changed.sum()) <= 16
    assert not torch.equal(pooled(fusion(given)["fused"]), pooled(fusion(given)["fused"]))


@pytest.mark.parametrize("cls", MIXING)
def test_a_dropped_modality_is_as_if_it_were_missing(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = build(cls, dropout=0.0)
    want = pooled(fusion(bundle([{"image", "audio"}]))["fused"])
    for module in (attention, missing):
        monkeypatch.setattr(
            module, "keep_modalities", lambda present, rate: present & torch.tensor([False, True, True])
        )
    found = pooled(fusion.train()(bundle([set(INPUTS)]))["fused"])
    assert torch.allclose(found, want, atol=1e-6)


def test_modality_dropout_keeps_at_least_one_and_invents_none() -> None:
    torch.manual_seed(0)
    present = torch.rand(4000, 3) < 0.5
    for rate in (0.3, 0.9, 0.999):
        kept = keep_modalities(present, rate)
        assert not (kept & ~present).any()
        assert torch.equal(kept.any(1), present.any(1))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6, 0.99])
def test_modality_dropout_respects_its_rate_and_is_fair(rate: float) -> None:
    torch.manual_seed(0)
    kept = keep_modalities(torch.ones(20_000, 3, dtype=torch.bool), rate).float().mean(0)
    expected = (1 - rate) + rate**3 / 3  # of rows that would lose all, each modality is spared in a third
    assert torch.allclose(kept, torch.full((3,), expected), atol=0.015)


@pytest.mark.parametrize("cls", [*MIXING, Streams])
def test_it_can_be_built_on_the_meta_device(cls: Any) -> None:
    with meta_parameters():
        fusion = build(cls)
    assert all(p.is_meta for p in fusion.parameters())
    assert {k: v.shape for k, v in fusion.state_dict().items()} == {
        k: v.shape for k, v in build(cls).state_dict().items()
    }


@pytest.mark.parametrize("cls", [*MIXING, Streams])
def test_an_unknown_key_is_an_error(cls: Any) -> None:
    with pytest.raises(UsageError, match=r"model\.fusion: unknown key 'dmi'"):
        decode_config(cls.Config, {"dmi": 8}, "model.fusion")


@pytest.mark.parametrize("cls", MIXING)
@pytest.mark.parametrize(("key", "value"), [("dim", 0), ("dropout", 1.5), ("modality_dropout", -0.1), ("dropout", 1)])
def test_a_setting_out_of_range_is_an_error(cls: Any, key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"model\.fusion\.{key}: expected"):
        decode_config(cls.Config, {key: value}, "model.fusion")


def test_attention_heads_must_divide_its_width() -> None:
    with pytest.raises(UsageError, match="dim 9 is not a multiple of heads 2"):
        decode_config(Attention.Config, {"dim": 9, "heads": 2}, "fusion")
    with pytest.raises(UsageError, match="heads"):
        decode_config(Attention.Config, {"heads": 0}, "fusion")
    with pytest.raises(UsageError, match="at least one encoder"):
        build(Attention, {})


@pytest.mark.parametrize("cls", MIXING)
def test_it_runs_in_mixed_precision(cls: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert pooled(build(cls)(bundle(SUBSETS))["fused"]).isfinite().all()
