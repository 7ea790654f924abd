"""Long recordings and sound that comes in: windows, pieces and streams around a CTC decoder that knows four tones."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mmhub.batch import Features
from mmhub.cli.speech import check_speech, check_writing
from mmhub.config import check_recipe
from mmhub.engine.data import TrainingData
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import evaluate
from mmhub.fusion.streams import Streams
from mmhub.interfaces import ComponentConfig, Encoder, Processor, find_task
from mmhub.model import Model
from mmhub.speech import transcribe
from mmhub.speech.ctc import Stream, align, segments, transcribe_ctc
from mmhub.speech.silence import PAD

audio = pytest.importorskip("mmhub_audio.processor")
ctc = pytest.importorskip("mmhub_heads.ctc")

RATE = 8000  # Hz
HOP = 80  # samples a token, 10 ms
WORDS = ("do", "re", "mi", "fa")
PITCHES = (400, 800, 1200, 1600)  # Hz


class Tones(Encoder):
    """How loud each pitch is in every 10 ms."""

    class Config(ComponentConfig, frozen=True):
        """Nothing to configure."""

    modality, padding_invariant, dim, token_seconds = "audio", True, len(PITCHES), HOP / RATE

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        phases = 2j * math.pi * torch.arange(HOP)[:, None] * torch.tensor(PITCHES) / RATE
        self.register_buffer("waves", torch.exp(phases) * 2 / HOP, persistent=False)

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> Any:
        return audio.AudioProcessor(audio.AudioProcessor.Config(sample_rate=RATE, min_samples=HOP))

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Any:
        return cls.make_processor(config)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        count = data.shape[1] // HOP
        frames = data[:, : count * HOP].reshape(len(data), count, HOP).to(torch.complex64)
        real = torch.arange(count)[None] < (mask.sum(1) // HOP)[:, None]
        return Features((frames @ self.waves).abs() * real[..., None], real)


class Edgy(Tones):
    """Hears nothing in the first and last 200 ms of what it is given, as a network does without what is beyond."""

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        heard = super().forward(data, mask)
        place, last = torch.arange(heard.mask.shape[1]), heard.mask.sum(1, keepdim=True) - 20
        inner = (place >= 20) & (place < last)
        return Features(heard.tokens * inner[..., None], heard.mask)


@pytest.fixture(scope="module")
def model() -> Model:
    return build(Tones)


def build(kind: type[Tones]) -> Model:
    encoder = kind(kind.Config(), kind.make_processor(None))
    decoder = ctc.Ctc(ctc.Ctc.Config(units="word", vocabulary=WORDS), {"audio": encoder.stream})
    with torch.no_grad():
        decoder.head.weight.copy_(torch.cat((torch.zeros(1, 4), 20 * torch.eye(4))))
        decoder.head.bias.copy_(torch.tensor([4.0, 0, 0, 0, 0]))
    fusion = Streams(Streams.Config(), {"audio": encoder.stream})
    return Model(find_task("speech-recognition"), {"audio": encoder}, fusion, decoder, {}).eval()


def song(seconds: float, rate: int = RATE, seed: int = 0) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Tones with pauses, and when each was."""
    rng = np.random.default_rng(seed)
    samples, words, place = np.zeros(int(seconds * rate), np.float32), [], 0.0
    while True:
        start, end = (round(place + part, 2) for part in np.cumsum(rng.uniform(0.1, 0.6, 2)))
        if end > seconds:
            return samples, words
        word = int(rng.integers(len(WORDS)))
        times = np.arange(round(start * rate), round(end * rate)) / rate
        samples[round(start * rate) : round(end * rate)] = np.sin(2 * np.pi * PITCHES[word] * times)
        words.append({"word": WORDS[word], "start": start, "end": end})
        place = end


def text_of(words: list[dict[str, Any]]) -> str:
    return " ".join(word["word"] for word in words)


def raw(samples: np.ndarray, rate: int = RATE) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": rate}


def assert_times(found: list[dict[str, Any]], wanted: list[dict[str, Any]], within: float) -> None:
    assert [word["word"] for word in found] == [word["word"] for word in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert abs(one["start"] - other["start"]) <= within
        assert abs(one["end"] - other["end"]) <= within


def test_a_long_recording_is_written_down_as_if_heard_at_once(model: Model) -> None:
    samples, words = song(95.3)
    sample = {"audio": raw(samples)}
    (whole,) = transcribe_ctc(model, [sample], window=200)
    assert whole["text"] == text_of(words)
    assert_times(whole["words"], words, PAD + 0.011)
    for window, overlap in ((10, 1.0), (7.3, 1.7), (30, -1.0), (5, 0.0)):
        (cut,) = transcribe_ctc(model, [sample], window=window, overlap=overlap)
        if overlap:  # without, a tone on an edge may be heard twice
            assert cut["text"] == whole["text"]
            assert_times(cut["words"], whole["words"], 0.011)
    assert whole["segments"][0]["text"].split()[0] == words[0]["word"]
    assert " ".join(segment["text"] for segment in whole["segments"]) == whole["text"]


def test_of_what_two_windows_heard_each_gives_the_half_that_is_further_from_its_edge() -> None:
    model, sample = build(Edgy), {"audio": raw(song(40)[0])}
    (whole,) = transcribe_ctc(model, [sample], window=200)
    (cut,) = transcribe_ctc(model, [sample], window=8, overlap=1)
    assert cut["text"] == whole["text"]
    assert_times(cut["words"], whole["words"], 0.011)


def test_recordings_of_any_length_are_answered_in_order_however_many_windows_are_heard_at_once(model: Model) -> None:
    songs = [song(seconds, seed=seed) for seed, seconds in enumerate((3.0, 25.0, 0.5, 12.0))]
    samples = [{"audio": raw(samples)} for samples, _ in songs]
    together = transcribe_ctc(model, samples, window=6, overlap=1)
    assert [answer["text"] for answer in together] == [text_of(words) for _, words in songs]
    assert together == transcribe_ctc(model, samples, window=6, overlap=1, batch_size=1)
    assert together[2] == {"text": "", "words": [], "segments": [], "score": 1.0} or songs[2][1]


def test_only_so_many_windows_are_in_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    encode = model.encoders["audio"].forward

    def spy(data: Tensor, mask: Tensor) -> Any:
        seen.append(tuple(data.shape))
        return encode(data, mask)

    monkeypatch.setattr(model.encoders["audio"], "forward", spy)
    transcribe_ctc(model, [{"audio": raw(song(100)[0])}], window=5, overlap=1, batch_size=3)
    assert len(seen) == 9
    assert max(shape[0] for shape in seen) == 3
    assert max(shape[1] for shape in seen) == 5 * RATE


def test_a_search_may_be_asked_for(model: Model) -> None:
    samples, words = song(10)
    (found,) = transcribe_ctc(model, [{"audio": raw(samples)}], search={"beams": 4})
    assert found["text"] == text_of(words)
    with pytest.raises(UsageError, match="unknown key 'beam'"):
        transcribe_ctc(model, [{"audio": raw(samples)}], search={"beam": 4})


def test_a_stream_says_what_it_has_heard_and_ends_with_the_answer_for_the_whole(model: Model) -> None:
    samples, words = song(40.6)
    stream = Stream(model, RATE, window=8, overlap=2)
    place, said = 0, [""]
    for size in (1, 50, 4000, 12345, 800, 90000, *[11111] * 40):
        said.append(stream.feed(samples[place : place + size]))
        place += size
        settled = text_of([word for word in words if word["end"] < min(place, len(samples)) / RATE - 8])
        assert said[-1].startswith(settled)
    assert said[2] == ""
    assert said[-1] == text_of(words)
    (whole,) = transcribe_ctc(model, [{"audio": raw(samples)}], window=8, overlap=2)
    assert stream.finish() == whole
    assert stream.feed(samples[: 3 * RATE]) == text_of([word for word in words if word["start"] < 3]), "it begins anew"


def test_a_stream_at_another_rate_hears_the_same_words(model: Model) -> None:
    samples, words = song(21.7, rate=22050)
    stream = Stream(model, 22050, window=6, overlap=1)
    for place in range(0, len(samples), 30000):
        stream.feed(torch.from_numpy(samples[place : place + 30000]))
    answer = stream.finish()
    assert answer["text"] == text_of(words)
    assert_times(answer["words"], words, PAD + 0.03)
    assert Stream(model, RATE).finish()["text"] == ""


def test_a_known_text_is_timed(model: Model) -> None:
    samples, words = song(9)
    assert_times(align(model, raw(samples), text_of(words).upper()), words, PAD + 0.011)
    with pytest.raises(InputError, match="the vocabulary lacks 'sol'") as caught:
        align(model, raw(samples), "do sol")
    assert caught.value.hint == "give what was said, in units that the model knows"


def test_words_between_pauses_are_one_segment() -> None:
    words = [{"word": str(n), "start": float(n), "end": n + 0.6 - 0.2 * (n == 2)} for n in range(4)]
    assert [segment["text"] for segment in segments(words)] == ["0 1 2", "3"]
    assert segments(words)[0] | {"text": ""} == {"text": "", "start": 0.0, "end": 2.4}


def test_a_channel_is_picked_once_from_recordings_and_streams() -> None:
    model, (samples, words) = build(Tones), song(12)
    processor: Any = model.processors["audio"]
    model.encoders["audio"].processor = type(processor)(msgspec.structs.replace(processor.config, channel=1))
    (found,) = transcribe_ctc(model, [{"audio": raw(np.stack((song(12, seed=1)[0], samples)))}], window=5)
    assert found["text"] == text_of(words)
    stream = Stream(model, RATE)
    stream.feed(samples)
    assert stream.finish()["text"] == text_of(words)


def test_a_processor_that_cuts_no_windows_hears_recordings_at_once() -> None:
    model, (samples, words) = build(Tones), song(35)

    class Whole(type(model.processors["audio"])):  # type: ignore[misc]
        windows = Processor.windows

    model.encoders["audio"].processor = Whole(model.processors["audio"].config)  # type: ignore[union-attr]
    (found,) = model.predict([{"audio": {"bytes": wav(samples), "path": None}}])
    assert_times(found["words"], words, 0.05)
    assert align(model, raw(samples), found["text"]) == found["words"]


def test_times_are_given_whether_asked_for_or_not(model: Model) -> None:
    sample = {"audio": raw(song(3)[0])}
    answers = [transcribe(model, [sample], timestamps=kind) for kind in ("none", "segment", "word")]  # type: ignore[arg-type]
    assert answers[0] == answers[1] == answers[2]
    assert set(answers[0][0]) == {"text", "words", "segments", "score"}


def test_what_a_model_that_hears_frame_by_frame_cannot_do_is_said_before(model: Model) -> None:
    with pytest.raises(UsageError, match=r"--max-new-tokens is for models that write, and .* hears frame by frame"):
        check_writing(model, {"max_new_tokens": 3})
    lasting = build(type("Untimed", (Tones,), {"token_seconds": None}))
    with pytest.raises(UsageError, match="does not say what a token lasts"):
        check_speech(lasting, {}, Path("a.srt"), 1)
    with pytest.raises(UsageError, match="cannot hear nan s at once"):
        Stream(model, RATE, window=math.nan)


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_a_recording_that_cannot_be_read_is_named(model: Model) -> None:
    good = {"audio": raw(song(2)[0])}
    with pytest.raises(InputError) as caught:
        transcribe_ctc(model, [good, {"audio": b"no sound"}])
    assert (caught.value.row, caught.value.modality) == (1, "audio")
    for bad in (np.zeros((2, 3), np.float32), np.array([1, 2]), np.array([math.nan])):
        with pytest.raises(InputError, match="feed finite mono samples"):
            Stream(model, RATE).feed(bad)
    with pytest.raises(UsageError, match="cannot hear 2 s at once that share 2 s"):
        Stream(model, RATE, window=2)


def test_references_with_other_units_are_compared_and_left_out_of_the_loss(model: Model) -> None:
    samples, words = song(2.0)
    right, other = text_of(words), text_of(words).replace(words[0]["word"], "sol")
    rows = [{"audio": raw(samples), "text": text} for text in (right, f"{right.title()}!", other)]
    one, both, all_three = (evaluate(model, rows[:n], target="text")["metrics"] for n in (1, 2, 3))
    assert one["loss"] == pytest.approx(both["loss"]) == pytest.approx(all_three["loss"])
    assert both["wer"] == 0 < all_three["substitutions"]
    assert all_three["words"] == 3 * len(words)


def test_validation_transcripts_with_other_units_do_not_stop_a_training(model: Model, tmp_path: Path) -> None:
    for name, text in (("train", "do re"), ("valid", "do, sol")):
        (tmp_path / f"{name}.csv").write_text(f'audio,text\na.wav,"{text}"\n')
    tables = {name: str(tmp_path / f"{name}.csv") for name in ("train", "valid")}
    settings: dict[str, Any] = {
        "task": "speech-recognition",
        "model": {"encoders": {"audio": {"use": "cnn"}}, "decoder": {"use": "ctc"}},
        "data": {**tables, "inputs": {"audio": "audio"}, "target": "text"},
    }
    TrainingData(check_recipe(settings), model.task, tmp_path).check_targets(model)
    settings |= {"model": {"base": "any"}, "data": settings["data"] | {"train": tables["valid"]}}
    with pytest.raises(InputError, match="the vocabulary lacks 'do,'"):
        TrainingData(check_recipe(settings), model.task, tmp_path).check_targets(model)


def test_a_model_without_ctc_is_refused(model: Model) -> None:
    other = Model(model.task, dict(model.encoders.items()), model.fusion, torch.nn.Identity(), {})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no CTC decoder"):
        transcribe_ctc(other, [{"audio": raw(song(2)[0])}])
