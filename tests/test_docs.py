"""What the documents say is what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mmhub.config import CardRecipe, DataRecipe, ModelRecipe, PartRecipe, Recipe, TrainRecipe, check_recipe, read_recipe
from mmhub.interfaces import TASKS

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "recipe.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("table", [Recipe, ModelRecipe, PartRecipe, DataRecipe, TrainRecipe, CardRecipe])
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


def test_the_recipe_in_the_readme_is_valid() -> None:
    (text,) = [block for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if block.startswith("task")]
    check_recipe(tomllib.loads(text))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*/*.toml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_example_recipe_is_valid(path: Path) -> None:
    read_recipe(path)


def test_every_command_in_the_readme_exists() -> None:
    from mmhub.cli.main import COMMANDS

    used = set(re.findall(r"^mmhub (\w+)", README, re.MULTILINE)) | set(re.findall(r"`mmhub (\w+)", README))
    assert used <= {*COMMANDS, "hub"}


def test_every_first_party_component_is_in_the_readme() -> None:
    from mmhub.plugins import get_index

    official = [c for c in get_index().components() if c.distribution.startswith("mmhub")]
    assert official
    assert not [c.id for c in official if f"`{c.spec.name}`" not in README]
