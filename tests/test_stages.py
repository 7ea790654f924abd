"""Training in stages: each trains exactly the parts it names, from the best model of the one before, and resumes."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mmhub.adapters import adapter_of
from mmhub.build import compose
from mmhub.cli.main import cli
from mmhub.config import StageRecipe, check_recipe, dump_recipe, override_recipe, read_recipe, stage_recipe
from mmhub.engine import features, report, train
from mmhub.engine.ranks import Ranks
from mmhub.engine.report import Reporter
from mmhub.engine.setup import Setup
from mmhub.engine.stages import Stage, same_begun
from mmhub.engine.state import Checkpoints
from mmhub.errors import Interrupted, MmhubError, NotFoundError, UsageError
from mmhub.hub import load
from mmhub.model import Model
from tests.conftest import png, recipe
from tests.test_distributed import curve, on_ranks, texts

ALL = ["image", "audio", "fusion", "decoder"]
STEPS = (3, 4)  # of the two stages of `head_first`
FOLDERS = ("1-head", "2-text+decoder")


def text_table(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(f"{json.dumps({'text': text, 'label': label})}\n" for text, label in rows))
    return path.name


def text_recipe(folder: Path, *parts: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A recipe beside its data, `a.jsonl`."""
    text_table(folder / "a.jsonl", *((f"{word} {colour}", word) for word in "xyz" for colour in "abcd"))
    config = {"dim": 8, "dropout": 0.3, "word_dropout": 0.2}
    return {
        "task": "classification",
        "model": {"encoders": {"text": {"use": "lstm", "config": config}}, "tokenizer": {"kind": "word"}},
        "data": {"train": str(folder / "a.jsonl"), "valid": str(folder / "a.jsonl"), "target": "label", "workers": 0},
        "train": {"epochs": 1, "batch_size": 4, "log_every": 1, "stages": [dict(part) for part in parts], **options},
    }


def head_first(folder: Path, **options: Any) -> dict[str, Any]:
    """What answers first, on features that are kept, then all."""
    head = {"name": "head", "parts": ["decoder"]}
    whole = {"parts": ["text", "decoder"], "max_steps": STEPS[1], "epochs": 2, "learning_rate": 1e-2, "batch_size": 5}
    return text_recipe(folder, head, whole, eval_every=2, **options)


def state(folder: Path) -> dict[str, torch.Tensor]:
    tensors: Mapping[str, torch.Tensor] = load(folder).state_dict()
    return dict(tensors)


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def parts_of(names: set[str]) -> set[str]:
    return {name.removeprefix("encoders.").partition(".")[0] for name in names}


def lines(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "speed")} for line in found]


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@dataclass
class Watched:
    """A run in two stages that was never stopped, by the command, and what was seen of it."""

    out: Path
    stdout: str = ""
    stderr: str = ""
    tracked: list[tuple[str, int]] = field(default_factory=list)  # folder and steps of each run that trackers see
    features: list[list[str]] = field(default_factory=list)  # whose were kept, for each set of rows


@pytest.fixture(scope="module")
def watched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("whole")
    seen, real = Watched(folder / "run"), features.open_features

    def open_features(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        seen.features.append(sorted(found))
        return found

    def hook_items(name: str, run: Any) -> list[Any]:
        seen.tracked.append((run.folder.name, run.total_steps))
        return []

    (folder / "r.toml").write_text(dump_recipe(check_recipe(head_first(data))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmhub.engine.setup.open_features", open_features)
        patch.setattr(report, "hook_items", hook_items)
        done = CliRunner().invoke(cli, ["train", str(folder / "r.toml"), "--out", str(seen.out), "--json"])
    assert done.exit_code == 0, done.output
    seen.stdout, seen.stderr = done.stdout, done.stderr
    return seen


@pytest.fixture(scope="module")
def whole(watched: Watched) -> Path:
    return watched.out


# -- what learns ------------------------------------------------------------------------------------------------


STILL = {"name": "still", "parts": ["decoder"], "learning_rate": 0.0}  # leaves the model as it is built


def learned(table: dict[str, Any], out: Path) -> list[set[str]]:
    """Train in stages, the first of which is `STILL`; return the parts that each of the others has changed."""
    del table["data"]["valid"]
    train(table, out)
    found = [state(folder / "model") for folder in [*sorted((out / "stages").glob("*"))[:-1], out]]
    return [parts_of(changed(*pair)) for pair in pairwise(found)]


def test_each_stage_changes_the_parts_it_names_and_no_other(tmp_path: Path) -> None:
    table = text_recipe(tmp_path, STILL, {"parts": ["decoder"]}, {"parts": ["text"]}, max_steps=1)
    assert learned(table, tmp_path / "run") == [{"decoder"}, {"text"}]


@pytest.mark.slow
def test_each_stage_changes_the_parts_it_names_of_several_encoders(tables: Path, tmp_path: Path) -> None:
    parts = [["decoder", "fusion"], ["audio"], ALL]
    table = recipe(tables, max_steps=2, cache_features=False)
    table["train"]["stages"] = [STILL, *({"parts": names} for names in parts)]
    assert learned(table, tmp_path / "run") == [set(names) for names in parts]


def test_a_part_that_stands_still_has_no_dropout_and_no_gradient_and_passes_one_on() -> None:
    model = compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"], "dropout": 0.5}},
        texts=["a good thing", "a bad one"],
    )
    model.freeze("decoder")
    model.train()
    assert not any(module.training for module in model.decoder.modules())
    assert model.encoders["text"].training and model.fusion.training and model.training
    batch = model.collate([{"text": "a good thing"}])
    batch.targets = torch.tensor([1])
    loss = model(batch).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert any(parameter.grad is not None for parameter in model.encoders.parameters())


def test_a_recurrent_decoder_that_stands_still_keeps_its_cells_able_to_pass_a_gradient_on() -> None:
    table = {"use": "lstm-lm", "config": {"embedding_dim": 8, "dim": 8, "depth": 1, "dropout": 0.5}}
    model = compose("language-modelling", decoder=table, texts=["a b"])
    model.freeze("decoder")
    assert not any(module.training for module in model.decoder.modules())
    model.train()
    cells = {type(module).__name__: module.training for module in model.decoder.modules()}
    assert cells["LSTM"] and not any(training for name, training in cells.items() if name != "LSTM")


def test_features_are_kept_only_of_an_encoder_that_stands_still(watched: Watched) -> None:
    assert watched.features == [["text"], ["text"]], "of the training and the validation rows of the first stage"


# -- the run folder ---------------------------------------------------------------------------------------------


def test_the_run_folder_tells_of_all_stages(data: Path, whole: Path) -> None:
    found = lines(whole / "metrics.jsonl")
    first, second = (lines(whole / "stages" / name / "metrics.jsonl") for name in FOLDERS)
    assert [line["stage"] for line in found] == [1] * len(first) + [2] * len(second)
    assert [line["step"] for line in found] == [
        *(line["step"] for line in first), *(STEPS[0] + line["step"] for line in second)
    ]  # fmt: skip
    assert max(line["step"] for line in found) == sum(STEPS)
    facts = json.loads((whole / "model" / "provenance.json").read_text())
    told = [(one["name"], one["parts"], one["steps"]) for one in facts["stages"]]
    assert told == [("head", ["decoder"], STEPS[0]), ("text+decoder", ["text", "decoder"], STEPS[1])]
    assert facts["steps"] == sum(STEPS) and facts["seconds"] >= facts["stages"][0]["seconds"]
    assert [len(one["data"]["train"]["files"][0]["sha256"]) for one in facts["stages"]] == [64, 64]
    card = (whole / "model" / "README.md").read_text()
    assert card.splitlines().count("# run") == 1, "it is called as the run, not as its last stage"
    assert f"Stage 1, head: {STEPS[0]} steps on decoder, over " in card
    assert (whole / "report.html").exists() and (whole / "model" / "eval" / "classification.json").exists()
    assert read_recipe(whole / "recipe.toml").train.stages == check_recipe(head_first(data)).train.stages


def test_what_is_kept_of_a_stage_is_its_model_and_of_the_last_one_also_its_checkpoints(whole: Path) -> None:
    first, second = (whole / "stages" / name for name in FOLDERS)
    assert not (first / "checkpoints").exists() and (first / "model" / "config.json").exists()
    assert (second / "checkpoints" / "last").exists() and not (second / "model").exists()
    assert not (first / "model" / "eval").exists()


def test_trackers_see_every_stage_as_a_run_of_its_own(watched: Watched) -> None:
    assert watched.tracked == list(zip(FOLDERS, STEPS, strict=True))


def test_the_command_counts_all_stages_and_says_which_one_it_is_at(watched: Watched) -> None:
    found = json.loads(watched.stdout)
    assert found["out"] == str(watched.out) and found["model"] == str(watched.out / "model")
    assert found["steps"] == sum(STEPS) and "accuracy" in found["metrics"]
    told = [line.partition(":")[0] for line in watched.stderr.splitlines() if line.startswith("stage")]
    assert told == ["stage 1/2 head", "stage 2/2 text+decoder"]


# -- what a stage changes ---------------------------------------------------------------------------------------


def test_a_stage_takes_what_it_names_from_itself_and_the_rest_from_train(data: Path) -> None:
    found = check_recipe(head_first(data, learning_rate=0.5, weight_decay=0.25))
    one, two = (stage_recipe(found, number).train for number in (1, 2))
    assert (one.learning_rate, one.batch_size, one.epochs, one.max_steps) == (0.5, 4, 1, 0)
    assert (two.learning_rate, two.batch_size, two.epochs, two.max_steps) == (1e-2, 5, 2, STEPS[1])
    assert one.weight_decay == two.weight_decay == 0.25


def test_a_stage_may_have_data_of_its_own_whose_words_and_labels_are_known_from_the_start(tmp_path: Path) -> None:
    other = text_table(tmp_path / "b.jsonl", ("w blue", "w"), ("x", "x"))
    table = text_recipe(tmp_path, {"parts": ["text", "decoder"], "data": {"train": other}}, {"parts": ["decoder"]})
    table["data"] = {"train": "a.jsonl", "target": "label"}
    (tmp_path / "r.toml").write_text(dump_recipe(check_recipe(table)))
    result = train(tmp_path / "r.toml", tmp_path / "run")
    model: Any = result.load()
    assert set(model.decoder.config.labels) == {"w", "x", "y", "z"}
    assert {"blue", "a"} <= set(model.processors["text"].tokenizer.get_vocab())
    told = json.loads((result.model / "provenance.json").read_text())["stages"]
    assert [stage["data"]["train"]["files"][0]["name"] for stage in told] == ["b.jsonl", "a.jsonl"]
    stored = read_recipe(result.out / "recipe.toml").train.stages[0].data
    assert stored is not None and stored.train == str(tmp_path / "b.jsonl")


def test_data_of_a_later_stage_that_is_missing_is_told_before_the_first(tmp_path: Path) -> None:
    table = text_recipe(tmp_path, {"parts": ["decoder"]}, {"parts": ["text"], "data": {"valid": "none.jsonl"}})
    with pytest.raises(NotFoundError, match=r"none\.jsonl"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"parts": ["fusoin"]}, r"train\.stages 2: this model has no part 'fusoin'; did you mean 'fusion'"),
        ({"parts": []}, r"train\.stages 2 names no parts; say what learns in it"),
        ({}, r"train\.stages 2 names no parts"),
        ({"parts": ["fusion"], "epoch": 1}, r"train\.stages 2: unknown key 'epoch'; did you mean 'epochs'"),
        ({"parts": ["fusion"], "device": "cpu"}, r"train\.stages 2: unknown key 'device'"),
        ({"parts": ["fusion"], "epochs": 0}, r"train\.stages 2: train\.epochs is 0; it must be at least 1"),
        ({"parts": ["fusion"], "schedule": "cosin"}, r"train\.stages 2\.schedule: .* did you mean 'cosine'"),
        ({"parts": ["fusion"], "data": {"tain": "x"}}, r"train\.stages 2\.data: unknown key 'tain'; did you mean"),
        ({"parts": ["audio"]}, r"2 trains 'audio', and model\.encoders\.audio has freeze = true; remove it"),
        ({"parts": ["fusion"], "name": "../up"}, r"train\.stages 2: '\.\./up' cannot name a folder"),
    ],
)
def test_a_mistake_in_a_stage_is_found_in_the_recipe(tmp_path: Path, stage: dict[str, Any], message: str) -> None:
    table = recipe(tmp_path)
    table["train"]["stages"] = [{"parts": ["decoder"]}, stage]
    table["model"]["encoders"]["audio"]["freeze"] = True
    with pytest.raises(UsageError) as caught:
        check_recipe(table)
    assert_says(caught.value, message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages.3.max_steps=1", "'3' is none of the 2 there are; count from 1"),
        ("train.stages.1=1", "is a list, and not a table"),
        ("train.epochs.x=1", "'epochs' is a value, not a table"),
    ],
)
def test_an_override_may_name_a_stage_by_its_number(tmp_path: Path, override: str, message: str) -> None:
    table = head_first(tmp_path)
    found = override_recipe(table, ["train.stages.2.max_steps=9", "train.stages.1.name=first"])
    assert [(stage.name, stage.max_steps) for stage in found.train.stages] == [("first", None), ("", 9)]
    with pytest.raises(UsageError) as caught:
        override_recipe(table, [override])
    assert_says(caught.value, message)


def assert_says(error: MmhubError, message: str) -> None:
    assert re.search(message, f"{error.message}; {error.hint}"), f"{error.message}; {error.hint}"


def test_what_a_later_stage_cannot_do_is_told_before_the_first(tmp_path: Path) -> None:
    for parts, message in (
        (["image"], r"train\.stages 2: this model has no part 'image'; they are text, fusion, decoder"),
        (["fusion"], r"train\.stages 2 trains nothing: fusion has nothing to learn"),  # of a single stream
    ):
        table: Any = {
            "task": "classification",
            "model": {"base": str(saved(tmp_path))},
            "data": {"train": str(tmp_path / text_table(tmp_path / "a.jsonl", ("one", "x"))), "target": "label"},
            "train": {"stages": [{"parts": ["decoder"]}, {"parts": parts}]},
        }
        with pytest.raises(UsageError) as caught:
            train(table, tmp_path / "run")
        assert_says(caught.value, message)
        assert not (tmp_path / "run").exists()


def test_a_batch_size_that_several_processes_cannot_have_is_told_before_the_first_stage(tmp_path: Path) -> None:
    whole = check_recipe(text_recipe(tmp_path, {"parts": ["decoder"]}, {"parts": ["text"], "batch_size": "auto"}))
    recipes = [stage_recipe(whole, number) for number in (1, 2)]
    stage = Stage(1, whole, recipes, tmp_path / "run")
    with pytest.raises(UsageError, match="is for one process"):
        Setup(stage.recipe, stage.folder, None, Ranks(world=2), resume=False, quiet=True, stage=stage)


def saved(folder: Path) -> Path:
    config = {"labels": ["x", "y"]}
    part = {"use": "lstm", "config": {"dim": 8}}
    model = compose(encoders={"text": part}, decoder={"use": "classification", "config": config}, texts=["one two"])
    return model.save(folder / "base")


# -- stopping and going on --------------------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send Ctrl-C in the middle of an optimizer step, counted over all stages."""
    count, real = 0, Reporter.step

    def on_step(self: Reporter, loss: float) -> None:
        nonlocal count
        count += 1
        real(self, loss)
        if count == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Reporter, "step", on_step)


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (2, "at step 2 of stage 1/2 head"),
        pytest.param(3, "stage 1/2 head", marks=pytest.mark.slow),  # its last step
        pytest.param(4, "at step 1 of stage 2/2", marks=pytest.mark.slow),
        pytest.param(7, "at step 4 of stage 2/2", marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(
    data: Path, whole: Path, tmp_path: Path, step: int, where: str
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match=where) as caught:
            train(head_first(data), run)
    assert caught.value.exit_code == 130
    assert len(lines(run / "metrics.jsonl")) > 0, "what there is of it is told"
    assert train(head_first(data), run, resume=True).steps == sum(STEPS)
    assert weights(run) == weights(whole)
    assert lines(run / "metrics.jsonl") == lines(whole / "metrics.jsonl")


def crash(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Stage, "finish"),  # the stage's model is there, and it does not know that it is done
        (Stage, "tidy"),  # it does, and its checkpoints are still there
        (gc, "collect"),  # nothing of the next stage is there
    ],
)
def test_a_run_killed_between_two_stages_ends_in_the_same_bytes(
    data: Path, whole: Path, tmp_path: Path, owner: Any, name: str
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(KeyboardInterrupt):
            train(head_first(data), run)
    assert not (run / "stages" / FOLDERS[1]).exists()
    count = steps_of(lambda: train(head_first(data), run, resume=True))
    assert count == STEPS[1], "the first stage is not trained again"
    assert weights(run) == weights(whole)
    assert not (run / "stages" / FOLDERS[0] / "checkpoints").exists()


def steps_of(work: Callable[[], Any]) -> int:
    """How many optimizer steps are taken in this process meanwhile."""
    taken, real = 0, Reporter.step

    def step(self: Reporter, loss: float) -> None:
        nonlocal taken
        taken += 1
        real(self, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        work()
    return taken


def test_a_signal_during_the_end_of_a_stage_is_heeded_before_the_next(data: Path, whole: Path, tmp_path: Path) -> None:
    real = Checkpoints.wait

    def wait(self: Checkpoints) -> None:
        real(self)
        if self.saved == STEPS[0]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "wait", wait)
        with pytest.raises(Interrupted, match="interrupted after stage 1/2 head; saved"):
            train(head_first(data), tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / FOLDERS[1]).exists()
    other = head_first(data)
    other["train"]["stages"] += [{"parts": ["text"], "max_steps": 1}]
    other["train"]["stages"][1] = {"parts": ["fusion"]}
    with pytest.raises(UsageError, match=r"train\.stages 2 trains nothing: fusion has nothing to learn"):
        train(other, tmp_path / "run", resume=True)
    other["train"]["stages"][1] = {"parts": ["text"], "max_steps": 1}
    result = train(other, tmp_path / "run", resume=True)  # what has not begun may be another, and more
    assert result.steps == STEPS[0] + 2 and len(read_recipe(result.out / "recipe.toml").train.stages) == 3


def test_only_stages_that_have_not_begun_may_differ(tmp_path: Path) -> None:
    one, two, three = (StageRecipe(parts=[part]) for part in "abc")
    assert not same_begun([one], [two], tmp_path)
    (tmp_path / "stages" / "1-a").mkdir(parents=True)
    assert same_begun([one, two], [one, three, two], tmp_path) and not same_begun([one, two], [three, two], tmp_path)
    assert not same_begun([one, two], [one], tmp_path) and not same_begun([one], [one, two], tmp_path)


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    before = weights(whole)
    assert steps_of(lambda: train(head_first(data), whole, resume=True)) == 0
    assert weights(whole) == before
    other = head_first(data)
    other["train"]["stages"][0]["parts"] = ["text"]
    with pytest.raises(UsageError, match=r"\[train\] differs from the recipe"):
        train(other, whole, resume=True)
    with pytest.raises(UsageError, match="exists"):
        train(head_first(data), whole)


# -- low-rank adapters in a conversation with pictures ------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe on questions about pictures, and a small language model that transformers wrote."""
    folder = tmp_path_factory.mktemp("talks")
    rows = []
    for number in range(8):
        (folder / f"{number % 4}.png").write_bytes(png(number % 4))
        picture = {"type": "image", "image": f"{number % 4}.png"}
        question = {"role": "user", "content": [{"type": "text", "text": "which"}, *([picture] if number else [])]}
        rows.append({"messages": [question, {"role": "assistant", "content": f"c {number % 4}"}]})
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    part = {"use": "transformers-lm", "config": config}
    base: Any = compose("language-modelling", decoder=part, tokenizer={"kind": "byte"}).decoder
    base.model.save_pretrained(folder / "gpt2")
    for name, content in base.processor.files().items():
        (folder / "gpt2" / name).write_bytes(content)
    table = {
        "task": "chat",
        "model": {
            "encoders": {"image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}},
            "decoder": {"use": "transformers-lm", "init": "./gpt2", "lora": {"rank": 2}},
        },
        "data": {"train": "train.jsonl", "workers": 0},
        "train": {
            "learning_rate": 0.1,
            "batch_size": 4,
            "stages": [
                {"name": "still", "parts": ["fusion"], "max_steps": 1, "learning_rate": 0.0},
                {"name": "projector", "parts": ["fusion"], "epochs": 1},
                {"name": "lora", "parts": ["fusion", "decoder"], "epochs": 1},
            ],
        },
    }
    (folder / "r.toml").write_text(dump_recipe(check_recipe(table)))
    return folder


def answers(model: Model, folder: Path) -> torch.Tensor:
    """Logits of a conversation with a picture."""
    content = [{"type": "text", "text": "which"}, {"type": "image", "image": str(folder / "1.png")}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}]
    with torch.no_grad():
        output = model.eval()(model.collate([{"messages": messages}]))
    assert output.logits is not None
    return output.logits


@pytest.mark.slow
def test_a_projector_learns_first_and_adapters_later_and_both_are_saved_loaded_and_merged(
    talks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    run = train(talks / "r.toml", tmp_path / "run").out
    folders = [run / "stages" / "1-still", run / "stages" / "2-projector", run]
    first, projected, last = [state(folder / "model") for folder in folders]
    assert parts_of(changed(first, projected)) == {"fusion"}
    found = changed(projected, last)
    assert parts_of(found) == {"fusion", "decoder"}
    adapters = {name for name in last if "lora_" in name}
    assert {name for name in found if name.startswith("decoder.")} == adapters and len(adapters) == 2
    parents = [json.loads((folder / "model" / "provenance.json").read_text())["parents"] for folder in folders]
    assert parents[0][0]["part"] == "decoder" and parents[0][0]["sha256"] and parents == parents[:1] * 3

    model = load(run / "model")
    record = adapter_of(model.decoder)
    assert record is not None and record.base is not None and record.rank == 2
    assert (run / "model" / "adapter_model.safetensors").exists()
    want = answers(model, talks)
    assert not torch.allclose(want, answers(load(folders[1] / "model"), talks), atol=1e-3)
    done = CliRunner().invoke(cli, ["models", "merge", str(run / "model"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged = load(tmp_path / "merged")
    assert adapter_of(merged.decoder) is None
    assert torch.allclose(answers(merged, talks), want, atol=1e-4)


# -- several processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_the_stages_that_one_does(tmp_path: Path) -> None:
    table = texts(tmp_path)
    table["train"]["stages"] = [{"parts": ["decoder"], "max_steps": 4}, {"parts": ["text", "decoder"], "max_steps": 4}]
    one = train(table, tmp_path / "one")
    stop: dict[str, Any] = {"recipe": table, "out": str(tmp_path / "stopped")}
    cases = [stop | {"out": str(tmp_path / "two")}, stop | {"stop_at": 5, "stop_rank": 1}, stop | {"resume": True}]
    for whole, stopped, resumed in on_ranks(2, cases, tmp_path):
        assert whole["steps"] == resumed["steps"] == one.steps == 8
        assert stopped["exit_code"] == 143 and "at step 1 of stage 2/2" in stopped["error"]
    assert curve(tmp_path / "two") == pytest.approx(curve(one.out), rel=1e-4)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "two")
    assert lines(tmp_path / "stopped" / "metrics.jsonl") == lines(tmp_path / "two" / "metrics.jsonl")
