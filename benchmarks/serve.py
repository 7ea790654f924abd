"""Requests a second of one small text classifier with batching and without, for 64 clients at a time.

    python benchmarks/serve.py [--model NAME] [--clients 64] [--seconds 10] [--rounds 3] [--waits 0,2,5]
        [--bound 250] [--out FILE]

`mmhub serve` runs once with batching for each of `--waits` (the longest that a sample waits for others that are being
read, ms) and once without (`--max-batch 1`), all on the same cores as the clients, and is measured in turn. The clients
send texts of different lengths to /predict, one a request, and ask again at once. Every distinct answer is compared
with that of `Model.predict` in this process. Without `--model` the model is a random one of MiniLM's size (6 layers of
384), made here. `--single` adds what one client alone waits.

Met is: with the first of `--waits` 1.8 times the rate of no batching, a p99 no longer than that of no batching and than
`--bound` ms, no errors, and no answer that differs by more than 1e-5. Otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serve_client import Server, about, run_clients, serving

TARGET = 1.8
TOLERANCE = 1e-5
WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man even
most made after also did many off before must well back through years much where your way down should because long each
just state those people too mister how little good world make very year still see own work men day get here old life
both between being under three never know same last another while us might great go come since against right came take
used film story movie actor scene funny dull moving slow clever warm cold bright dark heart plot cast music"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--waits", default="0,2,5")
    parser.add_argument("--bound", type=float, default=250.0, help="ms that the p99 may take [default: 250]")
    parser.add_argument("--single", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = ["# Serving a small text classifier", "", *about(["mmhub", "mmhub-serve", "torch", "uvicorn"])]
    texts = make_texts(given.texts)
    with tempfile.TemporaryDirectory() as folder:
        name = given.model or make_model(Path(folder) / "model", texts)
        lines += measure(name, texts, given)
    table = "\n".join(lines) + "\n"
    print(table)
    if given.out:
        given.out.write_text(table)
    raise SystemExit(int("MISSED" in table))


def make_texts(count: int) -> list[str]:
    """Texts of 1 to 60 words, about as long as those of SST-2: log-normal, median 14."""
    draw, words = random.Random(0), WORDS.split()
    lengths = [min(60, max(1, round(draw.lognormvariate(2.65, 0.7)))) for _ in range(count)]
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


def make_model(folder: Path, texts: Sequence[str]) -> str:
    """Save a random text classifier of MiniLM's size."""
    import mmhub

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    text = {"use": "transformers", "config": {"model_type": "bert", **shape}}
    decoder = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    tokenizer = {"kind": "word"}
    mmhub.compose(encoders={"text": text}, decoder=decoder, tokenizer=tokenizer, texts=texts).eval().save(folder)
    return str(folder)


def measure(name: str, texts: Sequence[str], given: argparse.Namespace) -> list[str]:
    asked = [("/predict", {"samples": [{"text": text}]}) for text in texts]
    ways: dict[str, tuple[object, ...]] = {
        f"batching, wait {wait} ms": ("--max-wait-ms", wait) for wait in given.waits.split(",")
    }
    ways["no batching"] = ("--max-batch", 1)
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    singles: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with ExitStack() as stack:
        servers = {way: stack.enter_context(serving(name, *options)) for way, options in ways.items()}
        for server in servers.values():
            run_clients(server.port, given.clients, min(2, given.seconds), asked)  # warm
        for _ in range(given.rounds):
            for way, server in servers.items():
                results[way].append(_round(server, given.clients, given.seconds, asked))
                if given.single:
                    singles[way].append(_round(server, 1, given.seconds / 2, asked))
    compared, worst = _compare(name, texts, [one for found in results.values() for one in found])
    lines = [
        "",
        f"{given.clients} clients, {given.rounds} rounds of {given.seconds:g} s; medians.",
        "",
        *_table(results),
    ]
    if given.single:
        lines += ["", "One client.", "", *_table(singles)]
    return [*lines, "", *_verdict(results, given.bound), *_answers(results, compared, worst)]


def _round(server: Server, clients: int, seconds: float, asked: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    before = server.cpu()
    found = run_clients(server.port, clients, seconds, asked)
    return found | {"server_cpu": server.cpu() - before, "memory": server.memory()}


def _table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| server | requests/s | p50 ms | p95 ms | p99 ms | /healthz p99 ms | errors | CPU ms each | clients | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way, found in results.items():
        cells = [
            f"{_median(found, 'rate'):.0f}",
            *(f"{_median(found, 'ms', part):.1f}" for part in ("p50", "p95", "p99")),
            f"{_median(found, 'loop_ms', 'p99'):.1f}",
            str(sum(_errors(one) for one in found)),
            f"{1e3 * statistics.median(one['server_cpu'] / one['requests'] for one in found):.1f}",
            f"{100 * _median(found, 'client_cpu') / _median(found, 'seconds'):.0f} %",
            f"{_median(found, 'memory'):.0f}",
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def _median(found: Sequence[dict[str, Any]], *keys: str) -> float:
    values: list[Any] = list(found)
    for key in keys:
        values = [value[key] for value in values]
    return statistics.median(values)


def _errors(found: dict[str, Any]) -> int:
    return sum(count for status, count in found["statuses"].items() if status != "200")


def _compare(name: str, texts: Sequence[str], results: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Return how many texts were answered, and the largest difference of a score from that of `Model.predict`."""
    import mmhub

    model = mmhub.load(name)
    compared, worst = 0, 0.0
    for number, text in enumerate(texts):
        bodies = {body for found in results for body in found["answers"][number]}
        if not bodies:
            continue
        compared += 1
        (wanted,) = model.predict([{"text": text}])
        for body in bodies:
            (got,) = json.loads(body)["predictions"]
            worst = max(worst, *(abs(got["scores"][key] - value) for key, value in wanted["scores"].items()))
    return compared, worst


def _verdict(results: dict[str, list[dict[str, Any]]], bound: float) -> list[str]:
    *batched, alone = results
    rates = {way: [one["rate"] for one in found] for way, found in results.items()}
    slowest = {way: _median(found, "ms", "p99") for way, found in results.items()}
    lines = []
    for way in batched:
        ratios = [a / b for a, b in zip(rates[way], rates[alone], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"- {way}: {statistics.median(ratios):.2f} times no batching (rounds: {shown})")
        if way == batched[0]:
            lines[-1] += f"; {TARGET} {_met(statistics.median(ratios) >= TARGET)}"
            most = min(bound, slowest[alone])
            lines.append(
                f"- {way}: p99 {slowest[way]:.1f} ms, no batching {slowest[alone]:.1f} ms, bound {bound:g} ms; "
                f"{_met(slowest[way] <= most)}"
            )
    return lines


def _answers(results: dict[str, list[dict[str, Any]]], compared: int, worst: float) -> list[str]:
    errors = sum(_errors(one) for found in results.values() for one in found)
    met = _met(compared > 0 and worst <= TOLERANCE)
    return [
        f"- errors: {errors}; {_met(not errors)}",
        f"- largest difference from `Model.predict`, {compared} texts: {worst:.1e} (limit {TOLERANCE:g}); {met}",
    ]


def _met(true: bool) -> str:
    return "met" if true else "MISSED"


if __name__ == "__main__":
    main()
