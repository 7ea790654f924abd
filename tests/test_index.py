"""`mmhub.index`: what is found, what a second build does, and what interrupted, damaged and moved indexes do."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.index import Index, build
from mmhub.index.builder import Options, renew
from mmhub.index.listing import _digest
from mmhub.index.progress import Progress
from mmhub.index.store import HEADER, VECTORS, Entry, Header, write_index
from mmhub.index.vectors import identity_of, vectors_of
from mmhub.model import Columns, Model
from tests.colours import colour_model, picture, pictures


@pytest.fixture
def model() -> Model:
    return colour_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures")


def names(results: list[dict[str, Any]]) -> list[str]:
    return [Path(result["path"]).name for result in results]


def counts(built: Any) -> tuple[int, int, int, int, int]:
    return built.added, built.changed, built.removed, built.kept, len(built.failed)


def seen(model: Model) -> int:
    encoder: Any = model.encoders["image"]
    count, encoder.seen = int(encoder.seen), 0
    return count


def test_pictures_are_found_by_words_and_by_pictures_with_their_cosines(model: Model, folder: Path) -> None:
    index = build(model, folder)
    assert names(index.search({"text": "something green"})) == ["g.png", "b.png", "r.png"]
    best = index.search({"text": "red"}, 1)
    assert best == [{"path": str(folder / "r.png"), "score": pytest.approx(1.0)}]
    (_, second, _) = index.search({"image": str(folder / "b.png")})
    b, r = np.array([40, 0, 220]), np.array([255, 0, 0])
    assert second == {"path": str(folder / "r.png"), "score": pytest.approx(b[0] / np.linalg.norm(b) * r[0] / 255)}


def test_an_index_is_read_again_by_another_process_with_the_folder_it_lies_in(model: Model, folder: Path) -> None:
    build(model, folder)
    folder = folder.rename(folder.with_name("elsewhere"))
    found = Index.open(folder, model=model)
    assert len(found) == 3 and found.source == folder
    assert found.search({"text": "blue"}, 1)[0]["path"] == str(folder / "b.png")
    assert names(Index.open(folder / ".mmhub-index", model=model).search({"text": "blue"}, 1)) == ["b.png"]


def test_a_second_build_embeds_only_what_is_new_or_changed_and_drops_what_is_gone(model: Model, folder: Path) -> None:
    assert counts(renew(model, folder)) == (3, 0, 0, 0, 0) and seen(model) == 3
    written = (folder / ".mmhub-index" / HEADER).stat().st_mtime_ns
    assert counts(renew(model, folder)) == (0, 0, 0, 3, 0) and seen(model) == 0
    assert (folder / ".mmhub-index" / HEADER).stat().st_mtime_ns == written

    picture(folder / "new.png", (0, 0, 255))
    picture(folder / "r.png", (0, 255, 0))
    (folder / "b.png").unlink()
    built = renew(model, folder)
    assert counts(built) == (1, 1, 1, 1, 0) and seen(model) == 2
    assert names(built.index.search({"text": "blue"}, 1)) == ["new.png"]
    assert names(built.index.search({"text": "green"}, 2)) == ["r.png", "g.png"]


def test_what_a_second_build_keeps_is_what_a_new_index_would_hold(model: Model, folder: Path) -> None:
    build(model, folder)
    picture(folder / "a.png", (9, 99, 199))
    again = build(model, folder)
    whole = build(model, folder, out=folder.with_name("whole"))
    assert np.array_equal(again.vectors, whole.vectors) and again.header.entries == whole.header.entries


def test_a_file_of_the_same_size_but_another_time_has_changed(model: Model, tmp_path: Path) -> None:
    path = picture(tmp_path / "one.bmp", (255, 0, 0))
    (before,) = build(model, tmp_path).header.entries
    os.utime(picture(path, (0, 255, 0)), ns=(1, 1))  # however coarse the clock
    built = renew(model, tmp_path)
    assert counts(built) == (0, 1, 0, 0, 0) and built.index.header.entries[0].size == before.size
    assert built.index.search({"text": "green"})[0]["score"] == pytest.approx(1)


def test_hidden_files_and_folders_are_left_out(model: Model, folder: Path) -> None:
    picture(folder / ".thumbs" / "r.png", (255, 0, 0))
    picture(folder / ".r.png", (255, 0, 0))
    assert len(build(model, folder)) == 3


def test_unreadable_files_are_named_and_left_out(model: Model, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "lost.png").symlink_to("nowhere")
    (folder / "empty.jpg").touch()
    picture(folder / "black.png", (0, 0, 0))
    told: list[str] = []
    built = renew(model, folder, options=Options(failed=lambda path, error: told.append(path)))
    assert sorted(told) == ["black.png", "broken.png", "empty.jpg", "lost.png"] == sorted(p for p, _ in built.failed)
    assert dict(built.failed)["black.png"] == "it has no vector"
    assert counts(built) == (3, 0, 0, 0, 4)
    assert counts(renew(model, folder)) == (0, 0, 0, 3, 4)


def test_an_unreadable_file_stops_the_build_where_that_is_wanted(model: Model, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^broken\.png: .*is no image") as caught:
        build(model, folder, options=Options(stop=True))
    assert "--on-error" in str(caught.value.hint)


def test_a_build_in_which_nothing_could_be_read_fails(model: Model, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 1 image inputs"):
        build(model, tmp_path)
    assert not (tmp_path / ".mmhub-index").exists()


def test_a_folder_without_such_files_says_what_it_holds(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(InputError, match="there is no image file below") as caught:
        build(model, tmp_path)
    assert caught.value.hint == "it holds 1 .txt"


def test_another_model_and_the_same_one_trained_on_have_to_be_asked_for(model: Model, folder: Path) -> None:
    model.name = "colours"
    build(model, folder)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(UsageError, match="other weights of that model") as caught:
        build(model, folder)
    assert "--rebuild" in str(caught.value.hint)
    with pytest.raises(UsageError, match="another model than 'colours'"):
        Index.open(folder, model=model).search({"text": "red"})
    other = colour_model("image", task="embedding")
    with pytest.raises(UsageError, match="another model, colours"):
        build(other, folder)
    index = build(other, folder, options=Options(rebuild=True))
    assert names(index.search({"image": str(folder / "r.png")}, 1)) == ["r.png"]


def test_an_interrupted_build_goes_on_where_it_ended_and_leaves_the_old_index(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(model, folder).header
    for number in range(6):
        picture(folder / f"more-{number}.png", (number, 20, 30))
    seen(model)
    calls = [0]

    def interrupted(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return vectors_of(*given)

    with monkeypatch.context() as patch:
        patch.setattr("mmhub.index.builder.vectors_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(model, folder, options=Options(batch_size=2))
    assert Index.open(folder).header == old and seen(model) == 4
    assert counts(renew(model, folder)) == (6, 0, 0, 3, 0) and seen(model) == 2
    assert [path.name for path in folder.glob(".mmhub-index*")] == [".mmhub-index"]


def test_progress_is_saved_by_time_and_a_damaged_piece_of_it_costs_no_more_than_itself(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "partial", "me", tmp_path, "image", seconds=0)
    progress.add(["a", "b"], np.eye(2, dtype=np.float32))
    progress.add(["c"], np.ones((1, 2), np.float32))
    assert {stamp: v.tolist() for stamp, v in progress.read().items()} == {"a": [1, 0], "b": [0, 1], "c": [1, 1]}
    assert not Progress(tmp_path / "partial", "another", tmp_path, "image").read()
    assert not Progress(tmp_path / "partial", "me", tmp_path, "text").read()
    assert not Progress(tmp_path / "partial", "me", tmp_path / "another", "image").read()
    assert Progress(tmp_path / "partial", "me", tmp_path / "a" / "..", "image").read()
    first, _ = sorted((tmp_path / "partial").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    assert [*progress.read()] == ["c"]
    late = Progress(tmp_path / "late", "me", tmp_path, "image", seconds=60)
    late.add(["a"], np.ones((1, 2), np.float32))
    assert not (tmp_path / "late").exists()


def test_leftovers_of_another_folder_or_before_a_rebuild_are_not_taken(model: Model, tmp_path: Path) -> None:
    for name, colour in (("one", (255, 0, 0)), ("other", (0, 255, 0))):
        os.utime(picture(tmp_path / name / "p.bmp", colour), ns=(1, 1))  # the same name, size and time
    (entry,) = build(model, tmp_path / "one", out=tmp_path / "first").header.entries

    def leave(source: str) -> None:
        leftover = Progress(tmp_path / "out.partial", identity_of(model), tmp_path / source, "image", seconds=0)
        leftover.add([entry.stamp], np.array([[1, 0, 0]], np.float32))

    leave("one")
    index = build(model, tmp_path / "other", out=tmp_path / "out")
    assert index.search({"text": "green"})[0]["score"] == pytest.approx(1)
    leave("other")
    index = build(model, tmp_path / "other", out=tmp_path / "out", options=Options(rebuild=True))
    assert index.search({"text": "green"})[0]["score"] == pytest.approx(1)


def test_a_full_disk_leaves_the_old_index(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(model, folder)
    picture(folder / "a.png", (1, 2, 3))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmhub.index.store.write_file", full)
    with pytest.raises(MmhubError, match=r"cannot write the index .* no space left"):
        build(model, folder)
    monkeypatch.undo()
    assert len(Index.open(folder)) == 3
    assert names(Index.open(folder, model=model).search({"text": "red"}, 1)) == ["r.png"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other"])
def test_a_damaged_index_is_told_from_a_sound_one(model: Model, folder: Path, damage: str) -> None:
    build(model, folder)
    vectors, header = (folder / ".mmhub-index" / name for name in (VECTORS, HEADER))
    content = vectors.read_bytes()
    if damage == "cut":
        header.write_text(header.read_text()[:-9])
    elif damage == "flipped":
        vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        vectors.unlink()
    else:
        header.write_text(json.dumps(json.loads(header.read_text()) | {"dim": "three"}))
    with pytest.raises(TrustError, match=r"is damaged") as caught:
        Index.open(folder, model=model).search({"text": "red"})
    assert "--rebuild" in str(caught.value.hint)
    assert len(build(model, folder, options=Options(rebuild=True))) == 3


@pytest.mark.parametrize("damage", ["noise", "metric", "kind"])
def test_vectors_that_do_not_fit_their_header_are_damage(model: Model, folder: Path, damage: str) -> None:
    import faiss

    build(model, folder)
    vectors, header = (folder / ".mmhub-index" / name for name in (VECTORS, HEADER))
    found = faiss.IndexFlatL2(3) if damage == "metric" else faiss.IndexHNSWFlat(3, 8, faiss.METRIC_INNER_PRODUCT)
    found.add(np.eye(3, dtype=np.float32))
    vectors.write_bytes(b"IxF" * 30 if damage == "noise" else faiss.serialize_index(found).tobytes())
    known = {"sha256": hashlib.sha256(vectors.read_bytes()).hexdigest()}
    header.write_text(json.dumps(json.loads(header.read_text()) | known))
    with pytest.raises(TrustError, match="is damaged") as caught:
        Index.open(folder, model=model).search({"text": "red"})
    assert "\n" not in caught.value.message


def test_an_index_of_a_newer_mmhub_asks_for_an_upgrade(model: Model, folder: Path) -> None:
    build(model, folder)
    header = folder / ".mmhub-index" / HEADER
    header.write_text(json.dumps(json.loads(header.read_text()) | {"mmhub_index": 2}))
    with pytest.raises(PluginError, match="has format 2"):
        Index.open(folder)


def test_queries_that_cannot_be_answered_say_why(model: Model, folder: Path, tmp_path: Path) -> None:
    index = build(model, folder)
    with pytest.raises(UsageError, match="cannot find 0 results"):
        index.search({"text": "red"}, 0)
    with pytest.raises(UsageError, match="has no input 'audio'"):
        index.search({"audio": "a.wav"})
    with pytest.raises(UsageError, match="one text, picture or sound"):
        index.search({"text": "red", "image": "a.png"})
    with pytest.raises(InputError, match="this text has no vector"):
        index.search({"text": "colourless"})
    with pytest.raises(NotFoundError, match="has no index"):
        Index.open(tmp_path)
    with pytest.raises(NotFoundError, match="no folder, table or index"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="a model without a name"):
        Index.open(folder).search({"text": "red"})
    assert len(index.search({"text": "red"}, 99)) == 3


def test_only_a_retrieval_model_compares_different_modalities(folder: Path) -> None:
    index = build(colour_model(task="embedding"), folder)
    assert names(index.search({"image": str(folder / "deep" / "g.png")}, 1)) == ["g.png"]
    with pytest.raises(UsageError, match="vectors of text and of image cannot be compared"):
        index.search({"text": "green"})


def test_a_model_that_writes_gives_no_vectors(folder: Path) -> None:
    from tests.text_decoders import Scripted, model_of

    with pytest.raises(UsageError, match="gives no vectors") as caught:
        build(model_of(Scripted("red")), folder)
    assert "NAME#image" in str(caught.value.hint)


def test_an_index_may_be_kept_elsewhere_and_replaces_nothing_else(model: Model, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    build(model, folder, out=out)
    assert names(Index.open(out, model=model).search({"text": "red"}, 1)) == ["r.png"]
    assert not (folder / ".mmhub-index").exists()
    other = pictures(tmp_path / "other")
    with pytest.raises(UsageError, match=r"is of '.*pictures', not of '.*other'"):
        build(model, other, out=out)
    folder.rename(tmp_path / "moved")
    with pytest.raises(NotFoundError, match="which was indexed, is not there any more"):
        Index.open(out, model=model).search({"text": "red"})
    seen(model)
    assert len(build(model, tmp_path / "moved", out=out)) == 3 and seen(model) == 0
    with pytest.raises(UsageError, match="is no index"):
        build(model, other, out=tmp_path / "moved")
    (out / "mine.txt").touch()
    with pytest.raises(UsageError, match="is no index"):
        build(model, other, out=out, options=Options(rebuild=True))


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_rows_of_a_table_are_indexed_by_their_content(folder: Path) -> None:
    model = colour_model(columns=Columns(inputs={"image": "photo", "text": "caption"}))
    rows = [{"photo": name, "caption": name} for name in ("r.png", "", "deep/g.png")]
    path = table(folder / "set.csv", rows)
    index = build(model, path)
    assert index.search({"text": "green"}, 1) == [{"path": str(path), "row": 3, "score": pytest.approx(1, abs=0.01)}]
    seen(model)
    table(path, [{"photo": "b.png", "caption": "b"}, *rows])
    built = renew(model, path)
    assert seen(model) == 1 and built.index.search({"text": "green"}, 1)[0]["row"] == 4
    assert Index.open(path).header == built.index.header


def test_a_file_that_is_found_from_the_current_folder_is_seen_to_change(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "one.bmp", (255, 0, 0))
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables" / "set.csv", [{"image": "one.bmp"}])
    build(model, path)
    os.utime(picture(tmp_path / "one.bmp", (0, 255, 0)), ns=(1, 1))
    built = renew(model, path)
    assert counts(built) == (0, 1, 0, 0, 0)
    assert built.index.search({"text": "green"})[0]["score"] == pytest.approx(1)


def test_contents_that_are_not_the_same_have_not_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    long = np.zeros(5000, np.float32)
    other = long.copy()
    other[2500] = 1  # where the repr of an array says "..."
    path = tmp_path / "a"
    raws: list[Any] = [[path, path], [path], "a" * 5000, "\0", [1, 2], [12], long, long.reshape(2, -1), (8000, long)]
    raws += [{"array": long}, {"array": other}, {"array": [0.0]}, (8000, other), [long, other], [other, long]]
    raws += [np.array([long, None], object)]
    assert len({_digest(raw, "audio") for raw in raws}) == len(raws)
    assert _digest({"array": long.copy()}, "audio") == _digest({"array": long}, "audio")
    before = _digest(["a"], "image"), _digest("a", "text")
    os.utime(tmp_path / "a", ns=(1, 1))
    after = _digest(["a"], "image"), _digest("a", "text")
    assert before[0] != after[0], "a file among several has changed"
    assert before[1] == after[1], "a text is a text, whatever files are called"


def test_pictures_inside_a_table_are_known_by_their_bytes_whatever_they_are_called(model: Model, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "set.parquet"
    for name in ("first", "second"):
        cells = [{"bytes": (folder / file).read_bytes(), "path": f"{name}-{file}"} for file in ("b.png", "r.png")]
        pq.write_table(pa.table({"image": cells}), path)
        built = renew(model, path)
    assert counts(built) == (0, 0, 0, 2, 0) and seen(model) == 2
    assert built.index.search({"text": "red"}, 1) == [{"path": str(path), "row": 2, "score": pytest.approx(1)}]


def test_texts_are_found_by_texts_and_shown(tmp_path: Path) -> None:
    model = colour_model("text")
    path = table(tmp_path / "faq.csv", [{"question": "why", "answer": "it is red"}, {"question": "", "answer": "blue"}])
    with pytest.raises(UsageError, match="no column 'text'") as caught:
        build(model, path)
    assert "--column" in str(caught.value.hint)
    with pytest.raises(UsageError, match="names two columns"):
        build(model, path, column="question+answer")
    (found,) = build(model, path, column="answer").search({"text": "red red"}, 1)
    assert found == {"path": str(path), "row": 1, "score": pytest.approx(1.0), "text": "it is red"}


def test_text_files_are_read_and_those_that_are_not_text_are_named(tmp_path: Path) -> None:
    model = colour_model("text")
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "b.md").write_text("blue")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    built = renew(model, tmp_path)
    assert names(built.index.search({"text": "blue"})) == ["b.md", "a.txt"]
    assert [path for path, _ in built.failed] == ["c.txt"]


def test_of_several_kinds_of_files_one_has_to_be_chosen(tmp_path: Path) -> None:
    model = colour_model("text", "image", "audio", task="embedding")
    pictures(tmp_path)
    (tmp_path / "a.wav").touch()
    with pytest.raises(UsageError, match="holds 3 image files and 1 audio files") as caught:
        build(model, tmp_path)
    assert "--modality image" in str(caught.value.hint)
    assert len(build(model, tmp_path, modality="image")) == 3
    assert len(build(model, tmp_path)) == 3  # as before
    with pytest.raises(UsageError, match="holds image, not text"):
        build(model, tmp_path, modality="text")


def test_approximate_search_finds_what_exact_search_does(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [Entry(path=f"{number:04}.png") for number in range(2000)]
    found = {}
    for kind in ("exact", "hnsw"):
        header: Any = Header(model="", identity="", modality="image", source="..", kind=kind, dim=16, entries=entries)
        index = Index(tmp_path / kind, write_index(tmp_path / kind, header, vectors))
        index._embed = lambda query: vectors[query["row"]][None]  # type: ignore
        found[kind] = [index.search({"row": row}, 100) for row in range(50)]
        assert np.array_equal(index.vectors, vectors)
    shared = 0
    for row in range(50):
        exact, near = (found[kind][row] for kind in ("exact", "hnsw"))
        assert names(exact)[0] == names(near)[0] == f"{row:04}.png"
        assert near[0]["score"] == pytest.approx(1) and near[-1]["score"] == pytest.approx(exact[-1]["score"], abs=0.1)
        shared += len({*names(exact)} & {*names(near)})
    assert shared >= 0.97 * 100 * 50


def test_the_kind_of_search_stays_until_another_is_asked_for(model: Model, folder: Path) -> None:
    build(model, folder, options=Options(kind="hnsw"))
    seen(model)
    assert build(model, folder).header.kind == "hnsw"
    index = build(model, folder, options=Options(kind="exact"))
    assert index.header.kind == "exact" and names(index.search({"text": "red"}, 1)) == ["r.png"] and seen(model) == 0


def test_without_faiss_an_install_line_is_given(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PluginError, match="faiss, which is not installed") as caught:
        build(model, folder)
    assert caught.value.hint == "pip install 'mmhub[index]', or pip install faiss-cpu"


@pytest.mark.slow
def test_three_thousand_pictures_are_indexed_and_renewed_by_workers(model: Model, tmp_path: Path) -> None:
    random.seed(0)
    for number in range(3000):
        colour = (random.randrange(256), random.randrange(256), 1 + random.randrange(255))
        picture(tmp_path / f"{number % 40}" / f"{number}.png", colour)
    options = Options(workers=2)
    assert counts(renew(model, tmp_path, options=options)) == (3000, 0, 0, 0, 0)
    picture(tmp_path / "red.png", (255, 0, 0))
    (tmp_path / "7" / "7.png").unlink()
    start = time.monotonic()
    built = renew(model, tmp_path, options=options)
    assert counts(built) == (1, 0, 1, 2999, 0)
    assert time.monotonic() - start < 20
    assert names(built.index.search({"text": "red"}, 1)) == ["red.png"]
