"""Other libraries and `hub serve`: their own clients push and load, and what they pushed loads in mmhub, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmhub
from tests.conftest import png
from tests.interop_clients import TEXT

CLIENTS = Path(__file__).with_name("interop_clients.py")


@pytest.fixture
def client(hub: str, tmp_path: Path) -> Callable[[str], None]:
    """Run one library's part of interop_clients.py against the loopback Hub; `tmp_path` is its folder."""

    def run(library: str) -> None:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, str(CLIENTS), library, str(tmp_path)]
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
def test_transformers_pushes_and_loads_and_mmhub_gives_the_same_embeddings(
    client: Callable[[str], None], tmp_path: Path
) -> None:
    client("transformers")
    expected = json.loads((tmp_path / "expected.json").read_text())
    samples = [{"text": TEXT}, {"text": "a mat"}]
    torch.testing.assert_close(
        mmhub.load("team/bert-lfs").embed(samples), torch.tensor(expected["embedding"]), atol=1e-5, rtol=0
    )
    answers = mmhub.load("team/bert-lfs-labels").predict(samples)
    assert list(answers[0]["scores"]) == ["bad", "good", "so-so"]
    scores = torch.tensor([list(answer["scores"].values()) for answer in answers])
    torch.testing.assert_close(scores, torch.tensor(expected["scores"]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_timm_pushes_and_loads_and_mmhub_predicts_with_its_label_names(client: Callable[[str], None]) -> None:
    client("timm")
    (answer,) = mmhub.load("team/timm-lfs").predict({"image": png(1)})
    assert set(answer["scores"]) == {"cat", "dog", "fox"}


@pytest.mark.slow
def test_sentence_transformers_pushes_and_loads_and_mmhub_gives_the_same_embeddings(
    client: Callable[[str], None], tmp_path: Path
) -> None:
    client("sentence-transformers")
    expected = torch.tensor(json.loads((tmp_path / "expected.json").read_text())["embedding"])
    found = mmhub.load("team/sentences-xet").embed([{"text": TEXT}, {"text": "a mat"}])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["datasets", "mixin"])
def test_other_clients_push_and_load_through_our_hub(client: Callable[[str], None], library: str) -> None:
    client(library)
