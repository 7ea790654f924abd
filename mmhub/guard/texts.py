"""The texts and media of a sample, whatever its shape: what guards look at and change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmhub.conversation import of_json

Sample = Mapping[str, Any]


def texts_of(sample: Sample) -> Iterator[str]:
    """Yield every text of a sample: of its "text", a list or a pair of them, and of its "messages", system's included.

    Parts of one message that stand side by side are one text, as a model reads them.

    >>> list(texts_of({"text": ["one", "two"]}))
    ['one', 'two']
    >>> list(texts_of({"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]}))
    ['ab']
    """
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    with_texts(sample, note)
    yield from found


def with_texts(sample: Sample, change: Callable[[str], str]) -> Sample:
    """Return a sample with every text changed, in the order of `texts_of`; the same object where nothing changes.

    >>> with_texts({"text": "a b", "image": "cat.png"}, str.upper)
    {'text': 'A B', 'image': 'cat.png'}
    """
    found = dict(sample)
    if sample.get("text") is not None:
        found["text"] = _changed(sample["text"], change)
    if sample.get("messages") is not None:
        found["messages"] = _talk(sample["messages"], change)
    return sample if all(found[key] is sample[key] for key in sample) else found


def media_in(sample: Sample, modality: str) -> Iterator[Any]:
    """Yield a sample's raw inputs of a modality, those in its "messages" included: paths, bytes, URLs, objects."""
    raw = sample.get(modality)
    yield from (one for one in (raw if isinstance(raw, (list, tuple)) else [raw]) if one is not None)
    for message in _messages(sample.get("messages")):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in _listed(content) or ():
            if isinstance(part, Mapping) and part.get("type") in _NAMES.get(modality, (modality,)):
                kinds = (modality, str(part["type"]), "path", "url", "data")
                one = next((part[key] for key in kinds if part.get(key) is not None), None)
                one = next(iter(one.values()), None) if isinstance(one, Mapping) and len(one) == 1 else one
                yield from () if one is None else (one,)


def with_media(sample: Sample, modality: str, change: Callable[[Any], Any]) -> Sample:
    """Return a sample with every raw input of a modality changed; the same object where nothing changes.

    >>> with_media({"image": "a.png", "text": "a"}, "image", lambda raw: b"x")
    {'image': b'x', 'text': 'a'}
    """
    found = dict(sample)
    raw = sample.get(modality)
    if isinstance(raw, (list, tuple)):
        found[modality] = _kept(raw, [change(one) for one in raw])
    elif raw is not None:
        found[modality] = change(raw)
    if sample.get("messages") is not None:
        messages = _messages(sample["messages"])
        made = [_with_parts(message, modality, change) for message in messages]
        found["messages"] = sample["messages"] if _kept(messages, made) is messages else made
    return sample if all(found[key] is sample[key] for key in sample) else found


def _kept(old: Any, new: list[Any]) -> Any:
    return old if all(a is b for a, b in zip(old, new, strict=True)) else new


def _with_parts(message: Any, modality: str, change: Callable[[Any], Any]) -> Any:
    """A message whose parts of a modality are changed, each as mmhub has them: {"type": modality, modality: raw}."""
    content = _listed(message.get("content")) if isinstance(message, Mapping) else None
    if content is None:
        return message
    parts = []
    for part in content:
        raw = next(media_in({"messages": [{"content": [part]}]}, modality), None)
        made = None if raw is None else change(raw)
        parts.append(part if made is raw else {"type": modality, modality: made})
    return message if _kept(content, parts) is content else {**message, "content": parts}


_NAMES = {"image": ("image", "image_url"), "audio": ("audio", "audio_url", "input_audio")}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A text, or a list or mapping of texts, changed; the same object if it stays as it is."""
    if isinstance(value, str):
        new = change(value)
        return value if new == value else new
    if isinstance(value, Mapping):
        made = {key: _changed(item, change) for key, item in value.items()}
        return value if all(made[key] is value[key] for key in value) else made
    listed = _listed(value)
    if listed is None:
        return value
    items = [_changed(item, change) for item in listed]
    return value if all(a is b for a, b in zip(items, listed, strict=True)) else items


def _talk(value: Any, change: Callable[[str], str]) -> Any:
    """A conversation with its texts changed, the same object if nothing is."""
    messages = _messages(value)
    made = [_message(message, change) for message in messages]
    return value if all(a is b for a, b in zip(made, messages, strict=True)) else made


def _messages(value: Any) -> Any:
    return _listed(of_json(value)) or ()


def _message(message: Any, change: Callable[[str], str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    parts = _listed(content)
    made = _changed(content, change) if isinstance(content, str) else _parts(content, parts, change) if parts else None
    return message if made is None or made is content else {**message, "content": made}


def _parts(content: Any, parts: Any, change: Callable[[str], str]) -> Any:
    """Parts of a message, of which texts side by side are changed as one."""
    made: list[Any] = []
    run: list[Any] = []

    def end_run() -> None:
        text = "".join(_text_in(part) or "" for part in run)
        new = change(text) if run else text
        made.extend(run if new == text else [{"type": "text", "text": new}])
        run.clear()

    for part in parts:
        if _text_in(part) is not None:
            run.append(part)
            continue
        end_run()
        made.append(part)
    end_run()
    same = len(made) == len(parts) and all(a is b for a, b in zip(made, parts, strict=True))
    return content if same else made


def _text_in(part: Any) -> str | None:
    """The text of a part, None if it is of another kind."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _listed(value: Any) -> Any:
    """A list, also one of numpy's; None for what is none."""
    if hasattr(value, "tolist") and getattr(getattr(value, "dtype", None), "kind", "") == "O":
        value = value.tolist()
    return value if isinstance(value, (list, tuple)) else None
