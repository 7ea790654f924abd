"""The sequence-to-sequence decoder on several streams: a picture and a question, any of which a row may lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmhub.batch import Bundle, Features
from mmhub.errors import InputError
from mmhub.interfaces import Stream
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.seq2seq import IGNORE, Seq2Seq

TARGETS = ["red", "a blue circle", "yes", "no it is a large square"]
STREAMS = {"image": Stream(6, pooled=4), "text": Stream(10)}
LENGTHS = {"image": (4, 4, 0, 0), "text": (3, 0, 5, 0)}  # all, either and nothing


def decoder(**config: Any) -> Seq2Seq:
    torch.manual_seed(0)
    tokens = LanguageTextProcessor.from_recipe({"kind": "word"}, default="bpe")
    tokens.fit([TARGETS])
    settings = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0} | config
    part = Seq2Seq(Seq2Seq.Config(**settings), STREAMS, tokens).eval()
    with torch.no_grad():  # a norm's bias, by which a stream is known, begins as zero
        for parameter in part.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return part


def bundle(garbage: float = 0.0, extra: int = 0) -> Bundle:
    """Features of four rows, with `extra` columns of padding and `garbage` in all of it."""
    draw, found = torch.Generator().manual_seed(0), {}
    for name, lengths in LENGTHS.items():
        width = max(lengths)
        tokens = torch.randn(4, width, STREAMS[name].dim, generator=draw)
        tokens = torch.cat((tokens, torch.zeros(4, extra, STREAMS[name].dim)), 1)
        mask = torch.arange(width + extra)[None] < torch.tensor(lengths)[:, None]
        found[name] = Features(torch.where(mask[..., None], tokens, garbage), mask)
    return found


def alone(given: Bundle, row: int) -> Bundle:
    """One row without padding, as `Model` gives it."""
    widths = {name: max(int(part.lengths[row]), 1) for name, part in given.items()}
    return {
        n: Features(p.tokens[row : row + 1, : widths[n]], p.mask[row : row + 1, : widths[n]]) for n, p in given.items()
    }


def written(part: Seq2Seq, given: Bundle, targets: Tensor) -> Tensor:
    """-log P of the targets, written one token at a time: (B, L)."""
    scores, state = part.begin(given)
    found = []
    for ids in targets.clamp(min=0).T:
        found.append(-scores.log_softmax(1).gather(1, ids[:, None])[:, 0])
        scores, state = part.step(ids, state)
    return torch.stack(found, 1) * (targets != IGNORE)


def test_every_stream_changes_what_is_written_where_it_is_present() -> None:
    part, given = decoder(), bundle()
    before = part(given).logits
    for name, lengths in LENGTHS.items():
        other = Features(given[name].tokens.roll(1, 2), given[name].mask)
        changed = (part(given | {name: other}).logits - before).abs().amax(1) > 1e-4
        assert changed.tolist() == [bool(length) for length in lengths]
    assert (before - before[0]).abs().amax(1)[1:].min() > 1e-4


def test_streams_are_told_apart_by_more_than_their_tokens() -> None:
    """Two streams of one width and the same projection: what is in which still matters."""
    tokens = decoder().processor
    torch.manual_seed(0)
    part = Seq2Seq(decoder().config, {"a": Stream(6), "b": Stream(6)}, tokens).eval()
    with torch.no_grad():
        first, second = (part.joined.streams[name] for name in "ab")  # type: ignore[union-attr]
        first[0].weight.copy_(second[0].weight)
        first[1].bias.normal_()
    one, other = (Features(torch.randn(1, 2, 6), torch.ones(1, 2, dtype=torch.bool)) for _ in range(2))
    gap = part({"a": one, "b": other}).logits - part({"a": other, "b": one}).logits
    assert gap.abs().max() > 1e-4


def test_neither_padding_nor_what_is_missing_nor_other_rows_change_a_result() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    losses = part.token_losses(given, targets)
    torch.testing.assert_close(part.token_losses(bundle(garbage=7.0, extra=3), targets), losses)
    for row, text in enumerate(TARGETS):
        found = part.token_losses(alone(given, row), part.encode_targets([text]))
        torch.testing.assert_close(found[0], losses[row, : found.shape[1]], atol=1e-5, rtol=1e-5)


def test_a_token_costs_what_it_does_written_one_by_one() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    torch.testing.assert_close(written(part, given, targets), part.token_losses(given, targets), atol=1e-5, rtol=1e-5)


def test_rows_of_the_state_may_change_places() -> None:
    part, given = decoder(), bundle()
    order = torch.tensor([2, 0, 0, 3])
    _, state = part.begin(given)
    found, _ = part.step(torch.full((4,), 5), part.select(state, order))
    expected, _ = part.step(torch.full((4,), 5), state)
    torch.testing.assert_close(found, expected[order], atol=1e-6, rtol=1e-5)


def test_all_that_is_learned_gets_a_gradient_though_rows_lack_streams() -> None:
    part, given = decoder().train(), bundle()
    part(given, part.encode_targets(TARGETS)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in part.parameters())
    part.zero_grad()
    nothing = given | {"text": given["text"].emptied()}
    part(nothing, part.encode_targets(TARGETS)).loss.backward()
    unused = part.joined.streams["text"].parameters()  # type: ignore[union-attr]
    assert all(p.grad is not None and not p.grad.any() for p in unused)  # other processes may wait for it


def test_a_decoder_of_one_stream_holds_the_tensors_it_always_did() -> None:
    one = Seq2Seq(decoder().config, {"image": Stream(6)}, decoder().processor)
    assert one.joined is None
    assert sorted({name.split(".")[0] for name in one.state_dict()}) == ["blocks", "embed", "norm"]
    assert one.blocks[0].cross.kv.weight.shape == (32, 6)


def test_of_several_texts_the_most_frequent_one_is_trained_on() -> None:
    part = decoder()
    given = [["yes", "no", "no"], ["a blue circle", "red"], ("red",)]
    assert part.encode_targets(given).tolist() == part.encode_targets(["no", "a blue circle", "red"]).tolist()
    assert part.references(given) == given
    for bad, message in (([], "an empty list"), (["red", None], "not a text"), ([["red"]], "not a text")):
        with pytest.raises(InputError, match=message) as caught:
            part.encode_targets(["red", bad])
        assert caught.value.row == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_several_streams_give_the_same_losses() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    losses = part.token_losses(given, targets)
    part.to("cuda")
    moved = {name: features.to("cuda") for name, features in given.items()}
    torch.testing.assert_close(part.token_losses(moved, targets.cuda()).cpu(), losses, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        part.train()(moved, targets.cuda()).loss.backward()
