"""What the Multi30k example reaches from nothing, through the command line. Slow; see examples/multi30k.

The data is not part of the project: point MMHUB_SHARED at a folder with data/multi30k.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED

RECIPE = Path(__file__).parents[1] / "examples" / "multi30k" / "recipe.toml"
DATA = (SHARED / "data" / "multi30k").absolute()


def mmhub(folder: Path, *args: object) -> dict[str, Any]:
    """Run a command in `folder`, however long it takes; return its JSON."""
    command = [sys.executable, "-m", "mmhub", *map(str, args), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")
def test_english_becomes_german_with_20_bleu(tmp_path: Path) -> None:
    options: list[str] = []
    for key, name in (("train", "train"), ("valid", "val")):
        options += ["--set", f'data.{key}={{source="{DATA / name}.en.gz",target="{DATA / name}.de.gz"}}']
    trained = mmhub(tmp_path, "train", RECIPE, "--out", "run", *options)
    test = DATA / "test_2016_flickr"
    metrics = mmhub(tmp_path, "eval", "./run/model", "--data", f"{test}.en.gz", "--target", f"{test}.de.gz")["metrics"]
    print(metrics, trained["seconds"], "s")
    assert metrics["bleu"] >= 20
    assert metrics["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
