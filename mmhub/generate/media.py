"""What a model sees and hears of conversations: the features of each picture, sound and so on, computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmhub.batch import Bundle, Encoded, Features, pad_sequences
from mmhub.conversation import Message, media_of, pack_scripts
from mmhub.errors import InputError
from mmhub.interfaces import Policy, Script
from mmhub.interfaces.raw import local_path

if TYPE_CHECKING:
    from mmhub.model import Model

Key = tuple[Any, ...]
_AT_ONCE = 32  # items that an encoder sees together
_TURNED = 274  # the Exif tag that says how a picture is turned


@dataclass(frozen=True)
class _Item:
    """Of one item its tokens (T, D), and its own summary (P,)."""

    tokens: Tensor
    pooled: Tensor | None


class Media:
    """The media of a model's conversations. Each item is read and encoded once, however often it is asked for.

    An item is known by its content: what was changed in place is another one after `look_again`.
    """

    def __init__(self, model: Model, policy: Policy) -> None:
        self._model, self._policy = model, policy
        self._items: dict[Key, _Item] = {}
        self._sizes: dict[Key, int] = {}  # tokens of the language model; also of items in turns that were left out
        self._looked: dict[int, tuple[Any, Key]] = {}  # by id, which nothing else gets while the object is held

    def size(self, talk: Sequence[Message]) -> int:
        """Return how many tokens of the language model the media of a conversation are."""
        self.read([talk], self._sizes)
        return sum(self._sizes[key] for key, _, _ in self._parts(talk))

    def bundle(self, talks: Sequence[Sequence[Message]], scripts: Sequence[Script]) -> Bundle:
        """Return what the language model reads of conversations, one a row.

        Raises:
            InputError: an item cannot be read; `row` is set.
        """
        self.read(talks)
        names = list(self._model.encoders)
        text, plan, _ = pack_scripts(scripts, names)
        device = self._model.device
        packed = {name: self._packed(name, talks) for name in names}
        features = {name: found.to(device) for name, found in packed.items() if found is not None}
        bundle = self._model.encode({"text": text.to(device)}, len(talks), features)
        return self._model.fusion(bundle, plan=plan.to(device)) if names else self._model.fusion(bundle)

    def atoms(self, talk: Sequence[Message], script: Script) -> tuple[Any, ...]:
        """Return what a conversation consists of, in order: token ids, and keys of items."""
        keys = {
            name: iter([key for key, kind, _ in self._parts(talk) if kind == name]) for name in self._model.encoders
        }
        places = {place: next(keys[name]) for name, place in script.places}
        ids = iter(script.ids.tolist())
        return tuple(places.get(at) or next(ids) for at in range(len(script.ids) + len(places)))

    def look_again(self) -> None:
        """Expect that objects were changed in place."""
        self._looked = {}

    def keep(self, shown: Sequence[Message], talk: Sequence[Message]) -> None:
        """Forget the features of all that was not shown to the language model, and all of what is in no message."""
        seen, said = ({key for key, _, _ in self._parts(part)} for part in (shown, talk))
        self._items = {key: item for key, item in self._items.items() if key in seen}
        self._sizes = {key: size for key, size in self._sizes.items() if key in said}
        self.look_again()

    @torch.inference_mode()
    def read(self, talks: Sequence[Sequence[Message]], known: Collection[Key] | None = None) -> None:
        """Encode all items that are not among those known, by default those whose features are there."""
        known = self._items if known is None else known
        for name in self._model.encoders:
            raws: dict[Key, Any] = {}
            tensors: dict[Key, Tensor] = {}
            for row, talk in enumerate(talks):
                new = {key: raw for key, kind, raw in self._parts(talk) if kind == name and key not in known}
                tensors |= self._tensors(name, {key: raw for key, raw in new.items() if key not in raws}, row)
                raws |= new
            keys = list(tensors)
            for start in range(0, len(keys), _AT_ONCE):
                self._encode(name, {key: tensors[key] for key in keys[start : start + _AT_ONCE]})

    def _tensors(self, name: str, raws: Mapping[Key, Any], row: int) -> dict[Key, Tensor]:
        try:
            read = self._model.processors[name].read_row(list(raws.values()), self._policy) if raws else []
        except InputError as error:
            error.row = row
            raise
        return dict(zip(raws, read, strict=True))

    def _encode(self, name: str, found: Mapping[Key, Tensor]) -> None:
        processor: Any = self._model.processors[name]
        items = processor.pack_rows([[tensor] for tensor in found.values()]).to(self._model.device)
        features = self._model.encode_items(name, items)
        for number, key in enumerate(found):
            tokens = features.tokens[number][features.mask[number]]
            pooled = None if features.pooled is None else features.pooled[number]
            self._items[key] = _Item(tokens, pooled)
            self._sizes[key] = self._model.fusion.token_count(name, len(tokens))

    def _packed(self, name: str, talks: Sequence[Sequence[Message]]) -> Encoded | None:
        found = [
            (row, self._items[key])
            for row, talk in enumerate(talks)
            for key, kind, _ in self._parts(talk)
            if kind == name
        ]
        if not found:
            return None
        tokens, mask = pad_sequences([item.tokens for _, item in found])
        features = Features(tokens, mask.to(tokens.device))
        if found[0][1].pooled is not None:
            features = replace(
                features, pooled=torch.stack([item.pooled for _, item in found if item.pooled is not None])
            )
        return Encoded(features, torch.tensor([row for row, _ in found], device=tokens.device))

    def _parts(self, talk: Sequence[Message]) -> Iterator[tuple[Key, str, Any]]:
        """The key, modality and raw input of each item, those of a modality in their order."""
        for name in self._model.encoders:
            for raw in media_of(talk, name):
                yield (name, *self._look(raw)), name, raw

    def _look(self, raw: Any) -> Key:
        if isinstance(raw, (str, os.PathLike)):  # a file may change at any time
            return _identity(raw, self._policy)
        if id(raw) not in self._looked:
            self._looked[id(raw)] = raw, _identity(raw, self._policy)
        return self._looked[id(raw)][1]


class _Only:
    """An object that nothing is known of: equal to itself alone, and held, so that nothing else gets its id."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and self._raw is other._raw

    def __hash__(self) -> int:
        return id(self._raw)


def _identity(raw: Any, policy: Policy) -> Key:
    """What tells a raw input from others: its content, the state of its file, or, if neither is known, which it is."""
    if isinstance(raw, Mapping):
        return ("fields", *((str(name), _identity(value, policy)) for name, value in raw.items()))
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return "content", hashlib.sha256(raw).digest()
    if isinstance(raw, (list, tuple)) and not all(isinstance(value, (int, float)) for value in raw):
        return ("parts", *(_identity(value, policy) for value in raw))
    if isinstance(raw, (str, os.PathLike)):
        path = local_path(raw, policy)
        try:
            status = None if path is None else path.stat()
        except (OSError, ValueError):  # reading it will say what is wrong
            status = None
        return ("file", str(path), status.st_mtime_ns, status.st_size) if status else ("name", os.fspath(raw))
    if raw is None or isinstance(raw, (int, float, np.generic)):
        return "value", raw
    return _content(raw, policy) or ("object", _Only(raw))


def _content(raw: Any, policy: Policy) -> Key | None:
    """The content of numbers and pictures in memory, None for what cannot be read."""
    if isinstance(raw, Tensor):
        values = raw.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return "tensor", tuple(raw.shape), raw.dtype, hashlib.sha256(values.data).digest()
    if hasattr(raw, "getexif"):  # a picture of Pillow
        with suppress(Exception):  # Pillow raises nearly any on damaged data, and reading it will say what is wrong
            if raw.width * raw.height <= policy.max_pixels:
                raw.load()
                about = raw.mode, raw.size, raw.getexif().get(_TURNED), raw.getpalette(), raw.info.get("transparency")
                return "picture", repr(about), hashlib.sha256(raw.tobytes()).digest()
        return None
    if isinstance(raw, (np.ndarray, list, tuple)):
        array = np.ascontiguousarray(raw)
        if not array.dtype.hasobject:
            return "array", np.shape(raw), array.dtype.str, hashlib.sha256(array.tobytes()).digest()
    return None
