"""What an encoder says of the time its tokens stand for is where a click is heard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmhub.interfaces import Encoder, Policy, decode_config
from mmhub_audio.cnn import CNN
from mmhub_audio.conformer import Conformer
from mmhub_audio.transformer import Transformer
from mmhub_audio.wav2vec2 import Hubert, Wav2Vec2, WavLM
from mmhub_audio.whisper import Whisper

RATE = 16000  # Hz
LIBRARY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
LOUD = {"do_normalize": False, "config": LIBRARY}  # else the click would change the level of all the rest
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
SCRATCH = {"dim": 32, "sample_rate": RATE}
DEEP = SCRATCH | {"depth": 1, "heads": 2, "channels": 8}
CASES: dict[str, tuple[Any, dict[str, Any], float]] = {  # with the seconds of one token
    "conformer": (Conformer, DEEP | {"kernel": 3}, 0.04),
    "transformer": (Transformer, DEEP, 0.04),
    "transformer at 8 kHz": (Transformer, DEEP | {"sample_rate": 8000, "hop_ms": 12.5}, 0.05),
    "cnn": (CNN, SCRATCH | {"channels": [4, 8, 8]}, 0.04),
    "cnn of one stage": (CNN, SCRATCH | {"channels": [4]}, 0.02),
    "wav2vec2": (Wav2Vec2, LOUD, 0.02),
    "hubert": (Hubert, LOUD, 0.02),
    "wavlm": (WavLM, LOUD, 0.02),
    "whisper": (Whisper, {"config": WHISPER | {"max_source_positions": 100}}, 0.02),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_click_is_seen_at_the_token_of_its_time(name: str) -> None:
    cls, table, seconds = CASES[name]
    torch.manual_seed(0)
    config = decode_config(cls.Config, table, "config")
    encoder: Encoder = cls(config, cls.make_processor(config)).eval()
    assert encoder.token_seconds == pytest.approx(seconds)
    assert encoder.stream.seconds == encoder.token_seconds
    quiet = 0.01 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(1))
    for time in (0.3, 0.99, 1.7):
        clicked = quiet.clone()
        clicked[round(time * RATE) :][:40] += 0.5
        before, after = (_tokens(encoder, samples) for samples in (quiet, clicked))
        seen = int((after - before).norm(dim=1).argmax())
        assert abs(seen - round(time / seconds)) <= 1


def _tokens(encoder: Encoder, samples: torch.Tensor) -> torch.Tensor:
    items = encoder.processor([{"array": samples, "sampling_rate": RATE}], Policy())
    return encoder(items.data, items.mask).tokens[0]
