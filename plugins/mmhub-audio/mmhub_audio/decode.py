"""From a raw input to one channel of samples at its own rate. Resampling and normalising are the processor's part.

Files are decoded by libsndfile (wav, flac, ogg, opus, mp3, aiff, au) in blocks, after the header was held against the
policy. libsndfile reads a cut-off file without complaint in several formats, so each is checked for its whole length.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw
from mmhub.interfaces.raw import open_raw

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 32
_BLOCK = 1 << 16  # frames decoded at a time: a forged header cannot make us allocate more
_PAGE = 1 << 16  # bytes: an Ogg page is shorter
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU")  # whose wholeness can be checked
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's number for a FLAC written to a pipe, which does not state how many it has
_UNKNOWN_SIZE = 0x7FFFF000  # a WAV written to a pipe states 2 or 4 GiB because the writer could not know its size

Channel = Literal["mix", "first"] | int  # of several: their mean, the first, or the one of that number, from 0


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
    sound = _open_file(raw, policy, doing="read the header of")
    return sum(map(len, sound.blocks)) if sound.frames is None else sound.frames, sound.rate


def _frames(raw: Mapping[str, Any]) -> int:
    array = raw["array"]
    try:
        return int(max(array.shape if hasattr(array, "shape") else np.shape(array)))
    except (TypeError, ValueError):
        raise InputError(f"{_name(raw)} is not a numeric array") from None


def _open_file(raw: Any, policy: Policy, channel: Channel = "mix", doing: str = "decode") -> Sound:
    file = open_raw(raw, policy)
    if file is None:
        raise _not_audio(raw)
    try:
        return _from_file(file, describe_raw(raw), policy, channel, doing)
    finally:
        if not isinstance(file, io.BytesIO):  # it is read on by another number
            file.close()


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


def _check_header(name: str, frames: int | None, rate: int, channels: int, policy: Policy) -> None:
    _check_rate(rate, name)
    if channels > MAX_CHANNELS:
        raise InputError(f"{name} has {channels} channels, more than the limit of {MAX_CHANNELS}")
    if frames is not None and frames > policy.max_seconds * rate:
        raise _too_long(name, f" {frames / rate:.1f} s,", policy.max_seconds)
    if frames is not None and frames <= 0:
        raise InputError(f"{name} holds no samples")


def _too_long(name: str, length: str, limit: float) -> InputError:
    return InputError(f"{name} lasts{length} more than the limit of {limit:g} s", "cut it into shorter clips")


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
    _check_header(name, channels.shape[1], rate, len(channels), policy)
    samples = _to_float(channels.detach().cpu(), name)
    if raw.get("mono") is True and len(channels) == 1:
        channel = "first"
    return Sound(rate, channels.shape[1], iter([_one_channel(samples, channel, name)]))


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


def _one_channel(channels: Tensor, channel: Channel, name: str) -> Tensor:
    """Make one channel, (S,), of (C, S)."""
    number = 0 if channel == "first" else channel
    if number == "mix":
        return channels[0] if len(channels) == 1 else channels.mean(0)
    assert isinstance(number, int)
    if number >= len(channels):
        count = f"{len(channels)} channel{'s' if len(channels) > 1 else ''}"
        raise InputError(f"{name} has {count}, and no channel {number} (counted from 0)", 'set channel = "mix"')
    return channels[number]


def _rate_of(raw: Mapping[str, Any]) -> int:
    value, name = raw.get("sampling_rate"), _name(raw)
    if value is None:
        raise InputError(f"{name} does not say its sampling rate", "add `sampling_rate`, in Hz")
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not float(value).is_integer():
        raise InputError(f"{name} has the sampling rate {value!r}, expected a whole number of Hz")
    _check_rate(int(value), name)
    return int(value)


def _check_rate(rate: int, name: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"{name} has a sampling rate of {rate} Hz, outside {MIN_RATE} to {MAX_RATE} Hz")


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


class _Bytes(io.BytesIO):
    """Bytes in which libsndfile may seek to where nothing is, as it may in a file."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return -1


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """A file in which soundfile does not seek to where it is already: libsndfile fails at that in an unknown length."""

    def seekable(self) -> bool:
        return self.frames != _UNKNOWN_FRAMES and bool(super().seekable())


def _from_file(file: BinaryIO, name: str, policy: Policy, channel: Channel, doing: str) -> Sound:
    size = _check_whole(file, name)
    with _decoding(name, doing):
        sound = _File(_Bytes(file.getvalue()) if isinstance(file, io.BytesIO) else _number(file))
    if sound.format not in _FORMATS:
        raise InputError(f"{name} is of the format {sound.format}", "convert it to wav, flac, ogg, opus, mp3 or aiff")
    frames = None if sound.frames == _UNKNOWN_FRAMES else sound.frames
    _check_header(name, frames, sound.samplerate, sound.channels, policy)
    _check_chunks(sound.extra_info, name)
    blocks = _blocks(sound, name, channel) if frames is not None else _until_end(sound, name, channel, policy)
    return Sound(sound.samplerate, frames, blocks, size)


def _number(file: BinaryIO) -> int:
    """A number of its own for an open file: by its name, soundfile would take *.raw for samples without a header."""
    number = os.dup(file.fileno())
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _blocks(file: soundfile.SoundFile, name: str, channel: Channel) -> Iterator[Tensor]:
    count = 0
    with file:
        while count < file.frames:
            with _decoding(name):
                block = file.read(min(_BLOCK, file.frames - count), dtype="float32", always_2d=True)
            if not len(block):
                raise InputError(f"{name} is cut off: {count} of {file.frames} samples could be read")
            count += len(block)
            yield _one_channel(torch.from_numpy(block).T, channel, name)


def _until_end(file: soundfile.SoundFile, name: str, channel: Channel, policy: Policy) -> Iterator[Tensor]:
    count = 0
    with file:
        while True:
            with _decoding(name):
                block = file.read(_BLOCK, dtype="float32", always_2d=True)
            if not len(block):
                break
            count += len(block)
            if count > policy.max_seconds * file.samplerate:
                raise _too_long(name, "", policy.max_seconds)
            yield _one_channel(torch.from_numpy(block).T, channel, name)
    if not count:
        raise InputError(f"{name} holds no samples")


@contextmanager
def _decoding(name: str, doing: str = "decode") -> Iterator[None]:
    try:
        yield
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise InputError(f"cannot {doing} {name} as audio: {reason.strip().rstrip('.')}") from None


def _check_chunks(info: str, name: str) -> None:
    """Compare the size a header states for the samples, or for all, with what is there, from libsndfile's log."""
    for stated, actual in re.findall(
        r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", info, re.MULTILINE
    ):
        if int(actual) < int(stated) < _UNKNOWN_SIZE:
            raise InputError(f"{name} is cut off: {actual} of {stated} bytes are there")


def _check_whole(file: BinaryIO, name: str) -> int:
    """Check that a file was not cut off, as far as its ends tell, and return its size in bytes."""
    size = file.seek(0, io.SEEK_END)
    if _bytes_at(file, 0, 4) == b"OggS":
        _check_ogg(_bytes_at(file, max(0, size - _PAGE), _PAGE), name)
    stated = _mp3_bytes(file)
    if stated > size:
        raise InputError(f"{name} is cut off: {size} of {stated} bytes are there")
    return size


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _check_ogg(content: bytes, name: str) -> None:
    """A whole Ogg stream ends with a page that carries the end-of-stream flag (RFC 3533, section 6)."""
    page = content.rfind(b"OggS\0")
    there = 0 <= page < len(content) - 26
    table = content[page + 27 : page + 27 + content[page + 26]] if there else b""
    if not there or len(content) < page + 27 + len(table) + sum(table) or not content[page + 5] & 4:
        raise InputError(f"{name} is cut off: its last Ogg page is missing")


def _mp3_bytes(file: BinaryIO) -> int:
    """The size that the Xing or Info frame at the start of an MP3 states for the whole stream, 0 without one."""
    start, head = 0, _bytes_at(file, 0, 10)
    if head.startswith(b"ID3") and len(head) == 10:
        a, b, c, d = head[6:]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    head = _bytes_at(file, start, 192)
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
