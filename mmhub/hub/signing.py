"""Sign the files of a published model, and check who signed: the signature is the file `model.sig` beside them.

It is a Sigstore bundle over the SHA-256 of every file (OpenSSF Model Signing 1.0), made and checked by model-signing
with an elliptic curve key, offline, or with a Sigstore identity. Whether a repository or folder holds what was signed
is left to `mmhub.hub.signed`. A signature says who published which files; it does not say that they are the newest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NetworkError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.files import disk_errors
from mmhub.registry import Identity

NAME = "model.sig"
SIGSTORE = "sigstore"  # instead of a key: the identity of whoever is logged in
PASSPHRASE = "MMHUB_KEY_PASSPHRASE"
MAX_BYTES = 16 * 2**20
_MAX_FILES = 100_000
_INSTALL = "pip install 'mmhub[signing]'"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


# -- who signs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    """Whose signature is asked for: the owner of a public key, or an identity that Sigstore vouches for."""

    who: Path | Identity

    def __str__(self) -> str:
        return self.who.name if isinstance(self.who, Path) else self.who.identity

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the key as model-signing says it, or of the identity."""
        if isinstance(self.who, Identity):
            return hashlib.sha256(f"{self.who.issuer}\n{self.who.identity}".encode()).hexdigest()
        return _fingerprint(_read_public_key(self.who))


def read_signer(text: str | os.PathLike[str]) -> Signer:
    """Return whose signature a user asks for: a public key's file, or "sigstore:IDENTITY,ISSUER".

    Raises:
        UsageError: it is neither. NotFoundError: there is no such file.
    """
    name = os.fspath(text)
    if not name.startswith(f"{SIGSTORE}:"):
        path = Path(name).expanduser()
        _read_public_key(path)
        return Signer(path)
    identity, comma, issuer = name.partition(":")[2].partition(",")
    if not comma or not identity or not issuer:
        raise UsageError(f"{name!r} names no identity and issuer", f"write {SIGSTORE}:me@example.org,https://ISSUER")
    return Signer(Identity(identity=identity.strip(), issuer=issuer.strip()))


def _read_public_key(path: Path) -> Any:
    """An elliptic curve key that model-signing takes."""
    _need_library()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read_key_file(path, "public key")
    if b"PRIVATE KEY" in content:
        raise UsageError(f"'{path}' is a private key", f"name the public one beside it, '{path}.pub'")
    try:
        key = load_pem_public_key(content)
    except Exception:  # the library raises what its parser does
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise UsageError(f"'{path}' is no public key on a NIST curve in PEM form", "make a pair: mmhub keys new FILE")
    return key


# Each with its order n: of a signature (r, s), (r, n - s) is another that says the same.
_CURVES = {
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    "secp521r1": int("1ff" + "f" * 63 + "a51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409", 16),
}


def _read_key_file(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(2**16)
    except OSError as error:
        raise NotFoundError(f"the {what} '{path}' cannot be read: {error.strerror}", "check the path") from None


def _fingerprint(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _need_library() -> None:
    """Raise PluginError, with what to install, if model-signing is not here. It takes a second to import."""
    missing = next((one for one in ("model_signing", "OpenSSL", "cryptography") if find_spec(one) is None), None)
    if missing:
        raise PluginError(f"signatures need the packages of mmhub[signing] ({missing} is missing)", _INSTALL)


# -- keys -------------------------------------------------------------------------------------------------------


def new_key(path: Path, passphrase: str = "") -> Path:
    """Write a new private key (P-256) to `path`, for its owner's eyes alone, and the public one to `path`.pub.

    Returns:
        The public key's file.

    Raises:
        UsageError: one of the files exists.
    """
    _need_library()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    if not path.name or path.is_dir():
        raise UsageError(f"'{path}' is a folder, no name for a key", "name a file, such as org.pem")
    public = path.with_name(f"{path.name}.pub")
    key = ec.generate_private_key(ec.SECP256R1())
    locked = form.BestAvailableEncryption(passphrase.encode()) if passphrase else form.NoEncryption()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked)
    shown = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    with disk_errors("the key", path.parent):
        _write_new(public, shown, 0o644)
        try:
            _write_new(path, secret, 0o600)
        except BaseException:
            public.unlink()
            raise
    return public


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that was not there, not even as a link; nothing is left of one that cannot be written whole."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UsageError(f"'{path}' exists, and a key is never overwritten", "name another file") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except BaseException:
        path.unlink()
        raise


def is_locked(path: Path) -> bool:
    """Does a private key ask for a passphrase?"""
    return b"ENCRYPTED" in _read_key_file(path, "private key")


# -- signing ----------------------------------------------------------------------------------------------------


def sign(digests: Mapping[str, str], key: str | os.PathLike[str], name: str, passphrase: str = "") -> bytes:
    """Return the content of a `model.sig` over files: their names and SHA-256.

    `key` is the file of a private key in PEM form, or "sigstore". The passphrase of a locked key may also stand in
    MMHUB_KEY_PASSPHRASE. `name` is the repository that it is published to: in another, the signature is refused.

    Raises:
        UsageError: the key is none, or the passphrase wrong. NotFoundError: there is no such file.
        NetworkError: Sigstore cannot be reached, or does not know who asks.
    """
    _need_library()
    from model_signing.signing import Config

    settings = Config().set_hashing_config(_known_hashes(digests))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        if os.fspath(key) == SIGSTORE:
            _sign_as_identity(settings, name, path)
            return _canonical(json.loads(path.read_bytes()))
        own = Path(key).expanduser()
        with redirect_stdout(sys.stderr):  # the library prints warnings
            _use_key(settings, own, passphrase).sign(name, path)
        return _canonical(_with_low_s(json.loads(path.read_bytes()), _private_key(own, passphrase).curve.name))


def is_signed(content: bytes, digests: Mapping[str, str], key: str, name: str, passphrase: str = "") -> bool:
    """Is a `model.sig` what `sign` would make of the same: by this key, over these files, under this name?

    Raises:
        UsageError, NotFoundError: as `sign`.
    """
    if key == SIGSTORE:
        return False  # who is logged in is known only by asking
    _need_library()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pair = _private_key(Path(key).expanduser(), passphrase)
    with tempfile.TemporaryDirectory() as folder:
        path, public = Path(folder) / NAME, Path(folder) / "public.pem"
        path.write_bytes(content)
        public.write_bytes(pair.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        with suppress(TrustError):
            return check_signature(path, Signer(public), name, repo=name) == dict(digests)
    return False


def _private_key(path: Path, passphrase: str) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    secret = passphrase or os.environ.get(PASSPHRASE, "")
    locked = is_locked(path)
    if locked and not secret:
        raise UsageError(f"the key '{path}' asks for a passphrase", f"set {PASSPHRASE}")
    try:
        key = load_pem_private_key(_read_key_file(path, "private key"), secret.encode() if locked else None)
    except Exception:  # the library raises what its parser does
        key = None
    if getattr(getattr(key, "curve", None), "name", "") not in _CURVES:
        why = "the passphrase may be wrong" if locked else "make a pair: mmhub keys new FILE"
        raise UsageError(f"'{path}' is no private key on a NIST curve that can be read", why)
    return key


def _with_low_s(table: Any, curve: str) -> Any:
    """The bundle with the smaller s of the two signatures that say the same: no other is taken."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

    (signature,) = table["dsseEnvelope"]["signatures"]
    r, s = decode_dss_signature(_decoded(signature["sig"]))
    signature["sig"] = base64.b64encode(encode_dss_signature(r, min(s, _CURVES[curve] - s))).decode()
    return table


def _use_key(settings: Any, path: Path, passphrase: str) -> Any:
    _private_key(path, passphrase)
    secret = passphrase or os.environ.get(PASSPHRASE, "")
    # The library says `str` and passes it on to one that wants bytes.
    return settings.use_elliptic_key_signer(private_key=path, password=secret.encode() if is_locked(path) else None)


def _sign_as_identity(settings: Any, name: str, path: Path) -> None:
    try:
        settings.use_sigstore_signer(use_ambient_credentials=True).sign(name, path)
    except Exception as error:  # of several libraries: network, login, time stamps
        what = f"Sigstore did not sign: {_first_line(error)}"
        raise NetworkError(what, "it needs a network and a login; a key needs neither") from None


def _known_hashes(digests: Mapping[str, str]) -> Any:
    """A manifest of files whose hashes are known: the library need not read them, nor decide which files count."""
    from model_signing.hashing import Config
    from model_signing.manifest import Manifest, SerializationType, hashing

    method = SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
    items = [method.new_item(name, hashing.Digest("sha256", bytes.fromhex(one))) for name, one in digests.items()]

    class Known(Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return Manifest(os.fspath(model_path), items, method)

    return Known()


# -- checking ---------------------------------------------------------------------------------------------------


def check_signature(path: Path, signer: Signer, where: str, *, repo: str = "") -> dict[str, str]:
    """Return the files that `signer` signed, {name: SHA-256}, from the `model.sig` at `path`; `where` is the model.

    `repo` is the name that they must have been signed as, for a server could deliver another of the signer's models.

    Raises:
        TrustError: it is damaged, somebody else's, or of another model. NetworkError: Sigstore's list of keys cannot
        be fetched.
    """
    _need_library()
    from model_signing.verifying import Config

    statement, digests = _read(path, where)
    settings = Config().set_hashing_config(_known_hashes(digests))
    if isinstance(signer.who, Identity):
        settings = _use_identity(settings, signer.who)
    else:
        if not _has_our_form(path, _read_public_key(signer.who)):
            raise TrustError(f"the '{NAME}' of '{where}' is no signature by {signer}", _FORGED)
        settings = settings.use_elliptic_key_verifier(public_key=signer.who)
    try:
        # What we read is given as what is there: so the library's reading of the signed bytes must be the same.
        with redirect_stdout(sys.stderr):  # the library prints warnings
            settings.verify(Path(where), path)
    except Exception:  # the library raises what its parsers do
        raise TrustError(f"the '{NAME}' of '{where}' is no signature by {signer}", _FORGED) from None
    name = _name_in(statement)
    if repo and name.casefold() != repo.casefold():
        what = f"'{repo}' holds what {signer} signed as {name!r}"
        raise TrustError(what, "use that one; or, if it was moved, ask its owner to sign it anew")
    return digests


def _has_our_form(path: Path, key: Any) -> bool:
    """Does it name this key, and is it the one of the signatures that verify which we write?"""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

    table = json.loads(path.read_bytes())
    try:
        hint = table["verificationMaterial"]["publicKey"]["hint"]
        (signature,) = table["dsseEnvelope"]["signatures"]
        content = _decoded(signature["sig"])
        r, s = decode_dss_signature(content)
        same = hint == _fingerprint(key) and encode_dss_signature(r, s) == content and signature["keyid"] == ""
        return same and s <= _CURVES[key.curve.name] // 2
    except (KeyError, ValueError, TypeError):
        return False


_FORGED = "do not use it; ask its owner which key signs, or to publish it again"


def _use_identity(settings: Any, who: Identity) -> Any:
    try:
        return settings.use_sigstore_verifier(identity=who.identity, oidc_issuer=who.issuer)
    except Exception as error:  # of several libraries
        what = f"whom Sigstore trusts is not known: {_first_line(error)}"
        raise NetworkError(what, "it needs a network; a key needs none") from None


def read_signature(path: Path, where: str) -> dict[str, str]:
    """Return the files that a `model.sig` names, without a check of who signed it.

    Every byte counts: a bundle has one form, so that none can be changed without a difference being seen.

    Raises:
        TrustError: it has another form.
    """
    return _read(path, where)[1]


def signed_name(path: Path, where: str) -> str:
    """Return what a `model.sig` calls its model: the repository that it was published to.

    Raises:
        TrustError: as `read_signature`.
    """
    return _name_in(_read(path, where)[0])


def _name_in(statement: Mapping[str, Any]) -> str:
    return str(statement["subject"][0]["name"])


def _read(path: Path, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The statement that is signed, and its files."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        statement = json.loads(_payload(content))
        _name_in(statement)
        return statement, _digests(statement)
    except OSError as error:
        raise MmhubError(f"cannot read '{path}': {error.strerror}", "check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise TrustError(f"the '{NAME}' of '{where}' is damaged, or no signature that mmhub reads", _FORGED) from None


def key_hint(path: Path) -> str:
    """Return the fingerprint of the key that a `model.sig` says it was made with, '' for an identity or none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with path.open("rb") as file:
            hint = json.loads(file.read(MAX_BYTES))["verificationMaterial"]["publicKey"]["hint"]
        return hint if isinstance(hint, str) and re.fullmatch("[0-9a-f]{64}", hint) else ""
    return ""


def _payload(content: bytes) -> bytes:
    """What is signed. Any of these errors means that the file is not what model-signing writes."""
    table = json.loads(content)
    if len(content) > MAX_BYTES or _canonical(table) != content:
        raise ValueError("it is too long, or written in another way")
    material, envelope = table["verificationMaterial"], table["dsseEnvelope"]
    (signature,) = envelope["signatures"]
    if set(table) != {"mediaType", "verificationMaterial", "dsseEnvelope"} or set(envelope) != {
        *("payload", "payloadType", "signatures")
    }:
        raise ValueError("it has other fields")
    if "publicKey" in material and material != {
        "publicKey": {"hint": material["publicKey"]["hint"]},
        "tlogEntries": [],
    }:
        raise ValueError("it says more about the key")
    if set(signature) - {"keyid"} != {"sig"} or signature.get("keyid") not in (None, ""):
        raise ValueError("it says more about the signature")
    _decoded(signature["sig"])
    return _decoded(envelope["payload"])


def _canonical(table: Any) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()


def _decoded(text: str) -> bytes:
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("its last bits say nothing")
    return content


def _digests(statement: Mapping[str, Any]) -> dict[str, str]:
    predicate = statement["predicate"]
    method = predicate["serialization"]
    found = {one["name"]: one["digest"] for one in predicate["resources"]}
    whole = statement["_type"] == _STATEMENT and statement["predicateType"] == _PREDICATE
    if not whole or method["method"] != "files" or method["hash_type"] != "sha256":
        raise ValueError("it signs something else than whole files")
    if len(found) != len(predicate["resources"]) or not 0 < len(found) <= _MAX_FILES:
        raise ValueError("it names a file twice, or none")
    for one in predicate["resources"]:
        if one["algorithm"] != "sha256" or not re.fullmatch("[0-9a-f]{64}", one["digest"]) or not _is_name(one["name"]):
            raise ValueError("it names no file and hash")
    return found


def _is_name(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/")) and name != NAME


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
