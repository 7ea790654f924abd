"""Where to compute, and in what precision."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from mmhub.errors import UsageError


def find_device(choice: str = "auto") -> torch.device:
    """Return the device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; auto takes the fastest there is.

    Raises:
        UsageError: it does not exist here.
    """
    if choice == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise UsageError(f"unknown device {choice!r}", "use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device {choice!r} here: {torch.cuda.device_count()} CUDA devices", "use auto or cpu")
    return device


def find_precision(choice: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: 'auto' is bfloat16 on a GPU that has it, else float32.

    On CPUs without native bfloat16 arithmetic autocast is many times slower than float32, so auto never picks it.
    'bf16' and 'bf16-pure' compute alike; they differ in what the parameters are stored in.
    """
    if choice == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-pure": torch.bfloat16}[choice]


def use_fast_matmul(device: torch.device) -> None:
    """Let a GPU multiply fp32 matrices in TF32: 10 bits of mantissa, several times as fast. Other devices: nothing."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def keep_memory(device: torch.device) -> bool:
    """Let glibc keep the memory that training on a CPU frees, and say whether it does.

    By default it returns large blocks to the system, which clears them again for the next step: a fifth of the time of
    a CNN's in benchmarks/results/allocator.md. The process keeps its peak in turn, for its whole life. Nothing is done
    on other devices and systems, where the environment names an allocator or sets this one (`LD_PRELOAD`, `MALLOC_*`,
    `GLIBC_TUNABLES`), or with `MMHUB_MALLOC=0`.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if device.type != "cpu" or sys.platform != "linux" or chosen or os.environ.get("MMHUB_MALLOC") == "0":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        _ = libc.gnu_get_libc_version
        mapped = any(libc.mallopt(_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))  # glibc may refuse more
        return mapped and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # from malloc.h
