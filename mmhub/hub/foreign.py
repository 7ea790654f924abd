"""Models of other libraries: who reads them, what they become here, and writing ours in another library's layout.

The plugins do the reading and writing, through the hooks `mmhub_load_foreign` and `mmhub_write_foreign`. What stands
here knows other libraries by the keys of their config.json alone. Weights are fetched by `mmhub.hub.pull`.
"""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.errors import MmhubError, PluginError, TrustError, UsageError
from mmhub.hub.cache import as_table, read_json
from mmhub.plugins import call_hook
from mmhub.reading import CONFIG_BYTES, check_plain, read_plain
from mmhub.records import cause
from mmhub.registry import find_component

if TYPE_CHECKING:
    from mmhub.interfaces import Decoder, Encoder, ForeignParts, ForeignReader, Fusion
    from mmhub.model import Model

# Files that text models keep their tokenizer in, if not in tokenizer.json.
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
_AUDIO = ("wav2vec2", "hubert", "wavlm", "whisper")


def recognise(config: Mapping[str, Any], files: Collection[str]) -> tuple[str, str, str]:
    """Return (library, kind, component) by which a model of another library can be read; '' for what is unknown.

    >>> recognise({"model_type": "bert"}, [])
    ('transformers', 'text_encoder', 'transformers')
    """
    if "modules.json" in files:
        return "sentence-transformers", "text_encoder", "transformers"
    if "pretrained_cfg" in config or ("architecture" in config and "model_type" not in config):
        return "timm", "image_encoder", "timm"
    kind = config.get("model_type")
    if kind in _AUDIO:
        return "transformers", "audio_encoder", str(kind)
    if isinstance(config.get("text_config"), Mapping) and _writes(config):  # it reads pictures, too
        return "transformers", "decoder", "transformers-lm"
    return ("transformers", "text_encoder", "transformers") if kind else ("", "", "")


def _writes(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith("ForConditionalGeneration")


def find_reader(name: str, folder: Path) -> ForeignReader:
    """Return what reads the folder, which needs to hold no more than its config.json (and modules.json) yet.

    Raises:
        TrustError: the model needs code of its own, or is no model at all.
        PluginError: the plugin that reads it, or a part of it, is missing. MmhubError: a plugin refuses it.
    """
    _check_plain(folder)
    config = as_table(read_json(folder / "config.json"))
    if config.get("auto_map"):
        what = f"'{name}' brings code of its own (auto_map in config.json), which mmhub never runs"
        raise TrustError(what, "use a model whose library knows it without")
    readers: list[ForeignReader] = call_hook("mmhub_load_foreign", folder=folder, config=config)
    if not readers:
        raise _nobody(name, folder, config)
    if len(readers) > 1:
        libraries = " and ".join(reader.library for reader in readers)
        raise PluginError(
            f"'{name}' is read by more than one plugin ({libraries})", "switch one off with MMHUB_DISABLE_PLUGINS"
        )
    refusal = readers[0].refusal
    if refusal is not None:
        raise type(refusal)(f"'{name}' cannot be loaded: {refusal.message}", refusal.hint)
    for kind, component in readers[0].components:
        try:
            find_component(kind, component)
        except MmhubError as error:
            raise type(error)(f"'{name}' is a {readers[0].library} model: {error.message}", error.hint) from None
    return readers[0]


def _check_plain(folder: Path) -> None:
    """Refuse pipes, devices and links in a circle: libraries open what has the right name, and would wait forever.

    Raises:
        TrustError: there is one, or config.json holds what is not a number.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        try:
            status = path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise TrustError(f"'{path}' is a link that leads in a circle", "fetch the model again") from None
            continue  # a link that leads nowhere is no file
        if not stat.S_ISDIR(status.st_mode) or path.name.endswith((".json", ".safetensors")):
            check_plain(path, status)
    path = folder / "config.json"
    if path.is_file() and _holds_nan(read_plain(path, CONFIG_BYTES)):
        raise TrustError(f"'{path}' holds NaN, which is no number", "fetch the model again")


def _holds_nan(content: bytes) -> bool:
    """Does JSON hold NaN as a value? Infinity may be meant; what is no JSON is refused by whoever reads it."""
    constants: set[str] = set()
    with suppress(ValueError, RecursionError):
        json.loads(content, parse_constant=constants.add)
    return "NaN" in constants


def why_not(folder: Path) -> str:
    """Say why the installed plugins do not load the model whose config.json is in `folder`, '' if one of them does."""
    try:
        find_reader("this model", folder)
    except MmhubError as error:
        message = error.message.removeprefix("'this model' cannot be loaded: ")
        return message.replace("'this model'", "it").replace(f"'{folder}'", "it").replace(f"{folder}/", "")
    return ""


def _nobody(name: str, folder: Path, config: Mapping[str, Any]) -> MmhubError:
    from mmhub.checkpoint import read_config

    library, kind, component = recognise(config, [path.name for path in folder.iterdir()] if folder.is_dir() else ())
    if not library:
        read_config(folder)  # says what is wrong with it as a checkpoint of ours
    try:
        found = find_component(kind, component)
    except MmhubError as error:
        return type(error)(f"'{name}' is a {library} model: {error.message}", error.hint)
    what = config.get("model_type") or config.get("architecture")
    return UsageError(
        f"'{name}' is a {library} model of type {what!r}, which the installed {found.distribution} does not read",
        "it reads encoders of text, images and audio, with or without a classification head, and writers of text",
    )


def load_foreign(name: str, folder: Path) -> Model:
    """Build a model from the folder that another library wrote, in evaluation mode on the CPU.

    Raises:
        MmhubError: see `find_reader`; or the folder is damaged or holds no safetensors weights.
    """
    from mmhub.weights import amount_in, check_sizes, few_modules

    reader = find_reader(name, folder)
    held = amount_in(sorted(folder.rglob("*.safetensors")))
    check_sizes(as_table(read_json(folder / "config.json")), held, f"'{folder / 'config.json'}' asks too much")
    try:
        with few_modules(held.modules):
            parts = reader.read(folder)
        return join(parts, name)
    except (MmhubError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(f"'{name}' cannot be read as a {reader.library} model: {cause(error)}") from error


def join(parts: ForeignParts, name: str) -> Model:
    """Make a model of the parts, in evaluation mode: an encoder with its head or one that only embeds, or a language
    model with the encoders it has."""
    from mmhub.interfaces import find_task
    from mmhub.model import Model

    encoder = parts.encoder
    encoders = _senses(parts) if encoder is None else {encoder.modality: encoder}
    ids = {f"{modality}_encoder": parts.encoder_id for modality in encoders}
    ids |= {f"{modality}_encoder": part.id for modality, part in parts.senses.items()}
    fusion, decoder, found = _reader_parts(parts, encoders) if encoder is None else _head_parts(parts, encoder)
    sources = {kind: find_component(kind, name) for kind, name in (ids | found).items()}
    model = Model(find_task(parts.task), encoders, fusion, decoder, sources)
    model.name = name
    return model.eval()


def _head_parts(parts: ForeignParts, encoder: Encoder) -> tuple[Fusion, Decoder, dict[str, str]]:
    from mmhub.embedding import Embedding
    from mmhub.fusion.streams import Streams

    fusion = Streams(Streams.Config(), {encoder.modality: encoder.stream})
    decoder = parts.decoder or _read_decoder(parts, fusion) if parts.decoder_id else None
    decoder = decoder or Embedding(Embedding.Config(left_out=parts.left_out), fusion.outputs)
    return fusion, decoder, {"fusion": "mmhub/streams", "decoder": parts.decoder_id or "mmhub/embedding"}


def _read_decoder(parts: ForeignParts, fusion: Fusion) -> Decoder:
    """The decoder that another plugin reads from the same checkpoint."""
    from mmhub.interfaces import decode_config

    assert parts.decoder_from is not None
    cls: Any = find_component("decoder", parts.decoder_id).load()
    config = decode_config(cls.Config, dict(parts.decoder_config), parts.decoder_id)
    decoder: Decoder = cls.from_library(config, parts.decoder_from, fusion.outputs)
    return decoder


def _senses(parts: ForeignParts) -> dict[str, Encoder]:
    """The encoders that other plugins read from the same checkpoint."""
    from mmhub.interfaces import decode_config

    encoders = {}
    for modality, part in parts.senses.items():
        cls: Any = find_component(f"{modality}_encoder", part.id).load()
        encoders[modality] = cls.from_library(decode_config(cls.Config, dict(part.config), part.id), part.path)
    return encoders


def _reader_parts(parts: ForeignParts, encoders: Mapping[str, Encoder]) -> tuple[Fusion, Decoder, dict[str, str]]:
    """A decoder that reads text itself, and the fusion that passes it on, among the tokens of other modalities."""
    import torch

    from mmhub.fusion.interleave import Interleave
    from mmhub.interfaces import Stream, decode_config

    decoder: Any = parts.decoder
    if decoder is None or not decoder.reads_text:
        raise PluginError("a plugin read a model without an encoder and without a decoder that reads text")
    streams = {modality: encoder.stream for modality, encoder in encoders.items()} | {"text": Stream(decoder.dim)}
    config = decode_config(Interleave.Config, {"projectors": dict(parts.projectors)}, "mmhub/interleave")
    with torch.device("meta"):  # a stranger's numbers take no memory before they are compared
        fusion = Interleave(config, streams)
    try:
        fusion.load_state_dict(dict(parts.weights), assign=True)
    except RuntimeError as error:
        raise TrustError(f"what joins its parts does not fit them: {cause(error)}") from None
    return fusion, decoder, {"fusion": "mmhub/interleave", "decoder": parts.decoder_id}


def write_layout(model: Model, folder: str | Path, layout: str = "transformers") -> Path:
    """Write `model` to `folder`, new or empty, as `layout` says: what that library itself loads with equal outputs.

    Raises:
        UsageError: the model has no expression in that layout, or the folder is not empty.
    """
    from mmhub.embedding import Embedding
    from mmhub.files import disk_errors, new_folder

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not empty", "name another folder")
    if model.guards:
        raise UsageError(f"the {layout} layout keeps no guards, and this model has some", "push the model as it is")
    if len(model.modalities) != 1:
        parts = ", ".join(model.modalities)
        raise UsageError(f"the {layout} layout holds one encoder, and this model has {parts}", "push it as it is")
    head = None if isinstance(model.decoder, Embedding) else model.decoder
    reader: Any = next(iter(model.encoders.values()), model.decoder)  # a language model stands in the encoder's place
    known = isinstance(getattr(reader, "modality", None), str)
    writers = call_hook("mmhub_write_foreign", encoder=reader, decoder=head, layout=layout) if known else []
    if not writers:
        role = f"{reader.modality}_encoder" if model.encoders else "decoder"
        what = f"{model.sources[role].id} {role.rpartition('_')[2]}"
        raise UsageError(f"the {layout} layout cannot hold a {what}", "push the model as it is")
    with disk_errors("the model", folder), new_folder(folder) as aside:
        writers[0].write(aside)
    return folder
