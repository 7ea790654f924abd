"""What `open_rows` reads, and what it says about data it cannot read."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmhub.data.sources import open_rows, require_columns
from mmhub.errors import ExitCode, InputError, MmhubError, NetworkError, NotFoundError, UsageError

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return packed


def write_parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def message(kind: type[MmhubError], source: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_rows(source, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Formats.


def test_csv_fields_stay_strings_and_quotes_follow_the_rfc(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 'text,label\n"one, ""two""\nthree",007\n\nnaïve 🦊,\n')
    rows = open_rows(tmp_path / "a.csv")
    assert rows.columns == ("text", "label")
    assert list(rows) == [
        {"text": 'one, "two"\nthree', "label": "007"},
        {"text": "naïve 🦊", "label": ""},
    ]


def test_tsv_quotes_are_text_and_only_tabs_separate(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", 'text\tlabel\n"unclosed, really\t1\nsay "hi"\t"2"\n\n')
    assert list(open_rows(tmp_path / "a.tsv")) == [
        {"text": '"unclosed, really', "label": "1"},
        {"text": 'say "hi"', "label": '"2"'},
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
def test_crlf_and_a_byte_order_mark_leave_no_trace(tmp_path: Path, name: str) -> None:
    body = {
        "a.csv": "text,label\r\nhi,1\r\n",
        "a.tsv": "text\tlabel\r\nhi\t1\r\n",
        "a.txt": "hi\r\n",
        "a.jsonl": '{"text": "hi"}\r\n',
    }[name]
    write(tmp_path / name, b"\xef\xbb\xbf" + body.encode())
    (row,) = list(open_rows(tmp_path / name))
    assert row in ({"text": "hi", "label": "1"}, {"text": "hi"})


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_big_integer_labels_survive(tmp_path: Path, name: str) -> None:
    big = "123456789012345678901234567890"
    write(tmp_path / name, f"label\n{big}\n")
    assert open_rows(tmp_path / name)[0] == {"label": big}


def test_a_field_may_be_a_whole_document(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(open_rows(tmp_path / "a.csv")[0]["text"]) == 300_000


def test_columns_name_the_fields_of_a_headerless_table(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", "good\t1\nbad\t0\n")
    rows = open_rows(tmp_path / "a.tsv", columns=["text", "label"])
    assert list(rows.column("text")) == ["good", "bad"]


def test_a_first_line_equal_to_columns_is_a_header(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text,label\ngood,1\n")
    assert list(open_rows(tmp_path / "a.csv", columns=["text", "label"])) == [{"text": "good", "label": "1"}]


def test_txt_keeps_blank_lines_and_splits_at_newlines_only(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\u2028still one\x0b\n\n  two\n")
    assert list(open_rows(tmp_path / "a.txt").column("text")) == ["one\u2028still one\x0b", "", "  two"]


def test_txt_takes_its_column_name_and_needs_no_final_newline(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\ntwo")
    assert list(open_rows(tmp_path / "a.txt", columns=["target"])) == [{"target": "one"}, {"target": "two"}]


def test_jsonl_joins_keys_and_fills_missing_ones_with_none(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1, "b": "x"}\n\n{"c": true, "a": 2}\n')
    rows = open_rows(tmp_path / "a.jsonl")
    assert list(rows) == [{"a": 1, "b": "x", "c": None}, {"a": 2, "b": None, "c": True}]
    assert rows[1]["c"] is True


def test_jsonl_keeps_nested_and_mixed_values_as_they_are(tmp_path: Path) -> None:
    objects = [
        {"messages": [{"role": "user", "content": "hi"}], "label": 1, "n": 2**70},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "label": "1", "n": None},
        {"messages": [], "label": 1.5, "n": 3},
    ]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)))
    rows = open_rows(tmp_path / "a.jsonl")
    assert list(rows) == objects
    assert [type(label) for label in rows.column("label")] == [int, str, float]


def test_jsonl_keys_that_first_appear_in_a_later_block_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmhub.data.tables._BLOCK", 2)
    objects: list[dict[str, Any]] = [{"a": "x"}, {"a": "y"}, {"a": None}, {"a": None}, {"a": 3, "b": [1]}]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)))
    assert list(open_rows(tmp_path / "a.jsonl")) == [{"b": None, **item} for item in objects]


@pytest.mark.parametrize("body", ['[\n{"a": 1},\n{"a": 2}\n]', '{"a": 1}\n{"a": 2}\n'])
def test_json_is_a_list_or_one_object_a_line(tmp_path: Path, body: str) -> None:
    write(tmp_path / "a.json", body)
    assert list(open_rows(tmp_path / "a.json")) == [{"a": 1}, {"a": 2}]


def test_parquet_structs_come_out_as_dicts(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"\x89PNG", "path": "a.png"}, None], MEDIA)
    path = write_parquet(tmp_path / "a.parquet", image=image, label=[1, None], words=[["a"], []])
    assert list(open_rows(path)) == [
        {"image": {"bytes": b"\x89PNG", "path": "a.png"}, "label": 1, "words": ["a"]},
        {"image": None, "label": None, "words": []},
    ]


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "split=train" / "a.parquet", text=["x"])
    assert open_rows(path).columns == ("text",)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize(
    ("name", "body"),
    [("a.csv", "text\nhé\n"), ("a.tsv", "text\nhé\n"), ("a.jsonl", '{"text": "hé"}\n'), ("a.txt", "hé\n")],
)
def test_compressed_files_read_directly(tmp_path: Path, name: str, body: str, pack: Callable[[bytes], bytes]) -> None:
    suffix = ".gz" if pack is gzip.compress else ".zst"
    write(tmp_path / (name + suffix), pack(body.encode()))
    assert list(open_rows(tmp_path / (name + suffix))) == [{"text": "hé"}]


def test_a_compressed_file_may_have_several_members(tmp_path: Path) -> None:
    write(tmp_path / "a.txt.gz", gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n"))
    write(tmp_path / "a.txt.zst", zstd(b"one\n") + zstd(b"two\n"))
    assert list(open_rows([tmp_path / "a.txt.gz", tmp_path / "a.txt.zst"]).column("text")) == ["one", "two"] * 2


def test_lines_longer_than_a_read_are_whole(tmp_path: Path) -> None:
    lines = ["é" * 1_500_000, "b", "c" * 2**20]
    write(tmp_path / "a.txt", "\n".join(lines))
    assert list(open_rows(tmp_path / "a.txt").column("text")) == lines


def test_parallel_text_pairs_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.en.gz", gzip.compress(b'a "dog"\n\ncat', mtime=0))
    write(tmp_path / "a.de", "ein Hund\n\nKatze\n")
    rows = open_rows({"source": "a.en.gz", "target": "a.de"}, base=tmp_path)
    assert rows[0] == {"source": 'a "dog"', "target": "ein Hund"}
    assert rows[2] == {"source": "cat", "target": "Katze"}
    assert rows.where(2) == "a.en.gz + a.de row 3"
    assert [file["name"] for file in rows.fingerprint()["files"]] == ["a.en.gz", "a.de"]


# Shards, paths, views.


def test_a_glob_reads_shards_in_order_and_where_knows_them(tmp_path: Path) -> None:
    write(tmp_path / "d" / "part-2.csv", "text,label\nthree,3\n")
    write(tmp_path / "d" / "part-1.csv", "label,text\n1,one\n2,two\n")
    rows = open_rows("d/part-*.csv", base=tmp_path)
    assert list(rows.column("text")) == ["one", "two", "three"]
    assert [rows.where(i) for i in (0, 1, 2, -1)] == [
        "d/part-1.csv row 1",
        "d/part-1.csv row 2",
        "d/part-2.csv row 1",
        "d/part-2.csv row 1",
    ]
    assert rows.folder(2) == tmp_path / "d"


def test_a_list_may_mix_files_globs_and_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "n\n1\n")
    write_parquet(tmp_path / "b-0.parquet", n=[2])
    rows = open_rows(["a.csv", "b-*.parquet"], base=tmp_path)
    assert [rows[0]["n"], rows[1]["n"]] == ["1", 2]


def test_parquet_shards_join_without_becoming_objects(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", image=pa.array([{"bytes": b"a", "path": None}], MEDIA), note=pa.nulls(1))
    write_parquet(tmp_path / "1.parquet", image=pa.array([{"bytes": b"b", "path": None}], MEDIA), note=["x"])
    rows = open_rows(tmp_path / "*.parquet")
    assert [row["image"]["bytes"] for row in rows] == [b"a", b"b"]
    assert list(rows.column("note")) == [None, "x"]
    assert all(isinstance(column, pa.ChunkedArray) for column in rows._data.values())


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text,label\nx,1\n")
    write(tmp_path / "b.csv", "text,lable\nx,1\n")
    assert message(UsageError, ["a.csv", "b.csv"], base=tmp_path) == (
        "shards disagree: 'a.csv' has columns text, label, 'b.csv' has text, lable"
    )


def test_relative_paths_start_from_base_then_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "recipe" / "a.txt", "base\n")
    write(tmp_path / "cwd" / "a.txt", "cwd\n")
    write(tmp_path / "cwd" / "b.txt", "cwd\n")
    monkeypatch.chdir(tmp_path / "cwd")
    assert open_rows("a.txt", base=tmp_path / "recipe")[0] == {"text": "base"}
    assert open_rows("b.txt", base=tmp_path / "recipe")[0] == {"text": "cwd"}
    assert open_rows("a.txt")[0] == {"text": "cwd"}


def test_rows_index_like_a_list(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.txt", "a\nb\nc\n"))
    assert (len(rows), rows[-1]["text"]) == (3, "c")
    for i in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            rows[i]


def test_a_selection_keeps_order_repeats_and_origin(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.txt", "a\nb\nc\nd\n"))
    some = rows.select([3, 1, 1]).select([2, 0])
    assert (len(some), [row["text"] for row in some], list(some.column("text"))) == (2, ["b", "d"], ["b", "d"])
    assert some.where(1) == "a.txt row 4"
    assert len(rows) == 4
    with pytest.raises(IndexError):
        some[2]


def test_where_is_the_data_row_counted_from_one(tmp_path: Path) -> None:
    body = "text\n" + "".join(f"{i}\n" for i in range(1, 30))
    assert open_rows(write(tmp_path / "train.csv", body)).where(16) == "train.csv row 17"


def test_require_columns_lists_what_there_is(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.csv", "text,label\nx,1\n"))
    require_columns(rows, ["text", "label"], "--target-column")
    with pytest.raises(UsageError) as caught:
        require_columns(rows, ["text", "lable"], "set data.target")
    assert str(caught.value) == (
        "no column 'lable' in 'a.csv', which has 'text', 'label'; did you mean 'label'?; set data.target"
    )
    with pytest.raises(UsageError, match="no column 'zzz'"):
        rows.column("zzz")


# Fingerprints.


def test_a_fingerprint_is_stable_and_names_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"text\nx\ny\n", mtime=0))
    content = path.read_bytes()
    entry = {"name": "a.csv.gz", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    expected = {"source": "a.csv.gz", "rows": 2, "bytes": len(content), "files": [entry]}
    assert open_rows(path).fingerprint() == open_rows(path).fingerprint() == expected
    assert open_rows("a.csv.gz", base=tmp_path).fingerprint() == expected


def test_a_selection_changes_the_fingerprint(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.txt", "a\nb\nc\n"))
    one, two = rows.select([0]).fingerprint(), rows.select([1]).fingerprint()
    assert (one["rows"], one["files"]) == (1, rows.fingerprint()["files"])
    assert one["selection"] != two["selection"]
    assert rows.select([1]).fingerprint() == two


def test_a_folder_fingerprint_is_one_entry_that_sees_every_file(tmp_path: Path) -> None:
    write(tmp_path / "p" / "cat" / "1.png", b"1")
    write(tmp_path / "p" / "dog" / "2.png", b"2")
    before = open_rows(tmp_path / "p").fingerprint()
    assert [(entry["name"], entry["files"], entry["bytes"]) for entry in before["files"]] == [("p", 2, 2)]
    write(tmp_path / "p" / "dog" / "2.png", b"3")
    assert open_rows(tmp_path / "p").fingerprint()["files"] != before["files"]


# Folders of media.


def test_a_folder_of_class_folders_gives_labels_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("dog/b.JPG", "cat/deep/x.png", "cat/a.png", "dog/.hidden.png", ".git/c.png", "dog/notes.txt"):
        write(tmp_path / "p" / name, b"x")
    rows = open_rows("p", base=tmp_path)
    assert rows.columns == ("image", "label", "file_name")
    assert [(row["label"], row["file_name"]) for row in rows] == [
        ("cat", "cat/a.png"),
        ("cat", "cat/deep/x.png"),
        ("dog", "dog/b.JPG"),
    ]
    assert rows[0]["image"] == {"bytes": None, "path": str(tmp_path / "p" / "cat" / "a.png")}
    assert rows.where(2) == "p/dog/b.JPG"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "p" / "b.wav", b"x")
    write(tmp_path / "p" / "a.flac", b"x")
    rows = open_rows(tmp_path / "p")
    assert rows.columns == ("audio", "file_name")
    assert list(rows.column("file_name")) == ["a.flac", "b.wav"]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("metadata.csv", "file_name,text\nb.png,second\na.png,first\nb.png,again\n"),
        (
            "metadata.jsonl",
            "\n".join(
                json.dumps({"file_name": file, "text": text})
                for file, text in (("b.png", "second"), ("a.png", "first"), ("./b.png", "again"))
            ),
        ),
    ],
)
def test_metadata_is_joined_by_file_name(tmp_path: Path, name: str, body: str) -> None:
    write(tmp_path / "p" / name, body)
    for image in ("a.png", "b.png"):
        write(tmp_path / "p" / image, b"x")
    rows = open_rows(tmp_path / "p")
    assert rows.columns == ("image", "file_name", "text")
    found = [(Path(row["image"]["path"]).name, row["file_name"], row["text"]) for row in rows]
    assert found == [("b.png", "b.png", "second"), ("a.png", "a.png", "first"), ("b.png", "b.png", "again")]


def test_metadata_labels_win_over_folder_names(tmp_path: Path) -> None:
    write(tmp_path / "p" / "metadata.csv", "file_name,label\ntrain/a.png,cat\n")
    write(tmp_path / "p" / "train" / "a.png", b"x")
    assert list(open_rows(tmp_path / "p").column("label")) == ["cat"]


def test_metadata_and_media_must_name_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.png", b"x")
    write(tmp_path / "p" / "metadata.csv", "file_name,text\na.png,x\naa.png,y\n")
    assert message(InputError, "p", base=tmp_path) == (
        "'p/metadata.csv' row 2 names 'aa.png', which is not there; did you mean 'a.png'?"
    )
    write(tmp_path / "p" / "metadata.csv", "file_name,text\na.png,x\n")
    write(tmp_path / "p" / "b.png", b"x")
    expected = "'p/metadata.csv' does not list 1 image files (first: 'b.png')"
    assert message(InputError, "p", base=tmp_path) == expected
    write(tmp_path / "p" / "metadata.csv", "filename,text\na.png,x\n")
    expected = "'p/metadata.csv' has no column 'file_name'; it has filename, text"
    assert message(InputError, "p", base=tmp_path) == expected


def test_a_folder_of_images_and_audio_asks_which(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.png", b"x")
    write(tmp_path / "p" / "b.wav", b"x")
    assert message(UsageError, tmp_path / "p").startswith("'p' holds 1 image files and 1 audio files; which one?")


def test_files_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "p" / "cat" / "a.png", b"x")
    write(tmp_path / "p" / "b.png", b"x")
    assert "has class folders and 1 files beside them (first: 'b.png')" in message(UsageError, tmp_path / "p")


def test_split_folders_are_not_classes(tmp_path: Path) -> None:
    write(tmp_path / "p" / "train" / "cat" / "a.png", b"x")
    write(tmp_path / "p" / "test" / "cat" / "b.png", b"x")
    expected = "'p' holds splits, not classes; name one: 'p/test', 'p/train'"
    assert message(UsageError, "p", base=tmp_path) == expected
    assert list(open_rows("p/train", base=tmp_path).column("label")) == ["cat"]


def test_a_folder_without_media_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.csv", "x\n1\n")
    write(tmp_path / "p" / "b.pdf", b"x")
    assert message(UsageError, "p", base=tmp_path) == (
        "folder 'p' has no images or audio; found 1 .csv, 1 .pdf; name the table, such as 'p/a.csv'"
    )
    (tmp_path / "q").mkdir()
    assert message(InputError, "q", base=tmp_path).startswith("folder 'q' is empty")


# Bad input: the kind of error and its words.


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.txt", "x.parquet", "x.csv.gz", "x.txt.zst"])
def test_an_empty_file_says_so(tmp_path: Path, name: str) -> None:
    packed = {".gz": gzip.compress(b"", mtime=0), ".zst": b""}
    write(tmp_path / name, packed.get(Path(name).suffix, b""))
    assert message(InputError, tmp_path / name) == f"'{name}' is empty"


@pytest.mark.parametrize(
    ("name", "body"), [("x.csv", "text,label\n"), ("x.tsv", "\n\n"), ("x.jsonl", "\n"), ("x.json", "[]")]
)
def test_a_file_without_rows_says_so(tmp_path: Path, name: str, body: str) -> None:
    write(tmp_path / name, body)
    assert message(InputError, tmp_path / name) == f"'{name}' has no rows"


def test_a_parquet_without_rows_says_so(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", text=pa.array([], pa.string()))
    assert message(InputError, path) == "'x.parquet' has no rows"


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("x.csv", 'a,b\n"1\n2",3\n4\n', "'x.csv' line 4 has 1 fields, expected 2 (a, b)"),
        ("x.tsv", "a\tb\n1\t2\n1\t2\t3\n", "'x.tsv' line 3 has 3 fields, expected 2 (a, b)"),
        ("x.csv", 'a\nok\n"open\nmore\n', "'x.csv' line 3 is not valid csv: unexpected end of data; check the quotes"),
        ("x.csv", 'a\n"b"c\n', "'x.csv' line 2 is not valid csv: ',' expected after '\"'; check the quotes"),
        ("x.csv", "a,b,a\n1,2,3\n", "'x.csv' has more than one column 'a'; rename one of them"),
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', "'x.jsonl' line 3 is not valid JSON: Expecting value at column 7"),
        ("x.jsonl", "[1]\n", "'x.jsonl' line 1 is a JSON list; expected an object"),
        ("x.json", '[{"a": 1},\n 3]', "'x.json' item 2 is a JSON int; expected an object"),
        ("x.json", '[{"a": 1},\n nope]', "'x.json' line 2 is not valid JSON"),
        ("x.jsonl", "[" * 100_000, "'x.jsonl' line 1 is not usable JSON: maximum recursion"),
        ("x.txt", b"ok\ncaf\xe9\n", "'x.txt' line 2 is not UTF-8 (byte 0xe9 at 4); save the file as UTF-8"),
        ("x.csv", b"\xff\xfea\x00", "'x.csv' line 1 is not UTF-8 (byte 0xff at 1)"),
        ("x.parquet", b"PAR1 but no", "'x.parquet' is not a readable parquet file: "),
        ("x.txt.gz", b"plain", "'x.txt.gz' is damaged: Not a gzipped file"),
        ("x.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "'x.txt.gz' is damaged: Compressed file ended"),
        ("x.txt.zst", b"plain text", "'x.txt.zst' is damaged: "),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, body: str | bytes, words: str) -> None:
    write(tmp_path / name, body)
    assert message(InputError, tmp_path / name).startswith(words)


def test_a_truncated_zst_does_not_pass_as_a_short_file(tmp_path: Path) -> None:
    body = zstd(b"".join(hashlib.sha256(bytes([i])).hexdigest().encode() + b"\n" for i in range(200)))
    write(tmp_path / "x.txt.zst", body[: len(body) // 2])
    assert message(InputError, tmp_path / "x.txt.zst") == "'x.txt.zst' is damaged: it ends in the middle of a frame"


def test_a_truncated_parquet_is_one_line(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", n=list(range(1000))).read_bytes()
    write(tmp_path / "x.parquet", whole[:-20])
    assert message(InputError, tmp_path / "x.parquet").startswith("'x.parquet' is not a readable parquet file")


def test_zst_without_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.txt.zst", b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    expected = "reading 'x.txt.zst' needs zstandard; run: pip install zstandard"
    assert message(UsageError, tmp_path / "x.txt.zst") == expected


def test_columns_of_the_wrong_number_name_line_and_counts(tmp_path: Path) -> None:
    write(tmp_path / "x.tsv", "good\t1\n")
    assert message(UsageError, tmp_path / "x.tsv", columns=["text"]).startswith(
        "'x.tsv' line 1 has 2 fields, expected 1 (text)"
    )
    write(tmp_path / "x.txt", "good\n")
    assert message(UsageError, tmp_path / "x.txt", columns=["a", "b"]) == (
        "'x.txt' has one column, but columns names 2 (a, b)"
    )


def test_parallel_text_of_unequal_length_names_both_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.en", "1\n2\n3\n")
    write(tmp_path / "a.de", "1\n2\n")
    words = message(InputError, {"source": "a.en", "target": "a.de"}, base=tmp_path)
    assert words.startswith("'a.en' has 3 lines and 'a.de' has 2")


def test_parallel_text_takes_no_tables(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "1\n")
    assert message(UsageError, {"source": "a.csv"}, base=tmp_path).startswith("'a.csv' is not line-by-line text")
    assert message(UsageError, {}).startswith("the table of text files is empty")
    write(tmp_path / "a.en", "")
    assert message(InputError, {"source": "a.en"}, base=tmp_path) == "'a.en' is empty"


def test_an_unknown_extension_lists_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path / "x.xlsx", b"x")
    words = message(UsageError, tmp_path / "x.xlsx")
    assert words.startswith("'x.xlsx' has the unknown extension '.xlsx'; known are .parquet, .csv, .tsv, .jsonl")
    write(tmp_path / "data", b"x")
    assert message(UsageError, tmp_path / "data").startswith("'data' has no extension")
    write(tmp_path / "x.parquet.gz", b"x")
    assert message(UsageError, tmp_path / "x.parquet.gz").startswith("'x.parquet.gz' is a compressed parquet file")


def test_a_wrong_path_suggests_its_siblings(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.csv", "x\n1\n")
    near = message(NotFoundError, "data/trian.csv", base=tmp_path)
    assert near == "no file or folder 'data/trian.csv'; did you mean 'train.csv'?"
    assert message(NotFoundError, "dat/train.csv", base=tmp_path).endswith("did you mean 'data'?")
    assert message(NotFoundError, {"source": "data/trian.csv"}, base=tmp_path) == near
    assert message(NotFoundError, str(tmp_path / "zzz.csv")).endswith("'; check the path")
    far = message(NotFoundError, "zzz.csv", base=tmp_path)
    assert far.startswith(f"no file or folder 'zzz.csv'; relative paths start from '{tmp_path}' then '")


def test_a_glob_without_matches_and_an_empty_list_are_errors(tmp_path: Path) -> None:
    assert message(NotFoundError, "part-*.csv", base=tmp_path).startswith("no file matches 'part-*.csv'")
    assert message(UsageError, []).startswith("the list of data files is empty")


# Hub data sets.


def test_offline_a_hub_data_set_fails_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mmhub.data.sources import open_rows; from mmhub.errors import NetworkError\n"
        "start = time.perf_counter()\n"
        "try: open_rows(sys.argv[1])\n"
        "except NetworkError as error: print(int(error.exit_code), time.perf_counter() - start, error)"
    )
    root = Path(__file__).parents[1]
    env = {"PATH": "", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("org/nothing", "hub:org/nothing@v1:test"):
        run = subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, cwd=tmp_path)
        exit_code, seconds, words = run.stdout.split(" ", 2)
        assert int(exit_code) == ExitCode.NETWORK
        assert float(seconds) < 2
        assert words.startswith("data set 'org/nothing' is not in the cache, and offline mode is on")


def test_an_unreachable_hub_fails_without_retries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    go_online(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    words = message(NetworkError, "org/nothing")
    assert time.perf_counter() - start < 5
    assert words.startswith("cannot ask http://127.0.0.1:9 for data set 'org/nothing': ")


def go_online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """A Hub with one data set of images; returns the list of what was asked of it."""
    import datasets

    asked: list[tuple[Any, ...]] = []
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": [{"bytes": b"not decoded", "path": "a.png"}], "label": [1]}, features)

    def load_dataset(repo: str, config: str | None, *, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((repo, config, revision, split))
        if split == "nope":
            raise ValueError('Unknown split "nope".\nShould be one of [train]')
        return data

    def dataset_info(self: Any, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.append((repo, revision))
        return SimpleNamespace(sha="c0ffee")

    go_online(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return asked


@pytest.mark.parametrize(
    ("name", "revision", "config", "split"),
    [
        ("org/set", None, None, "valid"),
        ("hub:org/set@v1#small:train[:10%]", "v1", "small", "train[:10%]"),
        ("hf-hub:org/set:test", None, None, "test"),
    ],
)
def test_a_hub_data_set_is_pinned_and_its_media_stay_encoded(
    hub: list[tuple[Any, ...]], name: str, revision: str | None, config: str | None, split: str
) -> None:
    rows = open_rows(name, split="valid")
    assert hub == [("org/set", revision), ("hf://datasets/org/set", config, "c0ffee", split)]
    assert list(rows) == [{"image": {"bytes": b"not decoded", "path": "a.png"}, "label": 1}]
    assert rows.where(0) == f"org/set:{split} row 1"
    assert rows.folder(0) is None
    assert rows.fingerprint() == {"source": name, "rows": 1, "bytes": 0, "files": [], "revision": "c0ffee"}


def test_rows_of_another_commit_than_the_named_one_are_refused(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = "a" * 40
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "org___set").mkdir(parents=True)
    file = {"filename": f"/cache/org___set/default/0.0.0/{cached}/set-train.arrow"}
    monkeypatch.setattr("datasets.Dataset.cache_files", property(lambda self: [file]))
    assert message(NetworkError, "org/set@v1") == (
        f"data set 'org/set' is not in the cache at revision 'v1', only at commit {cached}; "
        f"go online, or name that commit: org/set@{cached}"
    )
    for name in ("org/set", f"org/set@{cached}"):
        assert open_rows(name).fingerprint()["revision"] == cached
    assert all(len(question) == 4 for question in hub)  # offline, the Hub was never asked


def test_a_local_folder_or_a_near_miss_of_one_is_not_a_hub_data_set(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    write(tmp_path / "data" / "pets" / "cat" / "a.png", b"x")
    assert open_rows("data/pets").columns == ("image", "label", "file_name")
    assert "did you mean 'pets'?" in message(NotFoundError, "data/pest")
    assert "no file or folder" in message(NotFoundError, "org/train.csv.gz")
    assert not hub


def test_an_unknown_split_is_a_usage_error(hub: list[tuple[Any, ...]]) -> None:
    words = message(UsageError, "org/set:nope")
    assert words.startswith("cannot load data set 'org/set': Unknown split \"nope\". Should be one of [train]")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        ("RepositoryNotFoundError", NotFoundError, "no file, folder or Hub data set 'org/set'"),
        ("RevisionNotFoundError", NotFoundError, "data set 'org/set' has no revision 'v9'"),
        ("GatedRepoError", MmhubError, "data set 'org/set' is gated"),
    ],
)
def test_what_the_hub_refuses_has_its_own_error(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, raised: str, kind: type[MmhubError], words: str
) -> None:
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> None:
        error = getattr(errors, raised)
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    assert message(kind, "hub:org/set@v9").startswith(words)


def test_a_malformed_hub_name_is_a_usage_error() -> None:
    assert message(UsageError, "hub:a/b/c").startswith("'hub:a/b/c' does not name a Hub data set")
