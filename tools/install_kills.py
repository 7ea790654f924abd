"""Kill `mmhub plugins` at random moments of an install, upgrade, uninstall, restore and rollback, many times over.

After each kill the next command must leave the environment as it was before the change or as it is after it, file by
file, and the change must then succeed. Half of the kills take the installer along; half are aimed at the moment when
files are moved. One of the packages that change is one that mmhub itself imports. Needs uv, and no network.

    python tools/install_kills.py --kills 100
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.package_index import PackageIndex
from tests.plugin_environment import Environment

MODULES = 300  # in each version of the plugin, so that moving them takes a while
LOCK = "pylock.kills.toml"
STEPS = (
    ("install", "mmhub-a==1.0", "--yes"),
    ("install", "-U", "mmhub-a", "--yes"),
    ("uninstall", "mmhub-a", "--yes"),
    ("rollback", "--yes"),
    ("restore", LOCK, "--yes", "--allow-change", "pluggy"),
    ("rollback", "--yes"),
    ("rollback", "--yes"),
    ("rollback", "--yes"),
)
State = tuple[dict[str, str], str]  # files with their hashes; what is on record as asked for


def main() -> None:
    """Run it and print the counts; exit with 1 if a state between was seen."""
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        index = PackageIndex(Path(folder, "index"))
        env = prepare(Path(folder, "one"), index)
        seconds, states = rehearse(env)
        counts: Counter[str] = Counter()
        number = 0
        while sum(count for what, count in counts.items() if what.startswith("killed")) < chosen.kills:
            counts.update(kill(env, number, chance, seconds, states))
            number += 1
        index.close()
    print("\n".join(f"{count:4} {what}" for what, count in sorted(counts.items())))
    sys.exit(any(what.startswith("WRONG") for what in counts))


def prepare(folder: Path, index: PackageIndex) -> Environment:
    """Make the environment, and the two versions of a plugin and of what it needs."""
    origin = Path(str(find_spec("pluggy").origin)).parent  # type: ignore[union-attr]
    pluggy = {f"pluggy/{path.name}": path.read_text() for path in origin.glob("*.py")}
    env = Environment(folder, index, "uv")
    (env.folder / "borrowed" / "pluggy").unlink()
    env.put("pluggy", "1.0", files=pluggy)
    for version, other in (("1.0", "1.0"), ("2.0", "9.0")):
        index.wheel("pluggy", other, files=pluggy | {"pluggy/_version.py": f"version = '{other}'\n"})
        index.wheel("helper", other, files={f"helper/m{i}.py": f"{i + float(other)}\n" for i in range(MODULES)})
        modules = {f"mmhub_a/m{i}.py": f"# {version}\n" for i in range(int(MODULES * float(version)))}
        needs = [f"helper=={other}", f"pluggy=={other}"]
        index.wheel("mmhub-a", version, plugin=True, requires=needs, files=modules)
    return env


def rehearse(env: Environment) -> tuple[list[float], list[State]]:
    """Do the steps without a kill; return how long each takes, and the states before, between and after them."""
    seconds, states = [], [state(env)]
    for number, step in enumerate(STEPS):
        shutil.copytree(env.root, env.folder / f"env{number}", symlinks=True)
        if (env.folder / "config").exists():
            shutil.copytree(env.folder / "config", env.folder / f"config{number}")
        begun = time.monotonic()
        env.ok(*step)
        seconds.append(time.monotonic() - begun)
        states.append(state(env))
        if number == 0:
            env.ok("lock", "--out", LOCK)
    different = [one for at, one in enumerate(states) if one not in states[:at]]
    assert len(different) == 5, (
        f"{len(different)} states, and not: before, 1.0, 2.0, without the plugin, 1.0 from the lock"
    )
    return seconds, states


def kill(env: Environment, number: int, chance: random.Random, seconds: list[float], states: list[State]) -> list[str]:
    """Kill one step and look what the next command makes of it; return what happened, in words to be counted."""
    at = number % len(STEPS)
    for name in ("env", "config"):
        shutil.rmtree(env.folder / name, ignore_errors=True)
        if (env.folder / f"{name}{at}").exists():
            shutil.copytree(env.folder / f"{name}{at}", env.folder / name, symlinks=True)
    process = env.start(*STEPS[at])
    if chance.random() < 0.5:
        wait_for_moves(env, process)
        time.sleep(chance.uniform(0, 0.03))
    else:
        time.sleep(chance.uniform(0, seconds[at] * 0.9))
    early = process.poll() is None
    if early:
        (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    left = "before" if state(env) == states[at] else "after" if state(env) == states[at + 1] else "between"
    found = [f"killed, left {left}" if early else "ended before the kill"]
    next_command = env.run("uninstall", "nosuch", "--yes")
    if "Traceback" in next_command.stderr:
        found.append("mmhub did not start, and undo.py was needed")
        undo = env.root / "share" / "mmhub" / "transactions" / "undo.py"
        subprocess.run([env.python, undo], check=True, capture_output=True)
        next_command = env.run("uninstall", "nosuch", "--yes")
    now = state(env)
    if next_command.returncode != 3 or now not in (states[at], states[at + 1]):
        what = "neither before nor after" if next_command.returncode == 3 else next_command.stderr
        return [*found, f"WRONG after killing `{' '.join(STEPS[at])}` (kill {number}): {what}"]
    if now == states[at] and (env.run(*STEPS[at]).returncode or state(env) != states[at + 1]):
        return [*found, f"WRONG: `{' '.join(STEPS[at])}` (kill {number}) does not succeed after it"]
    return [*found, f"next command: {'before' if now == states[at] else 'after'}"]


def wait_for_moves(env: Environment, process: subprocess.Popen[str]) -> None:
    """Wait until the files to move have been written down, or a finished change begins to be taken back."""
    folder = env.root / "share" / "mmhub" / "transactions"
    seen = {path: path.stat().st_mtime_ns for path in folder.glob("*/record.json")}
    while process.poll() is None:
        for path in folder.glob("*/record.json"):
            text = path.read_text()
            if seen.get(path) != path.stat().st_mtime_ns and ('"remove": []' not in text or '"add": []' not in text):
                return
        time.sleep(0.001)


def state(env: Environment) -> State:
    """Return what must be as before or as after."""
    record = env.folder / "config" / "plugins.toml"
    text = record.read_text().partition("[environments")[2] if record.exists() else ""
    return env.state(), text.strip("] \n")


if __name__ == "__main__":
    main()
