"""Fixtures of the text tests: texts, a trained tokenizer, and where the real pretrained models lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TEXTS = [
    "a stirring , funny and finally transporting re-imagining of beauty",
    "one long string of cliches",
    "I don't know why; it isn't state-of-the-art, but café au lait!",
    "the film is one of the best of the year , and the worst of the decade",
] * 3


@pytest.fixture
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, inside the folder that MMHUB_REAL_MODELS names."""
    path = Path(os.environ.get("MMHUB_REAL_MODELS", "."), "all-MiniLM-L6-v2")
    if not (path / "config.json").is_file():
        pytest.skip("set MMHUB_REAL_MODELS to a folder that holds all-MiniLM-L6-v2")
    return path
