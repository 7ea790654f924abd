"""The plugins in examples/plugins, installed from their wheels as strangers' are: a modality, a data source, a fusion.

They prove that the interfaces are open: nothing in the core knows of time series or of low-rank fusion.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmhub.data.loader import usable
from tests.conftest import Cli

ROOT = Path(__file__).parents[1]
PLUGINS = {name: ROOT / "examples" / "plugins" / name for name in ("mmhub-timeseries", "mmhub-lowrank")}
PUBLIC = ("mmhub.spec", "mmhub.batch", "mmhub.interfaces", "mmhub.layers", "mmhub.errors")
WORDS = ("calm", "wild", "mild")

RECIPE = """
task = "classification"
[model.encoders.timeseries]
use = "inception"
config = { depth = 3, filters = 8, bottleneck = 8, kernel_size = 8 }
[model.encoders.text]
use = "lstm"
config = { dim = 16, embedding_dim = 8 }
[model.tokenizer]
kind = "word"
[model.fusion]
use = "FUSION"
config = { dim = 16 }
[data]
train = "train.jsonl"
valid = "valid.jsonl"
target = "label"
[train]
epochs = 6
batch_size = 8
learning_rate = 1e-2
checkpoint_every = 10
"""
ALONE = """
task = "classification"
[model.encoders.timeseries]
use = "patches"
config = { dim = 16, depth = 1, heads = 2, patch = 4 }
[data]
train = "ts:toy_TRAIN.ts"
valid = "ts:toy_TEST.ts"
target = "label"
[train]
epochs = 12
batch_size = 8
learning_rate = 1e-2
"""


class Environment:
    """A virtual environment that sees this checkout and its libraries, and whatever is installed into it besides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.EnvBuilder(symlinks=True).create(folder)
        self.python = folder / "bin" / "python"
        self.packages = next((folder / "lib").glob("python*")) / "site-packages"
        outer = sysconfig.get_path("purelib")
        (self.packages / "outer.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({outer!r})\n")

    def install(self, *wheels: Path) -> None:
        """Unpack wheels, which is all that installing a pure one without scripts is."""
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.packages)

    def run(self, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run Python in this environment."""
        variables = os.environ | {"MMHUB_CACHE": str(self.folder / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [str(self.python), *map(str, args)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=280, check=False)

    def mmhub(self, *args: object, cwd: Path) -> Any:
        """Run a command that succeeds, and return the document it prints."""
        done = self.run("-m", "mmhub", *args, "--json", cwd=cwd)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built plugins by name."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in PLUGINS.values():
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    return {name: next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in PLUGINS}


@pytest.fixture(scope="session")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with both plugins."""
    environment = Environment(tmp_path_factory.mktemp("environments") / "both")
    environment.install(*wheels.values())
    return environment


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables whose label each input alone tells; some inputs and some values are missing."""
    folder = tmp_path_factory.mktemp("series")
    for split, name, count in (("train", "TRAIN", 60), ("valid", "TEST", 30)):
        rng = random.Random(split)
        rows = [_row(rng, i, folder) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cases = [f"{_cells(_wave(rng, i % 3, i))}:c{i % 3}\n" for i in range(count)]
        header = "@problemName toy\n@timeStamps false\n@univariate true\n@classLabel true c0 c1 c2\n@data\n"
        (folder / f"toy_{name}.ts").write_text(header + "".join(cases))
    return folder


def _row(rng: random.Random, i: int, folder: Path) -> dict[str, Any]:
    """A list, the JSON text of one, or a file of it; every fifth row lacks the text, every fifth the series."""
    wave: Any = _wave(rng, i % 3, i)
    if i % 4 == 1:
        wave = json.dumps(wave)
    elif i % 4 == 2:
        name = f"{rng.getrandbits(64):x}.csv"
        (folder / name).write_text("volts\n" + "".join("\n" if v is None else f"{v}\n" for v in wave))
        wave = name
    row = {"timeseries": wave, "text": f"a {WORDS[i % 3]} day {i % 4}", "label": f"c{i % 3}"}
    row |= {"tags": ["any", f"c{i % 3}"], "number": float(i % 3)}
    return row | {3: {"text": None}, 4: {"timeseries": None}}.get(i % 5, {})


def _wave(rng: random.Random, label: int, i: int) -> list[float | None]:
    """One, three or five periods, each seventh with a gap."""
    count, start = 20 + i % 5, rng.random()
    values: list[float | None] = [
        round(math.sin(2 * math.pi * (1 + 2 * label) * t / count + start) + rng.gauss(0, 0.1), 3) for t in range(count)
    ]
    return [None if i % 7 == 1 and t == 3 else value for t, value in enumerate(values)]


def _cells(values: Sequence[float | None]) -> str:
    return ",".join("?" if value is None else str(value) for value in values)


def train(environment: Environment, data: Path, folder: Path, recipe: str) -> dict[str, Any]:
    (folder.parent / "recipe.toml").write_text(recipe)
    return environment.mmhub("train", folder.parent / "recipe.toml", "--out", folder, "-q", cwd=data)


@pytest.fixture(scope="session")
def joined(installed: Environment, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of series and text that lowrank joins."""
    out = tmp_path_factory.mktemp("joined") / "run"
    train(installed, data, out, RECIPE.replace("FUSION", "lowrank"))
    return out / "model"


def install_lines(text: str) -> list[str]:
    """What the hints say to install, whatever with."""
    return re.findall(r"^hint: install: .* install (.+)$", text, re.MULTILINE)


WILD = ["--input", f"timeseries={json.dumps(_wave(random.Random(9), 1, 1))}"]  # three periods, with a gap: c1


@pytest.mark.slow
def test_a_modality_and_a_fusion_from_wheels_train_and_predict(
    installed: Environment, data: Path, joined: Path, cli: Cli
) -> None:
    found = {one["distribution"]: one for one in installed.mmhub("plugins", "ls", cwd=data)["plugins"]}
    assert {name: found[name]["status"] for name in PLUGINS} == dict.fromkeys(PLUGINS, "ok")
    subsets = json.loads((joined / "eval" / "classification.json").read_text())["subsets"]
    assert set(subsets) == {"timeseries", "text", "timeseries+text"}
    assert all(one["accuracy"] > 0.85 for one in subsets.values()), subsets
    (data / "wild.csv").write_text("".join(f"{v}\n" for v in _wave(random.Random(7), 1, 0)))
    done = installed.mmhub("predict", joined, *WILD, "--input", "timeseries=wild.csv", cwd=data)
    assert [one["label"] for one in done["predictions"]] == ["c1", "c1"]
    without = cli("predict", joined, *WILD)
    assert without.returncode == 4 and without.stdout == ""
    assert install_lines(without.stderr) == ['"mmhub-lowrank>=0.1,<1" "mmhub-timeseries>=0.1,<1"']


@pytest.mark.parametrize("name", PLUGINS)
def test_the_plugins_import_nothing_of_the_core_that_is_not_public(name: str) -> None:
    files = sorted(PLUGINS[name].rglob("*.py"))
    assert files
    for path in files:
        public = (*PUBLIC, "mmhub.testing") if path.parent.name == "tests" else PUBLIC
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            foreign = [m for m in modules if m.split(".")[0].startswith("mmhub") and m not in public]
            own = [m for m in foreign if m.split(".")[0] == name.replace("-", "_")]
            assert foreign == own, f"{path}: {foreign}"


def test_the_gaps_of_a_list_of_numbers_are_kept_and_those_of_a_list_of_files_dropped() -> None:
    gaps: list[Any] = [None, 1, float("nan")]
    assert usable("numbers", gaps) is gaps
    assert usable("numbers", [[1, None], [None, None]]) == [[1, None], [None, None]]
    assert usable("image", ["a.png", None, float("nan"), "b.png"]) == ["a.png", "b.png"]
    assert usable("numbers", [None, float("nan")]) is None  # no number at all: the input is missing


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["concat", "gated", "attention", "lowrank"])
def test_series_and_text_are_joined_by_every_fusion(
    installed: Environment, data: Path, tmp_path: Path, fusion: str
) -> None:
    train(installed, data, tmp_path / "run", RECIPE.replace("FUSION", fusion))
    report = installed.mmhub("eval", tmp_path / "run" / "model", "--data", "valid.jsonl", cwd=data)
    assert {name: one["rows"] for name, one in report["subsets"].items()} == {
        "timeseries": 24, "text": 24, "timeseries+text": 18,
    }  # fmt: skip
    assert all(one["accuracy"] > 0.85 for one in report["subsets"].values()), report
    samples = [*WILD, "--input", "timeseries=[0, 1, 0.3, -0.9]", "--text", "a wild day 1", "--text", "a wild day 2"]
    answers = installed.mmhub("predict", tmp_path / "run" / "model", *samples, cwd=data)["predictions"]
    assert answers[0]["label"] == "c1" and len(answers) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("task", "target", "metric"), [("multilabel", "tags", "f1"), ("regression", "number", "mse")])
def test_the_other_heads_take_series_as_well(
    installed: Environment, data: Path, tmp_path: Path, task: str, target: str, metric: str
) -> None:
    recipe = RECIPE.replace("FUSION", "lowrank").replace("classification", task).replace('"label"', f'"{target}"')
    metrics = train(installed, data, tmp_path / "run", recipe)["metrics"]
    assert metrics[metric] > 0.85 if metric == "f1" else metrics[metric] < 0.3  # 0.67 is the variance of the numbers


@pytest.mark.slow
def test_series_alone_are_read_from_ts_files_and_recorded(installed: Environment, data: Path, tmp_path: Path) -> None:
    train(installed, data, tmp_path / "run", ALONE)
    model = tmp_path / "run" / "model"
    report = installed.mmhub("eval", model, "--data", "ts:toy_TEST.ts", cwd=data)
    assert report["rows"] == 30 and report["metrics"]["accuracy"] > 0.85
    card = (model / "README.md").read_text()
    assert "rows of `toy_TRAIN.ts`" in card and "read by mmhub-timeseries 0.1.0" in card
    assert "--input timeseries=VALUE" in card and "\n- timeseries\n" in card
    assert "pipeline_tag" not in card and "\ndatasets:" not in card  # the Hub knows neither this kind nor a `ts`
    done = installed.run("-m", "mmhub", "eval", model, "--data", "ts:toy_TEZT.ts", cwd=data)
    assert done.returncode == 3 and "did you mean 'toy_TEST.ts'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_the_recipe_of_the_readme_trains(installed: Environment, data: Path, tmp_path: Path, name: str) -> None:
    recipe = (PLUGINS[name] / "README.md").read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "recipe.toml").write_text(recipe)
    train = "ts:toy_TRAIN.ts" if "ts:" in recipe else "train.jsonl"
    changes = ["--set", f'data.train="{train}"', "--set", "train.epochs=1", "--set", "train.max_steps=2"]
    assert (
        installed.mmhub("train", tmp_path / "recipe.toml", "--out", tmp_path / "run", *changes, cwd=data)["steps"] == 2
    )


@pytest.mark.slow
def test_series_in_files_beside_the_table_are_learned_from_wherever_the_command_runs(
    installed: Environment, tmp_path: Path
) -> None:
    table, elsewhere = tmp_path / "table", tmp_path / "elsewhere"
    table.mkdir()
    elsewhere.mkdir()
    rng = random.Random(3)
    for i in range(12):
        (table / f"{i}.csv").write_text("".join("\n" if v is None else f"{v}\n" for v in _wave(rng, i % 3, 0)))
    for split in ("train", "valid"):
        (table / f"{split}.csv").write_text("timeseries,label\n" + "".join(f"{i}.csv,c{i % 3}\n" for i in range(12)))
    recipe = ALONE.replace("ts:toy_TRAIN.ts", "train.csv").replace("ts:toy_TEST.ts", "valid.csv")
    (table / "recipe.toml").write_text(recipe.replace("epochs = 12", "epochs = 1"))
    done = installed.mmhub("train", table / "recipe.toml", "--out", "run", "-q", cwd=elsewhere)
    assert done["steps"] == 2


@pytest.mark.slow
def test_a_row_that_is_no_series_is_named(installed: Environment, data: Path, joined: Path, tmp_path: Path) -> None:
    row = {"timeseries": [[1, 2], [3, 4]], "text": "a calm day", "label": "c0"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"timeseries": [1, 2]}) + "\n" + json.dumps(row) + "\n")
    done = installed.run("-m", "mmhub", "eval", joined, "--data", "bad.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "bad.jsonl row 2, column 'timeseries': a list has 2 channel(s), expected 1" in done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(installed: Environment, data: Path, joined: Path) -> None:
    recipe, out = joined.parents[1] / "recipe.toml", joined.parents[1] / "again"
    code = (
        "import os\nfrom mmhub.engine.state import Checkpoints\nreal = Checkpoints.save\n"
        "def save(self, *args, **options):\n    real(self, *args, **options)\n    self.wait()\n"
        "    if (self.folder / 'step-00000020').exists(): os.kill(os.getpid(), 9)\n"
        "Checkpoints.save = save\nfrom mmhub.cli.main import main\n"
        f"main(['train', {str(recipe)!r}, '--out', {str(out)!r}])\n"
    )
    assert installed.run("-c", code, cwd=data).returncode == -signal.SIGKILL
    installed.mmhub("train", recipe, "--out", out, "--resume", "-q", cwd=data)
    assert _hash(out / "model") == _hash(joined)


def _hash(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_a_published_model_says_what_to_install_before_its_weights_are_fetched(
    hub: str, installed: Environment, wheels: dict[str, Path], data: Path, joined: Path, tmp_path: Path
) -> None:
    installed.mmhub("push", joined, "team/waves", "--license", "apache-2.0", "-q", cwd=data)
    expected = installed.mmhub("predict", joined, *WILD, "--text", "a wild day 1", cwd=data)
    plain = Environment(tmp_path / "plain")
    plain.install(wheels["mmhub-lowrank"])
    for command in (["pull", "team/waves"], ["predict", "team/waves", *WILD]):
        done = plain.run("-m", "mmhub", *command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (4, "")
        assert install_lines(done.stderr) == ['"mmhub-timeseries>=0.1,<1"']
    assert not list(Path(os.environ["HF_HUB_CACHE"]).rglob("*.safetensors*"))
    plain.install(wheels["mmhub-timeseries"])
    plain.mmhub("pull", "team/waves", cwd=tmp_path)
    assert plain.mmhub("predict", "team/waves", *WILD, "--text", "a wild day 1", cwd=tmp_path) == expected
    shown = plain.mmhub("models", "show", "team/waves", cwd=tmp_path)
    assert shown["modalities"] == ["timeseries", "text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_the_plugins_pass_their_own_tests_and_the_contract_kit(
    installed: Environment, name: str, tmp_path: Path
) -> None:
    done = installed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", PLUGINS[name] / "tests", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
