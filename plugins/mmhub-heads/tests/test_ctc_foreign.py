"""Speech recognisers of transformers: read as a whole, with equal logits and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.errors import UsageError
from mmhub.hub.foreign import load_foreign
from mmhub.interfaces import Stream
from mmhub_heads.ctc import Ctc

pytest.importorskip("mmhub_audio")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
NAMES = ["<s>", "|", "A", "B", "'", "<pad>", "</s>", "<unk>"]
CLIPS = [0.1 * np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((4000, 3000, 3543))]


def save(folder: Path, kind: str = "Wav2Vec2", blank: int = 5, **tokenizer: Any) -> Any:
    """A recogniser with random weights; return it and its processor."""
    torch.manual_seed(0)
    names = list(NAMES)
    names.insert(blank, names.pop(NAMES.index("<pad>")))
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    config = getattr(transformers, f"{kind}Config")(**SIZES, vocab_size=len(names), pad_token_id=blank)
    model = getattr(transformers, f"{kind}ForCTC")(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    model.save_pretrained(folder)
    reader = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **tokenizer)
    reader.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return model, reader


@pytest.mark.parametrize(("kind", "blank"), [("Wav2Vec2", 0), ("Wav2Vec2", 5), ("Hubert", 0), ("WavLM", 5)])
def test_logits_and_texts_equal_those_of_transformers(tmp_path: Path, kind: str, blank: int) -> None:
    library, tokenizer = save(tmp_path, kind, blank)
    model = load_foreign("it", tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    samples = [{"audio": {"array": clip, "sampling_rate": 16000}} for clip in CLIPS]
    found = model.decoder.predict(model(model.collate(samples)))
    for clip, sample, answer in zip(CLIPS, samples, found, strict=True):
        with torch.no_grad():
            wanted = library(**extractor(clip, sampling_rate=16000, return_tensors="pt")).logits
            logits = model(model.collate([sample])).logits
        order = [blank, *(number for number in range(len(NAMES)) if number != blank)]
        torch.testing.assert_close(logits, wanted[..., order], atol=1e-5, rtol=1e-5)
        assert answer["text"] == tokenizer.decode(wanted[0].argmax(-1))
        assert len(answer["text"]) > 10
        assert [word["word"] for word in answer["words"]] == answer["text"].split()


def test_a_tokenizer_of_lower_case_writes_lower_case(tmp_path: Path) -> None:
    library, tokenizer = save(tmp_path, do_lower_case=True)
    model = load_foreign("it", tmp_path)
    samples = [{"audio": {"array": CLIPS[0], "sampling_rate": 16000}}]
    (answer,) = model.decoder.predict(model(model.collate(samples)))
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = library(**extractor(CLIPS[0], sampling_rate=16000, return_tensors="pt")).logits
    assert answer["text"] == tokenizer.decode(wanted[0].argmax(-1))
    assert "b" in answer["text"]
    assert answer["text"] == answer["text"].lower()


def test_a_text_is_written_in_the_capitals_of_the_vocabulary(tmp_path: Path) -> None:
    save(tmp_path)
    decoder = load_foreign("it", tmp_path).decoder
    assert isinstance(decoder, Ctc)
    assert decoder.units.text(decoder.encode_targets(["ab  a'b"])[0].tolist()) == "AB A'B"
    assert decoder.references(["ab  a'b"]) == ["AB A'B"]


def test_the_head_can_be_taken_into_a_recipe_and_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    library, _ = save(tmp_path)
    head = Ctc.from_library(Ctc.Config(), tmp_path, {"audio": Stream(16)})
    assert torch.equal(head.head.weight[0], library.lm_head.weight[5])
    with pytest.raises(UsageError, match="reads tokens of width 16, and they have 12"):
        Ctc.from_library(Ctc.Config(), tmp_path, {"audio": Stream(12)})
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": {"a": 0}}))
    with pytest.raises(UsageError, match="for several languages"):
        Ctc.from_library(Ctc.Config(), tmp_path, {"audio": Stream(16)})
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UsageError, match=r"has no vocab\.json"):
        Ctc.from_library(Ctc.Config(), tmp_path, {"audio": Stream(16)})
