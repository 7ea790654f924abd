"""Two models side by side on the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from mmhub.errors import MmhubError
from mmhub_ui.answers import AnswerView, Shown, asked
from mmhub_ui.context import Context
from mmhub_ui.inputs import Fields, Given, Wants
from mmhub_ui.page import escaped, failure, note
from mmhub_ui.tryout import check_given, model_field


@dataclass(frozen=True)
class _Answers:
    """What the models of these names said, and how far they agree."""

    names: tuple[str | None, str | None]
    shown: Sequence[Shown]
    agreement: str


class CompareTab:
    """The components of the tab."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Row():
            self.names = [model_field(context, f"Model {side.upper()}", f"compare-{side}") for side in "ab"]
        if len(context.names) > 1:
            self.names[1].value = context.names[1]
        self.status = gr.HTML(elem_id="compare-status", container=False, elem_classes="mm-line")
        self.fields = Fields("compare")
        self.run = gr.Button("Run both", variant="primary", visible=False, elem_id="compare-run")
        self.agreement = gr.HTML(elem_id="compare-agreement", container=False, elem_classes="mm-line")
        self.views = []
        with gr.Row():
            for side in "ab":
                with gr.Column(min_width=280):
                    self.views.append(AnswerView("compare", f"-{side}", how=False))
        self._listen()

    def _listen(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4, "concurrency_id": "models"}
        answers = [part for view in self.views for part in view.all]
        shows = [self.status, *self.fields.all, self.run, self.agreement, *answers]
        found = gr.State(None)
        asked = gr.on(
            [self.run.click, self.fields.text.submit],
            self.answered,
            [*self.names, *self.fields.all],
            found,
            show_progress_on=self.agreement,
            **hidden,
        )
        told: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        asked.success(self.told, [*self.names, found], [self.agreement, *answers], **told)
        changes: dict[str, Any] = {"show_progress": "minimal", "cancels": [asked]}
        gr.on([name.change for name in self.names], self.choose, self.names, shows, **changes, **hidden)

    def choose(self, first: str | None, second: str | None) -> list[Any]:
        """Load both models, and show the fields that one of them needs."""
        wants: dict[str, Wants] = {}
        problems = []
        for name in filter(None, (first, second)):
            try:
                with self.context.use(name) as model:
                    wants[name] = Wants.of(model)
            except MmhubError as error:
                problems.append(failure(error))
        status = "".join(problems) or note(_takes(wants))
        asks = [_without_chat(one) for one in wants.values()]
        ready = bool(first and second) and not problems
        nothing = [update for view in self.views for update in view.updates(Shown())]
        return [status, *self.fields.fit(*asks), gr.update(visible=ready), "", *nothing]

    def answered(self, first: str | None, second: str | None, *values: Any) -> _Answers:
        """Ask both models, each for what it takes of the input."""
        given = Given(*values)
        shown, problems = [], []
        for name in (first, second):
            try:
                check_given(self.context, given)
                with self.context.use(name or "") as model:
                    shown.append(asked((name or "").strip(), model, given, self.context.bounds(model)))
            except MmhubError as error:
                problems.append(failure(error, given.files))
                shown.append(Shown(said=problems[-1]))
        return _Answers((first, second), shown, "" if problems else agreement(shown[0], shown[1]))

    def told(self, first: str | None, second: str | None, found: _Answers) -> list[Any]:
        """Show the answers, unless others were chosen while the models were asked."""
        if found.names != (first, second):
            return [gr.skip()] * (1 + sum(len(view.all) for view in self.views))
        updates = [update for view, one in zip(self.views, found.shown, strict=True) for update in view.updates(one)]
        return [found.agreement, *updates]


def agreement(first: Shown, second: Shown) -> str:
    """Say whether two answers are the same, as HTML."""
    a, b = first.raw or {}, second.raw or {}
    key = next((key for key in ("label", "labels", "tags", "text", "value") if key in a and key in b), None)
    if key is None:
        return note("The two models answer different questions: there is nothing to compare.")
    if key == "value":
        return _line(f"They differ by {abs(a[key] - b[key]):.4g}")
    same = a[key] == b[key]
    return _line("They agree" if same else "They disagree") + note(_distance(a, b))


def _line(text: str) -> str:
    return f'<p class="mm-score" role="status">{escaped(text)}</p>'


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """How far apart probabilities of the same classes are."""
    first, second = a.get("scores"), b.get("scores")
    if not isinstance(first, dict) or not isinstance(second, dict) or set(first) != set(second):
        return ""
    label = max(first, key=lambda name: abs(first[name] - second[name]))
    return f"Their scores differ most for {label}: {first[label]:.1%} and {second[label]:.1%}."


def _takes(wants: Mapping[str, Wants]) -> str:
    """Which kind of input only one of the two takes."""
    if len(wants) < 2:
        return ""
    lines = []
    (first, one), (second, other) = wants.items()
    for name, own, others in ((first, one, other), (second, other, one)):
        lacks = [kind for kind in others.modalities if kind not in own.modalities]
        lines += [f"{name} takes no {' and no '.join(lacks)}: it is asked without."] if lacks else []
    return " ".join(lines)


def _without_chat(wants: Wants) -> Wants:
    """A model that converses is asked one question here."""
    return replace(wants, chats=False)


def compare_tab(context: Context) -> CompareTab:
    """Add the components of this tab to the one that is being built."""
    return CompareTab(context)
