"""Recipes: every wrong key or value is named with what is known, before anything is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from mmhub.cli.main import main
from mmhub.config import apply_override, check_recipe, dump_recipe, override_recipe, read_recipe
from mmhub.errors import InputError, NotFoundError, UsageError
from mmhub.errors import MmhubError as Error

GOOD: dict[str, Any] = {
    "task": "classification",
    "model": {"encoders": {"image": {"use": "timm", "config": {"architecture": "x"}}}},
    "data": {"train": "train.csv", "target": "label"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    table = copy.deepcopy(GOOD)
    *steps, last = path.split(".")
    at = table
    for step in steps:
        at = at.setdefault(step, {})
    at[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("taks", "task"),
        ("train.epoch", "epochs"),
        ("train.learning_rat", "learning_rate"),
        ("data.targets", "target"),
        ("model.encodes", "encoders"),
        ("model.encoders.image.freezed", "freeze"),
        ("model.fusion.confg", "config"),
        ("card.licence", "license"),
    ],
)
def test_an_unknown_key_is_named_with_its_table_and_the_nearest_known_key(path: str, known: str) -> None:
    table, _, key = path.rpartition(".")
    with pytest.raises(UsageError) as caught:
        check_recipe(changed(path, "x"), "r.toml")
    assert f"unknown key '{key}'" in caught.value.message
    assert ".".join(part for part in ("r.toml", table) if part) in caught.value.message
    assert str(caught.value.hint).startswith(f"did you mean '{known}'")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("train.epochs", 0, "train.epochs is 0"),
        ("train.batch_size", -1, "train.batch_size is -1"),
        ("train.accumulate", 0, "train.accumulate is 0"),
        ("train.keep", 0, "train.keep is 0"),
        ("train.learning_rate", -1.0, "train.learning_rate is -1.0"),
        ("train.learning_rate", float("nan"), "train.learning_rate is nan"),
        ("train.learning_rate", float("inf"), "train.learning_rate is inf"),
        ("train.eval_every", -5, "train.eval_every is -5"),
        ("seed", -1, "seed is -1"),
        ("data.workers", -1, "data.workers is -1"),
        ("model.encoders.image.lr_multiplier", -0.1, "model.encoders.image.lr_multiplier is -0.1"),
        ("data.valid_fraction", 1.0, "data.valid_fraction is 1.0"),
        ("train.epochs", "three", "expected 'int'"),
        ("train.precision", "fp8", "train.precision"),
        ("data.on_error", "ignore", "data.on_error"),
    ],
)
def test_a_value_out_of_range_is_named(path: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(changed(path, value))
    assert says in str(caught.value)


def test_two_ways_to_make_a_validation_set_are_an_error() -> None:
    table = changed("data.valid", "v.csv")
    table["data"]["valid_fraction"] = 0.1
    with pytest.raises(UsageError, match="both given"):
        check_recipe(table)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"text": ["a", "b", "c"]}, "data.inputs.text names 3 columns; name two for a pair of texts"),
        ({"image": ["a", "b"]}, "data.inputs.image names 2 columns; name one"),
    ],
)
def test_no_column_of_an_input_is_dropped(inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe({"task": "classification", "data": {"inputs": inputs}})
    assert says in str(caught.value)


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'classification'"):
        check_recipe(changed("task", "clasification"))


def test_a_missing_task_is_named() -> None:
    with pytest.raises(UsageError, match="'task' is missing"):
        check_recipe({})


def test_overrides_are_toml_and_plain_text_where_they_are_not() -> None:
    recipe = override_recipe(
        GOOD,
        [
            "train.epochs=3",
            "train.learning_rate = 1e-4",
            "train.precision=bf16",
            'data.inputs={image = "photo"}',
            "model.encoders.image.config.architecture=resnet18",
            'data.columns=["a", "b"]',
        ],
    )
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.precision) == (3, 1e-4, "bf16")
    assert recipe.data.inputs == {"image": "photo"}
    assert recipe.data.columns == ["a", "b"]
    assert recipe.model.encoders["image"].config == {"architecture": "resnet18"}
    assert GOOD["data"] == {"train": "train.csv", "target": "label"}, "the caller's table is left alone"


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "task.x=3"])
def test_a_malformed_override_is_a_usage_error(override: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        apply_override({"task": "classification"}, override)


def test_an_override_of_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        override_recipe(GOOD, ["train.epoch=3"])


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = check_recipe(changed("model.fusion", {"use": "attention", "config": {"dim": 32}}))
    (tmp_path / "r.toml").write_text(dump_recipe(recipe))
    assert read_recipe(tmp_path / "r.toml") == recipe


def test_a_missing_recipe_file_exits_with_3_and_suggests_its_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits.toml").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(tmp_path / "digit.toml"), "--out", str(tmp_path / "run")])
    output = capsys.readouterr()
    assert caught.value.code == 3
    assert output.out == ""
    assert "error: no recipe" in output.err
    assert "did you mean 'digits.toml'?" in output.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_text("task = \n"), UsageError),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), InputError),
        (lambda path: path.mkdir(), InputError),
        (lambda path: None, NotFoundError),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, make: Any, error: type[Error]) -> None:
    make(tmp_path / "r.toml")
    with pytest.raises(error, match=r"r\.toml"):
        read_recipe(tmp_path / "r.toml")


def test_a_recipe_below_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Error, match=r"file/r\.toml"):
        read_recipe(tmp_path / "file" / "r.toml")


def test_a_value_that_is_not_among_the_choices_gets_a_suggestion_or_the_choices() -> None:
    table = {"task": "classification", "data": {"on_error": "skipp"}}
    with pytest.raises(UsageError, match=r"data.on_error: .*'skipp'; did you mean 'skip'"):
        check_recipe(table)
    with pytest.raises(UsageError, match=r"choices: .*bf16"):
        check_recipe({"task": "classification", "train": {"precision": "double"}})
