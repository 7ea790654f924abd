"""Conversations of a repository: discussions and pull requests, numbered together, each with its list of events.

One JSON file each, <repository>/discussions/<number>.json, replaced as a whole under the repository's lock. The commits
of a pull request are in git, under refs/pr/<number>; only what people say and decide about them is here.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmhub_hubserver.errors import EntryNotFound, Invalid
from mmhub_hubserver.store import Repo

MAX_TEXT = 64 << 10  # characters of one comment
MAX_TITLE = 500
MAX_EVENTS = 10_000  # of one conversation
MAX_BYTES = 8 << 20  # of one conversation on the disk
MAX_VERSIONS = 20  # of one comment that are kept, the newest
Thread = dict[str, Any]
Event = dict[str, Any]


def start(repo: Repo, title: str, text: str, author: str, base: str | None) -> Thread:
    """Start a conversation with its first comment; with a `base` branch it belongs to a pull request."""
    with repo.writing():
        number = 1 + max((int(path.stem) for path in _folder(repo).glob("*.json")), default=0)
        thread: Thread = {
            "num": number,
            "title": _checked(title, MAX_TITLE, "title"),
            "author": author,
            "createdAt": _now(),
            "status": "open",
            "base": base,
            "mergeCommitId": None,
            "events": [],
        }
        say(thread, author, text)
        _save(repo, thread)
    return thread


def listed(repo: Repo) -> list[Thread]:
    """Return all conversations, the newest first."""
    numbers = sorted((int(path.stem) for path in _folder(repo).glob("*.json")), reverse=True)
    return [load(repo, number) for number in numbers]


def load(repo: Repo, number: int) -> Thread:
    try:
        thread: Thread = json.loads(_file(repo, number).read_bytes())
    except FileNotFoundError:
        raise EntryNotFound(f"There is no discussion {number} in {repo.id}.") from None
    return thread


@contextmanager
def changing(repo: Repo, number: int, *, whatever_it_takes: bool = False) -> Iterator[Thread]:
    """Change one conversation; it is saved if nothing was raised.

    `whatever_it_takes` lets it grow over its limits and the quota, to note what has happened already.
    """
    with repo.writing():
        thread = load(repo, number)
        if len(thread["events"]) >= MAX_EVENTS and not whatever_it_takes:
            raise Invalid(f"This discussion has {MAX_EVENTS} events; open a new one.")
        yield thread
        _save(repo, thread, limited=not whatever_it_takes)


def forget(repo: Repo, number: int) -> None:
    with repo.writing():
        _file(repo, number).unlink(missing_ok=True)


def add(thread: Thread, kind: str, author: str, data: dict[str, Any]) -> Event:
    event = {"id": secrets.token_hex(12), "type": kind, "createdAt": _now(), "author": author, "data": data}
    thread["events"].append(event)
    return event


def say(thread: Thread, author: str, text: str) -> Event:
    latest = {"raw": _checked(text, MAX_TEXT, "comment"), "updatedAt": _now(), "author": author}
    return add(thread, "comment", author, {"edited": False, "hidden": False, "latest": latest, "history": [latest]})


def edit(event: Event, author: str, text: str) -> None:
    latest = {"raw": _checked(text, MAX_TEXT, "comment"), "updatedAt": _now(), "author": author}
    event["data"] |= {"edited": True, "latest": latest, "history": [*event["data"]["history"], latest][-MAX_VERSIONS:]}


def hide(event: Event, author: str) -> None:
    """Remove the words of a comment for good."""
    latest = {"raw": "This comment has been hidden", "updatedAt": _now(), "author": author}
    event["data"] |= {"hidden": True, "latest": latest, "history": [latest]}


def rename(thread: Thread, author: str, title: str) -> Event:
    old, thread["title"] = thread["title"], _checked(title, MAX_TITLE, "title")
    return add(thread, "title-change", author, {"from": old, "to": thread["title"]})


def change_status(thread: Thread, author: str, status: str) -> Event:
    thread["status"] = status
    return add(thread, "status-change", author, {"status": status})


def check_text(text: str) -> None:
    """Refuse a comment that is empty or too long."""
    _checked(text, MAX_TEXT, "comment")


def _checked(text: str, limit: int, name: str) -> str:
    if not text.strip() or len(text) > limit:
        raise Invalid(f"The {name} is empty or longer than {limit} characters.")
    return text


def _folder(repo: Repo) -> Path:
    return repo.folder / "discussions"


def _file(repo: Repo, number: int) -> Path:
    return _folder(repo) / f"{number}.json"


def _save(repo: Repo, thread: Thread, *, limited: bool = True) -> None:
    path, content = _file(repo, thread["num"]), json.dumps(thread).encode()
    more = max(len(content) - (path.stat().st_size if path.exists() else 0), 0) if limited else 0
    if more and len(content) > MAX_BYTES:
        raise Invalid(f"This discussion would have more than {MAX_BYTES} bytes; open a new one.")
    with repo.store.disk.promised(more):
        repo.store.write(path, content)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
