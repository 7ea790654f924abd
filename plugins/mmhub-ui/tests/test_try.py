"""Trying one model: its fields, its answers as people see them, conversations, and what is wrong told in a line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmhub.errors import InputError, NotFoundError, UsageError
from mmhub_ui import talk as talk_module
from mmhub_ui.answers import Shown, _tagged, asked
from mmhub_ui.context import Context
from mmhub_ui.inputs import SETTINGS, Given, command
from mmhub_ui.inputs import picture as picture_field
from mmhub_ui.talk import contents, reply, shown
from mmhub_ui.tryout import TryTab
from mmhub_ui.work import follow

Tiny = Callable[[str], Any]
Seen = Callable[[Any, Any], dict[str, Any]]
UNTOUCHED = [None] * len(SETTINGS)


@pytest.fixture(scope="module")
def tab(in_blocks: Any) -> TryTab:
    """The tab of an app."""
    found: TryTab = in_blocks(lambda: TryTab(Context()))
    return found


def chosen(tab: TryTab, name: str, seen: Seen) -> dict[str, Any]:
    return seen(tab.shown, list(tab.choose(name))[-1])


def run(tab: TryTab, seen: Seen, name: str, *fields: Any) -> dict[str, Any]:
    values = [*fields, *[None] * (6 - len(fields)), *UNTOUCHED]
    return seen([tab.status, *tab.answer.all], list(tab.answered(name, *values))[-1])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("text", {"text"}),
        ("image", {"image"}),
        ("both", {"image", "audio"}),
        ("answers", {"text", "pair"}),
        ("pictures", {"text", "image", "labels"}),
        ("captions", {"image", "settings", "stop"}),
        ("writer", {"text", "settings", "stop"}),
        ("talker", {"settings", "system"}),
    ],
)
def test_exactly_the_fields_of_a_model_appear(tab: TryTab, seen: Seen, kind: str, fields: set[str]) -> None:
    found = chosen(tab, kind, seen)
    names = ("text", "pair", "image", "audio", "labels", "settings", "system", "times", "stop")
    assert {name for name in names if found[f"try-{name}"] is not None} == fields
    assert (found["try-run"] is None) == (kind == "talker")
    assert kind in found["try-status"] and "parameters" in found["try-status"]


def test_a_wrong_name_is_told_with_what_to_do(tab: TryTab, seen: Seen) -> None:
    found = chosen(tab, "./nothing-here", seen)
    assert 'role="alert"' in found["try-status"] and "no folder" in found["try-status"]
    assert "Traceback" not in found["try-status"] and found["try-run"] is None


def test_a_name_or_message_is_text_and_no_markup(tab: TryTab, seen: Seen) -> None:
    found = chosen(tab, "<img src=x onerror=alert(1)>${alert(1)}{{x}}", seen)["try-status"]
    assert "<img" not in found and "${" not in found and "{{" not in found and "&lt;img" in found


def test_a_classifier_shows_bars_the_best_class_its_json_and_the_same_as_a_command(
    tab: TryTab, seen: Seen, tiny: Tiny
) -> None:
    found = run(tab, seen, "text", "a good film")
    answer = tiny("text").predict([{"text": "a good film"}])[0]
    assert found["try-json"] == answer and found["try-label"] == pytest.approx(answer["scores"])
    assert answer["label"] in found["try-said"] and " s</p>" in found["try-time"]
    assert found["try-command"] == "mmhub predict text --text 'a good film'"
    assert found["try-marked"] is found["try-written"] is found["try-download"] is None


def test_the_lines_of_python_give_the_same_answer(
    tab: TryTab,
    seen: Seen,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(tab, seen, "text", "it's a 'good' film")
    exec(found["try-python"], {})
    assert capsys.readouterr().out.strip() == str([found["try-json"]])


def test_a_picture_is_answered_as_the_file_itself(
    tab: TryTab, seen: Seen, tiny: Tiny, tmp_path: Path, in_blocks: Any
) -> None:
    from PIL import Image

    turned = Image.open(_wide(tmp_path / "wide.jpg"))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    file = str(tmp_path / "turned.jpg")
    field = in_blocks(picture_field)
    remade = type(field)(**field.constructor_args | {"render": False})  # as gradio does to change it
    assert field.preprocess(_uploaded(file)) == remade.preprocess(_uploaded(file)) == file
    assert remade.preprocess(_uploaded("no picture.txt")) == "no picture.txt"
    assert not list(Path(talk_module.__file__).parent.glob("*.pyi")), "gradio writes one for each class of a component"
    assert run(tab, seen, "image", None, None, file)["try-json"] == tiny("image").predict([{"image": file}])[0]


def _uploaded(file: str) -> Any:
    from gradio.data_classes import ImageData

    return ImageData(path=file, orig_name=Path(file).name, url="http://127.0.0.1/file")


def _wide(path: Path) -> Path:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_a_file_that_was_not_uploaded_is_not_read(
    tab: TryTab, seen: Seen, tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio as gr

    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link.png").symlink_to(picture)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for file in (picture, f"{uploads}/../cat.png", str(uploads / "link.png"), "/dev/zero", str(tmp_path / "nothing")):
        found = run(tab, seen, "image", None, None, file)
        assert "was not uploaded" in found["try-status"] and found["try-json"] is None
        with pytest.raises(gr.Error, match="was not uploaded"):
            tab.predicted("image", image=file)
        assert "was not uploaded" in talk(Context(), {"text": "x", "files": [file]})[-1][1]


def test_programs_get_what_predict_answers(tab: TryTab, tiny: Tiny, picture: str) -> None:
    import gradio as gr

    assert tab.predicted("image", image=picture) == tiny("image").predict([{"image": picture}])[0]
    assert tab.predicted("writer", "a good") == tiny("writer").generate([{"text": "a good"}])[0]
    with pytest.raises(gr.Error, match="no folder"):
        tab.predicted("./nothing")


def test_what_would_take_for_ever_is_refused(tab: TryTab, seen: Seen, in_blocks: Any) -> None:
    found = run(tab, seen, "text", "good " * 30_000)
    assert "more than the limit of 100000" in found["try-status"] and found["try-json"] is None
    labels = ",".join(map(str, range(1001)))
    assert "1001 labels" in run(tab, seen, "pictures", "a", None, None, None, labels)["try-status"]
    assert "more than the limit" in talk(Context(), {"text": "a" * 200_000})[-1][1]
    assert "more than the limit" in chosen(tab, "x" * 200_000, seen)["try-status"]
    assert tab.settings.fields["max_new_tokens"].maximum is None
    locked: TryTab = in_blocks(lambda: TryTab(Context(names=("writer",), locked=True)))
    assert locked.settings.fields["max_new_tokens"].maximum == 1024


def test_a_long_text_is_answered_without_lines_that_hold_it(tab: TryTab, seen: Seen) -> None:
    found = run(tab, seen, "text", "good " * 1000)
    assert found["try-json"] and found["try-command"] is None and found["try-python"] == ""


def test_a_new_model_ends_what_the_old_one_was_asked(in_blocks: Any) -> None:
    import gradio as gr

    def wired() -> tuple[Any, list[set[str]]]:
        tab = TryTab(Context())
        fns = gr.context.Context.root_block.fns
        stops = [fn for fn in fns.values() if (tab.name._id, "change") in fn.targets and fn.cancels]
        return tab, [{fns[number].name for number in fn.cancels} for fn in stops]

    assert in_blocks(wired)[1] == [{"answered", "explained", "said"}]


def test_a_modality_that_is_left_out_is_missing(tab: TryTab, seen: Seen, tiny: Tiny, picture: str, sound: str) -> None:
    assert run(tab, seen, "both", None, None, picture)["try-json"] == tiny("both").predict([{"image": picture}])[0]
    both = run(tab, seen, "both", "not read", None, picture, sound)["try-json"]
    assert both == tiny("both").predict([{"image": picture, "audio": sound}])[0]


def test_nothing_given_is_told(tab: TryTab, seen: Seen) -> None:
    found = run(tab, seen, "both")
    assert "the sample is empty" in found["try-status"] and found["try-json"] is None


def test_a_broken_file_is_told_by_its_name_without_the_folders_of_the_server(
    tab: TryTab, seen: Seen, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = run(tab, seen, "image", None, None, str(tmp_path / "broken.png"))["try-status"]
    assert "broken.png" in found and str(tmp_path) not in found


def test_several_labels_are_named_or_none_of_them(tiny: Tiny) -> None:
    found = asked("x", tiny("multilabel"), Given("a good film"), Context().policy)
    assert found.raw is not None and set(found.bars or {}) == {"no", "yes"}
    assert (", ".join(found.raw["labels"]) or "none of its labels") in found.said


def test_a_number_is_shown(tiny: Tiny) -> None:
    found = asked("x", tiny("regression"), Given("a good film"), Context().policy)
    assert found.raw is not None and f"{found.raw['value']:.6g}" in found.said and found.bars is None


@pytest.mark.parametrize("kind", ["spans", "tags"])
def test_words_are_marked_with_their_tags(tiny: Tiny, kind: str) -> None:
    found = asked("x", tiny(kind), Given("a good film"), Context().policy)
    assert found.marked and "".join(text for text, _ in found.marked).strip() == "a good film"
    known = {"PER"} if kind == "spans" else {"NOUN", "VERB"}
    assert {tag for _, tag in found.marked if tag} and {tag for _, tag in found.marked if tag} <= known


def test_words_that_have_no_tag_are_shown() -> None:
    found = _tagged({"words": ["a", "b", "c"], "tags": ["X", "Y"]})
    assert found == [("a ", "X"), ("b ", "Y"), ("c ", None)]


def test_an_answer_is_marked_in_its_context(tiny: Tiny) -> None:
    found = asked("x", tiny("answers"), Given("who wrote it", "a good film"), Context().policy)
    assert found.raw is not None and found.marked
    assert [text for text, mark in found.marked if mark] == [found.raw["text"]]
    assert "".join(text for text, _ in found.marked) == "a good film"
    assert "--text-pair 'a good film'" in found.command


def test_a_question_without_its_context_is_told(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="context"):
        asked("x", tiny("answers"), Given("who wrote it"), Context().policy)


def test_a_picture_is_told_by_labels_that_were_typed(tiny: Tiny, picture: str) -> None:
    from mmhub.zero_shot import classify

    model = tiny("pictures")
    found = asked("x", model, Given(image=picture, labels="good film, blue sky"), Context().policy)
    assert found.raw == classify(model, [{"image": picture}], ["good film", "blue sky"])[0]
    assert (
        found.bars and set(found.bars) == {"good film", "blue sky"} and "--labels 'good film,blue sky'" in found.command
    )
    with pytest.raises(UsageError, match="no choice"):
        asked("x", model, Given(image=picture, labels="cat"), Context().policy)


def test_labels_come_before_a_text_that_is_typed_too(tiny: Tiny, picture: str) -> None:
    given = Given(text="a film", image=picture, labels="good film, blue sky")
    assert asked("x", tiny("pictures"), given, Context().policy).bars


def test_two_sides_are_compared(tiny: Tiny, picture: str) -> None:
    both = asked("x", tiny("pictures"), Given("a good film", image=picture), Context().policy)
    assert "similarity" in both.said
    same = asked("x", tiny("texts"), Given("blue sky", "blue sky"), Context().policy)
    assert "similarity 1.000" in same.said
    one = asked("x", tiny("texts"), Given("blue sky"), Context().policy)
    assert "similarity" not in one.said and "numbers" in one.said


def test_speech_has_a_table_of_words_and_subtitles(tab: TryTab, seen: Seen, sound: str) -> None:
    found = run(tab, seen, "speech", None, None, None, sound)
    answer = found["try-json"]
    assert found["try-written"] == answer["text"]
    shown_words = [row[0] for row in found["try-words"] or []]
    assert shown_words == [one["word"] for one in answer["words"]]
    if answer["words"]:
        assert "-->" in Path(found["try-download"]).read_text()


def test_subtitles_are_those_of_the_command_line(tab: TryTab) -> None:
    rows = [["hi", 0.0, 1.5]]
    updates = tab.answer.updates(
        Shown(text="hi", rows=rows, subtitles="1\n00:00:00,000 --> 00:00:01,500\nhi\n", raw={})
    )
    file = next(
        update["value"] for update in updates if isinstance(update, dict) and str(update.get("value")).endswith("srt")
    )
    assert file in tab.answer.file.temp_files, "gradio deletes these in time"
    assert Path(file).name == "transcript.srt" and Path(file).read_text().startswith("1\n00:00:00,000")


def test_a_text_is_written_piece_by_piece_with_the_settings_that_were_changed(tiny: Tiny, seen: Seen) -> None:
    model, pieces = tiny("writer"), list[str]()
    given = Given("a good", writing={"max_new_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": 3, "beams": 1})
    found = asked("x", model, given, Context().policy, pieces.append)
    assert found.raw == model.generate([{"text": "a good"}], max_new_tokens=5)[0]
    assert "".join(pieces) == found.text and found.command.endswith("--max-new-tokens 5")


def test_a_drawn_text_depends_on_its_seed_alone(tiny: Tiny) -> None:
    def text(seed: int) -> Any:
        writing = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed, "beams": 1}
        return asked("x", tiny("writer"), Given("a", writing=writing), Context().policy).text

    assert text(1) == text(1) and len({text(seed) for seed in range(4)}) > 1


# -- conversations


def talk(context: Context, message: dict[str, Any], before: list[Any] | None = None) -> list[tuple[list[Any], str]]:
    given = Given(writing={"max_new_tokens": 6})
    return list(reply(context, "talker", message, before or [], "", given))


@pytest.fixture
def talker() -> Context:
    return Context()


def test_a_conversation_goes_on_with_its_files_and_answers_as_chat_does(
    talker: Context, tiny: Tiny, picture: str
) -> None:
    said, told = talk(talker, {"text": "what is it", "files": [picture]})[-1]
    asked_parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]
    want = tiny("talker").chat([{"role": "user", "content": asked_parts}], max_new_tokens=6)
    assert said == [{"role": "user", "content": asked_parts}, {"role": "assistant", "content": want}]
    assert "cut" in told
    longer = talk(talker, {"text": "and now", "files": []}, said)[-1][0]
    assert longer[:2] == said and len(longer) == 4
    assert [one["role"] for one in shown(longer)] == ["user", "user", "assistant", "user", "assistant"]
    assert shown(longer)[0]["content"]["path"] == picture


def test_what_cannot_be_said_is_told_and_the_conversation_stays(talker: Context, tmp_path: Path, picture: str) -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert talk(talker, {"text": " ", "files": []}, before)[-1][0] == before
    (tmp_path / "song.txt").write_text("la")
    said, told = talk(talker, {"text": "x", "files": [str(tmp_path / "song.txt")]}, before)[-1]
    assert said == before and "song.txt" in told and str(tmp_path) not in told
    (tmp_path / "bad.png").write_bytes(b"no")
    assert "bad.png" in talk(talker, {"text": "x", "files": [str(tmp_path / "bad.png")]}, before)[-1][1]


def test_a_model_of_texts_alone_takes_no_files(tiny: Tiny, picture: str) -> None:
    with pytest.raises(InputError, match="cannot take"):
        contents(tiny("writer"), {"text": "x", "files": [picture]})


def test_work_ends_when_nobody_waits_for_it() -> None:
    ended = threading.Event()

    def work(stream: Callable[[str], None]) -> None:
        try:
            while True:
                stream("a")
                time.sleep(0.01)
        finally:
            ended.set()

    pieces = follow(work)
    assert next(pieces)[0].startswith("a")
    pieces.close()
    assert ended.wait(5)


# -- the models of an app


def test_a_locked_app_loads_its_own_models_alone(in_blocks: Any, seen: Seen) -> None:
    locked: TryTab = in_blocks(lambda: TryTab(Context(names=("text",), locked=True)))
    assert "is not offered here" in chosen(locked, "./elsewhere", seen)["try-status"]
    assert run(locked, seen, "text", "a")["try-json"]
    assert "is not offered here" in run(locked, seen, "/etc", "a")["try-status"]
    assert not locked.name.allow_custom_value and [name for name, _ in locked.name.choices] == ["text"]


def test_models_are_loaded_once_and_two_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmhub

    loaded: list[str] = []

    def load(name: str, device: str) -> Any:
        loaded.append(name)
        if name == "wrong":
            raise NotFoundError("no such model")
        return object()

    monkeypatch.setattr(mmhub, "load", load)
    context = Context()
    for name in ("a", "b", "a", " a ", "c", "a", "b"):
        context.model(name)
    assert loaded == ["a", "b", "c", "b"]
    with pytest.raises(NotFoundError):
        context.model("wrong")
    context.model("a")
    context.model("b")
    assert loaded[4:] == ["wrong"]


def test_a_model_whose_folder_was_written_anew_is_loaded_again(tiny: Tiny, tmp_path: Path) -> None:
    context, folder = Context(), tmp_path / "model"
    tiny("text").save(folder)
    first = context.model(str(folder))
    assert context.model(str(folder)) is first
    tiny("image").save(folder)
    assert context.model(str(folder)).modalities == ("image",)


def test_a_model_that_fails_to_load_for_one_is_kept_for_who_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmhub

    loaded: list[str] = []
    waiting = threading.Event()

    def load(name: str, device: str) -> Any:
        loaded.append(name)
        if len(loaded) == 1:
            assert waiting.wait(5)
            time.sleep(0.05)
            raise NotFoundError("not yet")
        return object()

    def second() -> None:
        waiting.set()
        context.model("a")

    monkeypatch.setattr(mmhub, "load", load)
    context = Context()
    thread = threading.Thread(target=second)
    threading.Timer(0.05, thread.start).start()
    with pytest.raises(NotFoundError):
        context.model("a")
    thread.join()
    context.model("a")
    assert loaded == ["a", "a"]


def test_a_model_that_is_in_use_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmhub

    loaded: list[str] = []
    monkeypatch.setattr(mmhub, "load", lambda name, device: loaded.append(name) or object())
    context = Context()
    with context.use("a"):
        for name in ("b", "c", "d"):
            context.model(name)
    context.model("a")
    assert loaded == ["a", "b", "c", "d"]


def test_a_model_serves_one_at_a_time() -> None:
    context, order = Context(), list[str]()
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with context.use("text"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with context.use("text"):
        inside.set()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_no_name_is_told() -> None:
    with pytest.raises(NotFoundError, match="no model is chosen"):
        Context().model(" ")


def test_a_command_quotes_what_a_shell_would_read(tiny: Tiny) -> None:
    import shlex

    line = command("./my model", tiny("text"), Given("it's; rm -rf $HOME"))
    assert shlex.split(line) == ["mmhub", "predict", "./my model", "--text", "it's; rm -rf $HOME"]
    assert json.dumps(line)
