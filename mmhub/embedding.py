"""The decoder of a model without a task head: it embeds, and says how to add a head when asked to predict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from mmhub.batch import Bundle, Output
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Stream
from mmhub.layers import summary


class Embedding(Decoder):
    """No head at all; its logits are the summary of a sample."""

    tasks: ClassVar[tuple[str, ...]] = ("embedding",)

    class Config(ComponentConfig, frozen=True):
        """`left_out` names the head that the model had in its own library, if that head cannot be run here."""

        left_out: str = ""

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.inputs = tuple(inputs)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        if next(iter(targets), None) is not None:  # there are none where a model is only composed
            raise UsageError("the task 'embedding' has nothing to train", "choose another, such as classification")
        return config

    def encode_targets(self, targets: Sequence[Any]) -> Any:
        self._refuse()

    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        return Output(logits=summary(next(iter(bundle.values()))))

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        why = f", for mmhub cannot run its {self.config.left_out}" if self.config.left_out else ""
        raise UsageError(
            f"this model has no task head{why}: it only embeds",
            f"train a head by a recipe: [model.encoders.{self.inputs[0]}] init = its name",
        )
