"""The CTC head of transformers' Wav2Vec2ForCTC, HubertForCTC and WavLMForCTC, from JSON and safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmhub.errors import TrustError, UsageError


def read_vocabulary(folder: Path, size: int) -> tuple[int, tuple[str, ...], bool]:
    """Return which of `size` outputs is the blank, what the others write in order, and whether in lower case.

    A blank parts words, as it does here; what has no name in the folder is written as its number in brackets.

    Raises:
        UsageError: there is no vocabulary, or one for several languages.
    """
    names = _read(folder, "vocab.json")
    settings, model = _read(folder, "tokenizer_config.json"), _read(folder, "config.json")
    if not names or not all(isinstance(number, int) for number in names.values()):
        what = "vocab.json for several languages" if names else "vocab.json"
        found = "holds a" if names else "has no"
        raise UsageError(f"'{folder}' {found} {what}", "name a folder of one language, saved with its tokenizer")
    by_number = {number: name for name, number in names.items()}
    by_number |= {int(n): _content(token) for n, token in settings.get("added_tokens_decoder", {}).items()}
    blank = names.get(_content(settings.get("pad_token", "<pad>")), model.get("pad_token_id", 0))
    lower = bool(settings.get("do_lower_case", False))
    parting = _content(settings.get("word_delimiter_token", "|"))
    pieces = [by_number.get(number, f"<{number}>") for number in range(size)]
    pieces = [" " if piece == parting else piece.lower() if lower else piece for piece in pieces]
    return blank, tuple(piece for number, piece in enumerate(pieces) if number != blank), lower


def read_head(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the weight (V, D) and bias (V,) of the output layer, fp32.

    Raises:
        UsageError: there is none in safetensors. TrustError: a file is damaged.
    """
    where = _read(folder, "model.safetensors.index.json").get("weight_map", {})
    found = []
    for name in ("lm_head.weight", "lm_head.bias"):
        file = folder / Path(str(where.get(name, "model.safetensors"))).name
        try:
            with safe_open(str(file), framework="pt") as content:
                if name not in content.keys():  # noqa: SIM118 - it is no mapping
                    raise UsageError(f"'{file}' holds no {name}", "name a folder saved from a ...ForCTC model")
                found.append(content.get_tensor(name).to(torch.float32))
        except FileNotFoundError:
            raise UsageError(f"'{folder}' has no {file.name}", "convert the model to safetensors") from None
        except (SafetensorError, OSError) as error:
            raise TrustError(f"'{file}' is not a whole safetensors file: {error}") from None
    return found[0], found[1]


def blank_first(tensor: Tensor, blank: int) -> Tensor:
    """Move the row of the blank to the front."""
    return torch.cat((tensor[blank : blank + 1], tensor[:blank], tensor[blank + 1 :]))


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrustError(f"'{file}' is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TrustError(f"'{file}' holds a {type(data).__name__}, expected an object")
    return data


def _content(token: Any) -> str:
    """A token's text, which may stand in a table with how it is cut."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)
