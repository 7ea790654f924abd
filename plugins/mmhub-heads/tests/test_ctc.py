"""The CTC head: its units, its loss, what it answers, and what it refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Features
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Stream
from mmhub_heads.ctc import Ctc
from mmhub_heads.ctc_align import without_prior
from mmhub_heads.ctc_units import Units

D = 6
TEXTS = ["ab a", "b", "A  b"]
LENGTHS = [7, 3, 5]


def bundle(lengths: list[int] = LENGTHS, seed: int = 0) -> dict[str, Features]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"audio": Features(torch.randn(*mask.shape, D, generator=generator) * mask[..., None], mask)}


def build(texts: list[str] = TEXTS, seconds: float | None = 0.1, **config: Any) -> Ctc:
    torch.manual_seed(1)
    fitted = Ctc.fit(Ctc.Config(**config), texts)
    return Ctc(fitted, {"audio": Stream(D, seconds=seconds)}).eval()


def test_units_are_learned_from_the_transcripts_and_write_them_again() -> None:
    texts = ["Seven three", "nine  seven", "tree"]
    for units, size in (("character", 9), ("word", 4), ("bpe", 14)):
        decoder = build(texts, units=units, vocab_size=14)
        assert len(decoder.config.vocabulary) == size
        for text, normal in zip(texts, ["seven three", "nine seven", "tree"], strict=True):
            labels = decoder.units.encode(text)
            assert decoder.units.text(labels) == normal
            words = decoder.units.words(labels)
            assert [word for word, _, _ in words] == normal.split()
            for word, first, end in words:
                assert decoder.units.text(labels[first:end]) == word
    assert build(texts, units="bpe", vocab_size=14).units.pieces[1] != build(texts, lowercase=False).units.pieces[1]


def test_capitals_stay_where_lowercase_is_off() -> None:
    assert build(["Ab"], lowercase=False).config.vocabulary == (" ", "A", "b")
    assert build(["Ab"]).references(["AB  a"]) == ["ab a"]


def test_what_no_training_transcript_had_is_refused_with_its_row() -> None:
    for units, unknown, named in (("character", "abc", "'c'"), ("word", "ab ba", "'ba'"), ("bpe", "abc", "'c'")):
        with pytest.raises(InputError, match=f"the vocabulary lacks {named}") as caught:
            build(units=units).encode_targets(["a", unknown])
        assert caught.value.row == 1
    with pytest.raises(InputError, match="a transcript is a text, got a int"):
        build().encode_targets([3])
    with pytest.raises(InputError, match="the transcript is missing"):
        Ctc.fit(Ctc.Config(), ["a", None])
    with pytest.raises(UsageError, match="transcripts are empty"):
        Ctc.fit(Ctc.Config(), ["", ""])


def test_the_loss_is_the_mean_over_labels_of_what_torch_says_of_each_row() -> None:
    decoder, features = build(), bundle()
    targets = decoder.encode_targets(TEXTS)
    weights = decoder.weigh(targets)
    assert weights.tolist() == [4, 1, 3]
    with torch.no_grad():
        output = decoder(features, targets)
    total = 0.0
    for row, text in enumerate(TEXTS):
        labels = decoder.units.encode(text)
        log_probs = output.logits[row, : LENGTHS[row], None].log_softmax(-1)
        total += float(F.ctc_loss(log_probs, torch.tensor([labels]), [LENGTHS[row]], [len(labels)], reduction="sum"))
    torch.testing.assert_close(float(output.loss), total / 8)


def test_the_loss_of_a_batch_is_that_of_its_parts_by_their_weight() -> None:
    decoder, features = build(dropout=0.0), bundle()
    decoder.train()  # with label priors, which are each row's own
    targets = decoder.encode_targets([*TEXTS[:2], ""])
    weights = decoder.weigh(targets)
    assert weights.tolist() == [4, 1, 1], "an empty transcript counts as one label"
    parts = [
        float(decoder({"audio": features["audio"].select(torch.tensor([row]))}, targets[row : row + 1]).loss.detach())
        for row in range(3)
    ]
    whole = float(decoder(features, targets).loss.detach())
    torch.testing.assert_close(whole, sum(p * float(w) for p, w in zip(parts, weights, strict=True)) / 6)
    decoder.eval()
    torch.testing.assert_close(float(decoder(features, targets).loss.detach()), whole)


def test_it_learns_to_write_what_it_hears_and_when() -> None:
    texts = ["ab b", "b ab", "ba a"]
    decoder = build(texts, dropout=0.0)
    features = bundle([12, 12, 12])
    targets = decoder.encode_targets(texts)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    decoder.train()
    for _ in range(80):
        optimizer.zero_grad()
        decoder(features, targets).loss.backward()
        optimizer.step()
    answers = decoder.eval().predict(decoder(features))
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert [word["word"] for word in answer["words"]] == answer["text"].split()
        times = [time for word in answer["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times)
        assert times[0] >= 0 and times[-1] <= 1.2
        assert 0.5 < answer["score"] <= 1


def test_a_row_alone_is_answered_as_in_a_batch_and_padding_changes_nothing() -> None:
    decoder, features = build(), bundle()
    together = decoder.predict(decoder(features))
    for row, length in enumerate(LENGTHS):
        alone = {"audio": Features(features["audio"].tokens[row : row + 1, :length], torch.ones(1, length).bool())}
        assert decoder.predict(decoder(alone)) == [together[row]]


def test_without_details_or_the_length_of_a_token_there_are_no_times() -> None:
    assert all(set(answer) == {"text"} for answer in build().predict(build()(bundle()), details=False))
    timeless = build(seconds=None)
    assert all(set(answer) == {"text", "score"} for answer in timeless.predict(timeless(bundle())))


def test_a_row_that_is_too_short_for_its_transcript_is_said_and_counts_nothing() -> None:
    decoder = build(["aab"])
    targets = decoder.encode_targets(["aab", "aab"])  # at least 4 tokens: a blank parts the two a
    assert float(decoder(bundle([4, 4]), targets).loss.detach()) > 0
    with pytest.warns(UserWarning, match="a transcript has 3 labels, and its recording 3 tokens"):
        output = decoder(bundle([4, 3]), targets)
    output.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in decoder.parameters())
    one = decoder({"audio": bundle([4, 3])["audio"].select(torch.tensor([0]))}, targets[:1])
    torch.testing.assert_close(output.loss, one.loss / 2)


def test_training_on_rows_that_are_all_too_short_is_warned_of_once() -> None:
    decoder = build(["aab"]).train()
    targets = decoder.encode_targets(["aab", "aab"])
    with pytest.warns(UserWarning, match="3 labels, and its recording 2 tokens, too few"):
        assert float(decoder(bundle([2, 2]), targets).loss.detach()) == 0
    decoder(bundle([2, 2]), targets).loss.backward()  # warnings are errors here


def test_a_reference_that_cannot_be_written_gives_no_loss_and_does_not_change_that_of_others() -> None:
    for units in ("character", "bpe"):
        decoder, features = build(units=units), bundle()["audio"]
        targets = decoder.encode_references(["ab a", "", "a, b"])
        assert torch.equal(targets[:2], decoder.encode_targets(["ab a", ""])[:, : targets.shape[1]])
        assert decoder.weigh(targets).tolist() == [int((targets[0] > 0).sum()), 1, 0]
        loss = decoder({"audio": features}, targets).loss
        torch.testing.assert_close(loss, decoder({"audio": features.select(torch.arange(2))}, targets[:2]).loss)
        assert float(decoder({"audio": features.select(torch.tensor([2]))}, targets[2:]).loss.detach()) == 0
    with pytest.raises(InputError, match="the transcript is missing") as caught:
        build().encode_references(["a", None])
    assert caught.value.row == 1


def test_text_takes_the_case_of_a_vocabulary_that_has_one_alone() -> None:
    for vocabulary, text in (("ab[UNK]", "ab"), ("AB<unk>", "AB"), ("aB", "aB")):
        pieces = [*vocabulary[:2], *([vocabulary[2:]] if vocabulary[2:] else [])]
        units = Units("character", pieces, lowercase=False)
        assert units.normal("aB") == text
        assert units.encode("aB") == [1, 2]


def test_a_head_without_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a vocabulary"):
        Ctc(Ctc.Config(), {"audio": Stream(D)})
    with pytest.raises(ValueError, match="twice"):
        Ctc.Config(vocabulary=("a", "a"))


def test_gaps_lie_before_the_words_that_begin() -> None:
    units = {"character": [0, 2, 2, 0, 0, 1, 2, 0], "word": [0, 1, 1, 0, 0, 2, 2, 0]}
    for kind, path in units.items():
        vocabulary = (" ", "a") if kind == "character" else ("a", "b")
        decoder = Ctc(Ctc.Config(units=kind, vocabulary=vocabulary), {"audio": Stream(D)})
        gaps = decoder.gaps(torch.eye(3)[path])
        assert gaps == ([(3, 5)] if kind == "character" else [(0, 1), (3, 5)])


def test_characters_and_words_are_joined_by_blanks() -> None:
    assert Units("word", ["a", "b"]).text([1, 2, 2]) == "a b b"
    assert Units("character", [" ", "a"]).text([1, 2, 1, 2, 1]) == "a a"


def test_the_gradient_with_priors_is_that_of_all_paths_that_write_the_transcript() -> None:
    decoder = build(["a b", "b"], units="word", dropout=0.0, prior=0.5).train()
    features, lengths, labels = bundle([5, 4])["audio"], [5, 4], [[1, 2], [2]]
    loss = decoder({"audio": features}, decoder.encode_targets(["a b", "b"])).loss
    (found,) = torch.autograd.grad(loss, decoder.head.weight)
    log_probs = decoder.head(features.tokens).log_softmax(-1)
    total = torch.zeros(())
    for row, (length, wanted) in enumerate(zip(lengths, labels, strict=True)):
        paths = [path for path in product(range(3), repeat=length) if collapse(path) == wanted]

        def likelihood(heard: Tensor, paths: list[Any] = paths) -> Tensor:
            return torch.stack([sum(heard[t, label] for t, label in enumerate(path)) for path in paths]).logsumexp(0)

        recognised = (likelihood(log_probs[row]).detach() / len(wanted)).exp()
        total = total - likelihood(without_prior(log_probs[row, :length], 0.5 * recognised))
    (wanted_gradient,) = torch.autograd.grad(total / 3, decoder.head.weight)
    assert abs(float(loss.detach()) - float(total.detach()) / 3) > 1e-3, "what is reported is the loss without priors"
    torch.testing.assert_close(found, wanted_gradient)


def collapse(path: tuple[int, ...]) -> list[int]:
    return [label for t, label in enumerate(path) if label and (not t or label != path[t - 1])]


@pytest.mark.gpu
def test_loss_and_answers_on_a_gpu_are_those_on_the_cpu() -> None:
    decoder, features = build(), bundle()
    targets = decoder.encode_targets(TEXTS)
    here = decoder(features, targets)
    there = decoder.cuda()({"audio": features["audio"].to("cuda")}, targets.cuda())
    torch.testing.assert_close(there.loss.cpu(), here.loss, atol=1e-4, rtol=1e-4)
    assert [a["text"] for a in decoder.predict(there)] == [a["text"] for a in decoder.predict(here)]
