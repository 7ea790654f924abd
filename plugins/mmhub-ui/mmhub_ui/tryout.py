"""One model: inputs for its modalities, and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import gradio as gr

from mmhub.errors import MmhubError
from mmhub_ui.answers import AnswerView, Shown, ask, asked
from mmhub_ui.context import Context
from mmhub_ui.explaining import ExplainView
from mmhub_ui.inputs import Fields, Given, Settings, Wants, check_uploaded, writing_of
from mmhub_ui.listing import offered
from mmhub_ui.page import escaped, failure, failure_lines, note
from mmhub_ui.talk import TalkView, reply, shown
from mmhub_ui.work import Stream, follow

_LIMIT: dict[str, Any] = {"concurrency_limit": 4, "concurrency_id": "models"}


class TryTab:
    """The components of the tab; `name` takes a model from other tabs."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.name = model_field(context, "Model", "try-model")
        self.status = gr.HTML(elem_id="try-status", container=False, elem_classes="mm-line")
        self.talk = TalkView("try")
        with gr.Row():
            with gr.Column(min_width=320):
                self.fields = Fields("try")
                self.settings = Settings("try", context.tokens)
                with gr.Row():
                    self.run = gr.Button("Run", variant="primary", visible=False, elem_id="try-run")
                    self.stop = gr.Button("Stop", visible=False, elem_id="try-stop")
                    self.clear = gr.Button("Clear", visible=False, elem_id="try-clear")
                self.why = ExplainView(context, "try")
            with gr.Column(min_width=320, visible=False) as self.beside:
                self.answer = AnswerView("try")
        self.why.place()
        self._listen()
        self._serve()

    def _listen(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private"}
        inputs = [self.name, *self.fields.all, self.settings.times, *self.settings.values]
        outputs = [self.status, *self.answer.all]
        run = gr.on(
            [self.run.click, self.fields.text.submit, self.fields.labels.submit],
            self.answered,
            inputs,
            outputs,
            show_progress_on=self.answer.time,
            **hidden,
            **_LIMIT,
        )
        why = self.why.ask.click(
            self.explained, [self.name, self.why.method, *self.fields.all], self.why.shown, **hidden, **_LIMIT
        )
        self.stop.click(None, cancels=[run, why], **hidden)
        emptied = [*self.fields.all, *self.answer.all, *self.why.shown]
        self.clear.click(self.cleared, None, emptied, queue=False, cancels=[why], **hidden)
        said = [self.name, self.talk.message, self.talk.said, self.settings.system, *self.settings.values]
        seen = [self.talk.chat, self.talk.said, self.talk.message, self.talk.status]
        talk = self.talk.message.submit(self.said, said, seen, show_progress="hidden", **hidden, **_LIMIT)
        chooses: dict[str, Any] = {"show_progress": "minimal", "api_name": "choose", "cancels": [run, talk, why]}
        self.name.change(self.choose, self.name, self.shown, **chooses, **_LIMIT)
        self.talk.stop.click(None, cancels=[talk], **hidden).then(
            lambda: note("Stopped."), None, self.talk.status, queue=False, **hidden
        )
        forget = [self.talk.forget.click, self.talk.chat.clear]
        gr.on(forget, lambda: ([], [], None, ""), None, seen, queue=False, cancels=[talk], **hidden)

    def _serve(self) -> None:
        """Let programs ask, without a page."""
        asks, found = gr.Button(visible=False), gr.JSON(visible=False)
        asks.click(self.predicted, [self.name, *self.fields.all], found, api_name="run", **_LIMIT)

    def predicted(
        self,
        model: str,
        text: str | None = None,
        second_text: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        labels: str | None = None,
    ) -> dict[str, Any]:
        """Return what `mmhub predict` answers, with the model's own settings."""
        given = Given(text, second_text, image, audio, labels)
        try:
            check_given(self.context, given)
            with self.context.use(model) as loaded:
                return ask(loaded, given, self.context.bounds(loaded))
        except MmhubError as error:
            said = ". ".join(failure_lines(error, given.files))
            raise gr.Error(escaped(said), print_exception=False) from None

    @property
    def shown(self) -> list[Any]:
        """What `choose` changes."""
        parts = [self.status, *self.fields.all, *self.talk.all, *self.settings.all]
        return [*parts, self.run, self.stop, self.clear, self.beside, *self.answer.all, *self.why.all]

    def choose(self, name: str | None) -> Iterator[list[Any]]:
        """Load a model and show the fields that it needs; an error is told instead."""
        if not name:
            yield self._fitted("", Wants(), None)
            return
        yield self._fitted(note(f"Loading {name}…"), Wants(), None)
        try:
            with self.context.use(name) as model:
                found = self._fitted(_facts(name, model), Wants.of(model), model)
        except MmhubError as error:
            found = self._fitted(failure(error), Wants(), None)
        yield found

    def _fitted(self, status: str, wants: Wants, model: Any) -> list[Any]:
        asks = bool(wants.modalities) and not wants.chats
        parts = [status, *self.fields.fit(wants), *self.talk.fit(wants.chats, model), *self.settings.fit(wants, model)]
        buttons = [gr.update(visible=asks), gr.update(visible=asks and wants.writes), gr.update(visible=asks)]
        answer = [gr.update(visible=asks), *self.answer.updates(Shown())]
        return [*parts, *buttons, *answer, *self.why.fit(asks)]

    def answered(self, name: str | None, *values: Any) -> Iterator[list[Any]]:
        """Answer what stands in the fields, a text piece by piece."""
        given = given_of(values)

        def work(stream: Stream) -> tuple[str, Shown]:
            check_given(self.context, given)
            with self.context.use(name or "") as model:
                found = asked((name or "").strip(), model, given, self.context.bounds(model), stream)
                return _facts(name or "", model), found

        try:
            with closing(follow(work)) as pieces:
                for text, found in pieces:
                    if found is not None:
                        yield [found[0], *self.answer.updates(found[1])]
                    elif text:
                        yield [note("Writing…"), *self.answer.updates(Shown(text=text))]
        except MmhubError as error:
            yield [failure(error, given.files), *self.answer.updates(Shown())]

    def explained(self, name: str | None, method: str, *fields: Any) -> Iterator[list[Any]]:
        """Say what of the fields the answer comes from."""
        yield from self.why.explained(name, method, given_of((*fields, None)))

    def said(
        self, name: str | None, message: Any, talk: list[Any], system: str | None, *writing: Any
    ) -> Iterator[tuple[Any, Any, Any, str]]:
        """Answer a message of a conversation."""
        given = Given(writing=writing_of(writing))
        before, message = list(talk), message or {}
        for now, told in reply(self.context, name or "", message, before, system or "", given):
            kept = gr.update() if now == before else None  # what was not answered may be said again
            yield shown(now), now, kept, told

    def cleared(self) -> list[Any]:
        """Empty the fields and the answer."""
        emptied = [gr.update(value=None) for _ in self.fields.all]
        return [*emptied, *self.answer.updates(Shown()), *self.why.nothing()]


def try_tab(context: Context) -> TryTab:
    """Add the components of this tab to the one that is being built."""
    return TryTab(context)


def model_field(context: Context, label: str, elem_id: str) -> Any:
    """Return a field in which a model is chosen; its name may be typed, if the app is not locked."""
    names = offered(context)
    where = None if context.locked else "A registered name, a folder such as ./runs/a/model, or org/name on the Hub"
    return gr.Dropdown(
        names,
        value=context.names[0] if context.names else None,
        label=label,
        info=where,
        allow_custom_value=not context.locked,
        elem_id=elem_id,
    )


def given_of(values: Sequence[Any]) -> Given:
    """Return what stands in the fields of `Fields.all`, and behind them in those of `Settings`."""
    text, pair, image, audio, labels, times, *writing = values
    given = Given(text=text, pair=pair, image=image, audio=audio, labels=labels, times=times)
    return replace(given, writing=writing_of(writing)) if writing else given


def check_given(context: Context, given: Given) -> None:
    """Refuse what may not be asked, and more than may be at once.

    Raises:
        InputError: a text is too long, there are too many labels, or a file was not uploaded.
    """
    check_uploaded(given.files)
    context.check_length(given.text, given.pair, given.labels, labels=len(given.names))


def _facts(name: str, model: Any) -> str:
    return note(f"{name}: {model.task.name}, takes {', '.join(model.modalities)}, {_size(model)} parameters")


def _size(model: Any) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
