"""Models that another library wrote: what a plugin says it can read or write, and the parts it makes of one.

These are the records of the hooks `mmhub_load_foreign` and `mmhub_write_foreign`. Joining the parts to a model, and
fetching files, is left to `mmhub.hub.foreign`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmhub.errors import MmhubError
from mmhub.interfaces.roles import Decoder, Encoder


@dataclass(frozen=True, kw_only=True)
class ForeignPart:
    """A part that another plugin reads from the same checkpoint, by `from_library` of the component `id`."""

    id: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ForeignParts:
    """The encoder of another library's model, and its head if it has one, each with its component's full id.

    Attributes:
        encoder, encoder_id: the encoder, and what a checkpoint calls it, such as "mmhub-text/transformers"; None for a
            language model, which reads text itself.
        decoder, decoder_id: the head, or the decoder that writes text; None makes a model that only embeds.
        decoder_from, decoder_config: the library's checkpoint from which another plugin's decoder, `decoder_id`, is
            read instead, by `Decoder.from_library`, and what its configuration says beside that.
        senses: by modality the encoders of a language model that does not read text alone.
        projectors, weights: how the fusion "interleave" brings their tokens to the language model, as its configuration
            says it, and its tensors by name.
        task: the task the head serves.
        left_out: the library's name of a head that cannot be run here, for the message of `predict`.
    """

    encoder: Encoder | None = None
    encoder_id: str = ""
    decoder: Decoder | None = None
    decoder_id: str = ""
    decoder_from: Path | None = None
    decoder_config: Mapping[str, Any] = field(default_factory=dict)
    senses: Mapping[str, ForeignPart] = field(default_factory=dict)
    projectors: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    task: str = "embedding"
    left_out: str = ""


@dataclass(frozen=True, kw_only=True)
class ForeignReader:
    """A plugin's offer to read a folder. `refusal` says why it will not, before any weights are fetched for it.

    `components` are those of other plugins that it takes, (kind, name): they must be there, too.
    """

    library: str  # as people know it: "transformers", "timm"
    read: Callable[[Path], ForeignParts]
    refusal: MmhubError | None = None
    components: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForeignWriter:
    """A plugin's offer to write a model to an empty folder in a library's own layout."""

    layout: str
    write: Callable[[Path], None]
