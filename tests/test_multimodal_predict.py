"""Pictures and recordings on the command line: `mmhub predict`, `mmhub generate`, and attached in `mmhub chat`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from click.testing import CliRunner, Result

from mmhub.cli.attachments import Attachments
from mmhub.cli.chat import _Terminal
from mmhub.errors import InputError, NotFoundError, UsageError
from mmhub.interfaces import Policy
from mmhub.model import Model
from tests.test_multimodal_chat import chatty, picture, sound
from tests.text_decoders import Scripted, model_of

SHORT = ("--max-new-tokens", "6")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model() -> Model:
    return chatty("transformer-lm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures, one of them with a blank in its name, and a recording."""
    picture(1).save(tmp_path / "cat.png")
    picture(2).save(tmp_path / "my dog.png")
    clip = sound(3)
    soundfile.write(tmp_path / "meow.wav", clip["array"], clip["sampling_rate"])
    (tmp_path / "notes.txt").write_text("nothing to see")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(model: Model, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process."""
    import mmhub.hub
    from mmhub.cli.main import cli

    def command(*args: str, stdin: str = "", of: Model | None = None) -> Result:
        monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: of or model)
        done = CliRunner().invoke(cli, args, input=stdin, standalone_mode=False)
        if done.exception is not None and not isinstance(done.exception, (UsageError, InputError, NotFoundError)):
            raise done.exception
        return done

    return command


def texts(done: Result) -> list[str]:
    return [answer["text"] for answer in json.loads(done.stdout)["predictions"]]


def test_options_make_a_question_about_a_picture_and_a_recording(run: Run, model: Model, folder: Path) -> None:
    done = run("predict", "m", "--text", "why?", "--image", "cat.png", "--audio", "meow.wav", *SHORT, "--json")
    parts = [{"type": "image", "image": "cat.png"}, {"type": "audio", "audio": "meow.wav"}, "why?"]
    assert texts(done) == [model.chat([{"role": "user", "content": parts}], max_new_tokens=6)]
    alone = run("predict", "m", "--image", "cat.png", *SHORT, "--json")
    assert texts(alone) == [model.chat([{"role": "user", "content": parts[:1]}], max_new_tokens=6)]


def test_the_last_question_of_each_conversation_of_a_table_is_answered(run: Run, model: Model, folder: Path) -> None:
    table = folder / "tables" / "talks.jsonl"
    table.parent.mkdir()
    picture(4).save(table.parent / "bird.png")
    asked = [{"role": "user", "content": [{"type": "image", "image": "bird.png"}, {"type": "text", "text": "what?"}]}]
    rows = [[*asked, {"role": "assistant", "content": "a bird"}], asked, [{"role": "user", "content": "hi"}]]
    table.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    how = ("--inputs", "text=messages,image=messages,audio=messages", *SHORT)
    found = texts(run("predict", "m", "--data", str(table), *how, "--json"))
    there = [{"type": "image", "image": str(table.parent / "bird.png")}, {"type": "text", "text": "what?"}]
    wanted = model.chat([{"role": "user", "content": there}], max_new_tokens=6)
    assert found == [wanted, wanted, model.chat(rows[2], max_new_tokens=6)]
    assert texts(run("predict", "m", "--data", str(table), *SHORT, "--json")) == found, "the column needs no naming"
    assert run("predict", "m", "--data", str(table), *how, "--out", "out.jsonl").stdout == ""
    assert [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()] == found
    table.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}))
    error = run("predict", "m", "--data", str(table), *how).exception
    assert isinstance(error, InputError)
    assert "row 1" in error.message
    assert "no file 'no.png'" in error.message


def test_a_prompt_is_a_question_to_a_model_that_converses(run: Run, model: Model) -> None:
    done = run("generate", "m", "hi", *SHORT, "--json")
    assert json.loads(done.stdout)["answers"][0]["text"] == model.chat(
        [{"role": "user", "content": "hi"}], max_new_tokens=6
    )


def test_files_are_attached_in_a_pipe_and_by_options(run: Run, model: Model, folder: Path) -> None:
    lines = "/audio meow.wav\n/image 'my dog.png'\nwhat?\nand now?\n"
    done = json.loads(run("chat", "m", "--image", "cat.png", *SHORT, "--json", stdin=lines).stdout)
    first, _, second, _ = done["messages"]
    assert first["content"] == [
        {"type": "image", "image": "cat.png"},
        {"type": "audio", "audio": "meow.wav"},
        {"type": "image", "image": "my dog.png"},
        {"type": "text", "text": "what?"},
    ]
    assert second["content"] == "and now?"
    assert done["answers"][0]["text"] == model.chat([first], max_new_tokens=6)
    unasked = run("chat", "m", *SHORT, stdin="/image cat.png\n")
    assert "no question followed (image: cat.png)" in unasked.stderr


def test_wrong_files_are_named_before_anything_is_asked(run: Run, folder: Path) -> None:
    error = run("chat", "m", stdin="/image cta.png\n").exception
    assert isinstance(error, NotFoundError)
    assert (error.message, error.hint) == ("no file 'cta.png'", "did you mean 'cat.png'?")
    assert isinstance(run("chat", "m", "--image", "cta.png").exception, NotFoundError)
    error = run("chat", "m", stdin="/image notes.txt\nwhat?\n").exception
    assert isinstance(error, InputError)
    assert "notes.txt" in error.message
    error = run("chat", "m", stdin="/image cat.png\n", of=model_of(Scripted("a"))).exception
    assert isinstance(error, UsageError)
    assert (error.message, error.hint) == ("this model takes no image", "it takes text")


# -- on a terminal ------------------------------------------------------------------------------------------------


class Talk:
    """Remembers what it is asked; the first question fails if it is to, or is answered so and not remembered."""

    def __init__(self, fails: bool = False, first: dict[str, Any] | None = None) -> None:
        self.asked: list[Any] = []
        self.messages: list[dict[str, Any]] = []
        self._fails, self._first = fails, first

    def ask(self, content: Any, stream: Any) -> dict[str, Any]:
        if self._fails:
            self._fails = False
            raise InputError("the conversation is too long")
        if self._first is not None:
            found, self._first = self._first, None
            return found
        self.asked.append(content)
        self.messages.append({"role": "user", "content": content})
        return {"text": "ok", "finish": "end"}


@pytest.fixture
def type_in(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Talk]:
    """Type lines on a terminal; the conversation is returned."""

    def lines(*typed: str, talk: Talk | None = None, of: Model | None = None) -> Talk:
        talk, left = talk or Talk(), [*typed, "/quit"]
        monkeypatch.setattr("builtins.input", lambda prompt: left.pop(0))
        _Terminal(talk, Attachments(of or model, Policy()), quiet=False).run()
        return talk

    return lines


def part(kind: str, value: str) -> dict[str, str]:
    return {"type": kind, kind: value}


def test_commands_attach_list_and_forget_files(type_in: Any, folder: Path, capsys: Any) -> None:
    talk = type_in("/image cat.png", "/audio meow.wav", "/media", "what?", "/image cat.png", "/drop", "why?")
    assert talk.asked == [[part("image", "cat.png"), part("audio", "meow.wav"), part("text", "what?")], "why?"]
    shown = capsys.readouterr()
    assert "image: cat.png\naudio: meow.wav" in shown.out
    assert "(image: cat.png)\n(audio: meow.wav)" in shown.err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{0}/cat.png", [part("image", "{0}/cat.png")]),
        ("'{0}/my dog.png'  {0}/meow.wav", [part("image", "{0}/my dog.png"), part("audio", "{0}/meow.wav")]),
        ('"{0}/my dog.png" who?', [part("image", "{0}/my dog.png"), part("text", "who?")]),
        (r"{0}/my\ dog.png who is it?", [part("image", "{0}/my dog.png"), part("text", "who is it?")]),
        ("file://{0}/my%20dog.png", [part("image", "{0}/my dog.png")]),
        ("cat.png what?", [part("image", "cat.png"), part("text", "what?")]),
        ("is {0}/cat.png  it?", [part("text", "is"), part("image", "{0}/cat.png"), part("text", "it?")]),
        ("is cat.png it?", None),
        ("notes.txt what?", None),
        ("it's cat.png", None),
        ("hi", None),
    ],
)
def test_files_that_are_dropped_are_known_by_what_they_are(
    model: Model, folder: Path, line: str, parts: list[dict[str, str]] | None
) -> None:
    found = Attachments(model, Policy()).dropped(line.replace("{0}", str(folder)))
    wanted = None if parts is None else [{k: v.replace("{0}", str(folder)) for k, v in one.items()} for one in parts]
    assert found == wanted


def test_a_picture_is_known_by_its_content_whatever_its_name(type_in: Any, folder: Path) -> None:
    (folder / "cat.png").rename(folder / "cat.wav")
    talk = type_in(str(folder / "cat.wav"), "what?", f"{folder}/meow.wav and?")
    assert talk.asked == [
        [part("image", f"{folder}/cat.wav"), part("text", "what?")],
        [part("audio", f"{folder}/meow.wav"), part("text", "and?")],
    ]


def test_nothing_is_lost_by_a_mistake(type_in: Any, folder: Path, capsys: Any) -> None:
    lines = (
        "/image cat.png",
        "/audio mew.wav",
        f"{folder}/cta.png",
        f"{folder}/notes.txt",
        "/imge a",
        "what?",
        "what?",
    )
    talk = type_in(*lines, talk=Talk(fails=True))
    assert talk.asked == [[part("image", "cat.png"), part("text", "what?")]]
    shown = capsys.readouterr().err
    assert "did you mean 'meow.wav'" in shown
    assert "did you mean 'cat.png'" in shown
    assert "notes.txt' is nothing that this model takes" in shown
    assert "did you mean '/image'" in shown
    assert "the conversation is too long" in shown


@pytest.mark.parametrize(
    "talk",
    [
        {"first": {"text": "", "finish": "interrupted"}},
        {"first": {"refused": "no", "guard": "g"}},
        {"fails": True},
    ],
)
@pytest.mark.parametrize("lines", [("/image cat.png", "what?"), ("cat.png what?",)])
def test_what_is_attached_stays_until_a_question_is_remembered(
    type_in: Any, folder: Path, capsys: Any, talk: dict[str, Any], lines: tuple[str, ...]
) -> None:
    found = type_in(*lines, "again?", "more?", talk=Talk(**talk))
    assert found.asked == [[part("image", "cat.png"), part("text", "again?")], "more?"]
    assert ("still attached: (image: cat.png); /drop" in capsys.readouterr().err) != ("fails" in talk)


def test_no_path_ends_the_program(type_in: Any, folder: Path, capsys: Any) -> None:
    long = "/tmp/" + "x" * 300
    lines = ("/image ~nosuch/x.png", f"/save {long}", f"{long} what?", f"/image {long}")
    talk = type_in("/save ~nosuch/x.json", *lines, "hi")
    assert talk.asked == ["hi"]
    shown = capsys.readouterr().err
    assert "no file '~nosuch/x.png'" in shown
    assert shown.count(f"no file '{long}'") == 2
    assert (folder / "~nosuch" / "x.json").exists()  # as a shell writes it


def test_a_folder_that_is_dropped_is_said_to_be_one(model: Model, folder: Path) -> None:
    for line in (str(folder), f"'{folder}'", f"{folder} what?"):
        with pytest.raises(UsageError, match="is a folder") as caught:
            Attachments(model, Policy()).dropped(line)
        assert caught.value.hint == "drop the files that are in it"


def test_a_column_beside_the_conversations_is_not_left_out_in_silence(run: Run, folder: Path) -> None:
    talk = [{"role": "user", "content": "what?"}]
    table = folder / "talks.jsonl"
    how = ("predict", "m", "--data", str(table), "--inputs", "text=messages,image=image", *SHORT)
    table.write_text(json.dumps({"messages": talk, "image": "no.png"}) + "\n")
    error = run(*how).exception
    assert isinstance(error, InputError)
    assert "row 1" in error.message and "the sample holds messages and 'image'" in error.message
    table.write_text(json.dumps({"messages": talk, "image": ""}) + "\n")
    assert len(texts(run(*how, "--json"))) == 1


def test_a_column_of_all_inputs_is_read_as_conversations_whatever_it_holds(
    run: Run, model: Model, folder: Path
) -> None:
    asked = [{"role": "user", "content": [part("image", "bird.png"), part("text", "what?")]}]
    columns = ["--inputs", "text=m,image=m,audio=m", *SHORT, "--json"]
    table = folder / "tables" / "talks.csv"
    table.parent.mkdir()
    picture(4).save(table.parent / "bird.png")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["m"], [json.dumps(asked)]])
    there = [{"role": "user", "content": [part("image", "tables/bird.png"), part("text", "what?")]}]
    assert texts(run("predict", "m", "--data", str(table), *columns)) == [model.chat(there, max_new_tokens=6)]
    Path("talks.jsonl").write_text(json.dumps({"m": asked}) + '\n{"m": "hi"}\n')
    error = run("predict", "m", "--data", "talks.jsonl", *columns).exception
    assert isinstance(error, InputError)
    assert "talks.jsonl row 2" in error.message
    assert "a conversation is a list of messages, got 'hi'" in error.message


def test_help_lists_what_the_model_takes(type_in: Any, folder: Path, capsys: Any) -> None:
    type_in("/help")
    assert "/image  PATH" in capsys.readouterr().out
    talk = type_in("/help", "/image cat.png", "/media", "/cat.png", of=model_of(Scripted("a")))
    shown = capsys.readouterr()
    assert "/image" not in shown.out
    assert "this model takes no image" in shown.err
    assert "there is no command /media" in shown.err
    assert not talk.asked


def test_a_saved_conversation_names_files_from_the_root_on(type_in: Any, folder: Path) -> None:
    type_in("/image cat.png", "what?", "/save talks/one.json")
    (message,) = json.loads((folder / "talks" / "one.json").read_text())["messages"]
    assert message["content"] == [part("image", str(folder / "cat.png")), part("text", "what?")]
