"""Guards around a model: their order, what they do to samples and answers, what is logged, where they come from."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import mmhub
from mmhub.build import add_guards, build_model
from mmhub.checkpoint import parse_config, read_config
from mmhub.config import GuardRecipe, ModelRecipe
from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.generate import Conversation
from mmhub.generate.talks import stripped
from mmhub.guard import Decisions, Guards, media_in, texts_of, with_media, with_texts
from mmhub.hub.foreign import write_layout
from mmhub.interfaces import ComponentConfig, Generation, Policy, decode_config, raw_bytes
from mmhub.interfaces.raw import worker_of
from mmhub.model import Model
from mmhub.plugins import Component, get_index
from mmhub.spec import Change, ComponentSpec, Refusal
from mmhub.testing import Check, ContractError
from tests.text_decoders import Scripted, model_of

SAID = [{"role": "system", "content": "kind"}, {"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]
LABELS = {"use": "classification", "config": {"labels": ["n", "y"]}}
SEEN = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}


class Redacting:
    """Rewrites "secret" and refuses what says "bomb"."""

    name = "redacting"
    on = ("input",)

    def rewrite(self, sample: Mapping[str, Any]) -> Any:
        made = with_texts(sample, lambda text: text.replace("secret", "hidden"))
        return made if made is sample else Change(made, "secrets", "a secret is taken out")

    def check(self, sample: Mapping[str, Any]) -> Any:
        return Refusal("no bombs", "bombs") if any("bomb" in text for text in texts_of(sample)) else ""

    def review(self, sample: Any, answer: Any) -> Any:
        raise AssertionError("it watches inputs alone")


class Watching:
    """Notes what it is shown, and refuses answers of one text."""

    name = "watching"

    def __init__(self, forbidden: str = "-", on: tuple[str, ...] = ("input", "output")) -> None:
        self.seen: list[Any] = []
        self.forbidden, self.on = forbidden, on

    def check(self, sample: Any) -> str:
        self.seen.append(sample)
        return "it names 12345" if "12345" in str(sample) else ""

    def review(self, sample: Any, answer: Any) -> Any:
        return Refusal("not that", "words") if self.forbidden in answer.get("text", "") else answer


def guarded(model: Model, *guards: Any) -> Model:
    model._guards = Guards(model)
    model._guards._guards = [(get_index().plugins[0], guard) for guard in guards]
    return model


def classifier() -> Model:
    text = {"text": {"use": "rnn", "config": {"dim": 4, "embedding_dim": 4}}}
    return mmhub.compose(
        encoders=text, decoder={"use": "classification", "config": {"labels": ["n", "y"]}}, texts=["a"]
    )


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the decisions that were written so far."""
    path = tmp_path / "guards.jsonl"
    monkeypatch.setenv("MMHUB_GUARD_LOG", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


# -- texts of every shape -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "texts"),
    [
        ({"text": "a"}, ["a"]),
        ({"text": ["a", "b"]}, ["a", "b"]),
        ({"text": {"premise": "a", "hypothesis": "b"}}, ["a", "b"]),
        ({"text": np.array(["a", "b"], dtype=object)}, ["a", "b"]),
        ({"text": None, "image": "a.png"}, []),
        ({"messages": SAID}, ["kind", "ab"]),
        ({"messages": json.dumps(SAID)}, ["kind", "ab"]),
        ({"messages": [{"role": "user", "content": ["a", SEEN, "b"]}]}, ["a", "b"]),
        ({"messages": [3, {"content": None}, {"content": 3}]}, []),
        ({"text": 3, "audio": b"x"}, []),
    ],
)
def test_every_text_of_a_sample_is_found_and_can_be_changed(sample: dict[str, Any], texts: list[str]) -> None:
    assert list(texts_of(sample)) == texts
    assert with_texts(sample, lambda text: text) is sample
    changed = with_texts(sample, str.upper)
    assert list(texts_of(changed)) == [text.upper() for text in texts]
    assert (changed is sample) == (not texts)
    assert list(texts_of(sample)) == texts  # which stayed as it was


def test_media_are_found_wherever_they_are() -> None:
    talk = [
        {"role": "user", "content": ["a", SEEN, {"type": "image", "image": b"x"}, {"type": "image", "path": "c.png"}]}
    ]
    assert list(media_in({"image": "a.png"}, "image")) == ["a.png"]
    assert list(media_in({"image": [b"a", "b.png"], "text": "c"}, "image")) == [b"a", "b.png"]
    assert list(media_in({"messages": talk}, "image")) == ["http://a/b.png", b"x", "c.png"]
    assert list(media_in({"text": "a.png"}, "image")) == []


# -- what guards do -------------------------------------------------------------------------------------------------


def test_a_rewritten_sample_is_what_later_guards_and_the_model_see() -> None:
    decoder, watching = Scripted({"a hidden": "b"}), Watching()
    model = guarded(model_of(decoder), Redacting(), watching)
    given = {"text": "a secret"}
    assert model.generate([given, {"text": "bomb"}, given])[1]["refused"] == "no bombs"
    assert watching.seen == [{"text": "a hidden"}] * 2
    assert decoder.read == ["a hidden"] * 2
    assert given == {"text": "a secret"}


def test_guards_stand_in_order_and_one_that_comes_before_sees_what_was_given() -> None:
    first, last = Watching(), Watching()
    guarded(model_of(Scripted("b")), first, Redacting(), last).generate([{"text": "secret"}])
    assert (first.seen, last.seen) == ([{"text": "secret"}], [{"text": "hidden"}])


def test_conversations_are_rewritten_message_by_message() -> None:
    decoder = Scripted(" fine.")
    model, watching = model_of(decoder), Watching()
    talk = Conversation(guarded(model, Redacting(), watching), settings=Generation(max_new_tokens=9))
    talk.ask("my secret")
    talk.ask("again")
    assert decoder.read[-1] == "U:my hidden\nA:fine.\nU:again\nA:"
    assert watching.seen[-1] == {"text": "my hidden\n\nfine.\n\nagain"}
    with pytest.raises(InputError, match="refused: no bombs"):
        model.chat([{"role": "user", "content": "bomb"}])


def test_several_texts_are_written_of_a_rewritten_sample() -> None:
    decoder = Scripted({"a hidden": "b"})
    model = guarded(model_of(decoder), Redacting(), Watching("b"))
    settings = Generation(max_new_tokens=2, temperature=1.0)
    found = model.generate([{"text": "bomb"}, {"text": "a secret"}], settings, n=2)
    assert found[0]["refused"] == "no bombs"
    assert found[1]["refused"] == "not that"
    assert decoder.read == ["a hidden"] * len(decoder.read)


def test_a_text_is_streamed_as_it_is_written_unless_a_guard_looks_at_answers() -> None:
    def streamed(*guards: Any) -> list[str]:
        shown: list[str] = []
        model = guarded(model_of(Scripted("bcd")), *guards)
        model.generate([{"text": "a"}], stream=lambda row, number, text: shown.append(text))
        return shown

    assert streamed(Redacting(), Watching(on=("input",))) == streamed() == ["b", "c", "d"]
    assert streamed(Redacting(), Watching()) == ["bcd"]
    assert streamed(Watching("bcd")) == []


def test_an_unreadable_sample_is_named_by_its_own_place_although_others_were_refused() -> None:
    model = guarded(model_of(Scripted("b", context=4)), Redacting())
    with pytest.raises(InputError) as caught:
        model.generate([{"text": "bomb"}, {"text": "a"}, {"text": "a" * 9}])
    assert caught.value.row == 2


def test_a_failing_guard_refuses_and_one_that_fails_for_several_is_asked_for_each() -> None:
    class Batched(Watching):
        asked = 0

        def check_all(self, samples: Any) -> Any:
            self.asked += 1
            if any(sample["text"] == "c" for sample in samples):
                raise ValueError("one of them")
            return ["" for _ in samples]

        def check(self, sample: Any) -> str:
            if sample["text"] == "c":
                raise ValueError("that one")
            return super().check(sample)

        def rewrite(self, sample: Any) -> Any:
            if sample["text"] == "d":
                raise KeyError("d")
            return sample

    guard = Batched()
    model = guarded(model_of(Scripted("b")), guard)
    assert ["text" in one for one in model.generate([{"text": "a"}, {"text": "b"}])] == [True, True]
    assert (guard.asked, guard.seen) == (1, [])
    found = model.generate([{"text": "a"}, {"text": "c"}, {"text": "d"}])
    assert [one.get("refused") for one in found] == [None, "the guard failed", "the guard failed"]


def test_why_a_guard_fails_is_told_to_whoever_runs_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Missing(Watching):
        asked = 0

        def check_all(self, samples: Any) -> Any:
            self.asked += 1
            raise NotFoundError("no folder '/srv/gate'")

    guard = Missing()
    model = guarded(model_of(Scripted("b")), guard)
    found = model.generate([{"text": "a"}] * 3)
    assert {one["refused"] for one in found} == {"the guard failed"}
    assert (guard.asked, guard.seen) == (1, [])  # it fails for each of them
    told = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert told == ["the guard mmhub/watching failed: NotFoundError: no folder '/srv/gate'"]


def test_of_several_texts_of_a_conversation_some_may_be_refused() -> None:
    class Second(Watching):
        def review(self, sample: Any, answer: Any) -> Any:
            self.seen.append(answer)
            return Refusal("no") if len(self.seen) % 2 else answer

    talks = model_of(Scripted(" b"))
    assert stripped({"texts": [None, " b"]}) == {"texts": [None, "b"]}
    settings = Generation(max_new_tokens=2, temperature=1.0)
    (found,) = guarded(talks, Second(on=("output",))).generate([{"text": "a"}], settings, n=2)
    assert found["texts"][0] is None and found["refused"] == ["no", None]


def test_what_a_model_has_answered_is_not_for_guards_of_inputs_alone() -> None:
    both, inputs = Watching(), Watching(on=("input",))
    talk = Conversation(guarded(model_of(Scripted(" fine.")), both, inputs), settings=Generation(max_new_tokens=9))
    talk.ask("one")
    talk.ask("two")
    assert both.seen[-1] == {"text": "one\n\nfine.\n\ntwo"}
    assert inputs.seen[-1] == {"text": "one\n\ntwo"}


class Looking(Watching):
    """Reads pictures."""

    media = ("image",)

    def check(self, sample: Any) -> str:
        self.seen.append(sample)
        return ""


def test_a_picture_that_a_guard_reads_is_fetched_once_for_it_and_for_the_model(tmp_path: Path) -> None:
    path, guard = tmp_path / "a.png", Looking()
    guards = Guards.none()
    guards._guards = [(get_index().plugins[0], guard)]
    talk = {"messages": [{"role": "user", "content": ["a", {"type": "image", "path": str(path)}]}]}
    for sample in ({"image": str(path), "text": "a"}, {"image": [path, b"x"]}, talk):
        path.write_bytes(b"first")

        def answer(samples: Any, rows: Any) -> Any:
            path.write_bytes(b"other")
            return [{"read": next(raw_bytes(raw, Policy()) for raw in media_in(samples[0], "image"))}]

        assert guards.answer([sample], answer) == [{"read": b"first"}]
    plain = {"image": b"x", "text": "a"}
    assert with_media(plain, "image", lambda raw: raw) is plain
    assert worker_of({"bytes": b"x", "path": "https://a.org/b.png"}, Policy()) is not None  # as before it was fetched


def test_a_picture_that_no_guard_can_read_is_an_error_of_its_own_row(tmp_path: Path) -> None:
    class Blind(Looking):
        def check_all(self, samples: Any) -> Any:
            error = InputError("no picture")
            error.modality, error.row = "image", len(samples) - 1
            raise error

        def check(self, sample: Any) -> Any:
            return "" if sample["image"] == b"x" else self.check_all([sample])

    guards = Guards.none()
    guards._guards = [(get_index().plugins[0], Blind())]
    for wrong in (b"y", str(tmp_path / "none.png")):
        with pytest.raises(InputError) as caught:
            guards.answer([{"image": b"x"}, {"image": wrong}], lambda samples, rows: [{}] * len(samples))
        assert caught.value.row == 1


# -- the log --------------------------------------------------------------------------------------------------------


def test_decisions_are_logged_and_what_was_said_is_not(log: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(Scripted({"a": "bad", "hidden": "c"}))
    model.name = "some"
    guarded(model, Redacting(), Watching("bad"))
    with caplog.at_level(logging.INFO, "mmhub.guards"):
        model.generate([{"text": text} for text in ("bomb", "secret", "a", "12345")])
    found = log()
    assert [(one["guard"], one["rule"], one["stage"], one["action"], one["reason"]) for one in found] == [
        ("mmhub/redacting", "secrets", "input", "changed", "a secret is taken out"),
        ("mmhub/redacting", "bombs", "input", "refused", "no bombs"),
        ("mmhub/watching", "", "input", "refused", "(withheld: a guard's own words)"),
        ("mmhub/watching", "words", "output", "refused", "not that"),
    ]
    assert {one["model"] for one in found} == {"some"}
    assert all(one["time"].endswith("+00:00") for one in found)
    assert [json.loads(message) for message in caplog.messages] == found
    assert "12345" not in caplog.text


def test_the_message_of_a_failing_guard_is_not_logged(log: Any) -> None:
    class Failing(Watching):
        def check(self, sample: Any) -> str:
            raise ValueError(sample["text"])

    guarded(model_of(Scripted("b")), Failing()).generate([{"text": "mallory"}])
    assert [(one["rule"], one["reason"]) for one in log()] == [("failure", "the guard failed: ValueError")]


def test_lines_of_many_threads_stay_whole(log: Any) -> None:
    def write() -> None:
        decisions = Decisions("m")
        for number in range(50):
            decisions.note("g", "input", "refused", rule="r" * 300, reason=str(number))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(one["reason"]) for one in log()) == sorted([*range(50)] * 4)


def test_a_log_that_cannot_be_written_stops_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_GUARD_LOG", str(tmp_path / "no" / "log"))
    with pytest.raises(MmhubError, match=r"cannot write the log of guards .*No such file or directory"):
        model_of(Scripted("b")).generate([{"text": "a"}])


# -- where they come from -------------------------------------------------------------------------------------------

LIST = {"use": "wordlist", "config": {"words": ["bomb"]}}


def test_a_model_keeps_its_guards_in_its_checkpoint_and_is_not_loaded_without_them(tmp_path: Path) -> None:
    pytest.importorskip("mmhub_guards")
    model = mmhub.compose(
        encoders={"text": {"use": "rnn", "config": {"dim": 4, "embedding_dim": 4}}},
        decoder=LABELS,
        texts=["a bomb"],
        guards=[LIST],
    )
    folder = model.save(tmp_path / "model")
    config = read_config(folder)
    assert config.mmhub_format == 3
    assert [(one.use, one.schema) for one in config.guards or ()] == [("mmhub-guards/wordlist", 1)]
    assert config.guards and config.guards[0].config["words"] == ["bomb"]
    (need,) = [one for one in config.requires if one["distribution"] == "mmhub-guards"]
    assert need["components"] == ["guard:wordlist"]
    again = mmhub.load(str(folder))
    assert again.predict({"text": "a bomb"}) == [
        {"refused": "it holds a listed word", "guard": "mmhub-guards/wordlist"}
    ]
    assert read_config(again.save(tmp_path / "again")).guards == config.guards

    table = json.loads((folder / "config.json").read_text())
    with pytest.raises(TrustError, match="names guards, and has format 1 instead of 3"):
        parse_config(json.dumps(table | {"mmhub_format": 1}).encode(), "config.json")
    for entry in table["requires"]:
        if entry["distribution"] == "mmhub-guards":
            entry["distribution"] = "mmhub-no-guards"
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(PluginError, match="needs 1 plugin: mmhub-no-guards"):
        mmhub.load(str(folder))
    table["requires"] = []
    table["guards"][0]["use"] = "mmhub-no-guards/wordlist"
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(NotFoundError, match="there is no guard 'mmhub-no-guards/wordlist'"):
        mmhub.load(str(folder))


def test_a_model_that_goes_on_from_another_keeps_its_guards_and_none_stands_there_twice(tmp_path: Path) -> None:
    pytest.importorskip("mmhub_guards")
    base = classifier()
    more = {"use": "length", "config": {"characters": 9}}
    add_guards(base, [decode_config(GuardRecipe, LIST, "")])
    name = str(base.save(tmp_path / "base"))
    again = build_model(base.task, ModelRecipe(base=name), lambda modality: ())
    add_guards(again, [decode_config(GuardRecipe, table, "") for table in (LIST, more)])
    assert [source.component.spec.name for source in again.guards] == ["wordlist", "length"]


def test_a_layout_that_keeps_no_guards_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("mmhub_guards")
    model = classifier()
    add_guards(model, [decode_config(GuardRecipe, LIST, "")])
    with pytest.raises(UsageError, match="the transformers layout keeps no guards, and this model has some"):
        write_layout(model, tmp_path / "out")


def test_a_checkpoint_without_guards_is_as_it_was(tmp_path: Path) -> None:
    folder = classifier().save(tmp_path / "model")
    table = json.loads((folder / "config.json").read_text())
    assert table["mmhub_format"] == 1
    assert "guards" not in table


def test_a_file_of_guards_adds_them_to_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    pytest.importorskip("mmhub_guards")
    path = tmp_path / "guards.toml"
    path.write_text('[[guards]]\nuse = "wordlist"\nconfig = { words = ["bomb"], name = "house" }\n')
    monkeypatch.setenv("MMHUB_GUARDS", str(path))
    for model in (classifier(), model_of(Scripted("b"))):
        assert model.predict([{"text": "a bomb"}])[0]["guard"] == "mmhub-guards/house"
    assert [one["rule"] for one in log()] == ["bomb", "bomb"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotFoundError, "no file of guards"),
        ("[[guards]", UsageError, "is not valid TOML"),
        ('[[guard]]\nuse = "wordlist"', UsageError, "unknown key 'guard'; did you mean 'guards'"),
        ("[[guards]]\nconfig = {}", UsageError, "guards 1: the key 'use' is missing"),
        ('[[guards]]\nuse = "wordlst"', NotFoundError, "there is no guard 'wordlst'"),
        ('[[guards]]\nuse = "wordlist"\nconfig = { wrods = [] }', UsageError, "guards 1: unknown key 'wrods'"),
        ("\x00", UsageError, "is not valid TOML"),
        ("", UsageError, "names no guard"),
        ("a=" + "[" * 5000, UsageError, "nests too deeply"),
    ],
)
def test_a_wrong_file_of_guards_stops_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, error: type[MmhubError], message: str
) -> None:
    path = tmp_path / "guards.toml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("MMHUB_GUARDS", str(path))
    with pytest.raises(error, match=message):
        classifier().predict({"text": "a"})


def test_a_model_that_guards_use_is_not_guarded_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_GUARDS", str(tmp_path / "none.toml"))
    assert "label" in classifier().without_guards().predict({"text": "a"})[0]


# -- the contract kit -----------------------------------------------------------------------------------------------


class Good:
    """A guard that keeps the contract; those below break it in one place each."""

    class Config(ComponentConfig):
        word: str = "frobnicate"

    name = "good"

    def __init__(self, config: Any, model: Any = None, folder: Any = None) -> None:
        self.config, self.count = config, 0

    def check(self, sample: Any) -> Any:
        return Refusal("a word") if any(self.config.word in text for text in texts_of(sample)) else ""

    def review(self, sample: Any, answer: Any) -> Any:
        return answer


class Nameless(Good):
    name = ""


class Elsewhere(Good):
    on = ("inputs",)


class Careless(Good):
    class Config(msgspec.Struct):
        word: str = ""


class Silent(Good):
    def check(self, sample: Any) -> Any:
        return None


class Fickle(Good):
    def check(self, sample: Any) -> Any:
        self.count += 1
        return str(self.count)


class Quoting(Good):
    def check(self, sample: Any) -> Any:
        return Refusal("it says " + " ".join(texts_of(sample)))


class Meddling(Good):
    def review(self, sample: Any, answer: Any) -> Any:
        answer["seen"] = True
        return answer


class Apart(Good):
    def check_all(self, samples: Any) -> Any:
        return ["no" for _ in samples]


class Crashing(Good):
    def check(self, sample: Any) -> Any:
        return sample["text"].lower() and ""


@dataclass(frozen=True)
class Loaded(Component):
    """A component whose class is here."""

    cls: Any = None

    def load(self) -> Any:
        return self.cls


def broken(cls: type, name: str) -> str:
    """What a check says of a guard, "" if nothing."""
    component = Loaded(ComponentSpec(kind="guard", name="x", factory="x:X"), "mmhub-x", "0.1", cls)
    check = Check(
        f"guard:x/{name}", get_index().plugins[0], f"mmhub.testing.guards:{name.replace('-', '_')}", component
    )
    try:
        check.run()
    except ContractError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (Nameless, "builds", "its name is ''; expected a text"),
        (Elsewhere, "builds", "on is ('inputs',); expected 'input', 'output' or both"),
        (Careless, "config-round-trip", "expected a ComponentConfig"),
        (Silent, "judges", "it says None; expected one of ['str', 'Refusal'"),
        (Fickle, "judges", "it says '1', and then '2'; expected the same"),
        (Quoting, "judges", "expected nothing of what was said"),
        (Meddling, "judges", "it changes the answer to"),
        (Apart, "judges", "check_all says ['no'"),
        (Crashing, "judges", "it raised AttributeError"),
    ],
)
def test_a_guard_that_breaks_the_contract_is_found(cls: type, name: str, message: str) -> None:
    assert message in broken(cls, name)


def test_a_guard_that_keeps_the_contract_passes() -> None:
    assert [broken(Good, name) for name in ("builds", "config-round-trip", "judges")] == ["", "", ""]
