"""Whisper's decoder on features of its encoder: token for token what transformers writes, with times and languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, WhisperConfig, WhisperForConditionalGeneration

import mmhub
from mmhub.batch import Bundle, Features
from mmhub.errors import InputError, UsageError
from mmhub.generate import write
from mmhub.interfaces import Generation, Stream, decode_config, encode_config
from mmhub_text.transformers_seq2seq import IGNORE, TransformersSeq2Seq

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps"]
IDS = {name: 256 + place for place, name in enumerate(SPECIAL)}
TIMES = 101  # of 2 seconds
SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 100,
    "max_target_positions": 24,
    "num_mel_bins": 80,
}


def save_whisper(folder: Path, several: bool = False, seed: int = 0) -> WhisperForConditionalGeneration:
    """A tiny Whisper of 2-second windows, with random weights, in transformers' layout."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    end = IDS["endoftext"]
    config = WhisperConfig(
        **SIZES,
        vocab_size=256 + len(SPECIAL) + TIMES,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=IDS["startoftranscript"],
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    table: dict[str, Any] = {"no_timestamps_token_id": IDS["notimestamps"], "max_initial_timestamp_index": 50}
    table |= {"max_length": 24, "begin_suppress_tokens": [32, end], "is_multilingual": several}
    table |= {"suppress_tokens": [1, 2, 7, *(IDS[name] for name in SPECIAL[1:7])]}
    if several:
        table |= {"lang_to_id": {"<|en|>": IDS["en"], "<|de|>": IDS["de"]}}
        table |= {"task_to_id": {name: IDS[name] for name in ("transcribe", "translate")}, "task": "transcribe"}
    model.save_pretrained(folder)
    settings = folder / "generation_config.json"
    known = json.loads(settings.read_text()) | table
    known.pop("_from_model_config", None)  # else the library takes it for a copy of config.json
    settings.write_text(json.dumps(known))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    names = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **names}))
    return WhisperForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["one language", "several"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[WhisperForConditionalGeneration, TransformersSeq2Seq]:
    folder = tmp_path_factory.mktemp("whisper")
    return save_whisper(folder, request.param), read(folder)


def read(folder: Path, **config: Any) -> TransformersSeq2Seq:
    settings = TransformersSeq2Seq.Config(**config)
    return TransformersSeq2Seq.from_library(settings, folder, {"audio": Stream(16, seconds=0.02)}).eval()


def frames(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 80, 200, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def heard(model: Any, data: torch.Tensor) -> Bundle:
    tokens = model.get_encoder()(data).last_hidden_state
    return {"audio": Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))}


def ids_of(decoder: Any, bundle: Bundle, beams: int) -> list[list[int]]:
    settings = msgspec.structs.replace(decoder.generation, beams=beams)
    return [list(found.ids) for (found,) in write(decoder, bundle, settings)]


def theirs(model: Any, data: torch.Tensor, beams: int, **options: Any) -> list[list[int]]:
    end = model.generation_config.eos_token_id
    found = model.generate(data, num_beams=beams, force_unique_generate_call=True, **options)
    return [cut(row, end) for row in found.tolist()]


def cut(row: list[int], end: int) -> list[int]:
    """What was written, without what stands before it and behind the end."""
    before = {IDS[name] for name in SPECIAL[1:]}
    start = next(place for place, token in enumerate(row) if token not in before)
    stop = row.index(end, start) + 1 if end in row[start:] else len(row)
    return row[start:stop]


@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_the_tokens_of_transformers(pair: Any, beams: int) -> None:
    model, decoder = pair
    expected = theirs(model, frames(), beams)
    assert len({tuple(row) for row in expected}) == 3  # else all would be the same whatever is heard
    assert ids_of(decoder, heard(model, frames()), beams) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_times_as_transformers_does(pair: Any, beams: int) -> None:
    model, decoder = pair
    expected = theirs(model, frames(), beams, return_timestamps=True)
    assert all(any(token > IDS["notimestamps"] for token in row) for row in expected)
    assert ids_of(decoder.dictation(times=True), heard(model, frames()), beams) == expected


def test_some_tokens_never_come_and_some_not_first(pair: Any) -> None:
    model, decoder = pair
    never = set(model.generation_config.suppress_tokens)
    for length, excluded in ((0, never | {32, IDS["endoftext"]}), (1, never)):
        limited = decoder.limit(torch.zeros(1, model.config.vocab_size), torch.full((1, length), 5))
        assert set(limited[0].isneginf().nonzero().flatten().tolist()) == excluded


def test_a_language_is_told_or_found_out_and_speech_is_translated(tmp_path: Path) -> None:
    model, decoder = save_whisper(tmp_path, several=True, seed=3), read(tmp_path)
    data = frames()
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"language": "de"}, {"language": "de"}),
        ({"language": "German", "translate": True}, {"language": "german", "task": "translate"}),
        ({"translate": True}, {"task": "translate"}),
        ({}, {}),
    ]
    written = []
    for ours, options in ways:
        expected = theirs(model, data, 1, **options)
        assert ids_of(decoder.dictation(**ours), heard(model, data), 1) == expected
        written.append(expected)
    assert written[0] != written[1] != written[2]
    with pytest.raises(UsageError, match="knows no language 'klingon'"):
        decoder.dictation(language="klingon")


def test_its_loss_is_that_of_transformers_on_the_text_alone(tmp_path: Path) -> None:
    model, decoder = save_whisper(tmp_path), read(tmp_path)
    targets, lead = ["a dog", "no"], [IDS["startoftranscript"], IDS["notimestamps"]]
    encoded = decoder.encode_targets(targets)
    assert encoded[:, 0].tolist() == [IGNORE] * 2  # it is given and not chosen
    bundle, total, count = heard(model, frames(2)), 0.0, 0
    for row, text in enumerate(targets):
        ids = [*AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False).input_ids, IDS["endoftext"]]
        with torch.no_grad():
            logits = model(frames(2)[row : row + 1], decoder_input_ids=torch.tensor([lead + ids[:-1]])).logits[0, 1:]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        count += len(ids)
    with torch.no_grad():
        loss = decoder(bundle, encoded).loss
        first = decoder(bundle).logits
        expected = model(frames(2), decoder_input_ids=torch.tensor([lead, lead])).logits[:, -1]
    assert loss is not None and float(loss) == pytest.approx(total / count, abs=1e-5)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="the decoder has positions for 24"):
        decoder.encode_targets(["far too long a text for this model"])


def test_without_a_language_targets_are_refused_until_it_is_set(tmp_path: Path) -> None:
    save_whisper(tmp_path, several=True)
    with pytest.raises(UsageError, match="nothing says which language the targets are in"):
        read(tmp_path).encode_targets(["ja"])
    clip = {"array": np.sin(np.arange(16000) / 20).astype(np.float32), "sampling_rate": 16000}
    report = mmhub.evaluate(str(tmp_path), [{"audio": clip, "text": "ja"}], target="text")
    assert "wer" in report["metrics"] and "loss" not in report["metrics"], "texts are compared without a language"
    decoder = read(tmp_path, language="de")
    assert torch.equal(decoder.encode_references(["ja"]), decoder.encode_targets(["ja"]))
    assert decoder.given == (IDS["de"], IDS["transcribe"], IDS["notimestamps"])
    assert decoder.encode_targets(["ja"]).shape == (1, 6)


def test_a_folder_without_settings_of_writing_has_its_tokens_found_by_name(tmp_path: Path) -> None:
    save_whisper(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    decoder = read(tmp_path)
    assert decoder.given == (IDS["notimestamps"],)
    assert decoder.config.speech is not None and not decoder.config.speech.languages
    table = json.loads((tmp_path / "config.json").read_text())
    table["forced_decoder_ids"] = [[1, IDS["de"]], [2, IDS["transcribe"]], [3, IDS["notimestamps"]]]
    (tmp_path / "config.json").write_text(json.dumps(table))
    decoder = read(tmp_path)
    assert decoder.given == (IDS["de"], IDS["transcribe"], IDS["notimestamps"])
    assert decoder.dictation(language="en", translate=True).known[:2] == (IDS["en"], IDS["translate"])


def test_rows_do_not_depend_on_their_batch_and_a_saved_decoder_writes_the_same(pair: Any) -> None:
    model, decoder = pair
    bundle = heard(model, frames())
    together = ids_of(decoder, bundle, 3)
    alone = [ids_of(decoder, {"audio": bundle["audio"].select(torch.tensor([row]))}, 3)[0] for row in range(3)]
    assert alone == together
    config = decode_config(TransformersSeq2Seq.Config, json.loads(json.dumps(encode_config(decoder.config))), "config")
    state, files = json.loads(json.dumps(decoder.processor.state())), decoder.processor.files()
    again = TransformersSeq2Seq(config, {"audio": Stream(16)}, decoder.load_processor(config, state, files)).eval()
    again.load_state_dict(decoder.state_dict())
    assert ids_of(again, bundle, 3) == together


def test_what_follows_the_last_whole_segment_is_heard_again() -> None:
    class Stub:
        class config:
            speech = decode_config(TransformersSeq2Seq.Config, {"speech": {"untimed": 10}}, "config").speech
            language = ""

        processor = type("P", (), {"stop_ids": (9,), "end_id": 9, "begin_id": 9})()
        start, generation, positions = 8, Generation(), None

    from mmhub_text.dictation import Dictation

    timed, plain = Dictation(Stub(), times=True), Dictation(Stub())  # type: ignore[arg-type]
    assert timed.heard([11, 1, 2, 61, 61, 3, 9]) == ([11, 1, 2, 61, 61], 1.0)  # 50 steps of 20 ms, then begun again
    assert timed.heard([11, 1, 61, 61, 3, 86, 9]) == ([11, 1, 61, 61, 3, 86], None)  # ends with a single time
    assert timed.heard([11, 1, 2, 9]) == ([11, 1, 2], None)
    assert plain.heard([1, 2, 9]) == ([1, 2], None)


def test_languages_of_a_model_for_one_language_and_of_other_decoders_are_refused(tmp_path: Path) -> None:
    save_whisper(tmp_path)
    with pytest.raises(UsageError, match="this model knows one language alone"):
        read(tmp_path).dictation(language="en")
    with pytest.raises(UsageError, match="reads the 16 features of its own encoder"):
        TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(), tmp_path, {"audio": Stream(8)})
