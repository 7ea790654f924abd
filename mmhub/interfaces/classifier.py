"""What every decoder of one label a sample shares: labels, targets, loss and answers. The layers are a plugin's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Output
from mmhub.interfaces.labels import Labels, label_texts
from mmhub.interfaces.roles import Decoder, Stream


class Classifier(Decoder):
    """Softmax over `config.labels`, in their order; trained with the mean cross entropy of the rows.

    Attributes:
        labels: the known labels. smoothing: label smoothing of the loss.
        weights: what a row of each class counts in the mean loss, () for the same.
        temperature: what logits are divided by before they become scores.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    smoothing: float = 0.0
    weights: tuple[float, ...] = ()
    temperature: float = 1.0

    @abstractmethod
    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.labels = Labels(config.labels)

    @abstractmethod
    def logits(self, bundle: Bundle) -> Tensor:
        """Return (B, V) in fp32."""

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn raw labels into class numbers, (B,) long."""
        return self.labels.encode(targets)

    def weigh(self, targets: Tensor) -> Tensor | None:
        """Return the weight of each row's class, (B,), None where all weigh the same; the mean of soft ones (B, V)."""
        if not self.weights:
            return None
        weights = torch.tensor(self.weights, device=targets.device)
        # no product of matrices: autocast would round the weights
        return (targets * weights).sum(1) if targets.is_floating_point() else weights[targets]

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Return one-hot rows, (B, V) float."""
        return F.one_hot(targets, len(self.labels.names)).float()

    def references(self, targets: Sequence[Any]) -> list[str]:
        """Return the labels as text, as in the `label` of an answer."""
        return list(label_texts(targets))

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, V); the loss is the mean cross entropy with targets (B,), weighed by class.

        With soft targets (B, V) a row's loss is the mean of those of its classes, each weighed by its own weight.
        """
        logits = self.logits(bundle)
        return Output(logits=logits, loss=None if targets is None else self._loss(logits, targets))

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.weigh(targets)
        if weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if targets.is_floating_point():
            targets = targets * torch.tensor(self.weights, device=targets.device) / weights[:, None]
        # By hand, because PyTorch's weights would also weigh what smoothing gives to the other classes.
        losses = F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"label", "score"}`, with every label's probability in `scores` if `details`."""
        return self.labels.answers(output.logits / self.temperature, details)
