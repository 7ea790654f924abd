"""The watermark: transformers' own numbers, nothing changed on average, found again with the key and only with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

from mmhub.build import compose
from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.generate import detect, generate, write
from mmhub.generate.choice import filtered
from mmhub.generate.watermark import Mark, _library
from mmhub.interfaces import Generation, Watermark, decode_config, encode_config
from tests.text_decoders import Causal, stream_of, tiny_causal

CPU = torch.device("cpu")
MARK = Watermark(key="a secret", depth=8, ngram=3)
DRAWN = Generation(max_new_tokens=120, temperature=1.0)
WORDS = [first + second + "o" for first in "bdfgklmnprst" for second in "aeiou"]
MARKED = msgspec.structs.replace(DRAWN, watermark=MARK)


@pytest.fixture(scope="module")
def lm() -> Any:
    """An untrained language model on 60 words: each is about as probable, so that there is much to choose."""
    decoder = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "max_length": 256}}
    words = {"kind": "word"}
    return compose(task="language-modelling", decoder=decoder, tokenizer=words, texts=[" ".join(WORDS)] * 3).eval()


@pytest.fixture
def mmhub(lm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import mmhub.hub
    from mmhub.cli.main import cli

    def run(*args: object, model: Any = lm) -> Result:
        monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model)
        return CliRunner().invoke(cli, list(map(str, args)), standalone_mode=False)

    return run


def ids_of(settings: Generation, seed: int = 0) -> list[int]:
    decoder = Causal(tiny_causal("llama", 1))
    rows = write(decoder, stream_of(decoder, [[5, 9, 14]]), msgspec.structs.replace(settings, seed=seed))
    return list(rows[0][0].ids)


@pytest.mark.parametrize("settings", [DRAWN, Generation(temperature=0.7, top_k=9)], ids=["all", "top_k"])
def test_the_scores_are_those_of_transformers(settings: Generation) -> None:
    torch.manual_seed(0)
    ours, theirs = Mark(MARK, 2, CPU), _library(MARK, CPU)
    ids, changed = torch.zeros(2, 0, dtype=torch.long), []
    for _ in range(40):
        scores = filtered(torch.randn(2, 30), settings)
        found, expected = ours(scores), theirs(ids, scores)
        torch.testing.assert_close(found.softmax(1), expected.softmax(1))
        changed.append(not torch.equal(found, scores))
        token = torch.randint(0, 3, (2,))  # few, so that contexts come again
        ours.take(token)
        ids = torch.cat((ids, token[:, None]), 1)
    assert changed[: MARK.ngram] == [False, False, True] and not all(changed[MARK.ngram :])


def test_rows_keep_their_marks_when_others_end() -> None:
    torch.manual_seed(0)
    both, alone = Mark(MARK, 2, CPU), Mark(MARK, 1, CPU)
    for step in range(6):
        scores, token = torch.randn(2, 30), torch.randint(0, 30, (2,))
        found = both(scores) if step < 4 else both(scores[1:])
        torch.testing.assert_close(found[-1:], alone(scores[1:]))
        both.take(token if step < 4 else token[1:])
        alone.take(token[1:])
        if step == 3:
            both.select([1])


@pytest.mark.slow
def test_on_average_over_keys_nothing_is_more_or_less_probable() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 6)
    total = torch.zeros(1, 6)
    for number in range(150):
        mark = Mark(Watermark(key=str(number), depth=4, ngram=2), 1, CPU)
        mark.take(torch.tensor([3]))
        total += mark(scores).softmax(1)
    torch.testing.assert_close(total / 150, scores.softmax(1), atol=0.06, rtol=0)


def test_a_text_is_drawn_anew_with_a_mark_and_the_same_with_the_same_key() -> None:
    assert ids_of(MARKED) == ids_of(MARKED) != ids_of(DRAWN)
    other = msgspec.structs.replace(MARKED, watermark=Watermark(key="another", depth=8, ngram=3))
    assert ids_of(other) != ids_of(MARKED)


def test_marked_texts_are_found_with_their_key_alone(lm: Any) -> None:
    samples = [{"text": word} for word in WORDS[:8]]
    marked, plain = ([answer["text"] for answer in generate(lm, samples, settings)] for settings in (MARKED, DRAWN))
    assert all(found.marked for found in detect(lm, marked, MARK))
    assert sum(found.marked for found in detect(lm, plain, MARK)) <= 1
    assert sum(found.marked for found in detect(lm, marked, Watermark(key="another", depth=8, ngram=3))) <= 1


def test_p_says_how_often_chance_would_seem_as_marked(lm: Any) -> None:
    """Texts without a mark have p below any bound about as often as the bound says."""
    source = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(60, (40,), generator=source).tolist()) for _ in range(120)]
    chances = torch.tensor([found.p for found in detect(lm, texts, MARK)])
    for bound in (0.1, 0.25, 0.5):
        share = float((chances < bound).float().mean())
        assert abs(share - bound) < 4 * math.sqrt(bound * (1 - bound) / 120)


def test_repeated_words_count_once(lm: Any) -> None:
    one, many = detect(lm, [" ".join(WORDS[:7]), " ".join(WORDS[:7] * 20)], MARK)
    assert one.scored == 5 and many.scored == 7 and many.tokens == 140


def test_a_short_text_is_no_evidence(lm: Any) -> None:
    (found,) = detect(lm, ["a"], MARK)
    assert not found.marked and found.p == 1 and found.scored == 0


def test_a_watermark_needs_a_choice_and_a_key(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Generation(watermark=MARK)
    monkeypatch.delenv("MMHUB_WATERMARK_KEY", raising=False)
    with pytest.raises(UsageError, match="no key"):
        detect(lm, ["a text"])
    monkeypatch.setenv("MMHUB_WATERMARK_KEY", MARK.key)
    text = " ".join(WORDS)
    assert detect(lm, [text], Watermark(depth=8, ngram=3)) == detect(lm, [text], MARK)


def test_a_recipe_switches_it_on_and_its_absence_leaves_no_trace_in_a_checkpoint() -> None:
    assert decode_config(Generation, encode_config(MARKED), "generation") == MARKED
    assert "watermark" not in encode_config(DRAWN)
    small = {"dim": 16, "depth": 1, "heads": 2, "max_length": 64, "generation": encode_config(MARKED)}
    decoder = {"use": "transformer-lm", "config": small}
    model = compose(task="language-modelling", decoder=decoder, tokenizer={"kind": "byte"}).eval()
    (answer,) = model.predict([{"text": "a"}])
    (same,) = model.generate([{"text": "a"}], MARKED)
    assert answer["text"] == same["text"]


def test_commands_write_and_find_it(mmhub: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a secret\n")
    drawn = ("--temperature", 1, "--max-new-tokens", 100)
    text = mmhub("generate", "some", "bao", *drawn, "--watermark", f"@{tmp_path / 'key'}").stdout
    assert text == mmhub("generate", "some", "bao", *drawn, "--watermark", "a secret").stdout
    (tmp_path / "text").write_text(text)
    asked = ("detect", "some", "--file", tmp_path / "text", "--whole", "--json")
    found = json.loads(mmhub(*asked, "--watermark", "a secret").stdout)
    assert found["name"] == "some" and found["false_positives"] == 0.01
    (one,) = found["texts"]
    assert one["marked"] and one["p"] < 1e-4 and one["scored"] > 50
    (other,) = json.loads(mmhub(*asked, "--watermark", "another").stdout)["texts"]
    assert not other["marked"]
    assert mmhub("detect", "some", "a text", "--watermark", "x").stdout.split("\n")[1].startswith("no mark found")


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (["generate", "some", "a", "--watermark", "x"], UsageError, "above 0"),
        (["generate", "some", "a", "--temperature", "1", "--watermark", ""], UsageError, "empty"),
        (["detect", "some", "a", "--watermark", "@nowhere"], NotFoundError, "nowhere"),
        (["detect", "some", "a"], UsageError, "no key"),
        (["detect", "some"], UsageError, "give texts"),
        (["detect", "some", "a", "--whole"], UsageError, "--file"),
        (["detect", "some", "--file", "nowhere", "--whole", "--watermark", "x"], NotFoundError, "nowhere"),
    ],
)
def test_wrong_use_is_told_in_a_line(
    mmhub: Any, monkeypatch: pytest.MonkeyPatch, args: list[str], kind: type[MmhubError], said: str
) -> None:
    monkeypatch.delenv("MMHUB_WATERMARK_KEY", raising=False)
    error = mmhub(*args).exception
    assert isinstance(error, kind) and said in error.message and error.hint


def test_a_file_that_is_no_text_is_refused(mmhub: Any, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    error = mmhub("detect", "some", "--file", tmp_path / "image", "--whole", "--watermark", "x").exception
    assert isinstance(error, InputError) and "UTF-8" in error.message


def test_a_client_of_the_server_cannot_choose_the_watermark(lm: Any) -> None:
    writing = pytest.importorskip("mmhub_serve.writing")
    settings = pytest.importorskip("mmhub_serve.settings")
    errors = pytest.importorskip("mmhub_serve.errors")
    with pytest.raises(errors.Refused, match="watermark"):
        writing.settings_of(lm, {"watermark": None}, settings.Limits())


def test_the_key_is_not_kept_beside_a_table_that_is_answered(
    mmhub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(
        "mmhub.cli.predict.predict_rows", lambda model, data, out, same, how, as_json: kept.append(same)
    )
    table, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    mmhub("predict", "some", "--data", table, "--out", out, "--temperature", 1, "--watermark", "a secret")
    assert "watermark" in kept[0] and "a secret" not in str(kept)
