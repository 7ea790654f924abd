"""Training runs as they go on, from their metrics.jsonl."""

from __future__ import annotations

import gradio as gr

from mmhub_ui.context import Context


def monitor_tab(context: Context) -> None:
    """Add the components of this tab to the one that is being built."""
    gr.Markdown("")
