"""Causal language models of transformers: packed, padded, cached or alone, they compute what transformers does."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mmhub.batch import Bundle, Features
from mmhub.errors import UsageError
from mmhub.interfaces import Generation, Policy, decode_config, encode_config
from mmhub_text.hooks import mmhub_load_foreign, mmhub_write_foreign
from mmhub_text.logits import Head
from mmhub_text.transformers_lm import LEFT_PADDED, PACKED, TransformersLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Every type gets those of these that its configuration knows.
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 4,
    "partial_rotary_factor": 0.5,
    "vocab_size": 40,
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "is_decoder": True,
    "lru_width": 16,
}
QUICK = {"bloom", "gemma2", "gpt2", "llama", "mistral", "opt"}
OTHERS = {"bert", "ctrl", "mamba", "nanochat", "openai-gpt", "qwen3_next", "recurrent_gemma", "roberta", "rwkv"}
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(LEFT_PADDED | OTHERS)]
_drawn = torch.Generator().manual_seed(1)
TEXTS = [torch.randint(3, 40, (n,), generator=_drawn).tolist() for n in (9, 6, 4)]


def table(kind: str, **more: Any) -> dict[str, Any]:
    known = {*inspect.signature(CONFIG_MAPPING[kind].__init__).parameters, *CONFIG_MAPPING[kind].attribute_map}
    values = {key: value for key, value in SIZES.items() if key in known}
    aliases = CONFIG_MAPPING[kind].attribute_map
    return {key: value for key, value in values.items() if key not in aliases or aliases[key] not in values} | more


def tokenizer(words: int = 40) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = [*names.values(), "<unk>", *(f"w{i}" for i in range(4, words))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=64, unk_token="<unk>", **names)


def save_model(folder: Path, kind: str, **more: Any) -> Any:
    """A folder as transformers saves it, and its model read back by transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **table(kind, **more)))
    roughen(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def roughen(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def read(folder: Path, **config: Any) -> TransformersLM:
    return TransformersLM.from_library(TransformersLM.Config(**config), folder, {}).eval()


def fresh(kind: str) -> TransformersLM:
    processor = TransformersLM.make_processor(TransformersLM.Config(), {"kind": "byte"})
    torch.manual_seed(0)
    config = TransformersLM.Config(config={"model_type": kind, **table(kind, vocab_size=300)})
    model = TransformersLM(config, {}, processor).eval()
    roughen(model)
    return model


def stream(model: TransformersLM, rows: list[list[int]], parts: list[list[int]] | None = None) -> Bundle:
    width = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    mask = ids >= 0
    numbers = None if parts is None else torch.tensor([row + [0] * (width - len(row)) for row in parts])
    return {"fused": Features(model.embed(ids.clamp(min=0)) * mask[..., None], mask, ids=ids, parts=numbers)}


def alone(model: TransformersLM) -> list[Tensor]:
    """The logits of each of TEXTS, by the library's own pass."""
    return [model.model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS]


def losses_of(logits: list[Tensor]) -> list[Tensor]:
    return [
        F.cross_entropy(found[:-1], torch.tensor(text[1:]), reduction="none")
        for found, text in zip(logits, TEXTS, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_cached_equal_one_text_alone(kind: str) -> None:
    model = fresh(kind)
    expected = alone(model)
    losses = losses_of(expected)
    padded = model.token_losses(stream(model, TEXTS))
    for row, loss in zip(padded, losses, strict=True):
        torch.testing.assert_close(row[1 : 1 + len(loss)], loss, atol=2e-5, rtol=0)
        assert not row[1 + len(loss) :].any() and row[0] == 0
    packed = stream(model, [TEXTS[0] + TEXTS[1], TEXTS[2]], [[0] * 9 + [1] * 6, [0] * 4])
    found = model.token_losses(packed)
    torch.testing.assert_close(found[0], torch.cat((found.new_zeros(1), losses[0], found.new_zeros(1), losses[1])))
    torch.testing.assert_close(found[1, 1:4], losses[2], atol=2e-5, rtol=0)
    torch.testing.assert_close(model(packed, torch.ones(2)).loss, torch.cat(losses).mean(), atol=2e-5, rtol=0)
    last = torch.stack([logits[-1] for logits in expected])
    torch.testing.assert_close(model(stream(model, TEXTS)).logits, last, atol=2e-5, rtol=0)

    logits, state = model.begin(stream(model, [text[:-2] for text in TEXTS]))
    torch.testing.assert_close(logits, torch.stack([one[-3] for one in expected]), atol=2e-5, rtol=0)
    logits, state = model.step(torch.tensor([text[-2] for text in TEXTS]), state)
    torch.testing.assert_close(logits, torch.stack([one[-2] for one in expected]), atol=2e-5, rtol=0)
    rows = [2, 0, 2, 1]
    chosen = model.select(state, torch.tensor(rows))
    logits, _ = model.step(torch.tensor([TEXTS[row][-1] for row in rows]), chosen)
    torch.testing.assert_close(logits, last[rows], atol=2e-5, rtol=0)
    logits, _ = model.step(torch.tensor([text[-1] for text in TEXTS]), state)  # neither has changed the state
    torch.testing.assert_close(logits, last, atol=2e-5, rtol=0)

    assert model.extends == (kind in LEFT_PADDED)
    if model.extends:
        _, state = model.begin(stream(model, [TEXTS[0][:1]]))
        for start, end in ((1, 7), (7, 9)):  # several tokens at once, behind what stands already
            logits, state = model.extend(stream(model, [TEXTS[0][start:end]]), state)
        torch.testing.assert_close(logits, last[:1], atol=2e-5, rtol=0)


@torch.no_grad()
def test_perplexity_and_greedy_text_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = save_model(tmp_path, "qwen3"), read(tmp_path)
    texts = ["w4 w5 w9 w33", "w7", "w12 w12 w8 w39 w4 w6 w21"]
    words = AutoTokenizer.from_pretrained(tmp_path)
    total, count, rows = 0.0, 0, []
    for text in texts:
        ids = torch.tensor([[1, *words(text, add_special_tokens=False).input_ids]])
        total += float(theirs(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        rows.append(ours.processor.read(text, Policy()).tolist())
        assert rows[-1] == ids[0].tolist()
    loss = ours(stream(ours, rows), torch.ones(3)).loss
    assert loss is not None and math.exp(loss) == pytest.approx(math.exp(total / count), abs=1e-4)

    logits, state = ours.begin(stream(ours, rows))
    written = [logits.argmax(1)]
    for _ in range(9):
        logits, state = ours.step(written[-1], state)
        written.append(logits.argmax(1))
    for row, found in zip(rows, torch.stack(written, 1).tolist(), strict=True):
        expected = theirs.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert expected[0, len(row) :].tolist() == found


def test_a_text_never_sees_another_one_of_its_row() -> None:
    for kind in ("gpt2", "opt"):
        model = fresh(kind)
        assert (kind in PACKED) == (kind == "gpt2")
        bundle = stream(model, [TEXTS[0] + TEXTS[1]], [[0] * 9 + [1] * 6])
        tokens = bundle["fused"].tokens.detach().requires_grad_()
        bundle["fused"].tokens = tokens
        model.token_losses(bundle)[0, 9:].sum().backward()
        assert tokens.grad is not None and not tokens.grad[0, :9].any() and tokens.grad[0, 9:14].all()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
def test_the_gradient_is_that_of_transformers_and_reaches_every_parameter(kind: str) -> None:
    model = fresh(kind)
    loss = model(stream(model, TEXTS[:1]), torch.ones(1)).loss
    assert loss is not None and model.head._plain is (kind == "llama")
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    ids = torch.tensor(TEXTS[:1])
    model.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert found[name] is not None and parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_logits_in_chunks_are_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("gemma2")
    bundle = stream(model, TEXTS)
    whole = model.token_losses(bundle)
    mean = model(bundle, torch.ones(3)).loss
    calls: list[int] = []
    own = Head.__call__

    def counted(self: Head, inner: Any, states: Tensor) -> Tensor:
        calls.append(len(states))
        return own(self, inner, states)

    monkeypatch.setattr("mmhub_text.logits._CHUNK", 300 * 5)
    monkeypatch.setattr(Head, "__call__", counted)
    torch.testing.assert_close(model.token_losses(bundle), whole)
    torch.testing.assert_close(model(bundle, torch.ones(3)).loss, mean)
    assert max(calls) == 5 and sum(calls) == 2 * (8 + 5 + 3)


def test_only_marked_tokens_are_targets() -> None:
    model = fresh("llama")
    bundle = stream(model, TEXTS)
    wanted = torch.zeros_like(bundle["fused"].mask)
    wanted[0, 3:5] = wanted[1, 0] = True  # nothing stands before the first token
    expected = model.token_losses(bundle)[0, 3:5]
    bundle["fused"].loss = wanted
    found = model.token_losses(bundle)
    torch.testing.assert_close(found[wanted][:2], expected)
    assert int((found > 0).sum()) == 2
    torch.testing.assert_close(model(bundle, torch.ones(3)).loss, expected.mean())


def test_a_folder_says_how_texts_begin_end_and_are_written(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama")
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 7], max_new_tokens=5)
    model.generation_config.save_pretrained(tmp_path)
    ours = read(tmp_path)
    assert ours.generation == Generation(temperature=0.6, top_p=0.9, top_k=50, max_new_tokens=5)
    processor = ours.processor
    assert (processor.begin_id, processor.end_id, processor.stop_ids, processor.ends) == (1, 2, (2, 7), False)
    assert (ours.context, ours.dim, ours.config.config["tie_word_embeddings"]) == (64, 16, False)
    assert read(tmp_path, generation=Generation(beams=3)).generation.beams == 3
    assert read(tmp_path, max_length=32).context == 32
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        settings.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": 5}))
    assert read(tmp_path).processor.begin_id == 5  # as lm-evaluation-harness begins where there is nothing else


def test_a_checkpoint_keeps_all_that_is_needed(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    ours = read(tmp_path)
    assert not any(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])
    config = decode_config(type(ours.config), json.loads(json.dumps(encode_config(ours.config))), "x")
    processor = TransformersLM.load_processor(config, ours.processor.state(), ours.processor.files())
    again = TransformersLM(config, {}, processor).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(stream(again, TEXTS)).logits, ours(stream(ours, TEXTS)).logits)
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight


def test_a_trained_tokenizer_decides_the_vocabulary_and_special_ids_of_fresh_weights() -> None:
    values = {key: value for key, value in table("llama").items() if not key.endswith(("_id", "vocab_size"))}
    processor = TransformersLM.make_processor(TransformersLM.Config(), {"kind": "byte"})
    model = TransformersLM(TransformersLM.Config(config={"model_type": "llama", **values}), {}, processor)
    described = model.model.config
    assert described.vocab_size == processor.vocab_size == len(model.embed(torch.arange(processor.vocab_size)))
    assert (described.pad_token_id, described.bos_token_id, described.eos_token_id) == (0, 2, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "xlnet"}, "'xlnet' is no language model that can be run here"),
        ({"model_type": "bart"}, "'bart' is no language model that can be run here"),
        ({"model_type": "bert"}, "a 'bert' is a language model only with is_decoder = true"),
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 8}, "no setting 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "llama", "vocab_size": 30}, "vocab_size 30 is smaller than the tokenizer's 260 ids"),
    ],
)
def test_what_cannot_be_a_language_model_is_named(config: dict[str, Any], message: str) -> None:
    processor = TransformersLM.make_processor(TransformersLM.Config(), {"kind": "byte"})
    with pytest.raises(UsageError, match=message):
        TransformersLM(TransformersLM.Config(config=config), {}, processor)


def test_a_tokenizer_that_does_not_fit_the_model_is_named_with_both_sizes(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    tokenizer(50).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"the tokenizer has 50 ids, and the model in .* knows 40"):
        read(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="max_length 65 is more than the 64 tokens"):
        read(tmp_path, max_length=65)


def test_a_folder_of_transformers_is_read_and_written_back_equal(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "theirs", "gpt2")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (reader,) = mmhub_load_foreign(tmp_path / "theirs", config)
    assert reader.refusal is None
    parts = reader.read(tmp_path / "theirs")
    assert (parts.task, parts.decoder_id, parts.encoder) == ("language-modelling", "mmhub-text/transformers-lm", None)
    decoder: Any = parts.decoder
    decoder.config = type(decoder.config)(
        config=decoder.config.config, generation=Generation(temperature=0.5, max_new_tokens=7)
    )
    (writer,) = mmhub_write_foreign(decoder, decoder, "transformers")
    (tmp_path / "ours").mkdir()
    writer.write(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)
    assert back.config.use_cache and back.config.tie_word_embeddings
    wanted = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 7, "eos_token_id": [2], "bos_token_id": 1}
    assert {key: getattr(back.generation_config, key) for key in wanted} == wanted
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert words("w4 w5").input_ids == [4, 5] and (words.bos_token, words.eos_token) == ("<s>", "</s>")
    assert mmhub_write_foreign(decoder, decoder, "sentence-transformers") == []


def test_a_tokenizer_trained_here_begins_texts_in_the_other_layout_too(tmp_path: Path) -> None:
    model = fresh("llama")
    (writer,) = mmhub_write_foreign(model, model, "transformers")
    writer.write(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words("a b").input_ids == model.processor.prompt("a b", Policy()).tolist()
