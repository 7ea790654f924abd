"""What a file is, by its name and its first and last bytes, and what is wrong with it. Nothing in it is run.

A tripwire and no proof. What mmhub relies on is that it opens JSON, text and safetensors alone; this tells what else is
there, for other programs may open it.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmhub.errors import TrustError

Severity = Literal["bad", "warning", "note"]
TEXT_BYTES = 16 * 2**20  # of a text that is read whole
_ABSURD = 2**30  # bytes, which no text of a model has
_TAIL = 2**16 + 22  # where the end of a zip archive may begin
_MEMBERS = 64  # of an archive of arrays, that are looked into
_ARRAY_HEADER = 2**14  # bytes; numpy reads no longer one


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something a reader should know. `rule` is its short name, `file` where it was found, '' for the whole model."""

    severity: Severity
    rule: str
    message: str
    file: str = ""


_PICKLE = "a pickle, which runs code when it is opened"
_CODE = "code"
_ARCHIVE = "an archive"
# What files are called that nobody should open who does not trust their author.
_BAD = {
    **dict.fromkeys(("bin", "pt", "pth", "pkl", "pickle", "ckpt", "joblib", "dill", "th", "t7", "mar"), _PICKLE),
    **dict.fromkeys(
        ("nemo", "tar", "tgz", "zip", "7z", "rar", "whl", "jar", "egg", "xz", "bz2", "gz", "zst"), _ARCHIVE
    ),
    **dict.fromkeys(("pickled", "cpkl", "cloudpickle", "sav", "skops", "torchscript"), _PICKLE),
    **dict.fromkeys(
        ("py", "pyw", "pyz", "pyc", "pyd", "pyx", "ipynb", "so", "dll", "dylib", "exe", "com", "msi"), _CODE
    ),
    **dict.fromkeys(("sh", "bash", "bat", "cmd", "ps1", "psm1", "js", "mjs", "jse", "vbs", "wsf", "lua", "pl"), _CODE),
    **dict.fromkeys(("elf", "rb", "php", "hta", "lnk", "scr", "cpl", "class", "wasm", "desktop", "appimage"), _CODE),
    **dict.fromkeys(("r", "rds", "rdata"), "R's, which may run code when it is opened"),
    **dict.fromkeys(("h5", "hdf5", "keras", "pb"), "a Keras or TensorFlow model, which may hold code"),
    **dict.fromkeys(("pt2", "ptl", "ptc", "mlmodel", "engine", "plan"), "a compiled model, which is code"),
    **dict.fromkeys(("npy", "npz"), "an array"),  # looked into
}
_SAFE = {
    "json": "json", "jsonl": "text", "safetensors": "safetensors", "txt": "text", "md": "text", "jinja": "template",
    "csv": "text", "tsv": "text", "yaml": "yaml", "yml": "yaml", "toml": "text", "vocab": "text", "merges": "text",
    "png": "image", "jpg": "image", "jpeg": "image", "gif": "image", "webp": "image", "wav": "audio", "flac": "audio",
    "model": "tokenizer", "sig": "signature", "parquet": "data", "onnx": "onnx", "gguf": "gguf", "svg": "text",
}  # fmt: skip
_BARE = {"LICENSE", "LICENCE", "NOTICE", ".gitattributes", ".gitignore", "COPYING"}
# How files begin that are what their name says.
_BEGINNINGS = {
    "png": rb"\x89PNG\r\n\x1a\n", "jpg": rb"\xff\xd8\xff", "jpeg": rb"\xff\xd8\xff", "gif": rb"GIF8[79]a",
    "webp": rb"RIFF[\x00-\xff]{4}WEBP", "wav": rb"(RIFF|RIFX|RF64)[\x00-\xff]{4}WAVE", "flac": rb"fLaC|ID3",
    "parquet": rb"PAR1", "gguf": rb"GGUF|FUGG", "onnx": rb"[\x08\x12\x1a\x22\x28\x32\x3a\x42\x72]",
}  # fmt: skip
_POINTER = b"version https://git-lfs.github.com/spec/"
# How files begin that are something else than text or weights.
_MAGIC = (
    (rb"\x80[\x02-\x05][\x00-\xff]", _PICKLE),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive"),
    (rb"\x7fELF", "a program (ELF)"),
    (rb"MZ[\x00-\xff]{0,60}\x00", "a program (Windows)"),
    (rb"[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe", "a program (Mach-O or Java)"),
    (rb"#!", "a script"),
    (rb"%PDF", "a PDF"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed archive"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "an array of numpy"),
    (
        rb"c(os|posix|nt|builtins|__builtin__|subprocess|sys|importlib|runpy)\n[\w.]+\n|\([dl]p\d*\n",
        _PICKLE,
    ),  # the oldest form
)
# Keys by which a configuration makes some library run what its author wrote.
_RUNS = {
    "auto_map": "names code for transformers to run",
    "custom_pipelines": "names code for transformers to run",
    "_target_": "names a function for hydra to call",
    "_component_": "names a function for torchtune to call",
    "model_file": "names code for mlx to run",
    "py/object": "names a class for jsonpickle to build",
    "py/reduce": "names a function for jsonpickle to call",
    "_attn_implementation_internal": "names code for transformers to fetch and run",
}
_UNSAFE_TEMPLATE = re.compile(r"__\w+__|\bos\s*\.\s*(system|popen)|\bsubprocess\b|\bimport\s+os\b")


def format_of(name: str) -> str:
    """Return what a file's name says it is, 'unknown' if nothing.

    >>> format_of("model.safetensors"), format_of("pytorch_model.bin")
    ('safetensors', 'pickle')
    """
    last = name.rpartition("/")[2]
    if last in _BARE:
        return "text"
    suffix = _suffix(last)
    bad = _BAD.get(suffix)
    if bad:
        return "pickle" if bad is _PICKLE else {_CODE: "code", _ARCHIVE: "archive"}.get(bad, suffix)
    return _SAFE.get(suffix, "unknown")


def _suffix(name: str) -> str:
    """The end of a file's name, as systems see it that drop dots and spaces behind it."""
    last = name.rpartition("/")[2].lower().rstrip(". ")
    return last.rpartition(".")[2] if "." in last else ""


def is_config(name: str) -> bool:
    """Is it a file in which keys may make some library run code? A vocabulary may hold any word."""
    last = name.rpartition("/")[2].casefold()
    return format_of(name) == "json" and bool(re.search("config|index|modules|provenance|template|processor", last))


def check_name(name: str) -> Iterator[Finding]:
    """Say what is wrong with a file by its name alone."""
    what = _BAD.get(_suffix(name))
    if what and _suffix(name) not in ("npy", "npz"):
        yield Finding(severity="bad", rule="format", message=f"is {what}; mmhub never opens it", file=name)
    if not name.isprintable():
        message = "has control characters in its name, or letters that hide others"
        yield Finding(severity="bad", rule="name", message=message, file=name)


def check_content(path: Path, name: str) -> Iterator[Finding]:
    """Say what is wrong with a file by its bytes: something else than its name says, or something in it that runs."""
    kind, size = format_of(name), path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
        file.seek(max(0, size - _TAIL))
        tail = file.read(_TAIL)
    if _suffix(name) in ("npy", "npz"):
        yield from _array(path, name)
        return
    hidden = _disguise(head, tail, kind)
    begins = _BEGINNINGS.get(_suffix(name), rb"")
    if hidden:
        yield Finding(severity="bad", rule="disguise", message=f"is, or holds, {hidden}", file=name)
    elif head.startswith(_POINTER) and begins:
        yield Finding(severity="warning", rule="format", message="is a pointer of Git LFS, not the file", file=name)
    elif not re.match(begins, head):
        message = f"does not begin as a .{_suffix(name)} file does, so it is something else"
        yield Finding(severity="bad", rule="disguise", message=message, file=name)
    elif kind == "safetensors":
        yield from _safetensors(path, name)
    elif kind in ("json", "template", "yaml"):
        if size > TEXT_BYTES:
            level: Severity = "bad" if size > _ABSURD or is_config(name) else "warning"
            yield Finding(severity=level, rule="size", message=f"has {size:,} bytes and was not read", file=name)
        else:
            yield from _text(path, name, kind)


def _disguise(head: bytes, tail: bytes, kind: str) -> str:
    """What the bytes are that the name does not say."""
    if kind == "safetensors":  # the length of its header begins it, which may be any number
        found = next((what for magic, what in _MAGIC[1:7] if re.match(magic, head)), "")
        found = found or (_PICKLE if re.match(rb"\x80[\x02-\x05](}|c|\x95|\x8a)", head) else "")
    elif kind in ("image", "audio", "data", "onnx", "tokenizer", "gguf"):
        found = next((what for magic, what in _MAGIC if re.match(magic, head)), "")
    elif kind in ("pickle", "code", "archive") or kind in _BAD:
        return ""  # its name is enough
    else:
        found = next((what for magic, what in _MAGIC if re.match(magic, head)), "")
        found = found or (
            "zero bytes, so it is no text" if kind != "unknown" and kind != "signature" and b"\0" in head else ""
        )
    if not found and b"%PDF-" in head and kind != "text":
        found = "a PDF"
    return found or ("a zip archive at its end" if _ends_as_zip(tail) and kind != "data" else "")


def _ends_as_zip(tail: bytes) -> bool:
    at = tail.rfind(b"PK\x05\x06")
    return at >= 0 and len(tail) >= at + 22 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail)


def _array(path: Path, name: str) -> Iterator[Finding]:
    """Arrays of objects are pickles."""
    try:
        with path.open("rb") as file:
            headers = [file.read(_ARRAY_HEADER)]
        count = 1
        if _suffix(name) == "npz":
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                count, headers = len(members), [_start(archive, one) for one in members[:_MEMBERS]]
        objects = any(map(_holds_objects, headers))
    except Exception:  # of zip files, of decompressing, and what numpy makes of a header
        yield Finding(severity="bad", rule="format", message="is no array, or none that can be read", file=name)
        return
    if objects:
        yield Finding(severity="bad", rule="format", message=f"holds objects: {_PICKLE}", file=name)
    elif count > _MEMBERS:
        message = f"has {count:,} arrays, of which {_MEMBERS} were looked into"
        yield Finding(severity="warning", rule="size", message=message, file=name)
    else:
        yield Finding(severity="note", rule="format", message="is an array, which mmhub never opens", file=name)


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as file:
        return file.read(_ARRAY_HEADER)


def _holds_objects(start: bytes) -> bool:
    """Does a header of numpy's, of which there are many spellings, say that Python objects follow?"""
    from numpy.lib import format as npy

    file = io.BytesIO(start)
    version = npy.read_magic(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return bool(read(file)[2].hasobject)  # of a third version only the letters of names are others


def _safetensors(path: Path, name: str) -> Iterator[Finding]:
    from safetensors import safe_open

    from mmhub.weights import check_header

    try:
        check_header(path)
        with safe_open(path, framework="np"):  # reads the offsets of all tensors
            return
    except TrustError as error:
        why = error.message.partition(": ")[2]
    except Exception as error:  # the library's own kind, and what its parser raises
        why = str(error).partition("\n")[0]
    yield Finding(severity="bad", rule="weights", message=f"is not sound: {why}", file=name)


def _text(path: Path, name: str, kind: str) -> Iterator[Finding]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    if kind == "template":
        yield from check_template(text, name)
    elif kind == "yaml":
        if re.search(r"!!python|!<tag:yaml\.org,2002:python", text):
            yield Finding(severity="bad", rule="code", message="asks YAML readers to call Python", file=name)
    else:
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            yield Finding(severity="bad", rule="json", message="is not JSON that can be read", file=name)
            return
        yield from check_keys(table, name)


def check_template(text: str, name: str) -> Iterator[Finding]:
    """A chat template is a small program, which mmhub and transformers run in a sandbox."""
    reaches = _UNSAFE_TEMPLATE.search(text)
    if reaches:
        message = f"is a chat template that reaches for Python's insides ({reaches[0]!r})"
        yield Finding(severity="bad", rule="template", message=message, file=name)
    else:
        yield Finding(severity="note", rule="template", message="is a chat template: it runs in a sandbox", file=name)


def check_keys(table: Any, name: str) -> Iterator[Finding]:
    """Find the keys of a configuration by which other libraries run code."""
    if not is_config(name):
        return
    seen = set()
    for key, value in _items(table):
        if key == "chat_template":
            for text in _templates(value):
                yield from check_template(text, name)
        runs = _RUNS.get(key) if value else None
        if key == "trust_remote_code" and value is True:
            runs = "asks for trust in code of its own"
        if key == "attn_implementation" and isinstance(value, str) and "/" in value:
            runs = "names code for transformers to fetch and run"
        if runs and key not in seen:
            seen.add(key)
            yield Finding(severity="bad", rule="code", message=f"{runs} ({key}); mmhub never does", file=name)
    for one in table if name.endswith("modules.json") and isinstance(table, list) else ():
        kind = one.get("type") if isinstance(one, Mapping) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            yield Finding(severity="bad", rule="code", message=f"names the class {kind!r} to import", file=name)


def _templates(value: Any) -> Iterator[str]:
    """One template, or several with their names, in either of two forms."""
    named = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for one in named:
        text = one.get("template") if isinstance(one, dict) else one
        if isinstance(text, str):
            yield text


def _items(table: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth."""
    todo = [table]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            yield from one.items()
            todo += one.values()
        elif isinstance(one, list):
            todo += one
