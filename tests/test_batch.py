"""Items, Features and the small layers: packing by row, padding, masked means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmhub.batch import Batch, Features, Items, pad_sequences
from mmhub.layers import Attention, TransformerEncoder, attention_mask, masked_mean, sinusoidal_positions, summary


def features(lengths: list[int], width: int | None = None, dim: int = 3, pooled: bool = False) -> Features:
    tokens, mask = pad_sequences([torch.randn(n, dim) for n in lengths])
    extra = (width or 0) - tokens.shape[1]
    if extra > 0:
        tokens, mask = torch.nn.functional.pad(tokens, (0, 0, 0, extra)), torch.nn.functional.pad(mask, (0, extra))
    return Features(tokens, mask, pooled=torch.randn(len(lengths), dim) if pooled else None)


def rows_of(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long)


def test_one_item_a_row_is_passed_on_without_a_copy() -> None:
    given = features([2, 4, 1])
    assert given.to_rows(rows_of(0, 1, 2), 3) is given


def test_rows_without_an_item_are_masked_and_zero() -> None:
    given = features([3, 2], pooled=True)
    found = given.to_rows(rows_of(1, 3), 5)
    assert found.present.tolist() == [False, True, False, True, False]
    assert found.lengths.tolist() == [0, 3, 0, 2, 0]
    assert torch.equal(found.tokens[1], given.tokens[0])
    assert torch.equal(found.tokens[3, :2], given.tokens[1, :2])
    assert not found.tokens[[0, 2, 4]].any()
    assert found.pooled is not None
    assert given.pooled is not None
    assert not found.pooled[[0, 2, 4]].any()
    assert torch.equal(found.pooled[[1, 3]], given.pooled)


def test_as_many_items_as_rows_but_not_one_each_are_still_gathered() -> None:
    given = features([2, 1, 3])
    found = given.to_rows(rows_of(0, 0, 2), 3)
    assert found.lengths.tolist() == [3, 0, 3]


@pytest.mark.parametrize("lengths", [[1, 4, 2, 3], [4, 1, 1, 1], [2, 2, 2, 2]])
def test_the_tokens_of_a_rows_items_follow_each_other_whatever_their_lengths(lengths: list[int]) -> None:
    given = features(lengths, width=6)
    found = given.to_rows(rows_of(0, 0, 2, 2), 3)
    parts = [given.tokens[i, :n] for i, n in enumerate(lengths)]
    for row, items in ((0, (0, 1)), (2, (2, 3))):
        joined = torch.cat([parts[i] for i in items])
        assert torch.equal(found.tokens[row, : len(joined)], joined)
        assert not found.tokens[row, len(joined) :].any()
        assert found.mask[row].tolist() == [True] * len(joined) + [False] * (found.mask.shape[1] - len(joined))
    assert found.mask.shape[1] == max(lengths[0] + lengths[1], lengths[2] + lengths[3])


def test_the_summaries_of_a_rows_items_are_averaged() -> None:
    given = features([1, 2, 1], pooled=True)
    found = given.to_rows(rows_of(0, 1, 1), 2)
    assert given.pooled is not None
    assert found.pooled is not None
    assert torch.allclose(found.pooled, torch.stack([given.pooled[0], given.pooled[1:].mean(0)]))


def test_gradients_flow_through_gathering_to_real_tokens_alone() -> None:
    given = features([2, 1, 3], pooled=True)
    given.tokens.requires_grad_()
    given.pooled = torch.randn(3, 3, requires_grad=True)
    found = given.to_rows(rows_of(0, 0, 3), 4)
    assert found.pooled is not None
    (found.tokens.sum() + found.pooled.sum()).backward()
    assert given.tokens.grad is not None
    assert torch.equal(given.tokens.grad[..., 0].bool(), given.mask)
    assert given.pooled.grad is not None
    assert torch.allclose(given.pooled.grad[:, 0], torch.tensor([0.5, 0.5, 1.0]))


def test_a_batch_without_any_item_gives_one_masked_position_a_row() -> None:
    found = Features(torch.zeros(0, 5, 3), torch.zeros(0, 5, dtype=torch.bool)).to_rows(rows_of(), 2)
    assert found.tokens.shape == (2, 1, 3)
    assert not found.mask.any()


def test_sequences_are_padded_on_the_right_with_zeros() -> None:
    data, mask = pad_sequences([torch.ones(1, 2), torch.ones(3, 2), torch.ones(0, 2)])
    assert data.shape == (3, 3, 2)
    assert mask.tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    assert torch.equal(data[..., 0].bool(), mask)
    assert pad_sequences([torch.tensor([7])])[0].dtype == torch.long


def test_a_batch_and_its_items_move_together() -> None:
    items = Items(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), rows_of(0, 2), 3)
    batch = Batch({"text": items}, 3, targets=torch.zeros(3), raw_targets=["a"], index=[4, 5, 6]).to("meta")
    moved = batch.items["text"]
    assert {t.device.type for t in (moved.data, moved.mask, moved.rows, batch.targets)} == {"meta"}
    assert (len(items), items.lengths.tolist(), moved.batch) == (2, [3, 3], 3)
    assert (batch.raw_targets, batch.index, batch.size) == (["a"], [4, 5, 6], 3)


def test_the_masked_mean_ignores_padding_and_is_zero_without_a_token() -> None:
    tokens = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    found = masked_mean(tokens, mask)
    assert torch.allclose(found[0], tokens[0, :2].mean(0))
    assert not found[1].any()


def test_a_summary_is_the_encoders_own_or_else_the_mean() -> None:
    own, mean = features([2, 1], pooled=True), features([2, 1])
    assert summary(own) is own.pooled
    assert torch.equal(summary(mean), masked_mean(mean.tokens, mean.mask))


def test_padded_queries_attend_to_themselves() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    attend = attention_mask(mask)
    assert attend.shape == (2, 1, 3, 3)
    assert attend.any(-1).all()
    assert attend[0, 0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert torch.equal(attend[1, 0], torch.eye(3, dtype=torch.bool))


def test_more_padding_and_what_stands_in_it_change_nothing_in_a_transformer() -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(8, 2, 2).eval()
    given = features([5, 2, 0], dim=8)
    longer = torch.cat([given.tokens, torch.randn(3, 4, 8)], 1)
    longer = torch.where(torch.nn.functional.pad(given.mask, (0, 4))[..., None], longer, 7.0)
    want = encoder(given.tokens, given.mask)
    found = encoder(longer, torch.nn.functional.pad(given.mask, (0, 4)))
    assert torch.allclose(found[:, :5], want, atol=1e-5)
    assert not found[:, 5:].any()
    assert want.isfinite().all()
    assert not want[~given.mask].any()
    assert torch.allclose(encoder(given.tokens[1:2, :2], given.mask[1:2, :2])[0], want[1, :2], atol=1e-5)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim 8 is not a multiple of heads 3"):
        Attention(8, 3)


def test_positions_differ_and_odd_widths_work() -> None:
    found = sinusoidal_positions(6, 5)
    assert found.shape == (6, 5)
    assert torch.equal(found[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    assert len({tuple(row) for row in found.tolist()}) == 6
