"""Rows of a folder of images or audio, one for each file, with classes from sub-folders or a metadata table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from mmhub.data.parts import Column, Part, pack, values_of
from mmhub.data.tables import is_table, open_file
from mmhub.errors import InputError, MmhubError, UsageError, did_you_mean

MEDIA = {
    "image": frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}),
    "audio": frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aif", ".aiff"}),
}
_MEDIA_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SPLITS = frozenset({"train", "training", "valid", "validation", "val", "dev", "test", "testing"})


def open_folder(folder: Path, name: str) -> Part:
    """Open a folder of images or audio: flat, with a sub-folder for each class, or with a metadata table."""
    found = _visible_files(folder)
    media = {kind: [file for file in found if file.suffix.lower() in known] for kind, known in MEDIA.items()}
    kinds = [kind for kind, files in media.items() if files]
    if not kinds:
        raise _no_media(found, name)
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files)} {kind} files" for kind, files in media.items())
        hint = "which one? name a folder with one kind, or a table that pairs them by path"
        raise UsageError(f"'{name}' holds {counts}", hint)
    kind, files = kinds[0], media[kinds[0]]
    metadata = _open_metadata(folder, name, kind, files)
    labels = _labels(files, name, has_metadata=metadata is not None)
    listed = [Path(str(file)) for file in metadata.columns["file_name"]] if metadata else files
    columns: dict[str, Column] = {
        kind: pa.chunked_array(
            [pa.array([{"bytes": None, "path": str(folder / file)} for file in listed], _MEDIA_STRUCT)]
        )
    }
    if labels:
        columns["label"] = pack([labels[file] for file in listed])
    columns["file_name"] = pack([file.as_posix() for file in listed])
    if metadata:
        columns |= {key: column for key, column in metadata.columns.items() if key not in (kind, "file_name")}
    return Part(
        name=name,
        columns=columns,
        rows=len(listed),
        files={file.as_posix(): folder / file for file in files} | dict(metadata.files if metadata else {}),
        folder=folder,
        row_names=[file.as_posix() for file in listed],
    )


def _visible_files(folder: Path) -> list[Path]:
    """List files below `folder`, as sorted relative paths; hidden ones are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name).relative_to(folder) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.parts)


def _no_media(found: Sequence[Path], name: str) -> MmhubError:
    if not found:
        return InputError(f"folder '{name}' is empty", "name a file, or a folder with images or audio")
    counts = Counter(file.suffix.lower() or "(no extension)" for file in found)
    there = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    tables = [file for file in found if is_table(file)]
    hint = f"name the table, such as '{Path(name, tables[0]).as_posix()}'" if tables else "name a file"
    return UsageError(f"folder '{name}' has no images or audio; found {there}", hint)


def _labels(files: Sequence[Path], name: str, *, has_metadata: bool) -> dict[Path, str]:
    """Read each file's class off its sub-folder; {} for a flat folder."""
    classes = {file.parts[0] for file in files if len(file.parts) > 1}
    beside = [file for file in files if len(file.parts) == 1]
    if not classes or (beside and has_metadata):
        return {}
    if beside:
        raise UsageError(
            f"'{name}' has class folders and {len(beside)} files beside them (first: '{beside[0]}')",
            "move the files into a class folder, or all of them into one folder",
        )
    if not has_metadata and classes <= _SPLITS:
        shown = ", ".join(f"'{Path(name, part).as_posix()}'" for part in sorted(classes))
        raise UsageError(f"'{name}' holds splits, not classes", f"name one: {shown}")
    return {file: file.parts[0] for file in files}


def _open_metadata(folder: Path, name: str, kind: str, files: Sequence[Path]) -> Part | None:
    """Open the folder's metadata table, if it has one, and check that it and the media name the same files."""
    path = next((p for p in (folder / "metadata.csv", folder / "metadata.jsonl") if p.is_file()), None)
    if path is None:
        return None
    shown = f"{name}/{path.name}"
    part = open_file(path, shown, None)
    if "file_name" not in part.columns:
        raise InputError(f"'{shown}' has no column 'file_name'", f"it has {', '.join(part.columns)}")
    listed = [None if v is None else str(v) for v in values_of(part.columns["file_name"])]
    names = [os.path.normpath(file) if file else "" for file in listed]
    there = {str(file) for file in files}
    for row, file in enumerate(names, 1):
        if file not in there:
            hint = did_you_mean(file, there) or f"every row names one {kind} file below '{name}'"
            raise InputError(f"'{shown}' row {row} names '{listed[row - 1] or ''}', which is not there", hint)
    if unlisted := sorted(there - set(names)):
        raise InputError(f"'{shown}' does not list {len(unlisted)} {kind} files (first: '{unlisted[0]}')")
    return Part(name=shown, columns=part.columns | {"file_name": list(names)}, rows=part.rows, files=part.files)
