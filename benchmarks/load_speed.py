"""Load a text encoder with mmhub and, beside it, the same weights with transformers' own `from_pretrained`.

    MMHUB_REAL_MODELS=FOLDER python benchmarks/load_speed.py [--rounds 15] [--starts 5] [--out table.md]

FOLDER holds all-MiniLM-L6-v2 (91 MB) as a transformers folder; a model of RoBERTa-base's shape (498 MB, random weights)
is made here. What is compared does the same work: an encoder in fp32 with its tokenizer, ready for a text.

1. Warm: in one process, all ways in turn, `--rounds` times. Neither library runs the model.
2. Process start to first prediction: fresh processes in turn, `--starts` times, beside a script of a few lines that a
   user of transformers would write.
3. Peak memory of loading and one prediction, above the process with all libraries imported.

Files are in the page cache and mmhub has seen them before: what a download or a first load costs is `first load`.
Fresh processes keep Python's bytecode in the work folder, as an installation does in its own, whatever this process is
told: without it, compiling the source of the libraries takes three times as long as everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TEXT = "a nice film"
MOST_SECONDS = 100  # for the fresh processes of one model; on a slow machine there are fewer of them

OURS = """
import sys, mmhub
model = mmhub.load(sys.argv[1])
print(model.predict([{"text": "a nice film"}]))
"""
THEIRS = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModel.from_pretrained(sys.argv[2], dtype=torch.float32)
weights = load_file(sys.argv[1] + "/model-decoder.safetensors")
matrix = next(value for value in weights.values() if value.ndim == 2)
with torch.inference_mode():
    state = model(**tokenizer(["a nice film"], return_tensors="pt")).last_hidden_state.mean(1)
    print((state @ matrix[:, : state.shape[1]].T).softmax(-1))
"""
MEMORY = """
import sys
from pathlib import Path
kind, folder, library = sys.argv[1:]
import torch, transformers, mmhub_text.pretrained, mmhub_heads
from transformers import AutoModel, AutoTokenizer
import mmhub
mmhub.load
from transformers.models.auto.modeling_auto import MODEL_MAPPING
import transformers.models.bert.modeling_bert, transformers.models.roberta.modeling_roberta
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
if kind == "mmhub":
    mmhub.load(folder).predict([{"text": "a nice film"}])
else:
    tokenizer, model = AutoTokenizer.from_pretrained(library), AutoModel.from_pretrained(library, dtype=torch.float32)
    with torch.inference_mode():
        model(**tokenizer(["a nice film"], return_tensors="pt"))
print(status("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="work here and keep it, instead of in a temporary folder")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.folder or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["MMHUB_CACHE"] = str(work / "mmhub-cache")
        os.environ["PYTHONPYCACHEPREFIX"] = str(work / "bytecode")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        mini = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models")).absolute() / "all-MiniLM-L6-v2"
        report = [*_facts(options), ""]
        for title, library in (("all-MiniLM-L6-v2", mini), ("RoBERTa-base's shape", _make_roberta(work, mini))):
            report += _measure(title, library, work, options)
    text = "\n".join(report) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _facts(options: argparse.Namespace) -> list[str]:
    from importlib.metadata import version

    libraries = ("mmhub", "torch", "transformers", "tokenizers", "safetensors")
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    machine = f"{os.cpu_count()} cores of {cpu}, OMP_NUM_THREADS={threads}; load {os.getloadavg()[0]:.1f} at the start"
    return [
        "# Loading a model",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_commit()}",
        f"- command: `python benchmarks/load_speed.py --rounds {options.rounds} --starts {options.starts}`",
        f"- machine: {machine}; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in libraries)}",
    ]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _make_roberta(work: Path, mini: Path) -> Path:
    import torch
    from transformers import RobertaConfig, RobertaModel

    folder = work / "roberta-base"
    if not folder.exists():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
        shutil.copy(mini / "tokenizer.json", folder / "tokenizer.json")
    return folder


def _measure(title: str, library: Path, work: Path, options: argparse.Namespace) -> list[str]:
    from mmhub.build import compose

    folder = work / f"{library.name}-mmhub"
    if not folder.exists():
        encoders: dict[str, Any] = {"text": {"use": "transformers", "init": str(library)}}
        compose(encoders=encoders, decoder={"use": "classification", "config": {"labels": ["no", "yes"]}}).save(folder)
        time.sleep(2.5)  # younger files are not remembered
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    first, warm = _warm(folder, library, options.rounds)
    starts = _starts(folder, library, options.starts)
    memory = {kind: _memory(kind, folder, library) for kind in ("mmhub", "transformers")}
    peer, peer_model = warm["from_pretrained, with tokenizer"], warm["from_pretrained, model alone"]
    lines = [
        f"## {title}, {size / 1e6:.0f} MB of weights",
        "",
        f"First load of files that mmhub has not seen (hashed and searched for NaN once): {first * 1e3:.0f} ms.",
        "",
        "| warm, in one process | min ms | median ms | faster than from_pretrained with tokenizer | ... model alone |",
        "|---|---|---|---|---|",
    ]
    for name, times in warm.items():
        ratios = [min(other) / min(times) for other in (peer, peer_model)]
        lines.append(
            f"| {name} | {min(times) * 1e3:.1f} | {statistics.median(times) * 1e3:.1f}"
            f" | {ratios[0]:.1f}x | {ratios[1]:.1f}x |"
        )
    lines += ["", "| process start to first prediction | min s | median s |", "|---|---|---|"]
    lines += [f"| {name} | {min(times):.2f} | {statistics.median(times):.2f} |" for name, times in starts.items()]
    lines += ["", "| peak memory above the imported libraries | MB | of the weights |", "|---|---|---|"]
    lines += [f"| {kind} | {peak / 1e6:.0f} | {peak / size:.2f} |" for kind, peak in memory.items()]
    return [*lines, ""]


def _warm(folder: Path, library: Path, rounds: int) -> tuple[float, dict[str, list[float]]]:
    import torch
    import transformers
    from transformers import AutoModel, AutoTokenizer

    import mmhub
    from mmhub.checkpoint import load_encoder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def encode() -> None:
        encoder, _ = load_encoder(folder, "text_encoder")
        encoder.processor.vocab_size, encoder.processor.tokenizer.encode(TEXT)  # type: ignore[attr-defined]

    def theirs() -> None:
        AutoTokenizer.from_pretrained(library)
        AutoModel.from_pretrained(library, dtype=torch.float32)

    ways: dict[str, Callable[[], Any]] = {
        "mmhub.load": lambda: mmhub.load(folder),
        "load_encoder": lambda: load_encoder(folder, "text_encoder"),
        "load_encoder, and a text tokenized": encode,
        "from_pretrained, model alone": lambda: AutoModel.from_pretrained(library, dtype=torch.float32),
        "from_pretrained, with tokenizer": theirs,
    }
    mmhub.load(folder)  # imports
    (Path(os.environ["MMHUB_CACHE"]) / "hashes.json").unlink(missing_ok=True)
    first = _timed(ways["mmhub.load"])
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_timed(way))
    return first, times


def _timed(way: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = way()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def _starts(folder: Path, library: Path, count: int) -> dict[str, list[float]]:
    scripts = {"mmhub.load, predict": OURS, "transformers, by hand": THEIRS}
    times: dict[str, list[float]] = {name: [] for name in scripts}
    for script in scripts.values():  # once for the caches
        _run(script, folder, library)
    latest = time.monotonic() + MOST_SECONDS
    for _ in range(count):
        if time.monotonic() > latest:
            break
        for name, script in scripts.items():
            times[name].append(_timed(lambda script=script: _run(script, folder, library)))  # type: ignore[misc]
    return times


def _run(script: str, *args: object) -> str:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout


def _memory(kind: str, folder: Path, library: Path) -> int:
    return int(json.loads(_run(MEMORY, kind, folder, library).splitlines()[-1]))


if __name__ == "__main__":
    main()
