"""All text encoders: shapes, masks, padding, meta devices, and rebuilding from config and weights."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.interfaces import Encoder, Policy, decode_config, encode_config
from mmhub_text.library import PADDING_INVARIANT
from mmhub_text.pretrained import Transformers
from mmhub_text.recurrent import LSTM, RNN
from mmhub_text.transformer import Transformer

POLICY = Policy()
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
LENGTHS: dict[str, Any] = {"max_position_embeddings": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
BART |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, **LENGTHS}
LLAMA = {**SMALL, **LENGTHS, "num_key_value_heads": 1, "head_dim": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "albert": {**SMALL, **LENGTHS, "embedding_size": 8},
    "bart": BART,
    "deberta-v2": {**SMALL, **LENGTHS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **LENGTHS},
    "electra": {**SMALL, **LENGTHS, "embedding_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "llama": LLAMA,
    "marian": BART,
    "mbart": BART,
    "modernbert": {**SMALL, **LENGTHS, "local_attention": 4},
    "mt5": T5,
    "pegasus": BART,
    "qwen3": LLAMA,
    "rembert": {**SMALL, **LENGTHS, "input_embedding_size": 8},
    "roformer": {**SMALL, **LENGTHS, "embedding_size": 16},
    "t5": T5,
    "umt5": T5,
}
LIBRARY = sorted(PADDING_INVARIANT)
CASES: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
    "lstm": (LSTM, {"dim": 12, "embedding_dim": 8, "depth": 2}),
    "lstm-one-way": (LSTM, {"dim": 12, "embedding_dim": 8, "bidirectional": False, "pooling": "mean"}),
    "rnn": (RNN, {"dim": 12, "embedding_dim": 8}),
    "transformer": (Transformer, {"dim": 12, "depth": 2, "heads": 2}),
    "cls": (Transformers, {"config": {"model_type": "bert", **SMALL}, "pooling": "cls"}),
}
CASES |= {
    kind: (Transformers, {"config": {"model_type": kind, **SPECIAL.get(kind, {**SMALL, **LENGTHS})}})
    for kind in LIBRARY
}


def build(name: str, texts: list[str]) -> Encoder:
    torch.manual_seed(0)
    kind, table = CASES[name]
    config = decode_config(kind.Config, table, "config")
    processor = kind.make_processor(config)
    processor.fit(texts)
    return kind(config, processor).eval()


def encode(encoder: Encoder, texts: list[str], extra: int = 0) -> Features:
    items = encoder.processor(texts, POLICY)
    pad = (0, extra)
    return encoder(nn.functional.pad(items.data, pad), nn.functional.pad(items.mask, pad))


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Put parameters, and only them, on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: Any) -> None:
        register(module, name, value)
        if value is not None:
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


@pytest.mark.parametrize("name", CASES)
def test_tokens_follow_the_mask_and_the_declared_widths(name: str, texts: list[str]) -> None:
    encoder = build(name, texts)
    with torch.inference_mode():
        features = encode(encoder, texts[:3])
    n, t, d = features.tokens.shape
    assert (n, d) == (3, encoder.dim) and features.mask.shape == (n, t)
    assert features.tokens[~features.mask].abs().sum() == 0
    assert features.tokens.isfinite().all()
    assert encoder.pooled_dim == (None if features.pooled is None else features.pooled.shape[1])


@pytest.mark.parametrize("name", CASES)
def test_padding_and_company_change_no_real_token(name: str, texts: list[str]) -> None:
    encoder = build(name, texts)
    assert encoder.padding_invariant
    with torch.inference_mode():
        together = encode(encoder, texts[:4], extra=3 if encoder.processor.max_length > 24 else 0)
        for i, text in enumerate(texts[:4]):
            alone = encode(encoder, [text])
            real = together.tokens[i, : alone.tokens.shape[1]]
            torch.testing.assert_close(real, alone.tokens[0], atol=2e-6, rtol=1e-5)
            if alone.pooled is not None:
                torch.testing.assert_close(together.pooled[i], alone.pooled[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_that_trains_gets_a_gradient(name: str, texts: list[str]) -> None:
    encoder = build(name, texts).train()
    features = encode(encoder, texts[:4])
    loss = (features.tokens * torch.randn(encoder.dim)).sum()
    (loss if features.pooled is None else loss + features.pooled.square().sum()).backward()
    assert [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", CASES)
def test_config_state_and_weights_rebuild_the_encoder_from_meta(name: str, texts: list[str]) -> None:
    encoder = build(name, texts)
    kind = type(encoder)
    config = decode_config(kind.Config, json.loads(json.dumps(encode_config(encoder.config))), "config")
    processor = kind.load_processor(config, encoder.processor.state(), encoder.processor.files())
    with meta_parameters():
        again = kind(config, processor)
    assert all(p.is_meta for p in again.parameters()) and not any(b.is_meta for b in again.buffers())
    again.load_state_dict(encoder.state_dict(), assign=True)
    assert again.config == encoder.config
    with torch.inference_mode():
        assert torch.equal(encode(again.eval(), texts[:2]).tokens, encode(encoder, texts[:2]).tokens)


@pytest.mark.parametrize("name", CASES)
def test_the_longest_text_the_processor_lets_through_can_be_encoded(name: str, texts: list[str]) -> None:
    encoder = build(name, texts)
    if (longest := encoder.processor.max_length) > 24:
        encoder.processor.max_length = longest = min(longest, 30)
    with torch.inference_mode():
        features = encode(encoder, [" ".join(texts)])
    assert features.tokens.shape[1] >= longest - 2


@pytest.mark.parametrize("name", ["lstm", "rnn", "transformer"])
def test_unseen_words_are_learned_through_word_dropout(name: str, texts: list[str]) -> None:
    encoder = build(name, texts).train()
    encode(encoder, texts).tokens.sum().backward()
    assert encoder.embed.weight.grad[encoder.processor.empty_id].abs().sum() > 0
    assert encoder.embed.weight.grad[0].abs().sum() == 0


def test_max_and_mean_read_real_tokens_alone(texts: list[str]) -> None:
    encoder = build("lstm", texts)
    with torch.inference_mode():
        features = encode(encoder, texts[:2], extra=4)
    length = int(features.lengths[1])
    real: Tensor = features.tokens[1, :length]
    torch.testing.assert_close(features.pooled[1], torch.cat((real.amax(0), real.mean(0))))


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        (LSTM, {"dim": 7}, "must be even, got 7"),
        (RNN, {"dropuot": 0.1}, "unknown key 'dropuot'; did you mean 'dropout'"),
        (LSTM, {"word_dropout": 1}, "word_dropout must be at least 0 and below 1"),
        (Transformer, {"dim": 30, "heads": 4}, "dim must be a multiple of heads"),
        (Transformers, {"max_length": 0}, "max_length must be at least 1"),
        (Transformers, {"pooling": "max"}, "pooling: invalid enum value 'max'"),
        (Transformers, {}, "transformers needs to know the model"),
        (Transformers, {"config": {"model_type": "berd"}}, "no model_type 'berd'; did you mean 'bert'"),
        (Transformers, {"config": {"model_type": "bert", "hiden_size": 8}}, "did you mean 'hidden_size'"),
        (Transformers, {"config": {"model_type": "bert", "auto_map": {}}}, "has no setting 'auto_map'"),
        (Transformers, {"config": {"model_type": "bert", "_attn_implementation": "x"}}, "has no setting '_attn"),
        (Transformers, {"config": {"model_type": "bert", "hidden_size": "wide"}}, "does not accept these settings"),
        (Transformers, {"config": {"model_type": "bert", "hidden_size": 10}}, "cannot be built"),
        (Transformers, {"config": {"model_type": "bert"}, "max_length": 600}, "more than the 512 tokens"),
        (Transformers, {"config": {"model_type": "vit"}}, "'vit' does not encode text"),
        (Transformers, {"config": {"model_type": "bert", "vocab_size": 9}}, "vocab_size 9 is smaller than"),
    ],
)
def test_a_bad_setting_is_refused_by_name(kind: Any, table: dict[str, Any], message: str, texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:  # noqa: PT012 - each of these may be the one that refuses
        config = decode_config(kind.Config, table, "model.encoders.text.config")
        processor = kind.make_processor(config)
        processor.fit(texts)
        kind(config, processor)
    assert message in str(caught.value)


def test_the_manifest_names_what_exists() -> None:
    manifest = tomllib.loads(files("mmhub_text").joinpath("mmhub.toml").read_text("utf-8"))
    for component in manifest["components"]:
        module, _, name = component["factory"].partition(":")
        factory = getattr(import_module(module), name)
        module, _, name = component["config"].partition(":")
        config: Any = import_module(module)
        for step in name.split("."):
            config = getattr(config, step)
        assert factory.Config is config
        assert component["kind"] == "decoder" or factory.modality in component["modalities"]


def test_recurrent_layers_work_after_assigned_weights_without_a_warning(texts: list[str]) -> None:
    encoder = build("lstm", texts)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with meta_parameters():
            again = LSTM(encoder.config, encoder.processor)
        again.load_state_dict(state, assign=True)
        encode(again.eval(), texts[:2])
