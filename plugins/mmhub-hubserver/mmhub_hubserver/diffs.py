"""What a pull request changes, as the text of `git diff`."""

import difflib
from collections.abc import Iterator

from mmhub_hubserver.store import Entry, Repo, lfs_pointer

MAX_FILE_BYTES = 256 << 10  # larger files are only named
MAX_BYTES = 2 << 20  # of one diff


def unified_diff(repo: Repo, old: str, new: str) -> str:
    """Return the differences between two commits, cut off with a note where they are too long."""
    before, after = repo.load(old).files, repo.load(new).files
    found, size = [], 0
    for path in sorted({*before, *after}):
        if before.get(path) == after.get(path):
            continue
        text = "".join(_file(repo, path, before.get(path), after.get(path)))
        size += len(text)
        if size > MAX_BYTES:
            found.append("(the rest of this diff is left out)\n")
            break
        found.append(text)
    return "".join(found)


def _file(repo: Repo, path: str, old: Entry | None, new: Entry | None) -> Iterator[str]:
    yield f"diff --git a/{path} b/{path}\n"
    if old is None:
        yield "new file mode 100644\n"
    if new is None:
        yield "deleted file mode 100644\n"
    texts = [_text(repo, old), _text(repo, new)]
    name, new_name = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    if None in texts:
        yield f"Binary files {name} and {new_name} differ\n"
        return
    before, after = (str(text).splitlines(keepends=True) for text in texts)
    for line in difflib.unified_diff(before, after, name, new_name):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _text(repo: Repo, entry: Entry | None) -> str | None:
    """Return the text that git holds for a file, None if it is not text or too long to compare."""
    if entry is None:
        return ""
    if entry.lfs:
        return lfs_pointer(str(entry.sha256), entry.size).decode()
    if entry.size > MAX_FILE_BYTES:
        return None
    try:
        return repo.content(entry).decode()
    except UnicodeDecodeError:
        return None
