"""What reads strangers' bytes, each as one function of bytes: it may return, or raise an `MmhubError`; nothing else.

A target is a function that prepares what it needs and returns the one that reads. `tests.fuzz.run` feeds them.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError

Reader = Callable[[bytes], Any]


def allowed(read: Reader, content: bytes) -> None:
    """Let a target read, and its own refusals pass."""
    with suppress(MmhubError):
        read(content)


@functools.cache
def _place() -> Path:
    """A folder for files that are read from the disk, in memory where there is such a disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="mmhub-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, read: Callable[[Path], Any]) -> Reader:
    """A target that reads a file of its own folder."""
    folder = Path(tempfile.mkdtemp(dir=_place()))

    def target(content: bytes) -> None:
        (folder / name).write_bytes(content)
        read(folder / name)

    return target


@functools.cache
def model_folder() -> Path:
    """A small sound checkpoint."""
    from mmhub import compose

    model = compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        texts=["a good thing"],
    )
    return model.save(_place() / "model")


def config() -> Reader:
    """config.json, and the model it asks for, without weights."""
    from mmhub.checkpoint import _build_model, _checked_amount, parse_config, stored_weights
    from mmhub.weights import meta_parameters

    folder = model_folder()

    def target(content: bytes) -> None:
        found = parse_config(content, "config.json")
        limit = _checked_amount(stored_weights(folder, found), found, found.components).modules
        _build_model(found, folder, functools.partial(meta_parameters, limit))

    return target


def safetensors() -> Reader:
    """A file of weights: its header, and every tensor."""
    from mmhub.weights import amount_in, read_tensors

    def read(path: Path) -> None:
        amount_in([path])
        for _, tensor in read_tensors(path):
            assert tensor.numel() >= 0

    return _file("model.safetensors", read)


def weight_index() -> Reader:
    """model.safetensors.index.json."""
    from mmhub.hub.integrity import read_index
    from mmhub.weights import Stored, weight_files

    def read(path: Path) -> None:
        with suppress(MmhubError):
            read_index(path.parent)
        weight_files(Stored(path.parent, {"decoder": path.name}, {}, {"model-decoder.safetensors"}), ["decoder"])

    return _file("model.safetensors.index.json", read)


def registry() -> Reader:
    """registry.toml."""
    from mmhub.registry import read_registry

    return _file("registry.toml", lambda path: read_registry(path, "project"))


def lock() -> Reader:
    """mmhub.lock, and the lock of plugins."""
    from mmhub.install.lock import read_lock
    from mmhub.registry import _read_lock

    def read(path: Path) -> None:
        with suppress(MmhubError):
            _read_lock(path)
        read_lock(path)

    return _file("mmhub.lock", read)


def manifest() -> Reader:
    """A plugin's mmhub.toml."""
    from mmhub.manifests import fill

    def target(content: bytes) -> None:
        fill({"manifest": "mmhub.toml", "package": "mmhub_x", "module": "mmhub_x.hooks"}, content)

    return target


def recipe() -> Reader:
    """A recipe."""
    from mmhub.config import dump_recipe, read_recipe

    def read(path: Path) -> None:
        found = read_recipe(path)
        path.with_name("again.toml").write_text(dump_recipe(found), "utf-8")
        assert read_recipe(path.with_name("again.toml")) == found

    return _file("recipe.toml", read)


def tokenizer() -> Reader:
    """tokenizer.json, and a text read by it."""
    from mmhub_text.store import TokenizerStore

    def target(content: bytes) -> None:
        store = TokenizerStore()
        store.put_content(content, 1000)
        store.encode("a good thing, aaaaaaaaaaaaaaaaaaaaaaab 1 2")

    return target


def frame() -> Reader:
    """tokenizer_config.json."""
    from mmhub_text.frame import read_frame
    from mmhub_text.tokenizer import parse_tokenizer

    tokens = parse_tokenizer((model_folder() / "tokenizer.json").read_bytes())
    return _file("tokenizer_config.json", lambda path: read_frame(path.parent, tokens))


def template() -> Reader:
    """A chat template, read in this process and laid out in another, whose coverage nobody sees."""
    from mmhub_text.chat import render
    from mmhub_text.typesetting import _compile

    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]

    def target(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        _compile(text)
        render(talk, text, {"bos_token": "<s>", "eos_token": "</s>"})

    return target


def card() -> Reader:
    """A README with metadata."""
    from mmhub.hub.card import join_cards, read_card
    from mmhub.hub.readme import parse_card

    def target(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        parse_card(text)
        read_card(text)
        join_cards(text, "---\nlicense: mit\n---\n# x\n")

    return target


def results() -> Reader:
    """Measured results, of eval/."""
    from mmhub.hub.card import read_results

    folder = Path(tempfile.mkdtemp(dir=_place()))
    (folder / "eval").mkdir()

    def target(content: bytes) -> None:
        (folder / "eval" / "x.json").write_bytes(content)
        read_results(folder)

    return target


def picture() -> Reader:
    """A picture's bytes."""
    from mmhub.interfaces import Policy
    from mmhub_image.encoded import decode_picture

    policy = Policy(max_bytes=2**16, max_pixels=2**16)
    return lambda content: decode_picture(content, "a picture", policy)


def sound() -> Reader:
    """A recording's bytes."""
    from mmhub.interfaces import Policy
    from mmhub_audio.decode import decode

    policy = Policy(max_bytes=2**16)
    return lambda content: decode({"bytes": content, "path": None}, policy)


def http() -> Reader:
    """What comes through a connection to the server, up to the request that it means."""
    import h11

    from mmhub_serve.protocol import Rules, _Reader
    from mmhub_serve.settings import Settings

    settings = Settings(models=("x",))

    def target(content: bytes) -> None:
        reader = _Reader(Rules(settings))
        with suppress(h11.RemoteProtocolError):
            for start in range(0, len(content), 97):
                reader.receive_data(content[start : start + 97])
                while reader.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                    pass

    return target


_open: list[Any] = []


def close() -> None:
    """Let the threads of the server's application end, which the process would wait for."""
    while _open:
        _open.pop().__exit__(None, None, None)
    _client.cache_clear()


@functools.cache
def _client() -> Any:
    """A client of the server's application, with a small model."""
    import time

    from starlette.testclient import TestClient

    from mmhub_serve.app import build_app
    from mmhub_serve.settings import Settings

    app = build_app(Settings(models=(str(model_folder()),)))
    client = TestClient(app, base_url="http://127.0.0.1")
    client.__enter__()
    _open.append(client)
    for _ in range(600):
        if client.get("/readyz").status_code == 200:
            break
        time.sleep(0.1)
    return client


def _posted(path: str) -> Reader:
    def target(content: bytes) -> None:
        found = _client().post(path, content=content, headers={"content-type": "application/json"})
        assert found.status_code < 500, found.text
        json.loads(found.content)

    return target


def predict() -> Reader:
    """The body of POST /predict."""
    return _posted("/predict")


def completions() -> Reader:
    """The body of POST /v1/chat/completions."""
    return _posted("/v1/chat/completions")


def search_index() -> Reader:
    """The header of an index of pictures, sounds or texts."""
    from mmhub.index.store import HEADER, read_header

    return _file(HEADER, lambda path: read_header(path.parent))


def journal() -> Reader:
    """A record of the plugins' journal."""
    from unittest import mock

    from mmhub.install import journal as module

    folder = Path(tempfile.mkdtemp(dir=_place()))
    (folder / "1").mkdir()

    def target(content: bytes) -> None:
        (folder / "1" / "record.json").write_bytes(content)
        with mock.patch.object(module, "state_folder", return_value=folder):
            module._all()

    return target


def names() -> Reader:
    """The name of a model, and a requirement."""
    from mmhub.names import _resolve
    from mmhub.plugins import get_index
    from mmhub.registry import read_registries
    from mmhub.requirements import unmet_requirements

    registries = read_registries()

    def target(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        with suppress(MmhubError):
            _resolve(text, registries)
        name, _, specifier = text.partition(">")
        unmet_requirements([{"distribution": name, "specifier": f">{specifier}" if specifier else ""}], get_index())

    return target


TARGETS: dict[str, Callable[[], Reader]] = {
    one.__name__: one
    for one in (
        *(config, safetensors, weight_index, registry, lock, manifest, recipe, tokenizer, frame, template, card),
        *(results, picture, sound, http, predict, completions, search_index, journal, names),
    )
}


def seeds() -> dict[str, dict[str, bytes]]:
    """What is sound for each target, from which its corpus was made."""
    folder = model_folder()
    root = Path(__file__).parents[2]
    body = {"samples": [{"text": "a good thing"}], "model": "x"}
    chat = {"model": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2}
    rows = {"metrics": {"accuracy": 0.5}, "subsets": {"text": {"accuracy": 0.5}}, "rows": 4, "data": "x"}
    index = {"metadata": {"total_size": 8}, "weight_map": {"decoder.a": "model-decoder.safetensors"}}
    header = {"model": "x", "identity": "0", "source": "y", "modality": "text", "kind": "exact", "dim": 2}
    pins = {"schema": 1, "models": {"x": {"ref": "hub:org/x", "commit": "0" * 40}}}
    plugin = (root / "plugins/mmhub-heads/mmhub_heads/mmhub.toml").read_text("utf-8")
    text = 'task = "classification"\n[model.encoders.text]\nuse = "lstm"\n[data]\ntrain = "a.csv"\ntarget = "label"\n'
    talk = "{% for m in messages %}{{ m.role | upper }}: {{ m.content ~ eos_token }}{% endfor %}"
    get = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{}"
    chunked = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    front = (
        "---\nlicense: mit\ntags: [a, b]\ndate: 2026-01-01\nmodel-index: &a\n- name: x\n  b: *a\n---\n# x\nA model.\n"
    )
    return {
        "config": {"sound": (folder / "config.json").read_bytes()},
        "safetensors": {"sound": (folder / "model.safetensors").read_bytes()},
        "weight_index": {"sound": json.dumps(index).encode()},
        "registry": {"sound": (root / "registry.toml").read_bytes()[:4000]},
        "lock": {
            "sound": json.dumps(pins).encode(),
            "plugins": b'lock-version = "1.0"\n[[packages]]\nname = "a"\nversion = "1"\n',
        },
        "manifest": {"sound": plugin.replace("mmhub_heads", "mmhub_x").encode()[:3000]},
        "recipe": {"sound": text.encode(), "stages": text.encode() + b'[[train.stages]]\nparts = ["decoder"]\n'},
        "tokenizer": {"sound": (folder / "tokenizer.json").read_bytes()},
        "frame": {"sound": b'{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": [{"name": "a"}]}'},
        "template": {"sound": talk.encode(), "filters": b"{{ messages | map(attribute='content') | join(', ') }}"},
        "card": {"sound": front.encode(), "tags": b"---\na: !!bool x\nb: !!timestamp y\nc: !!int ''\n---\n"},
        "results": {"sound": json.dumps(rows).encode()},
        "picture": {"png": _picture("PNG"), "jpeg": _picture("JPEG"), "gif": _picture("GIF"), "webp": _picture("WEBP")},
        "sound": {kind.lower(): _sound(kind) for kind in ("WAV", "FLAC", "OGG", "MP3")},
        "http": {"sound": get, "chunked": chunked, "two": get + get},
        "predict": {"sound": json.dumps(body).encode()},
        "completions": {"sound": json.dumps(chat).encode()},
        "search_index": {"sound": json.dumps(header | {"entries": []}).encode()},
        "journal": {"sound": b'{"state": "done", "number": 1, "old": [], "new": [], "command": "x"}'},
        "names": {"hub": b"hub:org/name@v1#image", "path": b"./a#b", "requirement": b"mmhub-text>=0.1,<1"},
    }


def crashes() -> dict[str, dict[str, bytes]]:
    """What crashed, hung or was taken for sound once, by target."""
    folder = model_folder()
    tokens = json.loads((folder / "tokenizer.json").read_bytes())
    panic = tokens | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}
    runaway = tokens | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}}
    runaway["pre_tokenizer"]["invert"] = False
    sound = (folder / "config.json").read_text("utf-8")
    nested = b"a = " + b"[" * 3000
    doubled = {"normalizers": [{"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}] * 31}
    doubled = tokens | {"normalizer": {"type": "Sequence"} | doubled}
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": pieces[:1] * 300, "pair": pieces, "special_tokens": {}}
    lists, two = "{% set a = [1] %}{% set c = [1] %}", "{% set a = [a, a] %}{% set c = [c, c] %}"
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    return {
        "config": {
            "half-a-character": sound.replace('"task"', '"\\ud800": 1, "task"', 1).encode(),
            "layers": sound.replace('"depth": 1', '"depth": 3000000').encode(),
            "features": sound.replace('"dim": 8', f'"dim": {2**40}', 1).encode(),
            "digits": sound.replace('"dim": 8', f'"dim": 1{"0" * 4000}', 1).encode(),
            "twice": sound.replace('"task"', '"task": "regression", "task"', 1).encode(),
        },
        "registry": {"nested": nested},
        "recipe": {"nested": nested},
        "lock": {"nested": nested},
        "manifest": {"nested": nested},
        "journal": {"nested": b"[" * 3000},
        "tokenizer": {
            "panic": json.dumps(panic).encode(),
            "runaway": json.dumps(runaway).encode(),
            "doubled": json.dumps(doubled).encode(),
            "repeated": json.dumps(tokens | {"post_processor": template}).encode(),
        },
        "template": {
            "loops": loops.encode(),
            "width": b"{{ '%0999999999d' % 1 }}",
            "format": b"{{ '{:{}}'.format('a', 999999999) }}",
            "batch": b"{{ [1] | batch(2000000000, 'x') | list }}",
            "include": b"{% include 'x' %}",
            "written": f"{lists}{two * 40}{{{{ a | string }}}}".encode(),
            "compared": f"{lists}{two * 40}{{{{ a == c }}}}".encode(),
            "translated": b"{{ ('a' * 4000).translate({97: 'b' * 4000000}) }}",
        },
        "card": {
            "merged": _merged(),
            "newlines": b"---\n" + b"\n" * 9000,
            "nested": b"---\na: " + b"[" * 3000 + b"\n---\n",
        },
    }


def _merged() -> bytes:
    """Mappings that hold the one before twice, thirty times."""
    lines = [f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}]}}" for i in range(1, 31)]
    return "\n".join(["---", "b0: &b0 {x: 1}", *lines, "---", ""]).encode()


def _picture(kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(file, kind)
    return file.getvalue()


def _sound(kind: str) -> bytes:
    import numpy as np
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(400) / 9).astype("float32"), 8000, format=kind)
    return file.getvalue()


def write_seeds(corpus: Path) -> None:
    """Write the sound files of each target, and its past crashes, into its folder."""
    for files in (seeds(), crashes()):
        for name, contents in files.items():
            (corpus / name).mkdir(parents=True, exist_ok=True)
            for one, content in contents.items():
                (corpus / name / one).write_bytes(content)
