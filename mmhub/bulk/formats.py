"""Answers as files: JSON lines, csv, or parquet, by the ending of the name; a part at a time is in memory.

JSON lines hold answers as they are. Tables have a column for every key of an answer, `row`, the number of the input's
row (from 0), first, and `error` last. In parquet, scores by label are a struct and lists are lists; csv has those as
JSON. What has several types is JSON text in both.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mmhub.bulk.windows import Answer

TABLES = (".parquet", ".csv")  # endings of names; any other is one of JSON lines
Parts = Sequence[Callable[[], Iterable[Answer]]]  # what yields the answers of each part, more than once
_WIDE = 1000  # keys up to which a mapping is a struct
_ENDS = ("row", "error")


def write_answers(file: IO[bytes], parts: Parts, suffix: str) -> None:
    """Write answers to a file that is open for writing, in the format of `suffix`: .parquet, .csv, else JSON lines."""
    writer = {".parquet": _write_parquet, ".csv": _write_csv}.get(suffix.lower(), _write_lines)
    writer(file, parts)


def _write_lines(file: IO[bytes], parts: Parts) -> None:
    for part in parts:
        for answer in part():
            file.write((_json(answer) + "\n").encode())


def _write_csv(file: IO[bytes], parts: Parts) -> None:
    names = list(dict.fromkeys(key for part in parts for answer in part() for key in answer if key not in _ENDS))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(["row", *names, "error"])
    for row, answer in _numbered(parts):
        writer.writerow([row, *(_field(answer.get(name)) for name in (*names, "error"))])
    text.flush()
    text.detach()


def _field(value: Any) -> Any:
    if isinstance(value, (Mapping, list, tuple, bool)):
        return _json(value)
    return value


def _numbered(parts: Parts) -> Iterator[tuple[int, Answer]]:
    row = 0
    for part in parts:
        for answer in part():
            yield row, answer
            row += 1


def _write_parquet(file: IO[bytes], parts: Parts) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = _kinds(parts)
    schema = pa.schema([("row", pa.int64()), *kinds.items(), ("error", pa.string())])
    row = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            answers = list(part())
            columns = [pa.array(range(row, row + len(answers)), pa.int64())]
            for name, kind in (*kinds.items(), ("error", pa.string())):
                values = [answer.get(name) for answer in answers]
                columns.append(_array(values, kind))
            writer.write_table(pa.table(columns, schema=schema))
            row += len(answers)


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    if kind == pa.string():
        values = [value if value is None or isinstance(value, str) else _json(value) for value in values]
    return pa.array(values, kind)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _kinds(parts: Parts) -> dict[str, Any]:
    """The Arrow type of each key in all parts together, in order of appearance."""
    import pyarrow as pa

    kinds: dict[str, Any] = {}
    for part in parts:
        answers = list(part())
        for name in dict.fromkeys(key for answer in answers for key in answer if key not in _ENDS):
            kinds[name] = _common(kinds.get(name, pa.null()), _kind([answer.get(name) for answer in answers]))
    return {name: pa.string() if _is_odd(kind) else kind for name, kind in kinds.items()}


def _kind(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.infer_type(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.string()


def _common(one: Any, other: Any) -> Any:
    """A type that holds what both hold: text, as JSON, where nothing else does."""
    import pyarrow as pa

    try:
        schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return pa.string()


def _is_odd(kind: Any) -> bool:
    """Can parquet or a reader of it not be expected to hold this: nothing at all, or very many columns?"""
    import pyarrow as pa

    nothing = pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))
    return nothing or (pa.types.is_struct(kind) and not 0 < kind.num_fields <= _WIDE)


def write_file_of(path: Path, answers: Sequence[Answer]) -> None:
    """Write a few answers to a file durably, at once or not at all."""
    from mmhub.files import write_file

    content = io.BytesIO()
    plain = json.loads(_json(answers).encode("utf-8", "replace"))  # half a surrogate pair is no text
    write_answers(content, [lambda: plain], path.suffix)
    write_file(path, content.getvalue())
