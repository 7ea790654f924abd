"""What counts as a series, what is refused, and how values are scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy
from mmhub_timeseries.processor import SeriesProcessor

NAN = float("nan")


def processor(channels: int = 1, standardize: Any = "none", **settings: Any) -> SeriesProcessor:
    return SeriesProcessor(SeriesProcessor.Config(channels=channels, standardize=standardize, **settings))


def read(raw: Any, channels: int = 1, **policy: Any) -> Tensor:
    return processor(channels).read(raw, Policy(**policy))


@pytest.mark.parametrize(
    "raw",
    [
        [1, 2.5, None],
        (1, 2.5, NAN),
        [np.float32(1), np.float64(2.5), None],
        [[1], [2.5], None],
        [[1], [2.5], [None]],
        np.array([1, 2.5, NAN]),
        np.array([[1], [2.5], [NAN]], np.float32),
        torch.tensor([1, 2.5, NAN]),
        "[1, 2.5, null]",
        " [[1], [2.5], [NaN]]",
        b"1\n2.5\n?\n",
        b"volts\r\n1\r\n2.5\r\nNA\r\n",
        np.array([1, 2.5, NAN], np.float16),
        {"bytes": b"[1, 2.5, null]", "path": "a.json"},
    ],
)
def test_every_kind_of_raw_input_gives_values_and_where_they_are_missing(raw: Any) -> None:
    assert read(raw).tolist() == [[1, 0], [2.5, 0], [0, 1]]


def test_files_are_found_from_the_root_of_the_policy(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("left,right\n1,2\n,4\n")
    np.save(tmp_path / "a.npy", np.array([[1, 2], [NAN, 4]]))
    for name in ("a.csv", "a.npy", tmp_path / "a.csv"):
        assert read(name, 2, root=str(tmp_path)).tolist() == [[1, 2, 0, 0], [0, 4, 1, 0]]


def test_a_blank_line_is_a_missing_value_and_the_end_of_a_file_is_none() -> None:
    assert read(b"1\n\n3\n\n\n").tolist() == [[1, 0], [0, 1], [3, 0]]


def test_a_first_line_without_a_number_is_a_header_only_if_it_has_words() -> None:
    assert read(b",volts\n1,2\n", 2).tolist() == [[1, 2, 0, 0]]
    assert read(b"?,\n1,2\n", 2).tolist() == [[0, 0, 1, 1], [1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("hello", "'hello' is no series"),
        ("[1, 2", "not valid JSON"),
        ('[1, "two"]', "holds 'two' where a number should be"),
        ([1, True], "holds True where"),
        ([[1, 2], [3]], "steps of 1 and 2 values"),
        ([[[1]]], "holds a list where"),
        ([1, [2]], "mixes numbers with lists"),
        (np.zeros((2, 2, 2)), "3 dimensions"),
        (np.zeros(0), "empty series"),
        ("[]", "empty series"),
        ([[], []], "empty series"),
        (b"volts\n", "empty series"),
        ([1.0, float("inf")], "infinite value at step 1"),
        ([1e39], "infinite value at step 0"),
        ([10**400], "too large"),
        ([NAN, None], "all are missing"),
        (np.array(["a"]), "expected real numbers"),
        (np.array([1j]), "expected real numbers"),
        (torch.tensor([1j]), "expected real numbers"),
        (7, "a int is no series"),
        (b"\x93NUMPY\x01\x00broken", "as .npy"),
        (b"\xff\xfe\x00", "neither .npy nor text"),
        (b"1,2\n3\n", "line 2 has 1 cells"),
        (b"1\nx\n", "line 2 holds 'x'"),
        ([[1, 2]], r"has 2 channel\(s\), expected 1"),
        ("none.csv", "no file 'none.csv'"),
    ],
)
def test_what_is_no_series_is_refused_with_the_reason(raw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(raw)


def test_an_npy_file_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"as \.npy.*allow_pickle"):
        read(tmp_path / "a.npy")


def test_a_series_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(InputError, match="4 steps, more than the limit of 3"):
        processor(max_length=3).read([1, 2, 3, 4], Policy())


def test_swapped_axes_are_guessed_in_the_hint() -> None:
    with pytest.raises(InputError) as caught:
        read(np.zeros((2, 5)), 2)
    assert "rows must be time steps" in str(caught.value.hint)


def test_a_list_of_numbers_is_one_series_and_a_list_of_arrays_several() -> None:
    batch = [[1.0, 2.0], None, [np.ones(3), "[5]"], []]
    items = processor()(batch, Policy())
    assert items.rows.tolist() == [0, 2, 2] and items.lengths.tolist() == [2, 3, 1]


def test_channels_mean_and_deviation_are_learned_from_the_training_data() -> None:
    series = [np.array([[1, 10], [2, NAN]]), None, [[3, 10], [4, 10], [5, 10]]]
    fitted = processor(0, "training")
    assert fitted.needs_fit
    fitted.fit(series)
    assert not fitted.needs_fit and fitted.channels == 2
    assert fitted.config.mean == pytest.approx((3, 10)) and fitted.config.std == pytest.approx((2**0.5, 1))
    scaled = fitted.read([[3 + 2**0.5, None]], Policy())
    assert torch.allclose(scaled, torch.tensor([[1.0, 0, 0, 1]]))


def test_fitting_leaves_a_broken_series_to_the_loader_unless_all_are() -> None:
    fitted = processor(0, "training")
    fitted.fit(["nonsense", [1.0, 3.0]])
    assert fitted.config.mean == (2,)
    with pytest.raises(InputError, match="'nonsense' is no series"):
        processor(0, "training").fit(["nonsense"])


def test_a_series_may_be_scaled_by_itself() -> None:
    scaled = processor(2, "series").read([[1, 7], [None, 7], [3, 7]], Policy())
    assert torch.allclose(scaled[:, :2], torch.tensor([[-1.0, 0], [0, 0], [1, 0]]))


def test_the_state_is_json_and_rebuilds_the_processor() -> None:
    fitted = processor(0, "training")
    fitted.fit([[1.0, 2.0, 4.5]])
    again = SeriesProcessor.from_state(json.loads(json.dumps(fitted.state())), {})
    assert again.config == fitted.config and not again.needs_fit
    assert torch.equal(again.read([3], Policy()), fitted.read([3], Policy()))
