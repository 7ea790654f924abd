"""Reading transformers folders: the same numbers as the library, and nothing from the folder that could run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mmhub.errors import MmhubError, NotFoundError, TrustError, UsageError
from mmhub.interfaces import Policy, decode_config, encode_config
from mmhub.layers import summary
from mmhub_text.pretrained import Transformers
from mmhub_text.processor import TextProcessor

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TABLES: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "max_position_embeddings": 40},
    "bart": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_position_embeddings": 40},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    "modernbert": {**SMALL, "local_attention": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    | {"cls_token_id": 2, "sep_token_id": 3},
    "roberta": {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
}


def save_folder(path: Path, kind: str, texts: list[str]) -> Path:
    """Save a small random model of the library, with a tokenizer, as its own `save_pretrained` does."""
    table = {"kind": "bpe", "vocab_size": 300}
    processor = TextProcessor.from_recipe(table, default="bpe", max_length=None, wrap=True)
    processor.fit(texts)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=processor.vocab_size, **TABLES[kind])
    model = AutoModel.from_config(config)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_bytes(processor.files()["tokenizer.json"])
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) if path.is_file() else json.dumps(changes))


def library_states(folder: Path, encoder: Transformers, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    items = encoder.processor(texts, Policy())
    ids = items.data.masked_fill(~items.mask, encoder.pad_id)
    return model(input_ids=ids, attention_mask=items.mask.long()).last_hidden_state, items.mask


def encode(encoder: Transformers, texts: list[str]) -> Any:
    items = encoder.processor(texts, Policy())
    return encoder.eval()(items.data, items.mask)


@pytest.mark.parametrize("kind", TABLES)
@torch.inference_mode()
def test_a_folder_gives_the_librarys_numbers_and_can_be_left_behind(
    kind: str, tmp_path: Path, texts: list[str]
) -> None:
    folder = save_folder(tmp_path / "m", kind, texts)
    encoder = Transformers.from_library(Transformers.Config(), folder)
    expected, mask = library_states(folder, encoder, texts[:4])
    features = encode(encoder, texts[:4])
    torch.testing.assert_close(features.tokens[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert not any(t.is_meta for t in [*encoder.parameters(), *encoder.buffers()])

    state, files = encoder.processor.state(), encoder.processor.files()
    config = decode_config(Transformers.Config, json.loads(json.dumps(encode_config(encoder.config))), "config")
    again = Transformers(config, Transformers.load_processor(config, state, files))
    again.load_state_dict(encoder.state_dict())
    assert again.config == encoder.config
    assert torch.equal(encode(again, texts[:4]).tokens, features.tokens)


def test_only_hyperparameters_survive_from_a_config(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    evil = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "evil/kernel", "trust_remote_code": True}
    evil |= {"quantization_config": {"quant_method": "bitsandbytes"}, "attn_implementation": "x", "surprise": 1}
    edit(folder / "config.json", **evil)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    encoder = Transformers.from_library(Transformers.Config(), folder)
    assert not {*evil, "architectures", "transformers_version"} & set(encoder.config.config)
    assert encoder.model.config._attn_implementation == "sdpa"
    assert not any("pooler" in key for key in encoder.state_dict())


def test_unknown_types_with_code_of_their_own_are_refused(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    edit(folder / "config.json", model_type="my-bert", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(UsageError, match="code of its own, which mmhub never runs"):
        Transformers.from_library(Transformers.Config(), folder)


def test_settings_of_the_recipe_change_those_of_the_folder(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    config = Transformers.Config(config={"hidden_dropout_prob": 0.25}, max_length=9, pooling="cls")
    encoder = Transformers.from_library(config, folder)
    assert encoder.model.embeddings.dropout.p == 0.25
    assert encoder.config.max_length == encoder.processor.max_length == 9
    features = encode(encoder, texts[:2])
    assert features.tokens.shape[1] == 9 and torch.equal(features.pooled, features.tokens[:, 0])
    with pytest.raises(UsageError, match="holds a 'bert', not a 'roberta'"):
        Transformers.from_library(Transformers.Config(config={"model_type": "roberta"}), folder)
    with pytest.raises(UsageError, match="more than the 40 tokens"):
        Transformers.from_library(Transformers.Config(max_length=41), folder)


def test_a_sentence_transformers_folder_says_its_pooling_and_length(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "st"
    folder = save_folder(path / "0_Transformer", "bert", texts)
    (path / "1_Pooling").mkdir()
    edit(path / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (path / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    edit(folder / "sentence_bert_config.json", max_seq_length=12)
    encoder = Transformers.from_library(Transformers.Config(), path)
    assert (encoder.config.pooling, encoder.config.max_length, encoder.pooled_dim) == ("cls", 12, 16)
    edit(path / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(UsageError, match="pools by cls and max; set pooling"):
        Transformers.from_library(Transformers.Config(), path)
    assert Transformers.from_library(Transformers.Config(pooling="mean"), path).pooled_dim is None
    (path / "modules.json").write_text(json.dumps([{"path": "../outside"}]))
    with pytest.raises(NotFoundError, match=r"holds no config\.json"):
        Transformers.from_library(Transformers.Config(), path)


def test_sharded_and_half_precision_weights_load_as_fp32(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    AutoModel.from_pretrained(folder).half().save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    encoder = Transformers.from_library(Transformers.Config(), folder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_older_tokenizer_files_are_converted(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "long", "##er"]))
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=True)
    encoder = Transformers.from_library(Transformers.Config(), folder)
    assert encoder.processor.read("One longer", Policy()).tolist() == [2, 5, 6, 7, 3]


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "lacking":
        tensors = load_file(weights)
        tensors.pop("encoder.layer.0.output.dense.weight")
        save_file(tensors, weights, {"format": "pt"})
    elif how == "shape":
        edit(folder / "config.json", intermediate_size=32)
    elif how == "config":
        (folder / "config.json").write_text("{")
    elif how == "list":
        (folder / "config.json").write_text("[]")
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("pickle", TrustError, "only pytorch_model.bin, which could run code"),
        ("cut", TrustError, "cannot be loaded"),
        ("lacking", TrustError, r"lack 1 tensor\(s\), such as 'encoder.layer.0.output.dense.weight'"),
        ("shape", TrustError, "cannot be loaded"),
        ("config", TrustError, "not readable JSON"),
        ("list", TrustError, "should hold a JSON object"),
        ("tokenizer", NotFoundError, "holds no tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(
    how: str, kind: type[MmhubError], message: str, tmp_path: Path, texts: list[str]
) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    damage(folder, how)
    with pytest.raises(kind, match=message):
        Transformers.from_library(Transformers.Config(), folder)


def test_pretrained_weights_keep_their_tokenizer_unless_another_is_named(tmp_path: Path, texts: list[str]) -> None:
    folder = save_folder(tmp_path / "m", "bert", texts)
    with pytest.raises(UsageError, match=r"leave \[model.tokenizer\] out"):
        Transformers.from_library(Transformers.Config(), folder, {"kind": "bpe"})
    other = folder.parent / "other.json"
    (folder / "tokenizer.json").rename(other)
    table = {"kind": "pretrained", "name": str(other)}
    assert Transformers.from_library(Transformers.Config(), folder, table).processor.vocab_size == 300


@torch.inference_mode()
def test_the_real_minilm_gives_the_librarys_sentence_embeddings(minilm: Path) -> None:
    texts = ["a stirring , funny film", "one long string of cliches", "", "Ünïcode café 日本語 " * 90]
    encoder = Transformers.from_library(Transformers.Config(), minilm)
    assert (encoder.config.pooling, encoder.config.max_length, encoder.dim) == ("mean", 256, 384)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states = AutoModel.from_pretrained(minilm).eval()(**inputs).last_hidden_state
    items = encoder.processor(texts, Policy())
    assert torch.equal(items.data, inputs["input_ids"])
    features = encode(encoder, texts)
    torch.testing.assert_close(features.tokens[items.mask], states[items.mask], atol=1e-5, rtol=1e-5)
    weights = inputs["attention_mask"][..., None].float()
    expected = (states * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(summary(features), expected, atol=1e-5, rtol=1e-5)


def test_hyperparameters_may_stand_beside_our_own_settings() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    flat = decode_config(Transformers.Config, {"model_type": "bert", "max_length": 9, **sizes}, "config")
    apart = {"config": {"model_type": "bert", **sizes}, "max_length": 9}
    assert flat == decode_config(Transformers.Config, apart, "config")
