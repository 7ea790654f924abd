"""Conversations as scripts: the ids of transformers, where media stand, and what is trained."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmhub.conversation import fit_talk
from mmhub.errors import InputError
from mmhub.interfaces import Policy, Script
from mmhub_text.chat import render
from mmhub_text.frame import read_frame
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.tokenizer import TokenizerRecipe, train_text_tokenizer

POLICY = Policy()
TEXTS = [
    "What is a film, user? assistant says: Be of help. It is what it is, system model [INST] Sound: yes no 12\n\n"
] * 3


@dataclass(frozen=True)
class Sample:
    """A chat template in a known style, its special tokens, the one that ends an answer, and other added tokens."""

    template: str
    special: tuple[str, ...]
    stop: str
    added: tuple[str, ...] = ()


_TURNS = "{% for message in messages %}"
LLAMA2 = Sample(
    "{% if messages[0].role == 'system' %}"
    "{% set note = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set talk = messages[1:] %}"
    "{% else %}{% set note = '' %}{% set talk = messages %}{% endif %}"
    "{% for message in talk %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (note if loop.first else '') + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
)
LLAMA3 = Sample(
    "{{ bos_token }}" + _TURNS + "<|head|>{{ message.role }}<|/head|>\n\n{{ message.content | trim }}<|done|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    ("<s>", "</s>", "<|head|>", "<|/head|>", "<|done|>"),
    "<|done|>",
)
QWEN25 = Sample(
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    + _TURNS
    + "<|im_start|>{{ message.role + '\n' + message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)
QWEN3 = Sample(
    _TURNS + "{% set said = message.content %}"
    "{% if message.role == 'assistant' %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in said else '' %}"
    "{% set said = said.split('</think>')[-1].strip() %}"
    "{% if loop.last %}{% set said = '<think>\n' + thought + '\n</think>\n\n' + said %}{% endif %}{% endif %}"
    "<|im_start|>{{ message.role + '\n' + said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    ("<think>", "</think>"),
)
GEMMA = Sample(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + _TURNS
    + "<turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    ("<s>", "</s>", "<turn>", "</turn>"),
    "</turn>",
)
MISTRAL = Sample(
    "{{ bos_token }}"
    "{% for message in messages if message.role != 'system' %}"
    "{% if message.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ message.content }}[/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "</s>",
)
PHI3 = Sample(
    _TURNS + "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "<|end|>",
)
ZEPHYR = Sample(
    _TURNS + "<|{{ message.role }}|>\n{{ message.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ("<s>", "</s>"),
    "</s>",
)
TEMPLATES = {
    "llama-2": LLAMA2,
    "llama-3": LLAMA3,
    "qwen-2.5": QWEN25,
    "qwen-3": QWEN3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi-3": PHI3,
    "zephyr": ZEPHYR,
}
_PARTS = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<|see|><|image|><|/see|>"
    "{% elif part.type == 'audio' %}Sound: <|audio|>\n{% endif %}{% endfor %}{% endif %}"
)
# As vision models have them: contents are parts, and the template writes what stands for a picture.
TYPED = Sample(
    _TURNS + "<|im_start|>{{ message.role }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|see|>", "<|/see|>", "<|image|>", "<|audio|>"),
    "<|im_end|>",
)
PICTURES_FIRST = Sample(
    _TURNS + "{{ message.role | upper }}: "
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<|image|>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    ("<s>", "</s>", "<|image|>"),
    "</s>",
)

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "What is a film?"},
    {"role": "assistant", "content": "It is what it is"},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "no"},
]
KINDS = ("byte-level", "words", "metaspace", "prefix")


@cache
def trained(kind: str) -> str:
    if kind in ("byte-level", "words"):
        recipe = TokenizerRecipe(kind="bpe" if kind == "byte-level" else "word", vocab_size=320)
        return str(train_text_tokenizer(recipe, TEXTS).to_str())
    if kind == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        limits: dict[str, Any] = {"vocab_size": 100, "special_tokens": ["<unk>"], "show_progress": False}
        tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(**limits, unk_token="<unk>"))
        return str(tokenizer.to_str())
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # as SentencePiece's are converted
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    options: dict[str, Any] = {"vocab_size": 100, "special_tokens": ["<unk>"], "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**options))
    return str(tokenizer.to_str())


def tokenizer_of(kind: str, sample: Sample) -> Tokenizer:
    tokenizer = Tokenizer.from_str(trained(kind))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in sample.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in sample.added])
    return tokenizer


def processor_of(sample: Sample, kind: str = "byte-level", **media: Mapping[str, Any]) -> LanguageTextProcessor:
    tokenizer = tokenizer_of(kind, sample)
    processor = LanguageTextProcessor.of_tokenizer(
        tokenizer,
        begin_id=tokenizer.token_to_id("<s>"),
        end_id=tokenizer.token_to_id("</s>"),
        ends=False,
        stop_ids=[tokenizer.token_to_id(sample.stop)],
        chat_template=sample.template,
        names=NAMES,
    )
    processor.media_tokens = dict(media.get("tokens", {}))
    processor.media_around = dict(media.get("around", {}))
    return processor


def theirs(tokenizer: Tokenizer, template: str, talk: Any, asks: bool) -> list[int]:
    library = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **NAMES)
    return list(library.apply_chat_template(talk, add_generation_prompt=asks)["input_ids"])


def text_of(processor: LanguageTextProcessor, ids: Any) -> str:
    assert processor.tokenizer is not None
    return str(processor.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False))


def taught(processor: LanguageTextProcessor, script: Script) -> str:
    return text_of(processor, script.ids[script.weights > 0])


def said(role: str, *parts: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": content, **more}


IMAGE, AUDIO = {"type": "image", "image": "a.png"}, {"type": "audio", "audio": "a.wav"}


# -- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_has_the_ids_of_transformers_and_so_has_the_prompt_of_an_answer(name: str, kind: str) -> None:
    sample = TEMPLATES[name]
    processor, tokenizer = processor_of(sample, kind), tokenizer_of(kind, sample)
    short = theirs(tokenizer, sample.template, TALK[:1], True)
    for talk in (TALK[:1], TALK[:3]):
        script = processor.converse(talk, POLICY)
        assert script.ids.tolist() == theirs(tokenizer, sample.template, talk, True)
        assert script.prompt == len(script.ids) and not script.weights.any()
    answered = processor.converse(TALK[:2], POLICY)
    assert answered.ids[: answered.prompt].tolist() == short
    assert sum(answered.turns) == len(answered.ids) and answered.turns[0] == answered.prompt
    assert processor.chat(TALK[:3], POLICY).tolist() == script.ids.tolist()


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"llama-3"}))
def test_a_whole_conversation_has_the_ids_of_transformers(name: str) -> None:
    sample = TEMPLATES[name]
    script = processor_of(sample).converse(TALK, POLICY)
    assert script.ids.tolist() == theirs(tokenizer_of("byte-level", sample), sample.template, TALK, False)


def test_an_answer_is_parted_from_its_prompt_where_both_would_become_other_tokens() -> None:
    sample = LLAMA3  # two line breaks are one token, but two before a word
    processor, tokenizer = processor_of(sample), tokenizer_of("byte-level", sample)
    whole = theirs(tokenizer, sample.template, TALK[:2], False)
    script = processor.converse(TALK[:2], POLICY)
    assert script.ids.tolist() != whole and text_of(processor, script.ids) == text_of(processor, whole)
    assert script.ids[: script.prompt].tolist() == theirs(tokenizer, sample.template, TALK[:1], True)


def test_no_token_is_half_of_a_prompt_and_half_of_an_answer() -> None:
    sample = Sample("{% for m in messages %}{{ m.content }}{% endfor %}", ("<s>", "</s>"), "</s>")
    processor = processor_of(sample)
    talk = [{"role": "user", "content": "wh"}, {"role": "assistant", "content": "at"}]
    assert len(processor.converse([{"role": "user", "content": "what"}], POLICY).ids) == 1
    script = processor.converse(talk, POLICY)
    assert text_of(processor, script.ids[: script.prompt]) == "wh" and taught(processor, script) == "at"


# -- what is trained ------------------------------------------------------------------------------------------------

ANSWERS = {
    "llama-2": " It is what it is </s> no </s>",
    "llama-3": "It is what it is<|done|>no<|done|>",
    "qwen-2.5": "It is what it is<|im_end|>no<|im_end|>",
    "qwen-3": "<think>\n\n</think>\n\nno<|im_end|>",  # it writes earlier answers without what was thought
    "gemma": "It is what it is</turn>no</turn>",
    "mistral": " It is what it is</s> no</s>",
    "phi-3": "It is what it is<|end|>no<|end|>",
    "zephyr": "It is what it is</s>no</s>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_trained_each_with_its_stop_token_and_nothing_else(name: str) -> None:
    processor = processor_of(TEMPLATES[name])
    script = processor.converse(TALK, POLICY)
    assert taught(processor, script) == ANSWERS[name]
    assert not script.weights[: script.prompt][-1] and script.weights[script.prompt] == 1
    assert len(script.turns) == 4 and sum(script.turns[:3]) == script.prompt


def test_a_built_in_template_trains_answers_alone() -> None:
    for name, answer in (("plain", " no</s>"), ("chatml", "no<|im_end|>")):
        table = {"kind": "bpe", "chat_template": name, "vocab_size": 300}
        processor = LanguageTextProcessor.from_recipe(table, default="bpe")
        processor.fit(TEXTS)
        script = processor.converse(TALK, POLICY)
        assert taught(processor, script).endswith(answer) and taught(processor, script).count("What") == 0
        assert text_of(processor, script.ids[script.prompt :]).strip() == answer.strip()


def test_a_prompt_is_laid_out_once_however_long_it_is_and_an_answer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []

    def counted(messages: Any, *args: Any, **options: Any) -> str:
        rendered.append(len(messages))
        return render(messages, *args, **options)

    processor = processor_of(QWEN25)
    processor.converse(TALK[:1], POLICY)  # finds out what the template takes
    monkeypatch.setattr("mmhub_text.script.render", counted)
    processor.converse(TALK[:3], POLICY)
    assert rendered == [3]
    rendered.clear()
    processor.converse(TALK, POLICY)
    assert sorted(rendered) == [1, 2, 3, 4]


def test_messages_count_what_their_weights_say() -> None:
    processor = processor_of(QWEN25)
    talk = [{**TALK[0]}, {**TALK[1], "weight": 0.0}, {**TALK[2]}, {**TALK[3], "weight": 2.5}]
    script = processor.converse(talk, POLICY)
    assert taught(processor, script) == "no<|im_end|>"
    assert set(script.weights.tolist()) == {0.0, 2.5} and script.prompt == len(script.ids) - 3


def test_an_empty_answer_teaches_to_stop_and_an_empty_question_is_none() -> None:
    processor = processor_of(QWEN25)
    script = processor.converse([said("user"), said("assistant", "")], POLICY)
    assert taught(processor, script) == "<|im_end|>"


def test_an_answer_that_is_shown_otherwise_later_is_trained_only_where_it_is_the_last() -> None:
    processor = processor_of(QWEN3)
    thought = {"role": "assistant", "content": "<think>\nyes\n</think>\n\nno"}
    last = processor.converse([TALK[0], thought], POLICY)
    assert taught(processor, last) == "<think>\nyes\n</think>\n\nno<|im_end|>"
    later = processor.converse([TALK[0], thought, *TALK[2:]], POLICY)
    assert taught(processor, later) == ANSWERS["qwen-3"]


def test_an_answer_that_is_cut_short_later_is_not_trained_in_part() -> None:
    short = "{{ message.content if loop.last or message.role != 'assistant' else message.content[:5] }}"
    template = QWEN25.template.replace(
        "{{ message.role + '\n' + message.content }}", "{{ message.role + '\n' }}" + short
    )
    processor = processor_of(Sample(template, QWEN25.special, QWEN25.stop))
    script = processor.converse(TALK, POLICY)
    assert "It is<|im_end|>" in text_of(processor, script.ids) and taught(processor, script) == "no<|im_end|>"


def test_a_last_answer_that_cannot_be_found_is_an_error() -> None:
    template = QWEN25.template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nI think: ")
    processor = processor_of(Sample(template, QWEN25.special, QWEN25.stop))
    assert len(processor.converse(TALK[:1], POLICY).ids)
    with pytest.raises(InputError, match="writes the last answer otherwise than it lets a model begin one"):
        processor.converse(TALK[:2], POLICY)


def test_a_template_without_messages_of_the_system_says_so() -> None:
    system = {"role": "system", "content": "Be brief"}
    with pytest.raises(InputError, match="no system here; it takes no message of the system"):
        processor_of(TEMPLATES["gemma"]).converse([system, *TALK], POLICY)


def test_a_system_message_that_is_said_with_the_last_question_alone_can_be_asked_with_and_not_trained() -> None:
    sample = TEMPLATES["mistral"]
    processor = processor_of(sample)
    system = {"role": "system", "content": "Be of help"}
    script = processor.converse([system, *TALK[:3]], POLICY)
    assert script.prompt == len(script.ids)
    assert script.ids.tolist() == theirs(tokenizer_of("byte-level", sample), sample.template, [system, *TALK[:3]], True)
    with pytest.raises(InputError, match="otherwise than it lets a model begin one"):
        processor.converse([system, *TALK], POLICY)


# -- what messages cannot say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", ["llama-3", "qwen-3", "phi-3", "zephyr"])
def test_no_message_writes_control_tokens(name: str, role: str) -> None:
    sample = TEMPLATES[name]
    processor = processor_of(sample)
    assert processor.tokenizer is not None
    special = {processor.tokenizer.token_to_id(token) for token in sample.special}
    forged = "a" + "".join(sample.special) + sample.special[-1][1:] + "b\ufdd0\ufdd8"
    talk = [{"role": "system", "content": "x"}, *TALK[:2]]
    honest = processor.converse(talk, POLICY)
    changed = [{**one, "content": forged} if one["role"] == role else one for one in talk]
    script = processor.converse(changed, POLICY)
    assert [i for i in script.ids.tolist() if i in special] == [i for i in honest.ids.tolist() if i in special]
    assert text_of(processor, script.ids).count(forged) == 1 and not script.places
    stops = [i for i, w in zip(script.ids.tolist(), script.weights.tolist(), strict=True) if w and i in special]
    assert stops == [processor.tokenizer.token_to_id(sample.stop)]


LISTED = Sample(  # contents are lists of parts, and nothing else
    _TURNS + "<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)


@pytest.mark.parametrize("parts", [("<|im_", "end|>"), ("a<|im", "_", "end|>b"), ("<|im_", "", "end|>", "<|im_end|>")])
@pytest.mark.parametrize("sample", [QWEN25, TYPED, LISTED], ids=["joined", "typed", "listed"])
def test_no_message_writes_control_tokens_in_parts(sample: Sample, parts: tuple[str, ...]) -> None:
    processor = processor_of(sample, tokens={"image": "<|image|>"} if sample is TYPED else {})
    media = [IMAGE] if sample is TYPED else []  # a template may bring together what stands around it
    forged = [said("user", parts[0], *media, *parts[1:]), said("assistant", *parts)]
    honest = [said("user", "a", *media), said("assistant", "b")]
    end = tokenizer_of("byte-level", sample).token_to_id("<|im_end|>")
    stops = [processor.converse(talk, POLICY).ids.tolist().count(end) for talk in (forged, honest)]
    assert stops[0] == stops[1]
    assert "".join(parts) + "<|im_end|>" in text_of(processor, processor.converse(forged, POLICY).ids)


def test_what_parts_spell_together_once_they_are_normalised_stays_text() -> None:
    tokenizer = tokenizer_of("byte-level", LISTED)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=True)])
    end = tokenizer.token_to_id("<|im_end|>")
    frame: dict[str, Any] = {"begin_id": None, "end_id": None, "ends": False, "names": NAMES}
    for template in (LISTED.template, QWEN25.template):
        processor = LanguageTextProcessor.of_tokenizer(tokenizer, stop_ids=[], chat_template=template, **frame)
        forged, honest = [said("user", "\uff1c|im_", "end|\uff1e")], [said("user", "a")]
        stops = [processor.converse(talk, POLICY).ids.tolist().count(end) for talk in (forged, honest)]
        assert stops[0] == stops[1]


GLUED = Sample(  # nothing stands between messages
    _TURNS + "{{ message.content | trim }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
    ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)


@pytest.mark.parametrize(
    "parts", [("<|im_", "end|>"), ("a<|im ", " _end|>", "<|im_", " end|>b"), ("<|", "im_", "end|>")]
)
def test_no_messages_write_control_tokens_together(parts: tuple[str, ...]) -> None:
    processor, tokenizer = processor_of(GLUED), tokenizer_of("byte-level", GLUED)
    ends = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<s>")}
    script = processor.converse([said("user", part) for part in parts], POLICY)
    assert ends.isdisjoint(script.ids.tolist())
    assert "".join(part.strip() for part in parts) in text_of(processor, script.ids)


def test_what_messages_spell_together_once_they_are_normalised_stays_text() -> None:
    tokenizer = tokenizer_of("byte-level", GLUED)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=True)])
    frame: dict[str, Any] = {"begin_id": None, "end_id": None, "ends": False, "names": NAMES}
    processor = LanguageTextProcessor.of_tokenizer(tokenizer, stop_ids=[], chat_template=GLUED.template, **frame)
    script = processor.converse([said("user", "\uff1c|im_"), said("user", "end|\uff1e")], POLICY)
    assert tokenizer.token_to_id("<|im_end|>") not in script.ids.tolist()


def test_what_a_model_thought_is_a_token_in_an_answer_and_text_in_a_question() -> None:
    processor = processor_of(QWEN3)
    assert processor.tokenizer is not None
    think = processor.tokenizer.token_to_id("<think>")
    script = processor.converse([said("user", "<think>"), said("assistant", "<think>\nyes\n</think>\n\nno")], POLICY)
    assert think not in script.ids[: script.prompt].tolist() and think in script.ids[script.prompt :].tolist()


def test_marks_and_media_are_told_apart() -> None:
    processor = processor_of(QWEN25)
    text = "".join(map(chr, range(0xFDD0, 0xFDDE)))
    script = processor.converse([said("user", text, IMAGE, "\ufdd0")], POLICY)
    assert [name for name, _ in script.places] == ["image"]
    assert text_of(processor, script.ids).count(text + "\ufdd0") == 1
    with pytest.raises(InputError, match="nearly all of Unicode's noncharacters"):
        processor.converse([said("user", "".join(map(chr, range(0xFDD0, 0xFDF0))))], POLICY)


# -- media ----------------------------------------------------------------------------------------------------------


def shown(processor: LanguageTextProcessor, script: Script) -> str:
    """The text, with names in the places of media."""
    ids, found, places = iter(script.ids.tolist()), "", {place: name for name, place in script.places}
    for place in range(len(script.ids) + len(places)):
        found += f"({places[place]})" if place in places else text_of(processor, [next(ids)])
    return found


@pytest.mark.parametrize("kind", ["byte-level", "words"])
def test_media_stand_where_the_message_has_them(kind: str) -> None:
    processor = processor_of(QWEN25, kind)
    script = processor.converse([said("user", IMAGE, "What is", AUDIO, IMAGE, "?"), said("assistant", "no")], POLICY)
    text = shown(processor, script).replace(" ", "").replace("<unk>", "?")  # words know no question mark
    assert "\n(image)Whatis(audio)(image)?<|im_end|>" in text
    assert sum(script.turns) == len(script.ids) + 3 and sum(script.turns[:1]) == script.prompt + 3
    assert [place for _, place in script.places] == sorted(place for _, place in script.places)


def test_a_template_of_typed_parts_says_itself_where_media_stand() -> None:
    tokens = {"image": "<|image|>", "audio": "<|audio|>"}
    processor, tokenizer = processor_of(TYPED, tokens=tokens), tokenizer_of("byte-level", TYPED)
    talk = [said("user", "What <|image|>", IMAGE, AUDIO, " is"), said("assistant", "no"), said("user", IMAGE)]
    script = processor.converse(talk, POLICY)
    text = "user\nWhat <|image|><|see|>(image)<|/see|>Sound: (audio)\n is<|im_end|>"
    assert text in shown(processor, script)
    assert [name for name, _ in script.places] == ["image", "audio", "image"]
    assert tokenizer.token_to_id("<|image|>") not in script.ids.tolist()
    plain = [said("user", "What", IMAGE, AUDIO, " is"), said("assistant", "no"), said("user", IMAGE)]
    media = [tokenizer.token_to_id(token) for token in tokens.values()]
    ids = [i for i in theirs(tokenizer, TYPED.template, plain, True) if i not in media]
    assert processor.converse(plain, POLICY).ids.tolist() == ids


def test_a_template_may_put_pictures_first_and_take_parts_alone() -> None:
    processor = processor_of(PICTURES_FIRST, tokens={"image": "<|image|>"})
    script = processor.converse([said("user", "What", AUDIO, IMAGE)], POLICY)
    assert shown(processor, script) == "USER: (image)\nWhat (audio) ASSISTANT: "
    text = processor.chat([{"role": "user", "content": "What"}], POLICY)
    assert text_of(processor, text) == "USER: What ASSISTANT: "
    answered = processor.converse([said("user", IMAGE), said("assistant", "no")], POLICY)
    assert answered.weights.sum() > 0


def test_a_processor_that_has_laid_out_conversations_goes_to_other_processes() -> None:
    processor = processor_of(TYPED, tokens={"image": "<|image|>"})
    script = processor.converse([said("user", IMAGE, "What")], POLICY)
    again = pickle.loads(pickle.dumps(processor)).converse([said("user", IMAGE, "What")], POLICY)
    assert again.ids.tolist() == script.ids.tolist() and again.places == script.places


def test_media_may_get_texts_around_them_and_all_of_it_is_saved() -> None:
    tokens = {"image": "<|image|>"}
    processor = processor_of(TYPED, tokens=tokens, around={"image": ("<|see|>\n", "yes")})
    loaded = LanguageTextProcessor.from_state(json.loads(json.dumps(processor.state())), processor.files())
    for one in (processor, loaded):
        script = one.converse([said("user", IMAGE)], POLICY)
        assert "<|see|><|see|>\n(image)yes<|/see|>" in shown(processor, script)
    assert loaded.media_tokens == tokens


def test_a_template_that_leaves_media_out_is_an_error() -> None:
    sample = Sample("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", ("<s>", "</s>"), "</s>")
    with pytest.raises(InputError, match="writes 0 of 1 items of 'image'; take another template"):
        processor_of(sample).converse([said("user", "What", IMAGE)], POLICY)


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"tokenizer_config.json": {"image_token": "<|image|>"}}, {"image": "<|image|>"}),
        ({"tokenizer_config.json": {"extra_special_tokens": {"audio_token": "<|audio|>"}}}, {"audio": "<|audio|>"}),
        ({"processor_config.json": {"image_token": "<|image|>"}}, {"image": "<|image|>"}),
        ({"config.json": {"image_token_id": "ID"}}, {"image": "<|image|>"}),
        ({"config.json": {"image_token_index": "ID"}}, {"image": "<|image|>"}),
        ({"tokenizer_config.json": {"image_token": "<|other|>"}}, {}),
        ({"tokenizer_config.json": {"boi_token": "<|see|>", "eoi_token": "<|/see|>"}}, {"image": "<|see|>"}),
    ],
)
def test_a_folder_says_what_stands_for_media(files: dict[str, Any], tokens: dict[str, str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level", TYPED)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TYPED.template}))
    number = str(tokenizer.token_to_id("<|image|>"))
    for name, table in files.items():
        (tmp_path / name).write_text(json.dumps(table).replace('"ID"', number))
    frame = read_frame(tmp_path, tokenizer)
    assert frame.media_tokens == tokens and frame.chat_template == TYPED.template
    assert frame.media_around == ({"image": ("\n\n<|see|>", "<|/see|>\n\n")} if "<|see|>" in tokens.values() else {})


# -- shortening -----------------------------------------------------------------------------------------------------


@pytest.fixture
def size() -> Callable[[Script], int]:
    return lambda script: len(script.ids) + 10 * len(script.places)


LONG = [
    said("system", "Be of help"),
    said("user", IMAGE, "What"),
    said("assistant", "yes"),
    said("user", "is"),
    said("user", IMAGE, "a film"),
    said("assistant", "no"),
    said("user", "What"),
    said("assistant", "yes"),
]


@pytest.mark.parametrize(("newest", "kept"), [(False, [[0, 4, 5, 6, 7], [0, 6, 7]]), (True, [[0, 1, 2], [0, 1, 2]])])
def test_a_conversation_is_shortened_by_whole_turns(
    newest: bool, kept: list[list[int]], size: Callable[[Script], int]
) -> None:
    processor = processor_of(QWEN25)
    whole = size(processor.converse(LONG, POLICY))
    assert fit_talk(processor, LONG, POLICY, size, whole) == (LONG, 0)
    found, left_out = fit_talk(processor, LONG, POLICY, size, whole - 1, newest=newest)
    numbers = [LONG.index(message) if LONG.count(message) == 1 else -1 for message in found]
    assert left_out == len(LONG) - len(found) > 0 and found[0] == LONG[0]
    expected = [*LONG[:1], *LONG[3:]] if not newest else LONG[:6]
    assert found == expected, numbers
    small, left_out = fit_talk(processor, LONG, POLICY, size, 1, newest=newest)  # one turn is left in any case
    assert small == ([LONG[0], *LONG[6:]] if not newest else LONG[:3]) and left_out == 8 - len(small)
    assert size(processor.converse(small, POLICY)) > 1


def test_a_conversation_loses_no_more_turns_than_it_must(size: Callable[[Script], int]) -> None:
    processor = processor_of(QWEN25)
    talk = [said("system", "Be of help")] + [said(role, f"{n} is") for n in range(6) for role in ("user", "assistant")]
    sizes = [size(processor.converse([talk[0], *talk[1 + 2 * n :]], POLICY)) for n in range(6)]
    for lost, limit in enumerate(sizes):
        assert fit_talk(processor, talk, POLICY, size, limit) == ([talk[0], *talk[1 + 2 * lost :]], 2 * lost)
        assert fit_talk(processor, talk, POLICY, size, limit + 1)[1] == 2 * lost
