"""Files from a Hub into the Hugging Face cache: resumed after a kill, given up when nothing comes, verified first.

huggingface_hub checks sizes only, starts a killed download anew, and waits for ever on a server that trickles. This
keeps its cache layout (blobs, snapshots, refs, locks), so that its tools see the files, and its client for everything
else. A file is fetched by one process at a time into `blobs/<hash>.incomplete`, hashed on the way, and becomes visible
only when it is what the server's own listing says. Plain HTTP, also for files that the Hub stores in Xet.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from mmhub.errors import MmhubError, NetworkError, TrustError
from mmhub.files import disk_errors
from mmhub.hashes import git_hasher, remember
from mmhub.hub.client import cache_dir, endpoint, request_address, request_headers
from mmhub.hub.integrity import check_blob

MIN_BYTES = 64 * 2**10  # what must arrive within `patience` seconds: about 1 kB/s
FIRST_WAIT = 1.0  # seconds before the first retry; doubled up to 8
AT_ONCE = 4  # files fetched at the same time
_LOOK_AGAIN = 0.5  # seconds between looks for an interrupt while another process has a file
_MAX_LISTED = 100_000  # files
_MAX_PAGE = 32 * 2**20  # bytes
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
T = TypeVar("T")


def patience() -> float:
    """Seconds without progress, retries included, after which a server is given up: 6 x HF_HUB_DOWNLOAD_TIMEOUT."""
    from huggingface_hub import constants

    return 6.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT


@dataclass(frozen=True)
class Remote:
    """A file as the server lists it; `hash` is its SHA-256 or, of a small file, git's SHA-1."""

    path: str
    size: int
    hash: str


@dataclass(frozen=True)
class Place:
    """Where a repository's files are kept, laid out as in the Hugging Face cache."""

    repo: str
    folder: Path
    locks: Path

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit.

        Raises:
            TrustError: it is no commit's hash, and so may be a path.
        """
        return self.folder / "snapshots" / check_commit(self.repo, commit)

    def blob(self, remote: Remote) -> Path:
        """Return the file that holds the content.

        Raises:
            TrustError: it has no usable name or hash. MmhubError: the server gave no hash.
        """
        check_record(self.repo, remote)
        return self.folder / "blobs" / remote.hash

    def point(self, commit: str, remote: Remote) -> Path:
        """Make the file visible in the snapshot of `commit`."""
        link = self.snapshot(commit) / remote.path
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = self.blob(remote)
        target = os.path.relpath(blob, link.parent)
        if link.is_symlink() and os.readlink(link) == target:
            return link
        aside = link.with_name(f".{link.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            aside.symlink_to(target)
        except OSError:  # a system without symbolic links
            shutil.copyfile(blob, aside)
        os.replace(aside, link)
        return link

    def name_commit(self, revision: str, commit: str) -> None:
        """Record what a branch or tag means now, for when the Hub cannot be reached."""
        if revision == commit:
            return
        ref = self.folder / "refs" / revision
        if (self.folder / "refs").resolve() not in ref.resolve().parents:
            return
        with suppress(OSError):  # a cache that may only be read is of use all the same
            if not ref.is_file() or ref.read_text() != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                aside = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
                aside.write_text(commit)
                os.replace(aside, ref)


def in_cache(repo: str) -> Place:
    """Return the repository's place in the Hugging Face cache of this endpoint."""
    name = "models--" + repo.replace("/", "--")
    return Place(repo, cache_dir() / name, cache_dir() / ".locks" / name)


def beside(repo: str, target: Path) -> Place:
    """Return a place for what is on its way into the folder `target`, kept if the download is killed."""
    folder = target.with_name(f".{target.name}.partial")
    return Place(repo, folder, folder / "locks")


# -- what the server says ---------------------------------------------------------------------------------------


def check_commit(repo: str, commit: Any, asked: str | None = None) -> str:
    """Return the commit that a server names.

    Raises:
        TrustError: it is no commit's hash, or another than was asked for.
    """
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise TrustError(f"{endpoint()} gives '{repo}' the commit {_short(commit)}, which is none", _ODD_ANSWER)
    if asked and _COMMIT.fullmatch(asked) and asked != commit:
        raise TrustError(f"{endpoint()} was asked for '{repo}' at {asked} and answered with {commit}")
    return commit


def check_record(repo: str, remote: Remote) -> None:
    """Refuse the record of a file whose name or hash would lead out of its folder.

    Raises:
        TrustError: it would. MmhubError: there is no hash.
    """
    at = f"'{repo}' at {endpoint()}"
    problem = (_name_problem(remote.path) or _unwritable(remote.path)) if isinstance(remote.path, str) else "no text"
    if problem:
        raise TrustError(f"{at} lists the file {_short(remote.path)}, {problem}", _HOSTILE)
    if not remote.hash:
        raise MmhubError(f"{at} gives {_short(remote.path)} no hash, as a Hugging Face Hub does", _ODD_ANSWER)
    if not isinstance(remote.hash, str) or not _HASH.fullmatch(remote.hash):
        raise TrustError(f"{at} gives {_short(remote.path)} no usable hash", _HOSTILE)
    if not isinstance(remote.size, int) or remote.size < 0:
        raise TrustError(f"{at} gives {_short(remote.path)} no usable size", _HOSTILE)


def find_file(repo: str, path: str, revision: str, *, hurry: bool = False) -> tuple[str, Remote]:
    """Ask for the commit that `revision` means now and the record of one of its files.

    `hurry` gives up at the first failure, because there is a copy to fall back on.
    """
    from huggingface_hub import constants, get_hf_file_metadata

    url = _address(repo, path, revision)
    options: dict[str, Any] = {"headers": request_headers(), "token": False, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
    found = _ask(lambda: get_hf_file_metadata(url, **options), hurry=hurry)
    if not _COMMIT.fullmatch(found.commit_hash or "") or not _HASH.fullmatch(found.etag or "") or found.size is None:
        raise MmhubError(
            f"{endpoint()} does not answer as a Hugging Face Hub does: no commit, hash or size for '{repo}/{path}'",
            _ODD_ANSWER,
        )
    return check_commit(repo, found.commit_hash, asked=revision), Remote(path, found.size, found.etag)


def list_files(repo: str, commit: str, *, hurry: bool = False) -> dict[str, Remote]:
    """Ask for the record of every file of a commit; `hurry` as in `find_file`.

    Raises:
        TrustError: the listing holds a name that no honest repository has.
    """

    files = {}
    for entry in _ask(lambda: _entries(repo, commit), hurry=hurry):
        problem = _name_problem(entry.path)
        if problem:
            raise TrustError(f"'{repo}' at {endpoint()} lists the file {_short(entry.path)}, {problem}", _HOSTILE)
        if entry.type == "file":
            large = entry.lfs
            files[entry.path] = Remote(
                entry.path, large.size if large else entry.size, large.oid if large else entry.oid
            )
            if not _HASH.fullmatch(files[entry.path].hash):
                raise TrustError(f"'{repo}' at {endpoint()} gives {_short(entry.path)} no usable hash", _HOSTILE)
    return files


class _Large(msgspec.Struct):
    oid: str
    size: int


class _Entry(msgspec.Struct):
    type: str
    path: str
    oid: str = ""
    size: int = 0
    lfs: _Large | None = None


def _entries(repo: str, commit: str) -> list[_Entry]:
    """All pages of the listing, within a limit of size and time."""
    found: list[_Entry] = []
    end = time.monotonic() + patience()
    address: str | None = f"{request_address()}/api/models/{repo}/tree/{commit}?recursive=true"
    while address:
        content, address = _get_page(address, end)
        try:
            found += msgspec.json.decode(content, type=list[_Entry])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            what = f"{endpoint()} does not list '{repo}' as a Hugging Face Hub does: {error}"
            raise MmhubError(what, _ODD_ANSWER) from None
        if len(found) > _MAX_LISTED:
            raise TrustError(f"'{repo}' at {endpoint()} lists more than {_MAX_LISTED:,} files", _HOSTILE)
    return found


def _get_page(address: str, end: float) -> tuple[bytes, str | None]:
    """One page, and the address of the next: always at our own endpoint, for the token goes along."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    content = b""
    with get_session().stream(
        "GET", address, headers=request_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            content += block
            if len(content) > _MAX_PAGE or time.monotonic() > end:
                raise NetworkError(f"{endpoint()} did not answer: its listing does not end", "try again later")
        following = response.links.get("next", {}).get("url")
    if not following:
        return content, None
    there = urlsplit(following)
    return content, urlsplit(address)._replace(path=there.path, query=there.query).geturl()


REPUBLISH = "ask its owner to publish it again"
_ODD_ANSWER = "check HF_ENDPOINT, and whether a proxy changes answers"
_HOSTILE = "do not use this repository; tell its owner or the Hub"


def _name_problem(name: str) -> str | None:
    """Say why a name in a listing is dangerous; names that are merely unwanted are just not fetched."""
    parts = name.split("/")
    if "\\" in name or name.startswith(("/", "~")) or re.match("[A-Za-z]:", name) or ".." in parts or "" in parts:
        return "whose name points out of its folder"
    if any(part.casefold() == ".git" for part in parts):
        return "which belongs to git"
    return None


def _unwritable(name: str) -> str | None:
    """Say why a name is not to be written or shown. What people type (no-break spaces, emoji) may be listed."""
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in name):
        return "whose name holds control characters"
    if len(name) > 200:
        return f"whose name has {len(name)} characters"
    return None


def check_names(repo: str, wanted: Iterable[str], listed: Iterable[str]) -> None:
    """Refuse files that cannot all exist side by side on every system."""
    places: dict[str, str] = {}
    folders = {"/".join(name.split("/")[:n]).casefold() for name in listed for n in range(1, name.count("/") + 1)}
    for name in wanted:
        other = places.setdefault(name.casefold(), name)
        if other != name:
            raise TrustError(f"'{repo}' holds both {other!r} and {name!r}, which many systems take for one", _HOSTILE)
        if name.casefold() in folders:
            raise TrustError(f"'{repo}' holds {name!r} both as a file and as a folder", _HOSTILE)
        if problem := _unwritable(name):
            raise TrustError(f"'{repo}' holds the file {_short(name)}, {problem}", _HOSTILE)


def _short(name: Any) -> str:
    """What a server says, as one line that acts on no terminal."""
    text = name if isinstance(name, str) else repr(name)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _address(repo: str, path: str, revision: str) -> str:
    return f"{request_address()}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"


# -- patience ---------------------------------------------------------------------------------------------------


@dataclass
class _Pace:
    """Give up on a server that brings less than MIN_BYTES in `limit` seconds, whatever the reason."""

    what: str
    limit: float = field(default_factory=patience)
    since: float = field(default_factory=time.monotonic)
    gained: int = 0
    wait: float = field(default_factory=lambda: FIRST_WAIT)

    def arrived(self, count: int) -> None:
        self.gained += count
        if self.gained >= MIN_BYTES:
            self.gained, self.since, self.wait = 0, time.monotonic(), FIRST_WAIT
        elif time.monotonic() - self.since > self.limit:
            raise self.too_slow()

    def rest(self, error: Exception) -> None:
        """Wait before another try, or raise what to tell the user."""
        asked = _retry_after(error)
        pause = self.wait if asked is None else asked
        if time.monotonic() + pause - self.since > self.limit:
            if asked is not None and asked > self.limit:
                raise NetworkError(f"{endpoint()} asks to come back in {asked:.0f} s", "try again then") from None
            if _status(error):
                raise error
            raise self.too_slow() from None
        time.sleep(pause)
        self.wait = min(self.wait * 2, 8.0)

    def too_slow(self) -> NetworkError:
        hint = "try again: what arrived is kept; HF_HUB_DOWNLOAD_TIMEOUT=60 (seconds) waits longer"
        return NetworkError(f"{endpoint()} stalled: too little of {self.what} came in {self.limit:.0f} s", hint)


def _ask(action: Callable[[], T], *, hurry: bool = False) -> T:
    """Call the client, again after passing failures, within `patience`."""
    pace = _Pace("an answer")
    while True:
        try:
            return _within(max(pace.limit - (time.monotonic() - pace.since), 1.0), action)
        except Exception as error:
            if hurry or not _is_passing(error):
                raise
            pace.rest(error)


def _within(seconds: float, action: Callable[[], T]) -> T:
    """Call `action`, for no longer than this: the client's own timeout starts anew with every byte that comes."""
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise NetworkError(f"{endpoint()} did not answer in {seconds:.0f} s", "try again later, or check HF_ENDPOINT")
    return answer[0]


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_passing(error: Exception) -> bool:
    """May the same request succeed a little later? Nobody listening is not such a case."""
    status = _status(error)
    if status:
        return status in (408, 429) or status >= 500
    kinds = {kind.__name__ for kind in type(error).__mro__}
    final = kinds & {"ConnectError", "ProxyError", "UnsupportedProtocol"}
    return bool(kinds & {"TransportError", _CutShort.__name__}) and not final


def _retry_after(error: Exception) -> float | None:
    from email.utils import parsedate_to_datetime

    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0) if text else None
    except ValueError:
        return None


# -- fetching ---------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


def fetch(place: Place, commit: str, files: Iterable[Remote], hashes: Mapping[str, str] | None = None) -> None:
    """Make files of a commit available in its snapshot, each verified; small ones first.

    `hashes` says what SHA-256 files must have besides what the server says.

    Raises:
        TrustError: what arrives is not what the server lists, also a second time, or not what `hashes` asks for.
        NetworkError: the server was given up; what arrived is kept and the next call goes on from there.
    """
    todo = list(files)
    place.snapshot(commit)
    for remote in todo:
        check_record(place.repo, remote)
    stop, told = threading.Event(), threading.Event()
    with disk_errors("the model", place.folder):
        (place.folder / "blobs").mkdir(parents=True, exist_ok=True)
        place.locks.mkdir(parents=True, exist_ok=True)
        _check_space(place, todo)
        with closing(_progress(place, sum(remote.size for remote in todo))) as bar:

            def one(remote: Remote) -> None:
                _fetch_one(_Fetch(place, commit, remote, bar.update, stop, told), (hashes or {}).get(remote.path))
                place.point(commit, remote)

            for small in (True, False):  # a fault in a small file shows before the weights cost anything
                _all_of(one, [remote for remote in todo if (remote.size <= 2**20) is small], stop)


def _all_of(work: Callable[[Remote], None], files: list[Remote], stop: threading.Event) -> None:
    """Do the work for several files at once; the first failure ends the others."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        tasks = [pool.submit(work, remote) for remote in files]
        wait(tasks, return_when=FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in tasks):
            stop.set()
            wait([task for task in tasks if not task.cancel()])
        failures = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        for error in sorted(failures, key=lambda error: isinstance(error, _Stopped)):
            raise error
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_space(place: Place, files: list[Remote]) -> None:
    import errno

    missing = sum(remote.size for remote in files if not place.blob(remote).exists())
    kept = sum(map(_bytes_in, (place.folder / "blobs").glob("*.incomplete")))
    free = shutil.disk_usage(place.folder).free
    if missing - kept > free:
        raise OSError(errno.ENOSPC, f"{missing - kept:,} bytes are needed and {free:,} are free", str(place.folder))


def _bytes_in(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has just completed it
        return 0


def _progress(place: Place, total: int) -> Any:
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm

    silent = not sys.stderr.isatty() or are_progress_bars_disabled()
    return tqdm(total=total, desc=place.repo, unit="B", unit_scale=True, disable=silent)


@dataclass(frozen=True)
class _Fetch:
    """One file on its way."""

    place: Place
    commit: str
    remote: Remote
    advance: Callable[[int], Any]
    stop: threading.Event
    told: threading.Event  # that another process is waited for

    @property
    def partial(self) -> Path:
        return self.place.blob(self.remote).with_name(f"{self.remote.hash}.incomplete")


def _fetch_one(job: _Fetch, sha256: str | None) -> None:
    blob = job.place.blob(job.remote)
    with _lock(job):
        if blob.exists() and check_blob(blob):  # fetched by another process, or for another commit
            job.advance(job.remote.size)
        else:
            hashes = _download(job)
            os.replace(job.partial, blob)
            remember(blob, hashes, written_by_us=True)
    if sha256 is not None:
        from mmhub.hashes import sha256_of

        found = sha256_of(blob)
        if found != sha256:
            raise contradiction(job.place.repo, job.remote.path, sha256, found)


@contextmanager
def _lock(job: _Fetch) -> Iterator[None]:
    """Hold the file's lock. While another process does, an interrupt is looked for, and the user told once."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    path = job.place.locks / f"{job.remote.hash}.lock"
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=_LOOK_AGAIN))
                break
            except Timeout:
                if job.stop.is_set():
                    raise _Stopped from None
            if not job.told.is_set():
                job.told.set()
                what = f"{job.place.repo}/{job.remote.path}"
                print(f"waiting: another process is fetching '{what}'", file=sys.stderr, flush=True)
        yield


def contradiction(repo: str, path: str, config: str, server: str) -> TrustError:
    """The error for a file about which config.json and the server disagree."""
    what = f"config.json gives '{path}' the sha256 {config[:12]}..., the server delivers {server[:12]}..."
    return TrustError(f"'{repo}' at {endpoint()} contradicts itself: {what}", REPUBLISH)


def _download(job: _Fetch) -> dict[str, str]:
    """Complete the partial file and return its hashes; one that turns out wrong is fetched once more, from zero."""
    for last in (False, True):
        found, size = _complete(job)
        if size == job.remote.size and job.remote.hash in found.values():
            return found
        job.partial.unlink(missing_ok=True)
        job.advance(-min(size, job.remote.size))
        if last:
            raise TrustError(
                f"{endpoint()} delivers '{job.place.repo}/{job.remote.path}' damaged, twice: its hash is not the listed"
                f" {job.remote.hash[:12]}...",
                "try again later, or tell the repository's owner",
            )
    raise AssertionError


def _complete(job: _Fetch) -> tuple[dict[str, str], int]:
    """Append what is missing to the partial file; return the hashes and size of all of it."""
    import hashlib

    hashers = {"sha256": hashlib.sha256()}
    if len(job.remote.hash) == 40:
        hashers["git"] = git_hasher(job.remote.size)

    def take(block: bytes) -> None:
        for hasher in hashers.values():
            hasher.update(block)
        job.advance(len(block))

    with job.partial.open("a+b") as file:
        file.seek(0)
        while block := file.read(2**20):
            take(block)
        pace = _Pace(f"'{job.remote.path}'")
        while file.tell() < job.remote.size:
            try:
                for block in _body(job, file.tell(), pace):
                    if file.tell() + len(block) > job.remote.size:
                        return {}, file.tell()  # more than the server announced
                    file.write(block)
                    take(block)
                if file.tell() < job.remote.size:
                    raise _CutShort(f"'{job.remote.path}' ended after {file.tell()} of {job.remote.size} bytes")
            except _Restart:
                return {}, file.tell()
            except Exception as error:
                file.flush()
                if not _is_passing(error) and type(error).__name__ != "ConnectError":  # it answered just now
                    raise
                pace.rest(error)
        return {name: hasher.hexdigest() for name, hasher in hashers.items()}, file.tell()


class _CutShort(Exception):
    """The connection ended before the file did."""


class _Restart(Exception):
    """The server cannot go on from where the partial file ends."""


def _body(job: _Fetch, start: int, pace: _Pace) -> Iterator[bytes]:
    """Yield the file's bytes from `start` on, as they come."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = request_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    client = get_session()
    request = client.build_request(
        "GET",
        _address(job.place.repo, job.remote.path, job.commit),
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )

    def opened() -> Any:
        response = client.send(request, stream=True)
        if not (start and response.status_code == 416):
            with ExitStack() as stack:
                stack.callback(response.close)
                hf_raise_for_status(response)
                stack.pop_all()
        return response

    left = max(pace.limit - (time.monotonic() - pace.since), 1.0)
    with closing(_within(left, opened)) as response:
        if response.status_code == 416:
            raise _Restart
        skip = 0
        if start and response.status_code == 206:
            place = re.fullmatch(r"bytes (\d+)-\d*/(\d+|\*)", response.headers.get("Content-Range", ""))
            if place is None or int(place[1]) != start or place[2] not in ("*", str(job.remote.size)):
                raise _Restart
        elif start:  # a mirror that ignores Range: pass over what is here already
            skip = start
        for block in response.iter_bytes():
            if job.stop.is_set():
                raise _Stopped
            pace.arrived(len(block))
            kept = block[skip:]
            skip -= len(block) - len(kept)
            if kept:
                yield kept
