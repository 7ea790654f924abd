"""Any text encoder of the transformers library, with the weights of a transformers folder or fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec
import torch
from torch import Tensor

from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub_text.embedding import vocabulary
from mmhub_text.library import (
    DEFAULT_LENGTH,
    FULL_PRECISION,
    PADDING_INVARIANT,
    build_model,
    complete_table,
    describe_model,
    find_folder,
    load_model,
    position_limit,
    read_description,
    read_length,
    read_pooling,
    read_tokenizer,
)
from mmhub_text.processor import TextProcessor, segments
from mmhub_text.tokenizer import load_tokenizer, read_recipe


class Transformers(Encoder):
    """The last hidden states of a transformers model; of encoder-decoder types the encoder, without any head."""

    modality: ClassVar[str] = "text"

    class Config(ComponentConfig, frozen=True):
        """Settings of the encoder.

        `config` holds `model_type` and hyper-parameters under transformers' own names; with `init` it changes those of
        the folder, for example the dropout. Texts are cut to `max_length` tokens, special ones included; by default
        the model's own limit. `pooling` says what summarises a text: the mean of its tokens, or the first one; `auto`
        is what a sentence-transformers folder says, else the mean.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        max_length: int | None = None
        pooling: Literal["auto", "mean", "cls"] = "auto"

        @classmethod
        def arrange(cls, table: dict[str, Any]) -> dict[str, Any]:
            """Take `model_type` and the hyper-parameters beside our own keys as well as in a `config` of their own."""
            if "model_type" not in table:
                return table
            own = {key: value for key, value in table.items() if key in cls.__struct_fields__}
            theirs = {key: value for key, value in table.items() if key not in own}
            return own | {"config": theirs | dict(own.get("config") or {})}

        def __post_init__(self) -> None:
            if self.max_length is not None and self.max_length < 1:
                raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    def __init__(self, config: Config, processor: TextProcessor) -> None:
        table = dict(config.config)
        if table.get("vocab_size") is None:  # fresh weights: the trained tokenizer decides
            table |= {"vocab_size": vocabulary(0, processor), "pad_token_id": processor.pad_id}
        described = describe_model(table)
        vocabulary(described.vocab_size, processor)
        pooling = "mean" if config.pooling == "auto" else config.pooling
        table, max_length = complete_table(described), _checked_length(processor.max_length, described)
        config = msgspec.structs.replace(config, config=table, pooling=pooling, max_length=max_length)
        super().__init__(config, processor)
        self.padding_invariant = described.model_type in PADDING_INVARIANT
        self.dim = int(described.hidden_size)
        self.pooled_dim = self.dim if pooling == "cls" else None
        self.pad_id = processor.pad_id if described.pad_token_id is None else int(described.pad_token_id)
        has_types = int(getattr(described, "type_vocab_size", None) or 0) > 1
        self.sep_id = processor.sep_id if has_types else None
        self.full_precision = described.model_type in FULL_PRECISION
        self.model = build_model(described)

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> TextProcessor:
        described = describe_model(config.config)
        max_length = _checked_length(config.max_length, described)
        return TextProcessor.from_recipe(tokenizer, default="bpe", max_length=max_length, wrap=True)

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> TextProcessor:
        return TextProcessor.from_state(state, files)

    @classmethod
    def from_library(cls, config: Config, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        """Read a transformers or sentence-transformers folder: JSON, tokenizer files and safetensors only."""
        folder = find_folder(path)
        described = read_description(folder, config.config)
        max_length = config.max_length or read_length(folder, described)
        processor = TextProcessor.of_tokenizer(
            _own_tokenizer(folder, tokenizer),
            max_length=_checked_length(max_length, described),
            pad_id=described.pad_token_id,
        )
        pooling = read_pooling(path) if config.pooling == "auto" else config.pooling
        config = msgspec.structs.replace(config, config=complete_table(described), pooling=pooling)
        with torch.device("meta"):  # the loaded model takes this one's place
            encoder = cls(config, processor)
        encoder.model = load_model(described, folder)
        return encoder

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode ids (N, S) to tokens (N, S, D)[, pooled (N, D)]."""
        ids = data.masked_fill(~mask, self.pad_id)  # RoBERTa counts positions by where the padding id is not
        types = {} if self.sep_id is None else {"token_type_ids": segments(data, mask, self.sep_id)}
        with torch.autocast(ids.device.type, enabled=False) if self.full_precision else nullcontext():
            states = self.model(input_ids=ids, attention_mask=mask.long(), **types).last_hidden_state
        tokens = states * mask.unsqueeze(-1).to(states.dtype)
        return Features(tokens=tokens, mask=mask, pooled=tokens[:, 0] if self.pooled_dim else None)


def _checked_length(wanted: int | None, described: Any) -> int:
    limit = position_limit(described)
    if wanted is not None and limit is not None and wanted > limit:
        raise UsageError(
            f"max_length {wanted} is more than the {limit} tokens this {described.model_type} has positions for",
            "lower max_length",
        )
    return wanted or limit or DEFAULT_LENGTH


def _own_tokenizer(folder: Path, table: Mapping[str, Any] | None) -> Any:
    if table is None:
        return read_tokenizer(folder)
    recipe = read_recipe({"kind": "pretrained"} | dict(table), "pretrained")
    if recipe.kind != "pretrained":
        raise UsageError(
            f"pretrained weights belong to their own tokenizer, not to a new one of kind {recipe.kind!r}",
            "leave [model.tokenizer] out",
        )
    return load_tokenizer(recipe.name) if recipe.name else read_tokenizer(folder)
