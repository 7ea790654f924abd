"""Train a CNN on the CPU with glibc's allocator as it is, and as `mmhub.device.keep_memory` sets it.

    python benchmarks/allocator.py [--rounds 3] [--steps 4]

EfficientNet-Lite0 with random weights, 16 pictures of 160 pixels a step, forward and backward. Each round is a process
of its own; ways take turns. Seconds are of the processor, user and system, without the first step.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

import gpu_table
import torch
from torch.nn import functional as F

from mmhub.device import keep_memory


def run(steps: int) -> None:
    import timm

    keep_memory(torch.device("cpu"))
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10).train()
    x, y = torch.randn(16, 3, 160, 160), torch.randint(0, 10, (16,))
    before = resource.getrusage(resource.RUSAGE_SELF)
    for step in range(steps + 1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            before = resource.getrusage(resource.RUSAGE_SELF)
    now = resource.getrusage(resource.RUSAGE_SELF)
    user, system = now.ru_utime - before.ru_utime, now.ru_stime - before.ru_stime
    print(user / steps, system / steps, now.ru_maxrss / 1024, float(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    chosen = parser.parse_args()
    if chosen.run:
        run(chosen.steps)
        return
    chosen.device, chosen.toy = torch.device("cpu"), False
    found: dict[str, list[list[float]]] = {"0": [], "1": []}
    for _ in range(chosen.rounds):
        for way, seen in found.items():
            command = [sys.executable, __file__, "--run", "--steps", str(chosen.steps)]
            done = subprocess.run(command, env=os.environ | {"MMHUB_MALLOC": way}, capture_output=True, check=True)
            seen.append([float(word) for word in done.stdout.split()])
    rows = []
    for way, name in (("0", "glibc as it is"), ("1", "memory kept")):
        user, system, memory, loss = (statistics.median(column) for column in zip(*found[way], strict=True))
        rows.append([name, f"{user:.2f}", f"{system:.2f}", f"{user + system:.2f}", f"{memory:,.0f}", f"{loss:.6f}"])
    columns = ("way", "user s a step", "system s a step", "together", "peak MiB", "last loss")
    gpu_table.write("What glibc's allocator costs a CNN on the CPU", columns, rows, chosen)


if __name__ == "__main__":
    main()
