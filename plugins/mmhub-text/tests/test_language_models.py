from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Features, Items
from mmhub.engine.blocks import find_blocks
from mmhub.errors import UsageError
from mmhub.interfaces import LanguageModel, Policy, Stream, decode_config
from mmhub.layers import chunked_token_losses
from mmhub_text.recurrent_lm import LSTMLM, RNNLM
from mmhub_text.transformer_lm import TransformerLM

WORDS = 23
SMALL: dict[type[Any], dict[str, Any]] = {
    RNNLM: {"dim": 16, "embedding_dim": 8, "depth": 2},
    LSTMLM: {"dim": 16, "embedding_dim": 16, "depth": 2},
    TransformerLM: {"dim": 16, "depth": 2, "heads": 4, "kv_heads": 2},
}
MODELS = pytest.mark.parametrize("cls", list(SMALL))
RECURRENT = pytest.mark.parametrize("cls", [RNNLM, LSTMLM])
Rows = Sequence[Sequence[list[int]]]  # the texts of each row, as ids


assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


class Vocabulary:
    vocab_size = WORDS


def build(cls: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(cls.Config(**SMALL[cls] | changes), {}, Vocabulary()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def texts(*lengths: int, seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, WORDS, (length,), generator=draw).tolist() for length in lengths]


def bundle(model: LanguageModel, rows: Rows, **extra: Tensor) -> Bundle:
    width = max(1, *(sum(map(len, row)) for row in rows))
    ids = torch.full((len(rows), width), -1)
    parts = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        flat = [token for text in row for token in text]
        ids[number, : len(flat)] = torch.tensor(flat, dtype=torch.long)
        parts[number, : len(flat)] = torch.tensor([k for k, text in enumerate(row) for _ in text], dtype=torch.long)
    mask = ids >= 0
    several = parts if any(len(row) > 1 for row in rows) else None
    tokens = model.embed(ids.clamp(min=0)) * mask[..., None]
    return {"fused": Features(tokens, mask, ids=ids, parts=several, **extra)}


def losses(model: LanguageModel, rows: Rows, **extra: Tensor) -> Tensor:
    return model.token_losses(bundle(model, rows, **extra))


def goals_of(rows: Rows) -> Tensor:
    return torch.tensor([sum(max(0, len(text) - 1) for text in row) for row in rows])


@MODELS
def test_neither_padding_nor_other_texts_of_a_row_change_what_a_token_costs(cls: Any) -> None:
    model, (a, b, c, d, e) = build(cls), texts(5, 3, 7, 1, 6)
    alone = [losses(model, [[text]])[0] for text in (a, b, c, d, e)]
    found = losses(model, [[a, b], [c], [d, e]])
    assert_close(found[0], torch.cat(alone[:2]))
    assert_close(found[1], F.pad(alone[2], (0, 1)))
    assert_close(found[2], F.pad(torch.cat(alone[3:]), (0, 1)))
    same = losses(model, [[a], [c[:5]]])  # without padding
    assert_close(same, torch.stack([alone[0], alone[2][:5]]))


@MODELS
def test_a_token_costs_what_the_logits_before_it_say(cls: Any) -> None:
    model, (text,) = build(cls), texts(6)
    for place in range(1, len(text)):
        log_p = model(bundle(model, [[text[:place]]])).logits.log_softmax(1)
        assert losses(model, [[text]])[0, place].item() == pytest.approx(-log_p[0, text[place]].item(), abs=1e-5)


@MODELS
def test_a_text_is_not_told_what_comes(cls: Any) -> None:
    model, (text, other) = build(cls), texts(8, 8)
    changed = text[:5] + other[5:]
    assert_close(losses(model, [[text]])[0, :5], losses(model, [[changed]])[0, :5])


@MODELS
@pytest.mark.parametrize("rows", [[texts(5, 3), texts(7), texts(1, 6)], [texts(5), texts(5, seed=2)]])
def test_the_loss_is_the_mean_over_predicted_tokens(cls: Any, rows: Rows) -> None:
    model = build(cls)
    goals = goals_of(rows)
    loss = model(bundle(model, rows), goals).loss
    assert loss.item() == pytest.approx(losses(model, rows).sum().item() / goals.sum().item(), rel=1e-5)


@MODELS
def test_tokens_that_are_no_targets_cost_nothing_and_are_not_counted(cls: Any) -> None:
    model, rows = build(cls), [texts(6), texts(4, seed=3)]
    wanted = torch.zeros(2, 6, dtype=torch.bool)
    wanted[0, 3:] = wanted[1, 2:4] = True
    found, every = losses(model, rows, loss=wanted), losses(model, rows)
    assert_close(found, every * wanted)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    items = Items(torch.zeros(2, 6, dtype=torch.long), mask, torch.arange(2), 2, marks=wanted)
    counted = model.count_targets(items)
    assert counted.tolist() == [3, 2]
    loss = model(bundle(model, rows, loss=wanted), counted).loss
    assert loss.item() == pytest.approx(found.sum().item() / 5, rel=1e-5)


@MODELS
def test_writing_step_by_step_gives_what_reading_all_again_gives(cls: Any) -> None:
    model, rows = build(cls), texts(5, 3, 7, 1, 6)
    logits, state = model.begin(bundle(model, [[text] for text in rows]))
    for number in range(80):  # beyond the room a cache starts with
        if number % 20 == 3:
            order = torch.tensor([4, 0, 0, 2, 1] if number == 3 else [1, 0, 2, 4, 3])
            logits, state, rows = logits[order], model.select(state, order), [list(rows[i]) for i in order]
        chosen = logits.argmax(1)
        logits, state = model.step(chosen, state)
        for text, token in zip(rows, chosen.tolist(), strict=True):
            text.append(token)
        if number % 20 in (0, 3, 19):
            alone = [model(bundle(model, [[text]])).logits for text in rows]
            assert_close(logits, torch.cat(alone))


@MODELS
def test_rows_of_one_length_are_written_like_single_ones(cls: Any) -> None:
    model, rows = build(cls), texts(4, 4)
    chosen = torch.tensor([5, 6])
    logits, state = model.begin(bundle(model, [[text] for text in rows]))
    logits, _ = model.step(chosen, state)
    again = [model(bundle(model, [[[*text, int(token)]]])).logits for text, token in zip(rows, chosen, strict=True)]
    assert_close(logits, torch.cat(again))


@MODELS
def test_a_prompt_of_nothing_begins_anywhere(cls: Any) -> None:
    model, (text,) = build(cls), texts(4)
    logits, state = model.begin(bundle(model, [[[]], [text]]))
    assert_close(logits[1:], model(bundle(model, [[text]])).logits)
    logits, _ = model.step(torch.tensor([7, 8]), state)
    assert_close(logits[:1], model(bundle(model, [[[7]]])).logits)
    logits, state = model.begin(bundle(model, [[[]]]))
    logits, _ = model.step(torch.tensor([7]), state)
    assert_close(logits, model(bundle(model, [[[7]]])).logits)


@MODELS
def test_only_the_last_text_of_a_row_is_written_on(cls: Any) -> None:
    model, (a, b) = build(cls), texts(5, 3)
    logits, _ = model.begin(bundle(model, [[a, b]]))
    assert_close(logits, model.begin(bundle(model, [[b]]))[0])


@MODELS
def test_it_learns_a_text_by_heart(cls: Any) -> None:
    model, rows = build(cls), [texts(9), texts(4, 5)]
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    before = losses(model.eval(), rows).sum().item()
    for _ in range(40):
        optimizer.zero_grad()
        model.train()(bundle(model, rows), goals_of(rows)).loss.backward()
        optimizer.step()
    assert losses(model.eval(), rows).sum().item() < 0.6 * before


@MODELS
def test_every_parameter_learns(cls: Any) -> None:
    for changes in ({}, {"tied": False}):
        model, rows = build(cls, **changes).train(), [texts(9), texts(4, 5)]
        model(bundle(model, rows), goals_of(rows)).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@MODELS
def test_a_batch_without_anything_to_predict_costs_nothing(cls: Any) -> None:
    model, (text,) = build(cls).train(), texts(1)
    loss = model(bundle(model, [[text]]), torch.tensor([0])).loss
    loss.backward()
    assert loss.item() == 0


@RECURRENT
def test_a_row_goes_on_where_the_batch_before_stopped(cls: Any) -> None:
    model, (a, b, c) = build(cls), texts(20, 20, 4)
    whole = losses(model, [[a], [b]])
    first = losses(model, [[a[:8]], [b[:6], c]], continues=torch.tensor([False, False]))
    assert_close(first[0, :8], whole[0, :8])
    second = losses(model, [[a[7:15], [9, 9]], [b[5:]]], continues=torch.tensor([True, False]))
    assert_close(second[0, 1:8], whole[0, 8:15])
    assert_close(second[1, :15], losses(model, [[b[5:]]])[0])  # another text's state is dropped
    assert_close(second[0, 8:10], losses(model, [[[9, 9]]])[0])
    kept = {name: tensor.clone() for name, tensor in model.carried.items()}
    losses(model, [[a]])  # a batch that does not say whether it continues
    assert all(torch.equal(kept[name], model.carried[name]) for name in kept)


@RECURRENT
def test_what_is_kept_goes_on_by_the_row_where_texts_end_within_it(cls: Any) -> None:
    model, (a, b) = build(cls), texts(9, 12)
    whole = losses(model, [[b]])[0]
    losses(model, [[a, b[:5]]], continues=torch.tensor([False]))
    assert_close(losses(model, [[b[4:]]], continues=torch.tensor([True]))[0, 1:], whole[5:])
    losses(model, [[a, b[:1]]], continues=torch.tensor([False]))  # of which nothing is read yet
    assert_close(losses(model, [[b]], continues=torch.tensor([True]))[0], whole)


@RECURRENT
def test_the_kept_state_has_no_gradient_and_is_no_weight(cls: Any) -> None:
    model, (a,) = build(cls).train(), texts(6)
    model(bundle(model, [[a]], continues=torch.tensor([False])), goals_of([[a]])).loss.backward()
    assert model.carried and all(not t.requires_grad and len(t) == 1 for t in model.carried.values())
    assert not set(model.carried) & set(model.state_dict())
    model(bundle(model, [[a]], continues=torch.tensor([True])), goals_of([[a]])).loss.backward()


@RECURRENT
def test_dropout_takes_the_same_features_at_all_positions_of_a_row(cls: Any) -> None:
    model = build(cls, word_dropout=0.0, input_dropout=0.5, embedding_dim=16).train()
    x = model.embed(torch.arange(4, 20)[None])
    lost = (x == 0).all(1)
    assert (
        lost.any() and not lost.all() and torch.equal(x[0][:, ~lost[0]] == 0, torch.zeros(16, int((~lost).sum())) > 0)
    )


@MODELS
def test_a_dropped_word_is_dropped_everywhere(cls: Any) -> None:
    rates = {"word_dropout": 0.5, "dropout": 0.0} | ({} if cls is TransformerLM else {"input_dropout": 0.0})
    model = build(cls, **rates).train()
    x = model.embed(torch.arange(WORDS).repeat(2)[None])[0]
    lost = (x == 0).all(1).unflatten(0, (2, WORDS))
    assert torch.equal(lost[0], lost[1]) and lost.any() and not lost.all()


def test_recurrent_weights_are_dropped_in_training_alone() -> None:
    model, rows = build(LSTMLM, dropout=0.0, layer_dropout=0.0, weight_dropout=0.5, depth=1), [texts(9)]
    model.train()
    stream = build(LSTMLM, depth=1)  # whose embeddings are not dropped
    one, other = (model(bundle(stream, rows), goals_of(rows)).loss for _ in range(2))
    assert one.item() != other.item()
    model.eval()
    one, other = (model(bundle(stream, rows), goals_of(rows)).loss for _ in range(2))
    assert one.item() == other.item()
    assert not (model.layers[0].weight_hh_l0 == 0).any()


def test_a_recorded_transformer_gives_what_it_gives_directly() -> None:
    model, (a, b, c, d) = build(TransformerLM), texts(5, 3, 7, 1)
    for rows in ([[a, b], [c], [d]], [[a], [b], [c]]):
        stream = bundle(model, rows)
        direct = model(stream, goals_of(rows)).loss, model(stream).logits, model.token_losses(stream)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmhub_text.transformer_lm._may_pack", lambda x: False)
            recorded = model(stream, goals_of(rows)).loss, model(stream).logits, model.token_losses(stream)
        assert_close(recorded, direct)


def test_a_transformer_is_exported() -> None:
    model, rows = build(TransformerLM), [texts(5), texts(7)]

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.model({"fused": Features(tokens, mask)}).logits
            return logits

    with torch.no_grad():
        stream = bundle(model, rows)["fused"]
    program = torch.export.export(Logits(), (stream.tokens, stream.mask))
    assert_close(program.module()(stream.tokens, stream.mask), model({"fused": stream}).logits)


def test_the_blocks_of_a_transformer_are_found() -> None:
    assert [name for name, _ in find_blocks(build(TransformerLM))] == ["blocks.0", "blocks.1"]


def test_positions_are_relative() -> None:
    """Keys and queries turn: moving both by as much changes no score."""
    from mmhub_text.rotary import rotate, turns

    query, key = torch.randn(1, 2, 8), torch.randn(1, 2, 8)

    def score(place: int, other: int) -> Tensor:
        q, k = (rotate(x, turns(torch.tensor([p]), 8, 1e4, x.dtype)) for x, p in ((query, place), (key, other)))
        return (q * k).sum(-1)

    assert_close(score(7, 3), score(104, 100), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_training_computes_nothing_for_padding_and_last_tokens() -> None:
    model, (a, b, c) = build(TransformerLM), texts(5, 3, 7)
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    model(bundle(model, [[a, b], [c]]), goals_of([[a, b], [c]]))
    assert seen == [4 + 2 + 6]


@MODELS
def test_settings_out_of_range_are_errors(cls: Any) -> None:
    with pytest.raises(UsageError, match="unknown key 'dmi'; did you mean 'dim'"):
        decode_config(cls.Config, {"dmi": 8}, "model.decoder.config")
    with pytest.raises(UsageError, match=r"model\.decoder\.config\.dropout"):
        decode_config(cls.Config, {"dropout": 1.0}, "model.decoder.config")
    with pytest.raises(UsageError, match="vocab_size 5 is smaller than the tokenizer's 23 ids"):
        build(cls, vocab_size=5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"dim": 18, "heads": 4}, "dim must be an even multiple of heads"),
        ({"heads": 4, "kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"theta": 0.0}, "theta above 0"),
    ],
)
def test_heads_must_fit_the_width(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_config(TransformerLM.Config, table, "model.decoder.config")


@MODELS
def test_its_tokenizer_is_trained_and_comes_back(cls: Any) -> None:
    config = cls.Config(**SMALL[cls])
    processor = cls.make_processor(config, None)
    processor.fit(["to be or not to be", "that is the question"])
    model = cls(config, {"text": Stream(16)}, processor)
    assert model.config.vocab_size == processor.vocab_size == len(model.embedding.weight)
    again = cls.load_processor(config, processor.state(), processor.files())
    assert again.read("to be that is", Policy()).tolist() == processor.read("to be that is", Policy()).tolist()


def test_losses_of_single_tokens_are_those_of_all_logits() -> None:
    hidden, weight, bias = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2] = -100
    whole = F.cross_entropy((hidden @ weight.T + bias).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    for chunk in (1, 30, 10**6):
        assert_close(chunked_token_losses(hidden, weight, targets, bias, chunk=chunk), whole)
    assert chunked_token_losses(hidden[:0], weight, targets[:0], bias).shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@MODELS
def test_a_gpu_gives_what_the_cpu_gives_and_trains(cls: Any) -> None:
    model, rows = build(cls), [texts(5, 3), texts(7)]
    wanted = losses(model, rows)
    model = model.cuda()
    stream = bundle(build(cls), rows)["fused"].to("cuda")
    torch.testing.assert_close(model.token_losses({"fused": stream}).cpu(), wanted, atol=1e-3, rtol=1e-3)
    logits, state = model.begin({"fused": stream})
    logits, _ = model.step(logits.argmax(1), model.select(state, torch.tensor([1, 0], device="cuda")))
    assert logits.isfinite().all()
    stream.continues = torch.tensor([False, True], device="cuda")
    for kind in (torch.float32, torch.bfloat16):  # in half precision by another kernel
        with torch.autocast("cuda", kind, enabled=kind is torch.bfloat16):
            loss = model.train()({"fused": stream}, goals_of(rows).cuda()).loss
        loss.backward(retain_graph=True)
        assert loss.isfinite()


@RECURRENT
def test_a_batch_that_predicts_nothing_resets_the_state_and_reaches_every_parameter(cls: Any) -> None:
    model = build(cls).train()
    a, other = texts(9, 4)
    losses(model, [[a], [a]], continues=torch.tensor([False, False]))
    kept = {name: tensor.clone() for name, tensor in model.carried.items()}
    rows = [[a[-1:]], [other[:1]]]
    given = bundle(model, rows, continues=torch.tensor([True, False]))
    model(given, goals_of(rows)).loss.backward()
    for name, tensor in model.carried.items():
        assert torch.equal(tensor[0], kept[name][0]) and not tensor[1].any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
