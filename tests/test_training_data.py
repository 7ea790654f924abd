"""Which columns and documents a run reads, what its model says where the recipe does not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmhub.engine.data
from mmhub.batch import Batch, Items
from mmhub.config import Recipe, check_recipe
from mmhub.data.loader import Collate
from mmhub.engine.data import TrainingData, with_base_columns
from mmhub.engine.language_feed import LanguageFeed
from mmhub.engine.setup import Setup
from mmhub.engine.step import Stepper
from mmhub.engine.tensors import gather_carried
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import find_task


def language(folder: Path, cells: list[Any], **data: Any) -> Recipe:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": cell}) + "\n" for cell in cells))
    table = {"train": str(folder / "a.jsonl")} | data
    return check_recipe({"task": "language-modelling", "data": table})


def opened(recipe: Recipe) -> TrainingData:
    return TrainingData(recipe, find_task(recipe.task), None)


def on_base(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **data: Any) -> Recipe:
    """The recipe as it is on a base that was trained with `data`."""
    recipe.model.base = "./base"
    known = SimpleNamespace(**({"inputs": {}, "target": "", "columns": [], "document": "row"} | data))
    monkeypatch.setattr(mmhub.engine.data, "pull", lambda name: name)
    monkeypatch.setattr(mmhub.engine.data, "is_checkpoint", lambda path: True)
    monkeypatch.setattr(mmhub.engine.data, "read_config", lambda path: SimpleNamespace(data=known, components=[]))
    return with_base_columns(recipe, Path("none"), None, resume=False)


def test_a_base_that_knows_no_columns_reads_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(on_base(language(tmp_path, ["one"]), monkeypatch))
    assert data.inputs == {"text": "text"} and list(data.values("text")) == ["one"]


def test_documents_are_those_of_the_base_unless_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_base(language(tmp_path, ["one", "two"]), monkeypatch, document="file")
    assert list(opened(recipe).values("text")) == ["one\ntwo"]
    recipe = on_base(language(tmp_path, ["one", "two"], document="row"), monkeypatch, document="file")
    assert list(opened(recipe).values("text")) == ["one", "two"]
    recipe = on_base(language(tmp_path, ["one", "two"], stream=True), monkeypatch, document="file")
    assert opened(recipe).columns.document == "row"
    assert with_base_columns(language(tmp_path, ["one"]), tmp_path, None, resume=False).data.document == "row"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_tokenizer_learns_from_is_named_or_skipped(stream: bool, tmp_path: Path) -> None:
    cells = ["one", 7, "\ud800", "two"]
    with pytest.raises(InputError, match=r"a.jsonl row 2, column 'text'"):
        list(opened(language(tmp_path, cells, stream=stream)).values("text"))
    skipping = opened(language(tmp_path, cells, stream=stream, on_error="skip"))
    assert list(skipping.values("text")) == ["one", "two"]


def test_a_stream_has_no_documents_of_several_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"any order, and data.document is 'file'; leave data.stream out"):
        opened(language(tmp_path, ["one"], stream=True, document="file"))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"text": "a+b+c"}, r"'a\+b\+c' names 3 columns for one input; give one, or two for a pair"),
        ({"audio": "a+b"}, r"data.inputs.audio is the pair 'a\+b', and only texts make one"),
    ],
)
def test_only_two_texts_make_one_input(inputs: dict[str, str], says: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,c,label\n1,2,3,x\n")
    data = {"train": str(tmp_path / "a.csv"), "inputs": inputs, "target": "label"}
    encoders = {name: {"use": "none"} for name in inputs}
    with pytest.raises(UsageError, match=says):
        opened(check_recipe({"task": "classification", "model": {"encoders": encoders}, "data": data}))


# -- processes ----------------------------------------------------------------------------------------------------


class Others:
    """The first of several processes, which knows what the others say."""

    rank, several = 0, True

    def __init__(self, *said: Any) -> None:
        self.said, self.world = said, 1 + len(said)

    def gather(self, data: Any) -> list[Any]:
        return [data, *self.said]


def test_carried_states_are_gathered_as_they_are_also_from_processes_without_rows() -> None:
    own = torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16)
    model: Any = SimpleNamespace(decoder=SimpleNamespace(carried={"state": own}))
    ranks: Any = Others({"state": ["torch.bfloat16", [2], [[5.0, 6.0]]]})
    found = gather_carried(model, ranks)["state"]
    assert found.dtype == torch.bfloat16 and found.tolist() == [[1, 2], [5, 6], [3, 4]]
    model.decoder.carried, ranks = {"state": own[:1]}, Others({})
    assert gather_carried(model, ranks)["state"].tolist() == [[1, 2]]


def test_a_recurrent_model_wants_a_row_for_every_process() -> None:
    recipe = check_recipe({"task": "language-modelling", "train": {"batch_size": 2}})
    rows: Any = None
    setup: Any = SimpleNamespace(
        recipe=recipe,
        rows=rows,
        task=find_task(recipe.task),
        ranks=Others({}, {}),
        model=SimpleNamespace(decoder=SimpleNamespace(stateful=True)),
        _features={},
        _measure_rows=None,
        _collate=lambda: Collate(rows=rows, processors={}, inputs={}, decoder=None),
    )
    with pytest.raises(UsageError, match=r"batches of 2 rows leave some of 3 processes without a text; raise"):
        Setup._feed(setup)


def batch_of(rows: int) -> Batch:
    counts = torch.ones(rows, dtype=torch.long)
    data = torch.arange(rows)[:, None]
    text = Items(data, torch.ones(rows, 1, dtype=torch.bool), torch.arange(rows), rows)
    return Batch(items={"text": text}, size=rows, targets=counts, weights=counts, index=list(range(rows)))


def weights_of(ranks: Any, most_rows: int) -> list[float]:
    """The weights of what a step computes one after the other, on ten rows with `accumulate = 2`."""
    stepper = Stepper.__new__(Stepper)
    options: Any = SimpleNamespace(accumulate=2)
    stepper.ranks, stepper.options, stepper.most_rows, stepper.stand_in = ranks, options, most_rows, batch_of(1)
    turn: Any = SimpleNamespace(batches=[batch_of(10), None])
    return [weight for _, weight in stepper._pieces(turn, 1)]


def test_a_long_document_is_computed_in_pieces_and_all_processes_make_as_many() -> None:
    alone = SimpleNamespace(several=False)
    assert weights_of(alone, 4) == [4, 4, 2] and weights_of(alone, 0) == [10]
    assert weights_of(Others(5), 4) == [4, 4, 2, 0, 0]
    assert weights_of(Others(5), 0) == [10, 0]


def test_batches_of_streams_alone_have_any_size() -> None:
    feed = LanguageFeed.__new__(LanguageFeed)
    ranks: Any = Others({})
    feed.recipe, feed.ranks = check_recipe({"task": "language-modelling", "train": {"batch_size": 5}}), ranks
    corpus: Any = object()
    feed.corpus = None
    assert feed.most_rows == 6
    feed.corpus = corpus
    assert feed.most_rows == 0
