"""The guards `wordlist`, `pattern` and `length`: what they refuse, and what they must not."""

# ruff: noqa: RUF001 - look-alikes are what this is about

from __future__ import annotations

import time

import pytest

from mmhub.errors import UsageError
from mmhub.interfaces import decode_config
from mmhub.spec import Change, Refusal
from mmhub_guards.length import Length
from mmhub_guards.pattern import Pattern
from mmhub_guards.wordlist import WordList

WORDS: tuple[str, ...] = (
    "ass", "cum", "hell", "tit", "cock", "rape", "damn", "kill yourself", "naïve", "дурак", "σκατά", "scheiße", "ano",
    "炸弹", "bomb", "ばか", "バカ", "사기", "ไทย", "कम",
)  # fmt: skip

BLOCKED = (
    """
ass
You ASS!
what an Ass.
ａｓｓ
a\u200bss
a\u00adss
аss
аѕѕ
a\u0336s\u0336s\u0336
a\u0301\u0316s\u0488s\u20dd
a\x00ss
as\x08s
as\ufffds
a\ue000ss
as\u0378s
as\u2800s
as\ufe0fs
as\U000e0101s
(ass)
"ass"
ass_hat
dumb-ass
ass,cum
go to hell
HELL
hеll
ｈｅｌｌ
he\u2060ll
DAMN it
damn.
dаmn
kill yourself
Kill  Yourself
kill\nyourself
kill-yourself
KILL\u00a0YOURSELF
NAÏVE
nai\u0308ve
дурак
ДУРАК
Σκατά
ΣΚΑΤΆ
Scheiße
我不喜欢炸弹。
炸弹bomb
bomb炸弹
あなたはばかだ
ﾊﾞｶ
그것은 사기이다.
คนไทยใจดี
यह कम है
tit
𝐡𝐞𝐥𝐥
ⓗⓔⓛⓛ
""".replace("kill\nyourself\n", "")
    .strip()
    .split("\n")
)
BLOCKED.append("kill\nyourself")

INNOCENT = """
classic
assassin
He assesses the class
bass guitar
a glass of water
Passau
embarrassed
document
cucumber
accumulate
circumstances
Scunthorpe United
Penistone
Cockburn Street
a cocktail
peacock
hancock
shell
hello
Michelle
shellfish
seashells
title
constitution
Titania
petite
grape
drapes
therapist
scrape
skill yourself
kill your darlings yourself
damned
goddamnit
Amsterdam
wassail
Massachusetts
compass
Er aß einen Apfel, und wir aßen auch.
Das Spaß-Faß ist naß.
Meine Mutter isst ungern.
Die Luft ist schwül.
Une pizza au fromage râpé.
Des cônes et des pâtes.
Ça va très bien, maçon.
¡Feliz año nuevo!
¿Cuántos años tienes?
Tôi bị cúm tuần trước.
Ela comeu uma maçã com o avô.
Příliš žluťoučký kůň.
Zażółć gęślą jaźń.
Köttbullar är gott.
Hän on suomalainen.
Bir şey değil.
Это хорошо, и сегодня нет дождя.
Придурака нет.
Η ώρα είναι τρεις.
墓はどこですか
はか と はし
इसमें कमी है।
यह कमरा बड़ा है।
我喜欢苹果。
오늘은 날씨가 좋다.
วันนี้อากาศดี
""".strip().split("\n")


def guard(**config: object) -> WordList:
    return WordList(decode_config(WordList.Config, {"words": WORDS} | config, "config"))


@pytest.mark.parametrize("text", BLOCKED)
def test_a_listed_word_is_found_however_it_is_spelled(text: str) -> None:
    found = guard().check({"text": text})
    assert isinstance(found, Refusal)
    assert found.rule in WORDS
    assert found.reason == "it holds a listed word"


def test_innocent_words_that_hold_a_listed_one_pass() -> None:
    assert len(INNOCENT) >= 30
    assert [text for text in INNOCENT if guard().check({"text": text})] == []
    assert [text for text in INNOCENT if guard(leet=True).check({"text": text})] == []


def test_accents_are_folded_where_that_is_asked_for() -> None:
    spelled = ["ásş", "héll", "naive", "ΣΚΑΤΑ", "año", "hełl", "rąpé"]
    assert not any(guard().check({"text": text}) for text in spelled if "ł" not in text)
    assert all(guard(accents=True, words=(*WORDS, "hell")).check({"text": text}) for text in spelled)
    assert not any(guard(accents=True).check({"text": text}) for text in ("er aß", "はか", "faß"))


def test_digits_and_signs_for_letters_are_read_where_that_is_asked_for() -> None:
    spelled = ["h3ll", "a55", "a$s", "d4mn", "t1t", "H3LL!"]
    assert not any(guard().check({"text": text}) for text in spelled)
    assert all(guard(leet=True).check({"text": text}) for text in spelled)
    numbers = ["455", "1 a55e55", "room 455", "at 10:45", "$5.00", "C3PO", "7!7"]
    assert not any(guard(leet=True).check({"text": text}) for text in numbers)


def test_listed_words_are_replaced_in_place_and_nothing_else_is() -> None:
    clean = guard(action="replace", replacement="#").clean
    assert (
        clean("An аss, a class, ａｓｓ - he\u200bll and cafe\u0301 nai\u0308ve!")
        == "An #, a class, # - # and cafe\u0301 #!"
    )
    assert clean("bad\u0301 a\u0336ss\u200b!我炸弹") == "bad\u0301 #!我#"
    sample = {"text": "a class"}
    assert guard(action="replace").rewrite(sample) is sample


def test_samples_of_every_shape_are_looked_at() -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "da"}, {"type": "text", "text": "mn"}]}]
    shapes = [{"text": ["fine", "damn"]}, {"text": {"premise": "a", "hypothesis": "damn"}}, {"messages": said}]
    shapes.append({"text": ["go", "kill", "yourself"]})
    assert all(guard().check(sample) for sample in shapes)
    assert guard(action="replace").check(shapes[-1])  # it cannot be said which word to replace
    changed = guard(action="replace").rewrite({"messages": said, "image": None})
    assert isinstance(changed, Change)
    assert changed.value["messages"][0]["content"] == [{"type": "text", "text": "***"}]
    assert changed.rule == "damn"


def test_answers_are_refused_or_cleaned_with_all_that_repeats_them() -> None:
    answer = {
        "text": "damn good",
        "words": [{"word": "damn", "start": 0.0, "end": 0.5}],
        "segments": [{"text": "damn"}],
    }
    found = guard().review({}, answer)
    assert isinstance(found, Refusal)
    changed = guard(action="replace").review({}, answer)
    assert isinstance(changed, Change)
    assert changed.value == {"text": "*** good", "segments": [{"text": "***"}]}
    phrase = {"words": [{"word": "kill"}, {"word": "yourself"}]}
    assert isinstance(guard().review({}, phrase), Refusal)
    tagged = {"tags": ["O", "O"], "words": ["kill", "yourself"], "entities": [{"label": "X", "text": "kill"}]}
    assert isinstance(guard().review({}, tagged), Refusal)
    changed = guard(action="replace").review({}, tagged)
    assert isinstance(changed, Change) and changed.value == {"tags": ["O", "O"]}
    innocent = {"tags": ["O"], "words": ["class"], "entities": []}
    assert guard().review({}, innocent) is innocent
    assert guard(action="replace").review({}, innocent) is innocent
    fine = {"label": "damn", "score": 0.5}  # labels are the model's, and no text
    assert guard().review({}, fine) is fine


def test_segments_are_read_as_one_text_and_left_out_where_they_share_what_is_replaced() -> None:
    said = {"text": "go kill yourself", "segments": [{"text": "go kill"}, {"text": "yourself"}]}
    assert isinstance(guard().review({}, {"segments": said["segments"]}), Refusal)
    changed = guard(action="replace").review({}, said)
    assert isinstance(changed, Change) and changed.value == {"text": "go ***"}


def test_a_long_text_is_searched_in_no_time() -> None:
    start = time.perf_counter()
    assert guard(action="replace").clean("damn " * 40_000) == "*** " * 40_000
    assert time.perf_counter() - start < 3
    start = time.perf_counter()
    assert not guard(leet=True).check({"text": "a-" * 10_000 + "é" * 10_000})
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"words": []}, "'words' needs words that are not empty"),
        ({"words": ["\u200b"]}, "'words' needs words that are not empty"),
        ({"words": ["a"], "action": "drop"}, "action"),
        ({"words": ["a"], "on": []}, "'on' is empty"),
        ({"word": ["a"]}, "unknown key 'word'; did you mean 'words'"),
    ],
)
def test_a_wrong_word_list_says_what_is_wrong(config: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_config(WordList.Config, config, "config")


def pattern(**config: object) -> Pattern:
    return Pattern(decode_config(Pattern.Config, config, "config"))


def test_patterns_refuse_or_replace_by_their_names() -> None:
    refusing = pattern(patterns={"ticket": r"TCK-\d{6}", "shout": r"[A-Z]{12,}"})
    found = refusing.check({"text": "see TCK-123456"})
    assert found == Refusal("it matches the pattern 'ticket'", "ticket")
    assert refusing.check({"text": "see TCK-12"}) == ""
    assert pattern(patterns={"ticket": r"TCK-\d{6}"}, action="replace").clean("TCK-123456!") == "[ticket]!"


def test_a_pattern_that_would_take_for_ever_is_stopped_and_refuses() -> None:
    slow = pattern(patterns={"slow": r"^(a|b|ab)*c$"}, seconds=0.05)
    start = time.perf_counter()
    with pytest.raises(TimeoutError):  # which the core takes for a refusal
        slow.check({"text": "ab" * 40 + "cd"})
    assert time.perf_counter() - start < 2


def test_the_time_of_a_pattern_has_a_bound() -> None:
    with pytest.raises(UsageError, match="'seconds' is above 0 and up to 60"):
        pattern(patterns={"a": "b"}, seconds=1e300)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a": "("}, "is no regular expression"),
        ({"a": "x*"}, "matches nothing"),
        ({}, "needs a"),
        ({"a": "(?:(?:(?:a?){500}){500}){500}"}, "are too large"),
        ({"a": "(?:" * 80 + "a?" + "){2}" * 80}, "are too large"),
        ({"a": "(" * 2000 + "a" + ")" * 2000}, "is too large: RecursionError"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(patterns: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pattern(patterns=patterns)


def test_what_is_too_long_is_refused() -> None:
    guard = Length(Length.Config(characters=5))
    assert guard.check({"text": ["abc", "de"]}) == ""
    assert guard.check({"text": ["abc", "def"]}) == Refusal("it has 6 characters, more than 5", "characters")
