"""Conversations: what the model reads of them, what is left out, and a terminal on which Ctrl-C stops the answer."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mmhub.errors import InputError, UsageError
from mmhub.generate import Conversation
from mmhub.generate.conversation import answer
from mmhub.interfaces import Generation
from tests.fake_plugins import ROOT
from tests.text_decoders import Letters, Scripted, model_of

SETTINGS = Generation(max_new_tokens=20)


def talk(text: str = " fine.", system: str = "", context: int | None = None) -> tuple[Conversation, Scripted]:
    decoder = Scripted(text, context=context)
    return Conversation(model_of(decoder), system, SETTINGS), decoder


def test_each_answer_is_given_in_view_of_all_messages_before_it() -> None:
    conversation, decoder = talk(system="be kind")
    assert conversation.ask("hi")["text"] == "fine."
    conversation.ask("and you?")
    assert decoder.read == ["S:be kind\nU:hi\nA:", "S:be kind\nU:hi\nA:fine.\nU:and you?\nA:"]
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]


def test_what_is_streamed_is_the_answer() -> None:
    shown: list[str] = []
    found = talk("\n a b.")[0].ask("hi", shown.append)
    assert "".join(shown) == found["text"] == "a b."
    assert len(shown) > 1


def test_the_oldest_turns_are_left_out_when_the_context_is_full_and_the_answer_says_so() -> None:
    conversation, decoder = talk(system="s", context=60)
    found = [conversation.ask(question) for question in ("first", "second", "third", "fourth")]
    assert [answer.get("truncated") for answer in found] == [None, None, 1, 2]
    assert decoder.read[-1] == "S:s\nU:third\nA:fine.\nU:fourth\nA:"
    assert len(conversation.messages) == 9


def test_a_message_longer_than_the_context_is_an_error_and_is_not_remembered() -> None:
    conversation, _ = talk(context=30)
    conversation.ask("hi")
    with pytest.raises(InputError, match="its last turn has 46 tokens, and the model's context of 30"):
        conversation.ask("a" * 40)
    assert len(conversation.messages) == 2


def test_chat_with_whole_messages_leaves_nothing_out_unless_it_is_asked_to() -> None:
    model = model_of(Scripted(" ok", context=32))
    turns = [{"role": role, "content": "x" * 9} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match="the conversation has 39 tokens, and the model's context of 32"):
        model.chat(turns, SETTINGS)
    assert model.chat(turns, SETTINGS, truncate=True) == "ok"
    assert answer(model, turns, SETTINGS, truncate=True)["truncated"] == 1


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "a conversation is a list of messages, got none"),
        ([{"role": "assistant", "content": "a"}], "does not end with a message of the user"),
        ([{"role": "boss", "content": "a"}], "message 1 has the role 'boss'"),
        ([{"role": "user", "content": 3}], "the content of message 1 is a int"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
            "message 1 has a part of the type 'image'",
        ),
        ([{"role": "user", "content": [3]}], "message 1 has a part that is a int"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "message 1 has a part whose text is a int"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        model_of(Scripted()).chat(messages)


def test_the_parts_of_a_content_are_joined() -> None:
    decoder = Scripted(" ok")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b c"}]
    assert model_of(decoder).chat([{"role": "user", "content": parts}], SETTINGS) == "ok"
    assert decoder.read == ["U:ab c\nA:"]


def test_what_ends_an_answer_in_the_layout_of_the_model_ends_it_whatever_else_does() -> None:
    decoder = Scripted(" fine.U: and C")
    decoder.processor.stop_texts = ("U:",)
    model, asked = model_of(decoder), [{"role": "user", "content": "hi"}]
    assert model.chat(asked) == Conversation(model).ask("hi")["text"] == "fine."
    assert model.chat(asked, Generation(stop=("n",))) == "fi"


def test_an_interrupted_answer_stays_as_far_as_it_came_and_is_marked() -> None:
    conversation, decoder = talk("one two three.")

    def impatient(piece: str) -> None:
        if "w" in piece:
            raise KeyboardInterrupt

    assert conversation.ask("count", impatient) == {"text": "one tw", "finish": "interrupted"}
    assert conversation.messages[-1] == {"role": "assistant", "content": "one tw", "interrupted": True}
    conversation.ask("go on")
    assert decoder.read[-1] == "U:count\nA:one tw\nU:go on\nA:"


def test_questions_can_be_taken_back_and_everything_forgotten() -> None:
    conversation, _ = talk(system="s")
    conversation.ask("a")
    conversation.ask("b")
    assert conversation.undo()
    assert [message["content"] for message in conversation.messages] == ["s", "a", "fine."]
    conversation.system = "t"
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "t"}]
    assert not conversation.undo()
    conversation.system = ""
    assert conversation.messages == []


class Guard:
    name = "test"

    def check(self, sample: Any) -> str | None:
        return "no bombs" if "bomb" in sample["text"] else None

    def review(self, sample: Any, answer: Any) -> Any:
        return answer | {"text": answer["text"].upper()}


def test_guards_see_messages_and_answers_and_what_they_refuse_is_not_remembered() -> None:
    from mmhub.guard import Guards
    from mmhub.plugins import get_index

    model = model_of(Scripted(" fine."))
    model._guards = Guards(model)
    model._guards._guards = [(get_index().plugins[0], Guard())]  # type: ignore[list-item]
    conversation = Conversation(model, settings=SETTINGS)
    shown: list[str] = []
    assert conversation.ask("a bomb", shown.append)["refused"] == "no bombs"
    assert not conversation.messages
    assert not shown
    assert conversation.ask("hi", shown.append)["text"] == "FINE."
    assert shown == ["FINE."]  # nothing was shown before it was reviewed
    with pytest.raises(InputError, match="refused: no bombs"):
        model.chat([{"role": "user", "content": "a bomb"}])


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `mmhub chat NAME` in this process on a model with this decoder."""
    import mmhub.hub
    from mmhub.cli.main import cli

    def run(decoder: Scripted, *args: str, stdin: str | bytes = "") -> Result:
        monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model_of(decoder))
        return CliRunner().invoke(cli, ["chat", "some", *args], input=stdin, standalone_mode=False)

    return run


def test_each_line_of_a_pipe_is_answered(chat: Any) -> None:
    decoder = Scripted(" fine.")
    done = chat(decoder, "--system", "s", stdin="hi\n\n/reset\n")
    assert done.stdout == "fine.\nfine.\n"
    assert decoder.read[-1] == "S:s\nU:hi\nA:fine.\nU:/reset\nA:"  # commands are for terminals


def test_json_is_one_document_with_the_whole_conversation(chat: Any) -> None:
    found = json.loads(chat(Scripted(" fine."), "--json", "--max-new-tokens", "4", stdin="hi\n").stdout)
    assert found["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fin"}]
    assert found["answers"][0]["finish"] == "length"


def test_bytes_that_are_no_text_are_named_with_their_place(chat: Any) -> None:
    done = chat(Scripted("a"), stdin=b"hi\na\xff\n")
    assert isinstance(done.exception, InputError)
    assert done.exception.message == "line 2 of stdin is not UTF-8 text: byte 2"


class Wordless(Letters):
    def chat(self, messages: Any, policy: Any) -> Any:
        raise UsageError("this model has no chat template", "...")


class Laid(Wordless):
    """Takes a template, as real tokenizers do."""

    def take_template(self, name: str) -> None:
        self.stop_texts = ("\nUser:",)
        self.chat = super(Wordless, self).chat  # type: ignore[method-assign]


def test_a_model_without_a_chat_template_says_what_to_do_and_does_it(chat: Any) -> None:
    decoder = Scripted(" fine.\nUser: x")
    decoder.processor = Wordless()
    error = chat(decoder, stdin="hi\n").exception
    assert isinstance(error, UsageError)
    assert (error.message, error.hint) == (
        "this model has no chat template",
        "give one: --template plain, chatml or a file",
    )
    decoder.processor = Laid()
    assert chat(decoder, "--template", "plain", stdin="hi\n").stdout == "fine.\n"


CHILD = """
import mmhub.hub
from tests.text_decoders import Scripted, model_of
decoder = Scripted(" one two" + " and more" * 60, pause=0.05)  # it takes half a minute, unless it is stopped
mmhub.hub.load = lambda name, **options: model_of(decoder)
from mmhub.cli.main import main
main(["chat", "some", "--max-new-tokens", "999"])
"""


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(self, code: str, folder: Path) -> None:
        self._end, child = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, cwd=folder, env=environment, start_new_session=True
        )
        os.close(child)
        self.text = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """Read on to where `text` has come since the last call, and return what came."""
        limit = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < limit, f"{text!r} did not come: {self.text!r}"
            if select.select([self._end], [], [], 1)[0]:
                self.text += os.read(self._end, 4096).decode()
        end = self.text.index(text) + len(text)
        found, self.text = self.text[:end], self.text[end:]
        return found

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)  # what the terminal does on Ctrl-C, for a process it controls

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    found = Terminal(CHILD, tmp_path)
    yield found
    found.close()


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until("> ")
    terminal.interrupt()
    assert "Ctrl-D or /quit leaves" in terminal.until("leaves")
    terminal.until("> ")
    terminal.type("count\n")
    terminal.until("two")
    terminal.interrupt()
    terminal.until("(interrupted)")
    terminal.until("> ")
    terminal.type("/save talk.json\n")
    terminal.until("2 messages in")
    terminal.until("> ")
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert saved[-1]["interrupted"]
    assert saved[-1]["content"].startswith("one two")
    assert len(saved[-1]["content"]) < 500
    terminal.type("/sistem x\n")
    assert "did you mean '/system'" in terminal.until("> ")
    terminal.type("/undo\n")
    terminal.until("> ")
    terminal.type("/help\n")
    assert "/reset" in terminal.until("> ")
    terminal.type("go on\n")
    assert terminal.until("one two and").endswith("one two and")
    terminal.interrupt()
    terminal.until("(interrupted)")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
