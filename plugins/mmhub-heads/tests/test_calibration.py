"""Class weights and calibration: what rows count in the loss, and what scores mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmhub.batch import Features, Output
from mmhub.errors import UsageError
from mmhub.interfaces import Stream, decode_config, encode_config
from mmhub_heads.calibration import HIGHEST, LOWEST, fit_temperature
from mmhub_heads.classification import Classification
from mmhub_heads.tagging import Tagging

D = 6
INPUTS = {"text": Stream(D)}
TARGETS = ["a", "a", "a", "b", "c", "a"]


def bundle(rows: int) -> dict[str, Features]:
    torch.manual_seed(0)
    return {"text": Features(torch.randn(rows, 3, D), torch.ones(rows, 3, dtype=torch.bool))}


def build(**config: Any) -> Classification:
    return Classification(Classification.fit(Classification.Config(**config), TARGETS), INPUTS).eval()


def test_balanced_weights_let_every_label_count_the_same() -> None:
    decoder = build(class_weights="balanced")
    assert decoder.config.class_weights == {"a": 6 / (3 * 4), "b": 2.0, "c": 2.0}
    weights = decoder.weigh(decoder.encode_targets(TARGETS))
    assert [float(weights[[t == label for t in TARGETS]].sum()) for label in "abc"] == [2, 2, 2]
    again = decode_config(Classification.Config, encode_config(decoder.config), "model.decoder.config")
    assert Classification(again, INPUTS).weights == decoder.weights
    assert build().weigh(torch.tensor([0])) is None


def test_balanced_weights_are_learned_for_given_labels_too() -> None:
    decoder = build(class_weights="balanced", labels=("c", "b", "a", "z"))
    assert decoder.weights == (1.5, 1.5, 6 / 16, 1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_loss_of_a_batch_is_that_of_its_pieces_by_weight(smoothing: float) -> None:
    decoder = build(class_weights={"b": 5.0, "c": 0.5}, label_smoothing=smoothing)
    whole, encoded = bundle(6)["text"], decoder.encode_targets(TARGETS)
    weights = decoder.weigh(encoded)
    assert weights.tolist() == [1, 1, 1, 5, 0.5, 1]
    loss = decoder({"text": whole}, encoded).loss
    logits = decoder({"text": whole}).logits
    each = F.cross_entropy(logits, encoded, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum())
    parts = [slice(0, 2), slice(2, 6)]
    losses = [
        decoder({"text": Features(whole.tokens[part], whole.mask[part])}, encoded[part]).loss * weights[part].sum()
        for part in parts
    ]
    torch.testing.assert_close(loss, sum(losses) / weights.sum())
    if not smoothing:
        torch.testing.assert_close(loss, F.cross_entropy(logits, encoded, weight=torch.tensor(decoder.weights)))


def test_weights_of_unknown_labels_and_without_targets_are_refused() -> None:
    with pytest.raises(UsageError, match=r"names the label 'd', which does not occur; labels: a, b, c"):
        build(class_weights={"d": 2.0})
    with pytest.raises(UsageError, match="computed from training targets"):
        Classification(Classification.Config(labels=("a", "b"), class_weights="balanced"), INPUTS)
    with pytest.raises(UsageError, match="the weight of the label 'a' must be above 0, got 0"):
        decode_config(Classification.Config, {"class_weights": {"a": 0.0}}, "model.decoder.config")
    with pytest.raises(UsageError, match="class_weights"):
        decode_config(Classification.Config, {"class_weights": "balance"}, "model.decoder.config")


def drawn(rows: int, exaggeration: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from a distribution, and its logits, exaggerated."""
    draw = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(rows, 4, generator=draw)
    return logits * exaggeration, torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]


@pytest.mark.parametrize("exaggeration", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_makes_scores_too_sure_or_too_modest(exaggeration: float) -> None:
    logits, targets = drawn(20_000, exaggeration)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(exaggeration, rel=0.05)
    best = F.cross_entropy(logits / found, targets)
    assert all(best < F.cross_entropy(logits / (found * other), targets) for other in (0.97, 1.03))


def test_rows_that_are_all_right_or_say_nothing_have_a_temperature_within_its_bounds() -> None:
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(LOWEST)
    assert fit_temperature(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(HIGHEST)


@pytest.mark.parametrize("bad", [torch.zeros(0, 2), torch.tensor([[float("nan"), 0.0]])])
def test_nothing_to_calibrate_on_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"at least 1 held-out row|not finite"):
        fit_temperature(bad, torch.zeros(len(bad), dtype=torch.long))


def test_calibration_changes_scores_and_no_answer_and_is_kept_with_the_config() -> None:
    logits, targets = drawn(2000, 3.0)
    decoder = Classification(Classification.Config(labels=("a", "b", "c", "d"), calibrate=True), INPUTS).eval()
    assert decoder.calibrates
    assert not build().calibrates
    output = Output(logits=logits)
    before = decoder.predict(output)
    found = decoder.calibrate(*decoder.scored(output, targets))
    after = decoder.predict(output)
    assert [answer["label"] for answer in after] == [answer["label"] for answer in before]
    assert after[0]["score"] == pytest.approx(float((logits[0] / found).softmax(0).max()), rel=1e-5)
    config = decode_config(Classification.Config, encode_config(decoder.config), "model.decoder.config")
    assert Classification(config, INPUTS).predict(output) == after
    share = sum(a["label"] == "abcd"[t] for a, t in zip(after, targets.tolist(), strict=True)) / 2000
    gaps = [abs(sum(a["score"] for a in answers) / 2000 - share) for answers in (before, after)]
    assert gaps[1] < 0.02 < 0.1 < gaps[0]


def test_tags_are_calibrated_by_word() -> None:
    decoder = Tagging(Tagging.Config(labels=("a", "b", "c", "d"), calibrate=True), INPUTS).eval()
    logits, targets = drawn(2000, 3.0)
    mask = torch.ones(1000, 3, dtype=torch.bool)
    mask[:, 1] = False  # the middle token begins no word
    wide = torch.full((1000, 3, 4), 99.0).masked_scatter(mask[..., None], logits)
    output, encoded = Output(logits=wide, mask=mask), F.pad(targets.view(1000, 2), (0, 1), value=-100)
    before = decoder.predict(output)
    assert decoder.calibrate(*decoder.scored(output, encoded)) == pytest.approx(fit_temperature(logits, targets))
    after = decoder.predict(output)
    assert [answer["tags"] for answer in after] == [answer["tags"] for answer in before]
    assert after[0]["scores"][0] < before[0]["scores"][0]
