"""The hooks of this plugin. Nothing heavy is imported before a model turns out to be one for this plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.spec import hookimpl

if TYPE_CHECKING:
    from mmhub.interfaces import Decoder, Encoder, ForeignReader, ForeignWriter


@hookimpl
def mmhub_load_foreign(folder: Path, config: Mapping[str, Any]) -> Iterable[ForeignReader]:
    """Read text encoders of transformers and sentence-transformers."""
    if not isinstance(config.get("model_type"), str) and not (folder / "modules.json").is_file():
        return []
    from mmhub_text.foreign import find_reader

    return find_reader(folder, config)


@hookimpl
def mmhub_write_foreign(encoder: Encoder, decoder: Decoder | None, layout: str) -> Iterable[ForeignWriter]:
    """Write them, too."""
    if encoder.modality != "text" or layout not in ("transformers", "sentence-transformers"):
        return []
    from mmhub_text.layouts import find_writer

    return find_writer(encoder, decoder, layout)
