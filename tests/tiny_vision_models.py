"""Tiny multimodal models with random weights as transformers itself saves them, and what they need to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE, PATCH = 24, 6  # pixels: 16 patches a picture
SPECIAL = (
    *("<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<img>", "</img>", "<video>"),
    "<end_of_utterance>",
)
TEXTS = ("USER: what is in the picture? ASSISTANT: a cat", "user assistant and two dogs or none\n", "compare them")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_VISION = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def tokenizer() -> Any:
    """A byte-level tokenizer that begins texts with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    words.train_from_iterator(TEXTS, trainer)
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = {"image_token": "<image>", "start_image_token": "<img>", "end_image_token": "</img>"}
    more = own | {"context_image_token": "<image>", "video_token": "<video>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names, extra_special_tokens=more)


def pictures(count: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    shapes = [(30, 50), (SIDE, SIDE), (70, 31)][:count]
    return [Image.fromarray(noise.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def save_model(
    folder: Path, kind: str = "llava", tower: str = "clip_vision_model", text: str = "llama", **more: Any
) -> Any:
    """Save a model of type `kind` with its processor to a folder; return both, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    words = tokenizer()
    image_id = words.convert_tokens_to_ids("<image>")
    sizes: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH}
    sizes = {key: [value, value] for key, value in sizes.items()} if kind == "internvl" else sizes
    more = {"vision_feature_layers": [-2, 1]} | more if kind == "vipllava" else more
    vision = {"model_type": tower} | _VISION | sizes
    written = {"model_type": text, "vocab_size": len(words), "max_position_embeddings": 256, "pad_token_id": 2}
    settings = {"text_config": written | _TEXT, "vision_config": vision, "image_token_id": image_id} | more
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():  # so that greedy texts differ from each other
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=2)
    processor = PROCESSORS[kind](transformers, words, config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def _llava(library: Any, words: Any, config: Any) -> Any:
    crop = {"height": SIDE, "width": SIDE}
    images = library.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    class_token = int("clip" in config.vision_config.model_type)
    return library.LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        chat_template=TEMPLATE,
        num_additional_image_tokens=class_token,
    )


def _idefics(library: Any, words: Any, config: Any) -> Any:
    images = library.Idefics3ImageProcessor(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    count = (SIDE // PATCH // config.scale_factor) ** 2
    return library.Idefics3Processor(images, words, image_seq_len=count, chat_template=TEMPLATE)


def _internvl(library: Any, words: Any, config: Any) -> Any:
    images = library.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
    videos = library.InternVLVideoProcessor()
    count = int((SIDE // PATCH * config.downsample_ratio) ** 2)
    return library.InternVLProcessor(images, words, videos, image_seq_length=count, chat_template=TEMPLATE)


PROCESSORS = {"llava": _llava, "vipllava": _llava, "idefics3": _idefics, "smolvlm": _idefics, "internvl": _internvl}


def talk(*parts: str | Image.Image) -> list[dict[str, Any]]:
    """A question of these parts."""
    content = [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in parts
    ]
    return [{"role": "user", "content": content}]


def logits_of(model: Any, processor: Any, messages: list[dict[str, Any]]) -> torch.Tensor:
    """The library's logits after a conversation, (V,)."""
    with torch.no_grad():
        found: torch.Tensor = model(**inputs_of(processor, messages)).logits[0, -1]
    return found


def inputs_of(processor: Any, messages: list[dict[str, Any]]) -> Any:
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    more: dict[str, Any] = {"crop_to_patches": False} if type(processor).__name__.startswith("Intern") else {}
    return processor(text=text, images=images or None, return_tensors="pt", **more)


def text_of(model: Any, processor: Any, messages: list[dict[str, Any]], length: int) -> str:
    """What the library writes, greedily."""
    given = inputs_of(processor, messages)
    ids = model.generate(**given, max_new_tokens=length, do_sample=False)[0, given["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True))
