"""Zero-shot classification: a retrieval model tells apart labels that it was never trained on, by their names.

Each label becomes a text by templates, and the class of an input is the label whose text is nearest (Radford et al.,
"Learning transferable visual models from natural language supervision", arXiv:2103.00020). What comes out is a model
like any other: it predicts, and `mmhub.evaluate` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Features
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.fusion.streams import Streams
from mmhub.interfaces import Classifier, ComponentConfig, PairDecoder, Policy, Stream, Task
from mmhub.interfaces.labels import at_row, is_missing, label_order, label_texts, plain
from mmhub.model import Columns, Model

TEMPLATES: Mapping[str, str] = {"image": "a photo of a {}", "audio": "this is a sound of {}"}  # of all others "{}"

TASK = Task(
    name="zero-shot-classification",
    decoder="contrastive",
    metrics=("accuracy", "top", "f1"),
    monitor="accuracy",
    higher_is_better=True,
    tags={"image": "zero-shot-image-classification", "audio": "zero-shot-audio-classification", "": ""},
)


def classifier(model: Model, labels: Sequence[str], templates: Sequence[str] = (), *, batch_size: int = 32) -> Model:
    """Return a classifier of `labels` that shares the parts of a retrieval model, and is in training mode if that is.

    A template is a text with `{}` where the label goes; of several, the vectors of a label are averaged. Without any,
    it is "a photo of a {}" for images, "this is a sound of {}" for audio, and the label itself for anything else.

    Raises:
        UsageError: the model has no texts to compare with, there are fewer than two labels, one is empty or listed
            twice, or a template lacks its `{}`.
    """
    modality = _compared(model)
    templates = templates or (TEMPLATES.get(modality, "{}"),)
    _check(labels, templates)
    decoder: Any = model.decoder
    head = ZeroShot(ZeroShot.Config(labels=tuple(labels)), model.fusion.outputs)
    head.base, head.side = decoder, modality
    head.register_buffer("anchors", label_vectors(model, labels, templates, batch_size).to(model.device), False)
    encoder: Any = model.encoders[modality]
    fusion = Streams(Streams.Config(), {modality: encoder.stream})
    column = model.columns.inputs.get(modality, modality)
    columns = Columns(inputs={modality: column.partition("+")[0]}, names=model.columns.names)
    found = Model(TASK, {modality: encoder}, fusion, head, model.sources, columns)
    found.name, found.parents, found.frozen = model.name, model.parents, model.frozen & {modality}
    for own in (found, found.encoders, fusion, head):
        own.training = model.training  # `train()` would reach into the parts that are shared
    return found


def classify(
    model: Model,
    samples: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    templates: Sequence[str] = (),
    *,
    batch_size: int = 32,
    policy: Policy | None = None,
) -> list[dict[str, Any]]:
    """Answer `{"label", "score", "scores"}` for each sample, in order; see `classifier`.

    Scores are the softmax over the labels of the model's own logits, with its temperature.

    Raises:
        UsageError: see `classifier`. InputError: a raw input cannot be read; `row` is its position in `samples`.
    """
    found = classifier(model, labels, templates, batch_size=batch_size)
    return found.predict(samples, batch_size=batch_size, policy=policy)


@torch.no_grad()
def label_vectors(model: Model, labels: Sequence[str], templates: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return a vector of length 1 for each label, (V, E): the mean over templates of the vectors of its texts."""
    texts = [{"text": template.replace("{}", label)} for label in labels for template in templates]
    found = model.embed(texts, batch_size=batch_size)
    vectors = found if isinstance(found, Tensor) else found["text"]
    return F.normalize(vectors.reshape(len(labels), len(templates), -1).mean(1), dim=1)


def labels_in(targets: Iterable[Any]) -> tuple[str, ...]:
    """Return the labels that occur in a column, in order; rows without one are passed over."""
    given = (target for target in targets if not is_missing(plain(target)))
    return tuple(sorted(set(label_texts(given)), key=label_order))


class ZeroShot(Classifier):
    """Logits of the vectors of one side against those of the labels; only `classifier` makes one."""

    base: PairDecoder
    side: str
    anchors: Tensor  # (V, E), of the labels
    reads = "summary"

    class Config(ComponentConfig, frozen=True):
        """The labels."""

        labels: tuple[str, ...]

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.streams = dict(inputs)

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        for row, label in enumerate(label_texts(targets)):
            if label not in self.labels.names:
                shown = ", ".join(self.labels.names[:10])
                hint = did_you_mean(label, self.labels.names) or "name all labels, or `--labels auto`"
                raise at_row(InputError(f"label {label!r} is none of those given: {shown}", hint), row)
        return super().encode_targets(targets)

    def logits(self, bundle: Bundle) -> Tensor:
        own = bundle[self.side]
        sides = {name: own if name == self.side else self._nothing(name, own) for name in self.base.sides}
        return self.base.scores(self.base.vectors(sides)[self.side], self.anchors)

    def _nothing(self, name: str, beside: Features) -> Features:
        """As many rows without this stream as there are `beside`."""
        stream = self.streams.get(name, self.streams[self.side])
        pooled = None if stream.pooled is None else beside.tokens.new_zeros(len(beside.tokens), stream.pooled)
        tokens = beside.tokens.new_zeros(len(beside.tokens), 1, stream.dim)
        return Features(tokens, beside.mask.new_zeros(len(tokens), 1), pooled=pooled)


def _compared(model: Model) -> str:
    """The modality that is compared with texts."""
    decoder: Any = model.decoder
    if not isinstance(decoder, PairDecoder):
        hint = "name a model for retrieval; one with labels of its own predicts without --labels"
        raise UsageError(f"{model.name or 'this model'} is for {model.task.name}, which knows no other labels", hint)
    if "text" not in decoder.sides:
        raise UsageError(f"labels are texts, and this model compares {' with '.join(decoder.sides)}", "name another")
    return next((name for name in decoder.sides if name in model.encoders and name != "text"), "text")


def _check(labels: Sequence[str], templates: Sequence[str]) -> None:
    if len(labels) < 2:
        raise UsageError(f"{len(labels)} label is no choice" if labels else "no labels are given", "name at least two")
    if not all(label.strip() for label in labels):
        raise UsageError("a label is empty", "leave it out")
    twice = next((label for number, label in enumerate(labels) if label in labels[:number]), None)
    if twice is not None:
        raise UsageError(f"the label {twice!r} is listed twice", "name each once")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"the template {template!r} has no {{}} for the label", "e.g. 'a photo of a {}'")
