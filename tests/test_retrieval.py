"""Learning which inputs belong together: from recipes to answers, in memory for few rows, on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmhub.batch import Batch
from mmhub.build import compose
from mmhub.checkpoint import load
from mmhub.cli.main import main
from mmhub.config import TrainRecipe, check_recipe, dump_recipe
from mmhub.engine import train
from mmhub.engine.cached import Cached
from mmhub.engine.parallel import Parallel
from mmhub.engine.ranks import Ranks
from mmhub.errors import UsageError
from mmhub.evaluation import EvalOptions, evaluate
from mmhub.metrics import flat
from mmhub.model import Model
from mmhub.weights import named_tensors
from tests.conftest import png
from tests.test_distributed import curve, on_ranks

CPU = torch.device("cpu")
WORDS = ["red", "blue", "tall", "wide"]
Run = Callable[..., dict[str, Any]]


def pictures(path: Path, count: int = 32, *, gaps: bool = False) -> Path:
    """Pictures of four kinds with captions that tell the kind; with `gaps`, some rows lack one or the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png(i % 4), "path": f"{i}.png"}, "caption": f"a {WORDS[i % 4]} thing", "kind": i % 4}
        for i in range(count)
    ]
    for number in range(0, count if gaps else 0, 7):
        rows[number]["image"] = None
    for number in range(3, count if gaps else 0, 7):
        rows[number]["caption"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def questions(path: Path, count: int = 24) -> Path:
    lines = [f"which {WORDS[i % 4]} one {i}?\tthe {WORDS[i % 4]} answer {i}" for i in range(count)]
    path.write_text("\n".join(["question\tanswer", *lines]) + "\n")
    return path


def of_pictures(table: Path, *, loss: str = "clip", norm_free: bool = False, **options: Any) -> dict[str, Any]:
    """A recipe for pictures and captions; without batch norms where a row must not depend on the others."""
    architecture = "test_vit" if norm_free else "test_resnet"
    image = {"architecture": architecture, "image_size": 160 if norm_free else 32, "augment": "none"}
    text = {"dim": 16, "embedding_dim": 8, "dropout": 0.0, "embedding_dropout": 0.0, "word_dropout": 0.0}
    return {
        "task": "retrieval",
        "model": {
            "encoders": {
                "image": {"use": "timm", "config": image},
                "text": {"use": "lstm", "config": text},
            },
            "decoder": {"use": "contrastive", "config": {"dim": 16, "loss": loss}},
            "tokenizer": {"kind": "word", "min_frequency": 1},
        },
        "data": {
            "train": str(table),
            "valid": str(table),
            "inputs": {"image": "image", "text": "caption"},
        },
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1} | options,
    }


def of_questions(table: Path, *, loss: str = "clip", **options: Any) -> dict[str, Any]:
    """A recipe for pairs of texts, without batch norms or anything random but the order of rows."""
    config = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}
    return {
        "task": "retrieval",
        "model": {
            "encoders": {"text": {"use": "transformer", "config": config}},
            "decoder": {"use": "contrastive", "config": {"dim": 8, "loss": loss}},
            "tokenizer": {"kind": "word", "min_frequency": 1},
        },
        "data": {"train": str(table), "valid": str(table), "inputs": {"text": "question+answer"}},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "log_every": 1} | options,
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mmhub ARGS --json` in `tmp_path`, in this process; return the document."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main((*args, "--json"))
        output = capsys.readouterr()
        assert not caught.value.code, output.err
        return dict(json.loads(output.out))

    return run


def write(recipe: dict[str, Any], path: Path) -> None:
    path.write_text(dump_recipe(check_recipe(recipe)))


# -- from the command line -----------------------------------------------------------------------------------------


@pytest.mark.slow  # of two encoders `test_two_frozen_encoders_...` tells sooner, of the command line the pair of texts
def test_pictures_and_captions_are_trained_evaluated_and_predicted(
    tmp_path: Path, here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pictures(tmp_path / "pairs.parquet", gaps=True)
    recipe = of_pictures(table, epochs=8, learning_rate=1e-2)
    recipe["data"]["target"] = "kind"
    write(recipe, tmp_path / "r.toml")
    trained = here("train", "r.toml", "-q")
    report = here("eval", "runs/r/model", "--data", "pairs.parquet")
    found = report["metrics"]
    assert flat(found) == pytest.approx(flat(trained["metrics"]), abs=1e-5)
    assert set(found["recall"]) == {"text_to_image", "image_to_text"}
    assert set(found["recall"]["text_to_image"]) == {"1", "5", "10"}
    assert found["recall"]["text_to_image"]["1"] > 0.6, "chance is 0.25"
    assert found["median_rank"]["text_to_image"] == 1.0
    assert report["subsets"] == {}

    (tmp_path / "2.png").write_bytes(png(2))
    (answer,) = here("predict", "runs/r/model", "--text", "a tall thing", "--image", "2.png")["predictions"]
    assert {side: len(vector) for side, vector in answer["embeddings"].items()} == {"text": 16, "image": 16}
    (alone,) = here("predict", "runs/r/model", "--image", "2.png")["predictions"]
    assert alone["embeddings"] == {"image": pytest.approx(answer["embeddings"]["image"], abs=1e-5)}

    with pytest.raises(SystemExit):
        main(["eval", "runs/r/model", "--data", "pairs.parquet"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 60 and any(line.split()[:1] == ["recall.text_to_image.1"] for line in lines)


def test_questions_and_answers_are_trained_evaluated_and_predicted(tmp_path: Path, here: Run) -> None:
    write(of_questions(questions(tmp_path / "pairs.tsv"), epochs=8, learning_rate=1e-2), tmp_path / "r.toml")
    here("train", "r.toml", "-q")
    report = here("eval", "runs/r/model", "--data", "pairs.tsv")
    assert set(report["metrics"]["recall"]) == {"text_to_text_pair", "text_pair_to_text"}
    assert report["metrics"]["recall"]["text_to_text_pair"]["10"] > 0.8, "chance is 0.42"
    (answer,) = here("predict", "runs/r/model", "--text", "which red one 0?")["predictions"]
    assert set(answer["embeddings"]) == {"text"}


@pytest.mark.slow
def test_two_frozen_encoders_run_once_and_the_head_learns_from_what_is_kept(tmp_path: Path) -> None:
    recipe = of_pictures(pictures(tmp_path / "pairs.parquet"), epochs=10, learning_rate=1e-2)
    for part in recipe["model"]["encoders"].values():
        part["freeze"] = True
    recipe["data"]["target"] = "kind"
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "encode_items", _counted(Model.encode_items, seen))
        result = train(recipe, tmp_path / "run")
        cached = train(recipe | {"train": recipe["train"] | {"cached_rows": 3}}, tmp_path / "cached")
    assert len(seen) < 40, "encoders run in 10 epochs of 4 batches, again"
    assert result.metrics["recall"]["text_to_image"]["1"] > 0.9
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "run"), rel=1e-4)
    assert cached.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-3)


def _counted(encode: Any, seen: list[str]) -> Any:
    def run(self: Model, name: str, items: Any) -> Any:
        seen.append(name)
        return encode(self, name, items)

    return run


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("siglip")[0]
    rows = [{"text": [f"which {i}?", f"{WORDS[i % 4]} {i}"]} for i in range(10)]
    batch = model.collate(rows)
    rows.insert(5, {"text": ["without an answer"]})

    def loss(size: int) -> float:
        options = EvalOptions(batch_size=size, workers=0)
        return float(evaluate(model, rows, options=options)["metrics"]["loss"])

    with torch.no_grad():
        expected = model.eval()(replace(batch, targets=torch.arange(10))).loss
    assert [loss(size) for size in (1, 4, 64)] == pytest.approx([float(expected)] * 3, rel=1e-5)
    monkeypatch.setattr("mmhub.evaluation._RIVALS", 4)
    assert loss(3) == pytest.approx(loss(64), rel=1e-5) != pytest.approx(float(expected), rel=1e-2)


# -- cached gradients ----------------------------------------------------------------------------------------------


def text_model(loss: str, dropout: float = 0.0) -> tuple[Model, Batch]:
    """A model of pairs of texts in training mode, and a batch of 10 rows of which one lacks its pair."""
    pairs: list[Any] = [
        [f"{WORDS[i % 4]} {WORDS[i // 4]}", f"{WORDS[i // 4]} {i} of {WORDS[i % 4]}"] for i in range(10)
    ]
    pairs[4] = pairs[4][:1]
    config = {"dim": 16, "depth": 2, "heads": 2, "dropout": dropout, "word_dropout": dropout}
    torch.manual_seed(0)
    model = compose(
        task="retrieval",
        encoders={"text": {"use": "transformer", "config": config}},
        decoder={"use": "contrastive", "config": {"dim": 8, "loss": loss, "dropout": dropout}},
        texts=[text for pair in pairs for text in pair],
    )
    groups = [None if len(pair) < 2 else row for row, pair in enumerate(pairs)]
    batch = model.collate([{"text": pair} for pair in pairs])
    return model.train(), replace(batch, targets=model.decoder.encode_targets(groups))


def cached(model: Model, rows: int, device: torch.device = CPU) -> Cached:
    parallel = Parallel(model, TrainRecipe(), Ranks(), torch.float32)
    return Cached(parallel, device, torch.float32, rows)


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=tolerance), name


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_cached_gradients_are_those_of_the_whole_batch(loss: str, rows: int) -> None:
    model, batch = text_model(loss)
    plain = model(batch).loss
    (plain * 0.25).backward()
    expected = gradients(model)
    found = cached(model, rows).backward(batch, 0.25, last=True)
    assert found.item() == pytest.approx(plain.item() * 0.25, abs=1e-5)
    assert_same(gradients(model), expected)
    assert "decoder.log_scale" in expected and expected["decoder.log_scale"].abs() > 1e-4


def test_dropout_is_the_same_when_rows_are_computed_again() -> None:
    model, batch = text_model("clip", dropout=0.4)
    torch.manual_seed(5)
    parts = batch.split(4)
    vectors = torch.cat([model(Batch(part.items, part.size)).logits for part in parts])
    decoder: Any = model.decoder
    plain = decoder.pair_loss(dict(zip(decoder.sides, vectors.unbind(1), strict=True)), batch.targets)
    plain.backward()
    expected = gradients(model)
    torch.manual_seed(5)
    found = cached(model, 3).backward(batch, 1.0, last=True)
    assert found.item() == pytest.approx(plain.item(), abs=1e-5)
    assert_same(gradients(model), expected)


def test_running_statistics_are_updated_once_a_step() -> None:
    model, batch = text_model("clip")
    decoder: Any = model.decoder
    norm = nn.BatchNorm1d(16)
    decoder.projections["text"] = nn.Sequential(norm, decoder.projections["text"])
    model(batch)
    expected = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    assert expected["num_batches_tracked"] == 2  # both sides
    norm.reset_running_stats()
    cached(model, 100).backward(batch, 1.0, last=True)
    assert_same(dict(norm.named_buffers()), expected)


def test_no_more_rows_are_computed_at_once_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = text_model("clip")
    sizes: list[tuple[int, bool]] = []
    forward = model.forward

    def watched(batch: Batch) -> Any:
        sizes.append((batch.size, torch.is_grad_enabled()))
        return forward(batch)

    monkeypatch.setattr(model, "forward", watched)
    cached(model, 4).backward(batch, 1.0, last=True)
    assert sizes == [(4, False), (4, False), (2, False), (4, True), (4, True), (2, True)]


def test_a_run_with_cached_rows_has_the_curve_and_weights_of_one_without(tmp_path: Path) -> None:
    table = questions(tmp_path / "pairs.tsv")
    options: dict[str, Any] = {"accumulate": 2, "optimizer": "sgd", "learning_rate": 0.1}  # AdamW enlarges rounding
    plain = train(of_questions(table, **options), tmp_path / "plain")
    few = train(of_questions(table, **options, cached_rows=3), tmp_path / "few")
    assert curve(tmp_path / "few") == pytest.approx(curve(tmp_path / "plain"), abs=1e-5)
    assert_same(weights(few.load()), weights(plain.load()))


def weights(model: Model) -> dict[str, Tensor]:
    return named_tensors(model.parts())[0]


@pytest.mark.gpu
def test_cached_gradients_repeat_dropout_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    model, batch = text_model("clip", dropout=0.4)
    model.to(device)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        loss = cached(model, 3, device).backward(batch.to(device), 1.0, last=True)
        found.append((loss, gradients(model)))
    torch.manual_seed(5)
    vectors = torch.cat([model(Batch(part.items, part.size)).logits for part in batch.to(device).split(4)])
    decoder: Any = model.decoder
    plain = decoder.pair_loss(dict(zip(decoder.sides, vectors.unbind(1), strict=True)), batch.targets.to(device))
    plain.backward()
    expected = gradients(model)
    for loss, one in found:
        assert loss.item() == pytest.approx(plain.item(), abs=1e-4)
        assert_same(one, expected, 1e-3)


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_from_each_others_rows_as_one_would(tmp_path: Path) -> None:
    table = questions(tmp_path / "pairs.tsv", 25)  # the last batch of an epoch leaves one process without a row
    gaps = pictures(tmp_path / "gaps.parquet", 21, gaps=True)
    few: dict[str, Any] = {"batch_size": 3, "max_steps": 4, "optimizer": "sgd", "learning_rate": 0.02}
    recipes = {
        "clip": of_questions(table),
        "siglip": of_questions(table, loss="siglip"),
        "cached": of_questions(table, cached_rows=3, accumulate=2),
        "gaps": of_pictures(gaps, norm_free=True, **few),
        "kinds": of_pictures(gaps, norm_free=True, cached_rows=1, loss="siglip", **few),
    }
    recipes["kinds"]["data"]["target"] = "kind"
    cases = [{"recipe": recipe, "out": str(tmp_path / f"{name}-2")} for name, recipe in recipes.items()]
    on_ranks(2, cases, tmp_path)
    for name, recipe in recipes.items():
        alone = train(recipe, tmp_path / f"{name}-1")
        assert curve(tmp_path / f"{name}-2") == pytest.approx(curve(tmp_path / f"{name}-1"), abs=5e-5), name
        if recipe["train"].get("optimizer") == "sgd":  # AdamW enlarges rounding where a gradient is nothing else
            assert_same(weights(load(tmp_path / f"{name}-2" / "model")), weights(alone.load()))
        there = json.loads((tmp_path / f"{name}-2" / "metrics.jsonl").read_text().splitlines()[-1])["valid"]
        assert there["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-4), name


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("classification", {"cached_rows": 8}, "train.cached_rows is for contrastive batches, not for classification"),
        ("retrieval", {"cached_rows": -1}, "train.cached_rows is -1"),
        ("retrieval", {"cached_rows": 8, "parallel": "fsdp"}, "do not go together"),
        ("retrieval", {"batch_size": "auto"}, "would change which rows are compared"),
    ],
)
def test_options_that_do_not_fit_are_refused(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe({"task": task, "train": options})
    assert message in str(caught.value)
