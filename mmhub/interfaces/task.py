"""Tasks: which decoders serve them, what is measured, and what the Hugging Face Hub calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmhub.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem: the default decoder, the metrics, and the number that decides which checkpoint is best.

    `monitor` names a metric (or "loss"); `higher_is_better` its direction. `required` modalities must be in the model.
    `reads_text`: its decoder is a language model, which reads the text of a sample itself; `writes`: answers are texts,
    written token by token; `paired`: it has no answer, for what belongs together stands in one row. `fusion` is taken
    where a recipe names none, '' for the usual one. `converses`: a row is a conversation, whose last answer is what is
    measured. `inputs` and `target` are column names that are taken likewise.
    """

    name: str
    decoder: str
    metrics: tuple[str, ...]
    monitor: str
    higher_is_better: bool
    required: tuple[str, ...] = ()
    reads_text: bool = False
    writes: bool = False
    paired: bool = False
    converses: bool = False
    fusion: str = ""
    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    target: str = ""
    tags: Mapping[str, str]  # modalities, such as "text" or "image+text", -> Hub pipeline_tag; "" for any others

    def pipeline_tag(self, modalities: tuple[str, ...]) -> str:
        """Return the Hub's name for this task on these modalities, '' if it has none."""
        several = self.tags.get("", "")
        if len(modalities) != 1:
            return self.tags.get("+".join(sorted(modalities)), several)
        return self.tags.get(modalities[0], "" if several == "any-to-any" else several)  # a plugin's own modality


_CLASSIFY = {"text": "text-classification", "image": "image-classification", "audio": "audio-classification"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            decoder="classification",
            metrics=("accuracy", "top", "f1", "calibration"),
            monitor="accuracy",
            higher_is_better=True,
            tags=_CLASSIFY | {"": "any-to-any"},
        ),
        Task(
            name="multilabel",
            decoder="multilabel",
            metrics=("multilabel",),
            monitor="f1",
            higher_is_better=True,
            tags=_CLASSIFY | {"": "any-to-any"},
        ),
        Task(
            name="regression",
            decoder="regression",
            metrics=("regression",),
            monitor="mse",
            higher_is_better=False,
            tags={"": ""},
        ),
        Task(
            name="tagging",
            decoder="tagging",
            metrics=("tagging",),
            monitor="f1",
            higher_is_better=True,
            required=("text",),
            inputs={"text": "tokens"},
            target="tags",
            tags={"text": "token-classification"},
        ),
        Task(
            name="question-answering",
            decoder="span",
            metrics=("answers",),
            monitor="f1",
            higher_is_better=True,
            required=("text",),
            inputs={"text": ("question", "context")},
            target="answers",
            tags={"text": "question-answering"},
        ),
        Task(
            name="language-modelling",
            decoder="transformer-lm",
            metrics=(),
            monitor="loss",
            higher_is_better=False,
            reads_text=True,
            writes=True,
            tags={"text": "text-generation"},
        ),
        Task(
            name="translation",
            decoder="seq2seq",
            metrics=("translation",),
            monitor="loss",
            higher_is_better=False,
            required=("text",),
            writes=True,
            inputs={"text": "source"},
            target="target",
            tags={"text": "translation"},
        ),
        Task(
            name="retrieval",
            decoder="contrastive",
            metrics=("retrieval",),
            monitor="mean_recall",
            higher_is_better=True,
            paired=True,
            fusion="streams",
            tags={
                "text": "sentence-similarity",
                "image+text": "zero-shot-image-classification",
                "audio+text": "zero-shot-audio-classification",
                "": "feature-extraction",
            },
        ),
        Task(
            name="speech-recognition",
            decoder="ctc",
            metrics=("speech",),
            monitor="wer",
            higher_is_better=False,
            required=("audio",),
            fusion="streams",
            target="text",
            tags={"": "automatic-speech-recognition"},
        ),
        Task(
            name="captioning",
            decoder="seq2seq",
            metrics=("captions",),
            monitor="loss",
            higher_is_better=False,
            writes=True,
            fusion="streams",
            target="caption",
            tags={"image": "image-to-text", "audio": "automatic-speech-recognition", "": "any-to-any"},
        ),
        Task(
            name="visual-question-answering",
            decoder="seq2seq",
            metrics=("visual_answers",),
            monitor="loss",
            higher_is_better=False,
            required=("image", "text"),
            writes=True,
            fusion="streams",
            inputs={"image": "image", "text": "question"},
            target="answer",
            tags={"": "visual-question-answering"},
        ),
        Task(
            name="chat",
            decoder="transformer-lm",
            metrics=("exact_match",),
            monitor="loss",
            higher_is_better=False,
            writes=True,
            converses=True,
            fusion="interleave",
            tags={"text": "text-generation", "image+text": "image-text-to-text", "audio+text": "audio-text-to-text"}
            | {"": "any-to-any"},
        ),
        Task(
            name="embedding",
            decoder="embedding",
            metrics=(),
            monitor="loss",
            higher_is_better=False,
            tags={"": "feature-extraction", "image": "image-feature-extraction"},
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        UsageError: there is none; near matches are suggested.
    """
    if name not in TASKS:
        known = f"tasks: {', '.join(TASKS)}"
        raise UsageError(f"unknown task {name!r}", did_you_mean(name, TASKS) or known)
    return TASKS[name]
