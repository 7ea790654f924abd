"""Which files of a commit go into git, are uploaded apart or are left out: by .gitattributes and .gitignore."""

from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

from dulwich.attrs import GitAttributes, Pattern, parse_git_attributes
from dulwich.ignore import IgnoreFilter
from dulwich.wildmatch import MalformedPattern

from mmhub_hubserver.store import Commit, Repo

LFS_THRESHOLD = 1 << 20  # bytes; larger files are uploaded apart from the commit, whatever .gitattributes says
_MAX_RULES_BYTES = 64 << 10
_MAX_RULES = 1000
_MAX_STARS = 8  # in one pattern: matching takes time that grows with their number


class UploadRules:
    """The rules of one repository at one commit. `ignore` is a .gitignore that the client is about to commit."""

    def __init__(self, repo: Repo, commit: Commit, ignore: str | None = None) -> None:
        ignored = _rules(repo, commit, ".gitignore") if ignore is None else _lines(ignore.encode("utf-8", "replace"))
        self._ignored = IgnoreFilter(ignored) if ignored else None
        self._attributes = GitAttributes(list(_patterns(_rules(repo, commit, ".gitattributes"))))

    def large(self, path: str, size: int) -> bool:
        """Say whether a file belongs into LFS; an empty one never does."""
        facts: Any = self._attributes.match_path(path.encode())
        return size > LFS_THRESHOLD or (size > 0 and facts.get(b"filter") == b"lfs")

    def ignored(self, path: str) -> bool:
        return self._ignored is not None and bool(self._ignored.is_ignored(path.encode()))


def _patterns(rules: list[bytes]) -> Iterator[tuple[Pattern, Any]]:
    for name, facts in parse_git_attributes(BytesIO(b"\n".join(rules))):
        with suppress(MalformedPattern):
            yield Pattern(name), facts


def _rules(repo: Repo, commit: Commit, name: str) -> list[bytes]:
    entry = commit.files.get(name)
    if entry is None or entry.lfs or entry.size > _MAX_RULES_BYTES:
        return []
    return _lines(repo.content(entry))


def _lines(content: bytes) -> list[bytes]:
    lines = [line.strip() for line in content[:_MAX_RULES_BYTES].splitlines()]
    kept = [line for line in lines if line and not line.startswith(b"#") and line.count(b"*") <= _MAX_STARS]
    return kept[:_MAX_RULES]
