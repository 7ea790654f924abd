"""Which files of a commit go into git, are uploaded apart or are left out: by .gitattributes and .gitignore."""

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO

from dulwich.attrs import AttributeValue, parse_git_attributes

from mmhub_hubserver.store import Commit, Repo
from mmhub_hubserver.wildcards import MAX_RULES, MalformedPattern, Wildcard, rules_for

LFS_THRESHOLD = 1 << 20  # bytes; larger files are uploaded apart from the commit, whatever .gitattributes says
_MAX_RULES_BYTES = 64 << 10


class UploadRules:
    """The rules of one repository at one commit, for so many `paths` (for very many, the first rules only).

    `ignore` is a .gitignore that the client is about to commit.
    """

    def __init__(self, repo: Repo, commit: Commit, paths: Sequence[str], ignore: str | None = None) -> None:
        most = rules_for([path.encode() for path in paths])
        ignored = _rules(repo, commit, ".gitignore") if ignore is None else _lines(ignore.encode("utf-8", "replace"))
        self._ignored = _Ignored(ignored[:most])
        self._filters = _filters(_rules(repo, commit, ".gitattributes")[:most])

    def large(self, path: str, size: int) -> bool:
        """Say whether a file belongs into LFS; an empty one never does."""
        if size > LFS_THRESHOLD or size <= 0:
            return size > LFS_THRESHOLD
        names = path.encode().split(b"/")
        return next((value == b"lfs" for rule, value in self._filters if rule.match(names)), False)

    def ignored(self, path: str) -> bool:
        return self._ignored(path.encode())


class _Ignored:
    """A .gitignore. Nothing below an ignored folder is let in again."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._rules: list[tuple[Wildcard, bool, bool]] = []  # the last, which wins, first
        self._folders: dict[bytes, bool] = {b"": False}
        for line in reversed(lines):
            pattern, folder = line.removeprefix(b"!"), line.endswith(b"/")
            pattern = pattern[1:] if pattern.startswith((b"\\!", b"\\#")) else pattern
            with suppress(MalformedPattern):
                self._rules.append((Wildcard(pattern.rstrip(b"/")), not line.startswith(b"!"), folder))

    def __call__(self, path: bytes) -> bool:
        names = path.split(b"/")
        for count in range(1, len(names)):
            folder = b"/".join(names[:count])
            if folder not in self._folders:
                self._folders[folder] = self._decided(names[:count], folder=True)
            if self._folders[folder]:
                return True
        return self._decided(names, folder=False)

    def _decided(self, names: list[bytes], *, folder: bool) -> bool:
        for rule, ignores, folders_only in self._rules:
            if (folder or not folders_only) and rule.match(names):
                return ignores
        return False


def _filters(lines: Sequence[bytes]) -> list[tuple[Wildcard, AttributeValue]]:
    """Return the rules that say something about `filter`, the last (which wins) first."""
    rules = []
    for pattern, values in parse_git_attributes(BytesIO(b"\n".join(lines))):
        if b"filter" in values:
            with suppress(MalformedPattern):
                rules.append((Wildcard(pattern), values[b"filter"]))
    return rules[::-1]


def _rules(repo: Repo, commit: Commit, name: str) -> list[bytes]:
    entry = commit.files.get(name)
    if entry is None or entry.lfs or entry.size > _MAX_RULES_BYTES:
        return []
    return _lines(repo.content(entry))


def _lines(content: bytes) -> list[bytes]:
    lines = [line.strip() for line in content[:_MAX_RULES_BYTES].splitlines()]
    return [line for line in lines if line and not line.startswith(b"#")][:MAX_RULES]
