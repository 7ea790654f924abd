"""The three heads: what they learn from targets, what they answer, and what they refuse."""

from __future__ import annotations

import math
import tomllib
from importlib import import_module
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.batch import Features
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import TASKS, Decoder, Stream, decode_config, encode_config
from mmhub_heads.classification import Classification
from mmhub_heads.multilabel import Multilabel
from mmhub_heads.regression import Regression

D = 6
TOY: list[tuple[type[Decoder], list[Any]]] = [
    (Classification, ["a", "b", "c", "a"]),
    (Multilabel, [["a"], ["a", "b"], [], "b, c"]),
    (Regression, [1.0, 2, "3.5", np.float32(-4)]),
]
IDS = [head.__name__ for head, _ in TOY]


def bundle(rows: int, name: str = "text", pooled: int | None = None) -> dict[str, Features]:
    torch.manual_seed(0)
    mask = torch.ones(rows, 3, dtype=torch.bool)
    return {name: Features(torch.randn(rows, 3, D), mask, pooled=torch.randn(rows, pooled) if pooled else None)}


def build(head: type[Decoder], targets: list[Any], **config: Any) -> Decoder:
    return head(head.fit(head.Config(**config), targets), {"text": Stream(D)})


@pytest.mark.parametrize(("head", "targets"), TOY, ids=IDS)
@pytest.mark.parametrize("hidden", [0, 8])
def test_the_loss_falls_to_near_its_floor_on_four_rows(head: type[Decoder], targets: list[Any], hidden: int) -> None:
    decoder = build(head, targets, dropout=0.0, hidden=hidden)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.05)
    encoded, features = decoder.encode_targets(targets), bundle(4)
    for _ in range(150):
        optimizer.zero_grad()
        loss = decoder(features, encoded).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    answers = decoder.eval().predict(decoder(features))
    key = next(iter(answers[0]))
    if key == "value":
        assert [a["value"] for a in answers] == pytest.approx(decoder.references(targets), abs=0.6)
    else:
        assert [a[key] for a in answers] == decoder.references(targets)


@pytest.mark.parametrize(("head", "targets"), TOY, ids=IDS)
def test_a_head_is_rebuilt_from_its_config_and_weights_on_meta(head: type[Decoder], targets: list[Any]) -> None:
    decoder = build(head, targets, hidden=4).eval()
    config = decode_config(head.Config, encode_config(decoder.config), "model.decoder.config")
    with torch.device("meta"):
        again = head(config, {"text": Stream(D)})
    assert all(p.is_meta for p in again.parameters())
    again.load_state_dict(decoder.state_dict(), assign=True)
    assert torch.equal(again.eval()(bundle(2)).logits, decoder(bundle(2)).logits)


@pytest.mark.parametrize(("head", "targets"), TOY, ids=IDS)
def test_the_loss_is_a_plain_mean_over_rows(head: type[Decoder], targets: list[Any]) -> None:
    decoder = build(head, targets).eval()
    whole, encoded = bundle(4), decoder.encode_targets(targets)
    part = whole["text"]
    each = [
        decoder({"text": Features(part.tokens[i : i + 1], part.mask[i : i + 1])}, encoded[i : i + 1]).loss
        for i in range(4)
    ]
    torch.testing.assert_close(decoder(whole, encoded).loss, torch.stack(each).mean())


@pytest.mark.parametrize(("head", "targets"), TOY, ids=IDS)
@pytest.mark.parametrize("missing", [None, math.nan, np.float64("nan")])
def test_a_missing_target_is_an_input_error_that_knows_its_row(head: type, targets: list[Any], missing: Any) -> None:
    decoder = build(head, targets)
    for call in (decoder.encode_targets, lambda t: head.fit(head.Config(), t)):
        with pytest.raises(InputError, match="target is missing") as caught:
            call([targets[0], targets[1], missing])
        assert caught.value.row == 2


def test_fused_is_read_before_any_other_stream_and_with_its_own_summary() -> None:
    config = Classification.Config(labels=("a", "b"))
    decoder = Classification(config, {"text": Stream(9), "fused": Stream(D, pooled=4)}).eval()
    features = bundle(2, "fused", pooled=4)
    assert decoder(features).logits.shape == (2, 2)
    assert decoder.head.layers[-1].in_features == 4


def test_streams_that_arrive_apart_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match=r'apart: audio, text; .*use = "attention"'):
        Classification(Classification.Config(labels=("a", "b")), {"text": Stream(4), "audio": Stream(4)})


def test_labels_are_text_sorted_with_numbers_by_value() -> None:
    raw = [10, 2.0, "1", np.int64(0), True, "b", "a", np.bool_(False), np.str_("c")]
    assert Classification.fit(Classification.Config(), raw).labels == (
        *("0", "1", "2", "10"),
        *("a", "b", "c", "false", "true"),
    )
    decoder = build(Classification, raw)
    assert decoder.encode_targets([2, "2", 2.0, np.float32(2)]).tolist() == [2, 2, 2, 2]


def test_given_labels_stay_and_keep_their_order() -> None:
    config = Classification.Config(labels=("z", "a"))
    assert Classification.fit(config, ["a", "q"]) is config


def test_an_unseen_label_names_the_row_and_the_known_labels() -> None:
    decoder = build(Classification, list("abcdefghijkl"))
    with pytest.raises(InputError) as caught:
        decoder.encode_targets(["a", "x"])
    message = "label 'x' was not seen in training; known labels: a, b, c, d, e, f, g, h, i, j, ... (12)"
    assert (str(caught.value), caught.value.row) == (message, 1)
    with pytest.raises(InputError, match="label 'x' was not seen") as caught:
        build(Multilabel, [["a"]]).encode_targets([["a"], [], ["a", "x"]])
    assert caught.value.row == 2


def test_one_label_is_not_a_classification_problem() -> None:
    with pytest.raises(UsageError, match=r"1 distinct label\(s\): 'a'"):
        Classification.fit(Classification.Config(), ["a", "a"])
    with pytest.raises(UsageError, match="at least 2 labels"):
        Classification(Classification.Config(), {"text": Stream(4)})
    with pytest.raises(UsageError, match="no label at all"):
        Multilabel.fit(Multilabel.Config(), [[], ""])


def test_scores_are_probabilities_and_come_with_details_alone() -> None:
    decoder = build(Classification, ["yes", "no"]).eval()
    output = decoder(bundle(3))
    for brief, full in zip(decoder.predict(output, details=False), decoder.predict(output), strict=True):
        assert set(brief) == {"label", "score"}
        assert set(full["scores"]) == {"yes", "no"}
        assert sum(full["scores"].values()) == pytest.approx(1, abs=1e-6)
        assert full["score"] == max(full["scores"].values()) == full["scores"][full["label"]]
    decoder = build(Multilabel, ["yes", "no"])
    assert [set(decoder.predict(output, details=d)[0]) for d in (False, True)] == [{"labels"}, {"labels", "scores"}]


def test_multilabel_reads_lists_arrays_and_separated_text() -> None:
    decoder = build(Multilabel, [["red", "round"], "10; 9"], separator=";")
    assert decoder.labels.names == ("9", "10", "red", "round")
    raws = ["round ;red", ["red", "round"], np.array(["red", "round"]), {"round", "red"}]
    assert decoder.references(raws) == [["red", "round"]] * 4
    assert decoder.encode_targets(raws).tolist() == [[0, 0, 1, 1]] * 4
    assert decoder.encode_targets([[], ""]).sum() == 0


def test_regression_answers_in_the_units_of_the_targets() -> None:
    targets = [1_700_000_000.0, 1_700_000_010.0]
    decoder = build(Regression, targets)
    assert (decoder.config.mean, decoder.config.std) == (1_700_000_005.0, 5.0)
    assert decoder.encode_targets(targets).tolist() == [-1.0, 1.0]
    output = decoder(bundle(2))
    output.logits = decoder.encode_targets(targets)[:, None]
    assert [a["value"] for a in decoder.predict(output)] == targets


def test_equal_regression_targets_have_spread_one() -> None:
    assert Regression.fit(Regression.Config(), [3, 3]).std == 1.0


@pytest.mark.parametrize("bad", ["high", math.inf, True, [1.0], 10**400])
def test_a_regression_target_must_be_a_finite_number(bad: Any) -> None:
    with pytest.raises(InputError, match="must be a finite number") as caught:
        build(Regression, [1, 2]).encode_targets([1, bad])
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("head", "table", "message"),
    [
        (Classification, {"dropuot": 0.1}, "unknown key 'dropuot'; did you mean 'dropout'?"),
        (Classification, {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (Classification, {"labels": ["a", "b", "a"]}, "the label 'a' is listed twice"),
        (Multilabel, {"threshold": 1.5}, "threshold must lie between 0 and 1"),
        (Regression, {"std": 0.0}, "std must be above 0"),
        (Regression, {"hidden": -1}, "hidden must be a width"),
    ],
)
def test_a_bad_setting_is_refused_by_name(head: type[Decoder], table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_config(head.Config, table, "model.decoder.config")
    assert message in str(caught.value)


def test_the_manifest_names_what_exists() -> None:
    manifest = tomllib.loads(files("mmhub_heads").joinpath("mmhub.toml").read_text("utf-8"))
    for component in manifest["components"]:
        module, _, name = component["factory"].partition(":")
        factory = getattr(import_module(module), name)
        assert component["config"] == f"{module}:{name}.Config"
        assert any(TASKS[task].decoder == component["name"] for task in factory.tasks)
