"""Models: registry, plugins, cache and local folders, with their cards."""

from __future__ import annotations

import gradio as gr

from mmhub_ui.context import Context


def browse_tab(context: Context) -> None:
    """Add the components of this tab to the one that is being built."""
    gr.Markdown("")
