"""Models: registry, plugins, cache and local folders, with their cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmhub.errors import MmhubError, NetworkError
from mmhub_ui import listing
from mmhub_ui.context import Context
from mmhub_ui.page import CARD_CHARS, card, failure, note, table, told

if TYPE_CHECKING:
    from mmhub.hub.describe import Description
    from mmhub.names import Resolved

_HEADER = ["Name", "Where", "Task", "Summary"]
_NONE = "Choose a model from the list to see its card."


class BrowseTab:
    """The components of the tab; `on_try` wires its button."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Row(visible=not context.locked):
            self.scope = gr.Radio(
                list(listing.SCOPES), value="Registered", label="Show", min_width=260, elem_id="models-scope"
            )
            self.search = gr.Textbox(
                label="Search", placeholder="name, task or summary", min_width=260, elem_id="models-search"
            )
        self.status = gr.HTML(elem_id="models-status", container=False, elem_classes="mm-line")
        self.table = gr.Dataframe(
            headers=_HEADER,
            label="Models",
            type="array",
            interactive=False,
            max_height=320,
            wrap=True,
            column_widths=["24%", "16%", "18%", "42%"],
            elem_id="models-table",
            elem_classes="mm-table",
            buttons=[],
        )
        self.chosen = gr.State("")
        self.button = gr.Button("Try it", size="md", variant="primary", visible=False, elem_id="models-try")
        self.facts = gr.HTML(elem_id="models-facts", container=False, elem_classes="mm-line")
        self.card = gr.HTML(elem_id="models-card", container=False, elem_classes="mm-line")
        if not context.locked:
            with gr.Accordion("Installed plugins and their parts", open=False):
                self.plugins = gr.Dataframe(
                    headers=["Plugin", "Version", "Status", "Parts", "Summary"],
                    value=listing.plugins(),
                    label="Plugins",
                    type="array",
                    interactive=False,
                    wrap=True,
                    elem_id="plugins-table",
                    elem_classes="mm-table",
                    buttons=[],
                )
        self._listen()

    def _listen(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        found = [self.table, self.status]
        gr.on([self.scope.change, self.search.change], self.listed, [self.scope, self.search], found, **hidden)
        shows = [self.chosen, self.facts, self.card, self.button]
        self.table.select(self.selected, None, shows, **hidden)

    def on_try(self, name: Any, open_tab: Callable[[str], list[Any]], outputs: list[Any]) -> None:
        """Let the button put the model's name into a field, and open its tab."""
        self.button.click(open_tab, self.chosen, [name, *outputs], queue=False, api_visibility="private")

    def listed(self, scope: str, query: str) -> tuple[list[list[str]], str]:
        """Return the rows of the table, and what is to be said of them."""
        try:
            found = listing.models(self.context, scope, query)
        except MmhubError as error:
            return [], failure(error)
        rows = [[one.name, one.where, one.task, one.summary] for one in found]
        return rows, note("" if rows else _nothing(scope, query))

    def selected(self, event: gr.SelectData) -> tuple[str, str, str, Any]:
        """Show the model whose row was chosen."""
        return self.opened(str(event.row_value[0]) if event.row_value else "")

    def opened(self, name: str) -> tuple[str, str, str, Any]:
        """Return the name, what is known of the model, its card, and its button."""
        if not name:
            return "", "", note(_NONE), gr.update(visible=False)
        facts, text = described(self.context, name)
        return name, facts, text, gr.update(visible=True, value=f"Try {name}")


def _nothing(scope: str, query: str) -> str:
    if query:
        return "No model of this list has all these words in its name, task or summary."
    return "No model is registered; the other lists may have some." if scope == "Registered" else "There is none here."


def described(context: Context, name: str) -> tuple[str, str]:
    """Return what `mmhub models show` says of a model, and its card, as HTML. Errors are told in the first."""
    texts = [""]

    def facts() -> str:
        from mmhub.names import resolve

        found = resolve(context.check(name))
        about = _about(found)
        texts[0] = _card_text(found, about)
        return _facts(name, found, about)

    shown = told(facts)
    return shown, card(texts[0]) if texts[0] else ""


def _about(found: Resolved) -> Description:
    """As `mmhub models show`: without the Hub, what the registry says."""
    from mmhub.hub.describe import Description, describe

    try:
        return describe(found)
    except NetworkError as error:
        if not found.entry:
            raise
        entry = found.entry
        about = Description(task=entry.task, license=entry.license, summary=entry.summary, requires=[*entry.requires])
        about.note = f"{error.message}; only what the registry says is shown"
        return about


def _card_text(found: Resolved, about: Description) -> str:
    from mmhub.hub.cache import snapshot

    folder = found.path or (snapshot(found.repo_id, about.commit or found.commit) if found.repo_id else None)
    try:
        if not folder or not (Path(folder) / "README.md").is_file():
            return ""
        with (Path(folder) / "README.md").open(encoding="utf-8", errors="replace") as file:
            return file.read(CARD_CHARS + 1)
    except OSError:
        return ""


def _facts(name: str, found: Resolved, about: Description) -> str:
    from mmhub.cli.text import size_text

    rows = [
        ("Name", name),  # not where it leads, which is a folder of this machine
        ("Summary", about.summary),
        ("Task", about.task),
        ("Takes", ", ".join(about.modalities)),
        ("Licence", about.license or "none given"),
        ("Size", size_text(about.size) if about.size is not None else ""),
        ("Library", about.library),
        ("Needs", ", ".join(about.requires)),
        ("Missing", ", ".join(about.unmet)),
        ("To install it", about.install),
        ("Loads", about.loadable),
        ("Repository", found.repo_id or ""),
        ("Commit", about.commit or found.commit or ""),
        ("Made from", ", ".join(f"{one.name} ({one.relation})" for one in about.licences[1:])),
        ("Warnings", "; ".join(about.warnings)),
        ("Note", about.note),
    ]
    parts = [(role.replace("_", " "), part["use"], size_text(part["bytes"])) for role, part in about.components.items()]
    if found.path is not None:
        rows = [(title, value.replace(str(found.path), name)) for title, value in rows]
    shown = table([row for row in rows if row[1]]) + table(parts, ("Part", "Component", "Size"), "Parts")
    return shown + "".join(map(_results, about.results))


def _results(result: dict[str, Any]) -> str:
    from mmhub.metrics import flat

    subsets = result["subsets"] if isinstance(result["subsets"], dict) else {}
    found = {label: flat(one) for label, one in {"all": result["metrics"], **subsets}.items() if isinstance(one, dict)}
    keys = list(found.get("all", ()))
    rows = [(label, *(f"{one[key]:.4g}" if key in one else "" for key in keys)) for label, one in found.items()]
    title = f"Measured on {result['data'] or 'held-out data'} ({result['rows']} rows)"
    return table(rows, ("Inputs", *keys), title)


def browse_tab(context: Context) -> BrowseTab:
    """Add the components of this tab to the one that is being built."""
    return BrowseTab(context)
