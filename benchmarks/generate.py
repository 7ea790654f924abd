"""Write text with transformers' `generate` and with mmhub, on the same weights, one prompt and several at a time.

    python benchmarks/generate.py [--tokens 128] [--rounds 5] [--out benchmarks/results/generate.md]

The model is a LLaMA of 4 layers x 256 with random weights and a vocabulary of 8,000, in fp32, on the CPU; prompts have
16 to 48 tokens. Everything is written greedily with a KV cache, and the tokens must be the same.

- transformers' `generate` on LlamaForCausalLM, prompts padded on the left.
- mmhub's loop on the same weights, as its `transformers-lm`.
- mmhub's loop on its own `transformer-lm` of that size (other weights).

Rounds are interleaved; the table has medians of tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_text import _facts
from mmhub.batch import Items, pad_sequences
from mmhub.build import compose
from mmhub.generate import write
from mmhub.interfaces import Generation
from mmhub.model import Model

SEED, BATCHES = 0, (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="tokens to write for each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    options.epochs = 1
    report = _facts(options)
    report[0] = "# Writing text"
    with tempfile.TemporaryDirectory() as temporary:
        report += ["", *_measure(Path(temporary), options)]
    text = "\n".join(report).replace("benchmarks/train_text.py", "benchmarks/generate.py") + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _models(folder: Path) -> tuple[Any, Model, Model]:
    """transformers' model, the same in mmhub, and mmhub's own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
    config = LlamaConfig(vocab_size=8000, max_position_embeddings=1024, tie_word_embeddings=True, **size)
    torch.manual_seed(SEED)
    library = LlamaForCausalLM(config).eval()
    library.save_pretrained(folder / "llama")
    words = [f"w{number}" for number in range(7996)]
    ours = compose(
        task="language-modelling",
        decoder={"use": "transformer-lm", "config": {"dim": 256, "depth": 4, "heads": 4, "max_length": 1024}},
        tokenizer={"kind": "word", "vocab_size": 8000},
        texts=[" ".join(words)],
    ).eval()
    (folder / "llama" / "tokenizer.json").write_bytes(ours.language_model.processor.files()["tokenizer.json"])
    same = compose(task="language-modelling", decoder={"use": "transformers-lm", "init": str(folder / "llama")}).eval()
    return library, same, ours


def _measure(folder: Path, options: argparse.Namespace) -> list[str]:
    library, same, ours = _models(folder)
    torch.manual_seed(SEED)
    prompts = [torch.randint(4, 8000, (int(size),)) for size in torch.randint(16, 49, (max(BATCHES),))]
    lines = [
        f"{options.tokens} tokens for each prompt.",
        "",
        "| prompts at a time | | tokens/s, median | as fast as transformers | all rounds |",
        "|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        part = prompts[:batch]
        ways: dict[str, Callable[[], Any]] = {
            "transformers' generate": lambda part=part: _library(library, part, options.tokens),
            "mmhub, the same weights": lambda part=part: _ours(same, part, options.tokens),
            "mmhub's transformer-lm": lambda part=part: _ours(ours, part, options.tokens),
        }
        first = [way() for way in ways.values()]
        if first[0] != first[1]:
            raise SystemExit("mmhub and transformers write different tokens")
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                speeds[name].append(batch * options.tokens / (time.perf_counter() - begin))
                print(f"round {turn + 1}, {batch} prompts, {name}: {speeds[name][-1]:.0f} tokens/s", file=sys.stderr)
        base = statistics.median(speeds["transformers' generate"])
        for name, found in speeds.items():
            median, each = statistics.median(found), " ".join(f"{speed:.0f}" for speed in found)
            lines.append(f"| {batch} | {name} | {median:.0f} | {median / base:.2f}x | {each} |")
    return lines


@torch.inference_mode()
def _library(model: Any, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
    ids, mask = pad_sequences([prompt.flip(0) for prompt in prompts])
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids.flip(1), attention_mask=mask.flip(1).long(), eos_token_id=3, **options)
    new: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return new


def _ours(model: Model, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
    ids, mask = pad_sequences(prompts)
    items = Items(ids, mask, torch.arange(len(ids)), len(ids))
    with torch.inference_mode():
        bundle = model.fusion(model.encode({"text": items}, len(ids)))
        found = write(model.language_model, bundle, Generation(max_new_tokens=tokens, min_new_tokens=tokens))
    return [list(texts[0].ids) for texts in found]


if __name__ == "__main__":
    main()
