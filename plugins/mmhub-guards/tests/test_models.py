"""The guards `classifier` and `abstain`: what other models say, and what the model itself is not sure of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmhub
from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.interfaces import Policy, decode_config
from mmhub.model import Model
from mmhub.spec import Change, Refusal
from mmhub_guards import classifier as module
from mmhub_guards.abstain import Abstain
from mmhub_guards.classifier import Classifier

LABELS = {"use": "classification", "config": {"labels": ["fine", "toxic"]}}


class Judge:
    """A classifier that knows a word, and notes what it is asked together."""

    modalities = ("text", "image")

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.decoder = type("Decoder", (), {"config": type("Config", (), {"labels": ("fine", "toxic")})})

    def to(self, device: Any) -> Judge:
        return self

    def without_guards(self) -> Judge:
        return self

    def predict(self, samples: list[dict[str, Any]], policy: Policy) -> list[dict[str, Any]]:
        self.asked.append(samples)
        self.policy = policy
        bad = ["bad" in str(sample) for sample in samples]
        return [{"label": "?", "score": 1.0, "scores": {"toxic": 0.9 if one else 0.1}} for one in bad]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    judge = Judge()
    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(module, "_failed", {})
    monkeypatch.setattr(mmhub, "load", lambda name: judge)
    return judge


def guard(**config: Any) -> Classifier:
    table = {"model": "gate", "labels": {"toxic": 0.8}} | config
    return Classifier(decode_config(Classifier.Config, table, "config"))


def test_what_a_classifier_takes_for_a_listed_label_is_refused(judge: Judge) -> None:
    assert guard().check({"text": "so bad"}) == Refusal("the text is taken for 'toxic'", "toxic")
    assert guard().check({"text": ["fine", "bad"]}) and not guard().check({"text": "fine"})
    assert not guard(labels={"toxic": 0.95}).check({"text": "bad"})
    assert not guard().check({"image": "bad.png"})
    assert guard(reads="image").check({"image": "bad.png", "text": "fine"})
    answers = guard(on=["output"])
    assert isinstance(answers.review({}, {"text": "bad"}), Refusal)
    good = {"text": "good"}
    assert answers.review({}, good) is good


def test_several_samples_are_judged_together_and_long_texts_in_pieces(judge: Judge) -> None:
    found = guard().check_all(
        [{"text": "bad"}, {"image": "a.png"}, {"text": ["a", "b"]}, {"text": "x" * 2500 + " bad"}]
    )
    assert [bool(one) for one in found] == [True, False, False, True]
    (asked,) = judge.asked
    assert [len(one["text"]) for one in asked] == [3, 1, 1, 1000, 1000, 904]


def test_a_picture_is_read_as_far_as_the_policy_of_the_guarded_model_goes(judge: Judge, tmp_path: Path) -> None:
    gate = {"use": "classifier", "config": {"model": "gate", "labels": {"toxic": 0.5}}}
    model, policy = trained(tmp_path, guards=[gate]), Policy(paths=False)
    model.predict({"text": "a"}, policy=policy)
    assert judge.policy is policy
    model.predict({"text": "a"})
    assert judge.policy == Policy()


def test_the_model_is_loaded_once_for_a_process(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(mmhub, "load", lambda name: loads.append(name) or judge)
    first, second = guard(), guard()
    assert loads == []
    first.check({"text": "a"}), second.check({"text": "b"})
    assert loads == ["gate"]


def test_a_model_that_cannot_judge_refuses_all(judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gate has no label 'toxc'; did you mean 'toxic'"):
        guard(labels={"toxc": 0.5}).check({"text": "a"})
    monkeypatch.undo()
    monkeypatch.setattr(module, "_loaded", {})
    with pytest.raises(NotFoundError):
        guard(model="./none").check({"text": "a"})
    model = trained(tmp_path, guards=[{"use": "classifier", "config": {"model": "./none", "labels": {"toxic": 0.5}}}])
    (found,) = model.predict([{"text": "a"}])
    assert found == {"refused": "the guard failed", "guard": "mmhub-guards/classifier"}


def test_a_model_that_cannot_be_had_is_not_asked_for_again_at_once(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[str] = []

    def load(name: str) -> Any:
        loads.append(name)
        raise MmhubError("offline")

    monkeypatch.setattr(mmhub, "load", load)
    model = trained(tmp_path, guards=[{"use": "classifier", "config": {"model": "gate", "labels": {"toxic": 0.5}}}])
    assert all("refused" in one for one in model.predict([{"text": "a"}] * 20))
    assert loads == ["gate"]
    monkeypatch.setattr(module, "_AGAIN", 0.0)
    monkeypatch.setattr(mmhub, "load", lambda name: judge)
    assert "label" in model.predict([{"text": "a"}])[0]


def test_what_a_classifier_would_cut_off_is_judged_as_well(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of("transformer", {"dim": 8, "depth": 1, "heads": 2, "max_length": 6})
    read: list[str] = []
    told = gate.predict

    def predict(samples: Any, **options: Any) -> Any:
        read.extend(sample["text"] for sample in samples)
        return told(samples, **options)

    monkeypatch.setattr(gate, "predict", predict)
    monkeypatch.setattr(mmhub, "load", lambda name: gate)
    guard(labels={"toxic": 1e-9}).check({"text": "good " * 100 + "bad"})
    assert len(read) > 20 and read[-1].endswith("bad")
    assert max(gate.processors["text"].count(text) for text in read) <= 6
    read.clear()
    guard(labels={"toxic": 1e-9}, on=["output"]).review({}, {"text": "bad " * 9})
    assert len(read) > 1 and "".join(read).startswith("bad")


def gate_of(use: str, config: dict[str, Any]) -> Model:
    return mmhub.compose(encoders={"text": {"use": use, "config": config}}, decoder=LABELS, texts=["a bad good"]).eval()


def test_a_score_that_is_no_number_refuses(judge: Judge) -> None:
    nan = float("nan")
    assert guard()._refusal({"label": "fine", "score": nan, "scores": {"toxic": nan}})
    assert isinstance(abstaining(default=0.5).review({}, {"label": "cat", "score": nan}), Refusal)


def test_an_unreadable_picture_is_the_error_of_its_row(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(samples: Any, policy: Policy) -> Any:
        error = InputError("no picture")
        error.row, error.modality = 2, "image"
        raise error

    monkeypatch.setattr(judge, "predict", predict)
    with pytest.raises(InputError) as caught:
        guard(reads="image").check_all([{"image": ["a", "b"]}, {"text": "c"}, {"image": "d"}])
    assert caught.value.row == 2
    assert guard(reads="image").media == ("image",) and guard().media == ()


def trained(folder: Path, **options: Any) -> Model:
    """A model that takes what says "bad" for toxic."""
    torch.manual_seed(0)
    text = {"text": {"use": "rnn", "config": {"dim": 8, "embedding_dim": 8}}}
    return mmhub.compose(encoders=text, decoder=LABELS, texts=["a bad good thing"], **options).eval()


def test_a_real_classifier_beside_the_file_guards_and_its_own_guards_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_loaded", {})
    trained(tmp_path).save(tmp_path / "gate")
    path = tmp_path / "guards.toml"
    path.write_text('[[guards]]\nuse = "classifier"\nconfig = { model = "./gate", labels = { toxic = 1e-6 } }\n')
    monkeypatch.setenv("MMHUB_GUARDS", str(path))  # also for the gate itself, which must not ask itself for ever
    (found,) = trained(tmp_path).predict([{"text": "a thing"}])
    assert found == {"refused": "the text is taken for 'toxic'", "guard": "mmhub-guards/classifier"}


# -- abstaining -----------------------------------------------------------------------------------------------------


def abstaining(**thresholds: float) -> Abstain:
    return Abstain(Abstain.Config(thresholds=thresholds))


def test_an_answer_below_the_threshold_of_its_label_is_withheld_with_its_scores() -> None:
    scores = {"cat": 0.7, "dog": 0.3}
    answer = {"label": "cat", "score": 0.7, "scores": scores}
    assert abstaining(default=0.6).review({}, answer) is answer
    refusal = abstaining(default=0.6, cat=0.8).review({}, answer)
    reason = "the model is not sure: its score is below 0.8"
    assert refusal == Refusal(reason, "cat", "abstained", {"scores": scores})
    assert isinstance(abstaining(default=0.71).review({}, {"label": "cat", "score": 0.7}), Refusal)
    assert abstaining(dog=0.9).review({}, answer) is answer


def test_labels_and_tags_below_theirs_are_left_out() -> None:
    answer = {"labels": ["a", "b"], "scores": {"a": 0.9, "b": 0.6, "c": 0.1}}
    found = abstaining(default=0.5, b=0.7).review({}, answer)
    assert isinstance(found, Change) and found.value["labels"] == ["a"]
    assert isinstance(abstaining(default=0.95).review({}, answer), Refusal)
    assert abstaining(default=0.5).review({}, answer) is answer
    none = {"labels": [], "scores": {"a": 0.1}}
    assert abstaining(default=0.95).review({}, none) is none
    tags = {"tags": ["B-PER", "O"], "scores": [0.6, 0.9], "entities": [{"label": "PER"}]}
    tagged = abstaining(default=0.7).review({}, tags)
    assert isinstance(tagged, Change) and tagged.value == {"tags": ["O", "O"], "scores": [0.6, 0.9]}


def test_values_and_texts_have_no_threshold() -> None:
    for answer in ({"value": 0.1}, {"text": "a", "score": -3.0, "finish": "end"}, {"embeddings": {}}):
        assert abstaining(default=0.9).review({}, answer) is answer
    assert isinstance(abstaining(default=0.9).review({}, {"text": "span", "score": 0.3, "start": 0, "end": 4}), Refusal)


def test_a_model_that_abstains_answers_so_and_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("MMHUB_GUARD_LOG", str(log))
    unsure = {"use": "abstain", "config": {"thresholds": {"default": 1.0}}}
    (found,) = trained(tmp_path, guards=[unsure]).predict([{"text": "a"}])
    assert sorted(found) == ["guard", "refused", "scores"]
    assert abs(sum(found["scores"].values()) - 1) < 1e-5
    assert '"action": "abstained"' in log.read_text()


def test_a_threshold_for_a_label_that_the_model_lacks_stops_it(tmp_path: Path) -> None:
    wrong = {"use": "abstain", "config": {"thresholds": {"toxc": 0.5}}}
    with pytest.raises(UsageError, match="label 'toxc', which the model does not have; did you mean 'toxic'"):
        trained(tmp_path, guards=[wrong]).predict([{"text": "a"}])


@pytest.mark.parametrize("thresholds", [{}, {"a": 1.5}, {"a": -0.1}])
def test_thresholds_are_probabilities(thresholds: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="thresholds"):
        decode_config(Abstain.Config, {"thresholds": thresholds}, "config")
