"""A multimodal model is recomputed, sharded and replicated as any other, whatever media a batch or a rank lacks."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.build import compose
from mmhub.config import TrainRecipe
from mmhub.device import keep_memory
from mmhub.engine import train
from mmhub.engine.blocks import find_blocks
from mmhub.engine.compute import prepare_model
from mmhub.model import Model
from tests.conftest import flac, png
from tests.test_distributed import curve, on_ranks

CPU = torch.device("cpu")
OWN = {"dim": 32, "depth": 3, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}
QWEN = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
}  # fmt: skip
IMAGE = {"use": "timm", "config": {"architecture": "test_vit", "image_size": 64}}
QUIET = {"dropout": 0.0, "mask_bands": 0, "mask_time": 0.0}  # nothing random: processes draw differently
AUDIO = {"use": "transformer", "config": {"dim": 32, "depth": 2, "heads": 2, "sample_rate": 8000} | QUIET}
WORDS = "what is this now a cat or dog"


def decoder(use: str) -> dict[str, Any]:
    return {"use": use, "config": QWEN if use == "transformers-lm" else OWN}


def chat_model(use: str) -> Model:
    torch.manual_seed(0)
    return compose(
        task="chat",
        encoders={"image": IMAGE, "audio": AUDIO},
        decoder=decoder(use),
        tokenizer={"kind": "word"},
        texts=[WORDS] * 3,
    )


def asked(media: dict[str, Any], order: tuple[str, ...], answer: str = "a cat or dog") -> dict[str, Any]:
    """A conversation about media in that order, and an answer."""
    parts = [{"type": kind, kind: media[kind]} for kind in order]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "what is this now"}]}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def mixed_batch(model: Model) -> Batch:
    media = {"image": png(1), "audio": flac(1, 0.5)}
    batch = model.collate([asked(media, order) for order in (("image", "audio"), ("audio",), (), ("image", "image"))])
    batch.targets = model.language_model.count_targets(batch.items["text"])
    return batch


def step(model: Model) -> tuple[Tensor, list[Tensor], int]:
    """The loss, all gradients, and the bytes that are kept from the forward pass for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = mixed_batch(model.train())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch).loss
    assert loss is not None
    loss.backward()
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    grads = [torch.zeros(1) if p.grad is None else p.grad for p in model.parameters()]
    return loss.detach(), grads, sum(kept.values()) - weights


@pytest.mark.parametrize("use", ["transformer-lm", "transformers-lm"])
def test_blocks_of_all_towers_are_recomputed_with_the_same_step_and_less_memory(use: str) -> None:
    plain, model = chat_model(use), chat_model(use)
    found = {name.split(".")[1 if name.startswith("encoders") else 0] for name, _ in find_blocks(model)}
    assert found == {"image", "audio", "decoder"}
    prepare_model(model, TrainRecipe(activation_checkpointing=True), CPU, torch.float32)
    (loss, grads, kept), (want, expected, before) = step(model), step(plain)
    assert torch.equal(loss, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert kept < 0.5 * before


def recipe(folder: Path, use: str, **more: Any) -> dict[str, Any]:
    """Conversations of which every other one has no media: with two rows a step, one rank lacks them in each."""
    names = {}
    for kind, name, content in (("image", "a.png", png(1)), ("audio", "a.flac", flac(1, 0.5))):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content["bytes"])
        names[kind] = name
    orders = [("image", "audio"), (), ("audio",), (), ("image", "image"), (), (), ()]
    answers = ["a cat", "dog or a cat", "dog", "now a dog or cat"]
    rows = [asked(names, order, answers[i % 4]) for i, order in enumerate(orders)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"encoders": {"image": IMAGE, "audio": AUDIO}, "decoder": decoder(use), "tokenizer": {"kind": "word"}}
    options = {"batch_size": 2, "max_steps": 3, "log_every": 1, "learning_rate": 1e-4}
    return {
        "task": "chat",
        "model": model,
        "data": {"train": str(folder / "train.jsonl"), "valid": str(folder / "train.jsonl")},
        "train": options | more,
    }


@pytest.mark.slow
def test_two_processes_train_a_conversation_as_one_whatever_media_each_lacks(tmp_path: Path) -> None:
    cases, wanted = [], {}
    for use in ("transformer-lm", "transformers-lm"):
        for way in ("ddp", "fsdp"):
            table = recipe(tmp_path, use, parallel=way, activation_checkpointing=way == "fsdp")
            cases.append({"recipe": table, "out": str(tmp_path / f"{use}-{way}")})
        wanted[use] = curve(train(recipe(tmp_path, use), tmp_path / use).out)
        assert len(wanted[use]) == 3
    first, second = on_ranks(2, cases, tmp_path)
    for case, told, other in zip(cases, first, second, strict=True):
        assert "error" not in told and "error" not in other, (told, other)
        name = Path(case["out"]).name
        assert curve(tmp_path / name) == pytest.approx(wanted[name.rpartition("-")[0]], rel=2e-4), name


def test_the_allocator_is_left_alone_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    assert not keep_memory(torch.device("cuda"))
    for name, value in (("MMHUB_MALLOC", "0"), ("LD_PRELOAD", "x.so"), ("MALLOC_ARENA_MAX", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not keep_memory(CPU), name
    if platform.libc_ver()[0] == "glibc":
        assert keep_memory(CPU)
