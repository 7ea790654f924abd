"""The app: one tab for each thing that people do."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mmhub_ui.browse import browse_tab
from mmhub_ui.compare import compare_tab
from mmhub_ui.context import Context
from mmhub_ui.monitor import monitor_tab
from mmhub_ui.tryout import try_tab


def build_app(context: Context) -> Any:
    """Return the Gradio app; `launch` starts it."""
    with gr.Blocks(title="mmhub", analytics_enabled=False) as app:
        gr.Markdown("# mmhub")
        with gr.Tab("Try", id="try"):
            try_tab(context)
        with gr.Tab("Compare", id="compare"):
            compare_tab(context)
        with gr.Tab("Models", id="models"):
            browse_tab(context)
        with gr.Tab("Training", id="training"):
            monitor_tab(context)
    return app
