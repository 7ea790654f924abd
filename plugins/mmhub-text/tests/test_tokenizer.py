"""Tokenizers and the text processor: what they learn, keep and refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmhub.errors import InputError, NotFoundError, TrustError, UsageError
from mmhub.interfaces import Policy
from mmhub_text.processor import TextProcessor
from mmhub_text.tokenizer import SPECIALS, TokenizerRecipe, parse_tokenizer, train_tokenizer

KINDS = ["word", "bpe", "byte", "unigram"]
POLICY = Policy()


def trained(texts: list[str], kind: str, max_length: int | None = None, wrap: bool = False, **table: Any):
    table = {"kind": kind, "vocab_size": 300, **table}
    processor = TextProcessor.from_recipe(table, default="word", max_length=max_length, wrap=wrap)
    if processor.needs_fit:
        processor.fit(texts)
    return processor


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_comes_back_from_its_ids(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind)
    text = texts[1]
    ids = processor.read(text, POLICY)
    assert ids.dtype.is_signed and ids.dim() == 1 and len(ids) > 0
    assert processor.tokenizer.decode(ids.tolist()) == text
    assert max(ids) < processor.vocab_size <= 300


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_byte_level_kinds_keep_any_text_exactly(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind)
    text = "  日本語 \t never seen € \n"
    assert processor.tokenizer.decode(processor.read(text, POLICY).tolist()) == text


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_files_rebuild_the_processor(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind, max_length=5, wrap=True)
    state = json.loads(json.dumps(processor.state()))
    again = TextProcessor.from_state(state, processor.files())
    assert not again.needs_fit
    assert (again.files(), again.state()) == (processor.files(), processor.state())
    for text in [*texts, "", "unseen words"]:
        assert again.read(text, POLICY).tolist() == processor.read(text, POLICY).tolist()


def test_training_gives_the_same_tokenizer_in_another_process(texts: list[str]) -> None:
    code = (
        "import sys, json; from mmhub_text.tokenizer import TokenizerRecipe as R, train_tokenizer\n"
        "texts = json.loads(sys.argv[1])\n"
        "for kind in ('word', 'bpe', 'unigram'):\n"
        "    print(train_tokenizer(R(kind=kind, vocab_size=300), texts).to_str())"
    )
    command = [sys.executable, "-c", code, json.dumps(texts)]
    other = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.splitlines()
    here = [train_tokenizer(TokenizerRecipe(kind=kind, vocab_size=300), texts) for kind in ("word", "bpe", "unigram")]
    assert [tokenizer.to_str() for tokenizer in here] == other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_is_still_one_token(kind: str, text: str, texts: list[str]) -> None:
    items = trained(texts, kind)([text, None, "one"], POLICY)
    assert items.rows.tolist() == [0, 2]
    assert items.mask.any(1).all()


def test_words_keep_apostrophes_and_hyphens_and_unknown_ones_share_an_id(texts: list[str]) -> None:
    processor = trained(texts, "word")
    assert processor.tokenizer.encode("I don't: state-of-the-art!?").tokens[:2] == ["I", "don't"]
    assert processor.read("zebra", POLICY).tolist() == [SPECIALS.index("[UNK]")] == [processor.empty_id]


def test_rare_words_and_case_may_be_dropped() -> None:
    processor = trained(["Good film", "good idea"], "word", min_frequency=2, lowercase=True)
    assert set(processor.tokenizer.get_vocab()) == {*SPECIALS, "good"}
    assert processor.read("GOOD", POLICY).tolist() == [4]


def test_long_texts_are_cut_and_keep_their_end_token(texts: list[str]) -> None:
    processor = trained(texts, "word", max_length=6, wrap=True)
    assert processor.tokenizer.encode(texts[0]).tokens == ["[CLS]", "a", "stirring", ",", "funny", "[SEP]"]
    assert "truncation" in json.loads(processor.tokenizer.to_str())
    assert json.loads(processor.files()["tokenizer.json"])["truncation"] is None


def test_padding_and_truncation_in_a_tokenizer_file_are_ignored(texts: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(trained(texts, "bpe").files()["tokenizer.json"].decode())
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        table = {"kind": "pretrained", "name": str(name)}
        processor = TextProcessor.from_recipe(table, default="word", max_length=None)
        assert not processor.needs_fit
        assert processor.read(texts[0], POLICY).tolist() == trained(texts, "bpe").read(texts[0], POLICY).tolist()


@pytest.mark.parametrize("raw", [b"bytes", 3, {"text": "a"}, float("nan")])
def test_anything_but_a_string_is_an_input_error_with_its_row(raw: Any, texts: list[str]) -> None:
    processor = trained(texts, "bpe")
    with pytest.raises(InputError, match="a text is expected") as caught:
        processor(["fine", raw], POLICY)
    assert (caught.value.row, caught.value.modality) == (1, "text")
    fresh = TextProcessor.from_recipe(None, default="word", max_length=None)
    with pytest.raises(InputError, match="a text is expected") as caught:
        fresh.fit(["fine", None, ["two", "texts"], raw])
    assert caught.value.row == 3


def test_a_broken_or_huge_text_is_an_input_error(texts: list[str]) -> None:
    processor = trained(texts, "bpe")
    with pytest.raises(InputError, match="not valid Unicode"):
        processor.read("half \ud800 pair", POLICY)
    with pytest.raises(InputError, match="more than the limit of 10"):
        processor.read("x" * 11, Policy(max_bytes=10))


def test_a_runaway_pattern_in_a_tokenizer_file_is_an_input_error(texts: list[str]) -> None:
    data = json.loads(trained(texts, "bpe").files()["tokenizer.json"])
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    processor = TextProcessor.from_state({"pad_id": 0, "empty_id": 1}, {"tokenizer.json": json.dumps(data).encode()})
    with pytest.raises(InputError, match="tokenizer failed on this text"):
        processor.read("a" * 40 + "!", POLICY)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file_is_a_trust_error(content: bytes) -> None:
    with pytest.raises(TrustError, match="not a usable tokenizer"):
        TextProcessor.from_state({"pad_id": 0, "empty_id": 0, "max_length": None}, {"tokenizer.json": content})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "words"}, "model.tokenizer.kind: invalid enum value 'words'"),
        ({"kind": "bpe", "vocabsize": 9}, "unknown key 'vocabsize'; did you mean 'vocab_size'?"),
        ({"kind": "bpe", "vocab_size": 3}, "vocab_size must be above 4"),
        ({"kind": "pretrained"}, 'kind = "pretrained" needs name'),
        ({"kind": "word", "name": "x"}, 'only kind = "pretrained" needs name'),
        ({}, "the key 'kind' is missing"),
    ],
)
def test_a_bad_tokenizer_table_is_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TextProcessor.from_recipe(table, default="word", max_length=None)
    assert message in str(caught.value)


def test_a_missing_pretrained_tokenizer_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no tokenizer at"):
        TextProcessor.from_recipe({"kind": "pretrained", "name": str(tmp_path)}, default="word", max_length=None)


def test_an_untrained_tokenizer_says_so() -> None:
    with pytest.raises(UsageError, match="has not been trained"):
        TextProcessor.from_recipe(None, default="word", max_length=None).read("a", POLICY)


def test_training_leaves_the_environment_alone(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    trained(texts, "bpe")
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_stored_tokenizer_is_parsed_when_it_is_needed(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_text import store as module

    saved = trained(texts, "bpe", max_length=5)
    parsed: list[int] = []
    real = module.parse_tokenizer
    monkeypatch.setattr(module, "parse_tokenizer", lambda *args: parsed.append(1) or real(*args))
    state, files = saved.state(), saved.files()
    parsed.clear()
    loaded = TextProcessor.from_state(state, files)
    assert (loaded.vocab_size, loaded.needs_fit, parsed) == (saved.vocab_size, False, [])
    assert loaded.read(texts[0], POLICY).tolist() == saved.read(texts[0], POLICY).tolist()
    assert loaded.read(texts[1], POLICY).tolist() == saved.read(texts[1], POLICY).tolist()
    assert parsed == [1]
    older = {key: value for key, value in state.items() if key != "vocab_size"}
    assert TextProcessor.from_state(older, files).vocab_size == saved.vocab_size


def test_a_stored_tokenizer_with_more_ids_than_it_says_is_refused(texts: list[str]) -> None:
    saved = trained(texts, "bpe")
    loaded = TextProcessor.from_state(saved.state() | {"vocab_size": 10}, saved.files())
    with pytest.raises(TrustError, match="more ids than"):
        loaded.read("good", POLICY)


def test_an_id_out_of_range_is_refused_when_a_text_has_it(texts: list[str]) -> None:
    saved = TextProcessor.from_recipe({"kind": "word"}, default="word", max_length=None)
    saved.fit(texts)
    table = json.loads(saved.files()["tokenizer.json"])
    table["model"]["vocab"]["beauty"] = 10**6  # as many ids as before, with a gap
    loaded = TextProcessor.from_state(saved.state(), {"tokenizer.json": json.dumps(table).encode()})
    assert loaded(["cliches"], POLICY).data.numel()
    with pytest.raises(TrustError, match="more ids than"):
        loaded(["beauty"], POLICY)


def _with(**parts: Any) -> str:
    tokenizer = train_tokenizer(TokenizerRecipe(kind="word"), ["a good thing"])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return str(tokenizer.to_str())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": normalizers.Sequence([normalizers.Replace("o", "oo")] * 7)}, "its normalizer may make a text"),
        ({"normalizer": normalizers.Replace(Regex("b*"), "o" * 64)}, "its normalizer may make a text more than 64"),
        ({"normalizer": normalizers.Prepend("o" * 1001)}, "its normalizer puts more than 1,000 characters"),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 4)}, "its pre_tokenizer may make"),
        ({"decoder": decoders.Sequence([decoders.Replace("o", "oo")] * 7)}, "its decoder may make a text"),
        ({"post_processor": processors.TemplateProcessing(" ".join(["$A"] * 65), None, [])}, "its post_processor puts"),
        (
            {"post_processor": processors.Sequence([processors.TemplateProcessing("$A $A", None, [])] * 7)},
            "its post_processor puts too much",
        ),
        ({"post_processor": processors.TemplateProcessing("$A" + " x" * 1001, None, [("x", 1)])}, "its post_processor"),
        ({"model": models.BPE(continuing_subword_prefix="o" * 1001)}, "its model has a continuing_subword_prefix"),
        ({"model": models.WordPiece(unk_token="o", max_input_chars_per_word=10**9)}, "more than 10,000 characters"),
    ],
)
def test_a_tokenizer_that_would_make_much_of_little_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(TrustError, match=words):
        parse_tokenizer(_with(**parts))


def test_a_tokenizer_may_write_blanks_otherwise_and_name_bytes() -> None:
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.Replace(Regex(" {2,}"), " ")]
    blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKD()]
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    parts = {
        "normalizer": normalizers.Sequence([*quotes, *blanks]),
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]),
        "decoder": decoders.Sequence(back),
        "post_processor": processors.RobertaProcessing(("a", 1), ("b", 2)),
    }
    parse_tokenizer(_with(**parts))
