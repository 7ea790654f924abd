"""The app: one tab for each thing that people do."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

import gradio as gr

from mmhub_ui.browse import browse_tab
from mmhub_ui.compare import compare_tab
from mmhub_ui.context import UPLOAD_BYTES, Context
from mmhub_ui.monitor import monitor_tab
from mmhub_ui.theme import CSS, theme
from mmhub_ui.tryout import try_tab

_KEPT_SECONDS = 3600  # that uploads stay on the disk
_WAITING = 32  # requests; more are told to come back
_HEAD = '<div class="mm-head"><h1>mmhub</h1><span>try, compare and look through models</span></div>'


def build_app(context: Context) -> Any:
    """Return the Gradio app; `launch(**launch_options())` starts it.

    A locked app has no training, and no models but its own. What people hand over lies in a folder that nobody else
    reads and that goes when Python ends, unless GRADIO_TEMP_DIR names another.
    """
    _own_folder()
    with gr.Blocks(title="mmhub", analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS)) as app:
        gr.HTML(_HEAD, container=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Try", id="try", elem_id="tab-try"):
                trying = try_tab(context)
            if not context.locked or len(context.names) > 1:
                with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                    comparing = compare_tab(context)
                if len(context.names) > 1:
                    outputs = [comparing.status, *comparing.fields.all, comparing.run, comparing.agreement]
                    outputs += [part for view in comparing.views for part in view.all]
                    app.load(comparing.choose, comparing.names, outputs, api_visibility="private")
            with gr.Tab("Models", id="models", elem_id="tab-models") as models:
                browsing = browse_tab(context)
            if not context.locked:
                with gr.Tab("Training", id="training", elem_id="tab-training") as training:
                    monitor_tab(context, training, tabs)
        browsing.on_try(trying.name, lambda name: [name, gr.Tabs(selected="try")], [tabs])
        found = [browsing.table, browsing.status]
        gr.on(
            [app.load, models.select],
            browsing.listed,
            [browsing.scope, browsing.search],
            found,
            show_progress="hidden",
            api_visibility="private",
        )
        if context.names:
            app.load(trying.choose, trying.name, trying.shown, show_progress="minimal", api_visibility="private")
    app.queue(max_size=_WAITING, default_concurrency_limit=4)
    return app


def _own_folder() -> None:
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="mmhub-ui-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def launch_options() -> dict[str, Any]:
    """Return what the app is started with, wherever it runs: nothing is shared, tracked, kept or read beside it."""
    return {
        "share": False,
        "quiet": True,
        "inbrowser": False,
        "show_error": False,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "allowed_paths": [],
        "max_file_size": UPLOAD_BYTES,
        "theme": theme(),
        "css": CSS,
    }
