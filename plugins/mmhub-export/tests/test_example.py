"""The example beside an export: it reads as mmhub does, and says what it cannot read. No graph is run here."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmhub
from mmhub.interfaces import Policy
from mmhub_export.consumer import describe
from mmhub_export.example import write_example
from mmhub_export.graphs import Graph
from tests.conftest import _one_thread, _own_caches  # noqa: F401

TEXTS = ["a good thing", "a bad thing and a long one", "no"]
TEXT = {"use": "transformer", "config": {"dim": 32, "depth": 1, "heads": 2, "max_length": 8}}
IMAGE = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}
AUDIO = {"use": "cnn", "config": {"sample_rate": 8000, "n_mels": 16, "dim": 16, "channels": [4, 4]}}
YES = {"use": "classification", "config": {"labels": ["no", "yes"]}}
WORDS = {"tokenizer": {"kind": "word"}, "texts": TEXTS}


def written(folder: Path, model: Any, *names: str) -> dict[str, Any]:
    """Write the example of a model whose graphs have these names, and return the facts it goes by."""
    graphs = [Graph(name, torch.nn.Identity(), {}, {}, []) for name in names]
    described = {name: {"file": name, "inputs": {}, "outputs": {}, "limits": {}} for name in names}
    facts = describe(model, graphs, described, folder, "torch-export")
    keep(folder, facts, model.modalities)
    return facts


def keep(folder: Path, facts: dict[str, Any], modalities: Any) -> None:
    (folder / "export.json").write_text(json.dumps(facts | {"modalities": list(modalities)}))


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the example and return what it stops with."""
    monkeypatch.setattr(sys, "argv", ["example.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(folder / "example.py"))
    return stopped.value.code


def pictures(folder: Path) -> list[Path]:
    """Files of every kind that is not simply red, green and blue."""
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    levels = draw.integers(0, 65536, (40, 50), dtype=np.uint16)
    palette = Image.fromarray(colours[..., :3]).quantize(16)
    made = {"rgba": Image.fromarray(colours), "grey": Image.fromarray(colours[..., :2], "LA")}
    made |= {"deep": Image.fromarray(levels), "palette": palette, "clear": palette.copy()}
    for name, image in made.items():
        image.save(folder / f"{name}.png", **({"transparency": 3} if name == "clear" else {}))
    return [folder / f"{name}.png" for name in made]


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_transparent_and_deep_pictures_are_read_as_mmhub_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mmhub.compose(encoders={"image": IMAGE}, decoder=YES).eval()
    facts = written(tmp_path, model, "model")
    assert "transparent parts on white" in facts["preprocessing"]["image"]["pixels"]
    code = (tmp_path / "example.py").read_text().partition("\nparser = ")[0]
    names: dict[str, Any] = {"__file__": str(tmp_path / "example.py")}
    exec(code, names)
    for path in pictures(tmp_path):
        expected = model.processors["image"]([str(path)], Policy()).data.numpy()
        assert np.array_equal(names["read_image"](str(path))["data"], expected), path.name
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert "pixels of unknown range" in refusal(tmp_path, monkeypatch, "--image", str(tmp_path / "float.tiff"))


def test_nothing_given_is_a_mistake_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    written(tmp_path, mmhub.compose(encoders={"text": TEXT}, decoder=YES, **WORDS), "model")
    assert refusal(tmp_path, monkeypatch) == 2
    assert "--text" in capsys.readouterr().err
    both = mmhub.compose(encoders={"audio": AUDIO, "text": TEXT}, decoder=YES, **WORDS)
    written(tmp_path, both, "audio_encoder", "text_encoder", "head")
    assert refusal(tmp_path, monkeypatch) == 2
    assert "give at least one of --" in capsys.readouterr().err
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    assert "no sound in it" in refusal(tmp_path, monkeypatch, "--audio", str(tmp_path / "empty.wav"))


def test_whisper_is_not_given_more_than_it_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"sample_rate": 100, "window": 4, "hop": 1, "filters": "mel_filters.npy", "seconds": 30.0}
    graph = {"file": "x", "inputs": {}, "outputs": {}, "limits": {}, "padding": True}
    writing = {"beams": 5, "temperature": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "stop": []}
    facts = {
        "graphs": {"audio_encoder": graph, "decoder": graph},
        "preprocessing": {"audio": {"frames": 3000, "log_mel": how}, "written": {}},
        "answer": {"kind": "next token", "begin": [1], "context": 448, "generation": writing | {"max_new_tokens": 9}},
    }
    write_example("mine", "speech-recognition", "torch-export", facts, tmp_path)
    keep(tmp_path, facts, ["audio"])
    soundfile.write(tmp_path / "long.wav", np.zeros(3001), 100)
    said = refusal(tmp_path, monkeypatch, "--audio", str(tmp_path / "long.wav"))
    assert "longer than the 30 seconds" in said
    readme = " ".join((tmp_path / "README.md").read_text().split())
    assert "The model hears 30 seconds of sound at once." in readme
    assert "here with beams 5, so its texts may differ" in readme


@pytest.mark.parametrize(("task", "use"), [("tagging", "tagging"), ("question-answering", "span")])
def test_a_text_of_which_nothing_may_be_cut_off_is_refused_where_it_is_too_long(
    task: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"labels": ["O", "B-X"]} if use == "tagging" else {}
    model = mmhub.compose(task, encoders={"text": TEXT}, decoder={"use": use, "config": config}, **WORDS)
    written(tmp_path, model, "model")
    more = [] if use == "tagging" else ["--context", "a bad thing"]
    said = refusal(tmp_path, monkeypatch, "--text", "a good thing " * 9, *more)
    assert "more than the 8 tokens the model reads at once" in said


def test_a_language_model_says_what_it_cannot_hold_and_keeps_unknown_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = {"use": "transformer-lm", "config": {"dim": 32, "depth": 1, "heads": 2, "max_length": 8}}
    model = mmhub.compose("language-modelling", decoder=decoder, **WORDS)
    facts = written(tmp_path, model, "model")
    said = refusal(tmp_path, monkeypatch, "--text", "a good thing " * 9)
    assert "at most 8 with what it writes" in said
    processor: Any = model.processors["text"]
    hidden = facts["preprocessing"]["text"]["hidden"]
    assert processor.end_id in hidden
    assert all(processor.decode([token]) == "" for token in hidden)
    assert (processor.unknown_id in hidden) == (processor.decode([processor.unknown_id]) == "")
