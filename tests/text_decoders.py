"""Text decoders for tests: a scripted one, and tiny transformers models of random weights behind our interface."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhub.batch import Bundle, Features, Output, pad_sequences
from mmhub.interfaces import Generation, LanguageModel, LanguageProcessor, Policy, TextDecoder, find_task, own_stream
from mmhub.model import Model

LETTERS = "abcdefghijklmnopqrstuvwxyzäöü ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?-/\n0123456789"
BEGIN, END = 2, 3


class Letters(LanguageProcessor):
    """One token a character: <pad> 0, <unk> 1, <s> 2, </s> 3, then `LETTERS`."""

    begin_id: int | None = BEGIN
    end_id: int | None = END
    ends = True
    stop_ids: tuple[int, ...] = (END,)

    @property
    def vocab_size(self) -> int:
        return 4 + len(LETTERS)

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return torch.cat([self.prompt(raw, policy), torch.tensor([END])])

    def prompt(self, raw: Any, policy: Policy) -> Tensor:
        return torch.tensor([BEGIN, *(LETTERS.index(c) + 4 for c in raw)])

    def chat(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Tensor:
        return self.prompt("".join(f"{m['role'][0].upper()}:{m['content']}\n" for m in messages) + "A:", policy)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i - 4] for i in ids if i >= 4)

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Letters:
        return cls()


class _Tokenless(Letters):
    """For models of a vocabulary without letters: a text is its numbers."""

    def __init__(self, size: int, stop_ids: tuple[int, ...]) -> None:
        self._size, self.stop_ids = size, stop_ids

    @property
    def vocab_size(self) -> int:
        return self._size

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


class _Base(TextDecoder):
    """What no test needs."""

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> LanguageProcessor:
        return Letters()

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> LanguageProcessor:
        return Letters()

    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        raise NotImplementedError

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        raise NotImplementedError

    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        raise NotImplementedError


class Causal(_Base, LanguageModel):
    """A transformers causal model; prompts are padded on the right, as everywhere in mmhub."""

    def __init__(self, model: Any, stop_ids: tuple[int, ...] = (END,), context: int | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.config: Any = None
        self.model = model.eval()
        self.processor = _Tokenless(model.config.vocab_size, stop_ids)
        self.context = context
        self.dim = model.config.hidden_size

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = own_stream(bundle)
        assert stream.ids is not None
        mask = stream.mask.long()
        out = self.model(input_ids=stream.ids.clamp(min=0), attention_mask=mask, position_ids=_positions(mask))
        rows = torch.arange(len(mask))
        return out.logits[rows, stream.lengths - 1].float(), (out.past_key_values, mask)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, mask = state
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = mask.sum(1, keepdim=True) - 1
        out = self.model(input_ids=ids[:, None], attention_mask=mask, position_ids=position, past_key_values=cache)
        return out.logits[:, -1].float(), (out.past_key_values, mask)

    def select(self, state: Any, rows: Tensor) -> Any:
        cache, mask = state
        cache.reorder_cache(rows)
        return cache, mask[rows]


class Seq2Seq(_Base):
    """A transformers encoder-decoder; the bundle holds the ids of the source."""

    def __init__(self, model: Any, stop_ids: tuple[int, ...] = (END,)) -> None:
        torch.nn.Module.__init__(self)
        self.config: Any = None
        self.model = model.eval()
        self.processor = _Tokenless(model.config.vocab_size, stop_ids)
        self.start = int(model.config.decoder_start_token_id)

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = bundle["text"]
        assert stream.ids is not None
        mask = stream.mask.long()
        encoded = self.model.get_encoder()(input_ids=stream.ids.clamp(min=0), attention_mask=mask).last_hidden_state
        start = torch.full((len(mask),), self.start)
        return self.step(start, (None, encoded, mask))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, encoded, mask = state
        out = self.model(
            encoder_outputs=(encoded,),
            attention_mask=mask,
            decoder_input_ids=ids[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits[:, -1].float(), (out.past_key_values, encoded, mask)

    def select(self, state: Any, rows: Tensor) -> Any:
        cache, encoded, mask = state
        cache.reorder_cache(rows)
        return cache, encoded[rows], mask[rows]


class Scripted(_Base, LanguageModel):
    """Writes what it is told: its text, or one for each prompt text, then the end token, or as `scores` (V,) says.

    `steps` holds the rows that each step was computed for, `read` the prompts; a step takes `pause` seconds.
    """

    dim = 1

    def __init__(
        self,
        texts: str | Mapping[str, str] = "",
        *,
        scores: Tensor | None = None,
        context: int | None = None,
        generation: Generation | None = None,
        pause: float = 0.0,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.config: Any = None
        self.processor = Letters()
        self.context = context
        self.texts, self.scores, self.pause, self._settings = texts, scores, pause, generation
        self.steps: list[int] = []
        self.read: list[str] = []

    @property
    def generation(self) -> Generation:
        return self._settings or Generation()

    def embed(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 1)

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = own_stream(bundle)
        assert stream.ids is not None
        state = [[i for i in row if i >= 0] for row in stream.ids.tolist()]
        self.read += map(self.processor.decode, state)
        return self._logits(state), state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        time.sleep(self.pause)
        self.steps.append(len(ids))
        state = [[*row, token] for row, token in zip(state, ids.tolist(), strict=True)]
        return self._logits(state), state

    def select(self, state: Any, rows: Tensor) -> Any:
        return [state[row] for row in rows.tolist()]

    def _logits(self, state: list[list[int]]) -> Tensor:
        if self.scores is not None:
            return self.scores.repeat(len(state), 1)
        return torch.stack([self._next(self.processor.decode(row)) for row in state])

    def _next(self, text: str) -> Tensor:
        scripts = {"": self.texts} if isinstance(self.texts, str) else self.texts
        logits = torch.zeros(self.processor.vocab_size)
        for prompt, answer in scripts.items():
            whole = prompt + answer
            if isinstance(self.texts, str):  # the same answer to every prompt: how much of it is there?
                done = next(n for n in range(len(answer), -1, -1) if text.endswith(answer[:n]))
                whole, text = answer, answer[:done]
            if whole.startswith(text) and len(text) >= len(prompt):
                logits[END if text == whole else LETTERS.index(whole[len(text)]) + 4] = 9.0
                return logits
        logits[END] = 9.0
        return logits


class _Unmixed(torch.nn.Module):
    by_item = False

    """A fusion that gives the text as it is."""

    def forward(self, bundle: Bundle) -> Bundle:
        return bundle


def model_of(decoder: TextDecoder) -> Model:
    """A language model that has no more than this decoder."""
    fusion: Any = _Unmixed()
    return Model(find_task("language-modelling"), {}, fusion, decoder, {}).eval()


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def stream_of(decoder: Any, prompts: Sequence[Sequence[int]]) -> Bundle:
    """The bundle of prompts of token ids that a language model begins with."""
    ids, mask = pad_sequences([torch.tensor(list(prompt)) for prompt in prompts])
    tokens = decoder.embed(ids) * mask[..., None] if hasattr(decoder, "embed") else torch.zeros(*ids.shape, 1)
    return {"text": Features(tokens.detach(), mask, ids=ids.masked_fill(~mask, -1))}


def tiny_causal(kind: str, seed: int, vocabulary: int = 32) -> Any:
    """A transformers Llama or GPT-2 of two layers whose end token comes up now and then."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config: Any = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes, **_SPECIAL)
        model: Any = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_SPECIAL)
        model = GPT2LMHeadModel(config)
    return _sharpened(model)


def tiny_seq2seq(kind: str, seed: int, vocabulary: int = 32) -> Any:
    """A transformers BART, T5 or Marian of two layers each."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MarianConfig,
        MarianMTModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(seed)
    if kind == "t5":
        return _sharpened(
            T5ForConditionalGeneration(
                T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                         decoder_start_token_id=0, **_SPECIAL)
            )
        )  # fmt: skip
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    cls, config = (BartForConditionalGeneration, BartConfig) if kind == "bart" else (MarianMTModel, MarianConfig)
    special = _SPECIAL | {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return _sharpened(cls(config(vocab_size=vocabulary, d_model=32, **sizes, **heads, **special)))


_SPECIAL = {"pad_token_id": 0, "bos_token_id": BEGIN, "eos_token_id": END}


def _sharpened(model: Any) -> Any:
    """Random weights as large as trained ones, or every token is as good as any other; the end token more often."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    model.get_output_embeddings().weight.data[END] *= 2
    return model.eval()
