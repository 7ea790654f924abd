"""What the documents say is what the code does."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mmhub.config import (
    CardRecipe,
    DataRecipe,
    ModelRecipe,
    PartRecipe,
    Recipe,
    StageData,
    StageRecipe,
    TrainRecipe,
    check_recipe,
    read_recipe,
)
from mmhub.interfaces import TASKS
from mmhub_hubserver import HubServer
from tests.conftest import Cli, png

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "recipe.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "table", [Recipe, ModelRecipe, PartRecipe, DataRecipe, TrainRecipe, StageRecipe, StageData, CardRecipe]
)
def test_every_recipe_key_is_documented(table: type) -> None:
    missing = [
        name for name in table.__struct_fields__ if f"`{name}`" not in REFERENCE and f"[{name}]" not in REFERENCE
    ]
    assert not missing


def test_the_documented_defaults_are_the_real_ones() -> None:
    for table in (PartRecipe, DataRecipe, TrainRecipe):
        for field in msgspec.structs.fields(table):
            row = re.search(rf"^\| `{field.name}` \| ([^|]*) \|", REFERENCE, re.MULTILINE)
            if row and isinstance(field.default, (int, float, str)) and field.default != "":
                assert parse(row[1].strip("` ")) == field.default, field.name


def parse(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


def test_every_task_is_documented() -> None:
    assert all(f"`{task}`" in REFERENCE for task in TASKS)


def test_the_recipes_in_the_readme_are_valid() -> None:
    texts = [block for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if block.startswith("task")]
    assert len(texts) > 1
    for text in texts:
        check_recipe(tomllib.loads(text))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*/*.toml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_example_recipe_is_valid(path: Path) -> None:
    read_recipe(path)


def test_every_command_in_the_readme_exists() -> None:
    from mmhub.cli.main import COMMANDS

    used = set(re.findall(r"^mmhub (\w+)", README, re.MULTILINE)) | set(re.findall(r"`mmhub (\w+)", README))
    assert used <= {*COMMANDS, "hub", "serve", "ui", "export"}


def test_every_first_party_component_is_in_the_readme() -> None:
    from mmhub.plugins import get_index

    official = [c for c in get_index().components() if c.distribution.startswith("mmhub")]
    assert official
    assert not [c.id for c in official if f"`{c.spec.name}`" not in README]


DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(ROOT.glob("plugins/*/README.md"))


SHELLS = ("", "sh", "bash")


def commands(path: Path) -> list[list[str]]:
    """The `mmhub` command lines in a document's shell blocks, as a shell would split them."""
    blocks = [body for kind, body in re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.DOTALL) if kind in SHELLS]
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mmhub ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_has_the_options_it_is_given(path: Path) -> None:
    import click

    from mmhub.cli.main import cli

    for words in commands(path):
        command: click.Command = cli
        context = click.Context(cli, info_name="mmhub")
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, words)
            assert found is not None
            command, context = found, click.Context(found, parent=context, info_name=name)
        command.parse_args(context, [re.sub(r"^hf_\.\.\.$", "hf_x", word) for word in words])


def test_every_document_is_linked_from_the_readme() -> None:
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in README] == []


@pytest.mark.slow
def test_the_commands_about_hubs_work_as_they_stand(hub: str, trained: Path, tmp_path: Path, cli: Cli) -> None:
    here = tmp_path / "here"
    shutil.copytree(trained, here / "model")
    (here / "3.png").write_bytes(png(3))

    def run(document: str, **settings: str) -> None:
        for words in commands(ROOT / "docs" / f"{document}.md"):
            if words[:2] != ["hub", "serve"]:
                endpoint = {"HF_ENDPOINT": settings.get(words[0], hub)}
                done = cli(*words, cwd=here, HF_HUB_CACHE=str(tmp_path / "cache"), NO_PROXY="127.0.0.1", **endpoint)
                assert done.returncode == 0, f"mmhub {shlex.join(words)}: {done.stderr}"

    run("publish")
    with HubServer(tmp_path / "another") as other:
        run("moving", push=other.url)
    assert (here / "digits" / "config.json").is_file()
    with HubServer(here / "hub-data"):
        pass
    run("team-hub")
