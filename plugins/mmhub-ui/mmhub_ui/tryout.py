"""One model: inputs for its modalities, and its answer."""

from __future__ import annotations

import gradio as gr

from mmhub_ui.context import Context


def try_tab(context: Context) -> None:
    """Add the components of this tab to the one that is being built."""
    gr.Markdown("")
