"""wav2vec 2.0, HuBERT, WavLM and Whisper: equal to transformers, safe to load, unchanged by padding."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from mmhub.batch import pad_sequences
from mmhub.build import compose
from mmhub.errors import InputError, TrustError, UsageError
from mmhub.interfaces import Encoder, Policy, decode_config, encode_config
from mmhub_audio.wav2vec2 import Hubert, Wav2Vec2, WavLM
from mmhub_audio.whisper import Whisper

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 4, 4],
    "num_conv_pos_embeddings": 15,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.05,
    "apply_spec_augment": True,
}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
FAMILY: dict[Any, tuple[Any, Any, Any]] = {
    Wav2Vec2: (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, transformers.Wav2Vec2ForCTC),
    Hubert: (transformers.HubertConfig, transformers.HubertModel, transformers.HubertForCTC),
    WavLM: (transformers.WavLMConfig, transformers.WavLMModel, transformers.WavLMForCTC),
}
CASES = [pytest.param(cls, norm, id=f"{cls.name}-{norm}") for cls in FAMILY for norm in ("group", "layer")]
TINY_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "max_source_positions": 100,  # 2 seconds
}
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


def noise(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def save(folder: Path, cls: Any, norm: str, with_head: bool = False) -> Any:
    """Save a small random model as a transformers folder, and return the peer to compare with."""
    torch.manual_seed(0)
    config_class, base, head = FAMILY[cls]
    config = config_class(**TINY, **(LAYER if norm == "layer" else {}))
    model = head(config) if with_head else base(config)
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(
        folder
    )
    return base.from_pretrained(folder, local_files_only=True).eval()


def load(cls: Any, folder: Path, **config: Any) -> Encoder:
    encoder: Encoder = cls.from_library(decode_config(cls.Config, config, "config"), folder).eval()
    return encoder


@pytest.mark.parametrize(("cls", "norm"), CASES)
@torch.no_grad()
def test_a_transformers_folder_gives_transformers_features(cls: Any, norm: str, tmp_path: Path) -> None:
    peer = save(tmp_path, cls, norm)
    encoder = load(cls, tmp_path)
    assert encoder.padding_invariant == (norm == "layer")
    lengths = (4000, 2500) if norm == "layer" else (4000, 4000)
    clips = noise(*lengths)
    items = encoder.processor([{"array": c, "sampling_rate": 16000} for c in clips], Policy())
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt", padding=True)
    torch.testing.assert_close(items.data, inputs["input_values"], atol=1e-5, rtol=1e-5)
    expected = peer(**inputs).last_hidden_state
    features = encoder(items.data, items.mask)
    assert features.lengths.tolist() == peer._get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    real = features.mask
    torch.testing.assert_close(features.tokens[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not features.tokens[~real].any()


@pytest.mark.parametrize("cls", FAMILY)
@torch.no_grad()
def test_layer_norm_models_are_unchanged_by_padding(cls: Any, tmp_path: Path) -> None:
    save(tmp_path, cls, "layer")
    encoder = load(cls, tmp_path)
    batch = noise(146, 1000, 3999, 8000)
    together = encoder(*pad_sequences(batch))
    for i, clip in enumerate(batch):
        alone = encoder(*pad_sequences([clip]))
        length = alone.tokens.shape[1]
        assert int(together.mask[i].sum()) == length
        assert float((together.tokens[i, :length] - alone.tokens[0]).abs().max()) < 1e-4


@torch.no_grad()
def test_group_norm_models_do_change_which_is_why_they_say_so(tmp_path: Path) -> None:
    save(tmp_path, Wav2Vec2, "group")
    encoder = load(Wav2Vec2, tmp_path)
    batch = noise(2000, 8000)
    together, alone = encoder(*pad_sequences(batch)), encoder(*pad_sequences(batch[:1]))
    length = alone.tokens.shape[1]
    assert float((together.tokens[0, :length] - alone.tokens[0]).abs().max()) > 1e-4


@pytest.mark.parametrize(("cls", "norm"), CASES)
def test_in_a_model_batched_logits_equal_single_ones(cls: Any, norm: str) -> None:
    config = TINY | (LAYER if norm == "layer" else {}) | {"apply_spec_augment": False}
    head = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    encoder = {"use": cls.name, "config": {"config": config}}
    model = compose(encoders={"audio": encoder}, decoder=head).eval()
    samples = [{"audio": {"array": clip, "sampling_rate": 16000}} for clip in noise(3000, 1500, 3000, 8000)]
    with torch.no_grad():
        together = model(model.collate(samples)).logits
        alone = torch.cat([model(model.collate([sample])).logits for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", FAMILY)
@torch.no_grad()
def test_the_config_alone_rebuilds_a_loaded_model(cls: Any, tmp_path: Path, parameters_on_meta: Any) -> None:
    save(tmp_path, cls, "layer")
    encoder = load(cls, tmp_path)
    table = json.loads(json.dumps(encode_config(encoder.config)))
    assert not {"auto_map", "architectures", "_attn_implementation", "torch_dtype"} & table["config"].keys()
    shutil.rmtree(tmp_path)
    config = decode_config(cls.Config, table, "config")
    processor = cls.load_processor(config, encoder.processor.state(), {})
    with parameters_on_meta():
        again = cls(config, processor)
    assert all(p.is_meta for p in again.parameters())
    again.load_state_dict(encoder.state_dict(), assign=True)
    inputs = pad_sequences(noise(3000))
    assert torch.equal(again.eval()(*inputs).tokens, encoder(*inputs).tokens)
    assert again.config == encoder.config


@torch.no_grad()
def test_a_fine_tuned_folder_with_a_head_and_old_names_loads(tmp_path: Path) -> None:
    peer = save(tmp_path, Wav2Vec2, "layer", with_head=True)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert any(name.startswith("lm_head") for name in tensors)
    new = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    old = {k.replace(new[0], "weight_g").replace(new[1], "weight_v"): v.half() for k, v in tensors.items()}
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, file, metadata={"format": "pt"})
    encoder = load(Wav2Vec2, tmp_path)
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    data, mask = pad_sequences(noise(3000))
    torch.testing.assert_close(encoder(data, mask).tokens, peer(data).last_hidden_state, atol=2e-2, rtol=2e-2)


def test_masking_and_layer_drop_are_off_unless_asked_for(tmp_path: Path) -> None:
    save(tmp_path, Hubert, "layer")
    quiet = load(Hubert, tmp_path).train()
    assert quiet.config.config["apply_spec_augment"] is False
    quiet(*pad_sequences(noise(4000))).tokens.square().sum().backward()
    assert all(p.grad is not None for p in quiet.parameters())
    loud = load(Hubert, tmp_path, config={"apply_spec_augment": True, "mask_time_prob": 0.05, "layerdrop": 0.1})
    assert loud.config.config["layerdrop"] == 0.1
    assert "model.masked_spec_embed" in dict(loud.named_parameters())


def test_clips_shorter_than_one_frame_are_refused() -> None:
    processor = Wav2Vec2.make_processor(Wav2Vec2.Config(config=TINY))
    need = 10 + 5 * 2 + 20 * 2  # samples
    assert processor.config.min_samples == need
    assert processor.config.do_normalize
    assert len(processor.read({"array": torch.ones(need), "sampling_rate": 16000}, Policy())) == need
    with pytest.raises(InputError, match="this encoder needs at least"):
        processor.read({"array": torch.ones(need - 1), "sampling_rate": 16000}, Policy())


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(Wav2Vec2, tmp_path)
    save(tmp_path, Wav2Vec2, "group")
    with pytest.raises(UsageError, match="holds a model of type 'wav2vec2', but `hubert` reads 'hubert'"):
        load(Hubert, tmp_path)
    with pytest.raises(UsageError, match="trained at 16000 Hz, not 8000 Hz; set sample_rate = 16000"):
        load(Wav2Vec2, tmp_path, sample_rate=8000)
    with pytest.raises(UsageError, match="have another shape for"):
        load(Wav2Vec2, tmp_path, config={"hidden_size": 64})
    with pytest.raises(UsageError, match="lack 'encoder"):
        load(Wav2Vec2, tmp_path, config={"num_hidden_layers": 3})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TrustError, match="not a whole safetensors file"):
        load(Wav2Vec2, tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"has no model\.safetensors; mmhub reads safetensors alone"):
        load(Wav2Vec2, tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(TrustError, match="is not JSON"):
        load(Wav2Vec2, tmp_path)


def test_a_sharded_index_may_name_only_neighbours(tmp_path: Path) -> None:
    save(tmp_path, Wav2Vec2, "group")
    index = {"weight_map": {"encoder.layer_norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TrustError, match="not a safetensors file beside it"):
        load(Wav2Vec2, tmp_path)


@pytest.mark.parametrize(
    ("cls", "table", "message"),
    [
        (Wav2Vec2, {"trust_remote_code": True}, "takes no 'trust_remote_code'"),
        (Wav2Vec2, {"auto_map": "x"}, "takes no 'auto_map'"),
        (Wav2Vec2, {"hiden_size": 32}, "did you mean 'hidden_size'"),
        (Wav2Vec2, {"feat_extract_norm": "batch"}, "feat_extract_norm must be 'group' or 'layer'"),
        (WavLM, {"conv_dim": [4]}, "wavlm: "),
        (Hubert, {"hidden_act": "no_such_thing", "num_hidden_layers": 1}, "make no model"),
        (Whisper, {"decoder_layers": 2}, "takes no 'decoder_layers'"),
        (Whisper, {"d_model": 30, "encoder_attention_heads": 4}, "whisper: "),
    ],
)
def test_a_bad_hyper_parameter_is_refused(cls: Any, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        cls(cls.Config(config=table), None)
    assert message in str(caught.value)


def whisper_folder(folder: Path, mels: int = 80) -> Any:
    torch.manual_seed(0)
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_target_positions": 8}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **TINY_WHISPER, **decoder, **tokens, num_mel_bins=mels, suppress_tokens=None, begin_suppress_tokens=None
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=2).save_pretrained(folder)
    return transformers.WhisperModel.from_pretrained(folder, local_files_only=True).encoder.eval()


def check_whisper(encoder: Encoder, peer: Any, extractor: Any, clips: list[Tensor]) -> None:
    """Hold our log-mel frames and tokens against transformers', and each clip alone against the batch."""
    items = encoder.processor([{"array": c, "sampling_rate": 16000} for c in clips], Policy())
    inputs = extractor([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    torch.testing.assert_close(items.data, inputs["input_features"], atol=1e-5, rtol=0)
    assert torch.equal(items.mask, inputs["attention_mask"].bool())
    features = encoder(items.data, items.mask)
    assert features.lengths.tolist() == [-(-len(c) // 320) for c in clips]
    assert features.tokens.shape[1] == int(features.lengths.max())
    expected = peer(items.data).last_hidden_state[:, : features.tokens.shape[1]]
    torch.testing.assert_close(features.tokens[features.mask], expected[features.mask], atol=1e-5, rtol=1e-5)
    assert not features.tokens[~features.mask].any()
    for i in range(len(clips)):
        alone = encoder(items.data[i : i + 1], items.mask[i : i + 1])
        together = features.tokens[i][features.mask[i]]
        assert float((alone.tokens[0] - together).abs().max()) < 1e-4


@pytest.mark.parametrize("mels", [80, 128])
@torch.no_grad()
def test_whisper_equals_transformers(mels: int, tmp_path: Path) -> None:
    peer = whisper_folder(tmp_path, mels)
    encoder = load(Whisper, tmp_path)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert encoder.padding_invariant
    check_whisper(encoder, peer, extractor, noise(1, 150, 16000, 16001, 31700, 31999, 32000))


@torch.no_grad()
def test_whisper_is_rebuilt_from_its_config_and_state(tmp_path: Path, parameters_on_meta: Any) -> None:
    whisper_folder(tmp_path)
    encoder = load(Whisper, tmp_path)
    assert not any("decoder" in name for name in encoder.state_dict())
    table = json.loads(json.dumps(encode_config(encoder.config)))
    config = decode_config(Whisper.Config, table, "config")
    processor = Whisper.load_processor(config, json.loads(json.dumps(encoder.processor.state())), {})
    with parameters_on_meta():
        again = Whisper(config, processor).eval()
    again.load_state_dict(encoder.state_dict(), assign=True)
    items = processor([{"array": noise(9000)[0], "sampling_rate": 16000}], Policy())
    assert torch.equal(again(items.data, items.mask).tokens, encoder(items.data, items.mask).tokens)


def test_whisper_hears_the_channel_it_is_told_to_also_after_loading() -> None:
    both = torch.stack(noise(4000, 4000))
    assert not torch.equal(both[0], both[1])
    for channel in ("first", 1):
        processor = Whisper.make_processor(Whisper.Config(channel=channel))
        processor = Whisper.load_processor(Whisper.Config(), json.loads(json.dumps(processor.state())), {})
        heard = processor.read({"array": both, "sampling_rate": 16000}, Policy())
        assert torch.equal(heard, both[int(channel == 1)])
    with pytest.raises(ValueError, match='channel must be "mix", "first" or a number'):
        Whisper.Config(channel=32)


def test_whisper_refuses_clips_beyond_its_window() -> None:
    processor = Whisper.make_processor(Whisper.Config())
    with pytest.raises(InputError, match=r"lasts 30\.1 s, but Whisper takes at most 30 s; cut it"):
        processor([{"array": torch.zeros(481_600), "sampling_rate": 16000}], Policy())
    with pytest.raises(UsageError, match="whisper works at 16000 Hz, not 8000"):
        decode_config(Whisper.Config, {"sample_rate": 8000}, "config")


@torch.no_grad()
def test_the_real_whisper_tiny_equals_transformers() -> None:
    folder = Path(os.environ.get("MMHUB_REAL_MODELS", "")) / "whisper-tiny.en"
    if "MMHUB_REAL_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip("needs whisper-tiny.en in the folder MMHUB_REAL_MODELS")
    peer = transformers.WhisperModel.from_pretrained(folder, local_files_only=True).encoder.eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    encoder = load(Whisper, folder)
    check_whisper(encoder, peer, extractor, noise(16000, 41234))
