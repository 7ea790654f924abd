"""`mmhub eval --report`: one page that needs nothing else, equals report.json, and runs nothing that rows hold."""

from __future__ import annotations

import base64
import errno
import io
import json
import sys
import wave
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmhub.build import compose
from mmhub.cli.evaluate import _text
from mmhub.cli.main import main
from mmhub.data.sources import open_rows
from mmhub.errors import MmhubError, PluginError, UsageError
from mmhub.evaluation import Answered
from mmhub.interfaces import TASKS, Policy, find_task
from mmhub.metrics import explain, measure
from mmhub.metrics.understanding import calibration
from mmhub.report import check_report, media, write_report
from mmhub.report.content import calibration_bins
from mmhub.report.differences import differences
from mmhub.report.media import Shelf, picture, sound
from mmhub.report.mistakes import find_mistakes
from mmhub.report.page import number
from mmhub.report.pictures import draw_confusion, draw_scatter
from mmhub.report.searches import find_searches
from tests.conftest import flac, png

LABELS = ["<script>alert(1)</script>", "b & $x_{$", "猫", "d", "e", "f"]


class Page(HTMLParser):
    """What a page holds: tags, addresses, the text of each cell of each table by id, and all of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        found = dict(attrs)
        assert not [name for name in found if name.startswith("on")], "no script in an attribute"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "table":
            self._rows = self.tables.setdefault(found.get("id") or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open) and self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip()

    def images(self) -> list[Image.Image]:
        found = [link.partition(",")[2] for link in self.links if link.startswith("data:image/")]
        return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]

    def sounds(self) -> list[bytes]:
        return [base64.b64decode(link.partition(",")[2]) for link in self.links if link.startswith("data:audio/")]


def page_of(folder: Path) -> tuple[Page, dict[str, Any]]:
    """Read a report, and hold its page to what every page promises."""
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(link.startswith("data:") for link in page.links)
    for part in ("@import", "url(", "http:", "https:"):
        assert part not in text
    for image in page.images():
        image.load()
    return page, json.loads((folder / "report.json").read_text())


def report_of(
    folder: Path,
    task: str,
    rows: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    truth: Sequence[Any],
    inputs: dict[str, str],
    metrics: dict[str, Any] | None = None,
    skipped: Sequence[str] = (),
) -> tuple[Page, dict[str, Any]]:
    """Write the report on an evaluation of which the answers are given."""
    kept = Answered(
        open_rows(list(rows)), inputs, "", list(zip(range(len(truth)), predictions, truth, strict=True)), skipped
    )
    found = {
        "name": "a model",
        "task": task,
        "rows": len(truth),
        "skipped": len(skipped),
        "metrics": metrics if metrics is not None else measure(find_task(task).metrics, predictions, truth),
        "subsets": {},
        "details": explain(task, predictions, truth),
    }
    write_report(folder, SimpleNamespace(task=find_task(task), sources={}), found, kept, "test.csv")  # type: ignore[arg-type]
    return page_of(folder)


def run(args: list[str]) -> int:
    """Run the command line in this process; return what it ends with."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows six awkward labels."""
    built = compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}},
        decoder={"use": "classification", "config": {"labels": LABELS}},
        texts=["a b c d"],
    )
    return built.save(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [{"text": f"{'abcd'[i % 4]} <img src=x onerror=alert(1)> {i}", "label": LABELS[i % 6]} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "a", "label": "<i>unknown</i>"}])))
    return path


def test_an_evaluation_writes_a_page_and_its_numbers(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    asked = ["eval", str(model), "--data", str(table), "--target-column", "label", "--on-error", "skip"]
    assert run([*asked, "--report", str(out), "--json"]) == 0
    said, notes = capsys.readouterr()
    found = json.loads(said)
    page, numbers = page_of(out)
    assert {key: numbers[key] for key in ("task", "rows", "skipped", "metrics", "details")} == {
        key: found[key] for key in ("task", "rows", "skipped", "metrics", "details")
    }
    assert (numbers["rows"], numbers["skipped"], numbers["data"]) == (12, 1, "test.jsonl")
    assert {"python", "torch", "mmhub", "mmhub-text", "mmhub-heads"} <= set(numbers["versions"])
    assert str(out / "index.html") in notes
    shown = {row[0]: row[1] for row in page.tables["metrics"]}
    assert {name: shown[name] for name in numbers["metrics"]} == {k: number(v) for k, v in numbers["metrics"].items()}
    classes = {row[0]: row for row in page.tables["classes"][1:]}
    for entry in numbers["details"]["classes"]:
        row = classes[entry["label"]]
        assert [row[1], row[2], row[3], row[5]] == [number(entry[k]) for k in ("precision", "recall", "f1", "support")]
    scores = [float(row[3]) for row in page.tables["classes"][1:]]
    assert scores == sorted(scores), "the worst label comes first"
    assert "onerror=alert(1)" in page.text, "a text of a row is shown as text"
    assert "<i>unknown</i>" in numbers["unreadable"][0]
    assert "<i>unknown</i>" in page.text
    assert len(page.images()) == 2, "the confusion matrix, and how far scores can be trusted"
    assert base64.b64encode((out / "confusion.png").read_bytes()).decode() in (out / "index.html").read_text()


def test_a_report_that_fails_costs_the_page_and_not_the_numbers(
    model: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    asked = ["eval", str(model), "--data", str(table), "--target-column", "label", "--on-error", "skip", "--json"]
    assert run([*asked, "--report", str(tmp_path / "out")]) == 1
    said, errors = capsys.readouterr()
    assert json.loads(said)["rows"] == 12
    assert "error: cannot write the report" in errors


def test_what_a_report_needs_is_looked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MmhubError, match=r"cannot write the report to .*: file name too long; choose a shorter name"):
        check_report(tmp_path / ("n" * 300))
    with pytest.raises(MmhubError, match="file name too long"):
        check_report(tmp_path / ("n" * 250))  # the name it is written under is longer
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    for task in ("translation", "captioning", "question-answering", "visual-question-answering"):
        with pytest.raises(PluginError, match="compared by sacrebleu"):
            check_report(tmp_path / "out", task)
    with pytest.raises(PluginError, match="compared by rapidfuzz"):
        check_report(tmp_path / "out", "speech-recognition")
    check_report(tmp_path / "new" / "deep" / "out", "classification")
    assert not [*tmp_path.iterdir()], "a folder is tried, and nothing stays"


def test_a_folder_with_anything_else_in_it_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert run(["eval", "no/such-model", "--data", "no.csv", "--report", str(tmp_path)]) == 2
    assert "'thesis.tex', which is no part of a report\nhint: name a new folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, and a report is a folder"):
        check_report(tmp_path / "file")
    with pytest.raises(UsageError, match="file' is no folder you may write to"):
        check_report(tmp_path / "file" / "out" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.tex"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mmhub.report.folder.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(PluginError, match=r"drawn with matplotlib.*pip install 'mmhub\[report\]'"):
        check_report(tmp_path / "out")


def test_a_full_disk_is_one_line_and_keeps_the_older_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        report_of(tmp_path / "out", "regression", [{"text": "a"}], [{"value": 1.0}], [2.0], {"text": "text"})

    write()
    write()  # an older report is replaced
    before = (tmp_path / "out" / "index.html").read_text()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        MmhubError, match=r"cannot write the report to .*: no space left on the device; free some space"
    ):
        write()
    assert (tmp_path / "out" / "index.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_wrong_rows_the_model_was_surest_of_come_first_with_their_inputs(tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    rows = [{"image": {"bytes": png(i), "path": None}, "audio": {"bytes": flac(i), "path": None}} for i in range(3)]
    rows += [{"image": {"bytes": b"no picture", "path": None}, "audio": None}]
    predictions = [{"label": "a", "score": score} for score in (0.6, 0.99, 0.9, 0.7)]
    inputs = {"image": "image", "audio": "audio"}
    page, numbers = report_of(tmp_path / "out", "classification", rows, predictions, ["b", "a", "b", "b"], inputs)
    assert [(m["row"], m["truth"], m["answer"], m["score"]) for m in numbers["mistakes"]] == [
        (2, "b", "a", 0.9), (3, "b", "a", 0.7), (0, "b", "a", 0.6),
    ]  # fmt: skip
    assert [image.format for image in page.images()] == ["PNG", "PNG", "JPEG", "JPEG"]
    assert page.sounds() == [flac(2), flac(0)], "a short sound stays as it is"
    assert "image: it cannot be shown" in page.text
    assert "no audio" in page.text
    assert "3 of 3 rows that are not right" in page.text


def test_a_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "BUDGET", 20_000)
    rows = [{"audio": {"bytes": flac(i, seconds=1.0), "path": None}, "text": "long " * 5000} for i in range(60)]
    predictions = [{"label": "a", "score": 0.5}] * 60
    inputs = {"audio": "audio", "text": "text"}
    page, numbers = report_of(tmp_path / "out", "classification", rows, predictions, ["b"] * 60, inputs)
    assert len(numbers["mistakes"]) == 24
    assert 0 < sum(map(len, page.sounds())) < 20_000
    assert "audio left out: the page is full" in page.text
    assert (tmp_path / "out" / "index.html").stat().st_size < 200_000


def test_a_page_stays_small_whatever_is_long_and_has_no_blanks(tmp_path: Path) -> None:
    long = "x" * 20_000

    def page(task: str, prediction: dict[str, Any], truth: Any) -> str:
        report_of(tmp_path / task, task, [{"text": "x"}], [prediction], [truth], {"text": "text"})
        return (tmp_path / task / "index.html").read_text()

    assert "x" * 601 not in page("classification", {"label": long, "score": 0.9}, "b")
    assert "x" * 601 not in page("tagging", {"tags": [long], "words": [long]}, ["O"])
    text = page("multilabel", {"labels": ["0" + long, *map(str, range(400))]}, ["a" + long])
    assert "x" * 601 not in text
    assert text.count("<ins>") + text.count("<del>") == 200
    pieces = [(piece.kind, len(piece.text)) for piece in differences(long, "y" * 3000)]
    assert pieces == [("del", 3002), ("ins", 3000)], "cut, a blank and an ellipsis"


def answer_of(task: str) -> tuple[dict[str, Any], Any]:
    """A wrong answer to a row of a task, and the truth."""
    if task == "regression":
        return {"value": 2.0}, 1.0
    if task == "multilabel":
        return {"labels": ["a"]}, ["b"]
    if task == "tagging":
        return {"tags": ["O"]}, ["B"]
    if "classification" in task:
        return {"label": "a", "score": 0.5}, "b"
    return ({"grade": 1}, None) if task == "grading" else ({"text": "a"}, "b")


@pytest.mark.parametrize("task", [*TASKS, "zero-shot-classification", "grading"])
def test_mistakes_of_every_task_are_found_and_of_others_none_are_shown(task: str) -> None:
    kept = Answered(open_rows([{"text": "x"}]), {"text": "text"}, "", [(0, *answer_of(task))], [])
    found = find_mistakes(task, kept, Shelf(kept.rows, kept.inputs, kept.policy))
    shown = task not in ("language-modelling", "retrieval", "embedding", "grading")
    assert (found is not None) == shown
    assert found is None or found.wrong == 1


def test_a_report_says_no_folders_of_the_data(tmp_path: Path) -> None:
    data = tmp_path / "it's a secret place"
    data.mkdir()
    (data / "b.png").touch()
    rows = [{"image": str(data / name)} for name in ("a.png", "b.png")]
    errors = [f"test.csv row 3, column 'image': no file '{data / 'c.png'}'; check the path", "label '/m/02' is unknown"]
    answers = [{"label": "a", "score": 0.5}] * 2
    _, numbers = report_of(tmp_path / "out", "classification", rows, answers, "bb", {"image": "image"}, skipped=errors)
    text = (tmp_path / "out" / "index.html").read_text()
    assert tmp_path.name not in text + str(numbers)
    assert "secret" not in text + str(numbers)
    assert "no file &#39;a.png&#39;" in text
    assert "&#39;b.png&#39; is empty" in text
    assert numbers["unreadable"] == ["test.csv row 3, column 'image': no file 'c.png'; check the path", errors[1]]


def test_a_conversation_is_shown_by_message_and_without_its_answer(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "what is it?"}, {"type": "image", "image": str(tmp_path / "cat.png")}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "the right one"}]
    for value in (talk, json.dumps(talk)):
        shelf = Shelf(open_rows([{"messages": value}]), {"text": "messages"}, Policy())
        (shown,) = shelf.inputs_of(0)
        assert shown.text == "user: what is it? ‹image›"  # noqa: RUF001


def test_answers_that_are_no_numbers_are_the_worst(tmp_path: Path) -> None:
    predictions = [{"value": value} for value in (1.0, 9.0, float("nan"))]
    rows = [{"text": "x"}] * 3
    _, numbers = report_of(tmp_path / "out", "regression", rows, predictions, [1.0] * 3, {"text": "text"}, {"mse": 1.0})
    assert [(m["row"], m["error"]) for m in numbers["mistakes"]] == [(2, None), (1, 8.0)]


def test_large_errors_of_numbers_come_first(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(3)]
    predictions = [{"value": value} for value in (1.0, 5.0, -9.0)]
    page, numbers = report_of(tmp_path / "out", "regression", rows, predictions, [1.0, 2.0, 3.0], {"text": "text"})
    assert [(m["row"], m["error"]) for m in numbers["mistakes"]] == [(2, -12.0), (1, 3.0)]
    assert len(page.images()) == 1, "the scatter"
    assert not (tmp_path / "out" / "confusion.png").exists()


def test_wrong_tags_and_labels_are_marked(tmp_path: Path) -> None:
    words = [{"tokens": ["<b>Ada</b>", "sleeps"]}]
    answers: list[dict[str, Any]] = [{"tags": ["O", "O"], "words": ["<b>Ada</b>", "sleeps"]}]
    page, numbers = report_of(tmp_path / "tags", "tagging", words, answers, [["B-PER", "O"]], {"text": "tokens"})
    assert numbers["mistakes"][0]["wrong"] == 1
    assert "<b>Ada</b>OB-PER" in page.text.replace("\n", "").replace(" ", "")
    answers = [{"labels": ["a", "b"], "scores": {"a": 0.9, "b": 0.8, "c": 0.3}}]
    page, numbers = report_of(
        tmp_path / "labels", "multilabel", [{"text": "x"}], answers, [["a", "c"]], {"text": "text"}
    )
    assert numbers["mistakes"][0]["score"] == 0.8
    text = (tmp_path / "labels" / "index.html").read_text()
    assert "<ins>b</ins>" in text
    assert "<del>c</del>" in text
    assert "<ins>a</ins>" not in text


@pytest.mark.parametrize(
    ("task", "score", "truth"),
    [("translation", "chrf", "the cat <sat>"), ("captioning", "chrf", ["the cat <sat>", "no"]),
     ("visual-question-answering", "chrf", ["the cat <sat>"])],
)  # fmt: skip
def test_written_texts_are_compared_word_by_word(tmp_path: Path, task: str, score: str, truth: Any) -> None:
    answers = [{"text": "the dog <sat>"}, {"text": "the cat <sat>"}]
    rows = [{"text": "x"}, {"text": "y"}]
    _, numbers = report_of(tmp_path / "out", task, rows, answers, [truth, truth], {"text": "text"}, {"bleu": 1.0})
    assert [m["row"] for m in numbers["mistakes"]] == [0], "a right one is no mistake"
    assert 0 < numbers["mistakes"][0][score] < 100
    text = (tmp_path / "out" / "index.html").read_text()
    assert "<del>cat</del> <ins>dog</ins> &lt;sat&gt;" in text


def test_the_worst_transcripts_have_the_highest_word_error_rate(tmp_path: Path) -> None:
    rows = [{"audio": {"bytes": flac(i), "path": None}} for i in range(3)]
    answers = [{"text": "One two."}, {"text": "one"}, {"text": "one two three four"}]
    page, numbers = report_of(
        tmp_path / "out", "speech-recognition", rows, answers, ["one two"] * 3, {"audio": "audio"}, {"wer": 0.5}
    )
    assert [(m["row"], m["wer"]) for m in numbers["mistakes"]] == [(2, 1.0), (1, 0.5)], (
        "case and full stop do not count"
    )
    assert len(page.sounds()) == 2


def pairs(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Answered]:
    draw = np.random.default_rng(0)
    images = draw.normal(size=(count, 6))
    texts = images + draw.normal(size=(count, 6))
    unit = [[(v / np.linalg.norm(v)).tolist() for v in side] for side in (images, texts)]
    predictions: list[dict[str, Any]] = [{"embeddings": {"image": a, "text": b}} for a, b in zip(*unit, strict=True)]
    del predictions[3]["embeddings"]["image"]
    rows = [{"image": {"bytes": png(i), "path": None}, "caption": f"picture {i} <b>"} for i in range(count)]
    truth: list[Any] = [None if i == 3 else i // 2 for i in range(count)]
    answers = list(zip(range(count), predictions, truth, strict=True))
    return rows, predictions, Answered(open_rows(rows), {"image": "image", "text": "caption"}, "", answers, [])


def test_searches_go_both_ways_and_mark_what_is_right(tmp_path: Path) -> None:
    rows, predictions, kept = pairs(30)
    truth = [truth for *_, truth in kept.answers]
    page, numbers = report_of(tmp_path / "out", "retrieval", rows, predictions, truth, dict(kept.inputs))
    assert [(one["query"], one["target"], one["things"]) for one in numbers["searches"]] == [
        ("image", "text", 30), ("text", "image", 29),
    ]  # fmt: skip
    for way in numbers["searches"]:
        for one in [*way["examples"], *way["worst"]]:
            group = one["row"] // 2
            assert [found["right"] for found in one["found"]] == [
                f["row"] // 2 == group and f["row"] != 3 for f in one["found"]
            ]
            assert one["row"] != 3
            firsts = [place for place, found in enumerate(one["found"], 1) if found["right"]]
            assert one["rank"] == firsts[0] if firsts else one["rank"] > 5
        assert len(way["examples"]) == 5
        ranks = [one["rank"] for one in way["worst"]]
        assert ranks == sorted(ranks, reverse=True)
    assert "right, at rank" in page.text, "what was not found is shown behind"
    assert "picture 0 <b>" in page.text


def test_ranks_are_those_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    _, predictions, kept = pairs(40)
    monkeypatch.setattr("mmhub.report.searches.SHOWN", 40)
    monkeypatch.setattr("mmhub.report.searches._BLOCK", 7)
    metric = measure(["retrieval"], predictions, [truth for *_, truth in kept.answers])
    for way in find_searches(kept, Shelf(kept.rows, kept.inputs, kept.policy)):
        ranks = [one.rank for one in way.examples]
        name = f"{way.query}_to_{way.target}"
        assert np.median(ranks) == metric["median_rank"][name]
        for k, share in metric["recall"][name].items():
            assert np.mean([rank <= int(k) for rank in ranks]) == pytest.approx(share)


def test_two_texts_of_a_row_are_two_sides() -> None:
    rows = [{"question": "why?", "answer": "because"}, {"question": "who?", "answer": "me"}]
    unit = {"text": [1.0, 0.0], "text_pair": [0.0, 1.0]}
    answers = [(i, {"embeddings": unit}, i) for i in range(2)]
    kept = Answered(open_rows(rows), {"text": "question+answer"}, "", answers, [])
    one, other = find_searches(kept, Shelf(kept.rows, kept.inputs, kept.policy))
    assert [shown.text for shown in one.examples[0].inputs] == ["why?"]
    assert {shown.text for found in one.examples[0].found for shown in found.inputs} == {"because", "me"}
    assert [shown.text for shown in other.examples[1].inputs] == ["me"]
    assert one.examples[0].rank == 2, "a tie counts against the model"


def test_a_language_model_has_numbers_and_says_how_they_were_made(tmp_path: Path) -> None:
    perplexity = {"token": 8.5, "word": float("inf")}
    found = {"name": "lm", "task": "language-modelling", "rows": 2, "skipped": 0, "subsets": {}}
    found |= {"metrics": {"perplexity": perplexity}, "definition": "each token <once>"}
    model: Any = SimpleNamespace(task=find_task("language-modelling"), sources={})
    write_report(tmp_path / "out", model, found, None, "test.txt")
    page, numbers = page_of(tmp_path / "out")
    assert numbers["metrics"] == {"perplexity": {"token": 8.5, "word": None}}
    assert "definition: each token <once>" in page.text
    assert ["perplexity.token", "8.5000", ""] in page.tables["metrics"]


def test_calibration_bins_are_those_of_the_metric() -> None:
    draw = np.random.default_rng(1)
    answers = [(i, {"label": "a", "score": float(draw.random())}, draw.choice(["a", "b"])) for i in range(200)]
    answers += [(200, {"label": "a", "score": 0.0}, "a"), (201, {"label": "a", "score": 1.0}, "a")]
    bins = calibration_bins(answers)
    gap = sum(abs(one["score"] - one["accuracy"]) * one["rows"] for one in bins) / len(answers)
    assert sum(one["rows"] for one in bins) == 202
    assert gap == pytest.approx(calibration([p for _, p, _ in answers], [truth for *_, truth in answers])["ece"])


@pytest.mark.parametrize("count", [31, 120])
def test_a_confusion_matrix_grows_with_its_labels_and_takes_any_name(count: int) -> None:
    labels = [f"{LABELS[i % 6]} {i}" for i in range(count)]
    there = "matplotlib.pyplot" in sys.modules
    image = Image.open(io.BytesIO(draw_confusion(labels, np.eye(count, dtype=int).tolist())))
    assert image.format == "PNG"
    assert 400 < image.size[1] < 2500
    assert ("matplotlib.pyplot" in sys.modules) == there, "a program's own figures are left alone"


def test_a_scatter_takes_numbers_that_are_not_finite() -> None:
    assert draw_scatter([(1.0, float("nan")), (2.0, 3.0)])[:4] == b"\x89PNG"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_pictures_of_every_kind_become_small_ones(mode: str) -> None:
    levels = np.linspace(0, 255, 640 * 480).reshape(480, 640).astype(np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    kind, content, note = picture({"bytes": file.getvalue()}, Policy())
    small = Image.open(io.BytesIO(content))
    assert (kind, note, small.size, small.mode) == ("image/jpeg", "640 × 480", (160, 120), "RGB")  # noqa: RUF001
    if mode in ("L", "I;16", "LA", "RGBA"):
        assert np.asarray(small)[:, :, 0].mean() == pytest.approx(127, abs=3), "neither black nor white"


def test_what_is_transparent_is_white_and_what_lies_on_its_side_stands_up() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(file, "PNG", exif=exif)
    small = Image.open(io.BytesIO(picture(file.getvalue(), Policy())[1]))
    assert small.size == (20, 40)
    assert np.asarray(small).min() > 250


def test_a_long_sound_is_cut_and_becomes_a_small_wave_file() -> None:
    kind, content, note = sound({"array": np.zeros((2, 480_000)), "sampling_rate": 48000}, Policy())
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (16000, 96000, 1)
    assert (kind, note) == ("audio/wav", "the first 6 of 10.0 s")
    out = io.BytesIO()
    import soundfile

    soundfile.write(out, np.zeros(8000), 8000, format="AIFF")
    kind, content, note = sound(out.getvalue(), Policy())
    assert (kind, note, content[:4]) == ("audio/wav", "", b"RIFF"), "what a browser may not play is made anew"


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "int32", "float64"])
def test_samples_of_every_kind_are_as_loud_as_they_are(kind: str) -> None:
    wanted = np.array([0.5, -0.5, 0.0, 0.25])
    scale = 1.0 if kind == "float64" else 2.0 ** (np.dtype(kind).itemsize * 8 - 1)
    samples = (wanted * scale + (128 if kind == "uint8" else 0)).astype(kind)
    for raw in ({"array": samples, "sampling_rate": 8000}, (samples, 8000), (8000, samples)):
        with wave.open(io.BytesIO(sound(raw, Policy())[1])) as file:
            assert file.getframerate() == 8000
            heard = np.frombuffer(file.readframes(4), "<i2") / 32767
        assert heard == pytest.approx(wanted, abs=1e-4)


def test_an_array_and_its_rate_are_one_sound_and_samples_without_a_scale_none() -> None:
    rows = open_rows([{"audio": (np.zeros(80), 8000)}, {"audio": {"array": np.zeros(80, int), "sampling_rate": 8000}}])
    shelf = Shelf(rows, {"audio": "audio"}, Policy())
    assert [shown.kind for shown in shelf.inputs_of(0)] == ["audio"]
    assert [shown.text for shown in shelf.inputs_of(1)] == ["audio: samples of type int64 do not say how loud they are"]


def test_only_pictures_that_models_read_are_opened() -> None:
    assert pytest.importorskip("mmhub_image.encoded").FORMATS == media.FORMATS
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TGA")
    with pytest.raises(Image.UnidentifiedImageError):
        picture(file.getvalue(), Policy())


def test_a_terminal_gets_a_line_for_each_metric_where_one_line_would_be_too_long() -> None:
    report: dict[str, Any] = {"rows": 3, "skipped": 0, "subsets": {}, "metrics": {"accuracy": 0.5, "f1": 0.25}}
    assert _text(report).splitlines() == ["INPUTS    ROWS  ACCURACY  F1", "all rows  3     0.5000    0.2500"]
    report["metrics"] = {f"quite_a_long_name_{i}": i / 10 for i in range(8)}
    lines = _text(report).splitlines()
    assert lines[0].split() == ["METRIC", "ALL", "ROWS"]
    assert lines[1].split() == ["rows", "3"]
    assert lines[-1].split() == ["quite_a_long_name_7", "0.7000"]
    report["metrics"] = {"f1": 0.5, "f1_by_label": {f"L{i}": 0.1 for i in range(40)}}
    assert "L3" not in _text(report)
    assert _text(report).endswith("40 more numbers by label: see --json or --report")
