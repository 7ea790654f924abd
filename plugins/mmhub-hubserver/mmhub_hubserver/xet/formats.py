"""The two binary formats of Xet uploads, read from clients that are not trusted.

A *xorb* is a row of compressed chunks, named by a Merkle tree over the hashes of the chunks. A *shard* says of which
chunks of which xorbs files are made, and the sha256 of each file. See https://huggingface.co/docs/xet (xorb, shard,
hashing). What is announced and what is true are compared before anything is made of it; footers are not looked at.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lz4.frame  # type: ignore[import-untyped]
from blake3 import blake3

from mmhub_hubserver.errors import Invalid, TooLarge

CHUNK_LIMIT = 128 << 10  # bytes of one chunk, uncompressed
CHUNKS_LIMIT = 1 << 16  # chunks of one xorb; clients stop at 8192
XORB_LIMIT = 72 << 20  # bytes of one xorb as sent: 64 MiB and its footer
UNPACKED_LIMIT = 1 << 30  # bytes of one xorb, uncompressed
SHARD_LIMIT = 80 << 20  # bytes of one shard; clients aim at 64 MiB

_DATA_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_SHARD_TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
_XORB_FOOTER = b"XETBLOB"
_ENTRY = 48  # bytes: all that a shard lists has this size
_BOOKEND = b"\xff" * 32
_VERIFICATION, _METADATA = 1 << 31, 1 << 30  # flags of a file in a shard

Read = Callable[[int], bytes]  # up to so many bytes, b"" at the end


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (exclusive) of a xorb."""

    xorb: str
    start: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it; the terms are decoded when asked for."""

    sha256: str
    entries: bytes

    def terms(self) -> Iterator[Term]:
        for xorb, _flags, _size, start, end in struct.iter_unpack("<32sIIII", self.entries):
            yield Term(hash_text(xorb), start, end)


def hash_text(raw: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian numbers in hexadecimal."""
    return struct.pack(">4Q", *struct.unpack("<4Q", raw)).hex()


def chunk_hash(chunk: bytes | bytearray) -> bytes:
    return blake3(chunk, key=_DATA_KEY).digest()


def xorb_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """Return the root of the Merkle tree over the hashes and sizes of one or more chunks."""
    nodes = list(chunks)
    while len(nodes) > 1:
        nodes = [_parent(group) for group in _groups(nodes)]
    return nodes[0][0]


def read_xorb(read: Read) -> Iterator[bytes | bytearray]:
    """Yield the chunks of a xorb, uncompressed, one at a time.

    Raises:
        Invalid: the bytes are not a xorb.
        TooLarge: a limit of this module is exceeded.
    """
    sent = chunks = unpacked = 0
    while header := _some(read, 8):
        if header.startswith(_XORB_FOOTER):
            return  # the rest repeats what the chunks have told
        if len(header) < 8 or header[0] != 0:
            raise Invalid(f"Chunk {chunks} of the xorb has no valid header.")
        stored, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
        sent, chunks, unpacked = sent + 8 + stored, chunks + 1, unpacked + size
        if not 0 < size <= CHUNK_LIMIT or not 0 < stored <= 2 * CHUNK_LIMIT:
            raise Invalid(f"Chunk {chunks - 1} of the xorb announces {stored} bytes for {size}; at most {CHUNK_LIMIT}.")
        if sent > XORB_LIMIT or chunks > CHUNKS_LIMIT or unpacked > UNPACKED_LIMIT:
            raise TooLarge(f"The xorb is too large: at most {XORB_LIMIT >> 20} MiB and {CHUNKS_LIMIT} chunks.")
        data = _some(read, stored)
        if len(data) < stored:
            raise Invalid("The xorb ends inside a chunk.")
        yield _decompressed(header[4], data, size)


def read_shard(read: Read) -> list[ShardFile]:
    """Return the files that a shard describes.

    Raises:
        Invalid: the bytes are not a shard, or a file has no sha256.
        TooLarge: the shard is over `SHARD_LIMIT`.
    """
    header = _some(read, _ENTRY)
    if len(header) < _ENTRY or header[:32] != _SHARD_TAG or header[32:40] != struct.pack("<Q", 2):
        raise Invalid("The request is not a Xet shard of version 2.")
    files, left = [], SHARD_LIMIT
    while not (entry := _entries(read, 1)).startswith(_BOOKEND):
        flags, count = struct.unpack_from("<II", entry, 32)
        left -= _ENTRY * (1 + count * (2 if flags & _VERIFICATION else 1))
        if left < 0:
            raise TooLarge(f"The shard is over {SHARD_LIMIT >> 20} MiB.")
        terms = _entries(read, count)
        if flags & _VERIFICATION:
            _entries(read, count)  # proves that the client knows the chunks; its sha256 is proof enough
        if not flags & _METADATA:
            raise Invalid("A file of the shard has no sha256, which a repository needs.")
        files.append(ShardFile(hash_text(_entries(read, 1)[:32]), terms))
    return files


def _groups(nodes: list[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """Cut nodes into groups of 2 (the last one may be of 1) to 9, after each third or later hash that is 0 modulo 4."""
    start = 0
    while start < len(nodes):
        end = min(start + 9, len(nodes))
        end = next((at + 1 for at in range(start + 2, end) if nodes[at][0][24] % 4 == 0), end)
        yield nodes[start:end]
        start = end


def _parent(group: list[tuple[bytes, int]]) -> tuple[bytes, int]:
    lines = "".join(f"{hash_text(raw)} : {size}\n" for raw, size in group)
    return blake3(lines.encode(), key=_NODE_KEY).digest(), sum(size for _, size in group)


def _decompressed(scheme: int, data: bytes, size: int) -> bytes | bytearray:
    if scheme == 0:
        chunk: bytes | bytearray = data
    elif scheme == 1:
        chunk = _lz4(data, size)
    elif scheme == 2:
        chunk = _ungrouped(_lz4(data, size))
    else:
        raise Invalid(f"Chunks compressed by scheme {scheme} are not understood.")
    if len(chunk) != size:
        raise Invalid(f"A chunk has {len(chunk)} bytes or more instead of the announced {size}.")
    return chunk


def _lz4(data: bytes, size: int) -> bytes:
    """Decompress to `size` bytes; to one more where the data has more."""
    decompressor = lz4.frame.LZ4FrameDecompressor()
    try:
        chunk: bytes = decompressor.decompress(data, max_length=size + 1)
    except RuntimeError as error:
        raise Invalid(f"A chunk is not valid LZ4: {error}.") from None
    if not decompressor.eof:
        raise Invalid(f"A chunk of {size} bytes does not end where it should.")
    return chunk


def _ungrouped(grouped: bytes) -> bytearray:
    """Undo the grouping of every fourth byte: aaabbbccdd becomes abcdabcdab."""
    chunk, start = bytearray(len(grouped)), 0
    for first in range(4):
        end = start + (len(grouped) - first + 3) // 4
        chunk[first::4] = grouped[start:end]
        start = end
    return chunk


def _some(read: Read, size: int) -> bytes:
    """Read `size` bytes, less only at the end."""
    data = read(size)
    if len(data) == size or not data:
        return data
    parts, missing = [data], size - len(data)
    while missing and (data := read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _entries(read: Read, count: int) -> bytes:
    data = _some(read, count * _ENTRY)
    if len(data) < count * _ENTRY:
        raise Invalid("The shard ends early.")
    return data
