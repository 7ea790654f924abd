"""`mmhub env` and `mmhub version`: what is installed here, without importing any of it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import click

from mmhub import __version__
from mmhub.cli.output import emit, result_options
from mmhub.discovery import cache_folder
from mmhub.hub.client import without_login
from mmhub.plugins import get_index
from mmhub.registry import read_registries

_LIBRARIES = (
    "torch", "torchvision", "torchaudio", "transformers", "timm", "tokenizers", "safetensors", "huggingface_hub",
    "datasets", "peft", "numpy", "msgspec", "pluggy", "click",
)  # fmt: skip
_VARIABLES = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")


@click.command()
@result_options
def env(as_json: bool) -> None:
    """Show versions and devices, for bug reports."""
    data = {
        "mmhub": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "plugins": {plugin.distribution: f"{plugin.version} {plugin.status}" for plugin in get_index().plugins},
        "gpus": _gpus(),
        "index": cache_folder(),
        "registries": [str(file.path) for file in read_registries().files],
        "variables": {name: without_login(os.environ[name]) for name in sorted(os.environ) if _is_shown(name)},
    }
    emit(data, as_json, "\n".join(_line(key, value) for key, value in data.items()))


@click.command()
@result_options
def version(as_json: bool) -> None:
    """Show the version of mmhub."""
    emit({"mmhub": __version__, "python": platform.python_version()}, as_json, f"mmhub {__version__}")


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def _is_shown(name: str) -> bool:
    """Only variables that cannot hold a token."""
    return name in _VARIABLES or name.startswith("MMHUB_")


def _gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as its own tool reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _line(key: str, value: Any) -> str:
    line = f"{key}: {_text(value)}"
    return textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item or '-'}" for key, item in value.items()) or "none"
    return ("; ".join(value) or "none") if isinstance(value, list) else str(value)
