"""Memory, files and latency of `mmhub serve` over many mixed requests.

    python benchmarks/serve_soak.py [--requests 13000] [--clients 16] [--model NAME] [--out FILE]

A small model of texts, pictures and sounds, made here, is asked for one sample and for several, of any modalities, for
vectors, for its schema, and for what it must refuse: damaged pictures, unknown inputs and models, bodies that are no
JSON. A small language model is asked for texts, as streams too, and some clients hang up before they are answered. With
`--model` one more is asked for texts.

Memory is read every 1,000 requests up to the 3,000th, and five times more up to the last: with the last answer (under
load), and when the clients have been silent for 2 s (at rest), by when the server has given back what it had freed. The
first 3,000 requests are to warm up: oneDNN makes kernels for new shapes, and heaps grow to what the largest batches
need. From there to the last request neither may grow by more than `--growth` MB, nor may open files; otherwise the
exit code is 1. Fewer than 10,000 requests after the first 3,000 show nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.serve import make_texts
from benchmarks.serve_client import Connection, Server, about, request, serving, share

WARM, SHOWN = 3_000, 10_000  # requests before memory may grow no more, and those that show it
STEP, ROWS = 1_000, 5  # rows of the table: one each so many while warming up, and so many after that
REST = 2.0  # seconds; the server takes half a second of them for rest
GONE = 0  # in place of a status: the client does not wait for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=13_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model")
    parser.add_argument("--growth", type=float, default=20.0, help="MB [default: 20]")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = ["# Serving many mixed requests", "", *about(["mmhub", "mmhub-serve", "torch", "uvicorn"]), ""]
    with tempfile.TemporaryDirectory() as folder:
        names = [make_model(Path(folder) / "classifier"), make_writer(Path(folder) / "writer")]
        names += [given.model] if given.model else []
        with serving(*names, "-q") as server:
            lines += asyncio.run(soak(server, make_requests(names), given))
    table = "\n".join(lines) + "\n"
    print(table)
    if given.out:
        given.out.write_text(table)
    raise SystemExit(int("MISSED" in table))


def make_model(folder: Path) -> str:
    """Save a small random model of texts, pictures and sounds."""
    import mmhub

    encoders = {
        "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}},
        "audio": {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}},
        "text": {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8}},
    }
    fusion = {"use": "attention", "config": {"dim": 16, "depth": 1, "heads": 2}}
    decoder = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    model = mmhub.compose(encoders=encoders, fusion=fusion, decoder=decoder, texts=make_texts(200))
    model.eval().save(folder)
    return str(folder)


def make_writer(folder: Path) -> str:
    """Save a small random language model."""
    import mmhub

    decoder = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "max_length": 128}}
    mmhub.compose("language-modelling", decoder=decoder, tokenizer={"kind": "byte"}).eval().save(folder)
    return str(folder)


def make_requests(names: list[str]) -> list[tuple[int, bytes]]:
    """Requests, each with the status that it must be answered with."""
    draw, texts = random.Random(0), make_texts(200)
    pictures = [_picture(draw, size) for size in (16, 48, 160, 400)]
    sounds = [_sound(draw, seconds) for seconds in (0.1, 0.5, 2.0)]
    model, writer, *others = names
    readers = others or [model]

    def sample() -> dict[str, Any]:
        whole = {"text": draw.choice(texts), "image": draw.choice(pictures), "audio": draw.choice(sounds)}
        return {key: whole[key] for key in draw.sample(sorted(whole), draw.randint(1, 3))}

    def ask(path: str, *samples: Any, model: str = model) -> bytes:
        return request(path, {"model": model, "samples": list(samples)})

    found = [(200, ask("/predict", sample())) for _ in range(120)]
    found += [(200, ask("/predict", *(sample() for _ in range(draw.randint(2, 12))))) for _ in range(30)]
    found += [(200, ask("/embed", sample(), sample())) for _ in range(20)]
    found += [(200, ask("/predict", {"text": draw.choice(texts)}, model=readers[-1])) for _ in range(30)]

    def write(**options: Any) -> bytes:
        asked = {"model": writer, "prompt": draw.choice(texts)[:60], "max_tokens": draw.randint(1, 40)}
        return request("/v1/completions", asked | options)

    found += [(200, write()) for _ in range(6)]
    found += [(200, write(stream=True, temperature=draw.choice([0, 1]))) for _ in range(10)]
    found += [(GONE, write(stream=True)) for _ in range(5)] + [(GONE, ask("/predict", sample())) for _ in range(5)]
    found += [(200, request(path)) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models")]
    damaged = {"image": {"base64": base64.b64encode(b"\x89PNG no picture").decode()}}
    found += [(400, ask("/predict", sample(), damaged)), (400, ask("/predict", {"txt": "a"}))]
    found += [(404, ask("/predict", sample(), model="nothing")), (404, request("/nothing"))]
    found.append((400, request("/predict", {}).replace(b"{}", b"{,")))
    draw.shuffle(found)
    return found


def _picture(draw: random.Random, size: int) -> dict[str, str]:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (size, size), draw.randbytes(3 * size * size)).save(file, "JPEG")
    return {"base64": base64.b64encode(file.getvalue()).decode()}


def _sound(draw: random.Random, seconds: float) -> dict[str, str]:
    import numpy as np
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.array([draw.uniform(-0.3, 0.3) for _ in range(int(8000 * seconds))]), 8000, format="FLAC")
    return {"base64": base64.b64encode(file.getvalue()).decode()}


async def soak(server: Server, requests: list[tuple[int, bytes]], given: argparse.Namespace) -> list[str]:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    wrong: Counter[str] = Counter()
    took = 0.0
    usage = [await _usage(0, server)]

    async def client(turn: Iterator[int]) -> None:
        connection = None
        for number in turn:
            wanted, content = requests[number % len(requests)]
            if connection is None or number % 50 == 0:  # clients come and go
                if connection is not None:
                    connection.close()
                _, connection = await loop.create_connection(Connection, "127.0.0.1", server.port)
            began = time.perf_counter()
            if wanted == GONE:
                connection.send(content)
                await asyncio.sleep(random.Random(number).uniform(0, 0.02))
                connection.close()
                connection = None
            else:
                try:
                    status, _ = await connection.ask(content)
                except ConnectionError:
                    status, connection = -1, None
                if status != wanted:
                    wrong[f"{'a lost connection' if status < 0 else status} for {wanted}"] += 1
            times.append(time.perf_counter() - began)
        if connection is not None:
            connection.close()

    for start, end in pairwise(_ends(given.requests)):
        turn, began = iter(range(start, end)), time.perf_counter()
        await asyncio.gather(*(client(turn) for _ in range(given.clients)))
        took += time.perf_counter() - began
        usage.append(await _usage(end, server))
    return [*_table(usage), *_verdict(usage, times, took, wrong, given)]


def _ends(requests: int) -> list[int]:
    """After how many requests memory is read."""
    after = max(0, requests - WARM)
    ends = [*range(0, WARM, STEP), *(WARM + after * row // ROWS for row in range(ROWS + 1))]
    return sorted({min(end, requests) for end in ends})


@dataclass(frozen=True)
class Usage:
    """What the server takes after so many requests; memory in MB, files and threads at rest."""

    requests: int
    loaded: float
    rested: float
    files: int
    threads: int


async def _usage(requests: int, server: Server) -> Usage:
    loaded = server.memory()
    await asyncio.sleep(REST)
    return Usage(requests, loaded, server.memory(), server.files(), server.threads())


def _table(usage: list[Usage]) -> list[str]:
    rows = [
        f"| {one.requests:,} | {one.loaded:.0f} | {one.rested:.0f} | {one.files} | {one.threads} |" for one in usage
    ]
    heads = ["| after requests | resident MB under load | at rest | open files | threads |", "|---|---|---|---|---|"]
    return [*heads, *rows, ""]


def _verdict(
    usage: list[Usage],
    times: list[float],
    took: float,
    wrong: Counter[str],
    given: argparse.Namespace,
) -> list[str]:
    warm, last = next((one for one in usage if one.requests >= WARM), usage[-1]), usage[-1]
    loaded, rested = last.loaded - warm.loaded, last.rested - warm.rested
    held = max(loaded, rested) <= given.growth and not wrong and last.files <= warm.files + 2
    verdict = "MISSED" if not held else "met" if len(times) >= WARM + SHOWN else "not shown: too few requests"
    shown = ", ".join(f"{what}: {count}" for what, count in wrong.items()) or "none"
    parts = ", ".join(f"{name} {1e3 * share(times, part):.1f} ms" for name, part in (("p50", 0.5), ("p99", 0.99)))
    growth = f"grown by {loaded:.1f} MB under load and {rested:.1f} MB at rest after the first {warm.requests:,}"
    return [
        f"- {len(times):,} requests by {given.clients} clients, {len(times) / took:.0f} a second; {parts}",
        f"- {growth} (limit {given.growth:g}); other statuses: {shown}; {verdict}",
    ]


if __name__ == "__main__":
    main()
