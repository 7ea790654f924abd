"""Folders of the transformers library, loaded with it and compared; what `vllm serve` and others read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhub.adapters import adapter_of, merge
from mmhub.embedding import Embedding
from mmhub.errors import PluginError, UsageError
from mmhub.hub.foreign import write_layout
from mmhub.interfaces import LanguageModel, Policy, TextDecoder
from mmhub.model import Model
from mmhub.plugins import call_hook
from mmhub_export.probes import Check, Sample, checked, compared, require, samples_for
from mmhub_export.record import Export

_TOLERANCE = 1e-4
_OTHERS = ("sentence-transformers", "timm")


def write_transformers(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    """Write a model as transformers saves its own, with tokenizer, chat template and settings of generation.

    Language models trained here from scratch become a Llama where they are one (`transformer-lm`). Low-rank adapters
    are merged first, in place.

    Raises:
        UsageError: transformers has no such model. TrustError: what was written answers otherwise than the model.
    """
    try:
        import transformers
    except ImportError:
        raise PluginError("transformers is not installed", "run: pip install 'mmhub[text]'") from None
    model.state_dict()  # which packed weights (mmhub.quantize) refuse in words of their own
    adapted = [role for role, part in model.parts().items() if adapter_of(part)]
    if adapted:
        merge(model)
    training = model.training
    try:
        write_layout(model.eval(), folder)
    except UsageError as error:
        raise UsageError(error.message, _hint(model) or error.hint) from None
    _make_readable(folder)
    with _quiet(transformers.logging):
        library = _Library(transformers, folder, model.device)
    checks = list(_checks(model, library, samples_for(model, samples)))
    model.train(training)
    require(checks)
    facts = {"architecture": library.architecture, "chat_template": (folder / "chat_template.jinja").is_file()}
    return Export(
        format="transformers",
        name=model.name,
        task=model.task.name,
        modalities=model.modalities,
        checks=checks,
        facts=facts | ({"merged": adapted} if adapted else {}),
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
    )


def _hint(model: Model) -> str:
    """Which other layout a plugin offers for such a model, where it is not its head that has no place."""
    reader: Any = next(iter(model.encoders.values()), model.decoder)
    head = None if isinstance(model.decoder, Embedding) else model.decoder
    if len(model.modalities) != 1 or not isinstance(getattr(reader, "modality", None), str):
        return "use --format onnx, torch-export or int8, which hold any model"
    offered = [
        layout
        for layout in ("transformers", *_OTHERS)
        if call_hook("mmhub_write_foreign", encoder=reader, decoder=head, layout=layout)
    ]
    if offered and offered[0] != "transformers":
        return f"the layout of {offered[0]} may hold it: mmhub push --layout {offered[0]}"
    return ""


def _make_readable(folder: Path) -> None:
    """Give files the rights that new ones have; the library writes weights for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep the library's bars and advice off the terminal."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- comparing --------------------------------------------------------------------------------------------------


class _Library:
    """The folder as transformers itself loads it."""

    def __init__(self, transformers: Any, folder: Path, device: torch.device) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.architecture: str = config.architectures[0]
        kind = getattr(transformers, self.architecture)
        self.model: Any = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval().to(device)
        reads = (folder / "tokenizer.json").is_file()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder) if reads else None


@torch.inference_mode()
def _checks(model: Model, library: _Library, samples: Sequence[Sample]) -> Iterator[Check]:
    if not samples:
        return
    if isinstance(model.decoder, LanguageModel):
        yield from _language_checks(model, library, samples)
        return
    (name,) = model.encoders
    batch = model.collate(samples).to(model.device)
    items, given = batch.items[name], _given(name, batch.items[name].data, batch.items[name].mask)
    yield from _token_checks(library, samples, items)
    if isinstance(model.decoder, TextDecoder):
        start = torch.full((len(items), 1), library.model.config.decoder_start_token_id, device=model.device)
        wanted = model(batch).logits
        found = library.model(**given, decoder_input_ids=start).logits[:, -1]
        known = torch.isfinite(wanted)  # settings of generation forbid the others
        yield compared("logits", wanted[known], found[known], _TOLERANCE)
    elif isinstance(model.decoder, Embedding):
        features = _words(model.encoders[name])(items.data, items.mask)
        states = library.model(**given).last_hidden_state
        yield compared("states", features.tokens[features.mask], states[features.mask], _TOLERANCE)
    else:
        yield compared("logits", model(batch).logits, library.model(**given).logits, _TOLERANCE)


def _words(encoder: Any) -> Any:
    """The transformers model in a sentence-transformers one, before its pooling."""
    return getattr(encoder, "words", encoder)


def _given(modality: str, data: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids" if modality == "text" else "input_values": data, "attention_mask": mask.long()}


def _token_checks(library: _Library, samples: Sequence[Sample], items: Any) -> Iterator[Check]:
    texts = [sample.get("text") for sample in samples]
    if library.tokenizer is None or not all(isinstance(text, str) for text in texts):
        return
    ours = [row[mask].tolist() for row, mask in zip(items.data, items.mask, strict=True)]
    yield _same_tokens(library, texts, ours)


def _same_tokens(library: _Library, texts: Sequence[Any], ours: Sequence[list[int]]) -> Check:
    """Compare token ids; a text that spells a special token is left out, for the library takes it for one."""
    special = library.tokenizer.all_special_tokens
    plain = [row for row, text in enumerate(texts) if not any(token in text for token in special)]
    theirs = {row: library.tokenizer(texts[row], truncation=True).input_ids for row in plain}
    return checked("token ids", float(sum(theirs[row] != ours[row] for row in plain)), 0.0)


def _language_checks(model: Model, library: _Library, samples: Sequence[Sample]) -> Iterator[Check]:
    """Compare what is expected after each of a few prompts, and the ids that they consist of."""
    processor, decoder = model.language_model.processor, model.language_model
    texts = [text for sample in samples if isinstance(text := sample.get("text"), str)]
    prompts = [processor.prompt(text, Policy())[: decoder.context].to(model.device) for text in texts]
    wanted = [decoder(_bundle(decoder, ids[None])).logits[0] for ids in prompts]
    found = [library.model(input_ids=ids[None]).logits[0, -1] for ids in prompts]
    if prompts:
        yield _same_tokens(library, texts, [ids.tolist() for ids in prompts])
        yield compared("logits", torch.stack(wanted), torch.stack(found), _TOLERANCE)
    if processor.chat_template:
        yield _same_chat(model, library)


def _bundle(decoder: LanguageModel, ids: Tensor) -> dict[str, Any]:
    from mmhub.batch import Features

    return {"text": Features(decoder.embed(ids), torch.ones_like(ids, dtype=torch.bool), ids=ids)}


def _same_chat(model: Model, library: _Library) -> Check:
    """Compare the ids of a conversation as both lay it out."""
    messages = [{"role": "user", "content": "what is this?"}]
    ours = model.language_model.processor.chat(messages, Policy()).tolist()
    text = library.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = library.tokenizer(text, add_special_tokens=False).input_ids
    return checked("token ids of a conversation", float(ours != theirs), 0.0)
