"""Start `mmhub --help` with 200 installed plugins and with none, beside the usual ways to find plugins.

    python benchmarks/plugin_start.py [--plugins 200] [--rounds 21] [--out table.md]

The plugins are made here, in a folder on PYTHONPATH as pip would leave it: most are well (a component, a command and a
model each), seven are not (one raises at import, one imports torch and sleeps 2 s, one has a corrupt manifest, one is
there twice, ...). Fresh processes run in turn, all ways in each round:

1. `mmhub --help` warm (the index is in its cache) and cold (no cache), with the plugins and with none.
2. click alone, printing a help of as many commands as mmhub has itself: what no command line on click can beat.
3. click, and `importlib.metadata.entry_points`: finds the plugins, and knows nothing of what they offer.
4. click, and pluggy's `load_setuptools_entrypoints`: imports every plugin, so the bad ones are left out.

Peers look for an entry point group of their own, so that they see the plugins made here alone; mmhub reads those of the
environment it runs in, too. CPU time (user and system) is the figure to compare: others may use the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fake_plugins import Site, install_bad, install_many  # noqa: E402

BAD = 7
LIMIT = 1.5  # of the time with no plugins, warm
GROUP = "benchmark_peer"
CLICK = """
import click
group = click.Group("peer", help="A command line.")
for number in range(11):
    group.add_command(click.Command(f"command-{number}", short_help="Does something that takes a line to tell"))
"""
HELP = "group.main(['--help'])"
FIND = f"""
from importlib.metadata import entry_points
assert len(entry_points(group={GROUP!r})) >= {{count}}
"""
LOAD = f"""
import pluggy
manager = pluggy.PluginManager("peer")
assert manager.load_setuptools_entrypoints({GROUP!r}) >= {{count}}
"""


@dataclass
class Way:
    """One thing to run: Python's arguments, the site it runs in, and what to do before each time."""

    args: list[str]
    site: Site
    before: Callable[[], None] = lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plugins", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    facts = _facts(options)
    with tempfile.TemporaryDirectory() as temporary:
        none, well, all_of_them = _make_sites(Path(temporary), options.plugins)
        ways = _ways(none, well, all_of_them, options.plugins)
        times = _measure(ways, options.rounds)
        death = _run(Way(["-c", CLICK + LOAD.format(count=1)], all_of_them))[2]
        said = all_of_them.mmhub("--help").stderr.replace(temporary, "...").strip()
    text = "\n".join([*facts, "", *_table(times, options.plugins), "", *_notes(times, death, said)]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _make_sites(folder: Path, count: int) -> tuple[Site, Site, Site]:
    sites = []
    for name in ("none", "well", "all", "second"):
        (folder / name).mkdir()
        sites.append(Site(folder / name))
    none, well, all_of_them, second = sites
    for site in (well, all_of_them):
        install_many(site, count - BAD)
    install_bad(all_of_them, second)
    shutil.copytree(second.packages, all_of_them.packages, dirs_exist_ok=True)  # two versions left by an upgrade
    for points in folder.glob("*/site/*.dist-info/entry_points.txt"):
        module = points.parent.name.partition("-")[0]
        points.write_text(f"{points.read_text()}[{GROUP}]\n{module} = {module}.parts\n")
    return none, well, all_of_them


def _ways(none: Site, well: Site, all_of_them: Site, count: int) -> dict[str, Way]:
    ours = ["-m", "mmhub", "--help"]
    names = {"none": none, f"{count} plugins": all_of_them}
    ways = {f"`mmhub --help`, warm, {name}": Way(ours, site) for name, site in names.items()}
    for name, site in names.items():
        ways[f"`mmhub --help`, cold, {name}"] = Way(ours, _Cold(site), lambda site=site: _forget(site))  # type: ignore[misc]
    ways["click alone"] = Way(["-c", CLICK + HELP], none)
    find = CLICK + FIND.format(count=count) + HELP
    ways[f"click + entry_points, {count} plugins"] = Way(["-c", find], all_of_them)
    load = CLICK + LOAD.format(count=count - BAD) + HELP
    ways[f"click + load_setuptools_entrypoints, the {count - BAD} good ones"] = Way(["-c", load], well)
    return ways


class _Cold(Site):
    """The same site with a cache of its own, which is deleted before each start."""

    def __init__(self, site: Site) -> None:
        self.packages, self.config, self.work = site.packages, site.config, site.work
        self.cache = site.cache.with_name("cold-cache")


def _forget(site: Site) -> None:
    shutil.rmtree(_Cold(site).cache, ignore_errors=True)


def _measure(ways: dict[str, Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (CPU, wall) seconds of each way, a pair a round; the first run of each fills caches and does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            cpu, wall, error = _run(way)
            assert not error.startswith("Traceback"), f"{name}: {error}"
            if number:
                times[name].append((cpu, wall))
    return times


def _run(way: Way) -> tuple[float, float, str]:
    """Run one process; return its CPU and wall seconds and what it said on stderr."""
    way.before()
    environment = {key: value for key, value in way.site.environment().items() if key != "FAKE_IMPORTS"}
    with tempfile.TemporaryFile("w+") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *way.args], cwd=way.site.work, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return usage.ru_utime + usage.ru_stime, wall, said.read()


def _table(times: dict[str, list[tuple[float, float]]], count: int) -> list[str]:
    base = times["`mmhub --help`, warm, none"]
    lines = [
        "| way | CPU ms, min | median | wall ms, min | median | CPU median of warm, none |",
        "|---|---|---|---|---|---|",
    ]
    for name, pairs in times.items():
        cells = [function(pair[i] for pair in pairs) * 1e3 for i in (0, 1) for function in (min, statistics.median)]
        ratio = _median(pairs) / _median(base)
        lines.append(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} | {ratio:.2f} |")
    return lines


def _median(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(cpu for cpu, _ in pairs)


def _notes(times: dict[str, list[tuple[float, float]]], death: str, said: str) -> list[str]:
    with_none, with_all = list(times.values())[:2]
    ratio = _median(with_all) / _median(with_none)
    verdict = "holds" if ratio <= LIMIT else "is missed"
    last = death.strip().splitlines()[-1]
    return [
        f"Warm, the plugins cost {ratio:.2f} times the start with none; the limit of {LIMIT} {verdict}.",
        "",
        f"With the bad ones among them, `load_setuptools_entrypoints` ends in a traceback: `{last}`.",
        "`mmhub --help` works and says:",
        "",
        "```",
        said,
        "```",
    ]


def _facts(options: argparse.Namespace) -> list[str]:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    machine = f"{os.cpu_count()} cores of {cpu}; load {os.getloadavg()[0]:.1f} at the start"
    return [
        "# Starting with many plugins",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_commit()}",
        f"- command: `python benchmarks/plugin_start.py --plugins {options.plugins} --rounds {options.rounds}`",
        f"- machine: {machine}; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in ('mmhub', 'click', 'pluggy'))}",
    ]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return (done.stdout.strip() or "unknown") + (", with changes" if changed.strip() else "")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
