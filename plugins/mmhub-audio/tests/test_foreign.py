"""Whole audio models of transformers: read with their classifier, and written so that transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from mmhub.errors import UsageError
from mmhub.interfaces import ForeignParts, Policy, Stream
from mmhub_audio.classifier import AudioClassifier
from mmhub_audio.hooks import mmhub_load_foreign, mmhub_write_foreign

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
}
CLIPS = [0.1 * np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((8000, 5000, 6543))]


def save(folder: Path, kind: str, norm: str = "group", head: str = "ForSequenceClassification") -> Any:
    torch.manual_seed(0)
    more = {"id2label": {0: "up", 1: "down", 2: "stop"}, "feat_extract_norm": norm}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more, do_stable_layer_norm=norm == "layer")
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(folder)
    return model


def read(folder: Path) -> ForeignParts:
    (reader,) = mmhub_load_foreign(folder, json.loads((folder / "config.json").read_text()))
    return reader.read(folder)


@torch.no_grad()
def logits_of(parts: ForeignParts) -> Tensor:
    assert parts.decoder
    encoder, decoder, found = parts.encoder.eval(), parts.decoder.eval(), []
    for clip in CLIPS:
        items = encoder.processor([{"array": clip, "sampling_rate": 16000}], Policy())
        found.append(decoder({"audio": encoder(items.data, items.mask)}).logits)
    return torch.cat(found)


@torch.no_grad()
def library_logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForAudioClassification.from_pretrained(folder).eval()
    extract = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return torch.cat([model(**extract(clip, sampling_rate=16000, return_tensors="pt")).logits for clip in CLIPS])


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
def test_a_classifier_gives_the_logits_of_transformers_and_is_written_back_equal(
    kind: str, norm: str, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", kind, norm)
    expected = library_logits(tmp_path / "theirs")
    parts = read(tmp_path / "theirs")
    torch.testing.assert_close(logits_of(parts), expected, atol=1e-5, rtol=0)
    assert parts.decoder and parts.decoder.config.labels == ("up", "down", "stop")
    (writer,) = mmhub_write_foreign(parts.encoder, parts.decoder, "transformers")
    (tmp_path / "back").mkdir()
    writer.write(tmp_path / "back")
    torch.testing.assert_close(library_logits(tmp_path / "back"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("head", "left_out"), [("Model", ""), ("ForPreTraining", ""), ("ForCTC", "Wav2Vec2ForCTC")])
def test_what_has_no_classifier_is_an_encoder(head: str, left_out: str, tmp_path: Path) -> None:
    save(tmp_path / "theirs", "Wav2Vec2", head=head)
    parts = read(tmp_path / "theirs")
    assert (parts.decoder, parts.left_out, parts.task) == (None, left_out, "embedding")
    (writer,) = mmhub_write_foreign(parts.encoder, None, "transformers")
    (tmp_path / "back").mkdir()
    writer.write(tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back").eval()
    clip = torch.from_numpy(CLIPS[0])[None]
    with torch.no_grad():
        theirs = model(clip).last_hidden_state
        ours = parts.encoder.eval()(clip, torch.ones_like(clip, dtype=torch.bool)).tokens
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_sum_over_layers_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, "Wav2Vec2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_weighted_layer_sum": True}))
    assert read(tmp_path).left_out == "Wav2Vec2ForSequenceClassification"


def test_whisper_is_read_as_an_encoder_and_has_no_layout_to_write(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_source_positions": 100}
    config = transformers.WhisperConfig(**sizes, vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    parts = read(tmp_path)
    assert (parts.encoder_id, parts.left_out) == ("mmhub-audio/whisper", "WhisperForConditionalGeneration")
    assert list(mmhub_write_foreign(parts.encoder, None, "transformers")) == []


def test_other_models_and_other_heads_are_refused(tmp_path: Path) -> None:
    assert list(mmhub_load_foreign(tmp_path, {"model_type": "bert"})) == []
    save(tmp_path, "Hubert")
    (writer,) = mmhub_write_foreign(read(tmp_path).encoder, torch.nn.Identity(), "transformers")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the transformers layout cannot hold this model's head"):
        writer.write(tmp_path)
    with pytest.raises(UsageError, match="reads an audio encoder alone"):
        AudioClassifier(AudioClassifier.Config(labels=("a", "b")), {"fused": Stream(8)})
