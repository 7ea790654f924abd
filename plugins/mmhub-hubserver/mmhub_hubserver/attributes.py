""".gitattributes: which files git-lfs handles after a `git clone`, kept true for whatever is committed."""

import re
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO

from dulwich.attrs import AttributeValue, parse_git_attributes

from mmhub_hubserver.wildcards import MalformedPattern, Wildcard, rules_for

_RULE = b" filter=lfs diff=lfs merge=lfs -text\n"
# what the Hub puts into a new repository
_PATTERNS = """*.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.lz4 *.mds *.mlmodel *.model
*.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/*
*.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"""
INITIAL = b"".join(pattern.encode() + _RULE for pattern in _PATTERNS.split())


def covering(attributes: bytes, large_paths: Iterable[str]) -> bytes:
    """Return `attributes` with a line for each of these paths that it does not yet give to git-lfs."""
    paths = [path.encode("utf-8", "surrogateescape") for path in large_paths]
    if not paths:
        return attributes
    named = {line.removesuffix(_RULE.rstrip()) for line in attributes.splitlines()}
    rules, lines = _rules(attributes, rules_for(paths)), []
    for path in paths:
        name = _quoted(path)
        if name not in named and not _is_lfs(rules, path):
            lines.append(name + _RULE)
    if not lines:
        return attributes
    return attributes + (b"" if attributes.endswith(b"\n") or not attributes else b"\n") + b"".join(lines)


def _rules(attributes: bytes, most: int) -> list[tuple[Wildcard, AttributeValue]]:
    """Return the wildcard rules that say something about `filter`, the last (which wins) first."""
    rules = []
    for pattern, values in parse_git_attributes(BytesIO(attributes)):
        if b"filter" in values and not pattern.startswith((b"/", b'"')):
            with suppress(MalformedPattern):
                rules.append((Wildcard(pattern), values[b"filter"]))
    return rules[::-1][:most]


def _is_lfs(rules: list[tuple[Wildcard, AttributeValue]], path: bytes) -> bool:
    names = path.split(b"/")
    return next((value == b"lfs" for rule, value in rules if rule.match(names)), False)


def _quoted(path: bytes) -> bytes:
    """Return a pattern that matches exactly this path."""
    literal = b"/" + re.sub(rb"([\\*?\[\]])", rb"\\\1", path)
    if not re.search(rb'[\s"\\]', literal):
        return literal
    return b'"' + literal.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
