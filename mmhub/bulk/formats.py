"""Answers as files: JSON lines, csv, or parquet, by the ending of the name; a few hundred at a time are in memory.

JSON lines hold answers as they are; what is no number, such as NaN, is null. Tables have a column for every key of an
answer, `row`, the number of the input's row (from 0), first, and `error` last. In parquet, scores by label are a struct
and lists are lists, of the types that are there; csv has those as JSON. What has several types is JSON text in both.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mmhub.bulk.windows import Answer

TABLES = (".parquet", ".csv")  # endings of names; any other is one of JSON lines
Parts = Sequence[Callable[[], Iterable[Answer]]]  # what yields the answers of each part, more than once
_WIDE = 1000  # keys up to which a mapping is a struct
_SLICE = 256  # answers that are Python objects at a time
_GROUP_BYTES = 2**23  # of a row group of parquet, about
_ENDS = ("row", "error")


def write_answers(file: IO[bytes], parts: Parts, suffix: str) -> None:
    """Write answers to a file that is open for writing, in the format of `suffix`: .parquet, .csv, else JSON lines."""
    writer = {".parquet": _write_parquet, ".csv": _write_csv}.get(suffix.lower(), _write_lines)
    writer(file, parts)


def _write_lines(file: IO[bytes], parts: Parts) -> None:
    for part in parts:
        for answer in part():
            file.write((to_json(answer) + "\n").encode())


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
        return to_json(value)
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
    group: list[Any] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for answers in _slices(parts):
            columns = [pa.array(range(row, row + len(answers)), pa.int64())]
            for name, kind in (*kinds.items(), ("error", pa.string())):
                columns.append(_array([answer.get(name) for answer in answers], kind))
            group.append(pa.table(columns, schema=schema))
            row += len(answers)
            if sum(table.nbytes for table in group) >= _GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))


def _slices(parts: Parts) -> Iterator[list[Answer]]:
    for part in parts:
        answers = iter(part())
        while found := list(islice(answers, _SLICE)):
            yield found


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    if kind == pa.string():
        values = [value if value is None or isinstance(value, str) else to_json(value) for value in values]
    return pa.array(values, kind)


def to_json(value: Any) -> str:
    """Return JSON as its standard has it: what is no finite number is null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kinds(parts: Parts) -> dict[str, Any]:
    """The Arrow type of each key in all parts together, in order of appearance."""
    import pyarrow as pa

    kinds: dict[str, Any] = {}
    mixed: set[str] = set()  # where it is not that of every slice
    for answers in _slices(parts):
        for name in dict.fromkeys(key for answer in answers for key in answer if key not in _ENDS):
            own, known = _kind([answer.get(name) for answer in answers]), kinds.get(name, pa.null())
            kinds[name] = _common(known, own)
            if kinds[name] != own or (kinds[name] != known and known != pa.null()):
                mixed.add(name)
    kinds = {name: pa.string() if _is_odd(kind) else _filled(kind) for name, kind in kinds.items()}
    for answers in _slices(parts) if mixed else ():
        for name in [name for name in mixed if not _fits([answer.get(name) for answer in answers], kinds[name])]:
            kinds[name] = pa.string()
            mixed.remove(name)
    return kinds


def _kind(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.string()


def _fits(values: Sequence[Any], kind: Any) -> bool:
    import pyarrow as pa

    try:
        _array(values, kind)
    except (pa.ArrowException, OverflowError):
        return False
    return True


def _common(one: Any, other: Any) -> Any:
    """A type that holds what both hold: text, as JSON, where nothing else does."""
    import pyarrow as pa

    try:
        schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return pa.string()


def _is_odd(kind: Any) -> bool:
    """Is this, or a type in it, a struct of no field or of very many, which parquet or its readers do not take?"""
    import pyarrow as pa

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not 0 < len(inner) <= _WIDE) or any(map(_is_odd, inner))


def _filled(kind: Any) -> Any:
    """The type with text in the places where nothing was ever seen: of what no list had in it, say."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_filled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _filled(field.type)) for field in kind])
    return kind


def write_file_of(path: Path, answers: Sequence[Answer]) -> None:
    """Write a few answers to a file durably, at once or not at all."""
    from mmhub.files import write_file

    content = io.BytesIO()
    plain = json.loads(to_json(answers).encode("utf-8", "replace"))  # half a surrogate pair is no text
    write_answers(content, [lambda: plain], path.suffix)
    write_file(path, content.getvalue())
