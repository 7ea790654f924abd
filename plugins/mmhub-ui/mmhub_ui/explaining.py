"""Why a model answers so: a page that is shown within the app, in a frame of its own, and can be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import gradio as gr

from mmhub.errors import MmhubError
from mmhub.explain import METHODS
from mmhub_ui.context import Context
from mmhub_ui.inputs import Given, check_uploaded
from mmhub_ui.page import escaped, failure, note
from mmhub_ui.work import Stream, follow

_SECONDS = 60.0  # of a sound that is explained
_FRAME = (
    "width: 100%; height: 70vh; min-height: 360px; border: 1px solid var(--border-color-primary); border-radius: 4px"
)


class ExplainView:
    """A button, the choice of a method, and below them the page; ids start with the tab's name."""

    def __init__(self, context: Context, tab: str) -> None:
        self.context = context
        self._tab = tab
        with gr.Row(visible=False) as self.box:
            self.method = gr.Dropdown(
                [(name.replace("-", " "), name) for name in METHODS],
                value=METHODS[0],
                label="How to explain",
                elem_id=f"{tab}-method",
                min_width=240,
            )
            self.ask = gr.Button("Explain", elem_id=f"{tab}-explain", min_width=120)

    def place(self) -> None:
        """Add the parts that show an explanation, where it is called."""
        self.page = gr.HTML(visible=False, elem_id=f"{self._tab}-explanation", container=False)
        self.file = gr.DownloadButton("Explanation (.html)", size="sm", visible=False, elem_id=f"{self._tab}-keep")

    @property
    def shown(self) -> list[Any]:
        """What an explanation changes."""
        return [self.page, self.file]

    @property
    def all(self) -> list[Any]:
        return [self.box, *self.shown]

    def fit(self, asks: bool) -> list[Any]:
        """Return updates of `all` for another model, whether or not it answers what is asked of it."""
        return [gr.update(visible=asks), *self.nothing()]

    def nothing(self) -> list[Any]:
        """Return updates of `shown` that show nothing."""
        return [gr.update(value="", visible=False), gr.update(value=None, visible=False)]

    def explained(self, name: str | None, method: str, given: Given) -> Iterator[list[Any]]:
        """Explain the answer to what was given; an error is told instead."""

        def work(stream: Stream) -> str:
            check_uploaded(given.files)
            self.context.check_length(given.text, given.pair, given.labels)
            return self._page((name or "").strip(), method, given, lambda: stream(""))

        yield [gr.update(value=note("Explaining…"), visible=True), gr.update(visible=False)]
        try:
            with closing(follow(work)) as pieces:
                for _, text in pieces:
                    if text is not None:
                        file = gr.update(value=self._saved(text), visible=True)
                        yield [gr.update(value=_framed(text), visible=True), file]
                    else:
                        yield [gr.update(), gr.update()]  # here it ends where nobody waits any more
        except MmhubError as error:
            yield [gr.update(value=failure(error, given.files), visible=True), gr.update(visible=False)]

    def _page(self, name: str, method: Any, given: Given, stop: Callable[[], None]) -> str:
        from mmhub.explain import explain
        from mmhub.explain.page import page, short_name, versions

        with self.context.use(name) as model:
            policy = self.context.policy
            policy = replace(policy, max_seconds=min(policy.max_seconds, _SECONDS))
            sample = given.sample(model)
            found = explain(model, sample, method=method, policy=policy, stop=stop)
        facts = {} if self.context.locked else versions()
        return page(found, sample, name=short_name(name), facts=facts, policy=policy)

    def _saved(self, text: str) -> str:
        """A file where the app keeps what is downloaded, and from where it deletes it in time."""
        from gradio.processing_utils import save_bytes_to_cache

        file = save_bytes_to_cache(text.encode(), "explanation.html", self.file.GRADIO_CACHE)
        self.file.temp_files.add(file)
        return file


def _framed(text: str) -> str:
    """A page in a frame that reaches nothing of the app, and in which no script runs but the page's."""
    return f'<iframe title="Explanation" sandbox="allow-scripts" style="{_FRAME}" srcdoc="{escaped(text)}"></iframe>'
