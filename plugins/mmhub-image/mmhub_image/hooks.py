"""The hooks of this plugin. timm is imported only for a model that turns out to be one of timm's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.spec import hookimpl

if TYPE_CHECKING:
    from mmhub.interfaces import Decoder, Encoder, ForeignReader, ForeignWriter


@hookimpl
def mmhub_load_foreign(folder: Path, config: Mapping[str, Any]) -> Iterable[ForeignReader]:
    """Read timm models, with or without their classifier."""
    if not isinstance(config.get("architecture"), str) or "model_type" in config:
        return []
    from mmhub.interfaces import ForeignReader
    from mmhub_image.foreign import read_timm

    return [ForeignReader(library="timm", read=read_timm)]


@hookimpl
def mmhub_write_foreign(encoder: Encoder, decoder: Decoder | None, layout: str) -> Iterable[ForeignWriter]:
    """Write them, too."""
    if encoder.modality != "image" or layout != "timm":
        return []
    from mmhub.interfaces import ForeignWriter
    from mmhub_image.backbone import TimmEncoder
    from mmhub_image.foreign import write_timm

    if not isinstance(encoder, TimmEncoder):
        return []
    return [ForeignWriter(layout=layout, write=lambda folder: write_timm(encoder, decoder, folder))]
