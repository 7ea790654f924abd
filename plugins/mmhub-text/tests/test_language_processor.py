"""Texts that are written: documents and prompts become ids, and ids the same text again."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmhub.errors import InputError, NotFoundError, TrustError, UsageError
from mmhub.interfaces import Policy
from mmhub_text import store
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.tokenizer import TEXT_SPECIALS, TokenizerRecipe, train_text_tokenizer, train_tokenizer

POLICY = Policy()
KINDS = ["word", "bpe", "byte", "unigram"]
EXACT = ["bpe", "byte", "unigram"]
WIKI = [" = Title = \n\n the <unk> lobster , or common lobster , is a species of <unk> \n the end . \n"] * 3


def trained(texts: list[str], kind: str, **table: Any) -> LanguageTextProcessor:
    size = {} if kind == "word" else {"vocab_size": 320}
    processor = LanguageTextProcessor.from_recipe({"kind": kind, **size, **table}, default="word")
    if processor.needs_fit:
        processor.fit(texts)
    return processor


def text_ids(processor: LanguageTextProcessor, text: str) -> list[int]:
    return processor.prompt(text, POLICY).tolist()[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_stands_between_begin_and_end_and_a_prompt_is_open(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind)
    document, prompt = processor.read(texts[0], POLICY), processor.prompt(texts[0], POLICY)
    assert document.tolist() == [*prompt.tolist(), processor.end_id]
    assert prompt[0] == processor.begin_id == TEXT_SPECIALS.index("<s>")
    assert processor.stop_ids == (processor.end_id,) == (TEXT_SPECIALS.index("</s>"),)
    assert processor.decode(document.tolist()) == texts[0]
    assert max(document) < processor.vocab_size
    assert processor.read("", POLICY).tolist() == [processor.begin_id, processor.end_id]


@pytest.mark.parametrize("kind", EXACT)
def test_any_text_comes_back_byte_for_byte(kind: str, texts: list[str]) -> None:
    processor, draw = trained(texts, kind), random.Random(0)
    ranges = [(32, 127), (0, 0x300), (0x2000, 0x2100), (0x3000, 0xD800), (0xE000, 0x10FFFF)]
    samples = ["  two  blanks \r\n\n\ttab ", "e\u0301 \ufb01 \u2581 \ufffd", "<s></s><pad><unk> [SEP]", "\0\U0001f600"]
    samples += ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(12)) for _ in range(200)]
    for text in samples:
        ids = processor.read(text, POLICY).tolist()
        assert processor.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids[1:-1])
    assert processor.unknown_id is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_the_ids_gives_a_prefix_of_the_text(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind)
    text = "the café\n\nis a film 日本 of\nbeauty"
    ids = text_ids(processor, text)
    whole = processor.decode(ids)
    for length in range(len(ids)):
        assert whole.startswith(processor.decode(ids[:length]).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", [*KINDS, "pretrained"])
def test_a_long_document_is_read_in_pieces_with_the_same_ids(
    kind: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = pretrained(folder_of(tmp_path)) if kind == "pretrained" else trained(texts, kind)
    text = "\n".join([*texts, "", *WIKI, "日本 語 e\u0301a \u0301b  c ' d's 1 a 2"]) * 2
    whole = processor.read(text, POLICY).tolist()
    counted: list[int] = []
    real = store.encode
    monkeypatch.setattr(store, "encode", lambda *args, **kwargs: counted.append(1) or real(*args, **kwargs))
    monkeypatch.setattr(store, "PIECE", 5)
    assert processor.read(text, POLICY).tolist() == whole
    assert (len(counted) > 30) == (kind != "pretrained")  # its words are not read one by one


def test_words_are_those_of_wikitext() -> None:
    processor = trained(WIKI, "word")
    words = [word for line in WIKI[0].splitlines() for word in (*line.split(), "\n")]
    ids = text_ids(processor, WIKI[0])
    assert [processor.tokenizer.id_to_token(i) for i in ids] == words
    assert processor.vocab_size == len({*words, *TEXT_SPECIALS})
    assert ids[words.index("<unk>")] == processor.unknown_id == TEXT_SPECIALS.index("<unk>")
    assert processor.decode(ids) == "\n".join(line.strip() for line in WIKI[0].split("\n"))
    assert text_ids(processor, "zebra") == [processor.unknown_id]


def test_special_tokens_in_a_text_are_never_real_ones() -> None:
    texts = ["a <s> b </s> <pad> <unk>", *WIKI]
    for kind in KINDS:
        processor = trained(texts, kind)
        assert [processor.tokenizer.token_to_id(name) for name in TEXT_SPECIALS] == [0, 1, 2, 3]
        for copy in (processor, pickle.loads(pickle.dumps(processor))):
            ids = text_ids(copy, "</s> <s> <pad>")
            assert set(ids) == {1} if kind == "word" else not {0, 1, 2, 3} & set(ids)


def test_a_special_token_without_a_way_to_write_it_as_text_is_an_input_error() -> None:
    tokenizer = Tokenizer(models.Unigram([("<s>", 0.0), *((char, -9.0) for char in "a<s>")], None))
    tokenizer.add_special_tokens(["<s>"])
    processor = LanguageTextProcessor.of_tokenizer(tokenizer, begin_id=0, end_id=None, ends=False)
    with pytest.raises(InputError, match="spells '<s>'"):
        processor.read("a<s>", POLICY)


def test_words_have_no_limit_unless_one_is_given() -> None:
    many = [" ".join(f"w{i}" for i in range(9000))]
    assert trained(many, "word").vocab_size == 9004
    assert trained(many, "word", vocab_size=0).vocab_size == 9004
    assert trained(many, "word", vocab_size=50).vocab_size == 50
    assert trained(["a a b"], "word", min_frequency=2).vocab_size == 5
    by_words = trained(["don't stop , A"], "word", split="words", lowercase=True)
    assert [by_words.tokenizer.id_to_token(i) for i in text_ids(by_words, "a don't.")] == ["a", "don't", "<unk>"]


def test_an_encoder_may_split_at_white_space_too() -> None:
    tokenizer = train_tokenizer(TokenizerRecipe(kind="word", split="whitespace"), ["a, b\n[SEP]"])
    assert tokenizer.encode("a, [SEP]\nb").ids[0] == tokenizer.token_to_id("a,")
    assert [tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_files_rebuild_the_processor(kind: str, texts: list[str]) -> None:
    processor = trained(texts, kind, chat_template="plain")
    state = json.loads(json.dumps(processor.state()))
    again = LanguageTextProcessor.from_state(state, processor.files())
    assert not again.needs_fit and set(again.files()) == {"tokenizer.json", "chat_template.jinja"}
    assert (again.files(), again.state()) == (processor.files(), processor.state())
    for text in [*texts, "", "unseen </s> words\n"]:
        ids = processor.read(text, POLICY).tolist()
        assert again.read(text, POLICY).tolist() == ids and again.decode(ids) == processor.decode(ids)
    message = [{"role": "user", "content": "a film"}]
    assert again.chat(message, POLICY).tolist() == processor.chat(message, POLICY).tolist()


def test_the_same_texts_give_the_same_tokenizer(texts: list[str]) -> None:
    for train in (train_tokenizer, train_text_tokenizer):
        for kind, size in (("word", 40), ("bpe", 320), ("unigram", 300), ("unigram", 60)):
            recipe = TokenizerRecipe(kind=kind, vocab_size=size)
            assert len({train(recipe, texts).to_str() for _ in range(3)}) == 1


def test_encoders_and_writers_learn_the_same_pairs_of_bytes(texts: list[str]) -> None:
    recipe = TokenizerRecipe(kind="bpe", vocab_size=320)
    reader, writer = train_tokenizer(recipe, texts), train_text_tokenizer(recipe, texts)
    for text in texts:
        assert reader.encode(text).ids == writer.encode(text).ids


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_a_corpus_without_text_and_a_vocabulary_too_small_for_it_are_errors(kind: str, texts: list[str]) -> None:
    for nothing in ([], ["", None, " \n"]):
        with pytest.raises(InputError, match="no text to train a tokenizer on"):
            trained(nothing, kind)
    assert trained(texts, kind, vocab_size=5).vocab_size == {"word": 5, "bpe": 260, "unigram": 261}[kind]
    with pytest.raises(UsageError, match=r"cannot be trained: .*not large enough"):
        train_tokenizer(TokenizerRecipe(kind="unigram", vocab_size=5), texts)


def test_half_a_character_is_named_with_its_place(texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"not valid Unicode: U\+D800 at position 5"):
        trained(texts, "byte").read("half \ud800 pair", POLICY)
    with pytest.raises(InputError, match=r"U\+DFFF at position 1") as caught:
        trained(["fine", "b\udfff"], "bpe")
    assert caught.value.row == 1


@pytest.mark.parametrize("raw", [b"bytes", 3, ["a", "list"], {"text": "a"}])
def test_anything_but_a_string_is_an_input_error(raw: Any, texts: list[str]) -> None:
    processor = trained(texts, "byte")
    for read in (processor.read, processor.prompt):
        with pytest.raises(InputError, match="a text is expected"):
            read(raw, POLICY)
    with pytest.raises(InputError, match="more than the limit of 3"):
        processor.read("four", Policy(max_bytes=3))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "bpe", "split": "words"}, 'split is for kind = "word"'),
        ({"kind": "bpe", "vocab_size": 0}, "vocab_size must be above 4"),
        ({"kind": "word", "vocab_size": 4}, "vocab_size must be above 4"),
        ({"kind": "word", "split": "blanks"}, "model.tokenizer.split: invalid enum value 'blanks'"),
        ({"kind": "byte", "chat_template": "chatlm"}, "did you mean 'chatml'?"),
    ],
)
def test_a_bad_tokenizer_table_is_refused_by_name(table: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, NotFoundError)) as caught:
        LanguageTextProcessor.from_recipe(table, default="word")
    assert message in str(caught.value)


def test_an_untrained_tokenizer_says_so() -> None:
    processor = LanguageTextProcessor.from_recipe(None, default="word")
    assert processor.needs_fit
    for use in (lambda: processor.read("a", POLICY), lambda: processor.decode([1]), processor.state):
        with pytest.raises(UsageError, match="has not been trained"):
            use()


def folder_of(path: Path, **files: Any) -> Path:
    """A folder with a byte-level tokenizer that has special tokens of its own, and JSON files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, table in files.items():
        (path / f"{name}.json").write_text(json.dumps(table))
    return path


def pretrained(path: Path, **table: Any) -> LanguageTextProcessor:
    return LanguageTextProcessor.from_recipe({"kind": "pretrained", "name": str(path), **table}, default="word")


def test_a_transformers_folder_says_how_texts_begin_and_end(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "add_bos_token": True}
    settings |= {"chat_template": [{"name": "default", "template": "{{ bos_token }}<|turn|>"}]}
    folder = folder_of(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [258, 257]})
    processor = pretrained(folder)
    assert not processor.needs_fit and processor.vocab_size == 259 and processor.unknown_id is None
    assert (processor.begin_id, processor.end_id, processor.begins, processor.ends) == (256, 257, True, False)
    assert processor.stop_ids == (257, 258)
    assert processor.read("a<|end|>", POLICY).tolist()[0] == 256
    assert processor.decode([256, *text_ids(processor, "a<|end|>"), 258]) == "a<|end|>"
    assert processor.chat([{"role": "user", "content": ""}], POLICY).tolist() == [256, 258]
    (folder / "chat_template.jinja").write_text("<|turn|>")
    assert pretrained(folder).chat([{"role": "user", "content": ""}], POLICY).tolist() == [258]
    assert pretrained(folder / "tokenizer.json").chat_template == "<|turn|>"


def test_a_tokenizer_that_puts_nothing_around_texts_still_knows_how_an_empty_one_begins(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config={"bos_token_id": 257, "eos_token_id": 257})
    processor = pretrained(folder)
    assert (processor.begins, processor.ends, processor.stop_ids) == (False, False, (257,))
    assert processor.prompt("", POLICY).tolist() == [257]
    assert processor.read("ab", POLICY).tolist() == [257, *processor.prompt("ab", POLICY).tolist()]
    bare = pretrained(folder_of(tmp_path / "bare"))
    assert (bare.begin_id, bare.end_id, bare.stop_ids) == (None, None, ())
    assert bare.prompt("", POLICY).tolist() == []


def test_a_damaged_settings_file_is_a_trust_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tokenizer_config=["no", "object"])
    with pytest.raises(TrustError, match="should hold a JSON object"):
        pretrained(folder)
    (folder / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(TrustError, match="not readable JSON"):
        pretrained(folder)


def test_a_chat_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(UsageError, match=r"has no <\|im_start\|>"):
        pretrained(folder, chat_template="chatml")
    assert pretrained(folder, chat_template="plain").chat_template


@pytest.mark.parametrize("template", ["", "chatml"])
def test_a_tokenizer_that_was_trained_here_keeps_its_begin_and_end(template: str, tmp_path: Path) -> None:
    first = trained(["one two three"], "bpe", chat_template=template)
    for name, content in first.files().items():
        (tmp_path / name).write_bytes(content)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = pretrained(place, chat_template=template)
        assert again.read("one two", POLICY).tolist() == first.read("one two", POLICY).tolist()
        assert (again.begin_id, again.end_id, again.stop_ids) == (first.begin_id, first.end_id, first.stop_ids)
        assert dict(again.names) == dict(first.names)
