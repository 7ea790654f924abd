"""Does a repository, a snapshot of the cache or a folder hold exactly what was signed?

`mmhub.hub.signing` says what was signed by whom. Here it is compared with what is there: every file that mmhub could
load must be signed and equal, and every signed file be there. Of a repository that is asked before anything but its
configuration is used, and of the files once more when they have arrived.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmhub.errors import TrustError
from mmhub.hashes import facts_of, remember, sha256_of
from mmhub.hub.client import hub_errors, is_offline
from mmhub.hub.download import Place, Remote, check_names, fetch, list_files
from mmhub.hub.signing import MAX_BYTES, NAME, Signer, check_signature, read_signature
from mmhub.registry import read_registries

GIT = ".gitattributes"  # a Hub makes and changes it; it says what git does, and mmhub never fetches it
_AGAIN = "do not use it; fetch it again, and if that does not help, tell its owner"
_UNSIGNED = "ask its owner to publish it with `mmhub push --sign`"


@dataclass(frozen=True)
class Signed:
    """What was signed, {name: SHA-256}, of the model that messages call `where`.

    `others` are files beside it that nobody signed and that are never fetched.
    """

    where: str
    digests: Mapping[str, str]
    others: tuple[str, ...] = ()
    fresh: bool = False

    def check(self, folder: Path, names: Iterable[str]) -> None:
        """Compare files with what was signed; with `fresh`, read each anew.

        Raises:
            TrustError: one differs, was not signed, or is not there.
        """
        for name in sorted(set(names) - {NAME}):
            if name not in self.digests:
                raise unsigned(self.where, name)
            try:
                found = sha256_of(folder / name, fresh=self.fresh)
            except OSError:
                raise _absent(self.where, name) from None
            if found != self.digests[name]:
                raise TrustError(f"'{name}' of '{self.where}' is not what was signed", _AGAIN)

    def check_all(self, folder: Path, names: Collection[str]) -> None:
        """Compare files as `check` does; none of those that were signed may be missing among them."""
        missing = sorted(set(self.digests) - set(names))
        if missing:
            raise _absent(self.where, missing[0])
        self.check(folder, names)


def unsigned(where: str, name: str) -> TrustError:
    """The error for a file that nobody signed."""
    return TrustError(f"'{where}' holds {name!r}, which is not among the signed files", _AGAIN)


def _absent(where: str, name: str) -> TrustError:
    return TrustError(f"'{where}' lacks '{name}', which was signed", _AGAIN)


def signers_of(repo: str, asked: Signer | None = None) -> list[Signer]:
    """Return whose signatures a Hub repository must have: those that registries name, and the one asked for.

    Raises:
        TrustError: a registry wants signatures, and nobody is named.
    """
    if asked is None:
        return [Signer(who) for who in read_registries().signers(repo)]
    try:
        named = read_registries().signers(repo)
    except TrustError:  # a signature is required, and here is whose
        named = []
    return [asked, *map(Signer, named)]


def check_sender(repo: str, signature: bytes) -> None:
    """Refuse to publish a signature that nobody here would take.

    Raises:
        TrustError: a registry names somebody else.
    """
    signers = signers_of(repo) if any(file.hub.signers for file in read_registries().files) else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        path.write_bytes(signature)
        for signer in signers:
            try:
                check_signature(path, signer, repo)
            except TrustError:
                what = f"a registry.toml says that '{repo}' is signed by {signer}, which this key is not"
                raise TrustError(what, "sign with that key; nothing was sent") from None


def check_folder(folder: Path, signer: Signer) -> Signed:
    """Check a folder of one's own, whatever is in it: a file that was not signed is refused under any name.

    Raises:
        TrustError: see `Signed.check`; or there is no signature, or a link.
    """
    where, path = str(folder), folder / NAME
    if not path.is_file():
        raise TrustError(f"'{where}' is not signed: it holds no '{NAME}'", _UNSIGNED)
    names = _walk(folder)
    signed = Signed(where, check_signature(path, signer, where), fresh=True)
    signed.check_all(folder, [name for name in names if name not in (NAME, GIT) or name in signed.digests])
    return signed


def _walk(folder: Path) -> list[str]:
    """Every file below `folder`; no link is followed, but those of the Hugging Face cache into its blobs."""
    found = []
    for place, folders, files in os.walk(folder):
        for name in (*files, *(one for one in folders if (Path(place) / one).is_symlink())):
            path = Path(place) / name
            if not path.is_file() or (path.is_symlink() and not is_cached(path, folder)):
                what = f"'{folder}' holds '{path.relative_to(folder).as_posix()}', which is a link or no file"
                raise TrustError(what, "replace it by the file itself")
            found.append(path.relative_to(folder).as_posix())
    return found


def is_cached(path: Path, folder: Path) -> bool:
    """Is this link of a snapshot `folder` in the Hugging Face cache one into its own repository's blobs?"""
    try:
        return path.resolve().parent == folder.resolve().parent.parent / "blobs"
    except (OSError, RuntimeError):  # a link in a circle
        return False


# -- a repository -----------------------------------------------------------------------------------------------


def check_repo(
    place: Place, commit: str, signers: Sequence[Signer], is_known: Callable[[str], bool], *, fresh: bool = False
) -> Signed:
    """Check the signature of a commit, the server's list of its files, and, fetching them, all small ones.

    `is_known` tells the names that mmhub would fetch. Signatures that were checked before are not checked again, unless
    `fresh` asks for it: one of a commit costs nothing when the commit is loaded the second time.

    Raises:
        TrustError: it is not signed by every one of the `signers` and under this repository's name, or not what they
        signed.
        NetworkError: the Hub cannot be asked, and this commit was not checked before.
    """
    folder = place.snapshot(commit)
    path, facts = folder / NAME, [f"signed {place.repo}@{commit} {one.fingerprint}" for one in signers]
    if path.is_file() and (is_offline() or not fresh) and all(map(facts_of(path).get, facts)):
        return Signed(place.repo, read_signature(path, place.repo), fresh=fresh)
    if is_offline():
        return _check_cached(place.repo, folder, signers, is_known, fresh)
    with hub_errors(place.repo, commit):
        listed = list_files(place.repo, commit)
        if NAME not in listed:
            raise TrustError(f"'{place.repo}' at {commit[:12]} is not signed: it holds no '{NAME}'", _UNSIGNED)
        if listed[NAME].size > MAX_BYTES:
            raise TrustError(f"the '{NAME}' of '{place.repo}' has {listed[NAME].size:,} bytes", _AGAIN)
        fetch(place, commit, [listed[NAME]])
        digests = _signed_by_all(path, signers, place.repo)
        signed = _compare(place.repo, listed, digests, is_known, fresh)
        small = [listed[name] for name in digests if is_known(name) and len(listed[name].hash) == 40]
        check_names(place.repo, [one.path for one in small], listed)
        fetch(place, commit, small)
    signed.check(folder, [one.path for one in small])
    remember(path, dict.fromkeys(facts, True), written_by_us=True)
    return signed


def _signed_by_all(path: Path, signers: Sequence[Signer], where: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    for signer in signers:
        digests = check_signature(path, signer, where, repo=where)
    return digests


def _compare(
    repo: str, listed: Mapping[str, Remote], digests: Mapping[str, str], is_known: Callable[[str], bool], fresh: bool
) -> Signed:
    """Hold the server's list against what was signed: a difference shows before the file itself is fetched."""
    for name, digest in digests.items():
        if name not in listed:
            raise _absent(repo, name)
        if len(listed[name].hash) == 64 and listed[name].hash != digest:
            raise TrustError(f"'{name}' of '{repo}' is not what was signed", _AGAIN)
    more = sorted(set(listed) - set(digests) - {NAME, GIT})
    known = [name for name in more if is_known(name)]
    if known:
        raise unsigned(repo, known[0])
    return Signed(repo, digests, tuple(more), fresh)


def _check_cached(
    repo: str, folder: Path, signers: Sequence[Signer], is_known: Callable[[str], bool], fresh: bool
) -> Signed:
    """Without the Hub, what was signed is compared with the copy alone."""
    path = folder / NAME
    if not path.is_file():
        raise TrustError(f"the cached copy of '{repo}' is not signed, and HF_HUB_OFFLINE is set", "pull it when online")
    signed = Signed(repo, _signed_by_all(path, signers, repo), fresh=fresh)
    names = (one.relative_to(folder).as_posix() for one in folder.rglob("*") if not one.is_dir())
    signed.check(folder, filter(is_known, names))
    return signed


__all__ = ["GIT", "Signed", "check_folder", "check_repo", "check_sender", "is_cached", "signers_of", "unsigned"]
