"""The classification heads of transformers, run by transformers' own code on the states of our encoder.

Each architecture has a head of its own (BERT's pooler and classifier, RoBERTa's two layers, the last token's score of
decoders). Instead of writing them again, its `...ForSequenceClassification` is built with a stand-in for the encoder
that passes on the states it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as States

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import Classifier, ComponentConfig, Stream
from mmhub.interfaces.labels import check_labels
from mmhub_text.library import classifier_class, complete_table, describe_model, load_classifier, quiet

# Held by a test that compares each of them with transformers.
HEADS = {
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gpt2", "llama"),
    *("modernbert", "mpnet", "qwen3", "rembert", "roberta", "roformer", "xlm-roberta"),
}


class TransformersClassification(Classifier):
    """The head of a transformers sequence classifier: one label a text."""

    needs: ClassVar[tuple[str, ...]] = ("text",)

    class Config(ComponentConfig, frozen=True):
        """`config` describes the model as it does for the `transformers` encoder, to which the head must belong."""

        labels: tuple[str, ...]
        config: dict[str, Any]

        def __post_init__(self) -> None:
            check_labels(self.labels)

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        described = describe_model(config.config)
        super().__init__(msgspec.structs.replace(config, config=complete_table(described)), inputs)
        if "text" not in inputs or inputs["text"].dim != described.hidden_size:
            raise UsageError(
                f"the head of a {described.model_type} reads the {described.hidden_size} features of its own encoder",
                'join it to that encoder alone, with the fusion "streams"',
            )
        self.head = build_head(described, len(config.labels))

    @classmethod
    def of_folder(
        cls, folder: Path, described: PreTrainedConfig, labels: tuple[str, ...]
    ) -> TransformersClassification:
        """Build with the head in a transformers folder."""
        inputs = {"text": Stream(int(described.hidden_size))}
        with torch.device("meta"):  # the loaded head takes this one's place
            decoder = cls(cls.Config(labels=labels, config=complete_table(described)), inputs)
        decoder.head = without_encoder(load_classifier(with_labels(described, len(labels)), folder))
        return decoder

    def logits(self, bundle: Bundle) -> Tensor:
        tokens, mask = bundle["text"].tokens, bundle["text"].mask
        pad = self.head.config.pad_token_id  # by which some heads find the last token
        ids = torch.where(mask, pad + 1, pad)
        logits: Tensor = self.head(input_ids=ids, attention_mask=mask.long(), inputs_embeds=tokens).logits
        return logits.float()


class _GivenStates(nn.Module):
    """Stands where the encoder was: returns the states that arrive as `inputs_embeds`, (B, T, D), and their pooling."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        pooler = getattr(encoder, "pooler", None)
        self.pooler = pooler if isinstance(pooler, nn.Module) else None
        self.activation: Any = getattr(encoder, "pooler_activation", None)  # ALBERT pools by two modules

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> States:
        if self.pooler is None:
            return States(last_hidden_state=inputs_embeds)
        plain = isinstance(self.pooler, nn.Linear)
        pooled = self.activation(self.pooler(inputs_embeds[:, 0])) if plain else self.pooler(inputs_embeds)
        return States(last_hidden_state=inputs_embeds, pooler_output=pooled)


def with_labels(described: PreTrainedConfig, labels: int) -> PreTrainedConfig:
    """Return a description of the same model with so many classes, as its classifier wants it."""
    config = describe_model(complete_table(described))
    config.num_labels = labels
    return config


def build_head(described: PreTrainedConfig, labels: int) -> PreTrainedModel:
    """Build a classifier without its encoder, with fresh weights."""
    on_meta = nn.Linear(1, 1).weight.is_meta  # mmhub is loading a checkpoint
    kind = classifier_class(described)
    with torch.device("meta"), quiet():
        head = without_encoder(kind(with_labels(described, labels)))
    if on_meta:
        return head
    head.to_empty(device="cpu")
    with torch.no_grad():
        head.apply(head._init_weights)
    return head


def without_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Put the stand-in where a classifier has its encoder; the names of the other tensors stay."""
    setattr(model, model.base_model_prefix, _GivenStates(getattr(model, model.base_model_prefix)))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return model.eval()
