"""`mmhub explain`: one sample, its views on stdout and in files, and what is wrong in a line before a model works."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mmhub.errors import MmhubError, NotFoundError, UsageError
from mmhub.explain import METHODS
from tests.conftest import Cli, flac, png, three_modalities

pytest.importorskip("captum", reason="needs captum, mmhub[explain]")
FAST = ("--no-faithfulness", "--no-shares", "--method", "gradient-x-input")


@pytest.fixture(scope="module")
def three() -> Any:
    """A model of text, image and audio."""
    return three_modalities("a good thing", "a bad thing")


@pytest.fixture(scope="module")
def writer() -> Any:
    """A small language model on bytes."""
    from mmhub.build import compose

    small = {"dim": 16, "depth": 1, "heads": 2, "max_length": 64}
    return compose(
        task="language-modelling", decoder={"use": "transformer-lm", "config": small}, tokenizer={"kind": "byte"}
    ).eval()


@pytest.fixture
def mmhub(three: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `mmhub explain` in this process, in a folder with a picture and a sound."""
    import mmhub.hub
    from mmhub.cli.main import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(png(1))
    (tmp_path / "tone.flac").write_bytes(flac(1, 0.5))

    def run(*args: object, model: Any = three) -> Result:
        monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model)
        return CliRunner().invoke(cli, ["explain", "tones", *map(str, args)], standalone_mode=False)

    return run


def error_of(done: Result, kind: type[Exception] = UsageError) -> str:
    assert isinstance(done.exception, kind), done
    error: Any = done.exception
    return " / ".join(filter(None, (error.message, getattr(error, "hint", None))))


def test_a_pipe_gets_the_answer_and_tables_of_all_inputs(mmhub: Any, three: Any) -> None:
    done = mmhub("--text", "a good thing", "--image", "cat.png", "--audio", "tone.flac", "--steps", 4)
    answer = three.predict([{"text": "a good thing", "image": png(1), "audio": flac(1, 0.5)}])[0]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{answer['label']}  {answer['score']:.4f}"
    assert lines[1].startswith(f"'{answer['label']}' by integrated gradients: logit ")
    for heading in ("text: score, number and token", "image (16 x 16 pixels)", "Shares of the inputs"):
        assert heading in lines
    assert {"a", "good", "thing"} <= {line.split()[-1] for line in lines if line}
    assert "random order" in done.stdout and "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("method", METHODS[1:3])
def test_json_holds_the_whole_explanation(mmhub: Any, method: str) -> None:
    done = mmhub("--text", "a bad thing", "--target", "yes", "--method", method, "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"name", "explanation"} and found["name"] == "tones"
    explanation = found["explanation"]
    assert (explanation["method"], explanation["target"], explanation["unit"]) == (method, "yes", "logit")
    assert [one["text"] for one in explanation["attributions"][0]["pieces"] if one["end"]] == ["a", "bad", "thing"]
    assert explanation["shares"] == {"text": pytest.approx(explanation["value"] - explanation["baseline"], abs=1e-3)}
    assert len(explanation["faithfulness"]["deletion"]) == 11


def test_files_of_every_kind_are_written_at_once_and_stdout_stays_empty(mmhub: Any, tmp_path: Path) -> None:
    outs = [part for name in ("new/a.html", "new/a.png", "new/a.JSON") for part in ("--out", name)]
    done = mmhub("--text", "a good thing", "--image", "cat.png", *FAST, *outs)
    assert done.exception is None, done.exception
    assert done.stdout == "" and "the explanation is in new/a.html" in done.stderr
    page = (tmp_path / "new" / "a.html").read_text("utf-8")
    assert page.lstrip().startswith("<!doctype html>") and "tones" in page and str(tmp_path) not in page
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    document = json.loads((tmp_path / "new" / "a.JSON").read_text("utf-8"))
    assert document["explanation"]["shares"] == {} and document["explanation"]["faithfulness"] is None
    quiet = mmhub("--text", "a good thing", *FAST, "-q", "--json", "--out", "b.html")
    assert quiet.stderr == "" and json.loads(quiet.stdout)["name"] == "tones"


def test_several_pictures_are_items_of_one_sample(mmhub: Any, tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(png(2))
    done = mmhub("--image", "cat.png", "--image", "dog.png", *FAST, "--json")
    items = [one["item"] for one in json.loads(done.stdout)["explanation"]["attributions"]]
    assert items == [0, 1]
    shown = mmhub("--image", "cat.png", "--image", "dog.png", *FAST).stdout
    assert "image 1 (16 x 16 pixels)" in shown and "image 2 (16 x 16 pixels)" in shown


def test_a_model_that_writes_is_explained_token_by_token_as_its_options_say(mmhub: Any, writer: Any) -> None:
    done = mmhub("--text", "ab", "--max-new-tokens", 3, "--min-new-tokens", 3, *FAST, "--json", model=writer)
    assert done.exception is None, done.exception
    steps = json.loads(done.stdout)["explanation"]["steps"]
    assert len(steps) == 3
    assert [one["modality"] for one in steps[-1]["attributions"]] == ["text", "written"]
    assert "Written, token by token" in mmhub("--text", "ab", "--target", "cd", *FAST, model=writer).stdout


def test_options_of_writing_are_refused_where_nothing_is_written(mmhub: Any) -> None:
    assert "text" in error_of(mmhub("--text", "a good thing", "--max-new-tokens", 3))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is nothing to explain"),
        (("--text", "a", "--text", "b"), "one sample is explained, and there are 2 texts"),
        (("--text-pair", "b"), "--text-pair stands beside a --text"),
        (("--input", "x"), "--input 'x' is not of the form"),
        (("--text", "a", "--out", "a.pdf"), "'a.pdf' is no kind of explanation / end its name with .html"),
        (("--text", "a", "--out", "a.png"), "a PNG shows pictures and sounds, and none is given"),
        (("--text", "a", "--out", "taken.html"), "'taken.html' exists"),
        (("--text", "a", "--out", "b.html", "--out", "b.html"), "'b.html' is named twice"),
        (("--text", "a", "--out", "taken.html/b.html"), "'taken.html' is a file"),
        (("--text", "a", "--target", "yess"), "this model has no label 'yess' / did you mean"),
        (("--input", "smell=rose"), "this model has no input 'smell'"),
    ],
)
def test_mistakes_are_told_in_a_line(mmhub: Any, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    (tmp_path / "taken.html").write_text("mine")
    assert said in error_of(mmhub(*args))
    assert (tmp_path / "taken.html").read_text() == "mine" and not (tmp_path / "b.html").exists()


def test_a_wrong_method_or_file_is_told_with_what_there_is(mmhub: Any) -> None:
    assert "occlusion" in str(error_of(mmhub("--text", "a", "--method", "magic"), click.UsageError))
    assert "did you mean 'cat.png'" in error_of(mmhub("--image", "cta.png"), NotFoundError)
    assert "fetching is off" in error_of(mmhub("--image", "http://127.0.0.1/a.png"), MmhubError)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    mmhub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("mmhub.files.write_file", full)
    said = error_of(mmhub("--text", "a good thing", *FAST, "--out", "a.html"), MmhubError)
    assert said.startswith("cannot write the explanation to '.': no space left on the device")
    assert not list(tmp_path.glob("*.html"))


def test_colours_come_with_a_terminal_and_go_where_it_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.cli.explain import _colours

    main, side = pty.openpty()
    with os.fdopen(side, "w", encoding="utf-8") as terminal, os.fdopen(main, "rb"):
        monkeypatch.setattr("sys.stdout", terminal)
        for name in ("NO_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        assert _colours() == "256"
        monkeypatch.setenv("COLORTERM", "truecolor")
        assert _colours() == "24-bit"
        monkeypatch.setenv("NO_COLOR", "1")
        assert _colours() == "none"
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert _colours() == "none"
        monkeypatch.setenv("TERM", "xterm")
        terminal.reconfigure(encoding="ascii")  # type: ignore[union-attr]
        assert _colours() == "none"


@pytest.mark.slow
def test_a_published_folder_is_explained_in_a_process_of_its_own(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png(2))
    (tmp_path / "tone.flac").write_bytes(flac(2))
    both = ("--image", "cat.png", "--audio", "tone.flac")
    done = cli("explain", trained, *both, "--method", "occlusion", "--out", "a.html", "--out", "a.png")
    assert done.returncode == 0, done.stderr
    assert str(trained.parent) not in (tmp_path / "a.html").read_text("utf-8"), "a page is made to be passed on"
    shown = cli("explain", trained, *both, "--method", "occlusion")
    label = json.loads(cli("predict", trained, *both, "--json").stdout)["predictions"][0]["label"]
    assert shown.stdout.startswith(f"{label}  ") and re.search(r"^image +[+-]", shown.stdout, re.M)
    wrong = cli("explain", trained, *both, "--target", "c9")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 2 and "no label 'c9'" in wrong.stderr
