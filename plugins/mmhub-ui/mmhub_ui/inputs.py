"""What a person hands to a model: the fields that its modalities need, and the sample that is made of them."""

from __future__ import annotations

import shlex
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmhub.errors import InputError
from mmhub_ui.context import TEXT_CHARS

if TYPE_CHECKING:
    from mmhub.interfaces import Generation
    from mmhub.model import Model


@dataclass(frozen=True)
class Wants:
    """Which fields a model needs. `pair` is what its second text is called, "" if it reads one alone."""

    modalities: tuple[str, ...] = ()
    pair: str = ""
    labels: bool = False  # told apart by it without having learnt them
    times: bool = False
    writes: bool = False
    chats: bool = False

    @classmethod
    def of(cls, model: Model) -> Wants:
        from mmhub.interfaces import LanguageModel, PairDecoder, TextDecoder

        decoder: Any = model.decoder
        writes = isinstance(decoder, TextDecoder)
        compares = isinstance(decoder, PairDecoder)
        return cls(
            modalities=model.modalities,
            pair=_pair(model),
            labels=compares and "text" in decoder.sides,
            times=writes and model.task.name == "speech-recognition" and len(model.modalities) == 1,
            writes=writes,
            chats=isinstance(decoder, LanguageModel) and bool(decoder.processor.chat_template),
        )


def _pair(model: Model) -> str:
    """A model reads two texts if it answers questions about one, compares them, or learnt from two columns."""
    if model.task.name == "question-answering":
        return "Context"
    if model.decoder.paired and list(model.encoders) == ["text"]:
        return "Second text"
    return "Second text" if "+" in model.columns.inputs.get("text", "") else ""


@dataclass(frozen=True)
class Given:
    """What stands in the fields."""

    text: str | None = None
    pair: str | None = None
    image: str | None = None
    audio: str | None = None
    labels: str | None = None
    times: str | None = None
    writing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        return [file for file in (self.image, self.audio) if file]

    @property
    def names(self) -> list[str]:
        """The labels that were typed, by commas or lines."""
        return [one.strip() for one in (self.labels or "").replace("\n", ",").split(",") if one.strip()]

    def sample(self, model: Model) -> dict[str, Any]:
        """Return what of it the model takes; what is empty is missing. Labels stand in for a text beside a picture."""
        labelled = _by_labels(model, self) and len(model.encoders) > 1
        found: dict[str, Any] = {"image": self.image, "audio": self.audio, "text": self._texts(model)}
        found |= {"text": None} if labelled else {}
        return {key: value for key, value in found.items() if key in model.modalities and value}

    def _texts(self, model: Model) -> Any:
        if not self.pair or not _pair(model):
            return self.text
        both = self.text or "", self.pair
        if model.decoder.paired:
            return list(both) if self.text else self.pair
        return dict(zip(("text", "text_pair"), both, strict=True))

    def settings(self, model: Model) -> Generation:
        """Return how the model is to write.

        Raises:
            UsageError: a setting has a wrong value.
        """
        from mmhub.cli.writing import read_settings

        return read_settings(model, self.changed(model))

    def changed(self, model: Model) -> dict[str, Any]:
        """Return the settings that are not the model's own, without those that have no effect beside the others."""
        decoder: Any = model.decoder
        own = decoder.generation
        given = {name: value for name, value in self.writing.items() if value is not None}
        idle = ("beams",) if given.get("temperature", own.temperature) else ("top_p", "top_k", "seed")
        return {name: value for name, value in given.items() if name not in idle and value != getattr(own, name)}


# --- as a command, and in Python


def command(name: str, model: Model, given: Given) -> str:
    """Return the command that gives the same answer, for a shell; "" where there is none."""
    sample = given.sample(model)
    text = sample.get("text")
    if isinstance(text, list):
        return ""
    parts = ["mmhub", "predict", name]
    if isinstance(text, Mapping):
        parts += ["--text", text["text"], "--text-pair", text["text_pair"]]
    elif text:
        parts += ["--text", text]
    for kind in ("image", "audio"):
        parts += [f"--{kind}", Path(sample[kind]).name] if kind in sample else []
    parts += ["--labels", ",".join(given.names)] if _by_labels(model, given) else []
    parts += ["--timestamps", str(given.times)] if _timed(model, given) else []
    for key, value in given.changed(model).items() if Wants.of(model).writes else ():
        parts += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(parts)


def python(name: str, model: Model, given: Given) -> str:
    """Return the lines of Python that give the same answer."""
    sample = given.sample(model)
    shown = {key: Path(value).name if key in ("image", "audio") else value for key, value in sample.items()}
    options = {"timestamps": given.times} if _timed(model, given) else {}
    options |= given.changed(model) if Wants.of(model).writes else {}
    lines = ["import mmhub", "", f"model = mmhub.load({name!r})"]
    if _by_labels(model, given):
        lines.insert(1, "from mmhub.zero_shot import classify")
        return "\n".join([*lines, f"print(classify(model, [{shown!r}], {given.names!r}))"])
    if "timestamps" in options:
        lines.insert(1, "from mmhub.speech import transcribe")
        return "\n".join([*lines, f"print(transcribe(model, [{shown!r}], timestamps={given.times!r}))"])
    call = "generate" if options else "predict"
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    return "\n".join([*lines, f"print(model.{call}([{shown!r}]{arguments}))"])


def _by_labels(model: Model, given: Given) -> bool:
    return Wants.of(model).labels and bool(given.names)


def _timed(model: Model, given: Given) -> bool:
    return Wants.of(model).times and given.times not in (None, "", "none")


# --- the fields


def picture(**options: Any) -> Any:
    """Return a field for a picture that is handed on as the file that was uploaded, for the model's own reader."""
    sources = ["upload", "clipboard", "webcam"]
    return _picture_class()(type="filepath", image_mode=None, sources=sources, buttons=[], **options)


@cache
def _picture_class() -> Any:
    """gr.Image with a `preprocess` of its own.

    A class, because gradio makes its fields anew whenever it changes them; and one that its metaclass does not see,
    because that writes a file beside the module of each class.
    """

    def preprocess(self: Any, payload: Any) -> Any:
        if payload is not None and payload.path and not (payload.url or "").startswith("data:"):
            return payload.path
        return gr.Image.preprocess(self, payload)

    return ABCMeta.__new__(type(gr.Image), "Image", (gr.Image,), {"preprocess": preprocess})


def check_uploaded(files: Sequence[str]) -> None:
    """Refuse files that nobody uploaded: who asks without a page may name any of this machine.

    Raises:
        InputError: one lies elsewhere.
    """
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder()).resolve()
    if not all(Path(file).resolve().is_relative_to(folder) for file in files):
        raise InputError("this file was not uploaded here", "upload it first")


class Fields:
    """The fields of a tab, whose ids start with its name."""

    def __init__(self, tab: str) -> None:
        long: dict[str, Any] = {"lines": 3, "visible": False, "max_length": TEXT_CHARS}
        self.text = gr.Textbox(label="Text", elem_id=f"{tab}-text", **long)
        self.pair = gr.Textbox(label="Second text", elem_id=f"{tab}-pair", **long)
        with gr.Row():
            self.image = picture(label="Image", height=260, visible=False, elem_id=f"{tab}-image")
            self.audio = gr.Audio(
                label="Audio",
                type="filepath",
                sources=["upload", "microphone"],
                visible=False,
                elem_id=f"{tab}-audio",
                buttons=[],
            )
        self.labels = gr.Textbox(
            label="Labels to tell apart",
            info="Two or more, with commas between them. The model need not have learnt them.",
            visible=False,
            max_length=TEXT_CHARS,
            elem_id=f"{tab}-labels",
        )

    @property
    def all(self) -> list[Any]:
        return [self.text, self.pair, self.image, self.audio, self.labels]

    def fit(self, *wants: Wants) -> list[Any]:
        """Return updates that show what these models take, of several what one of them does."""
        kinds = {kind for one in wants for kind in one.modalities if not one.chats}
        pair = next((one.pair for one in wants if one.pair), "")
        asks = "Question" if pair == "Context" else "First text" if pair else "Text"
        return [
            gr.update(visible="text" in kinds, label=asks),
            gr.update(visible=bool(pair), label=pair or "Second text"),
            gr.update(visible="image" in kinds),
            gr.update(visible="audio" in kinds),
            gr.update(visible=any(one.labels for one in wants)),
        ]


SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "beams", "repetition_penalty", "seed")


class Settings:
    """How a model writes, at most `tokens` at once; what is not touched stays as the model has it."""

    def __init__(self, tab: str, tokens: int | None = None) -> None:
        self.tokens = tokens
        with gr.Accordion("How it writes", open=False, visible=False, elem_id=f"{tab}-settings") as self.box:
            self.system = gr.Textbox(
                label="System message", lines=2, visible=False, max_length=TEXT_CHARS, elem_id=f"{tab}-system"
            )
            self.times = gr.Radio(
                [("No times", "none"), ("Times of segments", "segment")],
                value="none",
                label="Times",
                visible=False,
                elem_id=f"{tab}-times",
            )
            parts: dict[str, Any] = {}
            with gr.Row():
                parts["max_new_tokens"] = _number("Tokens at most", 64, 1, maximum=tokens)
                parts["temperature"] = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token")
                parts["top_p"] = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", info="1: off")
                parts["top_k"] = _number("Top-k", 0, 0, info="0: off")
            with gr.Row():
                parts["beams"] = _number("Beams", 1, 1, maximum=16)
                parts["repetition_penalty"] = gr.Slider(1, 2, 1, step=0.01, label="Repetition penalty", info="1: off")
                parts["seed"] = _number("Seed", 0, 0)
        self.fields = {name: parts[name] for name in SETTINGS}
        for name, part in self.fields.items():
            part.elem_id = f"{tab}-{name.replace('_', '-')}"

    @property
    def all(self) -> list[Any]:
        return [self.box, self.system, self.times, *self.fields.values()]

    @property
    def values(self) -> list[Any]:
        return list(self.fields.values())

    def fit(self, wants: Wants, model: Model | None) -> list[Any]:
        """Return updates that show the settings of a model, as it has them."""
        decoder: Any = model.decoder if model is not None else None
        own = decoder.generation if wants.writes else None
        return [
            gr.update(visible=wants.writes),
            gr.update(visible=wants.chats),
            gr.update(visible=wants.times, value="none"),
            *(gr.update() if own is None else gr.update(value=self._own(own, name)) for name in self.fields),
        ]

    def _own(self, own: Generation, name: str) -> Any:
        value = getattr(own, name)
        return min(value, self.tokens) if name == "max_new_tokens" and self.tokens else value


def _number(label: str, value: int, minimum: int, **options: Any) -> Any:
    return gr.Number(label=label, value=value, precision=0, minimum=minimum, min_width=110, **options)


def writing_of(values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of `Settings.values` by name."""
    return dict(zip(SETTINGS, values, strict=True))
