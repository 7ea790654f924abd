"""From a table of conversations to a published model that a fresh process talks with, in stages, by commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmhub.config import check_recipe, dump_recipe
from tests.conftest import Cli
from tests.talk_tables import chat_recipe, write_talks


@pytest.mark.slow
def test_a_model_is_trained_in_stages_published_and_talked_with_by_name(cli: Cli, hub: str, tmp_path: Path) -> None:
    write_talks(tmp_path / "train.jsonl", rows=32)
    table = chat_recipe(tmp_path, valid=str(tmp_path / "train.jsonl"))
    table["train"] = {
        "batch_size": 8,
        "learning_rate": 1e-2,
        "stages": [
            {"parts": ["fusion", "decoder", "audio"], "epochs": 100},
            {"name": "seeing", "parts": ["fusion", "image"], "epochs": 1, "learning_rate": 1e-4},
        ],
    }
    (tmp_path / "recipe.toml").write_text(dump_recipe(check_recipe(table)))
    shown = cli("data", "show", "recipe.toml", "--loss", "--rows", 2)
    assert shown.returncode == 0 and "[[" in shown.stdout and "\u2039image" in shown.stdout, shown.stderr
    done = cli("train", "recipe.toml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["exact_match"] > 0.6
    done = cli("push", "./run/model", "team/assistant", "--license", "mit", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    question = f"/audio {tmp_path}/media/2.flac\nwhich sound\nsay three\n"
    here = _talk(cli, "./run/model", question, tmp_path)
    there = _talk(cli, "team/assistant", question, elsewhere, HF_ENDPOINT=hub, HF_HOME=str(elsewhere / "cache"))
    assert there == here and len(here) == 2
    card = (tmp_path / "run/model/README.md").read_text()
    assert "audio+text" in card and "image-text-to-text" not in card
    assert "any-to-any" in card and "seeing" in card


def _talk(cli: Cli, name: str, lines: str, folder: Path, **environment: str) -> list[str]:
    """What the model of this name answers to lines typed into a pipe."""
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "mmhub", "chat", name, "--json"]
    done = subprocess.run(
        command, input=lines, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [answer["text"] for answer in json.loads(done.stdout)["answers"]]
