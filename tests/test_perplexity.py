"""Log-probabilities and perplexity, by models whose losses say what they have read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmhub.perplexity
from mmhub.batch import Bundle
from mmhub.data.corpus import Corpus
from mmhub.data.sources import open_rows
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions, EvaluationStopped
from mmhub.interfaces import LanguageModel, Policy, own_stream
from mmhub.interfaces.task import find_task
from mmhub.model import Columns, Model
from mmhub.perplexity import measure_corpus, measure_rows, score_texts


class Letters:
    """Reads a text as <s>, its characters and </s>."""

    begin_id: int | None = 2
    end_id: int | None = 3
    ends = True
    unknown_id = 1

    def read(self, raw: str, policy: Policy, rng: Any = None) -> Tensor:
        if not isinstance(raw, str):
            raise InputError("a text is expected")
        begin = [] if self.begin_id is None else [self.begin_id]
        return torch.tensor([*begin, *(1 if c == "?" else ord(c) for c in raw), *([3] if self.ends else [])])


class Counting(LanguageModel):
    """-log P of a token is the number of tokens before it that were read, a thousandth of that."""

    def __init__(self, context: int | None = None) -> None:
        nn.Module.__init__(self)
        self.config, self.processor, self.context, self.dim = None, Letters(), context, 2
        self.scale = nn.Parameter(torch.tensor(0.001))
        self.calls: list[tuple[int, int]] = []

    def before(self, mask: Tensor, continues: Tensor | None) -> Tensor | int:
        return 0

    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        stream = own_stream(bundle)
        assert stream.ids is not None and not self.training
        self.calls.append(tuple(stream.mask.shape))  # type: ignore[arg-type]
        count = self.before(stream.mask, stream.continues) + torch.arange(stream.mask.shape[1])
        wanted = stream.mask if stream.loss is None else stream.mask & stream.loss
        return (count * self.scale * (wanted & (torch.arange(wanted.shape[1]) > 0))).float()

    def embed(self, ids: Tensor) -> Tensor:
        return torch.ones(*ids.shape, 2)

    def nothing(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not asked for")

    forward = begin = step = select = make_processor = load_processor = nothing


class Remembering(Counting):
    """The same, with the count carried on."""

    stateful: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.carried: dict[str, Tensor] = {"read": torch.tensor([7.0])}

    def before(self, mask: Tensor, continues: Tensor | None) -> Tensor:
        assert continues is not None
        kept = self.carried.get("read", torch.zeros(len(mask)))
        assert not continues.any() or len(kept) == len(mask)
        start = torch.where(continues, kept, torch.zeros(len(mask))) if continues.any() else torch.zeros(len(mask))
        self.carried = {"read": start + mask.sum(1) - 1}
        return start[:, None]


class Whole(nn.Module):
    by_item = False
    """A fusion that passes the text on."""

    outputs: ClassVar[dict[str, Any]] = {}

    def forward(self, bundle: Bundle) -> Bundle:
        return bundle


def model_of(decoder: LanguageModel) -> Model:
    return Model(find_task("language-modelling"), {}, Whole(), decoder, {})  # type: ignore[arg-type]


def text_of(predictions: int) -> str:
    return "a" * (predictions - 1)


def nats(predictions: int) -> float:
    """What both models make of a text of so many predictions that is read as a whole."""
    return predictions * (predictions + 1) / 2000


def measure_texts(decoder: LanguageModel, sizes: Sequence[int], **options: Any) -> dict[str, Any]:
    rows = open_rows([{"text": text_of(size)} for size in sizes])
    return measure_rows(model_of(decoder), rows, "text", EvalOptions(**options))


SIZES = (5, 40, 2, 17, 17, 33)


@pytest.mark.parametrize("decoder", [Counting(), Counting(50), Remembering()])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_a_text_is_scored_by_the_chain_rule(
    decoder: LanguageModel, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmhub.perplexity, "_CHUNK", 8)
    found = score_texts(model_of(decoder), [text_of(size) for size in SIZES], batch_tokens=batch_tokens)
    assert [one.logprob for one in found] == pytest.approx([-nats(size) for size in SIZES], rel=1e-6)
    assert [one.tokens for one in found] == list(SIZES)


def test_the_end_of_a_text_counts_unless_it_is_left_out() -> None:
    model = model_of(Counting())
    processor: Any = model.decoder.processor
    assert model.score("abcd") == pytest.approx([-nats(5)])
    assert model.score(["abcd", ""], end=False) == pytest.approx([-nats(4), 0])
    processor.ends = False
    assert model.score("abcd") == pytest.approx([-nats(4)])
    assert model.score("abcd", end=True) == pytest.approx([-nats(5)])
    processor.end_id = None
    with pytest.raises(UsageError, match="this model has no end token; score without it: end=False"):
        model.score("abcd", end=True)


def test_a_score_says_what_it_is_of() -> None:
    [found] = score_texts(model_of(Counting()), ["ü ? a"])
    assert (found.tokens, found.words, found.bytes, found.unknown) == (6, 3, 6, 1)
    assert score_texts(model_of(Counting()), []) == []


def test_a_text_that_cannot_be_read_has_its_place() -> None:
    with pytest.raises(InputError) as caught:
        score_texts(model_of(Counting()), ["a", 7])  # type: ignore[list-item]
    assert caught.value.row == 1


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (8, 7), (8, 3), (5, 0), (0, 0), (0, 9)])
def test_each_token_of_a_long_text_is_scored_once_with_enough_before_it(window: int, stride: int) -> None:
    decoder = Counting(10)
    report = measure_texts(decoder, [40, 6, 23], window=window, stride=stride)
    width = window or 10
    step = stride or width // 2
    total = 0
    for size in (40, 6, 23):
        done = min(width, size + 1)
        seen = list(range(1, done))
        while done < size + 1:
            new = min(step, size + 1 - done)
            seen += range(width - new, width)
            done += new
        assert len(seen) == size and all(s >= min(i, width - step) for i, s in enumerate(seen, 1))
        total += sum(seen)
    assert report["metrics"]["loss"] == pytest.approx(total / 69_000)
    assert all(columns <= width for _, columns in decoder.calls)
    assert f"windows of {width} tokens with {step} new ones" in report["definition"]


def test_a_recurrent_model_reads_long_texts_in_chunks_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_texts(Remembering(), SIZES)["metrics"]["loss"]
    monkeypatch.setattr(mmhub.perplexity, "_CHUNK", 8)
    decoder = Remembering()
    found = measure_texts(decoder, SIZES)["metrics"]["loss"]
    assert max(columns for _, columns in decoder.calls) == 9
    assert found == pytest.approx(whole) == pytest.approx(sum(map(nats, SIZES)) / sum(SIZES))


def test_what_training_carries_on_is_left_as_it_was() -> None:
    decoder = Remembering()
    model = model_of(decoder).train()
    measure_corpus(model, corpus_of(5, 9), EvalOptions())
    assert decoder.carried["read"].tolist() == [7.0] and model.training
    with pytest.raises(EvaluationStopped):
        measure_corpus(model, corpus_of(5, 9), EvalOptions(stop=lambda: True))
    assert decoder.carried["read"].tolist() == [7.0] and model.training


def corpus_of(*sizes: int) -> Corpus:
    texts = [text_of(size) for size in sizes]
    return Corpus.read(enumerate(texts), Letters(), where="row {}".format)


def test_perplexities_are_those_of_one_sum_over_tokens_words_and_bytes() -> None:
    rows = open_rows([{"text": "ab cd ü?"}, {"text": "x"}])
    model = model_of(Counting())
    report = measure_rows(model, rows, "text", EvalOptions())
    total, found = nats(9) + nats(2), report["metrics"]
    assert found["loss"] == pytest.approx(total / 11) and found["bits_per_byte"] == pytest.approx(
        total / math.log(2) / 10
    )
    assert found["perplexity"] == pytest.approx(
        {"token": math.exp(total / 11), "word": math.exp(total / 4), "byte": math.exp(total / 10)}
    )
    assert math.exp(found["loss"]) == found["perplexity"]["token"]
    scores = model.score(["ab cd ü?", "x"])
    assert math.exp(-sum(scores) / found["tokens"]) == pytest.approx(found["perplexity"]["token"], rel=1e-12)
    assert {key: found[key] for key in ("tokens", "words", "bytes", "documents")} == {
        "tokens": 11, "words": 4, "bytes": 10, "documents": 2,
    }  # fmt: skip
    assert found["unknown"] == pytest.approx(1 / 11) and report["rows"] == 2


def test_a_loss_that_is_no_number_has_a_perplexity_that_is_none() -> None:
    decoder = Counting()
    decoder.scale.data.fill_(math.nan)
    found = measure_texts(decoder, [5])["metrics"]
    assert math.isnan(found["loss"]) and all(map(math.isnan, found["perplexity"].values()))


def test_a_report_says_what_was_computed() -> None:
    decoder = Counting()
    said = measure_texts(decoder, [5])["definition"]
    assert "over 5 tokens of 1 document, the end token of each included; every token is predicted from all" in said
    assert "1 words separated by whitespace, per byte by the 4 bytes of the texts in UTF-8." in said
    decoder.processor.begin_id, decoder.processor.ends = None, False
    report = measure_texts(decoder, [5])
    assert "without an end token, the first token of each left out because nothing" in report["definition"]
    assert report["metrics"]["tokens"] == 3


class Ranks:
    """One of several processes, told what the others say."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.several = rank, world, True
        self.said: list[float] = []

    def sum(self, *values: float) -> list[float]:
        self.said += values
        return list(values)


@pytest.mark.parametrize("decoder", [Counting(10), Remembering()])
def test_ranks_share_the_work_and_make_equally_many_calls(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmhub.perplexity, "_CHUNK", 8)
    whole = measure_texts(decoder, SIZES, batch_tokens=16)["metrics"]["loss"]
    shares, calls = [], []
    for rank in range(3):
        decoder.calls.clear()
        ranks = Ranks(rank, 3)
        measure_texts(decoder, SIZES, batch_tokens=16, ranks=ranks)
        shares.append(ranks.said[-1])
        calls.append(len(decoder.calls))
    assert sum(shares) == pytest.approx(whole * sum(SIZES), rel=1e-12) and all(shares)
    assert len(set(calls)) == 1


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (Counting(10), {"window": 11}, "the window is 11 tokens; it must be from 2 to 10"),
        (Counting(10), {"stride": 10}, "the stride is 10 tokens; it must be from 1 to 9"),
        (Counting(), {"stride": 10}, "a stride is given, but this model has no limit"),
        (Remembering(), {"window": 8}, "this model reads whole documents, however long"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(decoder: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_texts(decoder, [5], **options)


def test_texts_without_a_prediction_are_refused() -> None:
    decoder = Counting()
    decoder.processor.begin_id, decoder.processor.ends = None, False
    with pytest.raises(InputError, match="no token of these texts is predicted"):
        measure_texts(decoder, [2])


def test_documents_are_what_the_options_say_else_what_they_were_in_training() -> None:
    rows = open_rows([{"text": line} for line in ("ab", "c", "", "d")])
    model = model_of(Counting())
    model.columns = Columns(document="file")
    assert measure_rows(model, rows, "text", EvalOptions())["metrics"]["documents"] == 1
    report = measure_rows(model, rows, "text", EvalOptions(document="blank-line"))
    assert report["metrics"]["documents"] == 2 and report["metrics"]["tokens"] == 7
    assert np.isclose(report["metrics"]["loss"] * 7, nats(5) + nats(2))
