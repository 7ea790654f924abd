"""Subtitles: the exact files, and how words become lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmhub.errors import InputError, UsageError
from mmhub.speech.subtitles import as_text, write

SEGMENTS = {
    "text": " Hello there. 1 < 2 & so on",
    "segments": [
        {"text": " Hello there.", "start": 0.0, "end": 2.5},
        {"text": " 1 < 2 & so on", "start": 3725.0406, "end": 3725.0406},
    ],
}
SRT = """1
00:00:00,000 --> 00:00:02,500
Hello there.

2
01:02:05,041 --> 01:02:05,042
1 < 2 & so on
"""
VTT = """WEBVTT

00:00:00.000 --> 00:00:02.500
Hello there.

01:02:05.041 --> 01:02:05.042
1 &lt; 2 &amp; so on
"""


def test_segments_are_written_exactly_in_both_formats(tmp_path: Path) -> None:
    assert write(SEGMENTS, tmp_path / "new" / "a.srt").read_text("utf-8") == SRT
    assert write(SEGMENTS, tmp_path / "a.VTT").read_text("utf-8") == VTT


def test_words_make_lines_of_at_most_42_characters_and_7_seconds() -> None:
    words = [{"word": f"word{n}", "start": n * 0.5, "end": n * 0.5 + 0.4} for n in range(40)]
    words += [{"word": f"slow{n}", "start": 20 + 3.0 * n, "end": 21 + 3.0 * n} for n in range(5)]
    blocks = as_text({"text": "", "words": words}, ".srt").split("\n\n")
    lines = [block.strip().split("\n")[2] for block in blocks]
    assert " ".join(lines) == " ".join(str(word["word"]) for word in words)
    assert max(map(len, lines)) <= 42 and max(map(len, lines)) > 34  # not shorter than it need be
    for block in blocks:
        start, end = (seconds(text) for text in re.findall(r"\d\d:\d\d:\d\d,\d{3}", block))
        assert 0 < end - start <= 7
    assert lines[-1] == "slow2 slow3 slow4"  # 7 seconds; the one before would make it 10


def test_a_line_of_words_ends_where_a_segment_does() -> None:
    words = [{"word": f"word{n}", "start": n * 0.5, "end": n * 0.5 + 0.4} for n in range(10)]
    parts = [{"text": "all but one", "start": 0.0, "end": 4.4}, {"text": "word9", "start": 4.5, "end": 4.9}]
    found = as_text({"text": "", "words": words, "segments": parts}, ".srt")
    lines = [block.split("\n")[2] for block in found.split("\n\n")]
    assert lines == ["word0 word1 word2 word3 word4 word5 word6", "word7 word8", "word9"]


def test_a_long_segment_without_words_is_parted_by_its_characters() -> None:
    text = " ".join(["four"] * 100)
    found = as_text({"text": text, "segments": [{"text": text, "start": 10.0, "end": 59.9}]}, ".srt").split("\n\n")
    lines = [block.strip().split("\n") for block in found]
    assert " ".join(line[2] for line in lines) == text and max(len(line[2]) for line in lines) <= 42
    times = [[seconds(time) for time in line[1].split(" --> ")] for line in lines]
    assert times[0][0] == 10.0 and times[-1][1] == 59.9
    assert times[1][0] == pytest.approx(10 + 49.9 * 40 / 499, abs=1e-3)  # eight words and a blank each stood before


def seconds(text: str) -> float:
    hours, minutes, rest = text.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def test_a_recording_that_a_guard_refuses_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the guard house refuses this recording: it holds a listed word"):
        write({"refused": "it holds a listed word", "guard": "house"}, tmp_path / "a.srt")
    assert not list(tmp_path.iterdir())


def test_silence_makes_an_empty_file_and_a_text_without_times_an_error() -> None:
    assert as_text({"text": "", "segments": []}, ".srt") == ""
    assert as_text({"text": ""}, ".vtt") == "WEBVTT\n"
    with pytest.raises(UsageError, match="says nothing about times") as caught:
        as_text({"text": "hello"}, ".srt")
    assert "--timestamps segment" in (caught.value.hint or "")
    with pytest.raises(UsageError, match=r"subtitles are no '.txt' files"):
        as_text(SEGMENTS, ".txt")
