"""Scores and perplexities of the language models of this plugin, beside what their logits say one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mmhub.perplexity
from mmhub.batch import Items
from mmhub.build import compose
from mmhub.data.blocks import plan_blocks
from mmhub.data.corpus import Corpus
from mmhub.evaluation import EvalOptions
from mmhub.interfaces import LanguageModel, Policy
from mmhub.model import Model
from mmhub.perplexity import measure_corpus, score_texts

TEXTS = ("a cat\nsat", "a", "the mat on the cat and on a mat", "")
SMALL: dict[str, dict[str, Any]] = {
    "rnn-lm": {"dim": 12, "embedding_dim": 12},
    "lstm-lm": {"dim": 12, "embedding_dim": 8, "depth": 2},
    "transformer-lm": {"dim": 16, "depth": 2, "heads": 2, "kv_heads": 1, "max_length": 48},
    "transformers-lm": {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}},
}
MODELS = pytest.mark.parametrize(  # importing transformers takes seconds
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "transformers-lm")) for name in SMALL]
)


def build(name: str, **changes: Any) -> Model:
    config = SMALL[name] | changes
    model = compose("language-modelling", decoder={"use": name, "config": config}, tokenizer={"kind": "byte"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def corpus_of(model: Model) -> Corpus:
    return Corpus.read(enumerate(TEXTS), model.language_model.processor, where="row {}".format)


def by_hand(model: Model, text: str) -> float:
    """log P of a text by the chain rule, from the logits after each of its beginnings."""
    decoder: LanguageModel = model.eval().language_model
    ids = decoder.processor.read(text, Policy())
    total = 0.0
    for at in range(1, len(ids)):
        mask = torch.ones(1, at, dtype=torch.bool)
        items = Items(ids[None, :at], mask, torch.zeros(1, dtype=torch.long), 1)
        logits: Tensor = model.decode(model.encode({"text": items}, 1)).logits
        total += float(logits.double().log_softmax(-1)[0, ids[at]])
    return total


@MODELS
def test_scores_are_sums_of_log_probabilities_by_the_chain_rule(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        wanted = [by_hand(model, text) for text in TEXTS]
    for batch_tokens in (1, 60, 0):
        found = [one.logprob for one in score_texts(model, TEXTS, batch_tokens=batch_tokens)]
        assert found == pytest.approx(wanted, rel=1e-5)


@MODELS
def test_the_exponential_of_the_training_loss_is_the_perplexity_and_that_of_the_scores(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmhub.perplexity, "_CHUNK", 7)
    model = build(name).eval()
    corpus = corpus_of(model)
    metrics = measure_corpus(model, corpus, EvalOptions())["metrics"]
    scores = model.score(TEXTS)
    assert metrics["perplexity"]["token"] == pytest.approx(math.exp(-sum(scores) / metrics["tokens"]), rel=1e-6)
    stateful = model.language_model.stateful
    plan = plan_blocks(
        corpus, block=16 if stateful else corpus.predictions, batch=1, seed=0, epoch=0, stateful=stateful
    )
    total = 0.0
    for number in range(len(plan)):
        batch = plan.batch(number)
        assert batch is not None
        with torch.no_grad():
            loss = model(batch).loss
        total += float(loss) * batch.weight
    assert math.exp(total / corpus.predictions) == pytest.approx(metrics["perplexity"]["token"], rel=1e-5)


def test_a_transformer_reads_long_texts_in_windows() -> None:
    model = build("transformer-lm", max_length=16).eval()
    text = TEXTS[2]
    [found] = score_texts(model, [text])
    ids = model.language_model.processor.read(text, Policy())
    assert len(ids) > 32 and found.tokens == len(ids) - 1
    whole = -sum(scored_by_parts(model, ids, 16, 8))
    assert found.logprob == pytest.approx(whole, rel=1e-5)


def scored_by_parts(model: Model, ids: Tensor, window: int, stride: int) -> list[float]:
    """The loss of each token from a window that ends with it and its neighbours, one window at a time."""
    found: list[float] = []
    end = min(window, len(ids))
    while True:
        begin = max(0, end - window)
        piece = ids[None, begin:end]
        items = Items(piece, torch.ones_like(piece, dtype=torch.bool), torch.zeros(1, dtype=torch.long), 1)
        with torch.no_grad():
            losses = model.language_model.token_losses(model.fusion(model.encode({"text": items}, 1)))[0]
        found += losses[len(found) + 1 - begin :].tolist()
        if end == len(ids):
            return found
        end = min(end + stride, len(ids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@MODELS
def test_a_gpu_finds_the_same_perplexity(name: str) -> None:
    model = build(name)
    corpus = corpus_of(model)
    here = measure_corpus(model, corpus, EvalOptions())["metrics"]
    there = measure_corpus(model.to("cuda"), corpus, EvalOptions())["metrics"]
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-4)
