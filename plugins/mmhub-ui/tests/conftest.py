"""Small untrained models of each kind, composed in memory, and files to hand to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import _one_thread, _own_caches, cli, flac, png  # noqa: F401

PICTURE = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}
SOUND = {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}
TEXT = {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8}}
WRITER = {"dim": 16, "depth": 1, "heads": 2}
WORDS = ("a good film", "a bad film", "who wrote it", "blue sky")
EITHER = {"labels": ["no", "yes"]}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("classification", {"text": TEXT}, {"use": "classification", "config": EITHER}),
    "image": ("classification", {"image": PICTURE}, {"use": "classification", "config": EITHER}),
    "both": ("classification", {"image": PICTURE, "audio": SOUND}, {"use": "classification", "config": EITHER}),
    "multilabel": ("multilabel", {"text": TEXT}, {"use": "multilabel", "config": EITHER}),
    "regression": ("regression", {"text": TEXT}, {"use": "regression", "config": {"mean": 1.0, "std": 2.0}}),
    "spans": ("tagging", {"text": TEXT}, {"use": "tagging", "config": {"labels": ["B-PER", "I-PER"]}}),
    "tags": ("tagging", {"text": TEXT}, {"use": "tagging", "config": {"labels": ["NOUN", "VERB"]}}),
    "answers": ("question-answering", {"text": TEXT}, {"use": "span"}),
    "pictures": ("retrieval", {"text": TEXT, "image": PICTURE}, {"use": "contrastive"}),
    "texts": ("retrieval", {"text": TEXT}, {"use": "contrastive"}),
    "speech": ("speech-recognition", {"audio": SOUND}, {"use": "ctc"}),
    "captions": ("captioning", {"image": PICTURE}, {"use": "seq2seq", "config": WRITER}),
    "writer": ("language-modelling", {}, {"use": "transformer-lm", "config": WRITER}),
    "talker": ("chat", {"image": PICTURE, "audio": SOUND}, {"use": "transformer-lm", "config": WRITER}),
}


@cache
def _compose(kind: str) -> Any:
    import mmhub

    task, encoders, decoder = KINDS[kind]
    writes = task in ("language-modelling", "chat", "captioning")
    options: dict[str, Any] = {"tokenizer": {"kind": "byte"}} if writes else {}
    options |= {"values": {"target": WORDS}} if task == "speech-recognition" else {}
    options |= {"texts": WORDS} if "text" in encoders else {}
    return mmhub.compose(task, encoders=encoders, decoder=decoder, **options).eval()


def built(build: Callable[[], Any]) -> Any:
    """Return what builds a part of an app. Gradio leaves open the event loops that it makes where none runs."""

    async def run() -> Any:
        return build()

    return asyncio.run(run())


@pytest.fixture(scope="session")
def in_blocks() -> Callable[[Callable[[], Any]], Any]:
    """Build components in an app of their own."""

    def run(build: Callable[[], Any]) -> Any:
        import gradio as gr

        def within() -> Any:
            with gr.Blocks(analytics_enabled=False):
                return build()

        return built(within)

    return run


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """Return the model of one of `KINDS`."""
    return _compose


@pytest.fixture(scope="module", autouse=True)
def _loads() -> Iterator[None]:
    """A kind of model is loaded by its name, and anything else as ever."""
    import mmhub

    load = mmhub.load

    def known(name: str, **options: Any) -> Any:
        return _compose(name) if name in KINDS else load(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmhub, "load", known)
        yield


@pytest.fixture(autouse=True)
def _uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The files of a test count as uploaded, but not in an app that a slow test starts."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A picture file."""
    (tmp_path / "cat.png").write_bytes(png(1))
    return str(tmp_path / "cat.png")


@pytest.fixture
def sound(tmp_path: Path) -> str:
    """A recording."""
    (tmp_path / "tone.flac").write_bytes(flac(1, 0.5))
    return str(tmp_path / "tone.flac")


Updates = dict[str, Any]


@pytest.fixture(scope="session")
def seen() -> Callable[[Any, Any], Updates]:
    """Return what components get: by their ids, None for what is not shown, and else the value."""

    def by_id(parts: Any, updates: Any) -> Updates:
        found = {}
        for part, update in zip(parts, updates, strict=True):
            if isinstance(update, dict) and update.get("__type__") == "update":
                found[part.elem_id] = update.get("value", True) if update.get("visible", True) else None
            else:
                found[part.elem_id] = update
        return found

    return by_id
