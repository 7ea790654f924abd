"""Auditing: what is dangerous, false or unknown in a model is found without running any of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmhub.hub import download
from mmhub.hub.formats import check_content, format_of
from mmhub.hub.signing import new_key, sign
from tests import tiny_models
from tests.fake_plugins import run
from tests.faulty_hub import COMMIT, REPO, FaultyHub, _Handler

pytestmark = pytest.mark.usefixtures("client")


class Canary:
    """Leaves a file behind where its pickle is opened."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


WEIGHTS = tiny_models.weights(["decoder"])
HEADER = json.dumps(
    {name: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for name, start in (("a", 0), ("b", 4))}
).encode()
OVERLAPPING = len(HEADER).to_bytes(8, "little") + HEADER + bytes(12)
PICKLE = pickle.dumps(Canary())
LICENSED = {"README.md": b"---\nlicense: mit\n---\n# A model\n"}
FOREIGN = {"config.json": b'{"model_type": "bert"}', "model.safetensors": WEIGHTS} | LICENSED


def sound(last: bytes = bytes(4), **options: Any) -> dict[str, bytes]:
    """The files of a checkpoint whose weights are zeros, but the last, a number of four bytes."""
    files = tiny_models.files(**options)
    content, config = files["model.safetensors"], json.loads(files["config.json"])
    start = 8 + int.from_bytes(content[:8], "little")
    files["model.safetensors"] = content[:start] + bytes(len(content) - start - 4) + last
    config["files"]["model.safetensors"]["sha256"] = hashlib.sha256(files["model.safetensors"]).hexdigest()
    return files | {"config.json": json.dumps(config).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", sound())


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def audited(capsys: pytest.CaptureFixture[str], name: object, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report."""
    code, out, err = run(capsys, "audit", str(name), *options, "--json")
    assert out, err
    return code, json.loads(out)


def bad(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The rules and files of what is bad."""
    return [(one["rule"], one["file"]) for one in report["findings"] if one["severity"] == "bad"]


def said(report: dict[str, Any], rule: str) -> list[str]:
    return [one["message"] for one in report["findings"] if one["rule"] == rule]


# -- folders ----------------------------------------------------------------------------------------------------


def test_of_a_sound_model_nothing_bad_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = audited(capsys, folder, "--full")
    assert (code, report["verdict"], report["summary"]) == (0, "nothing bad found", "nothing bad found")
    (weights,) = (one for one in report["files"] if one["format"] == "safetensors")
    assert weights["recorded"] == "equal" and weights["read"]
    assert weights["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (plugin,) = report["plugins"]
    assert (
        plugin["distribution"] == "mmhub-image" and plugin["trust"] == "official" and plugin["required"] == ">=0.1,<1"
    )
    assert report["license"] == "mit" and report["signature"]["state"] == "none"
    code, out, _ = run(capsys, "audit", str(folder))
    assert code == 0 and out.rstrip().endswith("nothing bad found")
    assert "mmhub-image >=0.1,<1 (0." in out and ", official)" in out


DISGUISES = ("tokenizer.model", "x.gguf", "x.png", "x.wav", "m.onnx", "data.parquet", "blob", "x.dat")
REST = b"'fortran_order': False, 'shape': (1,)}"
NAMED = {"name": "default", "template": "{{ x.__class__ }}"}


def header(text: bytes) -> bytes:
    """An array's file, with the given header."""
    return b"\x93NUMPY\x01\0" + (len(text) + 1).to_bytes(2, "little") + text + b"\n" + PICKLE


BAD = {
    "a pickle": ("pytorch_model.bin", PICKLE, "format"),
    "a pickle under another name": ("notes.txt", PICKLE, "disguise"),
    "a pickle called weights": ("model-x.safetensors", PICKLE, "disguise"),
    "an old pickle": ("vocab.txt", b"cos\nsystem\n(S'touch canary'\ntR.", "disguise"),
    "an archive of torch": ("weights.json", zipped(data=PICKLE), "disguise"),
    "an archive behind weights": ("model-y.safetensors", WEIGHTS + zipped(data=PICKLE), "disguise"),
    "a program": ("extra.json", b"\x7fELF\x02\x01\x01" + bytes(60), "disguise"),
    "a program for Windows": ("extra.txt", b"MZ\x90" + bytes(80), "disguise"),
    "a PDF": ("extra.md", b"%PDF-1.7\n", "disguise"),
    "a script": ("LICENSE", b"#!/bin/sh\ntouch canary\n", "disguise"),
    "code": ("modeling_x.py", b"import os", "format"),
    "a library": ("kernel.so", b"x", "format"),
    "an archive": ("model.nemo", b"x", "format"),
    "Keras": ("model.keras", b"x", "format"),
    "objects in arrays": ("arrays.npz", zipped(**{"a.npy": array(np.array([Canary()], object))}), "format"),
    "an array of objects": ("array.npy", array(np.array([Canary()], object)), "format"),
    "no weights": ("model-z.safetensors", b"\xff" * 20, "weights"),
    "weights that overlap": ("model-z.safetensors", OVERLAPPING, "weights"),
    "an index that leaves": ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', "weights"),
    "no JSON": ("tokenizer.json", b"{", "json"),
    "deep JSON": ("tokenizer.json", b"[" * 100_000, "json"),
    "auto_map": ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": "x.Y"}}', "code"),
    "trust_remote_code": ("generation_config.json", b'{"a": [{"trust_remote_code": true}]}', "code"),
    "_target_": ("model_config.json", b'{"model": {"_target_": "os.system"}}', "code"),
    "a kernel": ("text_config.json", b'{"attn_implementation": "evil/kernel"}', "code"),
    "a class to import": ("modules.json", b'[{"path": "", "type": "evil.Module"}]', "code"),
    "YAML that calls": ("hparams.yaml", b"a: !!python/object/apply:os.system [touch canary]", "code"),
    "a template": ("chat_template.jinja", b"{{ x.__class__.__mro__ }}", "template"),
    "a template in JSON": ("tokenizer_config.json", b'{"chat_template": "{{ x.__globals__ }}"}', "template"),
    **{f"a pickle called {name}": (name, PICKLE, "disguise") for name in DISGUISES},
    "no sound": ("a.wav", b"I1\n" + bytes(40), "disguise"),
    "an old pickle called a tokenizer": ("tokenizer.model", b"cos\nsystem\n(S'touch canary'\ntR.", "disguise"),
    "objects in other letters": ("a.npy", header(b'{"descr": "|O", "fortran_order": False, "shape": (1,)}'), "format"),
    "objects in short": ("a.npy", header(b"{'descr': 'O', 'fortran_order': False, 'shape': (1,)}"), "format"),
    "objects far away": ("a.npy", header(b"{" + b" " * 1500 + b"'descr': '|O', " + REST), "format"),
    "objects in a field": ("a.npy", header(b"{'descr': [('a', '<f4'), ('b', '|O')], " + REST), "format"),
    "an array that never ends": ("a.npz", zipped(a=b"\x93NUMPY\x02\0\xff\xff\xff\x7f{"), "format"),
    "one of several templates": ("tokenizer_config.json", json.dumps({"chat_template": [NAMED]}).encode(), "template"),
    "a template of its own": ("chat_template.json", b'{"chat_template": "{{ x.__class__ }}"}', "template"),
    "code for Windows": ("a.pyw", b"x", "format"),
    "code with a dot behind": ("a.py.", b"x", "format"),
    "code with a space behind": ("a.py ", b"x", "format"),
    "a name that hides": ("READ\u202eME.md", b"x", "name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_dangerous_is_found_and_not_run(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    name, content, rule = BAD[kind]
    write(folder, {name: content})
    code, report = audited(capsys, folder)
    assert code == 5 and report["verdict"] == "bad"
    assert bad(report) == [(rule, name)]
    assert not Path("canary").exists()


def test_a_file_of_a_terabyte_keeps_nobody_waiting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "model.safetensors", 10**12)
    with (folder / "tokenizer.json").open("wb") as file:
        file.write(b"{")
        file.seek(10**12)
        file.write(b"}")
    code, report = audited(capsys, folder)
    assert code == 5
    assert {("disguise", "tokenizer.json"), ("weights", "model.safetensors")} <= set(bad(report))


def test_what_looks_like_it_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = {"model": {"vocab": {"auto_map": 1, "_target_": 2, "trust_remote_code": 3}}}
    harmless = {
        "tokenizer.json": json.dumps(vocabulary).encode(),
        "arrays.npz": zipped(**{"a.npy": array(np.zeros(3))}),
        "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
        "vocab.txt": b"cats\ndogs\nMZ\n[PAD]\n#!x\n",
        "config_sentence_transformers.json": b'{"trust_remote_code": false, "auto_map": null}',
        "spiece.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
        "spectrogram.png": b"\x89PNG\r\n\x1a\n" + bytes(30),
    }
    code, report = audited(capsys, write(folder, harmless))
    assert code == 0 and bad(report) == []


def test_a_file_that_is_not_what_is_recorded_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + b"!")
    code, report = audited(capsys, folder)
    assert code == 5 and bad(report) == [("hash", "model.safetensors")]
    assert said(report, "hash") == ["is not what config.json records"]
    (folder / "model.safetensors").unlink()
    code, report = audited(capsys, folder)
    assert code == 5 and said(report, "hash") == ["is recorded in config.json and is not there"]


def test_a_configuration_too_large_to_be_read_is_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "generation_config.json"):
        with (folder / name).open("ab") as file:
            file.write(b" " * (2**24 + 1))
    code, report = audited(capsys, folder)
    assert code == 5 and {("size", "config.json"), ("size", "generation_config.json")} <= set(bad(report))


def test_of_very_many_arrays_some_are_looked_into_and_that_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, {"a.npz": zipped(**{f"{i:02}.npy": array(np.zeros(1)) for i in range(70)})})
    code, report = audited(capsys, folder)
    assert code == 0 and said(report, "size") == ["has 70 arrays, of which 64 were looked into"]


def test_a_pointer_in_place_of_a_picture_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"a.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})
    code, report = audited(capsys, folder)
    assert code == 0 and said(report, "format") == ["is a pointer of Git LFS, not the file"]


@pytest.mark.parametrize("many", ["requires", "components"])
def test_more_records_than_any_model_has_are_bad_and_none_of_them_is_looked_into(
    folder: Path, capsys: pytest.CaptureFixture[str], many: str
) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    if many == "requires":
        config[many] = [{"distribution": "a", "specifier": "", "saved_with": "1"}] * 1001
    else:
        config[many] = {f"x{i}": {} for i in range(101)}
    write(folder, {"config.json": json.dumps(config).encode()})
    code, report = audited(capsys, folder)
    assert code == 5 and any("holds more than" in one for one in said(report, "description"))
    assert run(capsys, "models", "show", str(folder))[0] == 5


@pytest.mark.parametrize(
    "facts",
    [
        '{"parents": [{"name": DEEP, "commit": "x", "more": DEEP}], "forced": [{"finding": DEEP}], "code": DEEP}',
        '{"overlap": {"valid": {"exact": 1HUGE, "skipped": DEEP}}, "data": {"train": {"files": [{"name": DEEP}]}}}',
        '{"overlap": {"valid": {"exact": 1HUGE, "checked_rows": "x", "exact_share": NaN}}, "data": [1]}',
        '{"parents": [{"name": NaN, "commit": "\\ud800"}], "forced": {"a": 1}, "code": {"commit": DEEP}}',
    ],
)
def test_a_provenance_that_makes_no_sense_is_told_in_words(
    folder: Path, capsys: pytest.CaptureFixture[str], facts: str
) -> None:
    facts = facts.replace("DEEP", "[" * 900 + "]" * 900).replace("HUGE", "0" * 400)
    code, report = audited(capsys, write(folder, {"provenance.json": facts.encode()}))
    assert all(set(one) <= {"name", "commit"} for one in report["provenance"].get("parents", []))
    assert "NaN" not in json.dumps(report["provenance"])
    assert run(capsys, "audit", str(folder))[0] == code


def test_an_adapter_for_weights_that_are_elsewhere_is_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    base = {"name": "/nowhere/model", "commit": "", "sha256": "0" * 64}
    adapter = {"rank": 1, "alpha": 1, "dropout": 0.0, "targets": [], "weights": "adapter-x.safetensors", "base": base}
    config["components"]["decoder"]["adapter"] = adapter
    code, report = audited(capsys, write(folder, {"config.json": json.dumps(config).encode()}))
    assert code == 5
    assert said(report, "base") == [
        "the decoder is an adapter for weights outside, '/nowhere/model', which are not here"
    ]


def test_a_link_is_not_followed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    code, report = audited(capsys, folder)
    assert code == 5 and bad(report) == [("link", "LICENSE")]
    assert "LICENSE" not in [one["name"] for one in report["files"]]
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("LICENSE")
    os.mkfifo(folder / "provenance.json")
    code, report = audited(capsys, folder)
    assert code == 5 and bad(report) == [("link", "LICENSE"), ("kind", "provenance.json")]
    (folder / "LICENSE").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    code, report = audited(capsys, folder)
    assert code == 5 and ("kind", "model.safetensors") in bad(report), "and nobody waits for it"


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff", b'{"mmhub_format": 1}', b'{"mmhub_format": 1e999}'])
def test_a_config_that_makes_no_sense_is_no_crash(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    code, report = audited(capsys, write(folder, {"config.json": content}))
    assert [one for one in report["findings"] if one["rule"] in ("config", "json", "description")]
    assert code in (0, 5)


def test_another_librarys_folder_is_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = audited(capsys, write(tmp_path / "bert", FOREIGN))
    assert (code, report["kind"], bad(report)) == (0, "transformers", [])
    write(tmp_path / "bert", {"pytorch_model.bin": PICKLE, "training_args.bin": PICKLE})
    code, report = audited(capsys, tmp_path / "bert")
    assert code == 5 and bad(report) == [("format", "pytorch_model.bin"), ("format", "training_args.bin")]
    assert "runs code when it is opened; mmhub never opens it" in said(report, "format")[0]


def test_numbers_that_are_none_are_found_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, sound(np.float32("nan").tobytes()))
    assert not said(audited(capsys, folder)[1], "numbers")
    code, report = audited(capsys, folder, "--full")
    assert code == 0 and said(report, "numbers") == ["has NaN or infinity in 1 tensors, first in decoder.weight"]


def test_what_nobody_vouches_for_and_what_was_forced_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sound(requires={"somebodys-plugin": ">=2"}, license="")
    made = {"code": {"commit": "a" * 40}, "data": {"train": {"files": [{"name": "a.csv"}]}}, "parents": "none"}
    made |= {"forced": [{"finding": "licence: none", "reason": "later"}, 3]}
    made |= {"overlap": {"valid": {"exact": 2, "checked_rows": 8, "exact_share": 0.25}}}
    config = json.loads(files["config.json"])
    config |= {"guards": [{"use": "mmhub-guards/wordlist", "config": {}}]}
    config["components"]["decoder"]["config"] = {"generation": {"watermark": {"key": 1}}}
    files |= {"provenance.json": json.dumps(made).encode(), "config.json": json.dumps(config).encode()}
    _, report = audited(capsys, write(tmp_path / "model", files))
    assert "needs somebodys-plugin, which no registry vouches for" in said(report, "plugin")
    assert said(report, "forced") == ["was published with --force, in spite of: licence: none"]
    assert report["provenance"]["code"] == {"commit": "a" * 40} and report["watermark"]
    assert report["guards"] == ["mmhub-guards/wordlist"]
    assert any("no licence is given" in one for one in said(report, "licence"))
    _, out, _ = run(capsys, "audit", str(tmp_path / "model"))
    assert "provenance: code aaaaaaaaaaaa, 1 hashed data file, valid: 2 of 8 evaluation rows (25.0%)" in out


def test_what_is_shown_acts_on_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"a\x1b[2J\n.txt": b"x", "modules.json": b'[{"type": "\\u001b[31m"}]'})
    code, out, err = run(capsys, "audit", str(folder))
    assert code == 5 and "\x1b" not in out + err and "a\N{REPLACEMENT CHARACTER}[2J" in out


@pytest.mark.parametrize(
    ("name", "code"), [("./none", 3), ("nobody/nothing", 3), ("config.json", 3), ("https://elsewhere/x", 2)]
)
def test_what_is_not_there_is_said_to_be_so(
    hub: str, folder: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    assert run(capsys, "audit", name)[0] == code


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "a.txt", "a.npz", "a.jinja", "a.sig", "a", "a.model"])
def test_any_bytes_give_findings_and_no_error(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    for size in (0, 1, 2, 7, 8, 9, 100, 3000):
        (tmp_path / name).write_bytes(random.bytes(size))
        list(check_content(tmp_path / name, name))
    assert format_of(name) != "pickle"


# -- repositories -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    def tell_commit(request: _Handler, path: str) -> bool:
        about = path.startswith(f"/api/models/{REPO}") and "/tree/" not in path
        files = request.server.files
        siblings = [
            {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
            | ({"lfs": {"sha256": one["lfs"]["oid"], "size": one["size"], "pointerSize": 134}} if "lfs" in one else {})
            for one in request.server.entries()
        ]
        if about:
            told = {"id": REPO, "sha": COMMIT, "siblings": siblings if files else []}
            request.reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        return about

    with FaultyHub(sound()) as server:
        server.fault = tell_commit
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
        yield server


def fetched(server: FaultyHub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in server.log if method == "GET" and "/resolve/" in path}


def test_of_a_repository_no_weights_are_fetched_unless_asked_for(
    server: FaultyHub, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = audited(capsys, REPO)
    assert (code, report["commit"], report["name"]) == (0, COMMIT, REPO)
    assert not [name for name in fetched(server) if name.endswith("safetensors")] or server.sent < 10_000
    (weights,) = (one for one in report["files"] if one["format"] == "safetensors")
    assert weights["recorded"] == "equal" and not weights["read"], "by the hash that the Hub lists"
    assert said(report, "unread") == ["1 weight files were not fetched, so not looked into (--full does)"]
    code, report = audited(capsys, REPO, "--full")
    assert code == 0 and all(one["read"] for one in report["files"]) and not said(report, "unread")


def test_what_is_dangerous_in_a_repository_is_named_and_never_fetched(
    server: FaultyHub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files |= {"evil.py": b"x", "model.pt": PICKLE, "tokenizer_config.json": b'{"auto_map": {"a": "b"}}'}
    code, report = audited(capsys, REPO, "--full")
    assert code == 5
    assert sorted(bad(report)) == [("code", "tokenizer_config.json"), ("format", "evil.py"), ("format", "model.pt")]
    assert not {"evil.py", "model.pt"} & fetched(server)


def test_a_configuration_is_looked_into_wherever_it_lies_and_however_many_files_there_are(
    server: FaultyHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code_of_its_own = b'{"auto_map": {"AutoModel": "x.y"}}'
    server.files |= {"my-part/config.json": code_of_its_own, "a/b/config.json": code_of_its_own}
    server.files |= {f"a{i}.json": b"{}" for i in range(4)} | {"zconfig.json": code_of_its_own}
    monkeypatch.setattr("mmhub.hub.audit._MOST_SMALL", 8)
    code, report = audited(capsys, REPO)
    assert code == 5
    assert bad(report) == [("code", name) for name in ("a/b/config.json", "my-part/config.json", "zconfig.json")]
    assert said(report, "unread")[0].startswith("2 other files were not looked into")


@pytest.mark.slow
def test_what_has_no_known_name_is_a_warning_and_looked_into_when_asked_for(
    server: FaultyHub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files |= {"blob": PICKLE, "x.png": PICKLE}
    code, report = audited(capsys, REPO)
    (warning,) = (one for one in report["findings"] if one["rule"] == "unread" and one["severity"] == "warning")
    assert code == 0 and warning["message"].startswith("2 other files were not looked into")
    code, report = audited(capsys, REPO, "--full")
    assert code == 5 and bad(report) == [("disguise", "blob"), ("disguise", "x.png")]


def test_a_large_configuration_of_a_repository_is_bad(
    server: FaultyHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmhub.hub.audit.TEXT_BYTES", 10_000)
    server.files["tokenizer_config.json"] = b'{"auto_map": 1, "a": "' + b" " * 10_000 + b'"}'
    code, report = audited(capsys, REPO, "--full")
    assert code == 5 and bad(report) == [("unread", "tokenizer_config.json")]


def test_a_hub_that_lists_another_hash_than_config_json_is_found(
    server: FaultyHub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["model.safetensors"] = server.files["model.safetensors"][:-1] + b"!"
    code, report = audited(capsys, REPO)
    assert code == 5 and bad(report) == [("hash", "model.safetensors")]


def test_a_signature_is_none_unchecked_valid_or_invalid(
    server: FaultyHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing", reason="the extra mmhub[signing] is not installed")
    public = str(new_key(tmp_path / "k.pem"))
    code, report = audited(capsys, REPO, "--verify", public)
    assert code == 5 and report["signature"]["state"] == "none" and bad(report) == [("signature", "")]
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(server.files.items())}
    server.files["model.sig"] = sign(digests, tmp_path / "k.pem", REPO)
    code, report = audited(capsys, REPO)
    assert code == 0 and report["signature"]["state"] == "unchecked" and len(report["signature"]["key"]) == 64
    code, report = audited(capsys, REPO, "--verify", public)
    assert code == 0 and report["signature"] | {"key": ""} == {
        "state": "valid", "key": "", "by": ["k.pem.pub"], "problem": None, "name": REPO
    }  # fmt: skip
    assert "model.safetensors" not in fetched(server) or server.sent < 10_000
    server.files["README.md"] += b"!"
    code, report = audited(capsys, REPO, "--verify", public)
    assert code == 5 and report["signature"]["state"] == "invalid"
    assert report["signature"]["problem"] == f"'README.md' of '{REPO}' is not what was signed"
    own = write(tmp_path / "own", server.files)
    code, report = audited(capsys, own, "--verify", public)
    assert code == 5 and report["signature"]["state"] == "invalid" and "README.md" in report["signature"]["problem"]


@pytest.mark.slow
def test_off_line_what_is_cached_is_looked_at(
    server: FaultyHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    audited(capsys, REPO, "--full")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, report = audited(capsys, f"{REPO}@{COMMIT}")
    assert code == 0 and said(report, "offline") == ["HF_HUB_OFFLINE is set: what is in the cache was looked at"]
    assert run(capsys, "audit", "nobody/nothing")[0] == 6
