"""Writing: token for token what transformers writes, whatever else is in the batch; filters, seeds, stops, prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from mmhub.errors import InputError, UsageError
from mmhub.generate import Written, generate, write
from mmhub.generate.choice import Draw, Rules, filtered
from mmhub.generate.growing import GrowingText
from mmhub.interfaces import Generation
from tests.text_decoders import (
    BEGIN,
    END,
    Causal,
    Letters,
    Scripted,
    Seq2Seq,
    model_of,
    stream_of,
    tiny_causal,
    tiny_seq2seq,
)

PROMPTS = [[5, 9, 14], [4, 8, 15, 16, 23, 30, 7], [11]]
CAUSAL = ("llama", "gpt2")
KINDS = (*CAUSAL, "bart", "t5", "marian")


def tiny(kind: str, seed: int) -> Any:
    return tiny_causal(kind, seed) if kind in CAUSAL else tiny_seq2seq(kind, seed)


def decoder_of(kind: str, model: Any) -> Any:
    return Causal(model) if kind in CAUSAL else Seq2Seq(model)


def reference(kind: str, model: Any, prompts: Sequence[Sequence[int]], settings: Generation) -> list[list[list[int]]]:
    """What transformers' `generate` writes for prompts that it pads its own way: two texts each, if there are beams."""
    width = max(map(len, prompts))
    left = kind in CAUSAL
    ids = [[0] * (width - len(p)) * left + list(p) + [0] * (width - len(p)) * (not left) for p in prompts]
    mask = [[int(i > 0) for i in row] for row in ids]
    best = min(2, settings.beams)
    names = ("max_new_tokens", "early_stopping", "length_penalty", "repetition_penalty")
    options = {name: getattr(settings, name) for name in names}
    if settings.min_new_tokens:
        options["min_new_tokens"] = settings.min_new_tokens
    found = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        num_beams=settings.beams,
        num_return_sequences=best,
        **options,
    )[:, width if left else 1 :].tolist()
    ended = [row[: row.index(END) + 1] if END in row else row for row in found]
    return [ended[start : start + best] for start in range(0, len(ended), best)]


def ours(decoder: Any, prompts: Sequence[Sequence[int]], settings: Generation, **more: Any) -> list[list[list[int]]]:
    samples = min(2, settings.beams)
    rows = write(decoder, stream_of(decoder, prompts), settings, samples=samples, **more)
    return [[list(found.ids) for found in row] for row in rows]


GREEDY, BEAMS = Generation(max_new_tokens=9), Generation(max_new_tokens=9, beams=3)
EARLY = msgspec.structs.replace(BEAMS, early_stopping=True, length_penalty=0.4)


@pytest.mark.parametrize(
    ("kind", "seed", "settings"),
    [
        ("llama", 1, GREEDY),
        ("gpt2", 6, EARLY),
        ("bart", 7, EARLY),
        ("t5", 5, BEAMS),
    ],
)
def test_what_is_written_is_token_for_token_that_of_transformers(kind: str, seed: int, settings: Generation) -> None:
    model = tiny(kind, seed)
    decoder = decoder_of(kind, model)
    expected = reference(kind, model, PROMPTS, settings)
    assert len({len(row[0]) for row in expected}) > 1, "take a seed with which rows end at different times"
    assert ours(decoder, PROMPTS, settings) == expected
    assert [ours(decoder, [prompt], settings)[0] for prompt in PROMPTS] == expected
    assert ours(decoder, PROMPTS[1:], settings, cache=False) == expected[1:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_every_setting_of_beams_and_penalties_writes_what_transformers_writes(kind: str, seed: int) -> None:
    model = tiny(kind, seed)
    decoder = decoder_of(kind, model)
    changes: list[dict[str, Any]] = [
        {},
        {"beams": 4},
        {"beams": 4, "early_stopping": True},
        {"beams": 2, "length_penalty": -1.0},
        {"beams": 5, "length_penalty": 2.5},
        {"beams": 4, "min_new_tokens": 5},
        {"min_new_tokens": 5},
    ]
    changes += [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.8, "beams": 3}]
    for change in changes:
        settings = Generation(max_new_tokens=14, **change)
        expected = reference(kind, model, PROMPTS, settings)
        assert ours(decoder, PROMPTS, settings) == expected, change
        assert [ours(decoder, [prompt], settings)[0] for prompt in PROMPTS] == expected, change


def test_a_repetition_penalty_counts_the_prompt_and_what_is_written_as_transformers_does() -> None:
    cases = (("gpt2", 3, 1, 1.5), ("gpt2", 3, 3, 1.5), ("bart", 8, 1, 1.3), ("bart", 8, 3, 1.3))
    for kind, seed, beams, penalty in cases:
        model = tiny(kind, seed)  # a BART's start token counts, too: with these seeds it makes a difference
        least = 4 if kind == "gpt2" else 0
        settings = Generation(max_new_tokens=9, repetition_penalty=penalty, min_new_tokens=least, beams=beams)
        expected = reference(kind, model, PROMPTS, settings)
        assert ours(decoder_of(kind, model), PROMPTS, settings) == expected
        assert expected != reference(kind, model, PROMPTS, Generation(max_new_tokens=9, beams=beams))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "length_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_setting_is_a_finite_number(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got {value}"):
        msgspec.structs.replace(Generation(), **{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        Generation(temperature=0.7, top_k=5),
        Generation(temperature=1.0, top_k=1000),
        Generation(temperature=1.3, top_p=0.8),
        Generation(temperature=0.5, top_p=1e-9),
        Generation(temperature=1.0, min_p=0.2),
        Generation(temperature=1.0, min_p=1.0),
        Generation(temperature=2.0, top_k=9, top_p=0.6, min_p=0.3),
    ],
)
def test_filters_keep_the_same_tokens_as_those_of_transformers(settings: Generation) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chain.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        chain.append(MinPLogitsWarper(settings.min_p))
    scores = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    scores[::3] = scores[::3].round()  # ties
    expected: torch.Tensor = chain(torch.zeros(64, 1, dtype=torch.long), scores)  # type: ignore[assignment]
    assert torch.equal(filtered(scores, settings), expected)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    settings = Generation(temperature=1.0, top_k=4, seed=5)
    many = 4000
    ids = Draw(settings, [(row, 0) for row in range(many)], scores.device)(scores.expand(many, -1))
    expected = scores[0].softmax(0)
    shares = ids.bincount(minlength=5) / many
    assert shares[4] == 0
    assert (shares - expected).abs().max() < 4 * (0.25 / many) ** 0.5


def drawn(prompts: Sequence[str], **more: Any) -> list[list[str]]:
    decoder = Scripted(scores=torch.linspace(0, 1, Letters().vocab_size))
    settings = Generation(max_new_tokens=12, temperature=1.0, seed=more.pop("seed", 0))
    ids = [Letters().prompt(prompt, None).tolist() for prompt in prompts]  # type: ignore[arg-type]
    return [[found.text for found in row] for row in write(decoder, stream_of(decoder, ids), settings, **more)]


def test_what_a_row_draws_depends_on_the_seed_its_number_and_its_sample_alone() -> None:
    first = drawn(["a", "bcd", "e"], samples=2)
    texts = [text for row in first for text in row]
    assert len(set(texts)) == len(texts)
    assert drawn(["a", "bcd", "e"], samples=2) == first
    assert drawn(["bcd"], samples=2, rows=[1]) == [first[1]]
    assert drawn(["bcd"], rows=[1]) == [first[1][:1]]
    assert drawn(["e", "a"], rows=[2, 0]) == [[first[2][0]], [first[0][0]]]
    assert drawn(["a", "bcd", "e"], samples=2, seed=1) != first


def test_a_longer_text_begins_with_the_shorter_one() -> None:
    decoder = Scripted(scores=torch.zeros(Letters().vocab_size).index_fill_(0, torch.tensor([END]), -99.0))
    long, short = (
        write(decoder, stream_of(decoder, [[BEGIN]]), Generation(max_new_tokens=n, temperature=1.0))[0][0].ids
        for n in (150, 70)
    )
    assert long[:70] == short
    assert len(long) == 150


def scripted(texts: Any, prompts: Sequence[str] = ("",), **more: Any) -> list[Written]:
    decoder = Scripted(texts, context=more.pop("context", None))
    stream, samples = more.pop("stream", None), more.pop("samples", 1)
    ids = [Letters().prompt(prompt, None).tolist() for prompt in prompts]  # type: ignore[arg-type]
    settings = Generation(max_new_tokens=40) if not more else Generation(**({"max_new_tokens": 40} | more))
    rows = write(decoder, stream_of(decoder, ids), settings, stream=stream, samples=samples)
    return [found for row in rows for found in row]


def test_a_text_ends_with_an_end_token_a_stop_text_or_its_length() -> None:
    (ended,), (stopped,), (cut,) = (
        scripted("the house"), scripted("the house. a", stop=("use.", "x")), scripted("the house", max_new_tokens=5)
    )  # fmt: skip
    assert (ended.text, ended.finish, ended.ids[-1]) == ("the house", "end", END)
    assert (stopped.text, stopped.finish) == ("the ho", "stop")
    assert (cut.text, cut.finish) == ("the h", "length")


def test_beams_end_at_a_stop_text_too() -> None:
    (found,) = scripted("the house. a", stop=("use.",), beams=2)
    assert (found.text, found.finish) == ("the ho", "stop")


def test_the_score_is_the_log_probability_of_the_tokens_before_any_temperature_or_penalty() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0, *[0.0] * (Letters().vocab_size - 5)])
    one = float(scores.log_softmax(0)[4])
    for settings in (
        Generation(max_new_tokens=3),
        Generation(max_new_tokens=3, beams=2, min_new_tokens=3, repetition_penalty=1.01),
        Generation(max_new_tokens=3, temperature=0.01),
    ):
        decoder = Scripted(scores=scores)
        ((found,),) = write(decoder, stream_of(decoder, [[BEGIN]]), settings)
        assert found.text == "aaa"
        assert found.score == pytest.approx(3 * one, rel=1e-5)


def test_rows_that_have_ended_are_not_computed_any_more() -> None:
    decoder = Scripted({"a": "b", "c": "defg", "e": "xy"})
    prompts = [Letters().prompt(text, None).tolist() for text in "ace"]  # type: ignore[arg-type]
    write(decoder, stream_of(decoder, prompts), Generation(max_new_tokens=9))
    assert decoder.steps == [3, 2, 1, 1]


def test_a_length_penalty_decides_between_short_and_long_texts() -> None:
    scores = torch.zeros(Letters().vocab_size)
    scores[4], scores[END] = 5.0, 4.9
    decoder = Scripted(scores=scores)
    lengths = []
    for penalty in (0.0, 4.0):
        settings = Generation(max_new_tokens=6, beams=2, length_penalty=penalty)
        ((found,),) = write(decoder, stream_of(decoder, [[BEGIN]]), settings)
        lengths.append(len(found.ids))
    assert lengths == [1, 6]


def test_early_stopping_ends_the_work_as_soon_as_every_beam_has_ended() -> None:
    scores = torch.linspace(0, 1, Letters().vocab_size)
    scores[4], scores[END] = 5.0, 4.9  # the longest text is always a little better
    steps = []
    for early in (True, False):
        decoder = Scripted(scores=scores)
        settings = Generation(max_new_tokens=20, beams=2, length_penalty=4.0, early_stopping=early)
        write(decoder, stream_of(decoder, [[BEGIN]]), settings)
        steps.append(len(decoder.steps))
    assert steps[0] == 1 < steps[1]


def test_a_stream_never_shows_a_part_of_a_stop_text() -> None:
    shown: list[str] = []
    (found,) = scripted("one\ntwo\nUser: hi", stop=("\nUser:",), stream=lambda row, sample, text: shown.append(text))
    assert "".join(shown) == found.text == "one\ntwo"
    assert "\n" not in shown  # it was held back until the next letter showed that nothing stops
    assert "\nt" in shown


def test_a_streamed_text_is_the_text_for_every_row_and_sample() -> None:
    shown: dict[tuple[int, int], str] = {}

    def stream(row: int, sample: int, text: str) -> None:
        shown[row, sample] = shown.get((row, sample), "") + text

    found = scripted({"a": "b c", "c": "d"}, ["a", "c"], samples=2, stream=stream)
    assert [shown[key] for key in sorted(shown)] == [one.text for one in found] == ["b c", "b c", "d", "d"]


PIECES = [b"Gr", b"\xc3", b"\xbc", b"\xc3\x9f", b"e \xf0\x9f", b"\x99", b"\x82 an", b" alle", b"."]


def test_a_character_that_spans_tokens_is_shown_once_it_is_whole() -> None:
    growing = GrowingText(lambda ids: b"".join(PIECES[i] for i in ids).decode("utf-8", "replace"))
    shown = []
    for token in range(len(PIECES)):
        growing.add(token)
        shown.append(growing.news())
    assert "".join(shown) == "Grüße \U0001f642 an alle."
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


@pytest.mark.parametrize("kind", ["bytes", "blanks in front", "words"])
def test_a_long_text_grows_as_it_is_decoded_whole_without_decoding_it_whole_each_time(kind: str) -> None:
    words = ["▁the", "▁hou", "se", "▁is", "▁b", "lue", "."] if kind != "words" else ["the", "house", "is", "blue", "."]
    sizes: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        parts = [words[i % len(words)] for i in ids]
        if kind == "words":
            return " ".join(parts)
        text = "".join(parts).replace("▁", " ")
        return text.removeprefix(" ") if kind == "blanks in front" else text

    growing = GrowingText(decode, stop=("nowhere",))
    shown = ""
    for token in range(400):
        assert not growing.add(token)
        shown += growing.news()
    shown += growing.news(final=True)
    assert shown == growing.text == decode(range(400))
    assert max(sizes[:-1]) < 120


def test_a_prompt_leaves_room_in_the_context_and_the_text_ends_where_it_does() -> None:
    (found,) = scripted("the house", ["ab"], context=8)
    assert (found.text, found.finish) == ("the h", "length")  # <s> a b, and five more
    with pytest.raises(InputError, match="the prompt has 4 tokens, and the model's context is 4") as error:
        scripted("x", ["a", "abc"], context=4)
    assert error.value.row == 1


def test_no_more_texts_than_beams_can_be_asked_for() -> None:
    with pytest.raises(UsageError, match="3 texts were asked for, of 2 beams"):
        scripted("x", beams=2, samples=3)


def test_no_end_token_comes_before_the_least_number_of_tokens() -> None:
    decoder = Scripted("ab")
    for beams in (1, 2):
        settings = Generation(max_new_tokens=6, min_new_tokens=5, beams=beams)
        ((found,),) = write(decoder, stream_of(decoder, [[BEGIN]]), settings)
        assert END not in found.ids[:5]
    rules = Rules(Generation(min_new_tokens=2, max_new_tokens=3), [[]], [END])
    scores = torch.zeros(1, 5)
    assert [bool(rules(scores, step)[0, END] == -torch.inf) for step in range(3)] == [True, True, False]
    assert not scores.any()


@pytest.mark.gpu
def test_a_gpu_writes_what_the_cpu_writes() -> None:
    for settings in (Generation(max_new_tokens=12), Generation(max_new_tokens=12, beams=3),
                     Generation(max_new_tokens=12, temperature=0.9, top_k=8, top_p=0.9, seed=2)):  # fmt: skip
        model = tiny("llama", seed=1)
        expected = ours(Causal(model), PROMPTS, settings)
        decoder = Causal(model.to("cuda"))
        bundle = {name: stream.to("cuda") for name, stream in stream_of(decoder.cpu(), PROMPTS).items()}
        decoder.to("cuda")
        rows = write(decoder, bundle, settings, samples=min(2, settings.beams))
        assert [[list(found.ids) for found in row] for row in rows] == expected


# -- samples of a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    """A real model whose decoder writes what the tests tell it."""
    from mmhub.build import compose

    small = {"dim": 16, "depth": 1, "heads": 2, "max_length": 24}
    return compose(
        task="language-modelling",
        decoder={"use": "transformer-lm", "config": small},
        tokenizer={"kind": "byte"},
    ).eval()


def test_samples_are_answered_in_order_whatever_is_in_their_batch(model: Any) -> None:
    samples = [{"text": text} for text in ("abcdef", "", "hello world", "x", "ab")]
    settings = Generation(max_new_tokens=6, temperature=1.0)
    together = model.generate(samples, settings)
    for size in (1, 2):
        apart = model.generate(samples, settings, batch_size=size)
        assert [a["text"] for a in apart] == [a["text"] for a in together]
        assert [a["score"] for a in apart] == pytest.approx([a["score"] for a in together], rel=1e-4)
    assert [a["text"] for a in model.generate(samples[3:], settings, first=3)] == [a["text"] for a in together[3:]]
    assert {a["finish"] for a in together} <= {"end", "length"}


def test_several_texts_of_a_sample_come_as_lists(model: Any) -> None:
    settings = Generation(max_new_tokens=5, temperature=1.0)
    (found,) = model.generate([{"text": "ab"}], settings, n=3)
    (single,) = model.generate({"text": "ab"}, settings)
    assert set(found) == {"texts", "finish", "score"}
    assert found["texts"][0] == single["text"]
    assert len({*found["texts"]}) == 3


def test_a_prompt_longer_than_the_context_is_an_error_or_loses_its_first_tokens_and_says_so(model: Any) -> None:
    long, settings = "abcdefgh" * 5, Generation(max_new_tokens=4)
    with pytest.raises(InputError, match=r"the prompt has 41 tokens, and the model's context of 24 ") as error:
        model.generate([{"text": "a"}, {"text": long}], settings)
    assert error.value.row == 1
    (found,) = model.generate([{"text": long}], settings, truncate=True)
    assert found["truncated"] == 41 - 20
    kept = (model.generate([{"text": long[-19:]}], settings))[0]  # <s> stays in front
    assert kept | {"truncated": 21} == found


def test_what_writes_no_text_says_so() -> None:
    decoder: Any = torch.nn.Linear(1, 1)
    decoder.reads_text = False
    with pytest.raises(UsageError, match="this model is for language-modelling and writes no text"):
        generate(model_of(decoder), [{"text": "a"}])


def test_samples_that_are_none_are_refused_with_their_place(model: Any) -> None:
    with pytest.raises(UsageError, match="no input 'txt'; did you mean 'text'"):
        model.generate([{"txt": "a"}])
    with pytest.raises(InputError, match="the sample is empty"):
        model.generate([{"text": "a"}, {"text": None}])


class Refusing:
    """A guard that lets no sample pass that says "bomb", and no answer that holds the letter it is given."""

    name = "test"

    def __init__(self, forbidden: str) -> None:
        self._forbidden = forbidden

    def check(self, sample: Any) -> str | None:
        return "no bombs" if "bomb" in sample["text"] else None

    def review(self, sample: Any, answer: Any) -> Any:
        text = answer["text"]
        return {"refused": "bad text", "guard": "own"} if text == self._forbidden else answer | {"text": text.upper()}


@pytest.fixture
def guarded(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a guard watch the model: returns a function that takes the text it does not let pass."""
    from mmhub.guard import Guards
    from mmhub.plugins import get_index

    def guard(forbidden: str = "") -> Any:
        guards = Guards(model)
        guards._guards = [(get_index().plugins[0], Refusing(forbidden))]  # type: ignore[list-item]
        monkeypatch.setattr(model, "_guards", guards)
        return model

    return guard


def test_guards_see_prompts_and_texts_before_anything_is_shown(guarded: Any, model: Any) -> None:
    settings, shown = Generation(max_new_tokens=5, temperature=1.0), []
    samples = [{"text": "a bomb"}, {"text": "ab"}]
    free = model.generate(samples, settings)
    found = guarded().generate(samples, settings, stream=lambda row, sample, text: shown.append((row, text)))
    assert found[0] == {"refused": "no bombs", "guard": found[0]["guard"]}
    assert found[1]["text"] == free[1]["text"].upper()  # drawn as row 1 although row 0 was refused
    assert shown == [(1, found[1]["text"])]


def test_guards_see_each_of_several_texts(guarded: Any, model: Any) -> None:
    settings = Generation(max_new_tokens=5, temperature=1.0)
    (free,) = model.generate([{"text": "ab"}], settings, n=3)
    (found,) = guarded(free["texts"][1]).generate([{"text": "ab"}], settings, n=3)
    assert found["texts"] == [free["texts"][0].upper(), None, free["texts"][2].upper()]
    assert found["refused"] == [None, "bad text", None]


def test_a_sample_that_cannot_be_read_is_named_by_its_own_row_however_many_texts_are_asked_for(guarded: Any) -> None:
    for bad, text in (("a" * 99, "the prompt has"), (None, "the sample is empty")):
        samples = [{"text": "ab"}, {"text": "bomb"}, {"text": bad}]
        with pytest.raises(InputError, match=text) as caught:
            guarded("x").generate(samples, Generation(max_new_tokens=2), n=3)
        assert (caught.value.row, caught.value.__notes__) == (2, ["in sample 2"])


def test_settings_come_from_the_model_unless_they_are_given(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Generation(max_new_tokens=3, stop=("nowhere",))
    monkeypatch.setattr(model.decoder, "config", msgspec.structs.replace(model.decoder.config, generation=own))
    (found,) = model.predict([{"text": "ab"}])
    assert found == model.generate([{"text": "ab"}], own)[0]
    assert found != model.generate([{"text": "ab"}], Generation(max_new_tokens=9))[0]


def test_a_temperature_near_zero_draws_the_most_probable_token() -> None:
    scores = torch.tensor([[1.0, 50.0, -3.0], [-2.0, -40.0, -1.0]])
    for temperature in (1e-300, 1e-45, 1e-6):
        draw = Draw(Generation(temperature=temperature, seed=1), [(0, 0), (1, 0)], scores.device)
        assert draw(scores).tolist() == [1, 2]


def test_scores_that_are_no_numbers_draw_a_token_that_exists() -> None:
    draw = Draw(Generation(temperature=1.0), [(0, 0)], torch.device("cpu"))
    assert 0 <= int(draw(torch.full((1, 3), torch.nan))) < 3
