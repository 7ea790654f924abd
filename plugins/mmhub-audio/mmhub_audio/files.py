"""Audio files to one channel of samples, in blocks. Nothing here needs PyTorch: it may run in a process of its own.

Files are decoded by libsndfile (wav, flac, ogg, opus, mp3, aiff, au) in blocks, after the header was held against the
policy. libsndfile reads a cut-off file without complaint in several formats, so each is checked for its whole length.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from mmhub.errors import InputError
from mmhub.interfaces.raw import Policy

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 32
_BLOCK = 1 << 16  # frames decoded at a time: a forged header cannot make us allocate more
_PAGE = 1 << 16  # bytes: an Ogg page is shorter
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU")  # whose wholeness can be checked
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's number for a FLAC written to a pipe, which does not state how many it has
_UNKNOWN_SIZE = 0x7FFFF000  # a WAV written to a pipe states 2 or 4 GiB because the writer could not know its size

Channel = Literal["mix", "first"] | int  # of several: their mean, the first, or the one of that number, from 0
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """An opened file: its rate in Hz, how many samples it has (None: only its end tells), these in blocks (S,), mono,
    and its size in bytes."""

    rate: int
    frames: int | None
    blocks: Iterator[Samples]
    size: int


def file_samples(content: bytes, name: str, policy: Policy, channel: Channel) -> Iterator[dict[str, Any] | Samples]:
    """Yield {"rate": Hz, "frames": count or None}, then the samples of one channel in blocks, float32 (S,).

    Raises:
        InputError: not audio, damaged, or beyond a limit.
    """
    found = open_file(io.BytesIO(content), name, policy, channel)
    yield {"rate": found.rate, "frames": found.frames}
    yield from found.blocks


def file_facts(content: bytes, name: str, policy: Policy) -> Iterator[dict[str, Any]]:
    """Yield {"rate": Hz, "frames": count}, from the header alone where that tells. Raises as `file_samples`."""
    frames, rate = measure_file(io.BytesIO(content), name, policy)
    yield {"rate": rate, "frames": frames}


def measure_file(file: BinaryIO, name: str, policy: Policy) -> tuple[int, int]:
    """Return frames and rate in Hz, from the header alone where that tells. Raises as `file_samples`."""
    found = open_file(file, name, policy, "mix", "read the header of")
    return sum(map(len, found.blocks)) if found.frames is None else found.frames, found.rate


def check_header(name: str, frames: int | None, rate: int, channels: int, policy: Policy) -> None:
    """Refuse what a header states that no sound here may have.

    Raises:
        InputError: the rate, the channels or the length is beyond a limit.
    """
    check_rate(rate, name)
    most = min(MAX_CHANNELS, policy.max_channels)
    if channels > most:
        raise InputError(f"{name} has {channels} channels, more than the limit of {most}")
    if frames is not None and frames > _most_frames(rate, policy):
        raise _too_long(name, f" {frames / rate:.1f} s,", rate, policy)
    if frames is not None and frames <= 0:
        raise InputError(f"{name} holds no samples")


def _most_frames(rate: int, policy: Policy) -> float:
    return min(policy.max_seconds * rate, policy.max_samples)


def _too_long(name: str, length: str, rate: int, policy: Policy) -> InputError:
    limit, hint = f"{policy.max_seconds:g} s", "cut it into shorter clips"
    if policy.max_samples < policy.max_seconds * rate:
        limit, hint = f"{policy.max_samples / rate:.1f} s at {rate} Hz", f"{hint}, or lower its sampling rate"
    return InputError(f"{name} lasts{length} more than the limit of {limit}", hint)


def check_rate(rate: int, name: str) -> None:
    """Raise InputError unless a rate, in Hz, is one that sound can have."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"{name} has a sampling rate of {rate} Hz, outside {MIN_RATE} to {MAX_RATE} Hz")


def one_channel(channels: Any, channel: Channel, name: str) -> Any:
    """Make one channel, (S,), of (C, S), arrays or tensors."""
    number = 0 if channel == "first" else channel
    if number == "mix":
        return channels[0] if len(channels) == 1 else channels.mean(0)
    assert isinstance(number, int)
    if number >= len(channels):
        count = f"{len(channels)} channel{'s' if len(channels) > 1 else ''}"
        raise InputError(f"{name} has {count}, and no channel {number} (counted from 0)", 'set channel = "mix"')
    return channels[number]


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


def open_file(file: BinaryIO, name: str, policy: Policy, channel: Channel, doing: str = "decode") -> Recording:
    """Open a file, to be decoded block by block; damage further on is an error when it is reached.

    Raises:
        InputError: not audio, cut off, or beyond a limit.
    """
    size = _check_whole(file, name)
    with _decoding(name, doing):
        sound = _File(_Bytes(file.getvalue()) if isinstance(file, io.BytesIO) else _number(file))
    if sound.format not in _FORMATS:
        raise InputError(f"{name} is of the format {sound.format}", "convert it to wav, flac, ogg, opus, mp3 or aiff")
    frames = None if sound.frames == _UNKNOWN_FRAMES else sound.frames
    check_header(name, frames, sound.samplerate, sound.channels, policy)
    policy.check_ratio(4 * sound.channels * (frames or 0), size, name)
    _check_chunks(sound.extra_info, name)
    blocks = _blocks(sound, name, channel) if frames is not None else _until_end(sound, name, channel, policy, size)
    return Recording(sound.samplerate, frames, blocks, size)


def _number(file: BinaryIO) -> int:
    """A number of its own for an open file: by its name, soundfile would take *.raw for samples without a header."""
    number = os.dup(file.fileno())
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _blocks(file: soundfile.SoundFile, name: str, channel: Channel) -> Iterator[Samples]:
    count = 0
    with file:
        while count < file.frames:
            with _decoding(name):
                block = file.read(min(_BLOCK, file.frames - count), dtype="float32", always_2d=True)
            if not len(block):
                raise InputError(f"{name} is cut off: {count} of {file.frames} samples could be read")
            count += len(block)
            yield one_channel(block.T, channel, name)


def _until_end(file: soundfile.SoundFile, name: str, channel: Channel, policy: Policy, size: int) -> Iterator[Samples]:
    count = 0
    with file:
        while True:
            with _decoding(name):
                block = file.read(_BLOCK, dtype="float32", always_2d=True)
            if not len(block):
                break
            count += len(block)
            if count > _most_frames(file.samplerate, policy):
                raise _too_long(name, "", file.samplerate, policy)
            policy.check_ratio(4 * file.channels * count, size, name)
            yield one_channel(block.T, channel, name)
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
