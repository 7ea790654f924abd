"""Verification: the equal error rate by its definition, which pairs are drawn, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.build import compose
from mmhub.cli.main import main
from mmhub.data.sources import open_rows
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions
from mmhub.verification import measure_pairs, verify
from tests.conftest import flac

Rows = list[dict[str, Any]]


def on_circle(*degrees: float) -> torch.Tensor:
    """Vectors of any length whose angles differ by what is given, (N, 2)."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack((angle.cos(), angle.sin()), 1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_vectors_that_tell_everything_apart_make_no_error() -> None:
    found = measure_pairs(on_circle(0, 5, 90, 95), ["a", "a", "b", "b"])
    assert (found["eer"], found["min_dcf"]) == (0.0, 0.0)
    assert (found["pairs"], found["same"], found["different"]) == (6, 2, 4)
    assert np.cos(np.deg2rad(85)) <= found["threshold"] <= np.cos(np.deg2rad(5)) + 1e-6


def test_the_equal_error_rate_of_a_case_done_by_hand() -> None:
    # same: a 0-10 and b 40-60 (10 and 20 degrees); different: 0-40, 0-60, 10-40, 10-60 (40, 60, 30, 50)
    assert measure_pairs(on_circle(0, 10, 40, 60), ["a", "a", "b", "b"])["eer"] == 0.0
    # b at 15 and 60: the same lie 10 and 45 degrees apart, the different 15, 60, 5, 50
    found = measure_pairs(on_circle(0, 10, 15, 60), ["a", "a", "b", "b"])
    # accepted from the top: 5 (d), 10 (s), 15 (d), 45 (s): FAR and FRR go (1/4, 1) (1/4, 1/2) (1/2, 1/2) -> 1/2
    assert found["eer"] == pytest.approx(0.5)
    assert found["threshold"] == pytest.approx(np.cos(np.deg2rad(15)), abs=1e-6)


def noisy(seed: int) -> tuple[torch.Tensor, list[int], np.ndarray, np.ndarray]:
    """Vectors and labels, and of all pairs the cosine and whether they are the same; some cosines are equal."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (60,), generator=generator)
    centre = torch.nn.functional.one_hot(labels)[:, :3]
    vectors = (torch.randn(60, 3, generator=generator) + centre).round(decimals=1)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    first, second = np.triu_indices(60, 1)
    cosines = (unit[first] * unit[second]).sum(1).numpy()
    return vectors, labels.tolist(), cosines, labels.numpy()[first] == labels.numpy()[second]


def crossing(rejected: np.ndarray, accepted: np.ndarray) -> float:
    """Where the line through the points before and after the change of order meets the diagonal."""
    at = int(np.argmax(rejected <= accepted))
    gap = rejected - accepted
    part = gap[at - 1] / (gap[at - 1] - gap[at])
    return float(accepted[at - 1] + part * (accepted[at] - accepted[at - 1]))


@pytest.mark.parametrize("seed", range(3))
def test_error_rates_follow_from_counting_at_every_threshold(seed: int) -> None:
    vectors, labels, cosines, same = noisy(seed)
    steps = [np.inf, *np.unique(cosines)[::-1]]
    rejected = np.array([(cosines[same] < step).mean() for step in steps])
    accepted = np.array([(cosines[~same] >= step).mean() for step in steps])
    found = measure_pairs(vectors, labels)
    assert 0.05 < found["eer"] < 0.5
    assert found["eer"] == pytest.approx(crossing(rejected, accepted), abs=1e-9)
    assert found["min_dcf"] == pytest.approx((0.01 * rejected + 0.99 * accepted).min() / 0.01, abs=1e-9)
    at = (cosines[same] < found["threshold"]).mean(), (cosines[~same] >= found["threshold"]).mean()
    assert at == pytest.approx((found["eer"], found["eer"]), abs=0.02)


@pytest.mark.slow
def test_error_rates_equal_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    vectors, labels, cosines, same = noisy(0)
    accepted, recalled, _ = metrics.roc_curve(same, cosines, drop_intermediate=False)
    assert measure_pairs(vectors, labels)["eer"] == pytest.approx(crossing(1 - recalled, accepted), abs=1e-9)


def test_more_pairs_than_the_limit_are_drawn_by_the_seed_without_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(40, 8, generator=generator), [i % 2 for i in range(40)]
    full = measure_pairs(vectors, labels)
    assert full["pairs"] == 780
    some = measure_pairs(vectors, labels, pairs=700, seed=1)
    assert some["pairs"] == 700
    assert some == measure_pairs(vectors, labels, pairs=700, seed=1)
    assert some != measure_pairs(vectors, labels, pairs=700, seed=2)
    assert some["same"] <= full["same"]
    assert some["different"] <= full["different"]
    assert measure_pairs(vectors, labels, pairs=780) == full


@pytest.mark.parametrize(("labels", "message"), [("abc", "have the same label"), ("aaa", "have different labels")])
def test_pairs_of_one_kind_alone_are_an_error(labels: str, message: str) -> None:
    with pytest.raises(InputError, match=f"no two of the 3 rows {message}"):
        measure_pairs(on_circle(0, 1, 2), list(labels))


def model() -> Any:
    audio = {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}
    head = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    return compose(encoders={"audio": audio}, decoder=head)


def rows(speakers: Sequence[Any]) -> Rows:
    return [
        {"audio": {"bytes": flac(i % 2, 0.2 + 0.01 * i), "path": f"{i}.flac"}, "who": w} for i, w in enumerate(speakers)
    ]


def test_the_vectors_are_those_of_embed_in_the_order_of_the_rows() -> None:
    table, speaker = rows("abababab"), model()
    report = verify(speaker, open_rows(table), target="who", options=EvalOptions(batch_size=3))
    vectors = speaker.embed([{"audio": row["audio"]} for row in table])
    expected = measure_pairs(vectors, list("abababab"))
    assert report["metrics"] == pytest.approx(expected, abs=1e-5)
    assert (report["task"], report["rows"], report["skipped"]) == ("verification", 8, 0)
    assert report["metrics"]["eer"] < 0.2  # even without training two pitches differ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"who": None}, "row 3 has no label"),
        ({"who": ""}, "row 3 has no label"),
        ({"who": float("nan")}, "row 3 has no label"),
        ({"audio": {"bytes": b"no sound at all", "path": "bad.wav"}}, r"row 3, column 'audio': .*bad\.wav"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_skipped(change: Mapping[str, Any], message: str) -> None:
    table, speaker = rows("abababab"), model()
    table[2] |= change
    with pytest.raises(InputError, match=message):
        verify(speaker, table, target="who")
    report = verify(speaker, table, target="who", options=EvalOptions(skip=True))
    assert (report["rows"], report["skipped"], report["metrics"]["pairs"]) == (7, 1, 21)


def test_labels_go_by_their_text() -> None:
    table = rows([1, 1.0, 2, "2"])
    assert verify(model(), table, target="who")["metrics"]["same"] == 2
    with pytest.raises(InputError, match=r"row 1: a label must be text"):
        verify(model(), rows([["a"], ["b"]]), target="who")


def test_a_model_without_one_vector_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="gives no vectors to compare"):
        verify(compose("language-modelling", decoder="lstm-lm", texts=["a b"], tokenizer={"kind": "word"}), rows("ab"))
    with pytest.raises(UsageError, match="no column is known that says what is the same"):
        verify(model(), rows("ab"))
    with pytest.raises(UsageError, match="whom"):
        verify(model(), rows("ab"), target="whom")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(args)
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


def test_the_command_line_answers_with_one_document(run: Callable[..., Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    model().save(tmp_path / "speakers")
    pq.write_table(pa.Table.from_pylist(rows("abababab")), tmp_path / "valid.parquet")
    words = ["eval", "./speakers", "--data", "valid.parquet", "--verification", "--target-column", "who"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["metrics"].keys() == {"eer", "threshold", "min_dcf", "pairs", "same", "different"}
    assert report["subsets"] == {}
    code, out, err = run(*words)
    assert code == 0
    assert f"{report['metrics']['eer']:.4f}" in out
    assert "eer: share of wrong decisions" in err
    code, out, err = run(*words, "--report", "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: --verification takes no --report\n")
    refused = ["--document", "row", "--window", "4", "--stride", "2", "--details", "--top-k", "5", "--no-subsets"]
    code, _, err = run(*words, *refused)
    assert code == 2
    said = "--document or --window or --stride or --details or --top-k or --no-subsets"
    assert err.startswith(f"error: --verification takes no {said}\n")
