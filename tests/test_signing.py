"""Signed models: any change of any published file is found, by whomever it was made, and nobody else can sign."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

import mmhub
from mmhub.errors import MmhubError, NetworkError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.hashes import sha256_of
from mmhub.hub import download, load, pull, push, signing
from mmhub.hub.signed import check_folder
from mmhub.hub.signing import PASSPHRASE, Signer, key_hint, new_key, read_signature, read_signer, sign
from tests.conftest import Cli
from tests.fake_plugins import run
from tests.faulty_hub import COMMIT, REPO, FaultyHub, _Handler, folder_files

pytest.importorskip("model_signing", reason="the extra mmhub[signing] is not installed")
pytestmark = [
    pytest.mark.usefixtures("client"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub uploads
]

SMALL: dict[str, Any] = {
    "encoders": {"text": {"use": "lstm", "config": {"dim": 4, "embedding_dim": 4}}},
    "decoder": {"use": "classification", "config": {"labels": ["no", "yes"]}},
    "texts": ["a good thing", "a bad thing"],
}
FILES = [
    "LICENSE", "README.md", "config.json", "eval/classification.json", "model.safetensors", "model.sig",
    "provenance.json", "tokenizer.json",
]  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as it is before it is published, and a pair of keys beside it."""
    folder = tmp_path_factory.mktemp("signed") / "model"
    mmhub.compose(**SMALL).save(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "provenance.json").write_text('{"seed": 0}\n')
    (folder / "eval").mkdir()
    (folder / "eval/classification.json").write_text('{"rows": 3, "metrics": {"accuracy": 1.0}}\n')
    new_key(folder.with_name("key.pem"))
    return folder


@pytest.fixture(scope="session")
def published(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a signed repository of it holds."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("published") / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder_files(resigned(folder, small.with_name("key.pem")))


def resigned(folder: Path, key: Path) -> Path:
    """The folder, its files signed as they are now."""
    (folder / "model.sig").unlink(missing_ok=True)
    digests = {name: sha256_of(folder / name) for name in sorted(folder_files(folder))}
    (folder / "model.sig").write_bytes(sign(digests, key, "team/model"))
    return folder


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def key(small: Path) -> Path:
    return small.with_name("key.pem")


@pytest.fixture
def public(small: Path) -> Path:
    return small.with_name("key.pem.pub")


@pytest.fixture
def server(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """A Hub that serves the signed model, and whatever a test makes of it, as if that were what was published."""

    def tell_commit(request: _Handler, path: str) -> bool:
        about = path.startswith(f"/api/models/{REPO}") and "/tree/" not in path
        if about:
            request.reply(200, json.dumps({"id": REPO, "sha": COMMIT}).encode(), {"Content-Type": "application/json"})
        return about

    with FaultyHub(dict(published)) as server:
        server.fault = tell_commit
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
        yield server


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forget() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    return forget


SOME = ("README.md", "model.safetensors", "model.sig")  # of FILES, the kinds: text, weights and the signature
EVERY = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in FILES]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def refusal(name: str | Path, public: Path) -> str:
    """The one line by which a pull that checks the signature refuses a model."""
    with pytest.raises(TrustError) as caught:
        pull(name, verify=public)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    return caught.value.message


# -- what is published ------------------------------------------------------------------------------------------


def test_the_fixture_has_a_file_of_every_kind(published: dict[str, bytes]) -> None:
    assert sorted(published) == FILES


def test_a_signed_model_is_pulled_and_its_files_are_those_published(
    server: FaultyHub, public: Path, published: dict[str, bytes], tmp_path: Path
) -> None:
    assert folder_files(pull(REPO, verify=public)) == published
    assert folder_files(pull(REPO, verify=public, local_dir=tmp_path / "own")) == published
    assert pull(tmp_path / "own", verify=public) == tmp_path / "own"
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert folder_files(pull(REPO, verify=public, local_dir=tmp_path / "again")) == published


@pytest.mark.parametrize("name", EVERY)
def test_a_changed_byte_of_any_file_is_found(
    server: FaultyHub, public: Path, name: str, published: dict[str, bytes], fresh_cache: Callable[[], None]
) -> None:
    content = published[name]
    for at in (0, len(content) - 1):
        fresh_cache()
        server.files[name] = flipped(content, at)
        assert name in refusal(REPO, public), f"byte {at}"
    server.files[name] = content
    fresh_cache()
    server.body = lambda path, body: flipped(body, len(body) // 2) if path == name else body
    assert name in refusal(REPO, public), "delivered otherwise than it is listed"


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_or_renamed_or_swapped_file_is_found(
    server: FaultyHub, public: Path, name: str, published: dict[str, bytes], fresh_cache: Callable[[], None]
) -> None:
    del server.files[name]
    fresh_cache()
    assert name in refusal(REPO, public)
    server.files["LICENSE.txt"] = published[name]
    fresh_cache()
    assert name in refusal(REPO, public)
    server.files.pop("LICENSE.txt")
    other = FILES[(FILES.index(name) + 1) % len(FILES)]
    server.files |= {name: published[other], other: published[name]}
    fresh_cache()
    said = refusal(REPO, public)
    assert name in said or other in said


@pytest.mark.parametrize("added", ["LICENSE.md", "model-fusion.safetensors", "eval/more.json", "vocab.txt"])
def test_a_file_that_would_be_fetched_and_was_not_signed_is_refused(
    server: FaultyHub, public: Path, added: str
) -> None:
    server.files[added] = b"{}"
    assert refusal(REPO, public) == f"'{REPO}' holds '{added}', which is not among the signed files"


@pytest.mark.slow
def test_a_file_that_is_never_fetched_is_named(
    server: FaultyHub, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files |= {"evil.py": b"import os", ".git-hook\x1b[2J": b"x", ".gitattributes": b"* text"}
    folder = pull(REPO, verify=public)
    assert "nothing fetches: '.git-hook\\x1b[2J', 'evil.py'\n" in capsys.readouterr().err
    assert not (folder / "evil.py").exists()


def test_nothing_of_a_refused_model_is_fetched_but_what_is_small(server: FaultyHub, public: Path) -> None:
    server.files["model.safetensors"] = flipped(server.files["model.safetensors"], 900)
    refusal(REPO, public)
    assert not [path for method, path, _ in server.log if method == "GET" and path.endswith("safetensors")]


@pytest.mark.slow
def test_the_command_refuses_in_one_line_with_its_exit_code(
    server: FaultyHub, public: Path, capsys: pytest.CaptureFixture[str], published: dict[str, bytes]
) -> None:
    code, out, err = run(capsys, "pull", REPO, "--verify", str(public), "--json")
    told = json.loads(out)
    assert code == 0 and (told["signed_by"], told["signed_as"]) == ("key.pem.pub", REPO)
    assert f"signed by key.pem.pub as {REPO}, and every file is what was signed" in err
    server.files["LICENSE"] = b"Pay me.\n"
    code, out, err = run(capsys, "pull", REPO, "--verify", str(public))
    assert (code, out) == (5, "")
    assert err.splitlines()[0] == f"error: 'LICENSE' of '{REPO}' is not what was signed"


def test_another_models_and_an_older_versions_signature_are_refused(
    server: FaultyHub, key: Path, public: Path, published: dict[str, bytes], tmp_path: Path
) -> None:
    older = written(tmp_path / "older", published | {"README.md": b"---\nlicense: mit\n---\n# Older\n"})
    server.files["model.sig"] = (resigned(older, key) / "model.sig").read_bytes()
    assert "README.md" in refusal(REPO, public)


@pytest.mark.slow
def test_a_whole_older_version_passes_for_a_signature_has_no_date(
    server: FaultyHub, key: Path, public: Path, published: dict[str, bytes], tmp_path: Path
) -> None:
    older = written(tmp_path / "older", published | {"README.md": b"---\nlicense: mit\n---\n# Older\n"})
    server.files = folder_files(resigned(older, key))
    assert pull(REPO, verify=public), "who must have the newest pins a commit"


@pytest.mark.slow
def test_another_whole_model_of_the_same_signer_is_refused_and_a_folder_tells_its_name(
    server: FaultyHub, key: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = read_signature(written(tmp_path / "model", server.files) / "model.sig", "x")
    server.files["model.sig"] = sign(digests, key, "team/another")
    assert refusal(REPO, public) == f"'{REPO}' holds what key.pem.pub signed as 'team/another'"
    code, out, _ = run(
        capsys, "pull", str(written(tmp_path / "model", server.files)), "--verify", str(public), "--json"
    )
    assert code == 0 and json.loads(out)["signed_as"] == "team/another", "a folder may be called anything"
    server.files["model.sig"] = sign(digests, key, REPO.upper())
    assert pull(REPO, verify=public), "a Hub takes any case"


def test_another_key_is_refused_and_so_is_no_signature(server: FaultyHub, public: Path, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other.pem")
    assert refusal(REPO, other) == f"the 'model.sig' of '{REPO}' is no signature by other.pem.pub"
    del server.files["model.sig"]
    assert refusal(REPO, public) == f"'{REPO}' at {COMMIT[:12]} is not signed: it holds no 'model.sig'"


@pytest.mark.slow
def test_a_part_is_checked_too(server: FaultyHub, public: Path, fresh_cache: Callable[[], None]) -> None:
    assert pull(f"{REPO}#text", verify=public)
    fresh_cache()
    server.files["tokenizer.json"] = flipped(server.files["tokenizer.json"], 40)
    assert "tokenizer.json" in refusal(f"{REPO}#text", public)


@pytest.mark.slow
def test_another_librarys_model_is_checked_too(
    server: FaultyHub, key: Path, public: Path, tmp_path: Path, fresh_cache: Callable[[], None]
) -> None:
    sound = {
        "config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}',
        "model.safetensors": b"w" * 3000,
        "pytorch_model.bin": b"p" * 3000,
        "README.md": b"---\nlicense: mit\n---\n# A model\n",
        "vocab.txt": b"[PAD]\n",
    }
    signed = folder_files(resigned(written(tmp_path / "bert", sound), key))
    server.files = dict(signed)
    assert not (pull(REPO, verify=public) / "pytorch_model.bin").exists()
    for name in ("config.json", "model.safetensors", "model.sig"):
        fresh_cache()
        server.files = signed | {name: flipped(signed[name], 4)}
        server.log.clear()
        assert name in refusal(REPO, public)
        assert not [path for method, path, _ in server.log if method == "GET" and path.endswith("safetensors")]
    server.files = signed | {"tokenizer.json": b"{}"}
    assert "'tokenizer.json', which is not among the signed files" in refusal(REPO, public)
    del server.files["tokenizer.json"], server.files["pytorch_model.bin"]
    assert refusal(REPO, public) == f"'{REPO}' lacks 'pytorch_model.bin', which was signed"


# -- the cache --------------------------------------------------------------------------------------------------


def test_a_cached_file_that_was_changed_is_found(
    server: FaultyHub, public: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, bytes]
) -> None:
    folder = pull(REPO, verify=public)
    for name in ("model.safetensors", "model.sig"):
        blob = (folder / name).resolve()
        blob.write_bytes(flipped(published[name], 20))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert name in refusal(REPO, public)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert folder_files(pull(REPO, verify=public)) == published, "on line, it is fetched again"


def test_a_cached_file_that_was_replaced_with_its_name_is_found(
    server: FaultyHub, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(REPO, verify=public)
    forged = b"---\nlicense: mit\n---\n# Another\n"
    name = hashlib.sha1(b"blob %d\0%b" % (len(forged), forged)).hexdigest()
    blob = (folder / "README.md").resolve().with_name(name)
    blob.write_bytes(forged)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(os.path.relpath(blob, folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(REPO, public) == f"'README.md' of '{REPO}' is not what was signed"
    (folder / "README.md").unlink()
    assert refusal(REPO, public) == f"'{REPO}' lacks 'README.md', which was signed"


def test_off_line_a_copy_pulled_without_its_signature_is_not_trusted(
    server: FaultyHub, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(REPO, verify=public) == folder, "a pull brings the signature along"
    (folder / "model.sig").unlink()
    assert "the cached copy of 'team/model' is not signed" in refusal(REPO, public)


# -- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_of_a_folder_is_found(
    published: dict[str, bytes], public: Path, tmp_path: Path, name: str
) -> None:
    folder = written(tmp_path / "model", published)
    for at in (0, len(published[name]) // 2, len(published[name]) - 1):
        (folder / name).write_bytes(flipped(published[name], at))
        assert name in refusal(folder, public)
    (folder / name).unlink()
    assert name in refusal(folder, public)


@pytest.mark.parametrize("added", [".git/hook", ".cache/x", ".gitignore", "sub/evil.py", ".github/x", "model.sig.bak"])
def test_whatever_was_added_to_a_folder_is_found(
    published: dict[str, bytes], public: Path, tmp_path: Path, added: str
) -> None:
    folder = written(tmp_path / "model", published | {added: b"x"})
    assert refusal(folder, public) == f"'{folder}' holds '{added}', which is not among the signed files"


def test_a_link_in_a_folder_is_found(published: dict[str, bytes], public: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", published)
    (folder / "LICENSE").rename(tmp_path / "LICENSE")
    (folder / "LICENSE").symlink_to(tmp_path / "LICENSE")
    assert "'LICENSE', which is a link" in refusal(folder, public)
    (tmp_path / "LICENSE").unlink()
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("LICENSE")
    assert "'LICENSE', which is a link" in refusal(folder, public), "in a circle"


@pytest.mark.slow
def test_every_byte_of_every_file_counts(published: dict[str, bytes], public: Path, tmp_path: Path) -> None:
    folder, signer = written(tmp_path / "model", published), Signer(public)
    check_folder(folder, signer)
    for name, content in published.items():
        for at in range(len(content)):
            for mask in (1, 2, 0x20, 0x80):
                (folder / name).write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
                with pytest.raises(TrustError, match=name.replace(".", r"\.")):
                    check_folder(folder, signer)
        (folder / name).write_bytes(content)
    check_folder(folder, signer)


# -- signatures -------------------------------------------------------------------------------------------------


def test_every_byte_of_a_signature_counts(published: dict[str, bytes], public: Path, tmp_path: Path) -> None:
    content, path = published["model.sig"], tmp_path / "model.sig"
    path.write_bytes(content)
    signing.check_signature(path, Signer(public), "x")
    envelope = content.index(b'"sig"')
    for at in [*range(0, envelope, 97), *range(envelope - 60, len(content), 3)]:
        path.write_bytes(flipped(content, at))
        with pytest.raises(TrustError):
            signing.check_signature(path, Signer(public), "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"keyid":""', '"keyid":"a"'),
        lambda text: text.replace(',"keyid":""', ""),
        lambda text: text.replace('"keyid":""', '"keyid":null'),
        lambda text: re.sub('"hint":"[0-9a-f]*"', '"hint":""', text),
        lambda text: re.sub('"hint":"[0-9a-f]*"', '"hint":null', text),
        lambda text: re.sub('"sig":"([^"]*)"', lambda found: f'"sig":"{other_s(found[1])}"', text),
        lambda text: text.replace('{"mediaType"', '{"more":1,"mediaType"'),
        lambda text: text.replace(",", ", "),
        lambda text: text + "\n",
        lambda text: text.replace('"signatures":[', '"signatures":[{"sig":"AAAA","keyid":""},'),
        lambda text: text.replace('"tlogEntries":[]', '"tlogEntries":[1]'),
        lambda text: text.replace("vnd.in-toto", "vnd.other"),
        lambda text: "[" * 100_000,
        lambda text: "",
        lambda text: "null",
        lambda text: '{"dsseEnvelope":{"signatures":[]}}',
    ],
)
def test_a_signature_has_one_form(
    published: dict[str, bytes], public: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = tmp_path / "model.sig"
    path.write_text(change(published["model.sig"].decode()))
    with pytest.raises(TrustError, match=r"'model\.sig' of 'x' is"):
        signing.check_signature(path, Signer(public), "x")


def other_s(signature: str) -> str:
    """The signature (r, n - s), which verifies where (r, s) does."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

    r, s = decode_dss_signature(base64.b64decode(signature))
    return base64.b64encode(encode_dss_signature(r, signing._CURVES["secp256r1"] - s)).decode()


def test_whatever_key_signs_takes_the_smaller_of_two_signatures(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
        pair, path = ec.generate_private_key(curve), tmp_path / "k.pem"
        path.write_bytes(pair.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        public = pair.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / "k.pub").write_bytes(public)
        for _ in range(4):  # half of them are the larger
            (tmp_path / "model.sig").write_bytes(sign({"a": "0" * 64}, path, "x"))
            assert signing.check_signature(tmp_path / "model.sig", Signer(tmp_path / "k.pub"), "x")


def test_what_the_library_prints_is_no_part_of_the_answer(
    server: FaultyHub, public: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing import verifying

    verify = verifying.Config.verify
    monkeypatch.setattr(verifying.Config, "verify", lambda *args: [print("WARNING"), verify(*args)][1])
    code, out, err = run(capsys, "pull", REPO, "--verify", str(public), "--json")
    assert code == 0 and json.loads(out) and "WARNING" in err


def test_bits_that_base64_passes_over_count_too(key: Path, public: Path, tmp_path: Path) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    path, text = tmp_path / "model.sig", ""
    while '=","keyid"' not in text:  # of 70 to 72 bytes, those of 72 need no filling
        text = sign({"a": "0" * 64}, key, "x").decode()
    at = text.index("=", text.index('"sig":"')) - 1
    path.write_text(text)
    assert signing.check_signature(path, Signer(public), "x")
    path.write_text(text[:at] + alphabet[alphabet.index(text[at]) + 1] + text[at + 1 :])
    with pytest.raises(TrustError):
        signing.check_signature(path, Signer(public), "x")


def test_a_signature_tells_which_key_made_it_and_what_it_covers(
    published: dict[str, bytes], public: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, published) / "model.sig"
    assert key_hint(path) == Signer(public).fingerprint
    signed = read_signature(path, "x")
    assert signed == {
        name: hashlib.sha256(content).hexdigest() for name, content in published.items() if name != "model.sig"
    }


def test_the_library_itself_takes_our_signature(published: dict[str, bytes], public: Path, tmp_path: Path) -> None:
    from model_signing import hashing, verifying

    folder = written(tmp_path / "model", published)
    settings = hashing.Config().set_ignored_paths(paths=[folder / "model.sig"])
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(settings)
    verifier.verify(folder, folder / "model.sig")
    (folder / "LICENSE").write_text("x")
    with pytest.raises(ValueError, match="LICENSE"):
        verifier.verify(folder, folder / "model.sig")


# -- keys -------------------------------------------------------------------------------------------------------


def test_a_new_key_is_its_owners_alone_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "keys", "new", str(tmp_path / "org.pem"), "--json")
    made = json.loads(out)
    assert code == 0 and made["public"] == str(tmp_path / "org.pem.pub") and not made["locked"]
    assert stat.S_IMODE((tmp_path / "org.pem").stat().st_mode) == 0o600
    assert "PRIVATE" not in (tmp_path / "org.pem.pub").read_text()
    code, out, err = run(capsys, "keys", "new", str(tmp_path / "org.pem"))
    assert code == 2 and "a key is never overwritten" in err
    (tmp_path / "org.pem").unlink()
    assert run(capsys, "keys", "new", str(tmp_path / "org.pem"))[0] == 2, "its public half is still there"


@pytest.mark.parametrize("name", [".", "/", "", ".."])
def test_a_folder_is_no_name_for_a_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "keys", "new", name)
    assert code == 2 and "is a folder, no name for a key" in err


@pytest.mark.parametrize("name", ["k.pem", "k.pem.pub"])
def test_a_key_is_written_through_no_link_and_never_by_halves(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{name}' exists"):
        new_key(tmp_path / "k.pem")
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_a_locked_key_wants_its_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_key(tmp_path / "k.pem", "open sesame")
    with pytest.raises(UsageError, match="asks for a passphrase; set MMHUB_KEY_PASSPHRASE"):
        sign({"a": "0" * 64}, tmp_path / "k.pem", "x")
    with pytest.raises(UsageError, match="the passphrase may be wrong"):
        sign({"a": "0" * 64}, tmp_path / "k.pem", "x", "shut")
    monkeypatch.setenv(PASSPHRASE, "open sesame")
    (tmp_path / "model.sig").write_bytes(sign({"a": "0" * 64}, tmp_path / "k.pem", "x"))
    assert signing.check_signature(tmp_path / "model.sig", Signer(tmp_path / "k.pem.pub"), "x") == {"a": "0" * 64}


def test_what_is_no_key_is_said_to_be_none(key: Path, public: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pub").write_text("hello")
    with pytest.raises(UsageError, match="is no public key on a NIST curve"):
        read_signer(tmp_path / "x.pub")
    with pytest.raises(UsageError, match="is a private key; name the public one beside it"):
        read_signer(key)
    with pytest.raises(NotFoundError, match="cannot be read: No such file"):
        read_signer(tmp_path / "none.pub")
    with pytest.raises(UsageError, match="no private key on a NIST curve"):
        sign({"a": "0" * 64}, public, "x")
    with pytest.raises(UsageError, match="names no identity and issuer"):
        read_signer("sigstore:me@example.org")


def test_without_the_library_it_is_said_what_to_install(
    published: dict[str, bytes], public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "find_spec", lambda name: None if name == "OpenSSL" else True)
    with pytest.raises(PluginError, match=r"OpenSSL is missing\); pip install 'mmhub\[signing\]'"):
        check_folder(written(tmp_path / "model", published), Signer(public))


def test_an_identity_signs_through_sigstore(
    published: dict[str, bytes], key: Path, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Sigstore's two entry points replaced: no test reaches the network, so only our side is tried."""
    from model_signing import signing as library
    from model_signing import verifying

    asked: dict[str, Any] = {}

    def as_identity(config: Any, **options: Any) -> Any:
        asked.update(options)
        return config.use_elliptic_key_signer(private_key=key)

    def by_identity(config: Any, *, identity: str, oidc_issuer: str) -> Any:
        asked.update(identity=identity, issuer=oidc_issuer)
        return config.use_elliptic_key_verifier(public_key=public)

    monkeypatch.setattr(library.Config, "use_sigstore_signer", as_identity)
    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", by_identity)
    (tmp_path / "model.sig").write_bytes(sign({"a": "0" * 64}, "sigstore", "x"))
    who = read_signer("sigstore:me@example.org,https://login.example.org")
    assert signing.check_signature(tmp_path / "model.sig", who, "x") == {"a": "0" * 64}
    expected = {"identity": "me@example.org", "issuer": "https://login.example.org"}
    assert asked == {"use_ambient_credentials": True} | expected

    def out_of_reach(config: Any, **options: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(library.Config, "use_sigstore_signer", out_of_reach)
    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", out_of_reach)
    with pytest.raises(NetworkError, match="Sigstore did not sign: no route to host"):
        sign({"a": "0" * 64}, "sigstore", "x")
    with pytest.raises(NetworkError, match="whom Sigstore trusts is not known"):
        signing.check_signature(tmp_path / "model.sig", who, "x")


# -- publishing -------------------------------------------------------------------------------------------------


def test_a_push_signs_all_that_the_repository_then_holds(
    hub: str, small: Path, key: Path, public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["push", str(small), REPO, "--license", "mit", "--sign", str(key), "--json"]
    code, out, err = run(capsys, *told, "--dry-run")
    assert code == 0 and sorted(json.loads(out)["files"]) == FILES, err
    code, out, err = run(capsys, *told)
    assert code == 0 and json.loads(out)["signed"], err
    assert len(HfApi(endpoint=hub, token=False).list_repo_commits(REPO)) == 2, "the empty one, and all of it in one"
    code, out, err = run(capsys, "pull", REPO, "--verify", str(public), "--json")
    assert code == 0 and sorted(json.loads(out)["files"]) == FILES, err
    code, out, err = run(capsys, *told)
    assert code == 0 and not json.loads(out)["changed"], "what is signed already is not signed again"
    code, out, err = run(capsys, "push", str(small), REPO, "--license", "mit")
    assert code == 0 and "it is no longer signed: the signature was of the older version" in err
    assert run(capsys, "pull", REPO, "--verify", str(public))[0] == 5
    assert run(capsys, "pull", REPO)[0] == 0


def test_a_pulled_signature_is_not_published_for_something_else(
    hub: str, published: dict[str, bytes], tmp_path: Path, public: Path
) -> None:
    folder = written(tmp_path / "model", published)
    assert "model.sig" not in push(folder, REPO, license="mit").files
    assert "holds no 'model.sig'" in refusal(REPO, public)


@pytest.mark.slow
def test_what_is_not_here_is_not_signed(hub: str, small: Path, key: Path) -> None:
    push(small, REPO, license="mit")
    api = HfApi(endpoint=hub, token=False)
    api.create_commit(REPO, [CommitOperationAdd("notes.txt", b"by hand")], commit_message="more")
    with pytest.raises(UsageError, match=r"also holds notes\.txt, which cannot be signed from here"):
        push(small, REPO, license="mit", sign=key)
    assert "model.sig" not in api.list_repo_files(REPO)


def test_a_folder_that_changes_while_it_is_sent_is_reported(
    hub: str, small: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("mmhub.hub.push")
    folder = shutil.copytree(small, tmp_path / "model")
    make = module.make_signature

    def late(*args: Any) -> bytes:
        content: bytes = make(*args)
        (folder / "LICENSE").write_text("Changed.\n")
        return content

    monkeypatch.setattr(module, "make_signature", late)
    with pytest.raises(TrustError, match="was changed while it was signed and sent"):
        push(folder, REPO, license="mit", sign=key)


# -- registries -------------------------------------------------------------------------------------------------


def registry(folder: Path, hub: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "registry.toml").write_text(f"schema = 1\n[hub]\n{hub}\n")


def test_a_registry_asks_for_signatures_of_everything_loaded(
    server: FaultyHub, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_cache: Callable[[], None]
) -> None:
    shutil.copy(public, tmp_path / "org.pub")
    registry(tmp_path, 'require_signed = true\nsigners = { "other/*" = "org.pub" }')
    with pytest.raises(TrustError, match=rf"require_signed, and nobody is named who signs '{REPO}'; add the key"):
        load(REPO)
    registry(tmp_path, 'require_signed = true\nsigners = { "team/*" = "org.pub" }')
    assert load(REPO).predict([{"text": "a thing"}])
    server.files["README.md"] += b"!"
    fresh_cache()
    code, _, err = run(capsys, "predict", REPO, "--text", "a thing")
    assert code == 5 and f"'README.md' of '{REPO}' is not what was signed" in err
    del server.files["model.sig"]
    fresh_cache()
    assert run(capsys, "pull", f"{REPO}#text")[0] == 5


def test_a_signature_is_checked_once(
    server: FaultyHub, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(tmp_path, f'signers = {{ "team/*" = "{public}" }}')
    load(f"{REPO}@{COMMIT}")
    server.log.clear()
    monkeypatch.setattr("mmhub.hub.signed.check_signature", lambda *args: pytest.fail("checked again"))
    assert load(f"{REPO}@{COMMIT}")
    assert server.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(f"{REPO}@{COMMIT}")


def test_a_project_can_ask_for_more_and_never_for_less(
    server: FaultyHub, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_key(tmp_path / "other.pem")
    registry(tmp_path / "user", f'signers = {{ "team/*" = "{other}" }}')
    monkeypatch.setenv("MMHUB_CONFIG", str(tmp_path / "user"))
    registry(tmp_path, f'require_signed = false\nsigners = {{ "*" = "{public}" }}')
    with pytest.raises(TrustError, match=r"no signature by other\.pem\.pub"):
        load(REPO)
    registry(tmp_path / "user", f'require_signed = true\nsigners = {{ "Team/*" = "{public}" }}')
    assert load(REPO), "whatever the case"
    registry(tmp_path / "user", f'require_signed = true\nsigners = {{ "other/*" = "{public}" }}')
    with pytest.raises(TrustError, match=r"user/registry\.toml sets \[hub\] require_signed, and nobody is named"):
        load(REPO)  # whom the project names does not count for the user
    registry(tmp_path / "user", f'signers = {{ "team/*" = "{public}" }}')
    registry(tmp_path, "require_signed = true")
    assert load(REPO), "whom the user names counts for the project"


@pytest.mark.slow
def test_a_push_that_nobody_would_take_is_refused(
    hub: str, small: Path, key: Path, public: Path, tmp_path: Path
) -> None:
    registry(tmp_path, f'signers = {{ "team/*" = "{public}" }}')
    with pytest.raises(TrustError, match=f"asks that '{REPO}' be signed; add --sign KEY"):
        push(small, REPO, license="mit")
    new_key(tmp_path / "other.pem")
    with pytest.raises(TrustError, match=r"is signed by key\.pem\.pub, which this key is not"):
        push(small, REPO, license="mit", sign=tmp_path / "other.pem")
    assert push(small, REPO, license="mit", sign=key).commit
    assert load(REPO)


def test_a_registry_names_its_keys_from_its_own_folder_and_a_missing_one_is_an_error(
    server: FaultyHub, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    registry(tmp_path, 'signers = { "team/*" = "keys/org.pub" }')
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(NotFoundError, match=r"public key '.*keys/org\.pub' cannot be read"):
        load(REPO)
    (tmp_path / "keys").mkdir()
    shutil.copy(public, tmp_path / "keys/org.pub")
    assert load(REPO)


def test_a_signer_of_another_form_is_an_error_in_the_registry(tmp_path: Path) -> None:
    registry(tmp_path, 'signers = { "team/*" = { identity = "me@example.org" } }')
    with pytest.raises(UsageError, match="issuer"):
        mmhub.load(REPO)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(server: FaultyHub, public: Path, cli: Cli) -> None:
    done = cli("pull", REPO, "--verify", public)
    assert done.returncode == 0, done.stderr
    server.files["config.json"] = flipped(server.files["config.json"], 30)
    done = cli("pull", REPO, "--verify", public)
    assert done.returncode == 5 and "config.json" in done.stderr and done.stderr.count("\n") <= 2


def test_every_error_is_ours(server: FaultyHub, public: Path, published: dict[str, bytes]) -> None:
    server.files["config.json"] = b"\xff"
    with pytest.raises(MmhubError):
        pull(REPO, verify=public)
