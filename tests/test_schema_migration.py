"""A component whose configuration changed: checkpoints of the older schema load by its `migrate`, or say why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mmhub
from mmhub import plugins
from mmhub.errors import PluginError
from mmhub.plugins import Component, Index, Plugin, get_index
from mmhub.spec import ComponentSpec
from mmhub.weights import copy_parameters
from tests.fake_plugins import Site

SAMPLES = [{"numbers": "1 2 3"}, {"numbers": "5"}]
PARTS = """
from tests.faulty_parts import {old} as Numbers
"""
MANIFEST = """
api = 1
[[components]]
kind = "numbers_encoder"
name = "numbers"
factory = "{package}.parts:Numbers"
schema = {schema}
"""
COMPOSE = """
import mmhub, torch
model = mmhub.compose("embedding", encoders={"numbers": {"use": "numbers", "config": {"width": 6}}})
torch.save(model.embed([{"numbers": "1 2 3"}]), "before.pt")
model.save("model")
"""
LOAD = """
import mmhub, torch
model = mmhub.load("./model")
assert model.encoders["numbers"].config.dim == 6
assert torch.allclose(model.embed([{"numbers": "1 2 3"}]), torch.load("before.pt"), atol=1e-6)
print(model.sources["numbers_encoder"].version)
"""


def install(monkeypatch: pytest.MonkeyPatch, factory: str, *, version: str, schema: int) -> None:
    """Let this process find one version of a plugin, in place of the one before."""
    spec = ComponentSpec(kind="numbers_encoder", name="numbers", factory=f"tests.faulty_parts:{factory}", schema=schema)
    plugin = Plugin(
        distribution="mmhub-faulty", version=version, summary="", status="ok", problem="", manifest="", module="",
        hooks=(), components=(Component(spec, "mmhub-faulty", version),), commands=(), models={},
    )  # fmt: skip
    others = tuple(one for one in get_index().plugins if one.distribution != "mmhub-faulty")
    monkeypatch.setattr(plugins, "_index", Index((*others, plugin)))
    monkeypatch.setattr(plugins, "_loaded", {})


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of schema 1, its width 6."""
    install(monkeypatch, "Older", version="0.1.0", schema=1)
    model = mmhub.compose("embedding", encoders={"numbers": {"use": "numbers", "config": {"width": 6}}})
    torch.save(model.embed(SAMPLES), tmp_path / "before.pt")
    return model.save(tmp_path / "model")


def test_a_checkpoint_of_schema_1_loads_under_schema_2_by_its_migrate(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "Migrating", version="0.2.0", schema=2)
    model = mmhub.load(str(saved))
    copy_parameters(model)  # the last bit of a product depends on where the weights stand, and a file is mapped
    assert model.encoders["numbers"].config.dim == 6  # type: ignore[union-attr]
    assert torch.equal(model.embed(SAMPLES), torch.load(saved.parent / "before.pt"))  # type: ignore[arg-type]


def test_what_is_saved_again_has_the_new_schema(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "Migrating", version="0.2.0", schema=2)
    mmhub.load(str(saved)).save(tmp_path / "again")
    record = json.loads((tmp_path / "again" / "config.json").read_text())["components"]["numbers_encoder"]
    assert record["schema"] == 2 and record["config"] == {"dim": 6, "note": ""}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Clean", "mmhub-faulty/numbers 0.2.0 reads schema 2 alone, and this was saved with schema 1"),
        ("FailingMigration", "mmhub-faulty/numbers 0.2.0 fails to bring a configuration from schema 1 to 2: KeyError"),
        ("WrongMigration", "from schema 1 to 2: UsageError: its result: unknown key 'width'"),
    ],
)
def test_a_component_that_cannot_migrate_costs_one_line_that_names_it_and_both_schemas(
    saved: Path, monkeypatch: pytest.MonkeyPatch, factory: str, message: str
) -> None:
    install(monkeypatch, factory, version="0.2.0", schema=2)
    with pytest.raises(PluginError) as caught:
        mmhub.load(str(saved))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "install the version of mmhub-faulty that saved it" in str(caught.value)


@pytest.mark.slow
def test_a_plugin_that_is_upgraded_on_disk_loads_what_its_older_version_saved(tmp_path: Path) -> None:
    site = Site(tmp_path)
    package = site.install("mmhub-old", MANIFEST.replace("{schema}", "1"), parts=PARTS.format(old="Older"))
    done = site.python("-c", COMPOSE)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(package)
    shutil.rmtree(package.parent / "mmhub_old-0.1.0.dist-info")
    parts = PARTS.format(old="Migrating")
    site.install("mmhub-old", MANIFEST.replace("{schema}", "2"), parts=parts, version="0.2.0")
    done = site.python("-c", LOAD)
    assert done.stdout.split() == ["0.2.0"], done.stderr
