"""From a raw input to one channel of samples at its own rate. Resampling and normalising are the processor's part.

Files are decoded by libsndfile (wav, flac, ogg, opus, mp3, aiff) in blocks, after the header has been held against the
policy. libsndfile reads a cut-off file without complaint in several formats, so each is checked for its whole length.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 32
_BLOCK = 1 << 16  # frames decoded at a time: a forged header cannot make us allocate more
_UNKNOWN_SIZE = 0x7FFFF000  # a WAV written to a pipe states 2 or 4 GiB because the writer could not know its size


@dataclass(frozen=True)
class Waveform:
    """Mono samples, (S,) float32 in about [-1, 1], and their rate in Hz."""

    samples: Tensor
    rate: int


def decode(raw: Any, policy: Policy) -> Waveform:
    """Decode a path, URL, bytes, `{bytes, path}`, or `{array, sampling_rate}`; several channels are averaged.

    Raises:
        InputError: the input is not audio, is cut off, empty, too long, not finite, or has no usable sampling rate.
    """
    if isinstance(raw, Mapping) and raw.get("array") is not None:
        waveform = _from_array(raw, policy)
    else:
        content = raw_bytes(raw, policy)
        if content is None:
            raise _not_audio(raw)
        waveform = _from_file(content, describe_raw(raw), policy)
    if not bool(torch.isfinite(waveform.samples).all()):
        raise InputError(f"{_name(raw)} holds samples that are not finite (NaN or infinity)")
    return waveform


def measure(raw: Any, policy: Policy) -> tuple[int, int]:
    """Return frames and rate in Hz of what `decode` takes, from the header alone where there is one.

    Raises:
        InputError: it has no usable header, or is not permitted; damage further on goes unnoticed.
    """
    if isinstance(raw, Mapping) and raw.get("array") is not None:
        return _frames(raw), _whole_rate(raw.get("sampling_rate"), _name(raw))
    if isinstance(raw, Mapping) and raw.get("bytes") is None and raw.get("path"):
        return measure(raw["path"], policy)
    path = _local_path(raw, policy)
    content = raw_bytes(raw, policy) if path is None else None
    if path is None and content is None:
        raise _not_audio(raw)
    try:
        info = soundfile.info(io.BytesIO(content) if content is not None else str(path))
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise InputError(f"cannot read the header of {describe_raw(raw)}: {error}") from None
    _check_header(describe_raw(raw), info.frames, info.samplerate, info.channels, policy)
    return info.frames, info.samplerate


def _frames(raw: Mapping[str, Any]) -> int:
    try:
        return len(raw["array"])
    except TypeError:
        raise InputError(f"{_name(raw)} is not a numeric array") from None


def _local_path(raw: Any, policy: Policy) -> Path | None:
    """The file behind a raw input whose content need not be read for its header; None for anything else."""
    if not isinstance(raw, (str, os.PathLike)) or not policy.paths:
        return None
    text = os.fspath(raw)
    if not isinstance(text, str) or text.startswith(("http://", "https://")):
        return None
    return Path(policy.root, text).expanduser()


def _name(raw: Any) -> str:
    embedded = isinstance(raw, Mapping) and not raw.get("path") and raw.get("array") is not None
    return "the array" if embedded else describe_raw(raw)


def _not_audio(raw: Any) -> InputError:
    if isinstance(raw, (np.ndarray, Tensor)):
        return InputError(
            f"{describe_raw(raw)} of samples does not say its sampling rate",
            'pass {"array": samples, "sampling_rate": Hz}',
        )
    return InputError(
        f"{describe_raw(raw)} is not audio",
        'expected a path, bytes, or {"array": samples, "sampling_rate": Hz}',
    )


def _check_header(name: str, frames: int, rate: int, channels: int, policy: Policy) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"{name} has a sampling rate of {rate} Hz, outside {MIN_RATE} to {MAX_RATE} Hz")
    if channels > MAX_CHANNELS:
        raise InputError(f"{name} has {channels} channels, more than the limit of {MAX_CHANNELS}")
    if frames > policy.max_seconds * rate:
        limit = f"the limit of {policy.max_seconds:g} s"
        raise InputError(f"{name} lasts {frames / rate:.1f} s, more than {limit}", "cut it into shorter clips")
    if frames <= 0:
        raise InputError(f"{name} holds no samples")


def _from_array(raw: Mapping[str, Any], policy: Policy) -> Waveform:
    name = _name(raw)
    rate = _whole_rate(raw.get("sampling_rate"), name)
    try:
        array = torch.as_tensor(raw["array"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not a numeric array: {error}") from None
    if array.ndim > 1 and array.numel() == max(array.shape):
        array = array.reshape(-1)  # (1, S) or (S, 1) leaves no doubt
    if array.ndim != 1:
        shape = tuple(array.shape)
        raise InputError(f"{name} has shape {shape}, expected one channel of samples", "average the channels first")
    _check_header(name, len(array), rate, 1, policy)
    return Waveform(_to_float(array.detach().cpu(), name), rate)


def _whole_rate(value: Any, name: str) -> int:
    if value is None:
        raise InputError(f"{name} does not say its sampling rate", "add `sampling_rate`, in Hz")
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not float(value).is_integer():
        raise InputError(f"{name} has the sampling rate {value!r}, expected a whole number of Hz")
    return int(value)


def _to_float(array: Tensor, name: str) -> Tensor:
    """Scale integer PCM of any width to [-1, 1); floating point is taken as it is."""
    if array.is_floating_point():
        return array.to(torch.float32)
    if array.dtype == torch.bool or array.is_complex():
        raise InputError(f"{name} has type {array.dtype}, expected real samples")
    if array.dtype == torch.uint8:  # 8-bit PCM is unsigned
        return (array.to(torch.float32) - 128) / 128
    return (array.to(torch.float64) / -float(torch.iinfo(array.dtype).min)).to(torch.float32)


def _from_file(content: bytes, name: str, policy: Policy) -> Waveform:
    _check_whole(content, name)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_header(name, file.frames, file.samplerate, file.channels, policy)
            _check_chunks(file.extra_info, name)
            blocks = [b.mean(1) for b in file.blocks(_BLOCK, dtype="float32", always_2d=True)]
            frames, rate = file.frames, file.samplerate
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise InputError(f"cannot decode {name} as audio: {reason.strip().rstrip('.')}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(samples) < frames:
        raise InputError(f"{name} is cut off: {len(samples)} of {frames} samples could be read")
    return Waveform(torch.from_numpy(samples), rate)


def _check_chunks(info: str, name: str) -> None:
    """Compare the size a WAV or AIFF file states for its sample data with what is there, from libsndfile's log."""
    for stated, actual in re.findall(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", info, re.MULTILINE):
        if int(actual) < int(stated) < _UNKNOWN_SIZE:
            raise InputError(f"{name} is cut off: {actual} of {stated} bytes of samples are there")


def _check_whole(content: bytes, name: str) -> None:
    if content.startswith(b"OggS"):
        _check_ogg(content, name)
    stated = _mp3_bytes(content)
    if stated > len(content):
        raise InputError(f"{name} is cut off: {len(content)} of {stated} bytes are there")


def _check_ogg(content: bytes, name: str) -> None:
    """A whole Ogg stream ends with a page that carries the end-of-stream flag (RFC 3533, section 6)."""
    page = content.rfind(b"OggS\0")
    flags = content[page + 5 : page + 6]
    table = content[page + 27 : page + 27 + content[page + 26]] if page + 26 < len(content) else b""
    whole = len(content) >= page + 27 + len(table) + sum(table) and page + 26 < len(content)
    if not whole or not flags or not flags[0] & 4:
        raise InputError(f"{name} is cut off: its last Ogg page is missing")


def _mp3_bytes(content: bytes) -> int:
    """The size that the Xing or Info frame at the start of an MP3 states for the whole stream, 0 without one."""
    start = 0
    if content.startswith(b"ID3") and len(content) >= 10:
        a, b, c, d = content[6:10]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    head = content[start : start + 192]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    if tag < 0 or len(head) < tag + 16:
        return 0
    flags = int.from_bytes(head[tag + 4 : tag + 8], "big")
    if not flags & 2:
        return 0
    (stated,) = struct.unpack_from(">I", head, tag + (12 if flags & 1 else 8))
    return start + int(stated)
