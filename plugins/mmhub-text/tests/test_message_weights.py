"""Messages that count more or less than others in the loss of a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Features, Items
from mmhub.layers import chunked_cross_entropy
from mmhub_text.recurrent_lm import LSTMLM
from mmhub_text.transformer_lm import TransformerLM
from mmhub_text.transformers_lm import TransformersLM

WEIGHTS = torch.tensor([[0.0, 0.5, 0.0, 2.0, 2.0, 0.25], [1.0, 0.0, 3.0, 1.0, 7.0, 7.0]])
IDS = torch.tensor([[5, 9, 4, 22, 7, 7], [4, 8, 15, 16, -1, -1]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"head_dim": 8, "intermediate_size": 24, "vocab_size": 300, "pad_token_id": 0}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    processor = TransformersLM.make_processor(TransformersLM.Config(), {"kind": "byte"})
    model: Any
    if kind == "transformer":
        model = TransformerLM(TransformerLM.Config(dim=16, depth=2, heads=4), {}, processor)
    elif kind == "lstm":
        model = LSTMLM(LSTMLM.Config(dim=16, embedding_dim=16, depth=1), {}, processor)
    else:
        model = TransformersLM(TransformersLM.Config(config={"model_type": kind, **SIZES}), {}, processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def stream(model: Any, loss: Tensor | None = None) -> dict[str, Features]:
    mask = IDS >= 0
    return {"text": Features(model.embed(IDS.clamp(min=0)) * mask[..., None], mask, ids=IDS, loss=loss)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_the_chunked_loss_and_its_gradients_are_a_weighted_mean(smoothing: float, biased: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((2, 6, 5), (11, 5), (11,)))
    targets = torch.randint(0, 11, (2, 6))
    targets[1, 4:] = -1  # these do not count, whatever their weight
    sides = []
    for chunked in (True, False):
        h, w, b = (tensor.clone().requires_grad_() for tensor in (hidden, weight, bias))
        given = b if biased else None
        options: Any = {"ignore_index": -1, "label_smoothing": smoothing}
        if chunked:
            loss = chunked_cross_entropy(h, w, targets, given, weights=WEIGHTS, chunk=3 * 11, **options)
        else:
            each = F.cross_entropy(F.linear(h, w, given).mT, targets, reduction="none", **options)
            loss = (each * WEIGHTS).sum() / (WEIGHTS * (targets >= 0)).sum()
        (3 * loss).backward()
        sides.append([loss.detach(), h.grad, w.grad, *([b.grad] if biased else [])])
    for found, want in zip(*sides, strict=True):
        assert torch.allclose(found, want, atol=1e-12)  # type: ignore[arg-type]


def test_weights_of_one_and_zero_change_nothing_and_of_zero_alone_there_is_no_loss() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 4, requires_grad=True), torch.randn(9, 4)
    targets = torch.randint(0, 9, (2, 6))
    ones = (WEIGHTS > 0).float()
    plain = chunked_cross_entropy(hidden, weight, targets.where(WEIGHTS > 0, -100))
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, weights=ones), plain)
    none = chunked_cross_entropy(hidden, weight, targets, weights=0 * ones)
    none.backward()
    assert none == 0 and hidden.grad is not None and not hidden.grad.any()
    with pytest.raises(ValueError, match="5 weights, 12 targets"):
        chunked_cross_entropy(hidden, weight, targets, weights=ones[0, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_weighted_loss_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 6, 16), torch.randn(50, 16), torch.randint(0, 50, (2, 6))
    sides = []
    for device in ("cpu", "cuda"):
        h, w = (tensor.to(device).requires_grad_() for tensor in (hidden, weight))
        with torch.autocast("cuda", dtype, enabled=device == "cuda" and dtype != torch.float32):
            loss = chunked_cross_entropy(h, w, targets.to(device), weights=WEIGHTS.to(device), chunk=3 * 50)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        sides.append([loss.detach().cpu(), h.grad.cpu(), w.grad.cpu()])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(sides[1], sides[0], atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["transformer", "lstm", "llama", "gemma2"])  # the last one's head caps the logits
def test_a_language_model_learns_by_weights_and_measures_without(kind: str) -> None:
    model = build(kind)
    every = model.token_losses(stream(model))
    torch.testing.assert_close(model.token_losses(stream(model, WEIGHTS)), every * (WEIGHTS > 0), atol=1e-5, rtol=1e-5)
    items = Items(IDS.clamp(min=0), IDS >= 0, torch.arange(2), 2, marks=WEIGHTS)
    counted = model.count_targets(items)
    assert counted.tolist() == [4.75, 4.0]  # nothing stands before the first token
    loss = model(stream(model, WEIGHTS), counted).loss
    assert loss.item() == pytest.approx((every * WEIGHTS).sum().item() / 8.75, rel=1e-4)
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    found = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()
    shares = []
    for weight in WEIGHTS[:, 1:].unique():  # the same, one weight at a time
        where = torch.zeros(2, 6, dtype=torch.bool)
        where[:, 1:] = WEIGHTS[:, 1:] == weight
        count = int((where & (IDS >= 0)).sum())
        if count:
            shares.append(weight * count * model(stream(model, where), torch.ones(2)).loss)
    (torch.stack(shares).sum() / 8.75).backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
