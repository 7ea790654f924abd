"""Conversations with pictures and sounds train: any table, any length, cached features, several processes, stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmhub.batch import Encoded, Features
from mmhub.build import compose
from mmhub.checkpoint import DataRecord
from mmhub.config import check_recipe, dump_recipe, read_recipe
from mmhub.data.lengths import measure_talks
from mmhub.data.loader import Collate, Loaded
from mmhub.data.sources import open_rows
from mmhub.data.talks import TalkReader
from mmhub.engine import train
from mmhub.engine.data import TrainingData, with_base_columns
from mmhub.engine.ranks import Ranks
from mmhub.engine.setup import Setup
from mmhub.errors import InputError, Interrupted, UsageError
from mmhub.evaluation import evaluate
from mmhub.interfaces import Policy, find_task
from mmhub.model import Model
from tests.talk_tables import AUDIO, IMAGE, WORDS, chat_recipe, conversation, said, write_talks
from tests.test_distributed import curve, on_ranks
from tests.test_resume import stop_at, weights


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, 16 conversations of four kinds."""
    folder = tmp_path_factory.mktemp("talks")
    write_talks(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def model() -> Model:
    """An untrained model that sees and hears, and knows the words of the conversations."""
    spoken = " ".join([*WORDS, "say which picture and sound User: Assistant:"])
    return compose(
        "chat",
        encoders={"image": IMAGE, "audio": AUDIO},
        decoder={"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}},
        tokenizer={"kind": "word", "min_frequency": 1},
        texts=[spoken],
    )


def reader_of(model: Model, **options: Any) -> TalkReader:
    inputs = dict.fromkeys(model.modalities, "messages")
    return TalkReader.of(model, inputs, "", Policy(), **options)


def loaded(model: Model, rows: Any, numbers: list[int], reader: TalkReader, **options: Any) -> Loaded:
    """What a batch of these rows is."""
    collate = Collate(
        rows=rows,
        processors=model.processors,
        inputs=reader.inputs,
        decoder=model.decoder,
        talks=reader,
        **options,
    )
    return collate([(number, rows[number]) for number in numbers])


def table_of(*talks: Any) -> Any:
    return open_rows([{"messages": talk} for talk in talks])


# -- lengths and what is too long -------------------------------------------------------------------------------------


def test_lengths_count_the_tokens_that_the_language_model_reads(talks: Path, model: Model) -> None:
    rows, reader = open_rows(str(talks / "train.jsonl")), reader_of(model)
    lengths = measure_talks(rows, reader)
    for row in range(4):
        batch = loaded(model, rows, [row], reader).batch
        assert batch is not None
        fused = model.fusion(model.encode(batch.items, 1), plan=batch.plan)["fused"]
        assert sum(int(found[row]) for found in lengths.tokens.values()) == int(fused.lengths[0])
    assert lengths.tokens["image"].tolist()[:4] == [0, *[int(lengths.tokens["image"][1]) * n for n in (1, 0, 2)]]
    assert lengths.varying[0] in ("image", "audio", "text")


def test_what_was_read_before_makes_the_same_batch(talks: Path, model: Model) -> None:
    rows, reader = open_rows(str(talks / "train.jsonl")), reader_of(model, limit=30, newest=True)
    lengths = measure_talks(rows, reader)
    assert lengths.talks is not None and lengths.talks.known.all() and lengths.talks.shortened
    fresh, kept = (
        loaded(model, rows, [*range(16)], reader, scripts=scripts).batch for scripts in (None, lengths.talks)
    )
    assert fresh is not None and kept is not None and fresh.plan is not None and kept.plan is not None
    assert torch.equal(fresh.items["text"].data, kept.items["text"].data)
    assert fresh.items["text"].marks is not None and kept.items["text"].marks is not None
    assert torch.equal(fresh.items["text"].marks, kept.items["text"].marks)
    for name in ("image", "audio"):
        assert torch.equal(fresh.plan.places[name], kept.plan.places[name])
        assert torch.equal(fresh.items[name].data, kept.items[name].data)


@pytest.mark.parametrize(("newest", "stays"), [(True, "which picture"), (False, "and which sound")])
def test_a_long_conversation_loses_whole_turns(talks: Path, model: Model, newest: bool, stays: str) -> None:
    rows = open_rows(str(talks / "train.jsonl"))
    whole = int(sum(found[3] for found in measure_talks(rows, reader_of(model)).tokens.values()))
    talk = reader_of(model, limit=whole - 1, newest=newest).read(rows[3], talks)
    assert talk.asks == stays and talk.messages[-1]["role"] == "assistant" and talk.left_out == 2
    assert talk.items == ({"image": [0, 1], "audio": []} if newest else {"image": [], "audio": [0]})
    assert reader_of(model, limit=whole, newest=newest).read(rows[3], talks).left_out == 0


def test_a_single_turn_that_is_too_long_names_its_row(talks: Path, model: Model) -> None:
    rows, reader = open_rows(str(talks / "train.jsonl")), reader_of(model, limit=8, newest=True)
    found = loaded(model, rows, [3], reader)
    assert "row 4, column 'messages': the first turn of the conversation has" in str(found.error)
    assert "media included, of 8 that are read at once" in str(found.error)
    assert loaded(model, rows, [3], reader, skip=True).skipped == [str(found.error)]
    measured = measure_talks(rows, reader).talks
    assert measured is not None and 3 in measured.too_long and not measured.known[3]


def test_long_rows_are_said_once_and_stop_a_run_that_does_not_skip(talks: Path, tmp_path: Path, capsys: Any) -> None:
    run = train(chat_recipe(talks, {"block_size": 12, "max_steps": 1}, on_error="skip"), tmp_path / "a", quiet=False)
    assert run.steps == 1
    told = capsys.readouterr().err
    assert told.count("of 16 conversations are longer than 12 tokens: the last turns of ") == 1
    assert "with a single turn are skipped" in told
    with pytest.raises(InputError, match=r"train.jsonl row \d+, column 'messages': the .*read at once") as caught:
        train(chat_recipe(talks, {"block_size": 12}), tmp_path / "b")
    assert caught.value.shared, "all processes find it, and one says it"  # type: ignore[attr-defined]


def test_turns_of_a_stream_that_are_left_out_are_said_when_they_first_are_and_counted(
    talks: Path, tmp_path: Path, capsys: Any
) -> None:
    table = chat_recipe(talks, {"block_size": 26, "max_steps": 8, "epochs": 2}, stream=True)
    train(table, tmp_path / "run", quiet=False)  # twice over 16 rows, every fourth of which has two turns
    told = capsys.readouterr().err
    assert told.count("some conversations are longer than what is read at once: their last turns are left out") == 1
    assert "8 times the last turns of a conversation were left out" in told


# -- what tables hold -------------------------------------------------------------------------------------------------


def test_all_ways_to_write_a_conversation_down_are_read_alike(talks: Path, model: Model) -> None:
    sound = (talks / "media/0.flac").read_bytes()
    talk = [said("user", "which sound", "media/0.flac"), said("assistant", "zero")]
    nulls = {"type": "audio", "text": None, "image": None, "audio": {"bytes": sound, "path": "x.flac"}}
    text = {"type": "text", "text": "which sound", "image": None, "audio": {"bytes": None, "path": None}}
    gone = {"type": "image", "text": None, "image": {"bytes": None, "path": None}, "audio": None}
    struct = [{"role": "user", "content": [text, nulls, gone]}, {"role": "assistant", "content": "zero"}]
    arrays = np.array([{"role": "user", "content": np.array([text, nulls], object)}, struct[1]], object)
    address = {"type": "input_audio", "input_audio": {"data": _base64(sound), "format": "flac"}}
    openai = [{"role": "user", "content": [text, address]}, struct[1]]
    placed = json.loads(json.dumps(talk).replace("media/", f"{talks}/media/"))
    reader = reader_of(model)
    batches = [loaded(model, table_of(one), [0], reader).batch for one in (placed, struct, arrays, openai)]
    for batch in batches:
        assert batch is not None and len(batch.items["image"]) == 0 and len(batch.items["audio"]) == 1
        assert torch.equal(batch.items["text"].data, batches[0].items["text"].data)  # type: ignore[union-attr]
        assert torch.equal(batch.items["audio"].data, batches[0].items["audio"].data)  # type: ignore[union-attr]


def _base64(content: bytes) -> str:
    import base64

    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "a conversation is a list of messages"),
        ([], "a conversation is a list of messages, got none"),
        ([said("user", "say one")], "does not end with an answer"),
        ([said("user", "nofile.png"), said("assistant", "one")], "no file 'nofile.png'"),
    ],
)
def test_rows_that_are_no_conversation_are_named_or_skipped(model: Model, value: Any, problem: str) -> None:
    rows, reader = table_of(conversation(0), value), reader_of(model)
    error = loaded(model, rows, [0, 1], reader).error
    assert error is not None and "row 2, column 'messages'" in str(error) and problem in str(error)
    found = loaded(model, rows, [0, 1], reader, skip=True)
    assert found.batch is not None and found.batch.index == [0] and problem in found.skipped[0]
    missing = measure_talks(rows, reader).tokens["text"][1] == 0
    assert missing or "nofile" in problem, "pictures of a fixed size are not looked at"


def test_parquet_of_structs_with_nulls_and_shards_of_a_stream_train(talks: Path, tmp_path: Path) -> None:
    def cells(number: int) -> dict[str, Any]:
        talk = conversation(number)
        for part in (part for message in talk for part in message["content"]):
            for kind in ("image", "audio"):
                path = part.get(kind)
                part[kind] = {"bytes": (talks / path).read_bytes(), "path": path} if path else None
        return {"messages": talk}

    for shard in range(2):
        rows = pa.Table.from_pylist([cells(8 * shard + number) for number in range(8)])
        pq.write_table(rows, tmp_path / f"shard-{shard}.parquet")
    table = chat_recipe(talks, {"max_steps": 2, "batch_tokens": 200})
    table["data"] = {"train": str(tmp_path / "shard-*.parquet"), "stream": True}
    assert len(curve(train(table, tmp_path / "stream").out)) == 2
    table["data"] = {"train": str(tmp_path / "shard-0.parquet"), "valid_fraction": 0.25}
    assert train(table, tmp_path / "rows").metrics["loss"] > 0


def test_a_chat_model_goes_on_learning_from_another_column(talks: Path, tmp_path: Path) -> None:
    base = train(chat_recipe(talks, {"max_steps": 1}), tmp_path / "base")
    write_talks(tmp_path / "other.jsonl", 8, "talk")
    table = {
        "task": "chat",
        "model": {"base": str(base.model)},
        "data": {"train": str(tmp_path / "other.jsonl"), "inputs": {"messages": "talk"}},
        "train": {"max_steps": 1, "batch_size": 4, "stages": [{"parts": ["fusion"]}, {"parts": ["decoder"]}]},
    }
    run = train(table, tmp_path / "run")
    assert dict(run.load().columns.inputs) == {"image": "talk", "audio": "talk", "text": "talk"}
    stored = read_recipe(run.out / "recipe.toml")
    assert with_base_columns(stored, tmp_path / "again", None, resume=False) == stored
    shutil.rmtree(run.out / "stages/2-decoder")
    shutil.rmtree(base.out)  # a stage that has not begun needs it no more, only the model of the one before
    assert train(table, tmp_path / "run", resume=True).steps == 2, "the recipe is still the same"


def test_rows_of_a_later_stage_that_are_no_conversations_are_told_before_the_first(talks: Path, tmp_path: Path) -> None:
    (tmp_path / "later.jsonl").write_text(json.dumps({"messages": [said("user", "say one")]}) + "\n")
    later = {"parts": ["decoder"], "data": {"train": str(tmp_path / "later.jsonl")}}
    table = chat_recipe(talks, {"stages": [{"parts": ["fusion"]}, later]})
    with pytest.raises(InputError, match=r"later\.jsonl row 1, column 'messages': the conversation does not end with"):
        train(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("named", "column"), [({}, "messages"), ({"text": "talk"}, "talk"), ({"messages": "a"}, "a")])
def test_media_that_stand_beside_conversations_are_refused(
    talks: Path, model: Model, named: dict[str, str], column: str
) -> None:
    recipe = check_recipe(chat_recipe(talks, inputs=named | {"image": "picture"}))
    problem = f"image is in column 'picture', and conversations, with the media in them, are in column '{column}'"
    with pytest.raises(UsageError, match=problem):
        TrainingData(recipe, find_task("chat"), None)
    recipe.model.base = "./base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmhub.engine.data._of_base", lambda name: (DataRecord(), ["image", "audio"]))
        with pytest.raises(UsageError, match=problem):
            with_base_columns(recipe, talks / "none", None, resume=False)
    rows = open_rows([{"picture": b"", column: conversation(0)}])
    with pytest.raises(UsageError, match=problem):
        evaluate(model, rows, inputs=(named or {"text": column}) | {"image": "picture"})


# -- results that must not differ -------------------------------------------------------------------------------------


def frozen(table: dict[str, Any]) -> dict[str, Any]:
    for part in table["model"]["encoders"].values():
        part["freeze"] = True
    table["model"]["encoders"]["image"]["config"]["augment"] = "none"
    return table


def test_features_that_are_kept_change_nothing_even_where_turns_are_left_out(
    talks: Path, tmp_path: Path, capsys: Any
) -> None:
    curves = []
    for name, kept in (("kept", True), ("fresh", False)):
        table = frozen(chat_recipe(talks, {"cache_features": kept, "max_steps": 3}, valid=str(talks / "train.jsonl")))
        table["model"]["decoder"]["config"]["max_length"] = 26
        run = train(table, tmp_path / name, quiet=False)
        curves.append([*curve(run.out), run.metrics["loss"]])
        told = capsys.readouterr().err
        assert "longer than 26 tokens: the last turns" in told and "longer than 26 tokens: the first turns" in told
        assert ("image: the features of its frozen encoder take" in told) == kept
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = chat_recipe(talks, {"max_steps": 6, "accumulate": 2, "batch_size": 2, "ema": 0.9})
    table["model"]["decoder"]["config"]["dropout"] = 0.1
    whole = train(table, tmp_path / "whole").out
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole) and curve(tmp_path / "run") == curve(whole)


@pytest.mark.slow
def test_pieces_of_an_auto_batch_add_up(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = chat_recipe(talks, {"max_steps": 2, "batch_size": "auto"})
    whole = curve(train(table, tmp_path / "whole").out)
    from mmhub.engine.step import Stepper

    real = Stepper._gradients

    def short_of_memory(self: Stepper, pieces: Any, total: float) -> Any:
        if max(batch.size for batch, _ in pieces) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pieces, total)

    monkeypatch.setattr(Stepper, "_gradients", short_of_memory)
    assert curve(train(table, tmp_path / "pieces").out) == pytest.approx(whole, rel=1e-5)


def lacking(folder: Path) -> Path:
    """Mostly texts, so that batches, or one process's part of them, lack pictures and sounds."""
    lines = [json.dumps({"messages": conversation(0 if number % 3 else number)}) for number in range(24)]
    (folder / "lacking.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "lacking.jsonl"


def questions(folder: Path) -> dict[str, Any]:
    """A recipe of questions about pictures that a language model answers; some rows have no picture."""
    rows = [
        {"image": f"media/{n % 4}.png" if n % 3 else None, "question": "which one", "answer": WORDS[n % 4]}
        for n in range(8)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = chat_recipe(folder) | {"task": "visual-question-answering"}
    table["model"]["encoders"].pop("audio")
    return table | {"data": {"train": str(folder / "questions.jsonl"), "valid": str(folder / "questions.jsonl")}}


def assert_alike(cases: dict[str, dict[str, Any]], folder: Path) -> None:
    """Check that two processes make the curves and weights of one."""
    from safetensors.torch import load_file

    on_ranks(2, [{"recipe": table, "out": str(folder / f"two-{name}")} for name, table in cases.items()], folder)
    for name, table in cases.items():
        alone = train(table | {"train": table["train"] | {"parallel": "auto"}}, folder / f"one-{name}")
        assert curve(folder / f"two-{name}") == pytest.approx(curve(alone.out), rel=1e-5), name
        one, two = (load_file(folder / f"{kind}-{name}" / "model" / "model.safetensors") for kind in ("one", "two"))
        apart = {key: float((one[key] - two[key]).abs().max()) for key in one}
        assert max(apart.values()) < 1e-4, (name, max(apart, key=lambda key: apart[key]))


@pytest.mark.slow
def test_two_processes_train_on_mixed_rows_as_one_does(talks: Path, tmp_path: Path) -> None:
    plain = chat_recipe(talks, {"max_steps": 6})
    few = chat_recipe(talks, {"max_steps": 6}) | {"data": {"train": str(lacking(talks))}}
    lines = [json.dumps({"messages": conversation(number % 2)}) for number in range(12)]
    (talks / "silent.jsonl").write_text("\n".join(lines) + "\n")
    silent = chat_recipe(talks, {"max_steps": 6}) | {"data": {"train": str(talks / "silent.jsonl")}}
    cases = {
        "mixed": plain,
        "mixed-fsdp": plain | {"train": plain["train"] | {"parallel": "fsdp"}},
        "lacking": few,
        "lacking-fsdp": few | {"train": few["train"] | {"parallel": "fsdp"}},
        "accumulated": few | {"train": few["train"] | {"accumulate": 2, "batch_size": 2}},
        "tokens": plain | {"train": plain["train"] | {"batch_tokens": 120}},
        "questions": questions(talks),
        "silent": silent,
        "silent-fsdp": silent | {"train": silent["train"] | {"parallel": "fsdp"}},
        "kept": frozen(chat_recipe(talks, {"max_steps": 6})),
    }
    assert_alike(cases, tmp_path)


def test_all_that_learns_takes_part_in_every_step(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process as on several, for momentum moves weights without a gradient: the curves would differ."""
    from mmhub.engine.step import Stepper

    real, left_out = Stepper._gradients, set[str]()

    def watched(self: Stepper, pieces: Any, total: float) -> Any:
        loss = real(self, pieces, total)
        left_out.update(name for name, weight in self.model.named_parameters() if weight.grad is None)
        return loss

    monkeypatch.setattr(Stepper, "_gradients", watched)
    train(chat_recipe(talks, {"max_steps": 4, "batch_size": 1}), tmp_path / "run")
    assert not left_out


@pytest.mark.parametrize("several", [True, False])
def test_what_no_row_has_stands_still_on_several_processes_and_is_not_looked_for_in_all_of_a_stream(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, several: bool
) -> None:
    """The encoder of it has no gradient on any rank, for which others would wait."""
    lines = [json.dumps({"messages": conversation(0)}), json.dumps({"messages": conversation(1)})]
    (talks / "silent.jsonl").write_text("\n".join(lines) + "\n")
    table = chat_recipe(talks) | {"data": {"train": str(talks / "silent.jsonl"), "stream": True}}
    setup = Setup(check_recipe(table), tmp_path / "run", None, Ranks(), resume=False, quiet=False)
    assert list(setup.model.stand_ins) == ["image"] and not setup.model.frozen
    monkeypatch.setattr("mmhub.engine.setup._LOOKED_AT", 1)
    if several:
        setup._stand_in()
        assert list(setup.model.stand_ins) == ["image"] and setup.model.frozen == {"audio"}
        assert "no training row has any audio: its encoder is frozen" in capsys.readouterr().err
    else:
        setup._take_part()
        assert not setup.model.stand_ins and not setup.model.frozen


def test_a_base_of_several_encoders_goes_on_with_some_of_them(talks: Path, model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "base")
    table = questions(talks) | {"task": "chat", "model": {"base": str(tmp_path / "base")}}
    table["data"] |= {"inputs": {"image": "image", "text": "question"}, "target": "answer"}
    result = train(table | {"train": {"max_steps": 1, "batch_size": 4}}, tmp_path / "run")
    assert dict(result.load().columns.inputs) == {"image": "image", "text": "question"}


def test_a_batch_without_media_moves_no_projector_and_misses_none(model: Model) -> None:
    """What holds several processes together: whatever learns has a gradient in every step, if only of zero."""
    model.train()
    batch = loaded(model, table_of(conversation(0)), [0], reader_of(model)).batch
    assert batch is not None
    model.zero_grad()
    output = model(batch)
    assert output.loss is not None
    output.loss.backward()
    for name, weight in model.fusion.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name
    embedding: Any = model.decoder.get_submodule("embedding")
    assert embedding.weight.grad.any()


class Numbered:
    """Kept features of one token an item, each the item's number in its row."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def has(self, row: int) -> bool:
        return self.counts[row] > 0

    def take(self, rows: Any) -> Encoded:
        numbers = torch.tensor([float(n) for row in rows for n in range(self.counts[row])])
        owners = torch.tensor([place for place, row in enumerate(rows) for _ in range(self.counts[row])])
        mask = torch.ones(len(numbers), 1, dtype=torch.bool)
        return Encoded(Features(numbers.view(-1, 1, 1), mask), owners)


@pytest.mark.parametrize(("newest", "stays"), [(True, [0, 0]), (False, [0, 1])])
def test_kept_features_of_turns_that_are_left_out_are_left_out(
    talks: Path, model: Model, newest: bool, stays: list[int]
) -> None:
    shown, other = (str(talks / f"media/{number}.png") for number in (0, 1))
    short = [said("user", shown), said("assistant", "one")]
    rows = table_of(
        short, [said("user", shown), said("assistant", "one"), said("user", other), said("assistant", "two")]
    )
    size = sum(found[0] for found in measure_talks(rows, reader_of(model)).tokens.values())
    reader = reader_of(model, limit=int(size) + 1, newest=newest)
    batch = loaded(model, rows, [0, 1], reader, features={"image": Numbered([1, 2])}).batch
    assert batch is not None and batch.features["image"].rows.tolist() == [0, 1]
    assert batch.features["image"].features.tokens.flatten().tolist() == stays


@pytest.mark.parametrize("named", [True, False])
def test_a_chat_model_starts_from_a_language_model_of_ours_beside_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    write_talks(tmp_path / "train.jsonl")
    (tmp_path / "text.txt").write_text("say zero\nwhich picture\nwhich sound\n" * 4)
    decoder = chat_recipe(tmp_path)["model"]["decoder"]
    words = {"decoder": decoder, "tokenizer": {"kind": "byte"}}
    short = {"max_steps": 1, "batch_size": 2}
    language = {"task": "language-modelling", "model": words, "data": {"train": str(tmp_path / "text.txt")}}
    started = train(language | {"train": short}, tmp_path / "lm")
    table = chat_recipe(tmp_path, train=short)
    table["model"]["decoder"] = {"init": "./lm/model"} | ({"use": "transformer-lm"} if named else {})
    del table["model"]["tokenizer"]
    (tmp_path / "chat.toml").write_text(dump_recipe(check_recipe(table)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    model = train(tmp_path / "chat.toml", tmp_path / "chat").load()
    assert model.processors["text"].chat_template
    assert started.load().task.name == "language-modelling" and model.converses
    assert isinstance(model.chat([{"role": "user", "content": "say zero"}], max_new_tokens=2), str)
