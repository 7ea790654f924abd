"""The frame of texts that a pretrained model knows: its begin, end and stop tokens, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mmhub.errors import TrustError
from mmhub.reading import TOKENIZER_BYTES, read_plain


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around a text.

    Attributes:
        begin_id: what a document begins with, and a prompt if `begins`. end_id: what a document ends with, if `ends`.
        stop_ids: ids that end a generated text. chat_template: a jinja2 template, "" for none.
        names: special tokens as templates know them, such as bos_token.
        media_tokens: by modality, what the template writes in the place of an item. media_around: by modality, texts
            that the model knows before and behind an item there.
    """

    begin_id: int | None = None
    end_id: int | None = None
    begins: bool = True
    ends: bool = True
    stop_ids: tuple[int, ...] = ()
    chat_template: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    media_tokens: Mapping[str, str] = field(default_factory=dict)
    media_around: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_frame(folder: Path, tokenizer: Tokenizer) -> Frame:
    """Read the frame from a transformers folder; begin and end tokens are put where its own tokenizer puts them."""
    settings, generation = _table(folder / "tokenizer_config.json"), _table(folder / "generation_config.json")
    names = _names(_table(folder / "special_tokens_map.json")) | _names(settings)
    config = _table(folder / "config.json")
    ids = {
        role: [
            *([] if (found := tokenizer.token_to_id(names.get(f"{role}_token", ""))) is None else [found]),
            *_ids(generation.get(f"{role}_token_id")),
            *_ids(config.get(f"{role}_token_id")),
        ]
        for role in ("bos", "eos")
    }
    begin, end = (next(iter(ids[role]), None) for role in ("bos", "eos"))
    around = tokenizer.encode("", add_special_tokens=True).ids
    begins, ends = settings.get("add_bos_token"), settings.get("add_eos_token")
    template = _template(folder, settings)
    extra = settings.get("extra_special_tokens")
    known = names | _names(extra if isinstance(extra, dict) else {}) | _names(_table(folder / "processor_config.json"))
    media = {m: written for m in _MODALITIES if (written := _placeholder(m, known, config, tokenizer, template))}
    stops = [*ids["eos"][:1], *_ids(generation.get("eos_token_id") or config.get("eos_token_id"))]
    return Frame(
        begin_id=begin,
        end_id=end,
        begins=begins if isinstance(begins, bool) else begin is not None and begin in around[:1],
        ends=ends if isinstance(ends, bool) else end is not None and end in around[-1:],
        stop_ids=tuple(dict.fromkeys(stops)),
        chat_template=template,
        names=names,
        media_tokens={modality: token for modality, (token, _) in media.items()},
        media_around={modality: around for modality, (_, around) in media.items() if any(around)},
    )


_MODALITIES = ("image", "audio", "video")


def _placeholder(
    modality: str, names: Mapping[str, str], config: Mapping[str, Any], tokenizer: Tokenizer, template: str
) -> tuple[str, tuple[str, str]] | None:
    """What a template writes in the place of an item, and what belongs around the item there.

    Gemma's writes the token that begins a picture; its processor puts it on lines of its own and closes it.
    """
    numbers = [*_ids(config.get(f"{modality}_token_id")), *_ids(config.get(f"{modality}_token_index"))]
    own = [names.get(f"{modality}_token"), *map(tokenizer.id_to_token, numbers)]
    found = next((token for token in own if token and token in template), None)
    if found is not None:
        return found, ("", "")
    begin, end = names.get(f"bo{modality[0]}_token"), names.get(f"eo{modality[0]}_token")
    return (begin, (f"\n\n{begin}", f"{end}\n\n")) if begin and end and begin in template else None


def _names(table: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in table.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def _ids(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int) and not isinstance(one, bool) and one >= 0:
            yield one


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    found = settings.get("chat_template") or _table(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        TrustError: it is not readable text.
    """
    try:
        return read_plain(path, TOKENIZER_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrustError(f"'{path}' is not readable UTF-8 text: {error}") from None


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TrustError(f"'{path}' is not readable JSON: {error}") from None
    if not isinstance(table, dict):
        raise TrustError(f"'{path}' should hold a JSON object")
    return table
