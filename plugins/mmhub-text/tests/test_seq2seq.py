"""The sequence-to-sequence decoder: what a token may see, what is padded, what is kept, and what is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmhub
from mmhub.batch import Bundle, Features
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Generation, Stream
from mmhub_text import seq2seq
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.seq2seq import IGNORE, Seq2Seq

SOURCES = ["a man rides a bike", "two dogs", "a woman in red reads the long newspaper", "children play"]
TARGETS = ["ein mann fährt rad", "zwei hunde spielen im schnee und sie freuen sich", "eine frau liest", ""]
TOKENIZER = {"kind": "bpe", "vocab_size": 320}
WIDTH = 12


def processor() -> LanguageTextProcessor:
    found = LanguageTextProcessor.from_recipe(TOKENIZER, default="bpe")
    found.fit(SOURCES + TARGETS)
    return found


def decoder(**config: Any) -> Seq2Seq:
    torch.manual_seed(0)
    settings = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0} | config
    return Seq2Seq(Seq2Seq.Config(**settings), {"text": Stream(WIDTH)}, processor()).eval()


def bundle(lengths: tuple[int, ...] = (5, 2, 8, 3), width: int = WIDTH, seed: int = 0) -> Bundle:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randn(*mask.shape, width, generator=draw) * mask[..., None]
    return {"text": Features(tokens, mask)}


def part_names(part: Seq2Seq) -> list[str]:
    return list(part.state_dict())


def rows(given: Bundle, index: list[int]) -> Bundle:
    """These rows without padding that none of them needs."""
    width = max(int(given["text"].lengths[index].max()), 1)
    return {"text": Features(given["text"].tokens[index, :width], given["text"].mask[index, :width])}


def logits_step_by_step(part: Seq2Seq, given: Bundle, targets: Tensor) -> Tensor:
    """The scores of every token of the targets, written one by one: (B, L, V)."""
    scores, state = part.begin(given)
    found = [scores]
    for ids in targets.clamp(min=0).T[:-1]:
        scores, state = part.step(ids, state)
        found.append(scores)
    return torch.stack(found, 1)


# -- targets and losses ---------------------------------------------------------------------------------------------


def test_targets_are_the_ids_of_the_text_and_the_end_padded() -> None:
    part = decoder()
    encoded = part.encode_targets(TARGETS)
    assert encoded[3].tolist() == [part.end] + [IGNORE] * (encoded.shape[1] - 1)
    for row, text in zip(encoded, TARGETS, strict=True):
        ids = row[row != IGNORE].tolist()
        assert ids[-1] == part.processor.end_id
        assert part.start not in ids
        assert part.processor.decode(ids[:-1]) == text
    assert part.weigh(encoded).tolist() == [int((row != IGNORE).sum()) for row in encoded]


@pytest.mark.parametrize("bad", [None, 3, [], ["a", 3], "half a \ud83d character"])
def test_a_target_that_is_no_text_is_refused_with_its_row(bad: Any) -> None:
    with pytest.raises(InputError) as caught:
        decoder().encode_targets(["gut", bad])
    assert caught.value.row == 1


def test_the_loss_is_plain_in_evaluation_and_smoothed_in_training() -> None:
    part, given = decoder(label_smoothing=0.2), bundle()
    targets = part.encode_targets(TARGETS)
    logits = logits_step_by_step(part, given, targets).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
    smooth = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, label_smoothing=0.2)
    assert abs(plain - smooth) > 0.01
    torch.testing.assert_close(part(given, targets).loss, plain)
    torch.testing.assert_close(part.train()(given, targets).loss, smooth)


def test_the_losses_of_tokens_are_those_of_writing_them_one_by_one() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    losses = part.token_losses(given, targets)
    log_p = logits_step_by_step(part, given, targets).log_softmax(-1)
    expected = -log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != IGNORE)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part(given, targets).loss, losses.sum() / part.weigh(targets).sum())


def test_the_losses_of_many_tokens_are_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    whole = part.token_losses(given, targets)
    monkeypatch.setattr(seq2seq, "_CHUNK", 3 * part.config.vocab_size)
    torch.testing.assert_close(part.token_losses(given, targets), whole)


def test_no_token_sees_a_later_one() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    before = part.token_losses(given, targets)
    targets[1, 4] = 7
    after = part.token_losses(given, targets)
    assert torch.equal(before[1, :4], after[1, :4])
    assert (before[1, 4:] != after[1, 4:]).all()


def test_neither_padding_nor_other_rows_change_a_result() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    losses, first = part.token_losses(given, targets), part(given).logits
    for row in range(4):
        alone = part.encode_targets([TARGETS[row]])
        found = part.token_losses(rows(given, [row]), alone)
        torch.testing.assert_close(found[0], losses[row, : alone.shape[1]], atol=1e-5, rtol=1e-5)
        assert not losses[row, alone.shape[1] :].any()
        torch.testing.assert_close(part(rows(given, [row])).logits[0], first[row], atol=1e-5, rtol=1e-5)


def test_a_graph_that_is_recorded_computes_padding_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    part, given = decoder().train(), bundle()
    targets = part.encode_targets(TARGETS)

    def loss_and_gradients() -> list[Tensor]:
        part.zero_grad()
        loss = part(given, targets).loss
        loss.backward()
        return [loss.detach(), part.token_losses(given, targets), *(p.grad.clone() for p in part.parameters())]  # type: ignore[union-attr]

    flat = loss_and_gradients()
    monkeypatch.setattr(seq2seq, "_recording", lambda: True)
    torch.testing.assert_close(loss_and_gradients(), flat, atol=1e-5, rtol=1e-4)


def test_what_was_not_given_is_read_as_nothing_and_learns() -> None:
    part, given = decoder().train(), bundle((5, 0, 8, 3))
    targets = part.encode_targets(TARGETS)
    mask = part._read(given)[1]  # not all kernels give a number where all is masked
    assert mask.sum((1, 2, 3)).tolist() == [5, 1, 8, 3]
    part(given, targets).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    alone = part.eval().token_losses(bundle((0,)) | rows(given, [1]), targets[1:2])
    torch.testing.assert_close(alone[0], part.token_losses(given, targets)[1], atol=1e-5, rtol=1e-5)


def test_it_reads_what_is_fused_or_the_only_stream_of_any_width() -> None:
    config, tokens = decoder().config, processor()
    both = Seq2Seq(config, {"text": Stream(3), "fused": Stream(WIDTH)}, tokens).eval()
    given = bundle()["text"]
    torch.manual_seed(0)
    fused = both({"text": bundle(width=3)["text"], "fused": given}).logits
    torch.testing.assert_close(both({"text": bundle(width=3, seed=1)["text"], "fused": given}).logits, fused)
    assert Seq2Seq(config, {"image": Stream(5)}, tokens)({"image": bundle(width=5)["text"]}).logits.shape[0] == 4
    assert part_names(both) == part_names(decoder())


def test_a_tokenizer_without_an_end_is_refused_and_one_without_a_beginning_starts_with_the_end() -> None:
    def framed(**ids: Any) -> LanguageTextProcessor:
        return LanguageTextProcessor.of_tokenizer(processor().tokenizer, **ids)  # type: ignore[arg-type]

    config, inputs = decoder().config, {"text": Stream(WIDTH)}
    with pytest.raises(UsageError, match="no end token"):
        Seq2Seq(config, inputs, framed(begin_id=2, end_id=None, ends=False))
    part = Seq2Seq(config, inputs, framed(begin_id=None, end_id=3, ends=False))
    assert part.start == part.end == 3
    assert part.encode_targets(["ein"]).tolist() == decoder().encode_targets(["ein"]).tolist()


# -- writing --------------------------------------------------------------------------------------------------------


def test_rows_of_the_state_may_be_left_out_repeated_and_change_places() -> None:
    part, given = decoder(), bundle()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    _, state = part.begin(given)
    _, state = part.step(ids[0], state)
    for index in ([2, 0, 0], [0, 0, 1, 1], [3]):  # of the bundle's rows, then within those of one text, then the end
        chosen = torch.tensor(index)
        scores, state_of_some = part.step(ids[1][chosen], part.select(state, chosen))
        _, again = part.begin(rows(given, index))
        _, again = part.step(ids[0][chosen], again)
        expected, _ = part.step(ids[1][chosen], again)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert state_of_some.sources.tolist() == [3]


def test_beams_that_change_places_within_a_text_do_not_copy_what_was_read() -> None:
    part = decoder()
    _, state = part.begin(bundle())
    state = part.select(state, torch.arange(4).repeat_interleave(2))
    _, state = part.step(torch.arange(8) + 10, state)
    order = torch.tensor([1, 0, 3, 3, 4, 5, 7, 6])
    after = part.select(state, order)
    assert after.read is state.read
    assert torch.equal(after.written[0][0], state.written[0][0][order])  # type: ignore[index]


def test_it_learns_to_write_what_it_was_shown() -> None:
    part, given = decoder(dim=32, depth=1, label_smoothing=0.1).train(), bundle()
    targets = part.encode_targets(TARGETS)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        part(given, targets).loss.backward()
        optimizer.step()
    part.eval()
    scores, state = part.begin(given)
    written: list[Tensor] = []
    for _ in range(targets.shape[1]):
        written.append(scores.argmax(1))
        scores, state = part.step(written[-1], state)
    for row, text in zip(torch.stack(written, 1).tolist(), TARGETS, strict=True):
        assert part.processor.decode(row[: row.index(part.end)]) == text


# -- what is shared -------------------------------------------------------------------------------------------------

ENCODER = {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2}}


def translator(tie: str, encoder: dict[str, Any] = ENCODER, tokenizer: dict[str, Any] | None = None) -> mmhub.Model:
    config = {"dim": 16, "depth": 1, "heads": 2, "tie": tie}
    return mmhub.compose(
        "translation",
        encoders={"text": encoder},
        decoder={"use": "seq2seq", "config": config},
        tokenizer=tokenizer or TOKENIZER,
        values={"text": SOURCES, "target": TARGETS},
    )


def test_one_matrix_reads_the_source_and_the_target_and_scores_tokens_also_after_loading(tmp_path: Path) -> None:
    model: Any = translator("encoder")
    shared = model.encoders["text"].embed.weight
    assert model.decoder.embed.weight is shared
    assert model.decoder.output is None
    model.eval()
    samples = [{"text": text} for text in SOURCES]
    loaded: Any = mmhub.load(str(model.save(tmp_path / "model")))
    assert loaded.decoder.embed.weight is loaded.encoders["text"].embed.weight
    assert loaded.predict(samples) == model.predict(samples)


def test_of_the_matrices_none_one_or_two_are_shared_as_the_recipe_says() -> None:
    counts = [sum(p.numel() for p in translator(tie).parameters()) for tie in ("none", "output", "encoder")]
    matrix = translator("output").decoder.embed.weight.numel()  # type: ignore[union-attr]
    assert counts == [counts[2] + 2 * matrix, counts[2] + matrix, counts[2]]


def test_embeddings_of_another_width_kind_or_vocabulary_are_not_shared() -> None:
    with pytest.raises(UsageError, match=r"the encoder's embeddings are \d+ x 32, the decoder's \d+ x 16"):
        translator("encoder", {"use": "transformer", "config": {"dim": 32, "depth": 1, "heads": 2}})
    described = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UsageError, match="trained from scratch"):
        translator("encoder", {"use": "transformers", "config": {"config": described | {"intermediate_size": 16}}})
    model: Any = translator("output")
    other = LanguageTextProcessor.from_recipe(TOKENIZER, default="bpe")
    other.fit([*SOURCES, "ganz andere worte " * 20])
    decoder = Seq2Seq(msgspec.structs.replace(model.decoder.config, tie="encoder"), {"text": Stream(16)}, other)
    with pytest.raises(UsageError, match=r"token \d+ is '.*' to the encoder and '.*' to the decoder"):
        decoder.tie(dict(model.encoders.items()))


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"depth": 0}, {"dim": 10, "heads": 4}, {"dropout": 1.0}, {"label_smoothing": -0.1}):
        with pytest.raises(ValueError, match=r"at least|multiple"):
            Seq2Seq.Config(**wrong)
    assert decoder(generation=Generation(beams=5)).generation.beams == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_gives_the_same_losses_and_tokens() -> None:
    part, given = decoder(), bundle()
    targets = part.encode_targets(TARGETS)
    losses, scores = part.token_losses(given, targets), logits_step_by_step(part, given, targets)
    moved = {"text": given["text"].to("cuda")}
    part.to("cuda")
    torch.testing.assert_close(part.token_losses(moved, targets.cuda()).cpu(), losses, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits_step_by_step(part, moved, targets.cuda()).cpu(), scores, atol=5e-3, rtol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        half = part.train()(moved, targets.cuda())
        half.loss.backward()
    assert abs(float(half.loss) - float(losses.sum() / (targets != IGNORE).sum())) < 0.5


def test_a_source_text_is_never_cut_in_silence(tmp_path: Path) -> None:
    short = {**ENCODER, "config": {**ENCODER["config"], "max_length": 8}}
    model: Any = translator("output", short)
    for one in (model, mmhub.load(str(model.save(tmp_path / "model")))):
        with pytest.raises(InputError, match=r"the text has \d+ tokens, the encoder takes at most 8"):
            one.predict([{"text": "two dogs"}, {"text": "a woman reads the newspaper " * 9}])


def test_tokenizers_that_differ_by_unicode_composition_say_so() -> None:
    model: Any = translator("output")
    decoder = Seq2Seq(msgspec.structs.replace(model.decoder.config, tie="encoder"), {"text": Stream(16)}, processor())
    other = LanguageTextProcessor.from_recipe(TOKENIZER, default="bpe")
    other.fit([*SOURCES, "ganz andere worte " * 20])
    decoder.processor = other
    with pytest.raises(UsageError, match=r"only one of them composes Unicode characters \(NFC\); compose those of"):
        decoder.tie(dict(model.encoders.items()))
