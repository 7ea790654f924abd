"""Answers by runs of neighbouring rows, for models that write texts or hear speech, and where guards look at samples.

What is drawn depends on a row's number, so that rows keep their order; whoever writes texts sorts them in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmhub.bulk.rows import Table, sample_of
from mmhub.bulk.windows import Answer, Window
from mmhub.errors import InputError

Sample = Mapping[str, Any]


@dataclass
class Runs:
    """Answers windows by `answers(samples, number of the first)`, for `step` rows at a time at most.

    `failed(window, place, error)` is told of rows that cannot be read, or raises.
    """

    model: Any
    table: Table
    inputs: Mapping[str, str]
    answers: Callable[[list[Sample], int], list[Answer]]
    failed: Callable[[Window, int, InputError], None]
    step: int

    def answer(self, windows: Iterator[Window]) -> Generator[tuple[Window, int], None, None]:
        """Fill in the answers; yield after each run its window and the number of rows that are answered."""
        for window in windows:
            for start in range(0, len(window.rows), self.step):
                places = list(range(start, min(start + self.step, len(window.rows))))
                samples = [self._sample(window, place) for place in places]
                run: list[tuple[int, Sample]] = []
                for place, sample in zip(places, samples, strict=True):
                    if sample is not None:
                        run.append((place, sample))
                    else:
                        self._run(window, run)
                        run = []
                self._run(window, run)
                yield window, len(places)

    def _sample(self, window: Window, place: int) -> Sample | None:
        row = window.rows[place]
        try:
            if isinstance(row.cells, InputError):
                raise row.cells
            return sample_of(self.model, row.cells, self.inputs, self.table.folder(row.place))
        except InputError as error:
            self.failed(window, place, error)
            return None

    def _run(self, window: Window, run: Sequence[tuple[int, Sample]]) -> None:
        """Answer neighbours; what stands before and after one that cannot be read is answered by itself."""
        while run:
            place = run[0][0]
            try:
                found = self.answers([sample for _, sample in run], window.rows[place].place.number)
            except InputError as error:
                bad = error.row or 0
                self.failed(window, run[bad][0], error)
                self._run(window, run[:bad])
                run = run[bad + 1 :]
            else:
                window.answers[place : place + len(run)] = found
                return
