"""The model: encoders, fusion and decoder joined, with everything around them that a plugin author need not know.

It packs raw samples, runs each encoder on the items that exist, keeps batching from changing results, and turns a
decoder's output into answers. Training, saving and publishing are left to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mmhub.batch import (
    Batch,
    Bundle,
    Encoded,
    Features,
    Items,
    Output,
    Plan,
    only,
    pad_sequences,
    places_in_rows,
    rows_with,
)
from mmhub.conversation import compose, media_of, pack_scripts, read_messages, read_script
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.guard import Guards, GuardSource
from mmhub.interfaces import (
    Decoder,
    Encoder,
    Fusion,
    Generation,
    LanguageModel,
    Policy,
    Task,
    TextDecoder,
    decode_config,
    encode_config,
)
from mmhub.layers import summary

if TYPE_CHECKING:
    from mmhub.explain.records import Explanation
    from mmhub.plugins import Component


@dataclass(frozen=True)
class Columns:
    """Which column of a table feeds which modality, and which holds the target; kept with a checkpoint."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    names: tuple[str, ...] = ()  # the columns of a table without a header
    document: str = "row"  # what one text of a language model is, as `data.document` of a recipe says it


class Model(nn.Module):
    """Encoders by modality, one fusion, one decoder, and the task they serve.

    `sources` tells which component each role was built from; `columns` how tables feed the model.
    """

    def __init__(
        self,
        task: Task,
        encoders: Mapping[str, Encoder],
        fusion: Fusion,
        decoder: Decoder,
        sources: Mapping[str, Component],
        columns: Columns | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.encoders = nn.ModuleDict(dict(encoders))
        self.fusion = fusion
        self.decoder = decoder
        self.sources = dict(sources)
        self.columns = columns or Columns()
        self.frozen: set[str] = set()
        self.stand_ins: dict[str, Items] = {}  # an item of each modality for ranks that have none; see `_absent`
        self.unimodal_loss = 0.0  # share of the training loss that comes from each modality alone
        self.name = ""
        self.guards: list[GuardSource] = []  # its own, which a checkpoint keeps; others may join them
        self._guards: Guards | None = None  # all of them, built when it is first asked to predict
        self.parents: list[dict[str, str]] = []  # what its weights started from, as `mmhub.lineage` says it
        if isinstance(decoder, TextDecoder) and not decoder.reads_text and "text" in encoders:
            source: Any = getattr(encoders["text"], "processor", None)
            if hasattr(source, "whole"):
                source.whole = True  # of a text that is rewritten nothing is cut off unsaid

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a sample may hold: the modalities of the encoders, and text where the decoder reads it."""
        return (*self.encoders, *(("text",) if self.decoder.reads_text else ()))

    @property
    def processors(self) -> dict[str, Any]:
        found = {name: encoder.processor for name, encoder in self.encoders.items()}
        return found | ({"text": self.decoder.processor} if self.decoder.reads_text else {})

    @property
    def readers(self) -> dict[str, Any]:
        """By modality what reads it: the encoders, and the decoder if it reads text."""
        return dict(self.encoders.items()) | ({"text": self.decoder} if self.decoder.reads_text else {})

    @property
    def converses(self) -> bool:
        """Whether each sample is a conversation, or becomes one, that its language model answers."""
        return self.decoder.reads_text and not self.task.reads_text

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def parts(self) -> dict[str, nn.Module]:
        """The components by role: `<modality>_encoder`, `fusion`, `decoder`. Tensor names in files start with these."""
        return {f"{name}_encoder": encoder for name, encoder in self.encoders.items()} | {
            "fusion": self.fusion,
            "decoder": self.decoder,
        }

    def freeze(self, name: str) -> None:
        """Exclude a part from training: no gradients, and evaluation mode for its norms and dropout.

        It is an encoder's modality, "fusion" or "decoder".
        """
        self.frozen.add(name)
        self._called(name).requires_grad_(False).eval()

    def _called(self, name: str) -> nn.Module:
        return self.parts()[name if name in ("fusion", "decoder") else f"{name}_encoder"]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            part = self._called(name).eval()
            for module in part.modules() if mode and name not in self.encoders else ():
                if isinstance(module, nn.RNNBase):  # cuDNN passes a gradient on in training mode alone
                    module.train()
        return self

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """Return logits, and the loss where the batch has targets."""
        bundle = self.encode(batch.items, batch.size, batch.features)
        output = self.decode(bundle, batch.targets, batch.plan)
        mixes = len(bundle) > 1 and "fused" in self.fusion.outputs and not self.decoder.reads_text
        if self.training and self.unimodal_loss and mixes and output.loss is not None:
            output.loss = torch.lerp(output.loss, self._loss_alone(bundle, batch.targets), self.unimodal_loss)
        return output

    def _loss_alone(self, bundle: Bundle, targets: Tensor) -> Tensor:
        """The mean loss of answering from one modality at a time.

        Without it the modality that is easiest to learn answers for all, and the others hardly learn (Wang et al.,
        "What makes training multi-modal classification networks hard?", arXiv:1905.12681). The encoders run once.
        """
        losses = []
        for name in bundle:
            rows = rows_with(bundle, [name])
            if len(rows):
                losses.append(self.decode(only(bundle, [name], rows), targets[rows]).loss)
        return torch.stack([loss for loss in losses if loss is not None]).mean()

    def encode(self, items: Mapping[str, Items], size: int, features: Mapping[str, Encoded] | None = None) -> Bundle:
        """Run every encoder on its items and gather the features by row; rows without an item are fully masked.

        A modality in `features` is not run again.
        """
        known = features or {}
        if self.decoder.paired and len(self.encoders) == 1:
            (name,) = self.encoders
            return self._both_sides(name, known.get(name, items.get(name)), size)
        gather = self._by_item if self.fusion.by_item else self._by_row
        bundle = {name: gather(name, known.get(name, items.get(name)), size) for name in self.encoders}
        return bundle | ({"text": self.text_stream(items.get("text"), size)} if self.decoder.reads_text else {})

    def _both_sides(self, name: str, items: Items | Encoded | None, size: int) -> Bundle:
        """The first item of each row as one stream, the second as another: see `PairDecoder`."""
        if isinstance(items, Items) and len(items):
            features = self.encode_items(name, items)
            items = Encoded(features, items.rows)
        if not isinstance(items, Encoded) or not len(items):
            empty = self._by_row(name, items, size)
            return {name: empty, f"{name}_pair": empty.emptied()}
        rows = items.rows
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        sides = {}
        for number, side in enumerate((name, f"{name}_pair")):
            own = (place == number).nonzero().squeeze(1)
            part = items.features.select(own)
            sides[side] = part.to_rows(rows[own], size) if len(own) else self._absent(name, size, None)
        return sides

    def text_stream(self, items: Items | None, size: int) -> Features:
        """Embed token ids for a decoder that reads text: the texts of one row behind each other, (B, T, D)."""
        decoder: Any = self.decoder
        if items is None or not len(items):
            nothing = torch.zeros(size, 1, dtype=torch.long, device=self.device)
            items = Items(nothing, nothing.bool(), torch.arange(size, device=self.device), size)
        ids, mask, marks, parts = items.data, items.mask, items.marks, None
        if len(items) != size or bool((items.rows != torch.arange(size, device=items.rows.device)).any()):
            where, width = places_in_rows(mask, items.rows, size)
            numbers = torch.arange(len(items), device=ids.device)[:, None].expand(ids.shape)
            ids, parts = (part.new_zeros(size, width).index_put(where, part[mask]) for part in (ids, numbers))
            marks = None if marks is None else marks.new_zeros(size, width).index_put(where, marks[mask])
            mask = mask.new_zeros(size, width).index_put(where, mask[mask])
        tokens = decoder.embed(ids)
        if not bool(mask.all()):
            tokens = tokens * mask.unsqueeze(-1).to(tokens.dtype)
        ids = ids.masked_fill(~mask, -1)
        return Features(tokens, mask, ids=ids, loss=marks, parts=parts, continues=items.continues)

    def encode_items(self, name: str, items: Items) -> Features:
        """Run one encoder on its N >= 1 items, without gradients where it is frozen: (N, T, D)."""
        encoder: Any = self.encoders[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
            if not encoder.padding_invariant:
                return _by_length(encoder, items)
            features: Features = encoder(items.data, items.mask)
            return features

    def fused(self, batch: Batch) -> Bundle:
        """Return what the decoder reads of a batch, its media where they stand."""
        return self._fuse(self.encode(batch.items, batch.size, batch.features), batch.plan)

    def decode(self, bundle: Bundle, targets: Any = None, plan: Plan | None = None) -> Output:
        output: Output = self.decoder(self._fuse(bundle, plan), targets)
        return output

    def _fuse(self, bundle: Bundle, plan: Plan | None) -> Bundle:
        fused: Bundle = self.fusion(bundle) if plan is None else self.fusion(bundle, plan=plan)
        return fused

    def _by_item(self, name: str, items: Items | Encoded | None, size: int) -> Features:
        """The features of every item, with its row. Where there is none and gradients are kept, one that is fully
        masked stands for it: whatever learns from it takes part in every step, on every rank."""
        if isinstance(items, Encoded) and len(items):
            return replace(items.features, rows=items.rows)
        if isinstance(items, Items) and len(items):
            return replace(self.encode_items(name, items), rows=items.rows)
        stand_in = None if isinstance(items, Encoded) else self.stand_ins.get(name)
        found = self._absent(name, 1, stand_in)
        nobody = torch.zeros(1, dtype=torch.long, device=self.device)
        found = replace(found, rows=nobody)
        return found if torch.is_grad_enabled() else replace(found.select(nobody[:0]), rows=nobody[:0])

    def _by_row(self, name: str, items: Items | Encoded | None, size: int) -> Features:
        if items is None or not len(items):
            return self._absent(name, size, None if isinstance(items, Encoded) else self.stand_ins.get(name))
        if isinstance(items, Encoded):
            return items.features.to_rows(items.rows, size)
        features = self.encode_items(name, items)
        if items.marks is not None:
            features = replace(features, marks=items.marks)
        return features.to_rows(items.rows, size)

    def _absent(self, name: str, size: int, stand_in: Items | None) -> Features:
        encoder: Any = self.encoders[name]
        device = self.device
        pooled = torch.zeros(size, encoder.pooled_dim, device=device) if encoder.pooled_dim else None
        tokens = torch.zeros(size, 1, encoder.dim, device=device)
        if stand_in is not None:  # the other ranks wait for this one's part in the encoder's pass and its gradient
            features = self.encode_items(name, stand_in)
            tokens = tokens + 0 * features.tokens.sum()
            pooled = pooled + 0 * features.pooled.sum() if pooled is not None and features.pooled is not None else None
        return Features(tokens, torch.zeros(size, 1, dtype=torch.bool, device=device), pooled=pooled)

    # -- from raw samples ---------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Mapping[str, Any]], policy: Policy | None = None) -> Batch:
        """Pack raw samples, each a mapping of modality to raw input, into a batch."""
        return self._collate(samples, policy or Policy(), first=0)

    def _collate(self, samples: Sequence[Mapping[str, Any]], policy: Policy, first: int) -> Batch:
        for row, sample in enumerate(samples, first):
            self.check_sample(row, sample)
        raw = [dict(sample) for sample in samples]
        try:
            if self.converses:
                return replace(self._collate_talks(samples, policy), raw=raw)
            items = {
                name: processor([sample.get(name) for sample in samples], policy)
                for name, processor in self.processors.items()
            }
        except InputError as error:
            raise _at_sample(error, first + (error.row or 0)) from None
        return Batch(items=items, size=len(samples), raw=raw)

    def _collate_talks(self, samples: Sequence[Mapping[str, Any]], policy: Policy) -> Batch:
        """Pack what language models answer: conversations, or samples that become one."""
        talks = [self.messages_of(sample, row) for row, sample in enumerate(samples)]
        processor: Any = self.processors["text"]
        scripts = [read_script(processor, talk, policy, row) for row, talk in enumerate(talks)]
        text, plan, prompts = pack_scripts(scripts, list(self.encoders))
        items = {name: self.processors[name]([media_of(t, name) for t in talks], policy) for name in self.encoders}
        return Batch(items=items | {"text": text}, size=len(samples), plan=plan, prompts=prompts)

    def messages_of(self, sample: Mapping[str, Any], row: int = 0) -> list[dict[str, Any]]:
        """Return the conversation that a sample holds as "messages", or that is made of it.

        Raises:
            InputError: it is none, or one of two; `row` is set.
        """
        try:
            if sample.get("messages") is not None:
                beside = [name for name, raw in sample.items() if name != "messages" and not _is_missing(raw)]
                if beside:
                    what = f"the sample holds messages and {' and '.join(map(repr, beside))}"
                    raise InputError(what, f"give messages or {'/'.join(self.modalities)}, not both")
                return read_messages(sample["messages"], self.modalities)
            return compose(sample, self.processors)
        except InputError as error:
            error.row = row
            raise

    def check_sample(self, row: int, sample: Mapping[str, Any]) -> None:
        """Raise UsageError or InputError, with its `row`, for a sample that this model cannot read."""
        if not isinstance(sample, Mapping):
            raise UsageError(
                f"sample {row} is a {type(sample).__name__}", "a sample is a dict of modality to raw input"
            )
        keys = (*self.modalities, *(("messages",) if self.converses else ()))
        for key in sample:
            if key not in keys:
                hint = did_you_mean(str(key), keys) or f"it takes {', '.join(keys)}"
                raise UsageError(f"this model has no input {key!r}", hint)
        if all(map(_is_missing, sample.values())):
            raise _at_sample(
                InputError("the sample is empty", f"give at least one of {', '.join(self.modalities)}"), row
            )

    @torch.inference_mode()
    def predict(
        self,
        samples: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 32,
        policy: Policy | None = None,
        details: bool = True,
    ) -> list[dict[str, Any]]:
        """Answer samples, in order. A missing key or None is a missing modality.

        A model that converses takes {"messages": [...]} as well, and answers the last question. What a guard
        refuses is answered `{"refused": reason, "guard": name}`.

        Raises:
            InputError: a raw input cannot be read; `row` is its position in `samples`.
        """
        samples = [samples] if isinstance(samples, Mapping) else samples
        if self.task.name == "speech-recognition":
            from mmhub.speech import transcribe  # what hears recordings of any length stands above this module

            return transcribe(self, samples, batch_size=batch_size, policy=policy)
        if isinstance(self.decoder, TextDecoder):
            return self.generate(samples, batch_size=batch_size, policy=policy)

        def answer(samples: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            for batch in self._batches(samples, batch_size, policy):
                try:
                    found += self.answers(batch, self(batch), details)
                except InputError as error:
                    raise _at_sample(error, len(found) + (error.row or 0)) from None
            return found

        return self.guarded(samples, answer, policy=policy)

    def answers(self, batch: Batch, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Return what the decoder answers to a batch, one a row."""
        found = self.decoder.predict(output, details=details)
        return self.decoder.locate(found, batch.raw, self.processors) if self.decoder.points else found

    def guarded(
        self,
        samples: Sequence[Mapping[str, Any]],
        answer: Callable[[Sequence[Mapping[str, Any]], Sequence[int]], list[dict[str, Any]]],
        seen: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda sample: sample,
        policy: Policy | None = None,
        said: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer samples by `answer(samples, rows)`, as far as guards let through: `rows` are their positions.

        Guards may rewrite samples; `seen` says what they are shown of one when they check it, `said` what those that
        watch inputs alone are, if that is less, and `policy` what they may read of its media.
        """
        if not self.has_guards:
            return answer(samples, range(len(samples)))
        for row, sample in enumerate(samples):
            self.check_sample(row, seen(sample) if isinstance(sample, Mapping) else sample)
        assert self._guards is not None
        return self._guards.answer(samples, answer, seen, policy, said)

    @property
    def has_guards(self) -> bool:
        """Is this model guarded, by guards of its own, MMHUB_GUARDS or plugins? They are found when first asked for."""
        if self._guards is None:
            self._guards = Guards(self)
        return bool(self._guards)

    def without_guards(self) -> Self:
        """Let nobody guard this model, which is one that guards use themselves."""
        self._guards = Guards.none()
        return self

    @property
    def reviews_answers(self) -> bool:
        """Do guards look at answers, so that a text must not be shown before it is complete?"""
        return self.has_guards and getattr(self._guards, "review_answers", True)

    # -- from texts to texts; the modules that do it stand above this one -----------------------------------------

    def generate(
        self,
        samples: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        settings: Generation | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Write a text for each sample: {"text", "finish", ...}; one may hold "messages" as in `chat`.

        See `mmhub.generate.generate` for the options.

        The keys of `Generation` may be given as options, too: `model.generate(samples, max_new_tokens=20)`.
        """
        from mmhub.generate import generate

        samples = [samples] if isinstance(samples, Mapping) else samples
        settings, options = self._settings(settings, options)
        return generate(self, samples, settings, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], settings: Generation | None = None, **options: Any) -> str:
        """Answer the last of `messages`, each {"role": "system" | "user" | "assistant", "content": text or parts}.

        A part is {"type": "text", "text"}, or {"type": "image", "image": raw input} and the like where the model has an
        encoder for it, in any order and number. See `mmhub.generate.chat` for the options; the keys of `Generation` may
        be given as options, too.
        """
        from mmhub.generate import chat

        settings, options = self._settings(settings, options)
        return chat(self, messages, settings, **options)

    def _settings(
        self, settings: Generation | None, options: Mapping[str, Any]
    ) -> tuple[Generation | None, dict[str, Any]]:
        """Take the keys of `Generation` out of options; what is not given stays as the decoder has it."""
        keys = {key: value for key, value in options.items() if key in Generation.__struct_fields__}
        rest = {key: value for key, value in options.items() if key not in keys}
        if keys and isinstance(self.decoder, TextDecoder):
            table = encode_config(settings or self.decoder.generation) | keys
            settings = decode_config(Generation, table, "generation settings")
        return settings, rest

    def score(self, texts: str | Sequence[str], *, end: bool | None = None) -> list[float]:
        """Return each text's log-probability by the chain rule, log P(w1) + log P(w2 | w1) + ..., in nats.

        `end` says whether the end of the text is part of it; None: as the model was trained.

        Raises:
            UsageError: the model is no language model. InputError: a text cannot be read.
        """
        from mmhub.perplexity import score_texts

        return [found.logprob for found in score_texts(self, [texts] if isinstance(texts, str) else texts, end=end)]

    def explain(self, sample: Mapping[str, Any], **options: Any) -> Explanation:
        """Say what of a sample speaks for the model's answer; see `mmhub.explain.explain` for the options."""
        from mmhub.explain import explain

        return explain(self, sample, **options)

    @property
    def language_model(self) -> LanguageModel:
        """The decoder, where it is a language model.

        Raises:
            UsageError: it is not.
        """
        if not isinstance(self.decoder, LanguageModel):
            raise UsageError(f"{self.name or 'this model'} is for {self.task.name}", "name a language model")
        return self.decoder

    @torch.no_grad()
    def embed(
        self,
        samples: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 32,
        policy: Policy | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return one vector a sample, (B, D): the fused summary, or the stream's own where there is a single one.

        A model that keeps several streams apart returns a dict of stream to (B, D), rows without it zero; one that was
        trained to tell what belongs together, vectors of length 1 in the space that the streams share.

        Raises:
            InputError: a raw input cannot be read; `row` is its position in `samples`.
        """
        decoder: Any = self.decoder
        widths = {name: decoder.dim if decoder.paired else part.summary for name, part in self.fusion.outputs.items()}
        found = {name: [torch.zeros(0, width)] for name, width in widths.items()}
        for batch in self._batches(samples, batch_size, policy):
            bundle = self.fused(batch)
            vectors = decoder.vectors(bundle) if decoder.paired else {}
            for name, parts in found.items():
                parts.append((vectors[name] if decoder.paired else summary(bundle[name])).float().cpu())
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return next(iter(joined.values())) if len(joined) == 1 else joined

    def _batches(self, samples: Any, batch_size: int, policy: Policy | None) -> Iterator[Batch]:
        """Yield the samples as batches on the model's device; the model is in evaluation mode meanwhile."""
        if isinstance(samples, Mapping):
            samples = [samples]
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(samples), batch_size):
                part = samples[start : start + batch_size]
                yield self._collate(part, policy or Policy(), start).to(self.device)
        finally:
            self.train(was_training)

    def save(self, folder: str | Path) -> Path:
        """Write the model as a checkpoint folder (data only); an older one there is replaced at once or not at all."""
        from mmhub.checkpoint import save  # the checkpoint module stands above this one

        return save(self, Path(folder))


def _by_length(encoder: Any, items: Items) -> Features:
    """Run an encoder that padding would disturb on items of equal length together."""
    lengths = items.lengths
    found: list[tuple[Tensor, Features]] = []
    padded_data = items.data.shape[1] == items.mask.shape[1]  # pixels (N, C, H, W) have a mask (N, 1)
    for length in lengths.unique().tolist():
        index = (lengths == length).nonzero().squeeze(1)
        data = items.data[index, :length] if padded_data else items.data[index]
        found.append((index, encoder(data, items.mask[index, :length])))
    order = torch.cat([index for index, _ in found]).argsort()
    tokens = [row[real] for _, part in found for row, real in zip(part.tokens, part.mask, strict=True)]
    padded, mask = pad_sequences(tokens)
    pooled = [part.pooled for _, part in found if part.pooled is not None]
    return Features(padded[order], mask.to(order.device)[order], pooled=torch.cat(pooled)[order] if pooled else None)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and not value)


def _at_sample(error: InputError, row: int) -> InputError:
    """Set the row, and note it for a traceback; what else shows the error names the row in its own terms."""
    error.row = row
    error.add_note(f"in sample {row}" + (f", {error.modality}" if error.modality else ""))
    return error
