"""The model: encoders, fusion and decoder joined, with everything around them that a plugin author need not know.

It packs raw samples, runs each encoder on the items that exist, keeps batching from changing results, and turns a
decoder's output into answers. Training, saving and publishing are left to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mmhub.batch import Batch, Bundle, Features, Items, Output, pad_sequences
from mmhub.errors import InputError, UsageError, did_you_mean
from mmhub.interfaces import Decoder, Encoder, Fusion, Policy, Task
from mmhub.layers import summary

if TYPE_CHECKING:
    from mmhub.plugins import Component


@dataclass(frozen=True)
class Columns:
    """Which column of a table feeds which modality, and which holds the target; kept with a checkpoint."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    names: tuple[str, ...] = ()  # the columns of a table without a header


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
        self.name = ""

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    @property
    def processors(self) -> dict[str, Any]:
        return {name: encoder.processor for name, encoder in self.encoders.items()}

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def parts(self) -> dict[str, nn.Module]:
        """The components by role: `<modality>_encoder`, `fusion`, `decoder`. Tensor names in files start with these."""
        return {f"{name}_encoder": encoder for name, encoder in self.encoders.items()} | {
            "fusion": self.fusion,
            "decoder": self.decoder,
        }

    def freeze(self, modality: str) -> None:
        """Exclude an encoder from training: no gradients, and evaluation mode for its norms and dropout."""
        self.frozen.add(modality)
        self.encoders[modality].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for modality in self.frozen:
            self.encoders[modality].eval()
        return self

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """Return logits, and the loss where the batch has targets."""
        return self.decode(self.encode(batch.items, batch.size), batch.targets)

    def encode(self, items: Mapping[str, Items], size: int) -> Bundle:
        """Run every encoder on its items and gather the features by row; rows without an item are fully masked."""
        return {name: self._encode_one(name, items.get(name), size) for name in self.encoders}

    def decode(self, bundle: Bundle, targets: Any = None) -> Output:
        output: Output = self.decoder(self.fusion(bundle), targets)
        return output

    def _encode_one(self, name: str, items: Items | None, size: int) -> Features:
        encoder: Any = self.encoders[name]
        if items is None or not len(items):
            return self._absent(encoder, size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
            features = encoder(items.data, items.mask) if encoder.padding_invariant else _by_length(encoder, items)
        rows: Features = features.to_rows(items.rows, size)
        return rows

    def _absent(self, encoder: Encoder, size: int) -> Features:
        device = self.device
        pooled = torch.zeros(size, encoder.pooled_dim, device=device) if encoder.pooled_dim else None
        tokens = torch.zeros(size, 1, encoder.dim, device=device)
        return Features(tokens, torch.zeros(size, 1, dtype=torch.bool, device=device), pooled=pooled)

    # -- from raw samples ---------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Mapping[str, Any]], policy: Policy | None = None) -> Batch:
        """Pack raw samples, each a mapping of modality to raw input, into a batch."""
        policy = policy or Policy()
        for row, sample in enumerate(samples):
            self._check_sample(row, sample)
        items = {
            name: encoder.processor([sample.get(name) for sample in samples], policy)
            for name, encoder in self.encoders.items()
        }
        return Batch(items=items, size=len(samples))

    def _check_sample(self, row: int, sample: Mapping[str, Any]) -> None:
        if not isinstance(sample, Mapping):
            raise UsageError(f"sample {row} is a {type(sample).__name__}", "a sample is a dict of modality to raw input")
        for key in sample:
            if key not in self.encoders:
                hint = did_you_mean(str(key), self.modalities) or f"it takes {', '.join(self.modalities)}"
                raise UsageError(f"this model has no input {key!r}", hint)
        if all(value is None or value == [] for value in map(_plain, sample.values())):
            error = InputError(f"sample {row} is empty", f"give at least one of {', '.join(self.modalities)}")
            error.row = row
            raise error

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

        Raises:
            InputError: a raw input cannot be read; `row` is its position in `samples`.
        """
        answers: list[dict[str, Any]] = []
        for batch in self._batches(samples, batch_size, policy):
            answers += self.decoder.predict(self(batch), details=details)
        return answers

    @torch.inference_mode()
    def embed(
        self,
        samples: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 32,
        policy: Policy | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return one vector a sample, (B, D): the fused summary, or the stream's own where there is a single one.

        A model that keeps several streams apart returns a dict of stream to (B, D), rows without it zero.
        """
        found: dict[str, list[Tensor]] = {}
        for batch in self._batches(samples, batch_size, policy):
            bundle = self.fusion(self.encode(batch.items, batch.size))
            for name in self.fusion.outputs:
                found.setdefault(name, []).append(summary(bundle[name]).float().cpu())
        vectors = {name: torch.cat(parts) for name, parts in found.items()}
        return next(iter(vectors.values())) if len(vectors) == 1 else vectors

    def _batches(self, samples: Any, batch_size: int, policy: Policy | None) -> Any:
        if isinstance(samples, Mapping):
            samples = [samples]
        self.eval()
        for start in range(0, len(samples), batch_size):
            try:
                batch = self.collate(samples[start : start + batch_size], policy)
            except InputError as error:
                error.row = None if error.row is None else error.row + start
                raise
            yield batch.to(self.device)

    def save(self, folder: str | Path) -> Path:
        """Write the model as a checkpoint folder (data only), replacing an older checkpoint there at once or not at all."""
        from mmhub.checkpoint import save  # the checkpoint module stands above this one

        return save(self, Path(folder))


def _by_length(encoder: Any, items: Items) -> Features:
    """Run an encoder that padding would disturb on items of equal length together."""
    lengths = items.lengths
    found: list[tuple[Tensor, Features]] = []
    for length in lengths.unique().tolist():
        index = (lengths == length).nonzero().squeeze(1)
        found.append((index, encoder(items.data[index, :length], items.mask[index, :length])))
    order = torch.cat([index for index, _ in found]).argsort()
    tokens = [row[real] for _, part in found for row, real in zip(part.tokens, part.mask, strict=True)]
    padded, mask = pad_sequences(tokens)
    pooled = [part.pooled for _, part in found if part.pooled is not None]
    return Features(padded[order], mask.to(order.device)[order], pooled=torch.cat(pooled)[order] if pooled else None)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else (None if value is None else 0)
