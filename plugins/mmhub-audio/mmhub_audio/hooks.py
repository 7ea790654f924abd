"""The hooks of this plugin. transformers is imported only for a model that turns out to be one of audio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.spec import hookimpl

if TYPE_CHECKING:
    from mmhub.interfaces import Decoder, Encoder, ForeignReader, ForeignWriter


@hookimpl
def mmhub_load_foreign(folder: Path, config: Mapping[str, Any]) -> Iterable[ForeignReader]:
    """Read wav2vec 2.0, HuBERT and WavLM, with or without a classification or CTC head, and Whisper."""
    if config.get("model_type") not in ("wav2vec2", "hubert", "wavlm", "whisper"):
        return []
    from mmhub.interfaces import ForeignReader
    from mmhub_audio.foreign import parts_of_others, read_transformers

    others = parts_of_others(folder, config)
    return [ForeignReader(library="transformers", read=read_transformers, components=others)]


@hookimpl
def mmhub_write_foreign(encoder: Encoder, decoder: Decoder | None, layout: str) -> Iterable[ForeignWriter]:
    """Write them, too, but for CTC heads and Whisper."""
    if encoder.modality != "audio" or layout != "transformers":
        return []
    from mmhub.interfaces import ForeignWriter
    from mmhub_audio.foreign import write_transformers
    from mmhub_audio.wav2vec2 import Wav2Vec2Family

    if not isinstance(encoder, Wav2Vec2Family):
        return []
    return [ForeignWriter(layout=layout, write=lambda folder: write_transformers(encoder, decoder, folder))]
