"""`mmhub generate`, `mmhub score`, and the options of generation of `mmhub predict`."""

from __future__ import annotations

import json
import math
import os
import pty
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

from mmhub.cli.writing import read_lines, read_settings, shown
from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.generate import generate
from mmhub.interfaces import Generation
from tests.conftest import Cli
from tests.text_decoders import Scripted, model_of


@pytest.fixture(scope="module")
def lm() -> Any:
    """A small untrained language model on bytes, with room for 32 tokens."""
    from mmhub.build import compose

    small = {"dim": 16, "depth": 1, "heads": 2, "max_length": 32}
    decoder = {"use": "transformer-lm", "config": small}
    return compose(task="language-modelling", decoder=decoder, tokenizer={"kind": "byte"}).eval()


@pytest.fixture
def mmhub(lm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process, on this model or another."""
    import mmhub.hub
    from mmhub.cli.main import cli

    def run(*args: object, model: Any = lm, stdin: str | bytes = "") -> Result:
        monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model)
        return CliRunner().invoke(cli, list(map(str, args)), input=stdin, standalone_mode=False)

    return run


def error_of(done: Result) -> MmhubError:
    assert isinstance(done.exception, MmhubError), done
    return done.exception


def test_prompts_come_from_arguments_stdin_and_files(mmhub: Any, tmp_path: Path) -> None:
    model = model_of(Scripted({"a": "bc", "d": "ef"}))
    assert mmhub("generate", "some", "a", "d", model=model).stdout == "bc\nef\n"
    assert mmhub("generate", "some", "-", model=model, stdin="d\n").stdout == "ef\n"
    (tmp_path / "prompts.txt").write_text("d\n\na\n")
    assert mmhub("generate", "some", "--file", tmp_path / "prompts.txt", model=model).stdout == "ef\nbc\n"


def test_json_holds_prompts_texts_and_how_they_ended(mmhub: Any) -> None:
    model = model_of(Scripted({"a": "bcde"}))
    found = json.loads(mmhub("generate", "some", "a", "--json", "--stop", "d", model=model).stdout)
    (answer,) = found["answers"]
    assert found["name"] == "some"
    assert (answer["prompt"], answer["text"], answer["finish"]) == ("a", "bc", "stop")
    assert answer["score"] < 0


def test_every_option_reaches_the_settings(mmhub: Any, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append((args, more))
        return generate(*args, **more)

    monkeypatch.setattr("mmhub.generate.generate", watched)
    options = {"--max-new-tokens": 4, "--min-new-tokens": 1, "--temperature": 0.5, "--top-k": 7, "--top-p": 0.9,
               "--min-p": 0.01, "--repetition-penalty": 1.1, "--seed": 3, "--stop": "\\nx"}  # fmt: skip
    given = [part for pair in options.items() for part in pair]
    assert mmhub("generate", "some", "hi", "--samples", 2, *given).exception is None
    ((_, _, settings), more) = seen[0]
    assert settings == Generation(
        max_new_tokens=4, min_new_tokens=1, temperature=0.5, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.1,
        seed=3, stop=("\nx",),
    )  # fmt: skip
    assert more["n"] == 2


def test_what_is_asked_for_wins_over_what_the_model_does_by_itself() -> None:
    model = model_of(Scripted(generation=Generation(beams=4, min_new_tokens=9, seed=5)))
    assert read_settings(model, {"temperature": 1.0}) == Generation(temperature=1.0, min_new_tokens=9, seed=5)
    assert read_settings(model, {"max_new_tokens": 3}).min_new_tokens == 3
    drawing = model_of(Scripted(generation=Generation(temperature=1.0)))
    assert read_settings(drawing, {"beams": 2}) == Generation(beams=2)
    with pytest.raises(UsageError, match="top_k must be 0"):
        read_settings(model, {"top_k": -1})
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1"):
        read_settings(model, {"max_new_tokens": 0})
    with pytest.raises(UsageError, match="more than 1 beam goes with temperature 0"):
        read_settings(model, {"beams": 2, "temperature": 1.0})


def test_a_long_prompt_is_an_error_that_names_it_or_is_cut_with_a_note(mmhub: Any) -> None:
    long = "x" * 40
    message = error_of(mmhub("generate", "some", "a", long)).message
    assert message.startswith("prompt 2: the prompt has 41 tokens, and the model's context of 32 ")
    done = mmhub("generate", "some", "a", long, "--truncate", "--max-new-tokens", 2)
    assert done.stderr == "prompt 2 is too long: its first 11 tokens were left out\n"


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        (["generate", "some"], UsageError, "give prompts, or a file of them"),
        (["generate", "some", "-", "-"], UsageError, "only one prompt can be read from stdin"),
        (["generate", "some", "--file", "none.txt"], NotFoundError, "no file 'none.txt'"),
        (["generate", "some", "--file", "bad.txt"], InputError, "byte 5 (line 2) is 0xff"),
        (["generate", "some", "--file", "empty.txt"], InputError, "'empty.txt' holds no text"),
        (["generate", "some", "a", "--beams", "2", "--samples", "3"], UsageError, "3 texts were asked for, of 2 beams"),
        (["generate", "some", "a", "--samples", "3"], UsageError, "all 3 texts of a prompt would be the same"),
        (["generate", "some", "a", "--top-p", "0.9"], UsageError, "--top-p changes nothing where always the most"),
        (["generate", "some", "a", "--beams", "2", "--seed", "1"], UsageError, "--seed changes nothing where"),
        (["predict", "some", "--text", "a", "--length-penalty", "2"], UsageError, "--length-penalty changes nothing w"),
        (["score", "some"], UsageError, "give texts with --text"),
        (["predict", "some", "--text", "a", "--text-pair", "b", "--text-pair", "c"], UsageError, "do not pair up"),
    ],
)
def test_mistakes_are_named(
    mmhub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], kind: type, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_bytes(b"one\nt\xff")
    Path("empty.txt").write_text("\n")
    error = error_of(mmhub(*args))
    assert isinstance(error, kind)
    assert text in error.message


def test_a_model_that_writes_no_text_refuses_options_of_generation(mmhub: Any) -> None:
    decoder: Any = torch.nn.Linear(1, 1)
    decoder.reads_text = False
    model = model_of(decoder)
    assert "writes no text" in error_of(mmhub("predict", "some", "--text", "a", "--beams", 2, model=model)).message


def test_predict_writes_with_the_options_it_is_given(mmhub: Any, tmp_path: Path) -> None:
    model = model_of(Scripted({"a": "bcde", "d": "efg"}))
    assert mmhub("predict", "some", "--text", "a", model=model).stdout == "bcde\n"
    assert mmhub("predict", "some", "--text", "a", "--max-new-tokens", 2, model=model).stdout == "bc\n"


def test_rows_of_a_table_draw_their_own_numbers_in_every_batch(mmhub: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "ab\n" * 4)
    options = ["--data", tmp_path / "rows.csv", "--inputs", "text=text", "--temperature", 1, "--max-new-tokens", 9]
    found = [json.loads(mmhub("predict", "some", *options, "--batch-size", size, "--json").stdout) for size in (2, 4)]
    texts = [[one["text"] for one in each["predictions"]] for each in found]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_a_table_is_drawn_from_by_row_where_the_model_draws_by_itself(
    mmhub: Any, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Generation(max_new_tokens=9, temperature=1.0)
    monkeypatch.setattr(lm.decoder, "config", msgspec.structs.replace(lm.decoder.config, generation=own))
    (tmp_path / "rows.csv").write_text("text\n" + "ab\n" * 4)
    options = ["--data", tmp_path / "rows.csv", "--inputs", "text=text", "--batch-size", 2, "--json"]
    found = [one["text"] for one in json.loads(mmhub("predict", "some", *options).stdout)["predictions"]]
    assert len(set(found)) == 4


def test_a_line_of_a_file_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("a\u2028b\r\n\x0c \n\x85c\x0cd".encode())
    assert read_lines(tmp_path / "lines.txt") == ["a\u2028b", "\x85c\x0cd"]


def test_two_texts_make_a_pair(mmhub: Any, monkeypatch: pytest.MonkeyPatch, lm: Any) -> None:
    seen: list[Any] = []

    def watched(self: Any, samples: Any, settings: Any, **more: Any) -> Any:
        seen.extend(samples)
        return [{}] * len(samples)

    monkeypatch.setattr(type(lm), "generate", watched)
    mmhub("predict", "some", "--text", "a", "--text-pair", "b", "--text", "c", "--text-pair", "d")
    assert seen == [{"text": {"text": "a", "text_pair": "b"}}, {"text": {"text": "c", "text_pair": "d"}}]


def test_scores_are_those_of_the_model_with_and_without_the_end(mmhub: Any, lm: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("hello\nyou\n")
    done = mmhub("score", "some", "--file", tmp_path / "texts.txt", "--json")
    scores = json.loads(done.stdout)["scores"]
    assert [one["logprob"] for one in scores] == pytest.approx(lm.score(["hello", "you"]), rel=1e-6)
    assert [one["tokens"] for one in scores] == [6, 4]
    assert scores[0]["perplexity"] == pytest.approx(math.exp(-scores[0]["logprob"] / 6))
    assert "in nats, with the end token; perplexity: exp(-logprob / tokens)" in done.stderr
    shorter = mmhub("score", "some", "--text", "hello", "--no-end")
    assert "without an end token" in shorter.stderr
    assert shorter.stdout.split()[5:7] == [f"{lm.score(['hello'], end=False)[0]:.4f}", "5"]


def test_a_terminal_shows_text_as_it_comes_but_never_obeys_it(mmhub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    end, child = pty.openpty()
    with os.fdopen(child, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert shown("a\x1b[2Jb\n") == "a\N{REPLACEMENT CHARACTER}[2Jb\n"
    os.close(end)
    monkeypatch.undo()
    assert shown("a\x1b[2Jb") == "a\x1b[2Jb"


@pytest.mark.slow
def test_a_saved_model_writes_in_a_process_of_its_own(cli: Cli, lm: Any, tmp_path: Path) -> None:
    lm.save(tmp_path / "lm")
    done = cli("generate", "./lm", "hello", "--max-new-tokens", 5, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["answers"]
    (expected,) = lm.generate([{"text": "hello"}], Generation(max_new_tokens=5))
    assert answer["text"] == expected["text"]
    assert answer["score"] == pytest.approx(expected["score"], rel=1e-5)
