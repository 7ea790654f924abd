"""The data source `ts:`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmhub.errors import InputError
from mmhub.spec import DataRequest
from mmhub_timeseries.hooks import mmhub_datasets

HEADER = "# a comment\n@problemName Toy\n@timeStamps false\n@univariate true\n@classLabel true yes no\n@data\n"


def rows(folder: Path, content: str) -> list[dict[str, object]]:
    (folder / "toy.ts").write_text(content)
    (source,) = mmhub_datasets()
    request = DataRequest(address="toy.ts", split="train", find=lambda path: folder / path)
    return [dict(row) for row in source.open(request)]


def test_classes_and_missing_values_are_read(tmp_path: Path) -> None:
    first, second = rows(tmp_path, HEADER + "1,2.5,?:yes\n\n3,NaN:no\n")
    assert (first["label"], second["label"]) == ("yes", "no")
    np.testing.assert_array_equal(first["timeseries"], [[1], [2.5], [np.nan]])
    np.testing.assert_array_equal(second["timeseries"], [[3], [np.nan]])


def test_several_channels_and_a_number_as_target_are_read(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "@targetlabel true\n@univariate false\n@data\n1,2,3:4,5:0.75\n")
    assert row["target"] == 0.75
    np.testing.assert_array_equal(row["timeseries"], [[1, 4], [2, 5], [3, np.nan]])


def test_cases_without_a_truth_are_read(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "@classLabel false\n@data\n1,2\n")
    assert set(row) == {"timeseries"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "1,x:yes\n", "'toy.ts' line 7 holds 'x' where a number should be"),
        (HEADER + "yes\n", "line 7 has a label and no values"),
        ("@problemName Toy\n", "has no @data line"),
        ("1,2,3\n", "line 1 comes before @data"),
        ("@timeStamps true\n@data\n", "has time stamps"),
    ],
)
def test_a_malformed_file_is_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(tmp_path, content)
