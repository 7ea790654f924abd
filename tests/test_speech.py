"""Speech to text: Whisper folders as they are give what transformers' own pipeline gives, whatever the length."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

import mmhub
from mmhub.cli.predict import predict
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.interfaces import Generation, Policy
from mmhub.model import Model
from mmhub.speech import transcribe

transformers = pytest.importorskip("transformers")
pytest.importorskip("mmhub_text")
pytest.importorskip("mmhub_audio")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

RATE = 16000
SPECIAL = ["endoftext", "startoftranscript", "startofprev", "notimestamps"]
END, START, UNTIMED = 256, 257, 259


def save_whisper(folder: Path) -> Path:
    """A tiny Whisper of 3-second windows with random weights, in transformers' layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in LAYERS.items()}
    config = transformers.WhisperConfig(
        **sizes, d_model=16, max_source_positions=150, max_target_positions=20, vocab_size=260 + 151, **IDS
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=3).save_pretrained(folder)
    settings: dict[str, Any] = {
        **IDS,
        "no_timestamps_token_id": UNTIMED,
        "max_initial_timestamp_index": 50,
        "max_length": 20,
    }
    settings |= {"begin_suppress_tokens": [32, END], "suppress_tokens": [1, 2, 7, START, 258]}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"is_multilingual": False}))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    names = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **names}))
    return folder


LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
IDS = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def whisper(folder: Path) -> Model:
    return mmhub.load(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return transformers.pipeline("automatic-speech-recognition", model=str(folder), device="cpu")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Something that changes all the time, so that windows differ."""
    draw = np.random.default_rng(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * (200 + 300 * k) * times + 3 * np.sin((1 + k) * times)) for k in range(4))
    return (0.1 * tones * (1 + np.sin(5 * times)) + 0.02 * draw.standard_normal(len(times))).astype(np.float32)


def raw(clip: np.ndarray) -> dict[str, Any]:
    return {"audio": {"array": clip, "sampling_rate": RATE}}


def theirs(pipeline: Any, clip: np.ndarray, seconds: float = 3.0, **options: Any) -> dict[str, Any]:
    given = {"raw": clip.copy(), "sampling_rate": RATE}
    found = pipeline(given, chunk_length_s=seconds, ignore_warning=True, **options)
    answer = {"text": found["text"]}
    if options.get("return_timestamps"):
        answer["segments"] = [
            {"text": one["text"], "start": one["timestamp"][0], "end": one["timestamp"][1]} for one in found["chunks"]
        ]
    return answer


@pytest.mark.slow
def test_a_folder_of_transformers_gives_the_transcripts_of_its_pipeline(whisper: Model, pipeline: Any) -> None:
    clips = [noise(1.3, 1), noise(3.0, 2), noise(6.1, 3)]  # one window, and many
    expected = [theirs(pipeline, clip) for clip in clips]
    assert len({one["text"] for one in expected}) == 3
    assert whisper.predict([raw(clip) for clip in clips], batch_size=4) == expected


@pytest.mark.slow
def test_windows_make_the_same_text_in_batches_of_any_size(whisper: Model) -> None:
    samples = [raw(noise(5.3, 4)), raw(noise(0.4, 5))]
    assert transcribe(whisper, samples, batch_size=1) == transcribe(whisper, samples, batch_size=32)


@pytest.mark.slow
def test_a_long_recording_is_read_as_it_is_heard(whisper: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.speech import writing

    processor, opened, seen = whisper.processors["audio"], [0], []
    cut, write = processor.windows, vars(writing)["write"]

    def counted(*given: Any) -> Any:
        for window in cut(*given):
            opened[0] += 1
            yield window

    def noted(*given: Any, **more: Any) -> Any:
        seen.append(opened[0])
        return write(*given, **more)

    monkeypatch.setattr(processor, "windows", counted)
    monkeypatch.setattr(writing, "write", noted)
    assert transcribe(whisper, [raw(noise(18.1, 8)), raw(noise(1.0, 9))], batch_size=4)[1]["text"]
    assert sorted({*seen}) == [4, 8, 10]  # 9 windows, and one


def test_segments_and_their_times_are_those_of_the_pipeline(whisper: Model, pipeline: Any) -> None:
    for clip in (noise(1.7, 1), noise(4.5, 2)):
        ours = transcribe(whisper, [raw(clip)], timestamps="segment")[0]
        expected = theirs(pipeline, clip, return_timestamps=True)
        assert ours["text"] == expected["text"] and len(ours["segments"]) == len(expected["segments"])
        for one, other in zip(ours["segments"], expected["segments"], strict=True):
            assert one["text"] == other["text"] and one["start"] == pytest.approx(other["start"])
            assert one["end"] == pytest.approx(other["end"]) if other["end"] is not None else one["end"] <= 4.5


def test_greedy_settings_are_greedy_there_too(whisper: Model, pipeline: Any) -> None:
    from msgspec.structs import replace

    clip = noise(3.1, 6)
    decoder: Any = whisper.decoder
    settings = replace(decoder.generation, beams=1)
    expected = theirs(pipeline, clip, generate_kwargs={"num_beams": 1})
    assert transcribe(whisper, [raw(clip)], settings=settings) == [expected]


def test_what_is_drawn_depends_on_the_numbers_of_sample_and_window_alone(whisper: Model) -> None:
    samples = [raw(noise(seconds, seed)) for seed, seconds in enumerate((5.3, 1.0, 4.0))]
    settings = Generation(temperature=1.0, seed=3, max_new_tokens=9)
    together = transcribe(whisper, samples, settings=settings)
    assert together == transcribe(whisper, samples, settings=settings, batch_size=1)
    assert together[1:] == transcribe(whisper, samples[1:], settings=settings, first=1)
    same = transcribe(whisper, samples[:1] * 2, settings=settings)
    assert same[0] == together[0] != same[1]


@pytest.mark.slow
def test_a_saved_model_transcribes_the_same(whisper: Model, tmp_path: Path) -> None:
    clip = noise(2.7, 7)
    again = mmhub.load(str(whisper.save(tmp_path / "model")))
    assert again.task.name == "speech-recognition"
    assert again.predict([raw(clip)]) == whisper.predict([raw(clip)])


def test_a_recipe_trains_whisper_on_texts_and_measures_it(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(4):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, noise(1.0 + number / 4, number), RATE)
        rows.append({"audio": {"bytes": path.read_bytes(), "path": path.name}, "text": f"t {number}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    report = mmhub.train(
        {
            "task": "speech-recognition",
            "model": {
                "encoders": {"audio": {"use": "whisper", "init": str(folder)}},
                "decoder": {"use": "transformers-seq2seq", "init": str(folder)},
            },
            "data": {
                "train": str(tmp_path / "data.parquet"),
                "valid": str(tmp_path / "data.parquet"),
                "inputs": {"audio": "audio"},
                "target": "text",
            },
            "train": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "device": "cpu"},
        },
        out=tmp_path / "run",
    )
    assert {"wer", "cer", "normaliser", "loss"} <= set(report.metrics)
    model = mmhub.load(str(tmp_path / "run" / "model"))
    assert model.encoders["audio"].config.whole_window  # type: ignore[union-attr]
    measured = mmhub.evaluate(model, str(tmp_path / "data.parquet"))["metrics"]
    answers = model.predict([{"audio": row["audio"]} for row in rows])
    from mmhub.metrics.speech import speech

    assert measured["wer"] == pytest.approx(speech(answers, [row["text"] for row in rows])["wer"])


def test_predict_writes_json_and_subtitles(folder: Path, whisper: Model, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(3.1, 1), RATE, subtype="FLOAT")
    run = CliRunner()
    given = [str(folder), "--audio", str(tmp_path / "a.wav"), "-q"]
    found = run.invoke(predict, [*given, "--json", "--timestamps", "segment"])
    expected = transcribe(whisper, [{"audio": str(tmp_path / "a.wav")}], timestamps="segment")
    assert json.loads(found.stdout) == {"predictions": expected}
    assert run.invoke(predict, [*given, "--out", str(tmp_path / "a.srt")]).exit_code == 0
    twice = run.invoke(predict, [*given, *given[1:3], "--out", str(tmp_path / "b.vtt")])
    assert isinstance(twice.exception, UsageError) and "of one recording" in str(twice.exception)
    never = run.invoke(predict, [*given, "--timestamps", "none", "--out", str(tmp_path / "b.vtt")])
    assert isinstance(never.exception, UsageError) and "subtitles need times" in str(never.exception)
    nowhere = run.invoke(predict, [*given, "--out", "/proc/none/b.vtt"])
    assert isinstance(nowhere.exception, MmhubError) and "cannot write the predictions" in str(nowhere.exception)
    spoken = [one for one in expected[0]["segments"] if one["text"].strip()]
    assert (tmp_path / "a.srt").read_text().count("-->") == len(spoken) > 0


def test_what_cannot_be_done_is_said_in_one_line(whisper: Model) -> None:
    clip = raw(noise(1.0))
    with pytest.raises(UsageError, match="gives times of segments, not of words"):
        transcribe(whisper, [clip], timestamps="word")
    with pytest.raises(UsageError, match="this model knows one language alone"):
        transcribe(whisper, [clip], language="de")
    with pytest.raises(UsageError, match="windows of 4 s were asked for, and the model hears 3 s"):
        transcribe(whisper, [clip], window=4)
    with pytest.raises(UsageError, match="texts that end before a stop text are not for transcripts"):
        transcribe(whisper, [clip], settings=Generation(stop=("a",)))
    for option in ({"batch_size": 0}, {"window": math.nan}, {"window": -1.0}, {"overlap": math.nan}):
        with pytest.raises(UsageError, match=f"{next(iter(option))} is "):
            transcribe(whisper, [clip], **option)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the array lasts 1.0 s, more than the limit of 0.5 s"):
        transcribe(whisper, [clip], policy=Policy(max_seconds=0.5))
    with pytest.raises(InputError, match=r"the array lasts 4.0 s, but Whisper takes at most 3 s"):
        whisper.collate([raw(noise(4.0))])
    with pytest.raises(InputError, match=r"no file 'nowhere\.wav'") as caught:
        transcribe(whisper, [clip, {"audio": "nowhere.wav"}])
    assert caught.value.row == 1
    with pytest.raises(InputError, match="`mmhub predict` takes recordings of any length"):
        whisper.collate([raw(noise(3.1))])
    with pytest.raises(InputError, match=r"lasts 21601.0 s, more than the limit of 21600 s"):
        transcribe(whisper, [{"audio": {"array": np.zeros(21601 * 1000, np.int8), "sampling_rate": 1000}}])


@pytest.mark.gpu
def test_on_a_gpu_the_transcripts_are_the_same(folder: Path, whisper: Model) -> None:
    samples = [raw(noise(5.3, 4)), raw(noise(0.4, 5))]
    there = mmhub.load(str(folder), device="cuda")
    for times in ("none", "segment"):
        found = transcribe(there, samples, timestamps=times, batch_size=3)  # type: ignore[arg-type]
        assert found == transcribe(whisper, samples, timestamps=times)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_real_whisper_gives_the_transcripts_of_the_pipeline(tmp_path: Path) -> None:
    import io

    import pyarrow.parquet as pq

    shared = Path(os.environ.get("MMHUB_SHARED", Path(__file__).parents[2] / "shared"))
    place = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models"), "whisper-tiny.en")
    table = shared / "data" / "fsdd" / "valid.parquet"
    if not place.is_dir() or not table.is_file():
        pytest.skip("needs whisper-tiny.en in MMHUB_REAL_MODELS and data/fsdd in MMHUB_SHARED")
    rows = pq.read_table(table).slice(0, 130).to_pylist()
    words = [soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32") for row in rows]
    pause = np.zeros(1200, np.float32)
    import torchaudio

    def joined(count: int) -> np.ndarray:
        whole = np.concatenate([part for samples, _ in words[:count] for part in (samples, pause)])
        return torchaudio.functional.resample(torch.from_numpy(whole), words[0][1], RATE).numpy()

    pipeline = transformers.pipeline("automatic-speech-recognition", model=str(place), device="cpu")
    model = mmhub.load(str(place))
    for clip, times in ((joined(8), False), (joined(8), True), (joined(110), False)):
        expected = theirs(pipeline, clip, 30, return_timestamps=times or None)
        assert transcribe(model, [raw(clip)], timestamps="segment" if times else "none") == [expected]
