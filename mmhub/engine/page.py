"""report.html: one self-contained page on a run, made from the files of its folder, so that it can be made again.

It reads metrics.jsonl, sessions.jsonl (when the run was started and how it ended), recipe.toml, model/provenance.json
and model/eval. No script and nothing from elsewhere is in it; light and dark follow the reader's system.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import tomlkit

from mmhub.engine.chart import Curve, chart, short
from mmhub.engine.provenance import public
from mmhub.files import write_file

METRICS, SESSIONS, PAGE = "metrics.jsonl", "sessions.jsonl", "report.html"

# What is measured once a log line: its title, and how to write its numbers.
_RATES = {
    "samples_per_second": "samples a second",
    "tokens_per_second": "tokens a second",
    "images_per_second": "images a second",
    "audio_seconds_per_second": "audio seconds a second",
    "flops_per_second": "FLOP a second",
    "mfu": "MFU",
    "data_wait_share": "share of time waiting for data",
    "padding_share": "share of padding",
    "memory_gb": "memory, GB",
}

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1f21; --soft: #63676c; --line: #e2e2de;
  --c0: #2a6fc9; --c1: #d4571e; --c2: #23845b; --good: #23744f; --bad: #b3372b }
@media (prefers-color-scheme: dark) { :root { --page: #161718; --card: #1f2123; --ink: #e8e8e6; --soft: #a2a6ab;
  --line: #35383b; --c0: #6ea8ef; --c1: #f08a55; --c2: #5cc398; --good: #6cc79d; --bad: #f0857a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere } h2 { font-size: 17px; margin: 32px 0 8px }
p { margin: 4px 0; color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) }
.tiles, .charts { display: grid; gap: 12px; margin: 16px 0 }
.tiles { grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)) }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
.tile, figure, .table, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 }
.tile { padding: 10px 14px } .tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums }
.tile span, figcaption span { color: var(--soft); font-size: 13px }
figure { padding: 10px 12px 4px } svg { display: block; width: 100%; height: auto }
figcaption { display: flex; justify-content: space-between; gap: 8px; flex-wrap: wrap; font-size: 14px }
figcaption em { font-style: normal; font-variant-numeric: tabular-nums }
.key { margin-right: 12px } .key::before { content: ""; display: inline-block; width: 10px; height: 10px;
  border-radius: 2px; margin-right: 5px; background: var(--c0) }
.key.c1::before { background: var(--c1) } .key.c2::before { background: var(--c2) }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums }
@media (max-width: 520px) { svg text { font-size: 14px } }
.grid { stroke: var(--line) } .mark { stroke: var(--soft); stroke-dasharray: 3 4 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .dot { stroke: none } .band { opacity: .18 }
.line.c0 { stroke: var(--c0) } .line.c1 { stroke: var(--c1) } .line.c2 { stroke: var(--c2) }
.dot.c0, .band.c0 { fill: var(--c0) } .dot.c1, .band.c1 { fill: var(--c1) } .dot.c2, .band.c2 { fill: var(--c2) }
.table { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { text-align: left; padding: 6px 12px; border-top: 1px solid var(--line); vertical-align: top }
tr:first-child > * { border-top: 0 } th { color: var(--soft); font-weight: 500; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.n { text-align: right }
code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
details { margin: 32px 0 0 } summary { cursor: pointer; padding: 10px 14px; font-weight: 600 }
pre { margin: 0; padding: 0 14px 14px; overflow-x: auto; white-space: pre-wrap }
"""


def write_page(folder: str | Path) -> Path:
    """Write report.html into a run folder, from what the folder holds; return its path.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    run = _Run(folder)
    body = "".join((_head(run), _curves(run), _results(run), _throughput(run), _model(run), _data(run), _sessions(run)))
    recipe = f"<details><summary>Recipe</summary><pre>{escape(run.recipe)}</pre></details>" if run.recipe else ""
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: {escape(run.task)}</title><style>{_STYLE}</style>"
        f"<main>{body}{recipe}</main></html>\n"
    )
    write_file(folder / PAGE, text)
    return folder / PAGE


class _Run:
    """What the files of a run folder say; whatever is missing is empty."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self.lines = _read_lines(folder / METRICS)
        self.sessions = _read_lines(folder / SESSIONS)
        starts = [entry for entry in self.sessions if "end" not in entry]
        self.facts: Mapping[str, Any] = starts[-1] if starts else {}
        self.recipe = _shown_recipe(folder)
        self.provenance = _read_json(folder / "model" / "provenance.json")
        self.task = str(self.facts.get("task") or self.provenance.get("task") or "run")
        self.report = _read_json(folder / "model" / "eval" / f"{self.task}.json")
        self.metrics = _flat(self.report.get("metrics"))
        self.training = [line for line in self.lines if "loss" in line]
        self.validation = [(int(line["step"]), _flat(line["valid"])) for line in self.lines if "valid" in line]
        self.steps = max((int(line["step"]) for line in self.lines), default=0)
        self.marks = [float(entry["step"]) for entry in starts[1:]]  # where it was resumed
        ends = [str(entry["end"]) for entry in self.sessions[-1:] if "end" in entry]
        self.end = ends[0] if ends else "stopped without a word, or still running"

    def best_step(self) -> int | None:
        """The step of the best validation: the main metric decides, and the loss where it is equal."""
        name = self.facts.get("monitor")
        sign = -1 if self.facts.get("higher_is_better", True) else 1
        found = [
            (sign * metrics[name], metrics.get("loss", 0.0), step)
            for step, metrics in self.validation
            if name in metrics
        ]
        return min(found)[2] if found else None


# The parts of the page.


def _head(run: _Run) -> str:
    state = "good" if run.end == "finished" else "bad"
    total = run.facts.get("total_steps")
    seconds = run.provenance.get("seconds") or next(
        (line["seconds"] for line in run.training[::-1] if "seconds" in line), None
    )
    parts = run.facts.get("parts", {}).values()
    count = sum(part["parameters"] for part in parts)
    tiles = [
        *((name, _number(value)) for name, value in (run.metrics or _last_valid(run)).items()),
        ("steps", f"{run.steps}" + (f" of {total}" if total and run.steps != total else "")),
        ("best at step", run.best_step()),
        ("training time", None if seconds is None else _duration(seconds)),
        ("parameters", short(count) if count else None),
        ("trained parameters", short(sum(part["trained"] for part in parts)) if count else None),
    ]
    shown = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(str(value))}</b></div>'
        for name, value in tiles
        if value is not None
    )
    title = f'<h1>{escape(run.name)}</h1><p>{escape(run.task)}, <span class="{state}">{escape(run.end)}</span></p>'
    return f'{title}<div class="tiles">{shown}</div>'


def _last_valid(run: _Run) -> Mapping[str, float]:
    return run.validation[-1][1] if run.validation else {}


def _curves(run: _Run) -> str:
    def training(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in run.training if key in line]

    def valid(key: str) -> list[tuple[float, float]]:
        return [(step, metrics[key]) for step, metrics in run.validation if key in metrics]

    def speed(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line["speed"][key]) for line in run.training if line.get("speed", {}).get(key)]

    metrics = list(dict.fromkeys(key for _, metrics in run.validation for key in metrics if key != "loss"))
    charts = [
        chart("loss", [Curve("training", training("loss")), Curve("validation", valid("loss"))], run.steps, run.marks),
        *(chart(f"validation {name}", [Curve(name, valid(name))], run.steps, run.marks) for name in metrics),
        chart("learning rate", [Curve("learning rate", training("learning_rate"))], run.steps, run.marks),
        chart("gradient norm", [Curve("gradient norm", training("gradient_norm"))], run.steps, run.marks),
        *(chart(title, [Curve(title, speed(key))], run.steps, run.marks) for key, title in _RATES.items()),
    ]
    found = "".join(charts)
    note = "<p>Dashed lines: resumed, or a next stage began there.</p>" if run.marks else ""
    return f'<h2>Curves</h2>{note}<div class="charts">{found}</div>' if found else ""


def _results(run: _Run) -> str:
    report = run.report
    if not report:
        return ""
    names = list(run.metrics)
    rows = [["all", report.get("rows", ""), *(_number(run.metrics[name]) for name in names)]]
    for subset, values in report.get("subsets", {}).items():
        found = _flat(values)
        rows.append([subset, values.get("rows", ""), *(_number(found.get(name)) or "" for name in names)])
    return f"<h2>Best model on the validation data</h2>{_table(['inputs', 'rows', *names], rows)}"


def _throughput(run: _Run) -> str:
    rows = []
    for key, title in _RATES.items():
        values = [line["speed"][key] for line in run.training if key in line.get("speed", {})]
        if values and any(values):
            write = _percent if key == "mfu" or key.endswith("_share") else short
            rows.append([title, write(statistics.median(values)), write(min(values)), write(max(values))])
    return f"<h2>Throughput</h2>{_table(['', 'median', 'least', 'most'], rows)}" if rows else ""


def _model(run: _Run) -> str:
    parts = run.facts.get("parts", {})
    rows = [[role, part["use"], f"{part['parameters']:,}", f"{part['trained']:,}"] for role, part in parts.items()]
    versions = run.facts.get("versions") or run.provenance.get("versions", {})
    code = run.provenance.get("code") or {}
    where = {
        "hardware": run.facts.get("hardware") or run.provenance.get("hardware"),
        "device": run.facts.get("device"),
        "precision": run.facts.get("precision"),
        "processes": run.facts.get("processes"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "code": ", ".join(f"{key} {value}" for key, value in code.items()),
        "seed": run.provenance.get("seed"),
    }
    facts = [[key, value] for key, value in where.items() if value not in (None, "")]
    model = f"<h2>Model</h2>{_table(['part', 'component', 'parameters', 'trained'], rows)}" if rows else ""
    return model + (f"<h2>Environment</h2>{_table([], facts)}" if facts else "")


def _data(run: _Run) -> str:
    rows = []
    for split, facts in (run.provenance.get("data") or run.facts.get("data") or {}).items():
        for file in facts.get("files") or [facts]:
            name = file.get("name") or facts.get("id") or facts.get("source", "")
            rows.append([split, name, facts.get("rows") or "", _code(_mark(file))])
    return f"<h2>Data</h2>{_table(['split', 'file', 'rows in all', 'SHA-256, or another mark'], rows)}" if rows else ""


def _mark(file: Mapping[str, Any]) -> str:
    """What identifies the content of a file of data, or of a list of them."""
    if "sha256" in file:
        return str(file["sha256"])
    known = {key: value for key, value in file.items() if key not in ("name", "id", "source", "rows", "bytes", "files")}
    return ", ".join(f"{key} {value}" for key, value in known.items() if isinstance(value, str))


def _sessions(run: _Run) -> str:
    rows: list[list[Any]] = []
    for entry in run.sessions:
        if "end" in entry:
            rows.append([entry["time"], entry["step"], entry["end"]])
        else:
            rows.append([entry["time"], entry["step"], "resumed" if rows else "started"])
    return f"<h2>Sessions</h2>{_table(['time', 'step', 'what'], rows)}" if rows else ""


# Helpers.


class _Markup(str):
    """Text that is HTML already."""


def _code(text: str) -> _Markup:
    return _Markup(f"<code>{escape(text)}</code>")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = [list(row) for row in rows]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(kind: str, column: int, value: Any) -> str:
        text = value if isinstance(value, _Markup) else escape(str(value))
        return f"<{kind}{' class=n' if numeric[column] and column else ''}>{text}</{kind}>"

    top = "".join(cell("th", column, title) for column, title in enumerate(header))
    first = "td" if header else "th"
    lines = [
        "".join(cell(first if not column else "td", column, value) for column, value in enumerate(row)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in ([top] if header else []) + lines)
    return f'<div class="table"><table>{body}</table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value[:1].isdigit() and len(value) < 16)


def _flat(table: Any, above: str = "") -> dict[str, float]:
    """The finite numbers of a table, those of tables inside it named "outer inner"."""
    found: dict[str, float] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key} ")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[f"{above}{key}"] = float(value)
    return found


def _number(value: Any) -> str | None:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, (int, float)) else None


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _duration(seconds: float) -> str:
    """Write seconds for people.

    >>> _duration(7.26), _duration(754), _duration(93784)
    ('7.3 s', '12 min 34 s', '26 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _shown_recipe(folder: Path) -> str:
    """The recipe as it may be shown to others; it stays on disk as it is."""
    text = _read(folder / "recipe.toml")
    try:
        return tomlkit.dumps(public(tomllib.loads(text), folder.resolve()))
    except tomllib.TOMLDecodeError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    found = _parse(_read(path))
    return found if isinstance(found, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; the last may be cut off where a process was killed."""
    found = (_parse(line) for line in _read(path).splitlines())
    return [line for line in found if isinstance(line, dict) and "step" in line]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
