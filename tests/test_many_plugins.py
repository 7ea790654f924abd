"""200 installed plugins, some of them bad: every command works, nothing is imported, each bad one costs one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fake_plugins import Site, install_bad, install_many

COUNT = 200
COMMANDS = [
    ["--help"],
    ["--version"],
    ["version", "--json"],
    ["env", "--json"],
    ["plugins", "--help"],
    ["plugins", "ls", "--json"],
    ["plugins", "show", "mmhub-fake-slow", "--json"],
    ["plugins", "show", "mmhub-fake-raises", "--json"],
    ["plugins", "show", "mmhub-fake-corrupt", "--json"],
    ["models", "ls", "--json"],
    ["models", "which", "smell-7", "--json"],
    ["cache", "ls", "--json"],
    ["train", "--help"],
]
FIND = """
from mmhub.errors import MmhubError
from mmhub.registry import find_component
for name in ("nose-7", "hand", "mmhub-fake-left/hand", "raises", "raises"):
    try:
        print(find_component("smell_encoder", name).load().__name__)
    except MmhubError as error:
        print(f"{type(error).__name__}: {error.message}")
"""


class Many(Site):
    """A site of 200 plugins, with a second folder behind the first on sys.path."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "first")
        self.second = Site(folder / "second")
        self.imports = folder / "imports.txt"
        install_many(self, COUNT - 7)
        install_bad(self, self.second)

    def environment(self) -> dict[str, str]:
        first, _, root = super().environment()["PYTHONPATH"].partition(os.pathsep)
        path = os.pathsep.join([first, str(self.second.packages), root])
        own = {"FAKE_IMPORTS": str(self.imports), "HF_HOME": str(self.work / "hf"), "HF_HUB_OFFLINE": "1"}
        return super().environment() | own | {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Many:
    folder = tmp_path_factory.mktemp("many")
    for name in ("first", "second"):
        (folder / name).mkdir()
    return Many(folder)


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_every_command_works_imports_no_plugin_and_says_one_line_for_each_bad_one(many: Many, args: list[str]) -> None:
    done = many.mmhub(*args)
    assert done.returncode == 0, done.stderr
    assert not many.imports.exists()
    if "--json" in args:
        json.loads(done.stdout)
    corrupt, newer, twice = sorted(line for line in done.stderr.splitlines() if line.startswith("plugin "))
    assert done.stderr.count("\n") == 3
    assert corrupt.startswith("plugin mmhub-fake-corrupt 0.5 broken: its manifest ")
    assert "TOMLDecodeError" in corrupt
    assert newer.startswith("plugin mmhub-fake-newer 9.0 incompatible: it needs plugin interface 99")
    assert twice.startswith(f"plugin mmhub-fake-twice 0.7: {many.packages}")
    assert f"hides version 0.6 in {many.second.packages}" in twice


def test_all_200_are_listed_and_help_shows_their_commands(many: Many) -> None:
    rows = json.loads(many.mmhub("plugins", "ls", "--json").stdout)["plugins"]
    assert sum(row["distribution"].startswith("mmhub-fake-") for row in rows) == COUNT
    listed = many.mmhub("--help").stdout
    assert all(f"sniff-{number} " in listed for number in range(COUNT - 7))


def test_a_bad_plugin_costs_one_line_where_it_is_used_and_the_others_work(many: Many) -> None:
    done = many.python("-c", FIND)
    cause = "OSError: no libnose"
    assert done.stdout.splitlines() == [
        "Nose",
        "PluginError: smell_encoder 'hand' is provided by mmhub-fake-left 0.1.0 and mmhub-fake-right 0.1.0",
        "Nose",
        f"PluginError: plugin mmhub-fake-raises 0.3 cannot load smell_encoder 'raises': {cause}",
        f"PluginError: plugin mmhub-fake-raises 0.3 cannot load smell_encoder 'raises': {cause}",
    ]
    imported = set(many.imports.read_text().split())
    many.imports.unlink()
    assert imported == {"mmhub_fake_007", "mmhub_fake_left", "mmhub_fake_raises"}
