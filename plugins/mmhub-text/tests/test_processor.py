"""Pairs of texts and lists of words: the ids of transformers, marks, places in the text, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from mmhub.errors import InputError
from mmhub.interfaces import Policy
from mmhub_text.pretrained import Transformers
from mmhub_text.processor import TextProcessor, segments

POLICY = Policy()
CONTEXT = "The café opened  in 1923;\n日本 \U0001f600 guests came, and stayed."
PAIRS = [("one long string", "of cliches"), ("", "alone"), ("a film " * 9, "best"), ("best", "a film " * 9)]
SENTENCES = [
    ["the", "film", "isn't", "state-of-the-art", "!"],
    ["café"],
    ["New York", "best"],
    ["a", "", "\u200b", "b"],
]
KINDS = ["word", "bpe", "byte", "unigram"]
NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def trained(texts: list[str], kind: str, max_length: int | None = None, wrap: bool = True) -> TextProcessor:
    table = {"kind": kind, "vocab_size": 300}
    processor = TextProcessor.from_recipe(table, default="word", max_length=max_length, wrap=wrap)
    if processor.needs_fit:
        processor.fit([*texts, CONTEXT])
    return processor


def wordpiece(texts: list[str]) -> Tokenizer:
    """A tokenizer as BERT's: lower-cased, without accents, words in pieces."""
    chars = sorted({char for text in [*texts, CONTEXT.lower()] for char in text if not char.isspace()} | {"e"})
    pieces = [*NAMES.values(), *chars, *(f"##{char}" for char in chars), "film", "the", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def roberta(texts: list[str]) -> Tokenizer:
    """A tokenizer as RoBERTa's: pairs of bytes, two separators between texts."""
    processor = trained(texts, "bpe", wrap=False)
    tokenizer = processor.tokenizer
    assert tokenizer is not None
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    table = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(table).replace('"[SEP]"', '"[OLD]"'))


def library(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **(names or NAMES))


def tokens_of(processor: TextProcessor, ids: list[int]) -> list[str]:
    return [processor.tokenizer.id_to_token(i if i >= 0 else ~i) for i in ids]


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("make", [wordpiece, roberta])
def test_a_pair_gets_the_ids_that_transformers_gives_it(make: Any, limit: int | None, texts: list[str]) -> None:
    tokenizer = make(texts)
    processor = TextProcessor.of_tokenizer(Tokenizer.from_str(tokenizer.to_str()), max_length=limit)
    theirs = library(tokenizer)
    for first, second in [*PAIRS, (texts[0], texts[2])]:
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        expected = theirs(first, second, **cut)["input_ids"]
        assert processor.read({"text": first, "text_pair": second}, POLICY).tolist() == expected
        if limit is None:
            assert processor.read({"context": second, "question": first}, POLICY).tolist() == expected


def test_a_trained_tokenizer_puts_a_separator_between_the_texts(texts: list[str]) -> None:
    pair = {"text": "one film", "text_pair": "best year"}
    wrapped, bare = trained(texts, "word"), trained(texts, "word", wrap=False)
    expected = ["[CLS]", "one", "film", "[SEP]", "best", "year", "[SEP]"]
    assert tokens_of(wrapped, wrapped.read(pair, POLICY).tolist()) == expected
    assert tokens_of(bare, bare.read(pair, POLICY).tolist()) == expected[1:-1]
    assert wrapped.read({"text": "", "text_pair": ""}, POLICY).tolist() == [2, 3, 3]
    assert tokens_of(bare, bare.read("one film", POLICY).tolist()) == ["one", "film"]
    short = trained(texts, "word", max_length=6)
    cut = short.read({"text": "one long string of", "text_pair": "best"}, POLICY).tolist()
    assert tokens_of(short, cut) == ["[CLS]", "one", "long", "[SEP]", "best", "[SEP]"]
    items = wrapped([pair, "one", None, [pair, "two"]], POLICY)
    assert items.rows.tolist() == [0, 1, 3, 3] and items.marks is None


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece"])
def test_each_position_of_a_context_knows_its_characters(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind) if kind != "wordpiece" else TextProcessor(wordpiece(texts))
    raw = {"question": "When did the café open?", "context": CONTEXT}
    spans, ids = processor.offsets(raw), processor.read(raw, POLICY).tolist()
    assert len(spans) == len(ids)
    found = [span for span in spans if span]
    assert found == sorted(found) and {CONTEXT[start:end].strip() for start, end in found} == {
        CONTEXT[start:end] for start, end in found
    }
    covered = {place for start, end in found for place in range(start, end)}
    assert covered == {place for place, char in enumerate(CONTEXT) if not char.isspace()}
    separator = ids.index(processor.sep_id)
    assert spans[: separator + 1] == [None] * (separator + 1) and spans[-1] is None
    processor.words = True
    assert [i < 0 for i in processor.read(raw, POLICY).tolist()] == [span is not None for span in spans]


def test_an_answer_can_be_cut_out_of_the_context(texts: list[str]) -> None:
    processor = trained(texts, "bpe")
    raw = {"question": "When?", "context": CONTEXT}
    start = CONTEXT.index("1923")
    inside = [span for span in processor.offsets(raw) if span and span[0] >= start and span[1] <= start + 4]
    assert CONTEXT[inside[0][0] : inside[-1][1]] == "1923"


def test_a_context_is_never_cut_in_silence(texts: list[str]) -> None:
    processor = trained(texts, "word", max_length=8)
    raw = {"question": "When?", "context": CONTEXT}
    for use in (lambda: processor.read(raw, POLICY), lambda: processor.offsets(raw)):
        with pytest.raises(InputError, match="more than the 8 tokens the model reads at once"):
            use()
    assert len(processor.read({"text": "When?", "text_pair": CONTEXT}, POLICY)) == 8


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece"])
@pytest.mark.parametrize("wrap", [True, False])
def test_every_word_has_one_mark(kind: str, wrap: bool, texts: list[str]) -> None:
    processor = trained(texts, kind, wrap=wrap) if kind != "wordpiece" else TextProcessor(wordpiece(texts))
    assert not processor.marks and not processor.is_item(["a"])
    processor.words = True
    assert processor.marks
    rows: list[Any] = [*SENTENCES, None, " ".join(SENTENCES[0]), [SENTENCES[0], SENTENCES[1]], ["", ""]]
    items = processor(rows, POLICY)
    assert items.marks is not None and (items.data >= 0).all() and not (items.marks & ~items.mask).any()
    assert items.rows.tolist() == [0, 1, 2, 3, 5, 6, 6, 7]
    assert items.marks.sum(1).tolist() == [5, 1, 2, 4, 5, 5, 1, 2]
    assert items.data[0].tolist() == items.data[4].tolist()
    if wrap:
        ends = items.mask.sum(1) - 1
        assert items.marks[:, 0].sum() == 0 and items.marks[torch.arange(8), ends].sum() == 0


def test_words_get_the_ids_and_places_that_transformers_gives_them(texts: list[str]) -> None:
    tokenizer = wordpiece(texts)
    processor = TextProcessor(Tokenizer.from_str(tokenizer.to_str()))
    processor.words = True
    for words in (*SENTENCES[:2], texts[2].split()):
        expected = library(tokenizer)(words, is_split_into_words=True)
        ids = processor.read(words, POLICY).tolist()
        assert [i if i >= 0 else ~i for i in ids] == expected["input_ids"]
        owners = expected.word_ids()
        first = [owner is not None and owner not in owners[:place] for place, owner in enumerate(owners)]
        assert [i < 0 for i in ids] == first


def test_a_word_without_tokens_stands_where_it_was(texts: list[str]) -> None:
    processor = TextProcessor(wordpiece(texts))
    processor.words = True
    ids = processor.read(["the", "\u200b", "film", ""], POLICY).tolist()
    assert tokens_of(processor, ids) == ["[CLS]", "the", "[UNK]", "film", "[UNK]", "[SEP]"]
    assert tokens_of(processor, processor.read([""], POLICY).tolist()) == ["[CLS]", "[UNK]", "[SEP]"]


def test_blanks_inside_a_word_stay_where_they_are(texts: list[str]) -> None:
    processor = trained(texts, "byte", wrap=False)
    plain = processor.read("the New   York x", POLICY).tolist()
    processor.words = True
    ids = processor.read(["the", "New   York", "x"], POLICY).tolist()
    assert [i if i >= 0 else ~i for i in ids] == plain and sum(i < 0 for i in ids) == 3


def test_two_words_in_one_token_have_a_mark_each() -> None:
    tokenizer = Tokenizer(models.WordLevel({"new york": 0, "[UNK]": 1}, unk_token="[UNK]"))
    processor = TextProcessor(tokenizer)
    processor.words = True
    assert processor.read(["new", "york"], POLICY).tolist() == [~0, ~1]


def test_too_many_words_are_an_input_error_and_never_cut(texts: list[str]) -> None:
    processor = trained(texts, "word", max_length=6)
    processor.words = True
    assert len(processor.read(["one", "long", "string", "of"], POLICY)) == 6
    with pytest.raises(InputError, match="the 5 words are more than the 6 tokens") as caught:
        processor([["one"], ["one", "long", "string", "of", "cliches"]], POLICY)
    assert caught.value.row == 1
    with pytest.raises(InputError, match="more than the 6 tokens"):
        processor.read(["", "", "", "", ""], POLICY)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"text": "a"}, r"a mapping with the keys \['text'\]"),
        ({"text": "a", "context": "b"}, r"a mapping with the keys \['context', 'text'\]"),
        ({"text": "a", "text_pair": None}, "a text is expected, got a NoneType"),
        ({"question": "a", "context": "b\udc00"}, r"U\+DC00 at position 1"),
        ({"question": "\udc01", "context": "b"}, r"U\+DC01 at position 0"),
        ({}, "a text is expected"),
    ],
)
def test_a_malformed_pair_is_an_input_error(raw: Any, message: str, texts: list[str]) -> None:
    processor = trained(texts, "bpe")
    for words in (False, True):
        processor.words = words
        with pytest.raises(InputError, match=message):
            processor.read(raw, POLICY)
    with pytest.raises(InputError, match=message):
        processor.offsets(raw)


@pytest.mark.parametrize("raw", [3, b"a", [1, 2], [["a"]]])
def test_anything_but_words_is_an_input_error_where_words_are_read(raw: Any, texts: list[str]) -> None:
    processor = trained(texts, "word")
    processor.words = True
    with pytest.raises(InputError, match="a list of words is expected"):
        processor.read(raw, POLICY)


def test_words_and_pairs_train_a_tokenizer(texts: list[str]) -> None:
    processor = TextProcessor.from_recipe({"kind": "bpe", "vocab_size": 300}, default="word", max_length=None)
    processor.words = True
    processor.fit([["good", "film"], None, ["good", "film"]])
    vocabulary = processor.tokenizer.get_vocab()
    assert "Ġfilm" in vocabulary  # words stand in a sentence, with blanks between them
    processor = TextProcessor.from_recipe({"kind": "word"}, default="word", max_length=None)
    processor.fit([{"question": "who", "context": "nobody"}, [{"text": "a", "text_pair": "b"}]])
    assert {"who", "nobody", "a", "b"} < set(processor.tokenizer.get_vocab())


def test_the_state_says_whether_words_are_read(texts: list[str]) -> None:
    processor = trained(texts, "bpe")
    processor.words = True
    state = json.loads(json.dumps(processor.state()))
    again = TextProcessor.from_state(state, processor.files())
    for copy in (again, pickle.loads(pickle.dumps(processor))):
        assert copy.words and copy.sep_id == processor.sep_id == 3
        assert copy.read(SENTENCES[0], POLICY).tolist() == processor.read(SENTENCES[0], POLICY).tolist()
    assert "words" not in trained(texts, "bpe").state()
    older = {key: value for key, value in state.items() if key not in {"sep_id", "words"}}
    assert (old := TextProcessor.from_state(older, processor.files())).sep_id == 3 and not old.words


def test_segments_change_behind_the_first_separator() -> None:
    ids = torch.tensor([[2, 5, 3, 6, 3, 3], [2, 5, 6, 3, 0, 3], [2, 3, 5, 3, 6, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    assert segments(ids, mask, 3).tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6, [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta"])
@torch.inference_mode()
def test_a_pair_gets_the_librarys_states(kind: str, tmp_path: Path, texts: list[str]) -> None:
    tokenizer = roberta(texts) if kind == "roberta" else wordpiece(texts)
    names = {"pad_token": "<pad>", "sep_token": "</s>", "cls_token": "<s>"} if kind == "roberta" else NAMES
    pad = tokenizer.token_to_id(names["pad_token"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 400, "vocab_size": tokenizer.get_vocab_size(), "pad_token_id": pad}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    assert model.config.type_vocab_size == 2
    for parameter in model.parameters():  # token types matter
        parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Transformers.from_library(Transformers.Config(), tmp_path).eval()
    first, second = ["one long string", texts[0]], ["of cliches", "best"]
    theirs = library(tokenizer, **names)
    inputs = ["input_ids", "attention_mask"] if kind == "roberta" else ["input_ids", "attention_mask", "token_type_ids"]
    theirs.model_input_names = inputs
    batch = theirs(first, second, padding=True, return_tensors="pt")
    assert ("token_type_ids" in batch) == (kind != "roberta")
    expected = model(**batch).last_hidden_state
    items = encoder.processor([{"text": a, "text_pair": b} for a, b in zip(first, second, strict=True)], POLICY)
    tokens = encoder(items.data, items.mask).tokens
    torch.testing.assert_close(tokens[items.mask], expected[items.mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_text_of_which_nothing_may_be_lost_is_refused_with_both_counts(kind: str, texts: list[str]) -> None:
    processor, free = trained(texts, kind, max_length=6), trained(texts, kind)
    text = " ".join(texts)
    pair = {"text": texts[0], "text_pair": text}
    assert len(processor.read(text, POLICY)) == 6
    for raw in (text, pair, ""):
        assert processor.count(raw) == len(free.read(raw, POLICY))
    processor.whole = True
    for raw in (text, pair):
        message = f"the text has {processor.count(raw)} tokens, the encoder takes at most 6; shorten it, or raise"
        with pytest.raises(InputError, match=message):
            processor.read(raw, POLICY)
    assert processor.read("a", POLICY).tolist() == free.read("a", POLICY).tolist()
    assert not TextProcessor.from_state(processor.state(), processor.files()).whole
