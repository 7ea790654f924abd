"""Cutting models into graphs, and what is refused: nothing is recorded here but for one part that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmhub
from mmhub.errors import TrustError, UsageError
from mmhub.model import Model
from mmhub_export.checks import compare, error_of, ranges, record
from mmhub_export.graphs import Graph, cut, plain
from tests.conftest import _one_thread, _own_caches  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's exporters, about themselves
TEXTS = ["a good thing", "a bad thing and a long one", "no"]
TEXT = {"use": "transformer", "config": {"dim": 32, "depth": 1, "heads": 2}}
AUDIO = {"use": "cnn", "config": {"sample_rate": 8000, "n_mels": 16, "dim": 16, "channels": [4, 4]}}
YES = {"use": "classification", "config": {"labels": ["no", "yes"]}}
WRITER = {"use": "transformer-lm", "config": {"dim": 32, "depth": 1, "heads": 2}}
WORDS = {"kind": "word"}


def model(task: str = "classification", **parts: Any) -> Model:
    if "text" in parts.get("encoders", {}) or "tokenizer" in parts:
        parts = {"tokenizer": WORDS, "texts": TEXTS} | parts
    return mmhub.compose(task, **parts).eval()


MODELS: dict[str, dict[str, Any]] = {
    "captions": {
        "task": "captioning",
        "encoders": {"audio": AUDIO},
        "decoder": {"use": "seq2seq", "config": {"dim": 32, "depth": 1, "heads": 2}},
        "tokenizer": {"kind": "byte"},
    },
    "chat": {"task": "chat", "encoders": {"audio": AUDIO}, "decoder": WRITER, "tokenizer": WORDS},
    "classes": {"encoders": {"audio": AUDIO, "text": TEXT}, "fusion": "attention", "decoder": YES},
    "lstm-lm": {
        "task": "language-modelling",
        "decoder": {"use": "lstm-lm", "config": {"dim": 16, "embedding_dim": 8, "depth": 2}},
        "tokenizer": WORDS,
    },
    "numbers": {
        "task": "regression",
        "encoders": {"text": {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8, "depth": 2}}},
        "decoder": {"use": "regression", "config": {"mean": 2.0, "std": 3.0}},
    },
    "pairs": {"task": "retrieval", "encoders": {"audio": AUDIO, "text": TEXT}},
    "rnn-lm": {
        "task": "language-modelling",
        "decoder": {"use": "rnn-lm", "config": {"dim": 16, "embedding_dim": 8}},
        "tokenizer": WORDS,
    },
    "speech": {
        "task": "speech-recognition",
        "encoders": {"audio": AUDIO},
        "decoder": {"use": "ctc", "config": {"units": "word", "vocabulary": ["one", "two"]}},
    },
    "tags": {
        "task": "tagging",
        "encoders": {"text": TEXT},
        "decoder": {"use": "tagging", "config": {"labels": ["O", "B-X"]}},
    },
    "translation": {
        "task": "translation",
        "encoders": {"text": TEXT},
        "decoder": {"use": "seq2seq", "config": {"dim": 32, "depth": 1, "heads": 2}},
    },
    "words": {"task": "language-modelling", "decoder": WRITER, "tokenizer": WORDS},
}
GRAPHS = {
    "captions": ["audio_encoder", "decoder"],
    "chat": ["audio_encoder", "embedding", "language_model"],
    "classes": ["audio_encoder", "text_encoder", "head"],
    "pairs": ["text_tower", "audio_tower"],
    "translation": ["text_encoder", "decoder"],
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_is_cut_where_its_sizes_depend_on_what_it_is_given(name: str) -> None:
    graphs = cut(model(**MODELS[name]))
    assert [graph.name for graph in graphs] == GRAPHS.get(name, ["model"])
    for graph in graphs:
        assert len({tuple(tensor.shape for tensor in case.values()) for case in graph.cases}) >= 3
        assert {next(iter(case.values())).shape[0] for case in graph.cases} >= {1, 2}  # one row alone, and several
        for case, found in zip(graph.cases, graph.answers(), strict=True):
            assert list(case) == list(graph.axes)
            assert [tensor.dim() for tensor in found] == [len(dims) for dims in graph.outputs.values()]
            assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_the_pieces_joined_answer_as_the_model_does_with_a_modality_missing() -> None:
    whole = model(**MODELS["classes"])
    graphs = {graph.name: graph for graph in cut(whole)}
    sound = {"array": np.sin(np.arange(3000, dtype=np.float32)), "sampling_rate": 8000}
    for sample in ({"text": "a good thing", "audio": sound}, {"text": "a good thing"}, {"audio": sound}):
        given: list[Tensor] = []
        for name, processor in whole.processors.items():
            if name in sample:
                items = processor([sample[name]], mmhub.interfaces.Policy())
                given += graphs[f"{name}_encoder"].module(items.data, items.mask)
            else:
                encoder: Any = whole.encoders[name]
                width = encoder.dim
                given += [torch.zeros(1, 1, width), torch.zeros(1, 1, dtype=torch.bool)]
        with torch.no_grad():
            (logits,) = graphs["head"].module(*given)
        expected = whole.predict([sample])[0]["scores"]
        torch.testing.assert_close(logits.softmax(1)[0], torch.tensor(list(expected.values())), atol=1e-5, rtol=0)


def test_all_logits_of_a_language_model_are_those_that_score_texts() -> None:
    for name in ("lstm-lm", "rnn-lm", "words"):
        whole = model(**MODELS[name])
        text = "a good thing"
        ids = whole.processors["text"].read(text, mmhub.interfaces.Policy())[:-1][None]  # without its end
        (graph,) = cut(whole)
        with torch.no_grad():
            (logits,) = graph.module(ids, torch.ones_like(ids, dtype=torch.bool))
        chances = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        assert float(chances) == pytest.approx(whole.score(text, end=False)[0], abs=1e-4), name


@pytest.mark.parametrize("loud", [0.0, 1e-6, 0.1])
def test_a_graph_hears_silence_without_the_rounding_of_sums(loud: float, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = model(**MODELS["speech"]).encoders["audio"]
    sound = loud * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 4000, dtype=torch.bool)
    whole, _ = encoder.frontend(sound, mask)
    power = encoder.frontend.double().power(sound).double()
    frames = (power + 1e-6).log()
    frames = (frames - frames.mean()) / (frames.var(unbiased=False) + 1e-5).sqrt()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    exact, _ = encoder.frontend(sound, mask)
    torch.testing.assert_close(exact.double(), frames, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole, exact, atol=2e-3, rtol=0)  # what sums of -13.8 round to


def test_waveforms_are_also_tried_silent_and_steady() -> None:
    (graph,) = cut(model(**MODELS["speech"]))
    assert [float(case["data"].abs().max()) < 1e-4 for case in graph.quiet] == [True] * 4
    assert not graph.quiet[0]["data"].any()
    assert any(float(case["data"].std()) < 0.01 < float(case["data"].max()) < 0.1 for case in graph.cases)
    (graph,) = cut(model(**MODELS["tags"]))
    assert not graph.quiet


def test_sizes_that_the_model_limits_are_limits_of_the_graphs() -> None:
    for name, size in (("words", "tokens"), ("chat", "tokens")):
        whole = model(**MODELS[name])
        assert cut(whole)[-1].most == {size: whole.decoder.context}


def test_a_least_size_that_is_only_a_guess_is_no_limit() -> None:
    class Sum(nn.Module):
        def forward(self, data: Tensor) -> tuple[Tensor]:
            return (data.sum(1) if data.shape[1] > 3 else data.flip(1).sum(1),)

    graph = Graph("odd", Sum(), {"data": {1: "length"}}, {"found": ("",)}, [{"data": torch.ones(2, 5)}], {"length": 9})
    program = record(graph)
    assert ranges(graph, program, lambda case: [case["data"].sum(1)]) == {"length": {"max": 9}}

    def refuses(case: dict[str, Tensor]) -> list[Tensor]:
        raise RuntimeError("too short")

    assert ranges(graph, program, refuses) == {"length": {"max": 9, "min": 4}}


def test_the_model_that_was_given_stays_as_it_is() -> None:
    whole = model(**MODELS["tags"]).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    with plain(whole) as copy:
        assert not copy.training
        assert {p.dtype for p in copy.parameters()} == {torch.float32}
    assert whole.training
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())
    whole = model(**MODELS["tags"]).train()
    with plain(whole) as same:
        assert same is whole
        assert not same.training
    assert whole.training
    assert whole.decoder.training


def test_what_answers_otherwise_is_refused() -> None:
    graph = cut(model(**MODELS["tags"]))[0]
    good = compare(graph, "it", lambda case: [part.detach().numpy() for part in graph.module(*case.values())])
    assert good["ok"] and good["max_error"] <= good["tolerance"] == 1e-4
    with pytest.raises(TrustError, match="it answers otherwise than the model"):
        compare(graph, "it", lambda case: [part.detach().float() + 1e-2 for part in graph.module(*case.values())])
    with pytest.raises(TrustError, match="does not run on data"):
        compare(graph, "it", lambda case: [][0])


@pytest.mark.parametrize("found", [torch.zeros(2, 1), torch.tensor([0.0, torch.nan])])
def test_another_shape_and_what_is_no_number_are_infinitely_wrong(found: Tensor) -> None:
    assert error_of(torch.zeros(2), found) == float("inf")


def test_a_part_whose_sizes_depend_on_values_is_refused_by_name() -> None:
    class Cutting(nn.Module):
        def forward(self, data: Tensor) -> tuple[Tensor]:
            return (data[: int(data.sum())] if data.sum() > 0 else data,)

    cases = [{"data": torch.ones(2, 3)}]
    graph = Graph("odd_encoder", Cutting(), {"data": {0: "batch"}}, {"found": ("batch", "")}, cases)
    with pytest.raises(UsageError, match="the part 'odd_encoder' of this model cannot be exported"):
        record(graph)
