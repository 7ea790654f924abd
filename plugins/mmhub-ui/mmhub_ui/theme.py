"""How the app looks: the reader's own fonts, few colours, light or dark as their system is. Nothing is fetched."""

from __future__ import annotations

from typing import Any

import gradio as gr

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1120px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main, .gradio-container .wrap, .gradio-container .contain { width: 100%; min-width: 0; }
footer { display: none !important; }
.mm-head { display: flex; gap: .75rem; align-items: baseline; flex-wrap: wrap; }
.mm-head h1 { font-size: 1.35rem; margin: 0; }
.mm-head span { color: var(--body-text-color-subdued); }
.mm-note { color: var(--body-text-color-subdued); font-size: .9rem; margin: 0; overflow-wrap: anywhere; }
.mm-error { border-left: 3px solid var(--error-border-color, #b91c1c);
  background: var(--error-background-fill, #fee2e2); color: var(--error-text-color, #7f1d1d);
  padding: .5rem .75rem; border-radius: 4px; overflow-wrap: anywhere; }
.mm-error p { margin: 0; } .mm-error p + p { margin-top: .25rem; opacity: .85; }
.mm-facts { width: 100%; border-collapse: collapse; font-size: .9rem; margin: 0 0 .75rem; }
.mm-facts th, .mm-facts td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.mm-facts th { font-weight: 600; white-space: nowrap; }
.mm-facts, .mm-facts tr { border: 0 !important; }
.mm-facts th, .mm-facts td { border-width: 0 0 1px !important; }
.mm-facts caption { text-align: left; font-weight: 600; padding: .5rem 0 .25rem; }
.mm-scroll { overflow-x: auto; }
.mm-card { overflow-wrap: anywhere; line-height: 1.55; }
.mm-card h2, .mm-card h3, .mm-card h4 { margin: 1.1em 0 .4em; font-weight: 600; }
.mm-card h2 { font-size: 1.25rem; } .mm-card h3 { font-size: 1.1rem; }
.mm-card p, .mm-card ul, .mm-card ol { margin: .5em 0; } .mm-card ul { list-style: disc; padding-left: 1.5em; }
.mm-card ol { list-style: decimal; padding-left: 1.5em; }
.mm-card pre { overflow-x: auto; padding: .6rem; background: var(--background-fill-secondary); border-radius: 4px; }
.mm-card table { border-collapse: collapse; display: block; overflow-x: auto; }
.mm-card th, .mm-card td { border: 1px solid var(--border-color-primary); padding: .2rem .5rem; text-align: left; }
.mm-card a { color: var(--link-text-color); text-decoration: underline; }
.mm-line:not(:has(.mm-note)):not(:has(.mm-error)):not(:has(.mm-score)):not(:has(.mm-facts)):not(:has(.mm-card)) {
  display: none !important; }
.mm-table, .mm-table * { font-family: var(--font) !important; }
.mm-card table { border: 0 !important; }
#try-chat [aria-label="Share"], #try-chat [title="Share"] { display: none; }
.mm-score { font-size: 1.6rem; font-weight: 600; margin: 0; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""


def theme() -> Any:
    """Return the theme of the app."""
    own = gr.themes.Base(
        primary_hue="blue", secondary_hue="slate", neutral_hue="slate", radius_size="sm", font=_SANS, font_mono=_MONO
    )
    return own.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
    )
