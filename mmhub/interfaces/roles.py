"""The roles a plugin can play: Processor, Encoder, Fusion, Decoder.

Interfaces are abstract and implementations final: a plugin fills in the abstract methods and overrides no others,
except where a docstring says so. How a missing or repeated modality, freezing, devices, saving and loading work is the
model's business, never a plugin's.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Items, Output, Plan, pad_sequences
from mmhub.errors import InputError, UsageError
from mmhub.interfaces.config import ComponentConfig
from mmhub.interfaces.raw import Policy


@dataclass(frozen=True)
class Stream:
    """One entry of a bundle: `dim`, the width of its tokens, `pooled`, that of its own summary if it has one, and
    `seconds`, what one token of sound stands for: token k is about what was heard at k * seconds."""

    dim: int
    pooled: int | None = None
    seconds: float | None = None

    @property
    def summary(self) -> int:
        """Width of `mmhub.layers.summary` of this stream."""
        return self.pooled or self.dim


@dataclass(frozen=True)
class Window:
    """A piece of a long input: what `Processor.read` takes, and where it stands, in seconds from the start.

    `left` and `right` are how much of it the window before and the one after hold, too.
    """

    raw: Any
    start: float
    end: float
    left: float = 0.0
    right: float = 0.0


class Processor(ABC):
    """Turn raw inputs of one modality into packed tensors.

    Its whole state is JSON (`state`) plus named files (`files`, for example tokenizer.json), never pickle.
    """

    modality: ClassVar[str]
    needs_fit: bool = False  # must `fit` be called on training data before use?
    augments: bool = False  # does `read` use the generator that training passes?
    fixed_length: bool = False  # has every input the same length? Then batches are not grouped by it
    keeps_read: bool = False  # is what `read` gives small, 1-D integers? Then training reads each input only once

    @abstractmethod
    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Decode one raw input into a tensor whose first dimension is its length where the modality has one.

        `rng` is given in training alone, seeded by sample and epoch, and only if `augments` is set.

        Raises:
            InputError: `raw` is not a usable input of this modality.
        """

    marks: bool = False  # does `read` give ids of which those that are marked are ~id, a negative number?

    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Join at least one item into (data, mask); right-pads the first dimension. Override for fixed-size items."""
        return pad_sequences(items)

    def length(self, raw: Any, policy: Policy) -> int:
        """Return how many real positions one raw input has once it is packed. Override where that is known sooner.

        Batches are grouped by it before anything is decoded, so a header should do.

        Raises:
            InputError: `raw` is not a usable input of this modality.
        """
        return len(self.read(raw, policy))

    def is_item(self, raw: Sequence[Any]) -> bool:
        """Say whether a list or tuple is one raw input. Override where it may be; else it holds several items."""
        return False

    def windows(self, raw: Any, policy: Policy, seconds: float, overlap: float) -> Iterator[Window]:
        """Cut one raw input that lasts into windows of at most `seconds`, each sharing `overlap` with its neighbours.

        Only the window that is looked at need be in memory. Override for an encoder that is to hear recordings of any
        length; else the whole input is one window, which ends at 0: nobody knows.

        Raises:
            InputError: `raw` is not a usable input. UsageError: no windows can be cut so.
        """
        yield Window(raw, 0.0, 0.0)

    def fit(self, raws: Iterable[Any]) -> None:  # noqa: B027 - optional, unlike the abstract methods
        """Learn state such as a vocabulary from training inputs. Called once, and only if `needs_fit` is set."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return JSON data from which `from_state` rebuilds this processor."""

    def files(self) -> dict[str, bytes]:
        """Return the files that belong to the state, by Hugging Face's name for them, such as tokenizer.json."""
        return {}

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        """Rebuild a processor from what `state` and `files` returned."""

    def __call__(
        self,
        raw: Sequence[Any | None],
        policy: Policy,
        seeds: Sequence[int] | None = None,
        known: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> Items:
        """Turn one raw input, list of raw inputs or None for each batch row into packed items.

        `seeds`, one a row, switches training-time augmentation on. `known` holds what `read_row` gave before for a row,
        None for one that is still to be read.
        """
        read: list[Sequence[Tensor]] = []
        for row, value in enumerate(raw):
            found = known[row] if known is not None else None
            try:
                seed = None if seeds is None else seeds[row]
                read.append(self.read_row(value, policy, seed) if found is None else found)
            except InputError as error:
                error.row = row
                raise
        return self.pack_rows(read)

    def read_row(self, value: Any, policy: Policy, seed: int | None = None) -> list[Tensor]:
        """Read the raw inputs of one batch row: one, a list of several, or None for none."""
        rng = torch.Generator().manual_seed(seed) if seed is not None and self.augments else None
        try:
            return [self.read(item, policy, rng) for item in self.items_of(value)]
        except InputError as error:
            error.modality = self.modality
            raise

    def pack_rows(self, read: Sequence[Sequence[Tensor]]) -> Items:
        """Pack what `read_row` gave for each batch row."""
        items = [item for row in read for item in row]
        rows = torch.tensor([number for number, row in enumerate(read) for _ in row], dtype=torch.long)
        data, mask = self.pack(items) if items else (torch.zeros(0), torch.zeros(0, 0, dtype=torch.bool))
        marked = data < 0 if self.marks and items else None
        data = data if marked is None else torch.where(marked, ~data, data)
        return Items(data=data, mask=mask, rows=rows, batch=len(read), marks=marked)

    def items_of(self, value: Any) -> list[Any]:
        """Return the raw inputs of one batch row as a list."""
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return []
        return list(value) if isinstance(value, (list, tuple)) and not self.is_item(value) else [value]


_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages?|h)\.(\d+)\.")  # the outermost, where blocks hold blocks


class Encoder(nn.Module, ABC):
    """Turn items of one modality into features. An encoder sees items only: never rows, never a missing input.

    Attributes:
        modality: "text", "image", "audio" or a plugin's own.
        dim: width D of the tokens. pooled_dim: width of `Features.pooled`, None if the encoder gives none.
        token_seconds: seconds of sound that one token stands for, None for anything that does not last.
        padding_invariant: padding an item changes no real output. If False, mmhub runs items of equal length together.
        config, processor: what the encoder was built from, complete enough to rebuild it.
    """

    Config: ClassVar[type[ComponentConfig]]
    modality: ClassVar[str]
    padding_invariant: bool
    dim: int
    pooled_dim: int | None = None
    token_seconds: float | None = None
    config: Any
    processor: Any

    @classmethod
    @abstractmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> Processor:
        """Build the processor this encoder needs; `tokenizer` is the recipe's `[model.tokenizer]` table, if any."""

    @classmethod
    @abstractmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Processor:
        """Rebuild a saved processor (usually `SomeProcessor.from_state(state, files)`)."""

    @abstractmethod
    def __init__(self, config: Any, processor: Any) -> None:
        """Build with fresh weights; must work while parameters are on the meta device."""
        super().__init__()
        self.config, self.processor = config, processor

    @abstractmethod
    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode N >= 1 items: data (N, ...), mask (N, S) -> tokens (N, T, D), mask (N, T)[, pooled (N, P)]."""

    def token_count(self, positions: int) -> int:
        """Return how many real tokens an item of so many real positions becomes. Override where it is not as many.

        Batches that are filled up to a number of tokens, and counts of operations, rely on it.
        """
        return positions

    def layer_numbers(self) -> dict[str, int]:
        """Return in which layer a parameter is, by its name: 0 = what stands before all blocks, 1 = the first block.

        What is in none, such as a last norm, is left out, and so is everything where there are no layers. Override
        where names do not tell: "blocks.3." and the like are blocks, and embeddings stand before them.
        """
        names = [name for name, _ in self.named_parameters()]
        blocks = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
        numbers = {place: number for number, place in enumerate(sorted({*blocks.values()}), 1)}
        first = next((place for place, name in enumerate(names) if name in blocks), 0)
        before = {name: 0 for place, name in enumerate(names) if place < first or (blocks and "embed" in name)}
        return before | {name: numbers[place] for name, place in blocks.items()}

    @classmethod
    def from_library(cls, config: Any, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        """Build with the weights of the wrapped library's own checkpoint, a file or folder. Override where one exists.

        Only safetensors and JSON may be read, and no code from the checkpoint may run.
        """
        raise UsageError(
            f"{cls.__name__} has no library format to read '{path}' from",
            "give `init` the name of a checkpoint saved by mmhub",
        )

    @classmethod
    def examples(cls) -> Sequence[Any]:
        """Return raw inputs of different lengths for `mmhub plugins check`. Override for a modality of your own.

        Text, images and audio need none: the check has its own.
        """
        return ()

    @property
    def stream(self) -> Stream:
        return Stream(self.dim, self.pooled_dim, self.token_seconds)


class Fusion(nn.Module, ABC):
    """Combine the streams of a bundle. Rows may lack any modality; a fusion that mixes learns what stands in for it.

    Attributes:
        inputs: the streams it was built for. outputs: the streams it returns.
        reads: what it reads of its inputs: their "tokens", no more than their `mmhub.layers.summary`, or "nothing",
            if it only passes them on. A frozen encoder's features are kept in much less space for a "summary".
        by_item: it gets the streams of other modalities than text item by item, with `Features.rows`, and a plan.
    """

    Config: ClassVar[type[ComponentConfig]]
    reads: Literal["tokens", "summary", "nothing"] = "tokens"
    by_item: ClassVar[bool] = False
    inputs: dict[str, Stream]
    outputs: dict[str, Stream]
    config: Any

    @abstractmethod
    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__()
        self.config, self.inputs = config, dict(inputs)

    @abstractmethod
    def forward(self, bundle: Bundle, plan: Plan | None = None, embed: Any = None) -> Bundle:
        """Combine features by row. `bundle` holds every input stream, rows without an item fully masked.

        `plan` and `embed` serve fusions that interleave text and media: where media stand in the text, and the token
        embedding of the language model, which stays its owner.
        """

    def token_count(self, name: str, tokens: int) -> int:
        """Return how many tokens it makes of an item of the stream `name` that has so many. Override where that is not
        as many and the decoder's context has to hold them."""
        return tokens


class Decoder(nn.Module, ABC):
    """Turn features into logits, a loss and predictions.

    Attributes:
        tasks: names of the tasks it serves. needs: streams it reads; () means `fused`, or the only stream there is, or
        all of them where it can read several.
        reads: what it reads of them: their "tokens", or no more than their `mmhub.layers.summary`.
        reads_text: it reads the text of a sample itself, as ids: see `mmhub.interfaces.LanguageModel`.
        marks_words: it answers about words: the text processor marks where each begins (`Features.marks`).
        points: its answers point into the raw inputs: `locate` completes them.
        paired: it learns which inputs belong together: see `mmhub.interfaces.PairDecoder`.
    """

    Config: ClassVar[type[ComponentConfig]]
    reads: Literal["tokens", "summary"] = "tokens"
    tasks: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = False
    marks_words: ClassVar[bool] = False
    points: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    config: Any

    @abstractmethod
    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_library(
        cls,
        config: Any,
        path: Path,
        inputs: Mapping[str, Stream],
        tokenizer: Mapping[str, Any] | None = None,
    ) -> Self:
        """Build with the weights of the wrapped library's own checkpoint, as `Encoder.from_library`."""
        raise UsageError(
            f"{cls.__name__} has no library format to read '{path}' from",
            "give `init` the name of a checkpoint saved by mmhub",
        )

    def tie(self, encoders: Mapping[str, Encoder]) -> None:
        """Share parameters with encoders, such as embeddings. Called once after a model is built; saving keeps it."""

    def weigh(self, targets: Any) -> Tensor | None:
        """Return what each row counts in the mean loss, (B,): the number of its targets. None: every row the same."""
        return None

    def soft_targets(self, targets: Any) -> Tensor | None:
        """Return targets as what each label is worth, (B, V), so that those of two rows can be mixed; None = they
        cannot. `forward` and `weigh` take these as well."""
        return None

    def locate(
        self, answers: Sequence[dict[str, Any]], raw: Sequence[Mapping[str, Any]], processors: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Complete answers, one a row, that point into the rows' raw inputs (modality to raw). Only if `points`."""
        return list(answers)

    @classmethod
    def fit(cls, config: Any, targets: Iterable[Any]) -> Any:
        """Return `config` completed with what the training targets say, such as the label names."""
        return config

    @abstractmethod
    def encode_targets(self, targets: Sequence[Any]) -> Any:
        """Turn raw targets, one a row, into what `forward` takes.

        Raises:
            InputError: a target is missing, of the wrong type, or unknown (`row` is set).
        """

    def encode_references(self, targets: Sequence[Any]) -> Any:
        """Encode targets of rows that are measured, not trained on: as `encode_targets`, or with a weight of 0 for one
        that cannot be encoded but can be compared with an answer."""
        return self.encode_targets(targets)

    def references(self, targets: Sequence[Any]) -> list[Any]:
        """Return raw targets in the form in which `predict` answers, for metrics."""
        return list(targets)

    @abstractmethod
    def forward(self, bundle: Bundle, targets: Any = None) -> Output:
        """Return logits, and the mean loss over the batch if targets are given."""

    @abstractmethod
    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Return one JSON-ready answer a row; `details` adds what only people read, such as every label's score."""
