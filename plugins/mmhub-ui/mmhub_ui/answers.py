"""Answers: how a model is asked, and how what it says is shown to people: bars, marked words, texts, tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmhub_ui.inputs import Given, Wants, command, python
from mmhub_ui.page import escaped, note
from mmhub_ui.work import Stream

if TYPE_CHECKING:
    from mmhub.interfaces import Policy
    from mmhub.model import Model

_BARS = 10  # classes that are shown
_SHOWN_CHARS = 2000  # of what was typed, in the lines that give the same answer
Answer = dict[str, Any]


def ask(model: Model, given: Given, policy: Policy, stream: Stream | None = None) -> Answer:
    """Return a model's answer to what was given, as `mmhub predict` has it.

    `stream` gets a text piece by piece as it is written.

    Raises:
        UsageError: a setting or a label is wrong. InputError: an input is missing or cannot be read.
    """
    wants, sample = Wants.of(model), given.sample(model)
    if wants.labels and given.names:
        from mmhub.zero_shot import classify

        return classify(model, [sample], given.names, policy=policy)[0]
    if model.task.name == "speech-recognition":
        from mmhub.speech import transcribe

        how: dict[str, Any] = {"settings": given.settings(model)} if wants.writes else {}
        times: Any = given.times if wants.times and given.times else "none"
        return transcribe(model, [sample], policy=policy, timestamps=times, **how)[0]
    if wants.writes:
        told = None if stream is None else lambda row, number, text: stream(text)
        return model.generate([sample], given.settings(model), policy=policy, stream=told)[0]
    return model.predict([sample], policy=policy)[0]


@dataclass(frozen=True)
class Shown:
    """An answer for people; what is None or empty is not shown. `said` is a line of HTML above all else."""

    said: str = ""
    bars: Mapping[str, float] | None = None
    marked: Sequence[tuple[str, str | None]] | None = None
    text: str | None = None
    rows: Sequence[Sequence[Any]] = field(default_factory=list)
    subtitles: str = ""
    raw: Answer | None = None
    seconds: float | None = None
    command: str = ""
    python: str = ""


def show(name: str, model: Model, given: Given, answer: Answer, seconds: float) -> Shown:
    """Return an answer in the form that suits it."""
    short = sum(len(text or "") for text in (given.text, given.pair, given.labels)) <= _SHOWN_CHARS
    lines = (command(name, model, given), python(name, model, given)) if short else ("", "")
    return Shown(**_form(answer, given), raw=answer, seconds=seconds, command=lines[0], python=lines[1])


def asked(name: str, model: Model, given: Given, policy: Policy, stream: Stream | None = None) -> Shown:
    """Ask, and show the answer with the seconds that it took; see `ask`."""
    started = time.perf_counter()
    answer = ask(model, given, policy, stream)
    return show(name, model, given, answer, time.perf_counter() - started)


def _form(answer: Answer, given: Given) -> dict[str, Any]:
    if "refused" in answer:
        return {"said": note(f"Refused by the guard {answer['guard']}: {answer['refused']}")}
    if "label" in answer:
        return {"said": _headline(answer["label"], answer["score"]), "bars": answer.get("scores")}
    if "labels" in answer:
        return {"said": _headline(", ".join(answer["labels"]) or "none of its labels"), "bars": answer.get("scores")}
    if "tags" in answer:
        return {"marked": _tagged(answer)}
    if "start" in answer:
        return _quoted(answer, given.pair or "")
    if "value" in answer:
        return {"said": _headline(f"{answer['value']:.6g}")}
    if "embeddings" in answer:
        return {"said": _vectors(answer["embeddings"])}
    if "text" in answer:
        return {"text": answer["text"], "said": _ending(answer), "rows": _times(answer), "subtitles": _srt(answer)}
    return {}


def _headline(text: str, score: float | None = None) -> str:
    beside = "" if score is None else f' <span class="mm-note">{score:.1%}</span>'
    return f'<p class="mm-score">{escaped(text)}{beside}</p>'


def _tagged(answer: Answer) -> list[tuple[str, str | None]]:
    """The words with their tags; where these make spans, the spans with their kinds."""
    words: Sequence[str] = answer["words"]
    if "entities" not in answer:
        tags = [*answer["tags"], *[None] * (len(words) - len(answer["tags"]))]  # a text may have been cut
        return [(f"{word} ", tag) for word, tag in zip(words, tags, strict=False)]
    found: list[tuple[str, str | None]] = []
    place = 0
    for one in answer["entities"]:
        found.append((" ".join([*words[place : one["start"]], ""]), None))
        found.append((" ".join(words[one["start"] : one["end"]]), one["label"]))
        found.append((" ", None))
        place = one["end"]
    return [*found, (" ".join(words[place:]), None)]


def _quoted(answer: Answer, context: str) -> dict[str, Any]:
    start, end = answer["start"], answer["end"]
    if start is None:
        return {"said": _headline("no answer in the context", answer["score"]), "marked": [(context, None)]}
    marked = [(context[:start], None), (context[start:end], "answer"), (context[end:], None)]
    return {"said": _headline(answer["text"], answer["score"]), "marked": marked}


def _vectors(vectors: Mapping[str, Sequence[float]]) -> str:
    sizes = ", ".join(f"{side.replace('_', ' ')}: {len(vector)} numbers" for side, vector in vectors.items())
    if len(vectors) != 2:
        return note(f"A vector of what was given ({sizes}); give both sides to compare them, or labels.")
    first, second = vectors.values()
    likeness = sum(a * b for a, b in zip(first, second, strict=True))
    return _headline(f"similarity {likeness:.3f}") + note(f"From -1 to 1, the cosine of two vectors ({sizes}).")


def _ending(answer: Answer) -> str:
    left_out = answer.get("truncated")
    lines = [f"The oldest {left_out} turns no longer fit and were left out."] if left_out else []
    lines += ["It was cut: it reached the most tokens that it may write."] if answer.get("finish") == "length" else []
    return note(" ".join(lines))


def _times(answer: Answer) -> list[list[Any]]:
    words = [[one["word"], one["start"], one["end"]] for one in answer.get("words") or ()]
    found = words or [[one["text"].strip(), one["start"], one["end"]] for one in answer.get("segments") or ()]
    return [[text, round(start, 2), round(end, 2)] for text, start, end in found]


def _srt(answer: Answer) -> str:
    from mmhub.speech.subtitles import as_text

    return as_text(answer, ".srt") if answer.get("words") or answer.get("segments") else ""


class AnswerView:
    """The components that show an answer; ids start with the tab's name and end with `suffix`."""

    def __init__(self, tab: str, suffix: str = "", how: bool = True) -> None:
        def own(name: str) -> str:
            return f"{tab}-{name}{suffix}"

        with gr.Column(elem_id=own("answer")):
            self.said = gr.HTML(visible=False, elem_id=own("said"), container=False, elem_classes="mm-line")
            self.bars = gr.Label(
                label="Scores", num_top_classes=_BARS, show_heading=False, visible=False, elem_id=own("label")
            )
            self.marked = gr.HighlightedText(
                label="Marked", combine_adjacent=False, visible=False, elem_id=own("marked"), buttons=[]
            )
            self.text = gr.Textbox(
                label="Text", lines=2, max_lines=20, buttons=["copy"], visible=False, elem_id=own("written")
            )
            self.rows = gr.Dataframe(
                headers=["Heard", "Start (s)", "End (s)"],
                label="Times",
                interactive=False,
                max_height=260,
                visible=False,
                elem_id=own("words"),
                elem_classes="mm-table",
            )
            self.file = gr.DownloadButton("Subtitles (.srt)", size="sm", visible=False, elem_id=own("download"))
            self.time = gr.HTML(elem_id=own("time"), container=False, elem_classes="mm-line")
            with gr.Accordion("The answer as JSON", open=False, visible=False) as self.details:
                self.raw = gr.JSON(show_label=False, elem_id=own("json"), buttons=["copy"])
            with gr.Accordion("The same without this page", open=False, visible=False) as self.how:
                self.command = gr.Code(
                    label="On the command line", language="shell", lines=1, elem_id=own("command"), **_CODE
                )
                self.python = gr.Code(label="In Python", language="python", lines=3, elem_id=own("python"), **_CODE)
        self._shows_how = how

    @property
    def all(self) -> list[Any]:
        parts = [self.said, self.bars, self.marked, self.text, self.rows, self.file, self.time]
        return [*parts, self.details, self.raw, self.how, self.command, self.python]

    def updates(self, shown: Shown) -> list[Any]:
        """Return the updates of `all` that show an answer, or nothing."""
        time = "" if shown.seconds is None else note(f"{shown.seconds:.2f} s")
        answered = shown.raw is not None
        return [
            gr.update(value=shown.said, visible=bool(shown.said)),
            gr.update(value=dict(shown.bars or {}) or None, visible=bool(shown.bars)),
            gr.update(value=shown.marked and list(shown.marked), visible=bool(shown.marked)),
            gr.update(value=shown.text, visible=shown.text is not None),
            gr.update(value=[list(row) for row in shown.rows] or None, visible=bool(shown.rows)),
            gr.update(value=self._saved(shown.subtitles), visible=bool(shown.subtitles)),
            time,
            gr.update(visible=answered),
            shown.raw,
            gr.update(visible=bool(shown.python) and self._shows_how),
            gr.update(value=shown.command, visible=bool(shown.command)),
            shown.python,
        ]

    def _saved(self, text: str) -> str | None:
        """A file of subtitles where the app keeps what is downloaded, and from where it deletes it in time."""
        from gradio.processing_utils import save_bytes_to_cache

        if not text:
            return None
        file = save_bytes_to_cache(text.encode(), "transcript.srt", self.file.GRADIO_CACHE)
        self.file.temp_files.add(file)
        return file


_CODE: dict[str, Any] = {"interactive": False, "wrap_lines": True, "show_line_numbers": False, "buttons": ["copy"]}
