"""What a pull request changes, as the text of `git diff`."""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence

from mmhub_hubserver.store import Entry, Repo, lfs_pointer

MAX_FILE_BYTES = 256 << 10  # larger files are only named
MAX_BYTES = 2 << 20  # of one diff
MAX_STEPS = 100_000_000  # of comparing the lines of one diff; files of equal lines can take any number


def unified_diff(repo: Repo, old: str, new: str) -> str:
    """Return the differences between two commits, cut off with a note where they are too long."""
    before, after = repo.load(old).files, repo.load(new).files
    found, size, steps = [], 0, MAX_STEPS
    for path in sorted({*before, *after}):
        if before.get(path) == after.get(path):
            continue
        texts = [_text(repo, entry) for entry in (before.get(path), after.get(path))]
        needed = _steps(*texts)
        if needed <= steps:
            steps -= needed
        else:
            texts = [None, None]
        text = "".join(_file(path, before.get(path), after.get(path), texts))
        size += len(text)
        if size > MAX_BYTES:
            found.append("(the rest of this diff is left out)\n")
            break
        found.append(text)
    return "".join(found)


def _file(path: str, old: Entry | None, new: Entry | None, texts: Sequence[str | None]) -> Iterator[str]:
    yield f"diff --git a/{path} b/{path}\n"
    if old is None:
        yield "new file mode 100644\n"
    if new is None:
        yield "deleted file mode 100644\n"
    name, new_name = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    if None in texts:
        yield f"Binary files {name} and {new_name} differ\n"
        return
    before, after = (str(text).splitlines(keepends=True) for text in texts)
    for line in difflib.unified_diff(before, after, name, new_name):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _steps(old: str | None, new: str | None) -> int:
    """Estimate how long `difflib` takes: it looks at all pairs of equal lines, over and over where much differs."""
    before, after = (old or "").splitlines(), (new or "").splitlines()
    counts = Counter(after)
    often = len(after) // 100 + 1 if len(after) >= 200 else len(after)  # it leaves out lines that come more often
    pairs = [1 + (counts[line] if counts[line] <= often else 0) for line in before]
    least = min(len(before), len(after))
    start = next((at for at in range(least) if before[at] != after[at]), least)
    end = next((at for at in range(least - start) if before[-1 - at] != after[-1 - at]), least - start)
    changed = pairs[start : len(before) - end]
    return sum(pairs) * 3 + sum(changed) * min(len(changed), len(after) - start - end)


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
