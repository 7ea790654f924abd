"""What a published model says of where it comes from: its parents, pinned, and the commit of the code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmhub.config import check_recipe, dump_recipe
from mmhub.engine import train
from mmhub.hub import push
from mmhub.hub.card import read_card
from mmhub.lineage import code_state, parent_of
from mmhub.names import resolve
from tests.conftest import recipe

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "provenance.json").read_text()))


@pytest.mark.slow
def test_a_base_on_a_hub_is_pinned_and_in_the_card_also_after_a_resume(
    hub: str, tables: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    base = push(trained, "team/shapes", license="mit")
    table = recipe(tables, max_steps=2, checkpoint_every=1)
    table["model"] = {"base": "team/shapes"}
    run = train(table, tmp_path / "run")
    wanted = [{"part": "model", "name": "team/shapes", "repo": "team/shapes", "commit": base.commit}]
    assert facts_of(run.model)["parents"] == wanted
    push(trained, "team/shapes", license="apache-2.0")  # the name means another commit now
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    resumed = train(table, tmp_path / "run", resume=True)
    assert facts_of(resumed.model)["parents"] == wanted
    data, text = read_card((resumed.model / "README.md").read_text())
    assert (data["base_model"], data["base_model_relation"]) == (["team/shapes"], "finetune")
    assert f"The model started from `team/shapes` (commit {base.commit[:12]})." in text
    pushed = push(resumed.model, "team/finer", license="mit")
    assert pushed.commit


def test_a_local_start_is_named_without_its_folder_and_known_by_its_hash(
    tables: Path, trained: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(trained, tmp_path / "secret-place" / "shapes")
    table = recipe(tables, max_steps=1)
    table["model"]["encoders"]["image"] = {"init": f"{start}#image"}
    first = facts_of(train(table, tmp_path / "a").model)
    assert "secret-place" not in json.dumps(first)
    (parent,) = first["parents"]
    assert (parent["part"], parent["name"]) == ("image_encoder", "shapes#image")
    assert len(parent["sha256"]) == 64
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config))  # another layout of the same
    assert parent_of(resolve(str(start)), start, "model")["sha256"] != parent["sha256"]


def test_a_user_who_names_a_base_model_keeps_it(trained: Path, tmp_path: Path) -> None:
    from mmhub.checkpoint import read_config
    from mmhub.hub.card import merge_card

    folder = shutil.copytree(trained, tmp_path / "model")
    facts = facts_of(folder) | {"parents": [{"part": "text_encoder", "name": "a/b", "repo": "a/b", "commit": "1" * 40}]}
    facts["data"]["train"] |= {"id": "hub:org/set@v1#all:train", "revision": "2" * 40}
    (folder / "provenance.json").write_text(json.dumps(facts))
    old = "---\nbase_model: c/d\nbase_model_relation: merge\ndatasets: [mine]\n---\n"
    data, text = read_card(merge_card(folder, read_config(folder), name="x/y", old=old))
    assert data["base_model"] == ["c/d", "a/b"]
    assert data["base_model_relation"] == "merge"
    assert data["datasets"] == ["mine", "org/set"]
    assert "`hub:org/set@v1#all:train` (222222222222)" in text


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    folder = tmp_path / "code"
    folder.mkdir()
    git("init", "-q")
    (folder / "recipe.toml").write_text("x")
    git("add", "recipe.toml")
    git("commit", "-qm", "x")
    return folder


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_code_is_known_by_its_commit_and_whether_it_was_changed(repository: Path, tmp_path: Path) -> None:
    state = code_state(repository)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (repository / "notes.txt").write_text("not tracked")
    assert code_state(repository) == state
    (repository / "recipe.toml").write_text("y")
    assert code_state(repository) == state | {"dirty": True}
    (tmp_path / "plain").mkdir()
    assert code_state(tmp_path / "plain") is None
    assert code_state(tmp_path / "nowhere") is None


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_repository_cannot_run_its_own_commands(repository: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(0o755)
    subprocess.run(["git", "config", "core.fsmonitor", str(trap)], cwd=repository, check=True)
    subprocess.run(["git", "status"], cwd=repository, check=True, capture_output=True)
    assert (tmp_path / "sprung").exists(), "the trap works"
    (tmp_path / "sprung").unlink()
    assert code_state(repository) is not None
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("required", ["false", "true"])
def test_a_repository_cannot_filter_contents_by_its_own_commands(
    repository: Path, tmp_path: Path, required: str
) -> None:
    (repository / ".gitattributes").write_text("* filter=trap\n")
    more = tmp_path / "more.config"
    more.write_text(f'[filter "trap"]\n clean = touch {tmp_path}/sprung; cat\n required = {required}\n')
    subprocess.run(["git", "config", "include.path", str(more)], cwd=repository, check=True)
    (repository / "recipe.toml").write_text("y")
    subprocess.run(["git", "status"], cwd=repository, check=True, capture_output=True)
    assert (tmp_path / "sprung").exists(), "the trap works"
    (tmp_path / "sprung").unlink()
    os.utime(repository / "recipe.toml", (1, 1))
    state = code_state(repository)
    assert state is not None and state["dirty"] is True
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_run_records_the_code_of_its_recipe(repository: Path, tables: Path, tmp_path: Path) -> None:
    (repository / "recipe.toml").write_text(dump_recipe(check_recipe(recipe(tables, max_steps=1))))
    run = train(repository / "recipe.toml", tmp_path / "run")
    assert facts_of(run.model)["code"] == code_state(repository)
    assert "Code: commit" in (run.model / "README.md").read_text()
