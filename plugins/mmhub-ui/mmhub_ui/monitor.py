"""Training runs as they go on, from their metrics.jsonl: one, or several in the same charts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
import numpy
import tomlkit

from mmhub.engine.chart import short
from mmhub.engine.provenance import public
from mmhub_ui.context import Context
from mmhub_ui.curves import COLOURS, STYLE, Line, figure, smoothed
from mmhub_ui.page import escaped
from mmhub_ui.runs import RunLog, Runs

_EVERY = 2.0  # seconds between looks at the files
_AXES = {"steps": "step", "seconds": "second", "epochs": "epoch"}
_TITLES = {"mfu": "MFU", "memory_gb": "memory, GB", "flops_per_second": "FLOP per second", "ece": "calibration error"}
_FIRST = ("loss", "valid", "learning_rate", "gradient_norm", "speed")  # the order of the charts
_COLUMNS = ("run", "state", "task", "stage", "step", "best", "written")
_STYLE = """
.runs { overflow: auto; max-height: 280px } .runs table { border-collapse: collapse; width: 100%; font-size: 14px }
.runs.runs table, .runs.runs table tr { border: 0 }
.runs.runs table th, .runs.runs table td { text-align: left; padding: 5px 12px 5px 0; border: 0;
  border-bottom: 1px solid var(--border-color-primary); vertical-align: top }
.runs.runs table th { color: var(--body-text-color-subdued); font-weight: 500; white-space: nowrap }
.runs td:first-child { white-space: nowrap }
.runs td.n { font-variant-numeric: tabular-nums; white-space: nowrap }
.runs .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px;
  background: var(--c, transparent) }
.runs .running { font-weight: 600 } .runs .stopped { color: var(--body-text-color-subdued) }
.runs pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
"""


def monitor_tab(context: Context, tab: Any, tabs: Any) -> None:
    """Add the components of this tab to the one that is being built; they are kept up to date while it is open."""
    runs = Runs(Path(context.runs))

    def choices(chosen: list[str] | None, known: list[str]) -> Any:
        """The runs that can be chosen, where that changed; at first the newest is."""
        found = list(runs.look())
        if found == known:
            return gr.skip(), known
        kept = [name for name in chosen or () if name in found]
        return gr.Dropdown(choices=found, value=kept or (found[:1] if not known else [])), found

    def shown(chosen: list[str] | None, axis: str, log: bool, smooth: float, seen: str) -> Any:
        """Everything below the choice, where something changed since it was `seen`."""
        logs = runs.look()
        picked = [logs[name] for name in chosen or () if name in logs][:COLOURS]
        head = overview(list(logs.values()), picked, runs.root)
        versions = ",".join(f"{one.name}={one.version}" for one in picked)
        state = f"{hash((head, versions, axis, log, smooth))}"
        if state == seen:
            return gr.skip(), gr.skip(), gr.skip(), seen
        return head, charts(picked, axis, log=log, smooth=smooth), recipes(picked), state

    known, seen = gr.State([]), gr.State("")
    table = gr.HTML(elem_id="training-table")
    choice = gr.Dropdown([], label="Runs", info=f"Up to {COLOURS} in the same charts", multiselect=True,
                         max_choices=COLOURS, elem_id="training-runs")  # fmt: skip
    with gr.Row():
        axis = gr.Radio(list(_AXES), value="steps", label="Over", elem_id="training-axis")
        smooth = gr.Slider(0.0, 0.99, value=0.6, step=0.01, label="Smoothing of the loss", elem_id="training-smooth")
        log = gr.Checkbox(label="Logarithmic scale of losses", elem_id="training-log")
    drawn = gr.HTML(elem_id="training-charts")
    with gr.Accordion("Recipe", open=False, elem_id="training-recipe"):
        recipe = gr.HTML()
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "once"}
    inputs, outputs = [choice, axis, log, smooth, seen], [table, drawn, recipe, seen]
    clock = gr.Timer(_EVERY, active=False)
    tab.select(choices, [choice, known], [choice, known], **quiet).then(shown, inputs, outputs, **quiet)
    here: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    tabs.change(lambda: gr.Timer(active=False), None, clock, **here)
    tab.select(lambda: gr.Timer(active=True), None, clock, **here)
    clock.tick(choices, [choice, known], [choice, known], **quiet).then(shown, inputs, outputs, **quiet)
    changes = [choice.change, axis.change, log.change, smooth.release]
    gr.on(changes, shown, inputs, outputs, **quiet | {"trigger_mode": "always_last"})


# -- what is shown --------------------------------------------------------------------------------------------------


def overview(logs: Sequence[RunLog], picked: Sequence[RunLog], root: Path) -> str:
    """Return a table of the runs as HTML, the newest first; `picked` have the colours of their lines."""
    if not logs:
        where = "this folder" if root == Path() else f"'{root}'"
        start = f"mmhub train recipe.toml --out {root / 'first'}"
        return f"<p>No training run is in {escaped(where)} yet. To start one: <code>{escaped(start)}</code></p>"
    colours = {log.name: number for number, log in enumerate(picked)}
    rows = "".join(_told(log, colours.get(log.name)) for log in logs)
    head = "".join(f"<th scope=col>{name}</th>" for name in _COLUMNS)
    return f'<style>{STYLE}{_STYLE}</style><div class="colours runs"><table><tr>{head}</tr>{rows}</table></div>'


def _told(log: RunLog, colour: int | None) -> str:
    """The row of a run; whatever is odd in its files costs the others nothing."""
    try:
        return _row(log, colour)
    except Exception:
        return f"<tr><td>{escaped(log.name)}</td><td colspan={len(_COLUMNS) - 1}>cannot be read</td></tr>"


def _row(log: RunLog, colour: int | None) -> str:
    state, why = log.state()
    why = why.partition(";")[0][:80]  # what to do next is said where it was started
    best = log.best()
    reached = f"{log.step}" + (f" of {log.total}" if log.total and log.total != log.step else "")
    when = datetime.fromtimestamp(log.touched()).strftime("%Y-%m-%d %H:%M") if log.touched() else ""
    key = f'<span class="key{"" if colour is None else f" k{colour}"}"></span>'
    told = f'<span class="{state}">{state}</span>{escaped(f": {why}") if why else ""}'
    value = f"{best[0]} {short(best[1])} at {best[2]:.0f}" if best else ""
    cells = [log.task, log.stage, reached, value, when]
    rest = "".join(f"<td class=n>{escaped(cell)}</td>" for cell in cells)
    return f"<tr><td>{key}{escaped(log.name)}</td><td>{told}</td>{rest}</tr>"


def charts(picked: Sequence[RunLog], axis: str, *, log: bool = False, smooth: float = 0.0) -> str:
    """Return a chart for everything that the runs measured, as HTML; `smooth` is for the training loss."""
    unit = _AXES.get(axis, "step")
    marks = _marks(picked[0], unit) if len(picked) == 1 else []
    found = []
    for name in _names(picked):
        lines: list[Line] = []
        for colour, run in enumerate(picked):
            points = _over(run, run.series.get(name, []), unit)
            if name == "loss":
                lines += _losses(run, points, unit, colour, smooth)
            elif points:
                lines.append(Line(run.name, points, colour))
        found.append(figure(_title(name), lines, unit, log=log and "loss" in name, marks=marks))
    empty = "<p>Nothing is measured yet.</p>" if picked else "<p>Choose a run.</p>"
    valid = any("valid/loss" in run.series for run in picked)
    note = "<p>A dashed curve is the loss on the validation data.</p>" if valid else ""
    if marks:
        note += "<p>An upright dashed line: resumed, or a next stage began there.</p>"
    return f'<div class="curves">{"".join(found)}</div>{note}' if any(found) else empty


def _marks(run: RunLog, unit: str) -> list[float]:
    return [x for x, _ in _over(run, [(step, 0.0) for step in run.marks[:50]], unit)]


def _losses(run: RunLog, points: list[tuple[float, float]], unit: str, colour: int, smooth: float) -> list[Line]:
    """The loss of training, smoothed before the raw one, and that of validation."""
    valid = _over(run, run.series.get("valid/loss", []), unit)
    lines = [Line(run.name, smoothed(points, smooth), colour)] if points else []
    if points and smooth > 0:
        lines.append(Line(run.name, points, colour, faint=True))
    return lines + ([Line(f"{run.name} valid", valid, colour, dashed=True)] if valid else [])


def _names(picked: Sequence[RunLog]) -> list[str]:
    """What is drawn, each once: what is measured by steps, but not what x counts, or stands beside the loss."""
    names = dict.fromkeys(name for run in picked for name in run.series)
    if "valid/loss" in names:
        names = {"loss": None} | names
    place = {name: number for number, name in enumerate(_FIRST)}
    drawn = [name for name in names if name not in ("seconds", "epoch", "valid/loss")]
    return sorted(drawn, key=lambda name: place.get(name.partition("/")[0], len(_FIRST)))


def _title(name: str) -> str:
    table, _, last = name.rpartition("/")
    plain = _TITLES.get(last, last.replace("_", " "))
    return f"validation {plain}" if table == "valid" else plain if table in ("", "speed") else f"{table} {plain}"


def _over(run: RunLog, points: Sequence[tuple[float, float]], unit: str) -> list[tuple[float, float]]:
    """(step, value) with what `unit` counts in place of the step, between lines of training by proportion."""
    known = run.series.get({"second": "seconds", "epoch": "epoch"}.get(unit, ""), [])
    if unit == "step" or not points:
        return list(points)
    if not known:
        return []
    if known[0][0] > 0:
        known = [(0.0, 0.0), *known]
    steps, values = [step for step, _ in known], [value for _, value in known]
    places = numpy.interp([step for step, _ in points], steps, values)
    return [(float(x), y) for x, (_, y) in zip(places, points, strict=True)]


def recipes(picked: Sequence[RunLog]) -> str:
    """Return the recipes as HTML, without logins and folders."""
    parts = []
    for run in picked:
        try:
            text = tomlkit.dumps(public(run.recipe(), run.folder.resolve()))
        except (ValueError, RecursionError):
            text = "cannot be read"
        title = f"<p><b>{escaped(run.name)}</b></p>" if len(picked) > 1 else ""
        parts.append(f"{title}<pre>{escaped(text)}</pre>")
    return f'<div class="runs">{"".join(parts)}</div>' if parts else ""
