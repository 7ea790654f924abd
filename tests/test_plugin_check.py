"""`mmhub plugins check`: what a plugin does to its process, its imports and its package; and the pytest plugin."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import mmhub
from mmhub.testing.pytest_plugin import MakeModel, mmhub_model
from tests.fake_plugins import Site

__all__ = ["mmhub_model"]  # the fixture, also where mmhub's entry points are not installed anew

PARTS = """
import click
from tests.faulty_parts import Clean

class Segfault(Clean):
    def forward(self, data, mask):
        import ctypes
        ctypes.string_at(0)
"""
COMMANDS = """
import click, ctypes, os, time

@click.command()
def fine(): "Says something."

class Crash(click.Command):
    def get_help(self, context):
        ctypes.string_at(0)

class Hang(click.Command):
    def get_help(self, context):
        time.sleep(600)

class Leave(click.Command):
    def get_help(self, context):
        os._exit(0)

class Exit(click.Command):
    def get_help(self, context):
        raise SystemExit(3)

crash, hang, leave, exit_ = Crash("crash"), Hang("hang"), Leave("leave"), Exit("exit")
"""
HOOKS = """
from mmhub.spec import DataSource, hookimpl

class Tracker:
    def on_start(self, run): self.file = open(run.folder / "log.txt", "w")
    def on_log(self, step, metrics): self.file.write(f"{step} {metrics}")
    def on_end(self, run): self.file.close()

@hookimpl
def mmhub_train_callbacks(run):
    return [Tracker()]

class Polite:
    name = "polite"
    def check(self, sample): return "rude" if "damn" in sample.get("text", "") else ""
    def review(self, sample, answer): return answer

@hookimpl
def mmhub_generation_guards(model):
    return [Polite()]

def read(request):
    with open(request.find(request.address)) as file:
        yield {"text": file.read()}

@hookimpl
def mmhub_datasets():
    return [DataSource(scheme="notes", open=read)]

@hookimpl
def mmhub_load_foreign(folder, config):
    return []

@hookimpl
def mmhub_write_foreign(encoder, decoder, layout):
    return []
"""
FAULTY_HOOKS = (
    HOOKS.replace("def on_log(self, step, metrics)", "def on_step(self, step, metrics)")
    .replace('return "rude" if "damn" in sample.get("text", "") else ""', "return None")
    .replace("with open(request.find(request.address)) as file:", "with open(request.address) as file:")
    .replace("return []", "return [object()]")
)
NAMES = ("train_callbacks", "generation_guards", "datasets", "load_foreign", "write_foreign")
DECLARED = f"hooks = {json.dumps([f'mmhub_{name}' for name in NAMES])}\n"


def component(name: str) -> str:
    return f'[[components]]\nkind = "numbers_encoder"\nname = "{name.lower()}"\nfactory = "{{package}}.parts:{name}"\n'


def command(name: str) -> str:
    return f'[[commands]]\nname = "{name.rstrip("_")}"\nfactory = "{{package}}.parts:{name}"\n'


def install(site: Site, name: str, manifest: str, **files: Any) -> Path:
    """Install a plugin whose metadata are as they should be."""
    package = site.install(name, "api = 1\n" + manifest, **files)
    (info,) = package.parent.glob(f"{package.name}-*.dist-info")
    with (info / "METADATA").open("a") as file:
        file.write("Requires-Dist: mmhub>=0.1\n")
    (info / "RECORD").write_text(f"{package.name}/__init__.py,,\n")
    return package


def check(site: Site, name: str, *options: str) -> tuple[int, dict[str, str], subprocess.CompletedProcess[str]]:
    """Run the command; return its exit code and check id -> message, '' for one that passed."""
    done = site.python("-m", "mmhub", "plugins", "check", name, "--json", *options)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert len(report["checks"]) == report["passed"] + report["failed"] + report["skipped"]
    found = {row["id"]: f"{row['status']}: {row['message']}" for row in report["checks"] if row["status"] != "passed"}
    return done.returncode, {row["id"]: found.get(row["id"], "") for row in report["checks"]}, done


@pytest.mark.slow
def test_a_crash_an_exit_and_a_hang_are_the_finding_of_one_check_each(tmp_path: Path) -> None:
    site = Site(tmp_path)
    install(site, "mmhub-x", "".join(map(command, ("crash", "exit_", "hang", "leave", "fine"))), parts=COMMANDS)
    code, found, done = check(site, "mmhub-x", "-k", "command:*", "--timeout", "4")
    assert code == 4
    assert found == {
        "command:crash/help": "failed: it ended the process: signal 11 (SIGSEGV); expected a result",
        "command:exit/help": "failed: `--help` ends with 3: SystemExit: 3; expected 0 [commands]",
        "command:hang/help": "failed: it did not end within 4 s; expected a result",
        "command:leave/help": "failed: it ended the process: exit code 0; expected a result",
        "command:fine/help": "",
    }
    assert "error: mmhub-x 0.1.0 breaks 4 of 5 contracts" in done.stderr


@pytest.mark.slow
def test_a_component_that_crashes_leaves_the_others_to_be_checked(tmp_path: Path) -> None:
    site = Site(tmp_path)
    install(site, "mmhub-x", component("Segfault") + component("Clean"), parts=PARTS)
    code, found, _ = check(site, "x", "-k", "*/shapes")
    assert code == 4
    assert "signal 11 (SIGSEGV)" in found["numbers_encoder:segfault/shapes"]
    assert found["numbers_encoder:clean/shapes"] == ""


def test_a_clean_plugin_passes_and_is_shown_line_by_line(tmp_path: Path) -> None:
    site = Site(tmp_path)
    install(site, "mmhub-x", DECLARED + command("fine"), parts=HOOKS + COMMANDS)
    done = site.python("-m", "mmhub", "plugins", "check", "mmhub-x")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "ok      plugin/manifest"
    assert lines[-1] == "mmhub-x 0.1.0: 12 passed, 0 failed, 0 skipped"
    assert all(line.startswith("ok  ") for line in lines[:-1])


def test_each_fault_of_a_package_is_found_by_its_check(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.packages / "timm.py").write_text("")  # a light one of that name
    hook = "\nfrom mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_train_callbacks(run): return []\n"
    manifest = 'hooks = ["mmhub_datasets"]\n' + command("Hang")
    package = install(site, "mmhub-x", manifest, parts=COMMANDS + hook, init="import timm")
    (info,) = package.parent.glob("*.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmhub-x\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("mmhub_x_start.pth,,\n")
    (package.parent / "mmhub_x_start.pth").write_text("import os; os.getcwd()\n")
    code, found, _ = check(site, "mmhub-x", "-k", "plugin/")
    assert code == 4
    light = "failed: importing mmhub_x and mmhub_x.parts imports ['timm']; expected nothing heavy"
    assert found.pop("plugin/import-light").startswith(light)
    assert found == {
        "plugin/manifest": "",
        "plugin/targets": "failed: mmhub_x.parts:Hang is the class Hang; expected a click command [manifest]",
        "plugin/hooks": "failed: mmhub_x.parts implements no ['mmhub_datasets']; expected a function marked hookimpl"
        " [manifest]",
        "plugin/metadata": "failed: Requires-Dist names []; expected mmhub among them [version numbers]",
        "plugin/install-time": "failed: mmhub_x_start.pth runs ['import os; os.getcwd()'] in every process;"
        " expected no code in .pth files [trust]",
    }


@pytest.mark.slow
def test_a_slow_import_and_an_undeclared_hook_are_found(tmp_path: Path) -> None:
    site = Site(tmp_path)
    slow = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    install(site, "mmhub-x", 'hooks = ["mmhub_datasets"]\n', parts=HOOKS, init=slow)
    _, found, _ = check(site, "mmhub-x", "-k", "plugin/*o*")
    assert "s; expected under 0.15 s [import light]" in found["plugin/import-light"]
    assert "expected only hooks that the manifest lists" in found["plugin/hooks"]


def test_faulty_hooks_are_found(tmp_path: Path) -> None:
    site = Site(tmp_path)
    install(site, "mmhub-x", DECLARED, parts=FAULTY_HOOKS)
    code, found, _ = check(site, "mmhub-x", "-k", "hook:*")
    assert code == 4
    assert {name.partition("/")[0].removeprefix("hook:mmhub_") for name in found} == set(NAMES)
    expected = {
        "train_callbacks": "Tracker lacks ['on_log']",
        "generation_guards": "check says None",
        "datasets": "a missing file raises FileNotFoundError",
        "load_foreign": "it offers to read a folder with config {}",
        "write_foreign": "it offers to write a layout that does not exist",
    }
    for name, message in found.items():
        assert expected[name.partition("/")[0].removeprefix("hook:mmhub_")] in message


def test_a_check_sees_another_home_and_no_token(tmp_path: Path) -> None:
    site = Site(tmp_path)
    look = 'import os\nopen(os.path.expanduser("~/mark"), "w").close()\nassert "HF_TOKEN" not in os.environ\n'
    install(site, "mmhub-x", command("fine"), parts=COMMANDS + look)
    home = tmp_path / "real-home"
    home.mkdir()
    done = site.python("-m", "mmhub", "plugins", "check", "x", "-k", "command:", HOME=str(home), HF_TOKEN="secret")
    assert done.returncode == 0, done.stdout
    assert not list(home.iterdir())


def test_a_broken_plugin_is_checked_as_far_as_that_goes(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.install("mmhub-x", "api = 1\nhoks = []\n")
    code, found, _ = check(site, "mmhub-x")
    assert code == 4 and list(found) == ["plugin/manifest"]
    assert "unknown key 'hoks'; did you mean 'hooks'" in found["plugin/manifest"]


def test_a_plugin_that_is_not_installed_and_a_pattern_that_matches_nothing_are_told_apart(tmp_path: Path) -> None:
    site = Site(tmp_path)
    install(site, "mmhub-touch", "")
    done = site.python("-m", "mmhub", "plugins", "check", "mmhub-tuoch")
    assert done.returncode == 3 and "did you mean 'mmhub-touch'" in done.stderr
    done = site.python("-m", "mmhub", "plugins", "check", "touch", "-k", "plugin/manifset")
    assert done.returncode == 2 and "did you mean 'plugin/manifest'" in done.stderr


TEST = """
import pytest
from mmhub.testing import Check, ContractError, parametrize_checks

@parametrize_checks("mmhub-x", expected_failures={"plugin/install-time": "it starts itself"})
def test_contract(check: Check) -> None:
    check.run()
"""


def test_in_pytest_a_broken_contract_is_one_line(tmp_path: Path) -> None:
    site = Site(tmp_path)
    package = install(site, "mmhub-x", "", parts="")
    (info,) = package.parent.glob("*.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmhub-x\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("mmhub_x_start.pth,,\n")
    (package.parent / "mmhub_x_start.pth").write_text("import os\n")
    (site.work / "test_contract.py").write_text(TEST)
    options = ("-q", "-rA", "-p", "mmhub.testing.pytest_plugin", "-p", "no:cacheprovider")
    done = site.python("-m", "pytest", *options, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 failed, 4 passed, 1 xfailed" in done.stdout, done.stdout + done.stderr
    (failure,) = (line for line in done.stdout.splitlines() if line.startswith("ContractError: "))
    assert failure == "ContractError: Requires-Dist names []; expected mmhub among them [version numbers]"
    assert "Traceback" not in done.stdout and "catalogue.py" not in done.stdout


def test_the_fixture_makes_models_around_a_part(mmhub_model: MakeModel, tmp_path: Path) -> None:
    model = mmhub_model("decoder", "regression", {"mean": 3.0, "std": 1.0})
    assert len(model.predict([{"text": "1 2 3"}, {"text": "4"}])) == 2
    loaded = mmhub.load(str(model.save(tmp_path / "model")))
    assert loaded.decoder.config.mean == 3.0
    fused = mmhub_model("fusion", "concat").embed([{"text": "1", "audio": "2 3"}])
    assert tuple(fused.shape) == (1, 16)  # type: ignore[union-attr]
    again = mmhub_model("fusion", "concat", seed=1)
    assert not torch.equal(again.embed([{"text": "1"}]), mmhub_model("fusion", "concat").embed([{"text": "1"}]))  # type: ignore[arg-type]
