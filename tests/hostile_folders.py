"""Hostile checkpoint folders: a small sound one of each kind, and copies of it with one fault each.

`hostile_folders` makes them, `observe` runs a command on one and says what it did. Run as a script, this measures all:
python tests/hostile_folders.py --table benchmarks/results/hostile.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CANARY = "canary"  # a file in the base folder that no payload may write
SECRET = "secret.json"  # a file in the base folder that no checkpoint may read
SECONDS, MEGABYTES = 5.0, 500.0  # more than a sound folder takes, and no more
WAIT = 30.0  # seconds more by the clock, where the machine does other work
REFUSED = (5, 2)
Table = dict[str, Any]
_TEXT = "a good thing"


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder, and the command that must refuse it with one of `codes`."""

    path: Path
    command: tuple[str, ...] = ("predict", "{}", "--text", _TEXT, "--json")
    codes: tuple[int, ...] = REFUSED
    stdin: str = ""

    @property
    def arguments(self) -> list[str]:
        """The command with this folder in it."""
        return [str(self.path) if word == "{}" else word for word in self.command]


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (None where it was stopped), time, peak memory, and stderr.

    `busy` are the seconds it computed: on a machine that does other work beside, they say more than `seconds`.
    """

    code: int | None
    seconds: float
    busy: float
    megabytes: float
    stderr: str

    def problems(self, codes: Collection[int]) -> list[str]:
        """What of its answer is not as it must be, whatever it took."""
        lines = without_panic(self.stderr.splitlines())
        errors = [line for line in lines if line.startswith("error:")]
        found = [] if self.code in codes else [f"exit {self.code}"]
        found += [] if len(errors) == 1 else [f"{len(errors)} error lines"]
        found += ["a traceback"] if "Traceback" in self.stderr else []
        odd = [line for line in lines if not line.startswith(("error:", "hint:"))]
        found += [f"another line: {odd[0][:80]}"] if odd else []
        return found + (["something that is not printable"] if not _is_plain(self.stderr) else [])


def without_panic(lines: list[str]) -> list[str]:
    """Lines without what the tokenizers library says by itself where it panics, which Python cannot keep it from."""
    starts = [number for number, line in enumerate(lines) if line.startswith("thread '")]
    if not starts:
        return lines
    end = next(number for number, line in enumerate(lines) if number > starts[0] and line.startswith("note:"))
    return without_panic([*lines[: starts[0]], *lines[end + 1 :]])


def _is_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines())


# -- sound folders ----------------------------------------------------------------------------------------------


def sound_folders(base: Path) -> dict[str, Folder]:
    """Make a sound folder of each kind in `base`: what the faults are put into."""
    from mmhub import compose
    from mmhub.hub.foreign import write_layout

    texts = ["a good thing", "a bad thing"]
    head = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    bert = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoders: dict[str, Table] = {
        "lstm": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}},
        "transformer": {"use": "transformer", "config": {"dim": 8, "heads": 2, "depth": 1}},
        "bert": {"use": "transformers", "config": bert | {"intermediate_size": 16, "max_position_embeddings": 64}},
    }
    models = {name: compose(encoders={"text": one}, decoder=head, texts=texts) for name, one in encoders.items()}
    for name, model in models.items():
        model.save(base / name)
    writer = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "max_length": 64}}
    tokenizer = {"kind": "byte", "chat_template": "plain"}
    compose("chat", decoder=writer, tokenizer=tokenizer, texts=["hello"]).save(base / "chat")
    encoder: Any = models["bert"].encoders["text"]
    settings = {"labels": ["no", "yes"]} | {"config": encoder.config.config}
    head = {"use": "transformers-classification", "config": settings}
    write_layout(compose(encoders={"text": encoders["bert"]}, decoder=head, texts=texts), base / "layout")
    found = {name: Folder(base / name) for name in encoders} | {"layout": Folder(base / "layout")}
    return found | {"chat": Folder(base / "chat", _CHAT, stdin="hello\n")}


_CHAT = ("chat", "{}", "--max-new-tokens", "2", "--json")


# -- changing them ----------------------------------------------------------------------------------------------


class _Payload:
    """What a pickle that is opened would do."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def payload(folder: Path) -> bytes:
    """A pickle that makes a folder beside `folder` when it is opened."""
    return pickle.dumps(_Payload(folder.parent / CANARY))


def change(folder: Path, how: Callable[[Table], Any], file: str = "config.json") -> None:
    """Change a JSON file, and let config.json say the right hashes of all files."""
    table = json.loads((folder / file).read_text("utf-8"))
    how(table)
    (folder / file).write_text(json.dumps(table), "utf-8")
    if file != "config.json":
        rehash(folder)


def rehash(folder: Path) -> None:
    """Make an mmhub checkpoint's config.json agree with the files, as somebody would who crafts one."""
    path = folder / "config.json"
    table = json.loads(path.read_text("utf-8"))
    if "mmhub_format" in table:
        table["files"] = {name: _record(folder / name) for name in table["files"]}
        path.write_text(json.dumps(table), "utf-8")


def _record(path: Path) -> Table:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _file(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """A fault: a file with other content, whose hash is right."""

    def fault(folder: Path) -> None:
        (folder / name).write_bytes(content(folder))
        if name != "config.json":
            rehash(folder)

    return fault


def write_code(folder: Path, name: str) -> None:
    """Write a Python module that makes a folder beside `folder` when it is imported."""
    (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(folder.parent / CANARY)!r})\n", "utf-8")


def _code(name: str, how: Callable[[Path], None]) -> Callable[[Path], None]:
    """A fault, and the module that it asks for."""

    def fault(folder: Path) -> None:
        write_code(folder, name)
        how(folder)

    return fault


def _config(how: Callable[[Table], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder, how)


def _text(old: str, new: str, file: str = "config.json") -> Callable[[Path], None]:
    """A fault: a part of a JSON file written otherwise, such as no dump of Python's would."""

    def fault(folder: Path) -> None:
        text = (folder / file).read_text("utf-8")
        assert old in text, old
        (folder / file).write_text(text.replace(old, new, 1), "utf-8", "surrogatepass")
        if file != "config.json":
            rehash(folder)

    return fault


def _part(role: str, **changes: Any) -> Callable[[Path], None]:
    """A fault: other settings of one component."""
    return _config(lambda table: table["components"][role]["config"].update(changes))


def _header(how: Callable[[Table, bytes], tuple[Table, bytes] | None]) -> Callable[[Path], None]:
    """A fault: another header of model.safetensors, and perhaps other bytes behind it."""

    def fault(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        table, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
        table, rest = how(table, rest) or (table, rest)
        _write_safetensors(path, json.dumps(table).encode(), rest)
        rehash(folder)

    return fault


def _write_safetensors(path: Path, header: bytes, rest: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + rest)


def _first(table: Table) -> Table:
    entry: Table = next(entry for name, entry in sorted(table.items()) if name != "__metadata__")
    return entry


def _named(name: str) -> Callable[[Table, bytes], None]:
    """Another name for the first tensor."""

    def how(table: Table, _: bytes) -> None:
        first = next(one for one in sorted(table) if one != "__metadata__")
        table[name] = table.pop(first)

    return how


def _set(**changes: Any) -> Callable[[Table, bytes], None]:
    return lambda table, _: _first(table).update(changes)


def _twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size].rstrip(), content[8 + size :]
    name = next(one for one in json.loads(header) if one != "__metadata__")
    again = json.dumps({name: json.loads(header)[name]})[1:].encode()
    _write_safetensors(path, header[:-1] + b"," + again, rest)
    rehash(folder)


def _many_tensors(folder: Path) -> None:
    row = '"d.t{}":{{"dtype":"F32","shape":[0]}}'
    _write_safetensors(folder / "model.safetensors", ("{" + ",".join(map(row.format, range(200_000))) + "}").encode())
    rehash(folder)


def _empty_tensors(folder: Path) -> None:
    """As many as a header may hold, so that each of them is looked at."""
    row = '"decoder.t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    _write_safetensors(folder / "model.safetensors", ("{" + ",".join(map(row.format, range(99_000))) + "}").encode())
    rehash(folder)


def _numbers(value: float) -> Callable[[Path], None]:
    """A fault: one weight is not a number."""

    def fault(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-4:] = struct.pack("<f", value)
        path.write_bytes(content)
        rehash(folder)

    return fault


def _sparse(name: str, size: int, start: bytes = b"") -> Callable[[Path], None]:
    """A fault: a file of `size` bytes, of which next to none is on the disk."""

    def fault(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
        if name != "config.json":
            rehash(folder)

    return fault


def _link(name: str, target: Callable[[Path], str], *, listed: bool = True) -> Callable[[Path], None]:
    """A fault: a link in the place of a file."""

    def fault(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target(folder))
        if listed:
            rehash(folder)

    return fault


def _pipe(name: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return fault


def _folder_as(name: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return fault


def _listed(name: str, **record: Any) -> Callable[[Path], None]:
    """A fault: a file in config.json that no checkpoint may have."""
    return _config(lambda table: table["files"].update({name: {"sha256": "0" * 64, "bytes": 2} | record}))


def _weights(name: str, *, listed: bool = True) -> Callable[[Path], None]:
    """A fault: a component with its weights elsewhere."""

    def how(table: Table) -> None:
        table["components"]["decoder"]["weights"] = name
        if listed:
            table["files"][name] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}

    return _config(how)


def _processor_file(key: str, name: str) -> Callable[[Path], None]:
    def how(table: Table) -> None:
        table["components"]["text_encoder"]["processor"]["files"] = {key: name}

    return _config(how)


def _index(how: Callable[[Table], Any]) -> Callable[[Path], None]:
    """A fault: weights that are found through an index, changed by `how`."""

    def fault(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        names = [name for name in json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]) if "__" not in name]
        (folder / "model.safetensors").rename(folder / "model-decoder.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-decoder.safetensors")}
        how(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

        def point(table: Table) -> None:
            del table["files"]["model.safetensors"]
            table["files"] |= dict.fromkeys(("model-decoder.safetensors", "model.safetensors.index.json"))
            for part in table["components"].values():
                part["weights"] = part["weights"] and "model.safetensors.index.json"

        change(folder, point)
        rehash(folder)

    return fault


def _adapter(folder: Path, base: Table) -> None:
    record = {"rank": 2, "alpha": 2.0, "targets": ["query"], "base": base, "weights": "adapter_model.safetensors"}
    _write_safetensors(folder / "adapter_model.safetensors", b"{}")

    def how(table: Table) -> None:
        table["files"]["adapter_model.safetensors"] = _record(folder / "adapter_model.safetensors")
        table["components"]["text_encoder"] |= {"adapter": record, "weights": ""}

    change(folder, how)


def _cycle(folder: Path) -> None:
    """Adapters that are each other's base; their hashes cannot be right, which must be found first."""
    other = folder.with_name(f"{folder.name}-base")
    shutil.copytree(folder, other)
    _adapter(folder, {"name": str(other), "sha256": "0" * 64})
    _adapter(other, {"name": str(folder), "sha256": "0" * 64})


def _vocabulary(how: Callable[[Table], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder, how, "tokenizer.json")


def _gzip(folder: Path) -> bytes:
    import gzip

    return gzip.compress(bytes(50_000_000))


def _zip(folder: Path) -> bytes:
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    content = path.read_bytes()
    path.unlink()
    return content


def _in_zip(folder: Path) -> bytes:
    """The same as torch.save would write it."""
    path = folder / "saved.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload(folder))
    content = path.read_bytes()
    path.unlink()
    return content


def _quantized(folder: Path) -> None:
    """Codes of 8 bits whose scales are infinite."""

    def how(table: Table, rest: bytes) -> tuple[Table, bytes]:
        end = len(rest)
        name = next(one for one, entry in table.items() if "__" not in one and len(entry["shape"]) == 2)
        rows, columns = table[name]["shape"]
        table["decoder.extra"] = {"dtype": "I8", "shape": [rows, columns], "data_offsets": [end, end + rows * columns]}
        end, rest = end + rows * columns, rest + bytes(rows * columns)
        scale = {"dtype": "F32", "shape": [rows, 1], "data_offsets": [end, end + 4 * rows]}
        table["decoder.extra:scale"] = scale
        return table, rest + struct.pack("<f", float("inf")) * rows

    _header(how)(folder)
    change(folder, lambda table: table.update(mmhub_format=2, quantized="int8"))


def _guard(pattern: str) -> Callable[[Path], None]:
    guard = {"use": "mmhub-guards/pattern", "schema": 1, "config": {"patterns": {"a": pattern}}}
    return _config(lambda table: table.update(mmhub_format=3, guards=[guard]))


def _template(text: str) -> Callable[[Path], None]:
    return _file("chat_template.jinja", lambda _: text.encode())


def _only(*names: str) -> Callable[[Path], None]:
    """A fault: weights in a format that runs code when it is read, and in no other."""

    def fault(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(_in_zip(folder) if name.endswith((".pt", ".ckpt")) else payload(folder))

    return fault


def _layout(**changes: Any) -> Callable[[Path], None]:
    return _config(lambda table: table.update(changes))


def _layout_index(file: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": file}}))
        (folder.parent / "outside.safetensors").write_bytes((folder.parent / "layout/model.safetensors").read_bytes())

    return fault


_DEEP = "[" * 100_000
_ODD = "\u202emodel\u202c.safetensors"
_REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}

_PIECES = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
_DOUBLED = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
# Tokenizers that make so much of a short text that it fills all memory.
GROWING: dict[str, Table] = {
    "a tokenizer that doubles a text": {"normalizer": {"type": "Sequence", "normalizers": [_DOUBLED] * 31}},
    "a tokenizer that writes before a text": {"normalizer": {"type": "Prepend", "prepend": "a" * 20_000_000}},
    "a tokenizer that repeats a text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _PIECES[:1] * 300_000,
            "pair": _PIECES,
            "special_tokens": {},
        }
    },
}
# Templates of which one call, or one comparison, would take all time or memory.
TEMPLATES = {
    "a template that writes a nested list": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 40 + "{{ a | string }}",
    "a template that compares nested lists": (
        "{% set a = [1] %}{% set c = [1] %}" + "{% set a = [a, a] %}{% set c = [c, c] %}" * 40 + "{{ a == c }}"
    ),
    "a template that writes a list of lists": "{% set a = ['a'] * 4000000 %}{% set b = [a] * 40 %}{{ b }}",
    "a template that writes lists as JSON": "{% set a = ['a'] * 4000000 %}{% set b = [a] * 40 %}{{ b | tojson }}",
    "a template that translates a text": "{{ ('a' * 4000).translate({97: 'b' * 4000000}) }}",
    "a template that adds up lists": "{% set a = [1] * 4000000 %}{{ ([a] * 100) | sum(start=[]) }}",
    "a template that fills in texts": "{{ ('%s' * 400000) | format(*(['a' * 4000] * 400000)) }}",
    "a template that wraps a text": "{{ ('a ' * 2000000) | wordwrap(1) }}",
    "a template that writes capitals": "{% for i in range(90000) %}{{ ('a' * 4000000) | upper | length }}{% endfor %}",
}

FAULTS: dict[str, dict[str, Callable[[Path], None]]] = {
    "lstm": {
        # code
        "a pickle as the weights": _file("model.safetensors", payload),
        "a pickle as the tokenizer": _file("tokenizer.json", payload),
        "a pickle as config.json": _file("config.json", payload),
        "a torch file as the weights": _file("model.safetensors", _in_zip),
        "weights in a pickle": _weights("pytorch_model.bin"),
        "weights in a torch file": _weights("model.pt"),
        "weights in a checkpoint of Lightning": _weights("last.ckpt"),
        "weights in numpy's archive": _weights("model.npz"),
        "weights in hdf5": _weights("model.h5"),
        "weights in a distributed checkpoint": _weights(".metadata"),
        "a listed Python file": _code("mmhub_evil", _listed("mmhub_evil.py")),
        "auto_map in config.json": _code(
            "e", _config(lambda t: (t.pop("mmhub_format"), t.update(auto_map={"AutoModel": "e.E"})))
        ),
        "a dotted path in use": _config(lambda t: t["components"]["decoder"].update(use="os.system")),
        "a factory in use": _config(lambda t: t["components"]["decoder"].update(use="mmhub-heads/os:system")),
        "_target_ in a configuration": _part("decoder", _target_="os.system"),
        "trust_remote_code in a configuration": _part("decoder", trust_remote_code=True),
        # safetensors
        "a huge length of the header": _file("model.safetensors", lambda _: struct.pack("<Q", 2**63) + b"{}"),
        "a header above the limit": _sparse("model.safetensors", 120_000_000, struct.pack("<Q", 110_000_000)),
        "an empty file of weights": _file("model.safetensors", lambda _: b""),
        "truncated weights": _file("model.safetensors", lambda f: (f / "model.safetensors").read_bytes()[:-9]),
        "trailing bytes": _file("model.safetensors", lambda f: (f / "model.safetensors").read_bytes() + b"PK"),
        "overlapping tensors": _header(lambda t, _: _first(t).update(data_offsets=[0, 8], shape=[2])),
        "a hole between tensors": _header(lambda t, rest: (t, rest + bytes(64))),
        "a negative size": _header(_set(shape=[-1])),
        "a product of sizes that overflows": _header(_set(shape=[2**33, 2**33])),
        "a size that is no number": _header(lambda t, _: _first(t).update(shape=["NaN"])),
        "sizes without offsets": _header(lambda t, _: _first(t).pop("data_offsets") and None),
        "another type than the bytes": _header(_set(dtype="F64")),
        "an unknown type": _header(_set(dtype="PICKLE")),
        "a type that is a table": _header(_set(dtype={"a": 1})),
        "a tensor twice": _twice,
        "200,000 tensors": _many_tensors,
        "99,000 empty tensors": _empty_tensors,
        "100,000 dimensions": _header(_set(shape=[1] * 100_000)),
        "a header nested 100,000 times": _file(
            "model.safetensors", lambda _: struct.pack("<Q", 100_000) + _DEEP.encode()
        ),
        "NUL in a tensor's name": _header(_named("decoder.\0x")),
        "ANSI in a tensor's name": _header(_named("decoder.\x1b[2J\x1b[31mx")),
        "a path as a tensor's name": _header(_named("../../etc/passwd")),
        "a weight that is NaN": _numbers(float("nan")),
        "a weight that is infinite": _numbers(float("inf")),
        "scales that are infinite": _quantized,
        # names
        "weights above the folder": _weights("../secret.json"),
        "weights at an absolute path": _weights("/etc/passwd"),
        "weights on another machine": _weights("\\\\server\\share\\x.safetensors"),
        "weights on another drive": _weights("C:\\x.safetensors"),
        "weights with a turned name": _weights(_ODD),
        "weights that are not listed": _weights("model-other.safetensors", listed=False),
        "a listed file above the folder": _listed("../secret.json"),
        "a listed absolute path": _listed("/etc/passwd"),
        "a listed name with NUL": _listed("model\0.safetensors"),
        "a listed name with a homoglyph": _listed("m\u043edel.safetensors"),
        "half a character in a name": _text('"task"', '"\\ud800": 1, "task"'),
        "half a character as a listed name": _text(
            '"files": {\n    "m', '"files": {"\\ud800": {"sha256": "0", "bytes": 1}, "m'
        ),
        "a tokenizer above the folder": _processor_file("tokenizer.json", "../secret.json"),
        "a tokenizer at an absolute path": _processor_file("tokenizer.json", "/etc/passwd"),
        "weights as the tokenizer": _processor_file("tokenizer.json", "model.safetensors"),
        "an index that leaves the folder": _index(lambda t: t["weight_map"].update({"decoder.x": "../secret.json"})),
        "an index of a pickle": _index(lambda t: t["weight_map"].update({"decoder.x": "pytorch_model.bin"})),
        "an index of itself": _index(lambda t: t["weight_map"].update({"decoder.x": "model.safetensors.index.json"})),
        "an index whose files are tables": _index(lambda t: t["weight_map"].update({"decoder.x": {"a": 1}})),
        "an index that is a list": _index(lambda t: t.update(weight_map=[1, 2])),
        # links and what is no file
        "a link to a system file as the tokenizer": _link("tokenizer.json", lambda _: "/etc/passwd"),
        "a link out of the folder": _link("tokenizer.json", lambda f: str(f.parent / SECRET)),
        "a link to itself": _link("model.safetensors", lambda _: "model.safetensors", listed=False),
        "a link to itself as config.json": _link("config.json", lambda _: "config.json", listed=False),
        "a link to a device": _link("model.safetensors", lambda _: "/dev/zero", listed=False),
        "a link to a device as config.json": _link("config.json", lambda _: "/dev/zero", listed=False),
        "a pipe as the weights": _pipe("model.safetensors"),
        "a pipe as the tokenizer": _pipe("tokenizer.json"),
        "a pipe as config.json": _pipe("config.json"),
        "a folder as the weights": _folder_as("model.safetensors"),
        "a folder as config.json": _folder_as("config.json"),
        # sizes
        "zeros compressed, as the tokenizer": _file("tokenizer.json", _gzip),
        "zeros in an archive, as the weights": _file("model.safetensors", _zip),
        "a config.json of 300 MB": _sparse("config.json", 300_000_000, b'{"mmhub_format": 1, "task": "'),
        "a config.json of a terabyte": _sparse("config.json", 10**12, b"{"),
        "a tokenizer of 300 MB": _sparse("tokenizer.json", 300_000_000, b'{"version": "1.0", '),
        "nesting of 100,000 levels": _file("config.json", lambda _: _DEEP.encode()),
        "nesting inside of a configuration": _text('"config": {}', '"config": {"a": ' + _DEEP + "]" * 100_000 + "}"),
        "a number of 100,000 digits": _text('"schema": 1', f'"schema": 1{"0" * 100_000}'),
        "a number that is infinite": _text('"dropout": 0.1', '"dropout": 1e999'),
        "NaN in a configuration": _text('"dropout": 0.1', '"dropout": NaN'),
        "3,000,000 layers": _part("text_encoder", depth=3_000_000),
        "a million million features": _part("text_encoder", dim=2**40),
        "more features than memory": _part("text_encoder", dim=2**31, embedding_dim=2**31),
        "a guard whose pattern repeats a hundred million times": _guard("(?:(?:(?:a?){500}){500}){500}"),
        "a guard whose pattern nests too deeply": _guard("(" * 2000 + "a" + ")" * 2000),
        "a million million words": _config(
            lambda t: (
                t["components"]["text_encoder"]["config"].update(vocab_size=2**40),
                t["components"]["text_encoder"]["processor"]["state"].update(vocab_size=2**40),
            )
        ),
        "more words than memory": _config(
            lambda t: (
                t["components"]["text_encoder"]["config"].update(vocab_size=2**31),
                t["components"]["text_encoder"]["processor"]["state"].update(vocab_size=2**31),
            )
        ),
        "a negative number of layers": _part("text_encoder", depth=-1),
        "a million labels": _part("decoder", labels=[f"label {i}" for i in range(1_000_000)]),
        "a million components": _config(
            lambda t: t["components"].update({f"e{i}_encoder": {"use": "mmhub/x"} for i in range(300_000)})
        ),
        "a million requirements": _config(
            lambda t: t.update(requires=[{"distribution": f"x{i}", "specifier": ">=1"} for i in range(300_000)])
        ),
        "a tokenizer with 1,000,000 merges": _vocabulary(
            lambda t: t.update(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]] * 1_000_000})
        ),
        "a tokenizer whose pattern runs away": _vocabulary(lambda t: t.update(pre_tokenizer=_REGEX)),
        **{name: _vocabulary(lambda t, parts=parts: t.update(parts)) for name, parts in GROWING.items()},
        "a tokenizer with more words than it says": _vocabulary(
            lambda t: t["model"].update(vocab=t["model"]["vocab"] | {f"w{i}": 2**31 + i for i in range(9)})
        ),
        # lies
        "a wrong hash": _listed("tokenizer.json", sha256="0" * 64, bytes=2110),
        "a hash in capitals": _config(
            lambda t: [r.update(sha256=r["sha256"].upper()) for r in t["files"].values()] and None
        ),
        "a wrong size": _config(lambda t: t["files"]["tokenizer.json"].update(bytes=10**15)),
        "a negative size of a file": _config(lambda t: t["files"]["tokenizer.json"].update(bytes=-1)),
        "a tie to nothing": _config(lambda t: t.update(tied={"decoder.x": "decoder.y"})),
        "a tie to itself": _config(lambda t: t.update(tied={"decoder.x": "decoder.x"})),
        "ties in a circle": _config(lambda t: t.update(tied={"decoder.x": "decoder.y", "decoder.y": "decoder.x"})),
        "a tie to no component": _config(lambda t: t.update(tied={"a": "../../x"})),
        "an unknown component": _config(lambda t: t["components"]["decoder"].update(use="mmhub-heads/nothing")),
        "a component of another kind": _config(lambda t: t["components"]["decoder"].update(use="mmhub-text/lstm")),
        "an unknown key": _part("decoder", labls=["a"]),
        "a requirement with a path": _config(
            lambda t: t.update(requires=[{"distribution": "x @ file:///tmp", "specifier": "; evil"}])
        ),
        "a requirement with ANSI": _config(
            lambda t: t.update(requires=[{"distribution": "\x1b[2Jx", "specifier": ">=1"}])
        ),
        "a task with ANSI": _config(lambda t: t.update(task="\x1b[2Jclassification")),
        "a use with ANSI": _config(lambda t: t["components"]["decoder"].update(use="\x1b[2J")),
        "a key with ANSI": _part("decoder", **{"\x1b[2Jx": 1}),
        "a key twice": _text('"tied"', '"task": "regression", "tied"'),
        "a byte order mark": _file("config.json", lambda f: b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "UTF-16": _file("config.json", lambda f: (f / "config.json").read_text().encode("utf-16")),
        "no components": _config(lambda t: t.update(components={})),
        "components that are a list": _config(lambda t: t.update(components=[1])),
        "a state of another form": _config(
            lambda t: t["components"]["text_encoder"]["processor"].update(state={"pad_id": {"a": []}})
        ),
        "a negative padding id": _config(
            lambda t: t["components"]["text_encoder"]["processor"]["state"].update(pad_id=-(2**63), empty_id=2**70)
        ),
    },
    "transformer": {
        "3,000,000 blocks": _part("text_encoder", depth=3_000_000),
    },
    "bert": {
        "an adapter for itself": lambda f: _adapter(f, {"name": str(f), "sha256": "0" * 64}),
        "adapters in a circle": _cycle,
        "an adapter for a path": lambda f: _adapter(f, {"name": "/etc/passwd", "sha256": "0" * 64}),
        "an adapter for a branch": lambda f: _adapter(f, {"name": "org/base", "commit": "main"}),
        "3,000,000 layers of BERT": _config(
            lambda t: t["components"]["text_encoder"]["config"]["config"].update(num_hidden_layers=3_000_000)
        ),
        "positions of BERT for all memory": _config(
            lambda t: t["components"]["text_encoder"]["config"]["config"].update(max_position_embeddings=2**28)
        ),
        "layers of BERT that are a text": _config(
            lambda t: t["components"]["text_encoder"]["config"]["config"].update(num_hidden_layers="3")
        ),
    },
    "layout": {
        "weights of a library in a pickle": _only("pytorch_model.bin"),
        "weights of a library in many formats": _only("model.pt", "last.ckpt", "tf_model.h5", ".metadata", "w.npz"),
        "a library's pickle as the weights": _file("model.safetensors", payload),
        "a library's pickle as the tokenizer": _file("tokenizer.json", payload),
        "a library's index that leaves the folder": _layout_index("../outside.safetensors"),
        "a library's index at an absolute path": _layout_index("/etc/passwd.safetensors"),
        "a library's index of a pickle": _layout_index("pytorch_model.bin"),
        "a model with code of its own": _code("evil", _layout(auto_map={"AutoModel": "evil.Model"})),
        "a model type with code of its own": _code(
            "evil", _layout(model_type="evil", auto_map={"AutoConfig": "evil.Config"})
        ),
        "a library's 3,000,000 layers": _layout(num_hidden_layers=3_000_000),
        "a library's million million words": _layout(vocab_size=2**40),
        "a library's million million features": _layout(hidden_size=2**40),
        "a library's width that is a text": _layout(hidden_size="8; import os"),
        "a library's config.json of 300 MB": _sparse("config.json", 300_000_000, b'{"model_type": "bert"'),
        "a library's missing tensors": _header(lambda t, _: t.pop(sorted(t)[1]) and None),
        "a library's pipe as the tokenizer": _pipe("tokenizer.json"),
        "a library's pipe as the weights": _pipe("model.safetensors"),
        "a library's NaN": _text('"layer_norm_eps": 1e-12', '"layer_norm_eps": NaN'),
    },
    "chat": {
        "a template with nested loops": _template(
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
            "{% endfor %}"
        ),
        "a template with a large product": _template("{{ ('a' * 1000000) * 100000 }}"),
        "a template that joins a large text": _template("{% set x = 'a' * 4000000 %}{{ x ~ x ~ x ~ x ~ x ~ x }}"),
        "a template that pads a text": _template("{{ 'a'.ljust(100000000000) }}"),
        "a template that formats a text": _template("{{ '%0999999999d' % 1 }}"),
        "a template that formats a text by its method": _template("{{ '{:{}}'.format('a', 999999999) }}"),
        "a template that doubles a text": _template(
            "{% set n = namespace(x='aaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
        ),
        "a template that adds to a text": _template(
            "{% set n = namespace(x='aaaa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}"
        ),
        "a template that replaces in a text": _template("{{ ('a' * 4000000) | replace('a', 'b' * 1000) | length }}"),
        "a template that fills a row": _template("{{ [1] | batch(2000000000, 'x') | list | length }}"),
        "a template that calls itself twice": _template(
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
        ),
        "a template that calls itself": _template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        "a template that looks for Python": _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "a template nested 10,000 times": _template("{% if 1 %}" * 10_000 + "{% endif %}" * 10_000),
        **{name: _template(text) for name, text in TEMPLATES.items()},
        "a template that includes a file": _template("{% include '/etc/passwd' %}"),
    },
}


def hostile_folders(base: Path, only: Iterable[str] | None = None) -> dict[str, Folder]:
    """Make all hostile folders in `base`, or those named, beside the sound ones that they are copies of."""
    sound = sound_folders(base)
    (base / SECRET).write_text("{}")
    found: dict[str, Folder] = {}
    wanted = None if only is None else set(only)
    for kind, faults in FAULTS.items():
        for name, fault in faults.items():
            if wanted is None or name in wanted:
                path = base / f"{len(found):03}"
                shutil.copytree(sound[kind].path, path)
                fault(path)
                command = tuple(TEXTS.get(name, word) if word == _TEXT else word for word in sound[kind].command)
                found[name] = Folder(path, command, CODES.get(name, REFUSED), sound[kind].stdin)
    return found


# Where another exit code is plainly right: a plugin that is missing, a file that is not there.
CODES = {"an unknown component": (4,), "a component of another kind": (4,)}
# What a fault needs to be met.
TEXTS = {"a tokenizer whose pattern runs away": "a" * 60 + "b"}


# -- what a command does with one -------------------------------------------------------------------------------

# The network is out of reach, no program is started (but for that which tells Python where the system's libraries are,
# and that in which strangers' templates run), no pickle asks for a function, and nothing is written but in the cache,
# where temporary files are, too: each would be said and end it.
WATCH = """
import os, sys
CACHE = os.path.realpath(os.path.dirname(sys.argv[1]))
NEVER = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty",
         "os.posix_spawn", "os.spawn", "pty.spawn", "pickle.find_class"}
WRITES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
          "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1}
APART = [sys.executable, "-s", "-c", "from mmhub.interfaces.decoding import main; main()"]
def elsewhere(path, folder):
    if isinstance(path, int):  # opened before
        return False
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    place = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    return place != "/dev/null" and not (place + os.sep).startswith(CACHE + os.sep)
def forbidden(event, args):
    if event == "subprocess.Popen":
        return args[0] != "/sbin/ldconfig" and args[1] != APART
    if event == "open":
        writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return writes and elsewhere(args[0], -1)
    if event in WRITES:
        count = WRITES[event]
        paths = args[1:2] if event == "os.symlink" else args[:count]
        folders = args[-len(paths):] if event not in ("os.truncate", "os.setxattr") else [-1]
        return any(map(elsewhere, paths, folders))
    return event in NEVER
def watch(event, args):
    if forbidden(event, args):
        os.write(2, f"FORBIDDEN {event} {args!r}\\n".encode())
        os._exit(99)
sys.addaudithook(watch)
"""
_WATCHED = """
import sys
import mmhub.cli.main
exec(WATCH)
try:
    mmhub.cli.main.main(sys.argv[2:])
finally:  # what the system tells the parent counts what the parent had when it made this process
    with open("/proc/self/status") as status, open(sys.argv[1], "w") as peak:
        peak.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def observe(arguments: Iterable[str], *, cwd: Path, cache: Path, stdin: str = "", limit: float = 120.0) -> Outcome:
    """Run `mmhub ARGUMENTS` in a process of its own, off line, and say what it did and took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MMHUB_", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "MMHUB_CACHE": str(cache), "HF_HOME": str(cache / "hf")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "MMHUB_CONFIG": str(cache / "own"),
        "TMPDIR": str(cache / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "tmp" / "torch"),
    }
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as given:
        given.write(stdin.encode())
        given.seek(0)
        (cache / "tmp").mkdir(parents=True, exist_ok=True)
        peak = cache / "peak"
        peak.unlink(missing_ok=True)
        command = [sys.executable, "-c", _WATCHED.replace("exec(WATCH)", WATCH), str(peak), *arguments]
        begun = time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=given, stdout=subprocess.DEVNULL, stderr=errors
        )
        stopped = threading.Timer(limit, os.kill, (process.pid, signal.SIGKILL))
        stopped.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        stopped.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        text = errors.read(100_000).decode("utf-8", "replace")
    code = None if process.returncode < 0 else process.returncode
    megabytes = (int(peak.read_text()) if peak.is_file() else usage.ru_maxrss) / 1024
    return Outcome(code, seconds, usage.ru_utime + usage.ru_stime, megabytes, text.strip("\n"))


def snapshot(base: Path) -> dict[str, tuple[int, ...]]:
    """What lies in and below a folder: kind, size and time of writing of each entry, by path."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.rglob("*")):
        status = path.lstat()
        size = 0 if path.is_dir() else status.st_size
        found[str(path.relative_to(base))] = (status.st_mode, size, 0 if path.is_dir() else status.st_mtime_ns)
    return found


# -- the table --------------------------------------------------------------------------------------------------


def measure(base: Path, only: Iterable[str] | None = None) -> tuple[list[list[str]], int]:
    """Run the command of every folder; return a row for each, and how many were not refused as they must be."""
    cache = Path(tempfile.mkdtemp(prefix="mmhub-hostile-cache-"))
    rows, bad = [], 0
    try:
        folders = hostile_folders(base, only)
        sound = [least(folder, cache) for folder in sound_of(base).values()]
        seconds, megabytes = max(one.seconds for one in sound), max(one.megabytes for one in sound)
        rows.append(["(sound, the slowest)", "0", f"{seconds:.1f}", f"{megabytes:.0f}", ""])
        before = snapshot(base)
        for name, folder in folders.items():
            one = observe(folder.arguments, cwd=base, cache=cache, stdin=folder.stdin)
            wrong = one.problems(folder.codes)
            wrong += [f"{one.seconds - seconds:.1f} s more"] if one.seconds > seconds + SECONDS else []
            wrong += [f"{one.megabytes - megabytes:.0f} MB more"] if one.megabytes > megabytes + MEGABYTES else []
            wrong += ["files changed"] if snapshot(base) != before else []
            bad += bool(wrong)
            line = next((line for line in one.stderr.splitlines() if line.startswith("error:")), one.stderr[-80:])
            said = line.replace(str(folder.path), "FOLDER").replace(str(base), "BASE").replace("|", "\\|")
            mark = f"**{'; '.join(wrong)}** " if wrong else ""
            rows.append([name, str(one.code), f"{one.seconds:.1f}", f"{one.megabytes:.0f}", mark + said[:160]])
            print(*rows[-1], sep=" | ", flush=True)
    finally:
        shutil.rmtree(cache)
    return rows, bad


def sound_of(base: Path) -> dict[str, Folder]:
    """The sound folders that `hostile_folders` left in `base`."""
    commands = {"chat": Folder(base / "chat", _CHAT, stdin="hello\n")}
    return {kind: commands.get(kind, Folder(base / kind)) for kind in FAULTS}


def least(folder: Folder, cache: Path) -> Outcome:
    """What a sound folder takes once everything was read before."""
    runs = [observe(folder.arguments, cwd=folder.path.parent, cache=cache, stdin=folder.stdin) for _ in range(2)]
    if any(one.code for one in runs):
        raise SystemExit(f"'{folder.path}' is sound and was refused:\n{runs[0].stderr}")
    return min(runs, key=lambda one: one.seconds)


def write_table(rows: list[list[str]], bad: int, path: Path) -> None:
    """Write the results as the benchmarks do."""
    import platform

    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        "# Hostile checkpoint folders",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}; commit: {commit.strip()}",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- machine: {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        "- work: one `mmhub` process for each folder, off line, start of Python included; peak memory of the process",
        f"- allowed beyond a sound folder: {SECONDS:.0f} s, {MEGABYTES:.0f} MB",
        f"- {len(rows) - 1} folders, {bad} not refused with one line, within that, and without a trace",
        "",
        "| folder | exit | seconds | MB | what it says |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Load every hostile folder, and say what happened.")
    parser.add_argument("--table", type=Path, help="where to write the results")
    parser.add_argument("--only", action="append", help="a fault by its name, as often as wanted")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmhub-hostile-") as base:
        rows, bad = measure(Path(base), wanted.only)
    if wanted.table:
        write_table(rows, bad, wanted.table)
    print(f"{len(rows) - 1} folders, {bad} not refused as they must be")
    return bad > 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
