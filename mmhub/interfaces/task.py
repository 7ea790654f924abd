"""Tasks: which decoders serve them, what is measured, and what the Hugging Face Hub calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmhub.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem: the default decoder, the metrics, and the number that decides which checkpoint is best.

    `monitor` names a metric (or "loss"); `higher_is_better` its direction. `required` modalities must be in the model.
    """

    name: str
    decoder: str
    metrics: tuple[str, ...]
    monitor: str
    higher_is_better: bool
    required: tuple[str, ...] = ()
    tags: Mapping[str, str]  # modality -> Hub pipeline_tag when the model has that modality alone; "" for any other

    def pipeline_tag(self, modalities: tuple[str, ...]) -> str:
        """Return the Hub's name for this task on these modalities, '' if it has none."""
        several = self.tags.get("", "")
        if len(modalities) != 1:
            return several
        return self.tags.get(modalities[0], "" if several == "any-to-any" else several)  # a plugin's own modality


_CLASSIFY = {"text": "text-classification", "image": "image-classification", "audio": "audio-classification"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            decoder="classification",
            metrics=("accuracy", "f1"),
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
