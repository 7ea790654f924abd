"""Zero-shot classification: labels by their names, in Python and by `mmhub predict` and `mmhub eval`."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.evaluation import EvalOptions, evaluate
from mmhub.model import Columns, Model
from mmhub.zero_shot import classifier, classify, label_vectors, labels_in
from tests.colours import colour_model, picture, pictures

LABELS = ("red", "green", "blue")


@pytest.fixture
def model() -> Model:
    return colour_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures")


@pytest.fixture
def mmhub(model: Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process; any model's name is that of the colours."""
    import mmhub.hub
    from mmhub.cli.main import cli

    monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model)
    return lambda *args: CliRunner().invoke(cli, list(map(str, args)), standalone_mode=False)


def error_of(done: Result) -> MmhubError:
    assert isinstance(done.exception, MmhubError), done
    return done.exception


def test_a_picture_gets_the_label_whose_text_is_nearest(model: Model, folder: Path) -> None:
    samples = [{"image": str(folder / name)} for name in ("b.png", "r.png", "deep/g.png")]
    answers = classify(model, samples, LABELS, batch_size=2)
    assert [answer["label"] for answer in answers] == ["blue", "red", "green"]


def test_scores_are_the_softmax_of_the_models_own_logits(model: Model, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (30, 0, 40))
    (answer,) = classify(model, [{"image": str(tmp_path / "a.png")}], LABELS)
    logits = {"red": 10 * 0.6, "green": 0.0, "blue": 10 * 0.8}
    total = sum(map(math.exp, logits.values()))
    assert answer["scores"] == pytest.approx({label: math.exp(x) / total for label, x in logits.items()}, rel=1e-4)
    assert answer["label"] == "blue" and answer["score"] == answer["scores"]["blue"]


def test_the_vectors_of_a_label_are_averaged_over_templates(model: Model) -> None:
    (vector, _) = label_vectors(model, ["red", "blue"], ["{}", "{} or green", "{} {} or green"]).tolist()
    root2, root5 = math.sqrt(0.5), math.sqrt(0.2)
    mean = [1 + root2 + 2 * root5, root2 + root5, 0.0]
    assert vector == pytest.approx([x / math.hypot(*mean) for x in mean])


def test_other_braces_in_a_template_stay_as_they_are(model: Model) -> None:
    read: list[Any] = []
    model.embed = lambda texts, batch_size: read.extend(texts) or torch.eye(2)  # type: ignore
    label_vectors(model, ["a", "b"], ["{0} {} {x}"])
    assert read == [{"text": "{0} a {x}"}, {"text": "{0} b {x}"}]


def test_texts_are_classified_by_a_model_of_texts_alone() -> None:
    answers = classify(colour_model("text"), [{"text": "red red blue"}, {"text": "blue"}], ["blue", "red"])
    assert [answer["label"] for answer in answers] == ["red", "blue"]


def test_the_retrieval_model_stays_as_it_is(model: Model, folder: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classify(model, [{"image": str(folder / "r.png")}], LABELS)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", [True, False])
def test_parts_that_are_shared_stay_in_the_mode_they_are_in(model: Model, folder: Path, mode: bool) -> None:
    model.train(mode)
    model.freeze("image")
    modes = [part.training for part in model.modules()]
    found = classifier(model, LABELS)
    assert found.training == mode
    found.predict([{"image": str(folder / "r.png")}])
    found.train(mode)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ((), (), "no labels"),
        (("red",), (), "1 label is no choice"),
        (("red", " "), (), "a label is empty"),
        (("red", "blue", "red"), (), "'red' is listed twice"),
        (LABELS, ("a photo of a {}", "a photo"), r"'a photo' has no \{\}"),
    ],
)
def test_labels_that_are_no_choice_are_refused(
    model: Model, labels: tuple[str, ...], templates: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        classifier(model, labels, templates)


def test_models_that_know_no_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="is for embedding, which knows no other labels"):
        classifier(colour_model(task="embedding"), LABELS)
    pictures_alone: Any = colour_model("image")
    pictures_alone.decoder.sides = ("image", "image_pair")
    with pytest.raises(UsageError, match="compares image with image_pair"):
        classifier(pictures_alone, LABELS)


def test_a_sample_holds_what_is_classified_and_nothing_else(model: Model, folder: Path) -> None:
    with pytest.raises(UsageError, match="no input 'text'"):
        classify(model, {"image": str(folder / "r.png"), "text": "red"}, LABELS)
    with pytest.raises(InputError, match="no file") as caught:
        classify(model, [{"image": str(folder / "r.png")}, {"image": "nowhere.png"}], LABELS)
    assert caught.value.row == 1


def rows(folder: Path, labels: str = "red,green,blue,green") -> Path:
    path = folder / "set.csv"
    names = ("r.png", "deep/g.png", "b.png", "r.png")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *zip(names, labels.split(","), strict=True)])
    return path


def test_it_is_measured_like_any_classifier(model: Model, folder: Path) -> None:
    report = evaluate(classifier(model, LABELS), str(rows(folder)), target="label", options=EvalOptions(top=2))
    assert report["task"] == "zero-shot-classification" and report["rows"] == 4
    assert report["metrics"]["accuracy"] == 0.75
    assert report["metrics"]["top2"] == 1.0  # of two labels that fit the same, the one named first
    assert report["metrics"]["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_row_with_another_label_is_named(model: Model, folder: Path) -> None:
    path = rows(folder, "red,green,blue,pink")
    with pytest.raises(InputError, match=r"set\.csv row 4.*'pink' is none of those given: red, green, blue"):
        evaluate(classifier(model, LABELS), str(path), target="label")
    report = evaluate(classifier(model, LABELS), str(path), target="label", options=EvalOptions(skip=True))
    assert report["rows"] == 3 and report["skipped"] == 1


def test_labels_are_found_in_a_column() -> None:
    assert labels_in(["10", None, 2, "b", "", "2", math.nan, np.float32("nan")]) == ("2", "10", "b")


def test_columns_are_those_the_model_was_trained_with(folder: Path) -> None:
    model = colour_model(columns=Columns(inputs={"image": "image", "text": "caption"}, target="group"))
    assert evaluate(classifier(model, LABELS), str(rows(folder)), target="label")["metrics"]["accuracy"] == 0.75
    with pytest.raises(UsageError, match="no target column"):
        evaluate(classifier(model, LABELS), str(rows(folder)))


# -- the command line ----------------------------------------------------------------------------------------------


def test_predict_takes_labels_and_templates(mmhub: Any, folder: Path, tmp_path: Path) -> None:
    done = mmhub("predict", "colours", "--image", folder / "b.png", "--labels", "red, blue")
    assert done.stdout.startswith("blue\t0.9")
    (tmp_path / "labels.txt").write_text("red\n\nblue\n")
    again = mmhub("predict", "colours", "--image", folder / "b.png", "--labels", f"@{tmp_path / 'labels.txt'}")
    assert again.stdout == done.stdout
    options = ("--labels", "red,blue", "--template", "{}", "--template", "{} green", "--json")
    answers = json.loads(mmhub("predict", "colours", "--data", rows(folder), *options).stdout)["predictions"]
    assert [answers[row]["label"] for row in (0, 2, 3)] == ["red", "blue", "red"]
    assert answers[0].keys() == {"label", "score", "scores"} and answers[0]["scores"].keys() == {"red", "blue"}
    averaged = 10 * (1 + math.sqrt(0.5)) / math.hypot(1 + math.sqrt(0.5), math.sqrt(0.5))
    assert answers[0]["score"] == pytest.approx(1 / (1 + math.exp(-averaged)), rel=1e-4)


def test_eval_takes_labels_and_finds_them_in_the_column(mmhub: Any, folder: Path) -> None:
    options = ("--data", rows(folder), "--target-column", "label", "--json")
    report = json.loads(mmhub("eval", "colours", "--labels", "auto", *options).stdout)
    assert report["task"] == "zero-shot-classification" and report["metrics"]["accuracy"] == 0.75
    assert "pink" not in report and report == json.loads(
        mmhub("eval", "colours", "--labels", "blue,green,red", *options).stdout
    )
    out = folder / "report"
    said = mmhub("eval", "colours", "--labels", "auto", *options[:-1], "--report", out).stdout
    assert "accuracy" in said.lower()
    mistakes = json.loads((out / "report.json").read_text())["mistakes"]
    assert [(one["row"], one["truth"], one["answer"]) for one in mistakes] == [(3, "green", "red")]


def test_mistakes_in_the_options_are_one_line(mmhub: Any, folder: Path) -> None:
    image = ("--image", folder / "b.png")
    assert "add --labels" in str(error_of(mmhub("predict", "colours", *image, "--template", "{}")))
    assert "names no label" in str(error_of(mmhub("predict", "colours", *image, "--labels", ",")))
    assert "no file" in str(error_of(mmhub("predict", "colours", *image, "--labels", "@nowhere.txt")))
    assert "no choice" in str(error_of(mmhub("predict", "colours", *image, "--labels", "red")))
    data = ("--data", rows(folder), "--labels", "auto")
    assert "--target-column" in str(error_of(mmhub("eval", "colours", *data)))
    assert "no column 'lable'" in str(error_of(mmhub("eval", "colours", *data, "--target-column", "lable")))


@pytest.mark.gpu
def test_labels_and_pictures_meet_on_a_gpu(model: Model, folder: Path) -> None:
    answers = classify(model.to("cuda"), [{"image": str(folder / "b.png")}], LABELS)
    assert answers[0]["label"] == "blue"
