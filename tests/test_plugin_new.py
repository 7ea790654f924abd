"""`mmhub plugins new`: every kind it writes works at once, and the tutorial about it does what it says."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmhub.cli import plugin_new
from mmhub.cli.plugin_new import KINDS, LONGEST, new, render
from mmhub.config import check_recipe
from mmhub.discovery import find_plugins
from mmhub.registry import read_registry
from mmhub.testing import ContractError, NotApplicableError, find_checks
from tests.conftest import flac, png
from tests.fake_plugins import NOSE, ROOT, Site, fresh_process, make_site, run

PUBLIC = ("mmhub.spec", "mmhub.batch", "mmhub.interfaces", "mmhub.layers", "mmhub.errors", "mmhub.testing")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
ENTRY_POINTS = "[mmhub]\n{0} = {1}\n[mmhub.manifest]\n{0} = {2}\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of every kind, made by the command itself: kind -> folder."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        arguments = [kind, f"my-{kind}", "--out", str(folder / kind), *MODALITY.get(kind, [])]
        assert CliRunner().invoke(new, arguments, catch_exceptions=False).exit_code == 0
    return {kind: folder / kind for kind in KINDS}


MODALITY = {"encoder": ["--modality", "heart_rate"]}


def distribution(package: Path) -> dict[str, Any]:
    """The [project] table of a package."""
    table: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return table


def put(package: Path, folder: Path) -> str:
    """Install a package in a folder the way a wheel of it would be, and return its name."""
    project = distribution(package)
    name, module = project["name"], project["name"].replace("-", "_")
    shutil.copytree(package / module, folder / module)
    info = folder / f"{module}-{project['version']}.dist-info"
    info.mkdir()
    fields = {"Metadata-Version": "2.4", "Name": name, "Version": project["version"], "Summary": project["description"]}
    fields |= {"Keywords": ",".join(project["keywords"])}
    needs = [f"Requires-Dist: {need}" for need in project["dependencies"]]
    (info / "METADATA").write_text("\n".join([*(f"{key}: {value}" for key, value in fields.items()), *needs, ""]))
    points = project["entry-points"]
    text = ENTRY_POINTS.format(name, points["mmhub"][name], points["mmhub.manifest"][name])
    (info / "entry_points.txt").write_text(text)
    return str(name)


def build(package: Path, wheels: Path) -> Path:
    """Build the wheel of a package as its author would, without the network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(command, cwd=package, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.glob(f"{distribution(package)['name'].replace('-', '_')}-*.whl")
    return wheel


# What is written.


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_complete_and_under_120_lines_of_python(kind: str, packages: dict[str, Path]) -> None:
    folder, module = packages[kind], f"mmhub_my_{kind.replace('-', '_')}"
    sources = [path.read_text() for path in folder.rglob("*.py")]
    assert sum(len(text.splitlines()) for text in sources) < 120
    part = KINDS[kind].part
    expected = {
        *("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/ci.yml"),
        *(f"{module}/{name}" for name in ("__init__.py", f"{part}.py", "mmhub.toml", "py.typed")),
        *("tests/test_contract.py", f"tests/test_{part}.py"),
    }
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written - {f"{module}/words.txt"} == expected
    assert not [path for path in written if "$" in (folder / path).read_text().replace("${{ matrix.python }}", "")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_imports_nothing_of_mmhub_but_its_public_modules(kind: str, packages: dict[str, Path]) -> None:
    allowed = (*PUBLIC, f"mmhub_my_{kind.replace('-', '_')}")
    for path in packages[kind].rglob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            inside = name.startswith(tuple(f"{module}." for module in allowed)) or name in allowed
            assert inside or not name.startswith("mmhub") or (name == "mmhub" and kind == "command"), (path.name, name)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_everything_written_is_as_ruff_wants_it_whatever_the_length_of_the_name(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    for kind in KINDS:
        for name in ("ab", "m" * 20 + "-" + "w" * (LONGEST - 21)):
            modality = name.replace("-", "_") if kind == "encoder" else ""
            for place, text in render(kind, name, modality):
                path = tmp_path / f"{kind}-{len(name)}" / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    folders = [str(tmp_path), *map(str, packages.values())]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", *folders]
        done = subprocess.run(ruff, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_every_manifest_is_valid_and_offers_what_was_asked_for(packages: dict[str, Path], site: Site) -> None:
    for package in packages.values():
        put(package, site.packages)
    found = {plugin["distribution"]: plugin for plugin in find_plugins(rescan=True)}
    mine = {kind: found[f"mmhub-my-{kind}"] for kind in KINDS}
    assert {kind: plugin["problem"] for kind, plugin in mine.items() if plugin["status"] != "ok"} == {}
    offered = {kind: [(part["kind"], part["name"]) for part in plugin["components"]] for kind, plugin in mine.items()}
    for kind in ("text-encoder", "image-encoder", "audio-encoder", "fusion"):
        assert offered[kind] == [(kind.replace("-", "_"), f"my-{kind}")]
    assert offered["encoder"] == [("heart_rate_encoder", "my-encoder")]
    assert offered["head"] == [("decoder", "my-head")]
    assert mine["data-source"]["hooks"] == ["mmhub_datasets"]
    assert mine["tracker"]["hooks"] == ["mmhub_train_callbacks"]
    assert mine["guard"]["hooks"] == ["mmhub_generation_guards"]
    assert [command["name"] for command in mine["command"]["commands"]] == ["my-command"]


def test_the_wheel_of_mmhub_holds_every_template(tmp_path: Path) -> None:
    wheel = build_mmhub(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("mmhub/templates/")}
    templates = ROOT / "mmhub" / "templates"
    assert held == {str(path.relative_to(ROOT)) for path in templates.rglob("*") if path.is_file()}
    assert {name.split("/")[2] for name in held} == {"package", *KINDS}


def build_mmhub(folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("mmhub-*.whl")
    return wheel


def test_the_command_says_what_it_wrote_and_what_to_do_next(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plugins", "new", "fusion", "Mmhub_Calm.Mix", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert (data["name"], data["distribution"], data["module"]) == ("calm-mix", "mmhub-calm-mix", "mmhub_calm_mix")
    assert data["folder"] == "mmhub-calm-mix"
    assert all((site.work / data["folder"] / file).is_file() for file in data["files"])
    assert (data["next"][0], data["next"][-1]) == ("cd mmhub-calm-mix", "pytest")

    code, out, err = run(capsys, "plugins", "new", "guard", "calm", "--out", "some where/calm")
    assert (code, out) == (0, "some where/calm\n")
    assert "  cd 'some where/calm'\n" in err
    assert "  mmhub plugins check calm\n" in err

    assert run(capsys, "plugins", "new", "guard", "still", "-q") == (0, "mmhub-still\n", "")


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fusion", "9lives"), "'9lives' cannot be the name of a package; use letters"),
        (("fusion", "-x"), "No such option"),
        (("fusion", "a b"), "'a b' cannot be the name of a package"),
        (("fusion", "x-"), "'x-' cannot be the name of a package"),
        (("fusion", "é"), "'é' cannot be the name of a package"),
        (("fusion", "../up"), "'../up' cannot be the name of a package"),
        (("fusion", "x" * 41), "the name has 41 characters, more than 40"),
        (("fusion", "lambda"), "'lambda' is a word of Python itself; choose another name, such as my-lambda"),
        (("fusion", "none"), "'none' is a word of Python itself"),
        (("fusion", "mmhub"), "leaves no name after 'mmhub-'"),
        (("fusion", "mmhub-7"), "leaves no name after 'mmhub-'"),
        (("fusion", "text"), "a plugin of that name is installed: mmhub-text 0.1.0; choose another name, or remove it"),
        (("fusion", "handwriting"), "a registry lists a plugin called mmhub-handwriting; choose another name"),
        (
            ("fusion", "texts"),
            "'mmhub-texts' is no plugin that a registry knows, and looks like 'mmhub-text': `mmhub plugins",
        ),
        (("fusion", "gated"), "the fusion 'gated' exists already, in mmhub 0.1.0; choose another name"),
        (("text-encoder", "lstm"), "the text encoder 'lstm' exists already, in mmhub-text 0.1.0"),
        (("head", "listed"), "the task head 'listed' exists already, in mmhub-handwriting>=1"),
        (("command", "train"), "the command 'train' exists already, in mmhub itself"),
        (("command", "hub"), "the command 'hub' exists already, in mmhub-hubserver"),
        (("data-source", "hub"), "the data source 'hub' exists already, in mmhub itself"),
        (("data-source", "c"), "'c:' would be a drive of Windows"),
        (("fushion", "x"), "there is no kind 'fushion'; did you mean 'fusion'?"),
        (("lexicon", "x"), "there is no kind 'lexicon'; kinds: text-encoder, "),
        (("fusion", "x", "--modality", "smell"), "--modality is for the kind 'encoder'"),
        (("encoder", "text"), "'text' has a kind of its own; mmhub plugins new text-encoder NAME"),
        (("encoder", "x", "--modality", "Heart rate"), "'Heart rate' cannot be a modality; use lower-case"),
        (("encoder", "x", "--modality", "fused"), "'fused' cannot be a modality"),
        (("encoder", "items"), "'items' cannot be a modality: it is a word of PyTorch; try items_data"),
        (("encoder", "nose", "--modality", "smell"), "the encoder 'nose' exists already, in mmhub-fake 0.1.0"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_name_that_cannot_be_or_is_taken_is_refused(
    arguments: tuple[str, ...], said: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("mmhub-fake", NOSE)
    site.registry(
        'schema = 1\n[plugins.mmhub-handwriting]\nrequirement = "mmhub-handwriting>=1"\nprovides = ["decoder:listed"]\n'
        'trust = "community"\n'
    )
    before = sorted(path.name for path in site.work.iterdir())
    code, out, err = run(capsys, "plugins", "new", *arguments)
    assert (code, out) == (2, "")
    assert said in err.replace("\nhint: ", "; ")
    assert sorted(path.name for path in site.work.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("text_encoder", "x"), "text-encoder"),
        (("encoder", "x", "--modality", "image"), "image-encoder"),
        (("audio-encoder", "x", "--modality", "audio"), "audio-encoder"),
        (("Decoder", "x"), "head"),
        (("data_source", "xy"), "data-source"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_other_words_for_a_kind_are_understood(
    arguments: tuple[str, ...], kind: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plugins", "new", *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == kind


def test_the_words_that_no_modality_may_be_are_those_of_torch() -> None:
    from torch.nn import ModuleDict

    words = {word for word in dir(ModuleDict()) if plugin_new._MODALITY.fullmatch(word)}
    assert words <= set(plugin_new._TORCH_WORDS.split())


@pytest.mark.parametrize("kind", ["a folder", "an empty folder", "a file", "a link to nothing"])
def test_nothing_is_overwritten(kind: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    place = site.work / "mmhub-calm"
    if kind == "a file":
        place.write_text("mine")
    elif kind == "a link to nothing":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        (place / "mine.txt").write_text("mine") if kind == "a folder" else None
    code, _, err = run(capsys, "plugins", "new", "fusion", "calm")
    assert code == 2
    assert "'mmhub-calm' exists, and nothing is overwritten\nhint: name another folder with --out" in err
    left = {str(path.relative_to(site.work)) for path in site.work.rglob("*")}
    assert left == ({"mmhub-calm", "mmhub-calm/mine.txt"} if kind == "a folder" else {"mmhub-calm"})


def test_what_cannot_be_written_leaves_nothing_behind(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.work / "file").write_text("")
    code, _, err = run(capsys, "plugins", "new", "fusion", "calm", "--out", "file/calm")
    assert code == 1
    assert "cannot write to 'file/calm': Not a directory\nhint: choose another folder with --out" in err

    def broken(kind: str, name: str, modality: str) -> Iterator[tuple[str, str]]:
        yield from (("README.md", "words"), ("README.md/below", "a file is no folder"))

    monkeypatch.setattr(plugin_new, "render", broken)
    code, _, err = run(capsys, "plugins", "new", "fusion", "calm")
    assert code == 1
    assert "cannot write to 'mmhub-calm'" in err
    assert not (site.work / "mmhub-calm").exists()


# What was written works.


def test_the_contract_kit_is_content_with_a_new_encoder(
    packages: dict[str, Path], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put(packages["encoder"], site.packages)
    forget(monkeypatch)
    assert findings(name) == {}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find and import the plugins of a test anew."""
    fresh_process(monkeypatch)
    for module in [name for name in sys.modules if name.startswith("mmhub_my_")]:
        monkeypatch.delitem(sys.modules, module)


def findings(name: str) -> dict[str, str]:
    """What the contract kit says against an installed plugin: check -> message."""
    found = {}
    for check in find_checks(name):
        try:
            check.run()
        except ContractError as error:
            found[check.id] = str(error)
        except NotApplicableError:
            pass
    return found


def test_the_fault_of_the_tutorial_is_found(
    packages: dict[str, Path], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put(packages["text-encoder"], site.packages)
    code = site.packages / "mmhub_my_text_encoder" / "encoder.py"
    code.write_text(changed(code.read_text(), "Features(tokens=x * real, mask=mask)", "Features(tokens=x, mask=mask)"))
    forget(monkeypatch)
    assert "Leave `* real` out of the last line of `forward`" in " ".join(TUTORIAL.split())
    assert "the check `text_encoder:tiny/mask` fails" in TUTORIAL
    assert "text_encoder:my-text-encoder/mask" in findings(name)


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_check_takes_the_short_name_of_a_new_plugin(packages: dict[str, Path], site: Site) -> None:
    put(packages["data-source"], site.packages)
    done = site.python("-m", "mmhub", "plugins", "check", "my-data-source", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == 0


class Environment:
    """A virtual environment without pip, which borrows everything but plugins of its own from the one of the tests."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = folder.glob("venv/lib/python*/site-packages")
        (self.site / "borrowed.pth").write_text(f"import site; site.addsitedir({str(SITE_PACKAGES)!r})\n")
        for info in SITE_PACKAGES.glob("*.dist-info"):  # for installers, which look here alone
            if not info.name.startswith("mmhub_"):
                shutil.copytree(info, self.site / info.name)
        foreign = ("MMHUB_", "PYTHON", "UV_", "PIP_", "VIRTUAL_ENV")
        self.variables = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.variables |= {
            "VIRTUAL_ENV": str(folder / "venv"),
            "PATH": f"{self.python.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MMHUB_CACHE": str(folder / "cache"),
            "MMHUB_CONFIG": str(folder / "config"),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_CACHE": str(folder / "hf" / "hub"),
            "UV_CACHE_DIR": str(folder / "uv"),
            "UV_OFFLINE": "1",
            "UV_NO_BUILD_ISOLATION": "1",  # hatchling is here, and not to be fetched
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, *words: object, code: int = 0, input: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command line, `mmhub` and Python's tools being those of this environment."""
        first, *rest = map(str, words)
        command = [first, *rest] if first == "uv" else [str(self.python), "-m", first, *rest]
        environment = self.variables | variables
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            input=input,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == code, f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def mmhub(self, *words: object, **options: Any) -> Any:
        """Run `mmhub WORDS --json` and return what it printed."""
        return json.loads(self.run("mmhub", *words, "--json", **options).stdout)


@pytest.fixture(scope="module")
def workshop(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with a plugin of every kind."""
    here = Environment(tmp_path_factory.mktemp("workshop"))
    for package in packages.values():
        put(package, here.site)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_package_passes_check_its_own_tests_and_the_type_checker_at_once(
    kind: str, packages: dict[str, Path], workshop: Environment
) -> None:
    workshop.work = packages[kind]
    report = workshop.mmhub("plugins", "check", f"my-{kind}")
    assert (report["failed"], report["passed"] > 5) == (0, True)
    assert " passed" in workshop.run("pytest", "-q", "-p", "no:cacheprovider").stdout
    workshop.run("mypy", "--cache-dir", workshop.python.parent / "mypy")  # one cache: the first takes a minute


TOGETHER = """
task = "classification"
[model.encoders]
text = { use = "my-text-encoder", config = { dim = 8 } }
image = { use = "my-image-encoder", config = { dim = 8, image_size = 16 } }
audio = { use = "my-audio-encoder", config = { dim = 8, sample_rate = 8000 } }
heart_rate = { use = "my-encoder", config = { dim = 8 } }
[model.fusion]
use = "my-fusion"
config = { dim = 16 }
[model.decoder]
use = "my-head"
[data]
train = "my-data-source:patients.db#visits"
valid = "my-data-source:patients.db#visits"
target = "label"
[train]
epochs = 20
batch_size = 8
learning_rate = 1e-2
"""


@pytest.mark.slow
def test_the_parts_of_all_kinds_work_together_in_one_recipe(workshop: Environment, tmp_path: Path) -> None:
    workshop.work = tmp_path
    with closing(sqlite3.connect(tmp_path / "patients.db")) as database, database:
        database.execute("create table visits (text, image, audio, heart_rate, label)")
        for i in range(32):
            beats = None if i % 3 == 0 else json.dumps([40 + 120 * (i % 2)] * (5 + i % 4))
            text = None if i % 5 == 0 else ("calm", "wild")[i % 2]
            row = (text, png(i % 2), flac(i % 2) if i % 4 else None, beats, f"c{i % 2}")
            database.execute("insert into visits values (?, ?, ?, ?, ?)", row)
    (tmp_path / "recipe.toml").write_text(TOGETHER)
    trained = workshop.mmhub("train", "recipe.toml", "--out", "runs/all")
    assert trained["metrics"]["accuracy"] > 0.9
    curves = (tmp_path / "runs/all/my-tracker.csv").read_text().splitlines()
    assert curves[0] == "step,name,value"
    assert any(",loss," in line for line in curves)
    model = trained["model"]
    alone = {"--text": "wild", "--input": "heart_rate=[160, 160, 160, 160, 160]"}
    for option, value in alone.items():
        assert workshop.mmhub("predict", model, option, value)["predictions"][0]["label"] == "c1"
    (refused,) = workshop.mmhub("predict", model, "--text", "my password")["predictions"]
    assert refused["guard"] == "mmhub-my-guard/my-guard"
    answers = workshop.run("mmhub", "my-command", model, input="calm\nwild\n").stdout.splitlines()
    assert [json.loads(answer)["label"] for answer in answers] == ["c0", "c1"]


TUTORIAL = (ROOT / "docs" / "write-a-plugin.md").read_text()


def blocks() -> Iterator[tuple[str, str, str]]:
    """Every code block of the tutorial: its language, its content, and the paragraph before it."""
    before = ""
    for part in re.split(r"(```\w*\n.*?```)", TUTORIAL, flags=re.DOTALL):
        if part.startswith("```"):
            language, _, content = part.removeprefix("```").removesuffix("```").partition("\n")
            yield language, content, before
        before = part.strip().rpartition("\n\n")[2]


def file_named_by(paragraph: str) -> str:
    """The file a block is for, where the paragraph before it ends in "in `NAME`:"."""
    match = re.search(r"in `([\w.]+)`:$", paragraph)
    return match[1] if match else ""


def test_the_tutorial_shows_what_the_command_writes_and_valid_files() -> None:
    written = "\n".join(text for _, text in render("text-encoder", "tiny", ""))
    shown = [(language, content, file_named_by(before)) for language, content, before in blocks()]
    assert [file for _, _, file in shown if file] == ["reviews.csv", "recipe.toml"]
    for language, content, file in shown:
        if file.endswith(".toml"):
            check_recipe(tomllib.loads(content))
        elif language == "toml" and content.startswith("schema"):
            continue  # a registry, see below
        elif language in ("python", "toml") and "def migrate" not in content:
            assert content in written, content
    table = re.findall(r"^\| `([\w-]+)` \|", TUTORIAL, re.MULTILINE)
    assert table[: len(KINDS)] == list(KINDS)
    assert len(KINDS) == 10 and "There are ten kinds" in TUTORIAL


@pytest.mark.parametrize("document", ["write-a-plugin.md", "trust.md"])
def test_the_registries_in_the_documents_are_valid(document: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / document).read_text()
    (content,) = re.findall(r"```toml\n(schema.*?)```", text, re.DOTALL)
    (tmp_path / "registry.toml").write_text(content)
    assert read_registry(tmp_path / "registry.toml", "project").plugins["mmhub-tiny"].provides == ("text_encoder:tiny",)


@pytest.mark.slow
def test_the_tutorial_works_as_it_stands(tmp_path: Path, hub: str) -> None:
    here = Environment(tmp_path)
    answers = []
    for language, content, before in blocks():
        if file := file_named_by(before):
            (here.work / file).write_text(content)
        elif "def migrate" in content:
            rename_a_setting(here.work, content)
        elif language == "sh":
            for words in (shlex.split(line) for line in content.replace("\\\n", " ").splitlines()):
                if words[0] == "cd":
                    here.work /= words[1]
                else:
                    done = here.run(*words)
                    answers += [done.stdout] if "predict" in words else []
    assert [line.split()[0] for line in answers[0].splitlines()] == ["good", "bad"]
    assert answers[1] == answers[0]
    assert (
        json.loads((here.work / "runs/tiny/model/config.json").read_text())["components"]["text_encoder"]["schema"] == 1
    )
    assert here.mmhub("plugins", "show", "tiny")["components"][0]["name"] == "tiny"
    assert [path.name for path in (here.work / "dist").glob("*.whl")] == ["mmhub_tiny-0.2.0-py3-none-any.whl"]


def rename_a_setting(package: Path, migrate: str) -> None:
    """Do to the package of the tutorial what its step 6 says."""
    code, manifest, project = (
        package / name for name in ("mmhub_tiny/encoder.py", "mmhub_tiny/mmhub.toml", "pyproject.toml")
    )
    text = re.sub(r"\bdropout\b", "drop_rate", code.read_text())
    start = "    def __init__(self, config: Config"
    code.write_text(changed(text, start, f"{migrate}\n{start}"))
    manifest.write_text(changed(manifest.read_text(), "schema = 1", "schema = 2"))
    project.write_text(changed(project.read_text(), 'version = "0.1.0"', 'version = "0.2.0"'))


RECIPE = """
task = "classification"
[model.encoders.text]
use = "petite"
config = { dim = 8 }
[data]
train = "reviews.csv"
valid = "reviews.csv"
target = "label"
[train]
epochs = 2
"""
ASKED = ("--text", "a fine film", "--text", "dull")


@pytest.mark.slow
def test_a_new_plugin_is_built_installed_trained_published_and_asked_for_where_it_is_missing(
    tmp_path: Path, hub: str
) -> None:
    here, elsewhere = Environment(tmp_path / "here"), Environment(tmp_path / "elsewhere")
    here.run("mmhub", "plugins", "new", "text-encoder", "petite")
    wheel = build(here.work / "mmhub-petite", tmp_path / "wheels")
    here.run("mmhub", "plugins", "install", wheel, "--yes")
    listed = {one["distribution"]: one for one in here.mmhub("plugins", "ls")["plugins"]}
    assert listed["mmhub-petite"]["status"] == "ok"
    assert [part["id"] for part in listed["mmhub-petite"]["components"]] == ["mmhub-petite/petite"]

    (here.work / "reviews.csv").write_text(next(content for language, content, _ in blocks() if language == "csv"))
    (here.work / "recipe.toml").write_text(RECIPE)
    model = here.mmhub("train", "recipe.toml", "--out", "runs/petite")["model"]
    answers = here.mmhub("predict", model, *ASKED)
    here.run("mmhub", "push", model, "team/reviews", "--license", "apache-2.0")

    refused = elsewhere.run("mmhub", "pull", "team/reviews", code=4)
    assert "team/reviews needs 1 plugin: mmhub-petite >=0.1,<1 (not installed)" in refused.stderr
    fetched = {path.name for path in (tmp_path / "elsewhere" / "hf").rglob("*") if path.is_file()}
    assert fetched >= {"config.json"}
    assert not [name for name in fetched if name.endswith(".safetensors")]
    install = re.search(r"install: .*?install \"(mmhub-petite[^\"]*)\"", refused.stderr)
    assert install
    elsewhere.run("mmhub", "plugins", "install", install[1], "--yes", "--fresh", UV_FIND_LINKS=str(wheel.parent))
    elsewhere.run("mmhub", "pull", "team/reviews")
    assert elsewhere.mmhub("predict", "team/reviews", *ASKED) == answers
