"""Which repo ids, file paths and ref names this hub accepts.

The client checks names too, but a crafted client skips that, and a bad path stored here would later be written to the
disk of everyone who pulls. So the rule is: what could escape or overwrite on any common file system is refused.
"""

import re
import unicodedata
from collections.abc import Collection

from mmhub_hubserver.errors import Invalid, Unprocessable

COMMIT_ID = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_PATH_BYTES = 1024
MAX_SEGMENT_BYTES = 255
MAX_REF_BYTES = 80  # stored percent-quoted as one file name: at most 3 times as long

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_])?")
_RESERVED_NAMESPACES = {"api", "datasets", "spaces", "models", "buckets", "kernels", "collections"}
_FORBIDDEN_SEGMENTS = {"", ".", "..", ".git", ".cache"}
_REF_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if it is a valid `namespace/name`."""
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(len(part) <= 96 and _REPO_PART.fullmatch(part) for part in parts):
        raise Invalid(f"'{repo_id}' is not a repo id: expected namespace/name of letters, digits, '-', '_' and '.'.")
    if "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise Invalid(f"'{repo_id}' is not a repo id: '--', '..' and a final '.git' are not allowed.")
    if parts[0].lower() in _RESERVED_NAMESPACES:
        raise Invalid(f"The namespace '{parts[0]}' is reserved.")
    return repo_id


def check_path(path: str) -> str:
    """Return `path` if it is safe to store and to write on every client."""
    shown = ascii(path if len(path) <= 100 else path[:100] + "...")
    try:
        segments = path.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        raise Unprocessable(f"The path {shown} is not valid Unicode.") from None
    if sum(map(len, segments)) + len(segments) > MAX_PATH_BYTES or max(map(len, segments)) > MAX_SEGMENT_BYTES:
        raise Unprocessable(f"The path {shown} is too long.")
    if "\\" in path or re.match(r"[A-Za-z]:", path) or any(unicodedata.category(char) == "Cc" for char in path):
        raise Unprocessable(f"The path {shown} has a backslash, a drive letter or a control character.")
    if any(part.casefold() in _FORBIDDEN_SEGMENTS for part in path.split("/")):
        rule = "no leading or double '/', no '.', '..', '.git' or '.cache'"
        raise Unprocessable(f"The path {shown} is not allowed: {rule}.")
    return path


def check_tree(paths: Collection[str]) -> None:
    """Refuse a set of paths that cannot all exist in one folder on every file system."""
    owners: dict[str, str] = {}
    for path in paths:
        other = owners.setdefault(_folded(path), path)
        if other != path:
            raise Unprocessable(f"{path!a} and {other!a} differ only in case.")
    for path in paths:
        end = path.rfind("/")
        while end > 0:
            if (file := owners.get(_folded(path[:end]))) is not None:
                raise Unprocessable(f"{file!a} cannot be both a file and the folder of {path!a}.")
            end = path.rfind("/", 0, end)


def check_ref(name: str) -> str:
    """Return `name` if it is a valid branch or tag name (the rules of git, and not a commit id)."""
    parts = name.split("/")
    bad = _REF_FORBIDDEN.search(name) or name == "@" or name.endswith(".") or name.startswith("refs/")
    bad = bad or any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
    if bad or COMMIT_ID.fullmatch(name) or not name.isprintable() or len(name.encode("utf-8")) > MAX_REF_BYTES:
        raise Invalid(f"{name[:100]!a} is not a valid branch or tag name.")
    return name


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
