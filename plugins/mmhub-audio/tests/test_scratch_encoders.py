"""Conformer, Transformer and CNN: the front end, padding, meta-device loading, SpecAugment."""

from __future__ import annotations

import importlib
import tomllib
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from mmhub.batch import pad_sequences
from mmhub.errors import UsageError
from mmhub.interfaces import Encoder, Policy, decode_config, encode_config
from mmhub.spec import Manifest
from mmhub_audio.cnn import CNN
from mmhub_audio.conformer import Conformer
from mmhub_audio.logmel import LogMel, spec_augment
from mmhub_audio.mfcc import MFCC
from mmhub_audio.transformer import Transformer

NEW = ("channel", "features", "n_mfcc")  # keys that the first checkpoints do not have
ENCODERS = (Conformer, Transformer, CNN)
SMALL: dict[Any, dict[str, Any]] = {
    Conformer: {"dim": 32, "depth": 2, "heads": 2, "channels": 8},
    Transformer: {"dim": 32, "depth": 2, "heads": 2, "channels": 8},
    CNN: {"dim": 32, "channels": [4, 6, 8]},
}


def build(cls: Any, **options: Any) -> Encoder:
    torch.manual_seed(0)
    config = decode_config(cls.Config, SMALL[cls] | {"sample_rate": 8000} | options, "config")
    encoder: Encoder = cls(config, cls.make_processor(config)).eval()
    return encoder


def clips(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


@pytest.mark.parametrize("cls", ENCODERS)
@torch.no_grad()
def test_a_clip_gives_the_same_tokens_alone_and_in_any_batch(cls: Any) -> None:
    encoder = build(cls)
    assert encoder.padding_invariant
    batch = clips(1, 79, 80, 81, 3999, 5003, 8000)
    together = encoder(*pad_sequences(batch))
    data, mask = pad_sequences(batch)
    wider = encoder(torch.nn.functional.pad(data, (0, 777)), torch.nn.functional.pad(mask, (0, 777)))
    for i, clip in enumerate(batch):
        alone = encoder(*pad_sequences([clip]))
        length = alone.tokens.shape[1]
        assert alone.mask.all()
        for other in (together, wider):
            assert int(other.mask[i].sum()) == length
            assert float((other.tokens[i, :length] - alone.tokens[0]).abs().max()) < 1e-4
            assert not other.tokens[i, length:].any()


def test_torchaudio_conformer_fails_this_test_which_is_why_ours_exists() -> None:
    torch.manual_seed(0)
    peer = torchaudio.models.Conformer(16, 2, 32, 1, 15).eval()
    clip = torch.randn(1, 20, 16)
    with torch.no_grad():
        alone, _ = peer(clip, torch.tensor([20]))
        padded = torch.cat((torch.nn.functional.pad(clip, (0, 0, 0, 30)), torch.randn(1, 50, 16)))
        together, _ = peer(padded, torch.tensor([20, 50]))
    assert float((alone[0] - together[0, :20]).abs().max()) > 1e-3


@pytest.mark.parametrize("cls", ENCODERS)
def test_one_token_for_four_frames_and_gradients_everywhere(cls: Any) -> None:
    encoder = build(cls).train()
    features = encoder(*pad_sequences(clips(8000, 4000)))  # 101 and 51 frames
    assert features.tokens.shape == (2, 26, encoder.dim)
    assert features.lengths.tolist() == [26, 13]
    features.tokens.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())


@pytest.mark.parametrize("cls", ENCODERS)
@torch.no_grad()
def test_built_on_meta_and_assigned_the_outputs_are_equal(cls: Any, parameters_on_meta: Any) -> None:
    encoder = build(cls)
    with parameters_on_meta():
        empty = cls(encoder.config, encoder.processor).eval()
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    empty.load_state_dict(encoder.state_dict(), assign=True)
    inputs = pad_sequences(clips(3000, 5000))
    assert torch.equal(empty(*inputs).tokens, encoder(*inputs).tokens)


@pytest.mark.parametrize("cls", ENCODERS)
def test_config_and_processor_rebuild_the_encoder(cls: Any) -> None:
    encoder = build(cls, n_mels=40, features="mfcc", n_mfcc=13, channel="first")
    config = decode_config(cls.Config, encode_config(encoder.config), "config")
    assert config == encoder.config
    again = cls.load_processor(config, encoder.processor.state(), encoder.processor.files())
    assert again.config == encoder.processor.config
    assert again.config.sample_rate == 8000
    cls(config, again).load_state_dict(encoder.state_dict())


def test_a_real_clip_goes_through_processor_and_encoder() -> None:
    encoder = build(CNN)
    items = encoder.processor([{"array": np.ones(4800, np.float32), "sampling_rate": 16000}, None], Policy())
    features = encoder(items.data, items.mask).to_rows(items.rows, items.batch)
    assert features.present.tolist() == [True, False]


@torch.no_grad()
def test_mel_power_equals_torchaudio() -> None:
    for rate, bands in ((8000, 64), (16000, 80)):
        ours = LogMel(rate, bands, 25.0, 10.0)
        peer = torchaudio.transforms.MelSpectrogram(
            rate, n_fft=ours.n_fft, win_length=ours.length, hop_length=ours.hop, n_mels=bands, pad_mode="constant"
        )
        clip = clips(5003)[0][None]
        torch.testing.assert_close(ours.power(clip), peer(clip).transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("bands", "count"), [(64, 13), (80, 40)])
def test_coefficients_equal_torchaudio(bands: int, count: int) -> None:
    ours = LogMel(16000, bands, 25.0, 10.0)
    mel = {"n_fft": ours.n_fft, "win_length": ours.length, "hop_length": ours.hop, "n_mels": bands}
    peer = torchaudio.transforms.MFCC(16000, count, log_mels=True, melkwargs=mel | {"pad_mode": "constant"})
    clip = clips(16003)[0][None]
    found = MFCC(count, bands).coefficients((ours.power(clip) + 1e-6).log())
    torch.testing.assert_close(found, peer(clip).transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_normalised_frames_give_the_same_normalised_coefficients() -> None:
    data, mask = pad_sequences(clips(8000, 3000))
    frontend, cepstrum = LogMel(8000, 40, 25.0, 10.0), MFCC(20, 40)
    frames, real = frontend(data, mask)
    found = cepstrum(frames, real)
    plain = cepstrum((frontend.power(data) + 1e-6).log() * real.unsqueeze(-1), real)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)  # the 1e-5 in the variance is not scaled along
    for i in range(2):
        own = found[i][real[i]]
        torch.testing.assert_close(own.mean(0), torch.zeros(20), atol=1e-5, rtol=0)
        torch.testing.assert_close(own.var(0, correction=0), torch.ones(20), atol=1e-2, rtol=0)
    assert not found[~real].any()


@pytest.mark.parametrize("cls", ENCODERS)
@torch.no_grad()
def test_coefficients_give_the_same_tokens_alone_and_in_any_batch(cls: Any) -> None:
    encoder = build(cls, features="mfcc", n_mfcc=13)
    assert not torch.equal(encoder(*pad_sequences(clips(4000))).tokens, build(cls)(*pad_sequences(clips(4000))).tokens)
    batch = clips(1, 3999, 5003)
    together = encoder(*pad_sequences(batch))
    for i, clip in enumerate(batch):
        alone = encoder(*pad_sequences([clip]))
        assert float((together.tokens[i, : alone.tokens.shape[1]] - alone.tokens[0]).abs().max()) < 1e-4


def test_a_checkpoint_from_before_coefficients_loads() -> None:
    encoder = build(CNN)
    old = {key: value for key, value in encode_config(encoder.config).items() if key not in NEW}
    state = {key: value for key, value in encoder.processor.state().items() if key not in NEW}
    state["augment"] = {key: value for key, value in state["augment"].items() if not key.startswith("noise")}
    again = CNN(decode_config(CNN.Config, old, "config"), CNN.load_processor(None, state, {}))
    again.load_state_dict(encoder.state_dict())
    assert (again.config, again.processor.config) == (encoder.config, encoder.processor.config)


@pytest.mark.gpu
@torch.no_grad()
def test_features_on_a_gpu_equal_those_on_the_cpu() -> None:
    encoder = build(CNN, features="mfcc")
    data, mask = pad_sequences(clips(8000, 5003))
    here = encoder(data, mask).tokens
    there = encoder.cuda()(data.cuda(), mask.cuda()).tokens.cpu()
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_frames_are_normalised_over_real_positions_alone() -> None:
    data, mask = pad_sequences(clips(8000, 800))
    frames, real = LogMel(8000, 64, 25.0, 10.0)(data, mask)
    assert real.sum(1).tolist() == [101, 11]
    for i in range(2):
        assert abs(float(frames[i][real[i]].mean())) < 1e-5
        assert abs(float(frames[i][real[i]].var(correction=0)) - 1) < 1e-3
    assert not frames[~real].any()


@torch.no_grad()
def test_garbage_in_padded_positions_is_ignored() -> None:
    data, mask = pad_sequences(clips(4000, 2000))
    encoder = build(CNN)
    clean = encoder(data, mask).tokens
    data[1, 2000:] = 1e3
    assert torch.equal(encoder(data, mask).tokens, clean)


def test_spec_augment_hides_bounded_spans_of_real_frames() -> None:
    torch.manual_seed(0)
    mask = torch.arange(100)[None] < torch.tensor([100, 50, 1])[:, None]
    hidden = spec_augment(torch.ones(3, 100, 64), mask, bands=10, time=0.1) == 0
    bands, times = hidden.all(1).sum(1), hidden.all(2).sum(1)
    assert bands.max() <= 20
    assert (times <= torch.tensor([20, 10, 0])).all()
    assert not hidden[1, 50:].all(1).any()
    assert bands.sum() > 0
    assert times.sum() > 0


def test_spec_augment_works_in_training_mode_alone() -> None:
    inputs = pad_sequences(clips(4000))
    encoder = build(CNN, dropout=0.0)
    with torch.no_grad():
        quiet = encoder(*inputs).tokens
        assert torch.equal(encoder(*inputs).tokens, quiet)
        encoder.train()
        assert not torch.equal(encoder(*inputs).tokens, quiet)
        off = build(CNN, dropout=0.0, mask_bands=0, mask_time=0.0).train()
        assert torch.equal(off(*inputs).tokens, quiet)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Conformer, {"kernel": 4}, "kernel must be odd, not 4"),
        (Conformer, {"dim": 30, "heads": 4}, "dim 30 is not a multiple of heads 4"),
        (Transformer, {"dpeth": 3}, "unknown key 'dpeth'; did you mean 'depth'"),
        (Transformer, {"sample_rate": 0}, "sample_rate must lie in"),
        (CNN, {"features": "mfcc", "n_mfcc": 65}, "n_mfcc must lie in 4 to n_mels = 64, not 65"),
        (CNN, {"features": "mfc"}, "did you mean 'mfcc'"),
        (CNN, {"channel": 32}, 'channel must be "mix", "first" or a number from 0 to 31, not 32'),
        (CNN, {"augment": {"noise_db": [20, 5]}}, "noise_db must be [low, high]"),
        (CNN, {"augment": {"noise": "recorded"}}, "noise = 'recorded' needs noise_db"),
        (CNN, {"channels": []}, "channels must list at least one stage"),
        (CNN, {"hop_ms": 50.0}, "1 <= hop_ms <= window_ms"),
        (CNN, {"augment": {"sped": 0.1}}, "unknown key 'sped'; did you mean 'speed'"),
        (CNN, {"n_mels": 500}, "500 mel bands at 8000 Hz leave some band without a frequency"),
    ],
)
def test_a_bad_setting_is_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(cls, **options)
    assert message in str(caught.value)


def test_every_component_of_the_manifest_exists() -> None:
    text = files("mmhub_audio").joinpath("mmhub.toml").read_text(encoding="utf-8")
    manifest = msgspec.convert(tomllib.loads(text), Manifest)
    encoders = [component for component in manifest.components if component.kind == "audio_encoder"]
    assert [c.name for c in encoders] == [
        "conformer",
        "transformer",
        "cnn",
        "wav2vec2",
        "hubert",
        "wavlm",
        "whisper",
    ]
    for component in encoders:
        module, _, name = component.factory.partition(":")
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, Encoder)
        assert component.config == f"{component.factory}.Config"
        assert cls.modality == "audio"
        decode_config(cls.Config, {}, "config")
