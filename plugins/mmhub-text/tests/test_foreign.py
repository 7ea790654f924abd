"""Whole models of transformers and sentence-transformers: read as they are, and written so that those read them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import ForeignParts, Policy, Stream, decode_config, encode_config
from mmhub.layers import masked_mean, summary
from mmhub_text.foreign import find_reader
from mmhub_text.head import HEADS, TransformersClassification
from mmhub_text.hooks import mmhub_load_foreign, mmhub_write_foreign
from mmhub_text.layouts import find_writer
from mmhub_text.pretrained import Transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "good"]
TEXTS = ["the cat sat on a mat", "good", "it was a good cat and it sat", ""]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 8},
    "roformer": {"embedding_size": 16},
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "modernbert": {"classifier_pooling": "mean", "cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, model_input_names=["input_ids", "attention_mask"], **names
    )


def save_classifier(folder: Path, kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    labels = {0: "bad", 1: "good", 2: "so-so"}
    config = AutoConfig.for_model(kind, **SIZES | MORE.get(kind, {}) | {"id2label": labels} | more)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # many heads start at zero bias and near-zero weights
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def read(folder: Path) -> ForeignParts:
    (reader,) = mmhub_load_foreign(folder, json.loads((folder / "config.json").read_text()))
    if reader.refusal:
        raise reader.refusal
    parts = reader.read(folder)
    parts.encoder.eval()
    return parts


def logits_of(parts: ForeignParts, texts: list[str] = TEXTS) -> Tensor:
    items = parts.encoder.processor(texts, Policy())
    assert parts.decoder
    with torch.no_grad():
        return parts.decoder.eval()({"text": parts.encoder(items.data, items.mask)}).logits


def library_logits(model: Any, folder: Path, texts: list[str] = TEXTS) -> Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_a_classifier_gives_the_logits_of_transformers_and_is_written_back_equal(kind: str, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "theirs", kind)
    parts = read(tmp_path / "theirs")
    expected = library_logits(model, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(parts), expected, atol=1e-5, rtol=0)
    assert parts.decoder and parts.decoder.config.labels == ("bad", "good", "so-so")
    (writer,) = mmhub_write_foreign(parts.encoder, parts.decoder, "transformers")
    (tmp_path / "ours").mkdir()
    writer.write(tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(library_logits(again, tmp_path / "ours"), expected, atol=1e-5, rtol=0)
    assert again.config.id2label == {0: "bad", 1: "good", 2: "so-so"}


def checkpoint_of(parts: ForeignParts) -> TransformersClassification:
    """The head again, from what a checkpoint keeps of it."""
    assert parts.decoder
    config = decode_config(
        TransformersClassification.Config, json.loads(json.dumps(encode_config(parts.decoder.config))), "config"
    )
    again = TransformersClassification(config, {"text": parts.encoder.stream})
    again.load_state_dict(parts.decoder.state_dict())
    return again.eval()


def test_a_head_is_rebuilt_from_its_configuration_alone(tmp_path: Path) -> None:
    save_classifier(tmp_path, "bert")
    parts = read(tmp_path)
    before = logits_of(parts)
    again = checkpoint_of(parts)
    assert torch.equal(logits_of(dataclasses.replace(parts, decoder=again)), before)
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    assert [name for name in again.state_dict() if "embedding" in name or "layer." in name] == []
    with pytest.raises(UsageError, match="reads the 16 features of its own encoder; join it"):
        TransformersClassification(again.config, {"text": Stream(8)})


def test_a_fresh_head_has_initialised_weights() -> None:
    config = TransformersClassification.Config(
        labels=("no", "yes"), config={"model_type": "bert", **{k: v for k, v in SIZES.items() if k != "pad_token_id"}}
    )
    head = TransformersClassification(config, {"text": Stream(16)})
    weights = dict(head.named_parameters())
    assert 0 < weights["head.classifier.weight"].std() < 0.1
    assert torch.equal(weights["head.classifier.bias"], torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"architectures": ["BertModel"]}, ""),
        ({"architectures": ["BertForMaskedLM"]}, ""),
        ({"architectures": None}, ""),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"problem_type": "multi_label_classification"}, "BertForSequenceClassification"),
        ({"id2label": {"0": "LABEL_0"}}, "BertForSequenceClassification"),
    ],
)
def test_what_has_no_head_we_run_is_an_encoder(changes: dict[str, Any], left_out: str, tmp_path: Path) -> None:
    save_classifier(tmp_path, "bert")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    parts = read(tmp_path)
    assert (parts.decoder, parts.left_out, parts.task) == (None, left_out, "embedding")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("BertLMHeadModel", "a 'bert' is a language model only with is_decoder = true"),
        ("XLNetLMHeadModel", "model_type 'xlnet' is no language model that can be run here"),
        ("LEDForConditionalGeneration", "model_type 'led' is no sequence-to-sequence model that can be run here"),
    ],
)
def test_what_writes_text_in_ways_that_are_not_run_here_is_refused(
    architecture: str, message: str, tmp_path: Path
) -> None:
    table = {"model_type": re.sub("(LMHead|For).*", "", architecture).lower(), "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(table))
    (reader,) = find_reader(tmp_path, table)
    assert reader.refusal is not None and reader.refusal.message == message
    assert reader.refusal.hint and "its encoder can start one of yours" in reader.refusal.hint


@pytest.mark.parametrize("table", [{"model_type": "vit"}, {"model_type": "no-such"}, {"architecture": "resnet18"}, {}])
def test_other_models_are_left_to_others(table: dict[str, Any], tmp_path: Path) -> None:
    assert list(mmhub_load_foreign(tmp_path, table)) == []


@pytest.mark.parametrize("file", ["w.bin", "../x.safetensors", "/x.safetensors", 3])
def test_an_index_names_safetensors_files_beside_it_or_nothing_is_read(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_classifier(tmp_path / "theirs", "bert")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": file}}
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    message = f"names {str(file)!r}, which is not a safetensors file beside it"
    with pytest.raises(TrustError, match=re.escape(message)):
        read(tmp_path / "theirs")
    with pytest.raises(TrustError, match=re.escape(message)):
        Transformers.from_library(Transformers.Config(), tmp_path / "theirs")


def test_label_names_that_repeat_are_told_apart(tmp_path: Path) -> None:
    save_classifier(tmp_path, "bert")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "crane", "1": "dog", "2": "crane"}}))
    parts = read(tmp_path)
    assert parts.decoder and parts.decoder.config.labels == ("crane", "dog", "crane (2)")


# --- sentence-transformers


def save_sentences(folder: Path, pooling: Any, *, dense: bool, normalize: bool) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    save_classifier(folder / "bert", "bert")
    modules: list[Any] = [Transformer(str(folder / "bert")), Pooling(16, pooling_mode=pooling)]
    width = modules[1].get_embedding_dimension()
    modules += [Dense(width, 7, activation_function=torch.nn.GELU())] * dense + [Normalize()] * normalize
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(folder / "st"))
    return SentenceTransformer(str(folder / "st"), device="cpu")


def embed(parts: ForeignParts, texts: list[str]) -> Tensor:
    items = parts.encoder.processor(texts, Policy())
    with torch.no_grad():
        return summary(parts.encoder.eval()(items.data, items.mask))


LONG = ["it was good and " * 20, "  A cat  ", *TEXTS]


@pytest.mark.parametrize(
    "pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("max", "mean")]
)
@pytest.mark.parametrize("rest", [True, False], ids=["dense+normalize", "bare"])
def test_a_sentence_transformers_model_embeds_as_encode_does_and_is_written_back_equal(
    pooling: Any, rest: bool, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    expected = torch.tensor(save_sentences(tmp_path, pooling, dense=rest, normalize=rest).encode(LONG))
    parts = read(tmp_path / "st")
    torch.testing.assert_close(embed(parts, LONG), expected, atol=1e-5, rtol=0)
    assert (parts.task, parts.encoder.pooled_dim) == ("embedding", expected.shape[1])

    config = decode_config(type(parts.encoder).Config, json.loads(json.dumps(encode_config(parts.encoder.config))), "x")
    processor = parts.encoder.processor
    again = type(parts.encoder)(
        config, type(parts.encoder).load_processor(config, processor.state(), processor.files())
    )
    again.load_state_dict(parts.encoder.state_dict())
    assert torch.equal(embed(dataclasses.replace(parts, encoder=again), LONG), embed(parts, LONG))

    (writer,) = find_writer(parts.encoder, None, "sentence-transformers")
    (tmp_path / "back").mkdir()
    writer.write(tmp_path / "back")
    back = SentenceTransformer(str(tmp_path / "back"), device="cpu").encode(LONG)
    torch.testing.assert_close(torch.tensor(back), expected, atol=1e-5, rtol=0)


def test_lower_casing_by_sentence_transformers_is_kept(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    save_sentences(tmp_path, "mean", dense=False, normalize=False)
    path = tmp_path / "st" / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    expected = SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(["THE Cat"])
    parts = read(tmp_path / "st")
    torch.testing.assert_close(embed(parts, ["THE Cat"]), torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.equal(embed(parts, ["THE Cat"]), embed(parts, ["the cat"]))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "modules.json",
            [{"path": "", "type": "sentence_transformers.models.Transformer"}],
            "is made of Transformer; mmhub runs a Transformer, P",
        ),
        ("modules.json", [{"path": "", "type": "x.WordEmbeddings"}], "is made of x.WordEmbeddings"),
        (
            "modules.json",
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "../p", "type": "sentence_transformers.models.Pooling"},
            ],
            "lies outside",
        ),
        (
            "modules.json",
            [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "p", "type": "own.Pooling"}],
            "is made of Transformer, own.Pooling;",
        ),
        ("2_Dense/config.json", {"out_features": 7, "activation_function": "os.system"}, "has os.system, which mmhub"),
        ("2_Dense/config.json", {"out_features": 7, "use_residual": True}, "has a residual connection"),
        ("2_Dense/config.json", {"out_features": 8}, "are not those its config.json describes"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "q", "prompts": {"q": "query: "}},
            "puts the prompt",
        ),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "uses its transformer for fill-mask"),
    ],
)
def test_what_would_change_an_embedding_and_is_not_done_here_is_refused(
    file: str, content: Any, message: str, tmp_path: Path
) -> None:
    save_sentences(tmp_path, "mean", dense=True, normalize=False)
    (tmp_path / "st" / file).write_text(json.dumps(content))
    with pytest.raises((UsageError, TrustError), match=re.escape(message)):
        read(tmp_path / "st")


def test_a_dense_layer_kept_as_pickle_is_refused(tmp_path: Path) -> None:
    save_sentences(tmp_path, "mean", dense=True, normalize=False)
    (tmp_path / "st" / "2_Dense" / "model.safetensors").rename(tmp_path / "st" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(TrustError, match="mmhub reads safetensors alone"):
        read(tmp_path / "st")


REAL = os.environ.get("MMHUB_REAL_MODELS")


@pytest.mark.skipif(not REAL, reason="needs all-MiniLM-L6-v2 in the folder MMHUB_REAL_MODELS")
def test_the_real_minilm_embeds_as_encode_does() -> None:
    from sentence_transformers import SentenceTransformer

    folder = Path(str(REAL)) / "all-MiniLM-L6-v2"
    texts = ["A cat sat on the mat.", "  Une phrase en fran\u00e7ais ", "long and longer " * 300, ""]
    expected = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(texts))
    torch.testing.assert_close(embed(read(folder), texts), expected, atol=1e-5, rtol=0)


# --- what cannot be written


def test_a_plain_encoder_is_written_for_both_libraries(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    save_classifier(tmp_path / "theirs", "roberta", max_position_embeddings=42)
    encoder = Transformers.from_library(Transformers.Config(), tmp_path / "theirs").eval()
    parts = ForeignParts(encoder=encoder, encoder_id="mmhub-text/transformers")
    for layout in ("transformers", "sentence-transformers"):
        (tmp_path / layout).mkdir()
        find_writer(encoder, None, layout)[0].write(tmp_path / layout)
    model = AutoModel.from_pretrained(tmp_path / "transformers").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "transformers")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    expected = masked_mean(states, inputs["attention_mask"].bool())
    torch.testing.assert_close(embed(parts, TEXTS), expected, atol=1e-5, rtol=0)
    vectors = SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.tensor(vectors), expected, atol=1e-5, rtol=0)


def test_models_without_an_expression_in_a_layout_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, "bert")
    parts = read(tmp_path)
    (writer,) = find_writer(parts.encoder, parts.decoder, "sentence-transformers")
    with pytest.raises(UsageError, match=r"cannot hold this model's head \(mmhub_text.head.TransformersClassification"):
        writer.write(tmp_path)
    table = {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 14,
    }
    t5 = Transformers(Transformers.Config(config=table), parts.encoder.processor)
    with pytest.raises(UsageError, match="cannot hold the encoder of a 't5' alone"):
        find_writer(t5, None, "transformers")[0].write(tmp_path)
    assert list(mmhub_write_foreign(parts.encoder, None, "timm")) == []
