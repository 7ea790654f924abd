"""From a raw input to one channel of samples at its own rate. Resampling and normalising are the processor's part.

Files are read by `mmhub_audio.files`, here or, as the policy says, in another process.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes
from mmhub.interfaces.apart import decode_apart
from mmhub.interfaces.raw import Bounds, open_raw, worker_of
from mmhub_audio.files import (
    MAX_CHANNELS,
    Channel,
    check_header,
    check_rate,
    file_facts,
    file_samples,
    measure_file,
    one_channel,
    open_file,
)

_HELD = 256 * 2**20  # bytes of samples that are taken from another process at once, to let it go


@dataclass(frozen=True)
class Waveform:
    """Mono samples, (S,) float32 in about [-1, 1], and their rate in Hz."""

    samples: Tensor
    rate: int


@dataclass(frozen=True)
class Sound:
    """An opened input: its rate in Hz, how many samples it has, and these, mono, in blocks, each (S,) float32.

    `frames` is None where only its end tells. `size` is that of its file in bytes, 0 for an array.
    """

    rate: int
    frames: int | None
    blocks: Iterator[Tensor]
    size: int = 0


def decode(raw: Any, policy: Policy, channel: Channel = "mix") -> Waveform:
    """Decode a path, URL, bytes, `{bytes, path}`, `{array, sampling_rate}`, or (array, rate) in either order.

    An array is (S,), or (C, S) of at most 32 channels and more samples than channels. Of several channels one is made
    as `channel` says; `{array, sampling_rate, mono}` with `mono` true says that (S,) is the one already.

    Raises:
        InputError: the input is not audio, is cut off, empty, too long, not finite, has no usable sampling rate, or
            lacks the channel.
    """
    sound = open_sound(raw, policy, channel)
    if sound.size > policy.max_bytes:
        raise InputError(f"{_name(raw)} has {sound.size} bytes, more than the limit of {policy.max_bytes}")
    return Waveform(torch.cat(list(sound.blocks)), sound.rate)


def open_sound(raw: Any, policy: Policy, channel: Channel = "mix") -> Sound:
    """Open what `decode` takes, to be decoded block by block; damage further on is an error when it is reached.

    A file may have any size. The limit of seconds holds.
    """
    sound = _from_array(_as_mapping(raw), policy, channel) if _is_samples(raw) else _open_file(raw, policy, channel)
    return replace(sound, blocks=_finite(sound.blocks, _name(raw)))


def _finite(blocks: Iterator[Tensor], name: str) -> Iterator[Tensor]:
    for block in blocks:
        if not bool(torch.isfinite(block).all()):
            raise InputError(f"{name} holds samples that are not finite (NaN or infinity)")
        yield block


def is_pair(raw: Any) -> bool:
    """Is this an array and its rate in Hz as a tuple, in either order? Nothing else could be meant."""
    if not isinstance(raw, tuple) or len(raw) != 2:
        return False
    kinds = [isinstance(part, (np.ndarray, Tensor)) and part.ndim > 0 for part in raw]
    return sum(kinds) == 1 and not isinstance(raw[kinds.index(False)], (str, bytes, Mapping, list, tuple))


def _is_samples(raw: Any) -> bool:
    return is_pair(raw) or (isinstance(raw, Mapping) and raw.get("array") is not None)


def _as_mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, Mapping):
        return raw
    array, rate = raw if isinstance(raw[0], (np.ndarray, Tensor)) and raw[0].ndim else reversed(raw)
    return {"array": array, "sampling_rate": rate}


def measure(raw: Any, policy: Policy) -> tuple[int, int]:
    """Return frames and rate in Hz of what `decode` takes, from the header alone where there is one that tells.

    Raises:
        InputError: it has no usable header, or is not permitted; damage further on goes unnoticed.
    """
    if _is_samples(raw):
        raw = _as_mapping(raw)
        return _frames(raw), _rate_of(raw)
    if (bounds := worker_of(raw, policy)) is not None:
        content, name = _content(raw, policy), describe_raw(raw)
        found = list(decode_apart(file_facts, content, name, policy, bounds))  # to its end: the process is used again
        frames, rate = _facts(found[0] if found else None, name, policy)
        if frames is None:
            raise _nonsense(name)
        return frames, rate
    with _opened(raw, policy) as file:
        return measure_file(file, describe_raw(raw), policy)


def _frames(raw: Mapping[str, Any]) -> int:
    array = raw["array"]
    try:
        return int(max(array.shape if hasattr(array, "shape") else np.shape(array)))
    except (TypeError, ValueError):
        raise InputError(f"{_name(raw)} is not a numeric array") from None


def _open_file(raw: Any, policy: Policy, channel: Channel) -> Sound:
    if (bounds := worker_of(raw, policy)) is not None:
        return _open_apart(_content(raw, policy), describe_raw(raw), policy, channel, bounds)
    with _opened(raw, policy) as file:
        found = open_file(file, describe_raw(raw), policy, channel)
    return Sound(found.rate, found.frames, map(torch.from_numpy, found.blocks), found.size)


@contextmanager
def _opened(raw: Any, policy: Policy) -> Iterator[BinaryIO]:
    file = open_raw(raw, policy)
    if file is None:
        raise _not_audio(raw)
    try:
        yield file
    finally:
        if not isinstance(file, io.BytesIO):  # it is read on by another number
            file.close()


def _content(raw: Any, policy: Policy) -> bytes:
    content = raw_bytes(raw, policy)
    if content is None:
        raise _not_audio(raw)
    return content


def _open_apart(content: bytes, name: str, policy: Policy, channel: Channel, bounds: Bounds) -> Sound:
    """Open what another process decodes; all that is not too much is taken from it at once, for others wait for it."""
    parts = decode_apart(file_samples, content, name, policy, bounds, channel=channel)
    frames, rate = _facts(next(parts, None), name, policy)
    blocks = (_block(part, name) for part in parts)
    held, size = [], 0
    for block in blocks:
        held.append(block)
        size += block.nbytes
        if size > _HELD:
            break
    return Sound(rate, frames, chain(held, blocks), len(content))


def _facts(found: Any, name: str, policy: Policy) -> tuple[int | None, int]:
    """Frames and rate as another process says, which may be in a stranger's hands."""
    frames, rate = (found.get("frames"), found.get("rate")) if isinstance(found, Mapping) else (None, None)
    if type(rate) is not int or (frames is not None and type(frames) is not int):
        raise _nonsense(name)
    check_header(name, frames, rate, 1, policy)
    return frames, rate


def _block(found: Any, name: str) -> Tensor:
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != np.float32:
        raise _nonsense(name)
    return torch.from_numpy(found)


def _nonsense(name: str) -> InputError:
    return InputError(f"{name} could not be decoded: its decoder answered nonsense", "it may be made to harm")


def _name(raw: Any) -> str:
    embedded = isinstance(raw, Mapping) and not raw.get("path") and raw.get("array") is not None
    return "the array" if embedded or is_pair(raw) else describe_raw(raw)


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


def _from_array(raw: Mapping[str, Any], policy: Policy, channel: Channel) -> Sound:
    name, rate = _name(raw), _rate_of(raw)
    array = _to_tensor(raw["array"], name)
    if array.ndim > 1 and array.numel() == max(array.shape):
        array = array.reshape(1, -1)  # (1, S) or (S, 1) leaves no doubt
    channels = array[None] if array.ndim == 1 else array
    shape = tuple(array.shape)
    if channels.ndim != 2 or not (len(channels) == 1 or len(channels) < channels.shape[1]):
        turned = channels.ndim == 2 and channels.shape[1] <= MAX_CHANNELS
        hint = "its first axis is longer, so samples come first: transpose it" if turned else None
        raise InputError(f"{name} has shape {shape}, expected (samples,) or (channels, samples)", hint)
    check_header(name, channels.shape[1], rate, len(channels), policy)
    samples = _to_float(channels.detach().cpu(), name)
    if raw.get("mono") is True and len(channels) == 1:
        channel = "first"
    return Sound(rate, channels.shape[1], iter([one_channel(samples, channel, name)]))


def _to_tensor(array: Any, name: str) -> Tensor:
    if isinstance(array, (list, tuple)) and array and isinstance(array[0], (np.ndarray, Tensor)) and array[0].ndim:
        raise InputError(
            f"{name} is a list of arrays, which may be chunks or channels",
            "join chunks with numpy.concatenate, or channels with numpy.stack",
        )
    try:
        if isinstance(array, np.ndarray):  # torch takes no foreign byte order, no negative stride, nothing read-only
            array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not a numeric array: {error}") from None


def _rate_of(raw: Mapping[str, Any]) -> int:
    value, name = raw.get("sampling_rate"), _name(raw)
    if value is None:
        raise InputError(f"{name} does not say its sampling rate", "add `sampling_rate`, in Hz")
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not float(value).is_integer():
        raise InputError(f"{name} has the sampling rate {value!r}, expected a whole number of Hz")
    check_rate(int(value), name)
    return int(value)


def _to_float(array: Tensor, name: str) -> Tensor:
    """Scale integer PCM of 8, 16 or 32 bits to [-1, 1); floating point is taken as it is."""
    if array.is_floating_point():
        return array.to(torch.float32)
    if array.dtype == torch.uint8:  # 8-bit PCM is unsigned
        return (array.to(torch.float32) - 128) / 128
    if array.dtype not in (torch.int8, torch.int16, torch.int32):
        kind = str(array.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} has type {kind}, which does not say how loud a sample is",
            "pass int16 or int32 samples, or floats in -1 to 1",
        )
    return (array.to(torch.float64) / -float(torch.iinfo(array.dtype).min)).to(torch.float32)
