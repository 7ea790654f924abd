"""`mmhub demo`: the whole of mmhub in a minute or two, on this machine alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.errors import MmhubError, PluginError, UsageError

REPO = "demo/digits"
_MARK = "made-by-mmhub-demo"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("mmhub-demo"), show_default=True)
@quiet_option
@json_option
def demo(out: Path, quiet: bool, as_json: bool) -> None:
    """Train, evaluate, publish and load a small image + audio model. Needs no account and no network.

    The model tells which digit is drawn, spoken, or both. Everything it makes is in the --out folder.
    """
    begin = time.perf_counter()
    _check_installed()
    _prepare(out)
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    out = out.resolve()
    say = _Say(quiet, begin)
    counts = _make_data(out, say)
    trained = _train(out, say, quiet)
    report = _evaluate(out, say)
    with _serving(out, say) as url:
        commit = _publish(out, url, say)
        samples = _samples(out)
        answers = _predict(out, url, say, samples)
    _write_registry(out, commit)
    data = {
        "out": str(out),
        "rows": counts,
        "train_seconds": trained.seconds,
        "metrics": report["metrics"],
        "subsets": report["subsets"],
        "commit": commit,
        "predictions": answers,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    emit(data, as_json, "" if as_json else _next_steps(out, samples, data["seconds"]))


class _Say:
    """Numbered steps on stderr."""

    def __init__(self, quiet: bool, begin: float) -> None:
        self.quiet, self.begin, self.number = quiet, begin, 0

    def step(self, text: str) -> None:
        self.number += 1
        note(f"\n[{self.number}/5] {text}", self.quiet)

    def __call__(self, text: str) -> None:
        note(text if not text else f"      {text}", self.quiet)


def _check_installed() -> None:
    from importlib.util import find_spec

    from mmhub.plugins import install_line
    from mmhub.registry import find_component

    for kind, name in (("image_encoder", "timm"), ("audio_encoder", "cnn"), ("decoder", "classification")):
        find_component(kind, name)
    for module in ("mmhub_hubserver", "sklearn", "PIL"):
        if find_spec(module) is None:
            raise PluginError(f"the demo needs {module.replace('_', '-')}", install_line(["mmhub[all]"]))


def _prepare(out: Path) -> None:
    """An earlier demo is replaced; any other folder is left alone."""
    import shutil

    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"'{out}' exists and was not made by the demo", "name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _make_data(out: Path, say: _Say) -> dict[str, int]:
    from mmhub.demo import RECIPE, make_tables

    say.step("Data: scikit-learn's handwritten digits, paired with spoken digits that come with mmhub")
    (out / "data").mkdir()
    counts = make_tables(out / "data")
    (out / "data" / "recipe.toml").write_text(RECIPE)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    say(f"{shown} rows of (image, audio, digit) in {_short(out / 'data')}; the test voices are not in training")
    return counts


def _train(out: Path, say: _Say, quiet: bool) -> Any:
    from mmhub.engine import train

    say.step(f"Train: {_short(out / 'data' / 'recipe.toml')}, an image and an audio encoder joined by learned gates")
    result = train(out / "data" / "recipe.toml", out / "run", quiet=quiet)
    say(f"{result.steps} steps in {result.seconds:.0f} s; curves in {_short(out / 'run' / 'report.html')}")
    return result


def _evaluate(out: Path, say: _Say) -> dict[str, Any]:
    from mmhub.checkpoint import load
    from mmhub.evaluation import evaluate

    say.step("Evaluate on voices and drawings it has not met, with both inputs and with each alone")
    report = evaluate(load(out / "run" / "model"), out / "data" / "test.parquet")
    rows = [[name, f"{values['accuracy']:.1%}", values["rows"]] for name, values in report["subsets"].items()]
    for line in table(["inputs", "accuracy", "rows"], rows).splitlines():
        say(line)
    path = out / "run" / "model" / "eval" / "classification.json"
    kept = {key: value for key, value in report.items() if key != "name"} | {"data": "test.parquet"}
    path.write_text(json.dumps(kept, indent=2) + "\n")
    return report


@contextmanager
def _serving(out: Path, say: _Say) -> Iterator[str]:
    from mmhub_hubserver import HubServer

    say.step("Publish to a Hub of your own: a server on this machine that speaks the Hugging Face protocol")
    with HubServer(out / "hub") as server:
        yield server.url


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    old = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in old.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _publish(out: Path, url: str, say: _Say) -> str:
    from mmhub.hub import push

    with _environment(HF_ENDPOINT=url):
        pushed = push(out / "run" / "model", REPO, message="First digits", tag="v1")
    total = sum(pushed.files.values())
    say(f"{len(pushed.files)} files, {total / 1e6:.1f} MB, one commit: {url}/{REPO} @ {pushed.commit[:12]}")
    return pushed.commit


def _samples(out: Path) -> list[dict[str, Path]]:
    """Write two test rows as files, so that they can be looked at and listened to."""
    from mmhub.data.sources import open_rows

    rows = open_rows(str(out / "data" / "test.parquet"))
    (out / "samples").mkdir()
    samples = []
    for i in (len(rows) // 3, 2 * len(rows) // 3):
        row = rows[i]
        image, audio = (out / "samples" / f"{row['digit']}{ending}" for ending in (".png", ".flac"))
        image.write_bytes(row["image"]["bytes"])
        audio.write_bytes(row["audio"]["bytes"])
        samples.append({"image": image, "audio": audio, "digit": Path(row["digit"])})
    return samples


def _predict(out: Path, url: str, say: _Say, samples: list[dict[str, Path]]) -> list[dict[str, Any]]:
    say.step("Use it by name: a fresh process pulls `digits` into an empty cache and predicts")
    _write_registry(out, "")
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(out / "cache"), "HF_HUB_OFFLINE": "0"}
    first, second = samples
    found = []
    for given in ({"image": first["image"], "audio": first["audio"]}, {"audio": second["audio"]}):
        options = [part for key, path in given.items() for part in (f"--{key}", str(path.relative_to(out)))]
        command = [sys.executable, "-m", "mmhub", "predict", "digits", *options, "--json", "-q"]
        done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MmhubError(f"`mmhub predict digits` failed: {done.stderr.strip()}")
        answer = json.loads(done.stdout)["predictions"][0]
        found.append({key: answer[key] for key in ("label", "score")})
        say(f"$ mmhub predict digits {' '.join(options)}")
        say(f"{answer['label']}  ({answer['score']:.1%} sure)")
    return found


def _write_registry(out: Path, commit: str) -> None:
    pin = f'commit = "{commit}"\n' if commit else ""
    (out / "registry.toml").write_text(
        f'# Names for this folder and those below it.\nschema = 1\n\n[models.digits]\nref = "hub:{REPO}"\n{pin}'
        'task = "classification"\nlicense = "cc0-1.0"\nsummary = "Drawn and spoken digits, from mmhub demo"\n'
    )


def _next_steps(out: Path, samples: list[dict[str, Path]], seconds: float) -> str:
    image, audio = (samples[1][key].relative_to(out) for key in ("image", "audio"))
    steps = [
        *_activation(),
        (f"cd {_short(out)}", ""),
        (f"mmhub predict ./run/model --image {image}", "the drawing alone"),
        (f"mmhub predict ./run/model --audio {audio}", "the voice alone"),
        ("mmhub eval ./run/model --data data/test.parquet", "the table above"),
        ("mmhub train data/recipe.toml --out again --set train.epochs=3", ""),
        ("mmhub hub serve --data hub", "start the Hub again, to push and pull by name"),
    ]
    lines = "\n".join(f"  {command:<50}{what}".rstrip() for command, what in steps)
    card = _short(out / "run" / "model" / "README.md")
    return f"\nDone in {seconds:.0f} s. Try next:\n\n{lines}\n\nThe model's card is {card}.\n"


def _activation() -> list[tuple[str, str]]:
    """The step that makes `mmhub` a command where this environment is not active, as after `make demo`."""
    script = Path(sys.prefix) / "bin" / "activate"
    found = shutil.which("mmhub")
    there = found is not None and Path(found).parent == script.parent
    return [] if there or not script.is_file() else [(f". {_short(script)}", "so that `mmhub` is found")]


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
