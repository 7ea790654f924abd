"""Sequence-to-sequence models of transformers: their decoder on our encoder computes what they compute themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from mmhub.batch import Bundle
from mmhub.errors import InputError, UsageError
from mmhub.generate import write
from mmhub.interfaces import Policy, Stream, decode_config, encode_config
from mmhub_text.hooks import mmhub_load_foreign, mmhub_write_foreign
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.pretrained import Transformers
from mmhub_text.transformers_seq2seq import IGNORE, TransformersSeq2Seq
from mmhub_text.writers import TRANSLATORS, read_generation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "good"]
SOURCES = ["the cat sat on a mat", "good", "it was a good cat and it sat"]
TARGETS = ["a mat", "it was good and it was good", "cat"]
BASE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "d_model": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
}
T5: dict[str, Any] = {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
MORE: dict[str, dict[str, Any]] = {
    "bart": {"forced_bos_token_id": 3, "decoder_start_token_id": 1},
    "m2m_100": {"forced_bos_token_id": 5, "decoder_start_token_id": 1},
    "mbart": {"forced_bos_token_id": 4, "decoder_start_token_id": 1},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}

QUICK = ("bart", "marian", "t5")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, model_input_names=["input_ids", "attention_mask"], **names
    )


def table(kind: str) -> dict[str, Any]:
    return BASE | (T5 if kind in ("t5", "mt5", "umt5") else BART) | MORE.get(kind, {})


def save_model(folder: Path, kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **table(kind) | more)).eval()
    model.generation_config.forced_bos_token_id = MORE.get(kind, {}).get("forced_bos_token_id")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def read(folder: Path, **config: Any) -> tuple[Transformers, TransformersSeq2Seq]:
    encoder = Transformers.from_library(Transformers.Config(), folder)
    decoder = TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(**config), folder, {"text": encoder.stream})
    decoder.tie({"text": encoder})
    return encoder.eval(), decoder.eval()


def encode(encoder: Transformers, sources: list[str] = SOURCES) -> Bundle:
    items = encoder.processor(sources, Policy())
    return {"text": encoder(items.data, items.mask)}


def greedy(decoder: TransformersSeq2Seq, bundle: Bundle, steps: int) -> Tensor:
    logits, state = decoder.begin(bundle)
    written = [logits.argmax(1)]
    for _ in range(steps - 1):
        logits, state = decoder.step(written[-1], state)
        written.append(logits.argmax(1))
    return torch.stack(written, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(TRANSLATORS)],
)
def test_loss_and_greedy_text_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    encoder, decoder = read(tmp_path)
    bundle, labels = encode(encoder), decoder.encode_targets(TARGETS)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(SOURCES, padding=True, return_tensors="pt")
    given = torch.cat((torch.full((len(labels), 1), decoder.start), labels[:, :-1]), 1)
    if decoder.config.forced_begin is not None:
        assert bool((labels[:, 0] == IGNORE).all())  # it is read, and not learned
        given[:, 1] = decoder.config.forced_begin
    given = given.masked_fill(given == IGNORE, 0)
    expected = model(**inputs, labels=labels, decoder_input_ids=given)
    torch.testing.assert_close(decoder(bundle, labels).loss, expected.loss, atol=1e-5, rtol=0)
    losses = decoder.token_losses(bundle, labels)
    torch.testing.assert_close(losses.sum() / decoder.weigh(labels).sum(), expected.loss, atol=1e-5, rtol=0)
    assert expected.loss > 0.5
    plain = {"num_beams": 1, "do_sample": False, "forced_eos_token_id": None, "encoder_no_repeat_ngram_size": 0}
    theirs = model.generate(**inputs, max_new_tokens=6, **plain)[:, 1:]
    ours = greedy(decoder, bundle, theirs.shape[1])
    ended = ((theirs == 1).cumsum(1) - (theirs == 1).long()) > 0  # what follows the end is padding
    assert torch.equal(ours.masked_fill(ended, 0), theirs.masked_fill(ended, 0))
    single = torch.cat([greedy(decoder, encode(encoder, [source]), theirs.shape[1]) for source in SOURCES])
    assert torch.equal(single, ours)
    assert decoder.config.forced_begin == MORE.get(kind, {}).get("forced_bos_token_id")


def test_the_state_of_chosen_rows_goes_on_as_the_rows_do_and_none_is_changed(tmp_path: Path) -> None:
    save_model(tmp_path, "t5")
    encoder, decoder = read(tmp_path)
    with torch.no_grad():
        bundle = encode(encoder)
        _, state = decoder.begin(bundle)
        rows = torch.tensor([2, 0, 2])
        chosen = decoder.select(state, rows)
        expected, _ = decoder.step(torch.tensor([5, 6, 7]), state)
        for _ in range(2):
            found, _ = decoder.step(torch.tensor([5, 6, 7])[rows], chosen)
            torch.testing.assert_close(found, expected[rows])
        assert torch.equal(decoder.step(torch.tensor([5, 6, 7]), state)[0], expected)


@pytest.mark.parametrize("kind", ["t5", "bart", "marian", "mt5"])
def test_embeddings_are_shared_with_the_encoder_as_the_library_shares_them(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    encoder, decoder = read(tmp_path)
    ours, theirs = decoder.model.get_decoder().get_input_embeddings(), encoder.model.get_input_embeddings()
    assert ours.weight is theirs.weight
    names = [name for name, _ in decoder.named_parameters() if "encoder." in name.replace("decoder.", "")]
    assert names == []
    assert not any(tensor.is_meta for part in (encoder, decoder) for tensor in part.state_dict().values())


def test_a_recipe_makes_one_with_fresh_weights_that_learns(tmp_path: Path) -> None:
    config = TransformersSeq2Seq.Config(config={"model_type": "t5", "d_model": 16, **T5}, label_smoothing=0.1)
    processor = TransformersSeq2Seq.make_processor(config, {"kind": "byte"})
    assert isinstance(processor, LanguageTextProcessor)
    torch.manual_seed(0)
    decoder = TransformersSeq2Seq(config, {"text": Stream(16)}, processor)
    assert (decoder.start, decoder.config.start) == (processor.begin_id, processor.begin_id)
    labels = decoder.encode_targets(["a b", ""])
    assert labels[1].tolist() == [processor.end_id, -100, -100, -100]
    from mmhub.batch import Features

    bundle = {"text": Features(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))}
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = decoder(bundle, labels).loss
        assert loss is not None
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []
    smoothed = decoder.train()(bundle, labels).loss
    plain = decoder.eval()(bundle, labels).loss
    assert smoothed is not None and plain is not None
    assert abs(float((smoothed - plain).detach())) > 0.05  # dropout of 0.1 alone moves it less
    again = decode_config(type(config), json.loads(json.dumps(encode_config(decoder.config))), "x")
    rebuilt = TransformersSeq2Seq(again, {"text": Stream(16)}, processor)
    rebuilt.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(rebuilt.eval()(bundle, labels).loss, plain)


def test_of_several_texts_the_most_frequent_one_is_trained_on_and_all_are_references(tmp_path: Path) -> None:
    save_model(tmp_path, "bart")
    decoder = read(tmp_path)[1]
    several = [["a cat", "the dog", "the dog"], "a cat", ("a cat", "the dog")]
    assert torch.equal(decoder.encode_targets(several), decoder.encode_targets(["the dog", "a cat", "a cat"]))
    assert decoder.references(several) == several
    for bad, message in (([], "an empty list"), (["a", None], "not a text")):
        with pytest.raises(InputError, match=message):
            decoder.encode_targets(["a", bad])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, "bart", vocab_size=10)
    with pytest.raises(UsageError, match=r"the tokenizer has 14 ids, and the model in .* knows 10"):
        TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(), tmp_path, {"text": Stream(16)})
    save_model(tmp_path, "bart")
    with pytest.raises(UsageError, match="reads the 16 features of its own encoder"):
        TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(), tmp_path, {"text": Stream(8)})
    _, decoder = read(tmp_path)
    with pytest.raises(InputError, match=r"the target is .*, not a text") as caught:
        decoder.encode_targets(["a", 3])
    assert caught.value.row == 1
    with pytest.raises(InputError, match="the target has 62 tokens, and the decoder has positions for 40"):
        decoder.encode_targets(["cat " * 60])
    with pytest.raises(UsageError, match="has no model_type 'bert'"):
        TransformersSeq2Seq(
            TransformersSeq2Seq.Config(config={"model_type": "bert"}), {"text": Stream(8)}, decoder.processor
        )


def test_what_is_suppressed_is_never_written(tmp_path: Path) -> None:
    model = save_model(tmp_path, "marian")
    model.generation_config.bad_words_ids = [[0], [4, 5]]
    model.generation_config.num_beams = 4
    model.generation_config.max_length = 12
    model.save_pretrained(tmp_path)
    encoder, decoder = read(tmp_path)
    assert decoder.config.suppress == (0,)
    assert (decoder.generation.beams, decoder.generation.max_new_tokens) == (4, 11)
    scores = torch.zeros(2, len(WORDS))
    for length in (0, 3):
        limited = decoder.limit(scores, torch.ones(2, length, dtype=torch.long))
        assert limited.isneginf().nonzero().tolist() == [[0, 0], [1, 0]]
    with torch.no_grad():
        decoder.model.final_logits_bias[0, 0] = 1e3  # far above all others
        texts = write(decoder, encode(encoder))
    assert all(0 not in found.ids for (found,) in texts)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_folder_of_transformers_is_read_and_written_back_equal(kind: str, tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "theirs", kind)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (reader,) = mmhub_load_foreign(tmp_path / "theirs", config)
    assert reader.refusal is None
    parts = reader.read(tmp_path / "theirs")
    assert (parts.task, parts.decoder_id) == ("translation", "mmhub-text/transformers-seq2seq")
    encoder: Any = parts.encoder
    (writer,) = mmhub_write_foreign(encoder, parts.decoder, "transformers")
    (tmp_path / "ours").mkdir()
    writer.write(tmp_path / "ours")
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "ours")(SOURCES, padding=True, return_tensors="pt")
    decoder: Any = parts.decoder
    labels = decoder.encode_targets(TARGETS)
    with torch.no_grad():
        torch.testing.assert_close(back(**inputs, labels=labels).logits, theirs(**inputs, labels=labels).logits)
        plain = {"max_new_tokens": 5, "forced_eos_token_id": None}
        assert torch.equal(back.generate(**inputs, **plain), theirs.generate(**inputs, **plain))
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(len(WORDS), 16))
    (tmp_path / "two").mkdir()
    with pytest.raises(UsageError, match="and this model has two"):
        writer.write(tmp_path / "two")


@pytest.mark.parametrize("kind", ["marian", "blenderbot-small"])
def test_fresh_weights_start_with_a_token_of_the_tokenizer(kind: str) -> None:
    config = TransformersSeq2Seq.Config(config={"model_type": kind, "d_model": 16, **BART})
    processor = TransformersSeq2Seq.make_processor(config, {"kind": "byte"})
    decoder = TransformersSeq2Seq(config, {"text": Stream(16)}, processor)
    assert decoder.start == processor.begin_id
    wrongs: list[dict[str, Any]] = [{"start": 5000}, {"forced_begin": 5000}]
    for wrong in wrongs:
        config = TransformersSeq2Seq.Config(config={"model_type": kind, "d_model": 16, **BART}, **wrong)
        with pytest.raises(UsageError, match=r"(start|forced_begin) is token 5000, and the model knows 260 tokens"):
            TransformersSeq2Seq(config, {"text": Stream(16)}, processor)


def test_how_a_folder_writes_is_kept_or_said_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    table = {"max_length": 20, "min_length": 5, "no_repeat_ngram_size": 3, "forced_eos_token_id": 1, "typical_p": 1.0}
    found = read_generation(table, whole_length=True)
    assert (found.max_new_tokens, found.min_new_tokens) == (19, 4)
    line = capsys.readouterr().err
    assert line == (
        "warning: the model's generation settings no_repeat_ngram_size, forced_eos_token_id are not followed here\n"
    )
    assert read_generation({"min_new_tokens": 70}).min_new_tokens == 70
    assert read_generation({"min_new_tokens": 9, "max_new_tokens": 7}).min_new_tokens == 7
    assert capsys.readouterr().err == ""
    assert read_generation({"min_length": 9}).min_new_tokens == 0
    assert "settings min_length are" in capsys.readouterr().err


def test_a_folders_tokenizer_can_be_given_another_chat_template(tmp_path: Path) -> None:
    save_model(tmp_path, "bart")
    table = {"kind": "pretrained", "chat_template": "plain"}
    for given in (table, {"chat_template": "plain"}):
        decoder = TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(), tmp_path, {"text": Stream(16)}, given)
        assert decoder.processor.stop_texts == ("\nUser:",)
