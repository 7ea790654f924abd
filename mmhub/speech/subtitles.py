"""Subtitles of one recording: SubRip (.srt) and WebVTT (.vtt, https://www.w3.org/TR/webvtt1/) files of transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmhub.errors import InputError, UsageError
from mmhub.files import disk_errors, write_file

FORMATS = (".srt", ".vtt")
WIDTH, SECONDS = 42, 7.0  # of one line, as broadcasters have it: characters, and how long it stands
_SHORTEST = 0.001  # seconds; formats know milliseconds, and nothing may end before it begins

Cue = tuple[float, float, str]  # start, end, text


def write(answer: Mapping[str, Any], path: str | Path) -> Path:
    """Write a transcript as subtitles: its words in lines of at most 42 characters and 7 seconds, or its segments.

    A line ends where a segment does. Where there are no words, a segment longer than a line is parted, and its time
    shared out by characters.

    The end of the name, .srt or .vtt, says which format. `answer` is one of `mmhub.speech.transcribe`.

    Raises:
        UsageError: the name has another end, or the transcript has no times. InputError: a guard refused it.
    """
    path = Path(path)
    text = as_text(answer, path.suffix.lower())
    with disk_errors("the subtitles", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    return path


def as_text(answer: Mapping[str, Any], kind: str) -> str:
    """Return what `write` writes; `kind` is ".srt" or ".vtt".

    >>> print(as_text({"text": "hi", "segments": [{"text": " hi", "start": 0.0, "end": 1.5}]}, ".srt"))
    1
    00:00:00,000 --> 00:00:01,500
    hi
    <BLANKLINE>
    """
    if kind not in FORMATS:
        raise UsageError(f"subtitles are no {kind!r} files", f"name a file that ends in {' or '.join(FORMATS)}")
    if "refused" in answer:
        raise InputError(f"the guard {answer.get('guard')} refuses this recording: {answer['refused']}")
    cues = list(_cues(answer))
    if kind == ".srt":
        timed = [f"{_time(start, ',')} --> {_time(end, ',')}\n{text}\n" for start, end, text in cues]
        return "\n".join(f"{number}\n{block}" for number, block in enumerate(timed, 1))
    blocks = [f"{_time(start, '.')} --> {_time(end, '.')}\n{_escaped(text)}\n" for start, end, text in cues]
    return "\n".join(["WEBVTT\n", *blocks])


def _cues(answer: Mapping[str, Any]) -> Iterator[Cue]:
    if answer.get("words"):
        starts = [one["start"] for one in answer.get("segments") or ()]
        yield from _lines(answer["words"], starts)
    elif answer.get("segments"):
        for one in answer["segments"]:
            text = " ".join(str(one["text"]).split())
            if len(text) > WIDTH:
                yield from _lines(_words(one["start"], one["end"], text))
            elif text:
                yield _lasting(one["start"], one["end"], text)
    elif str(answer.get("text") or "").strip():
        what = "the transcript says nothing about times"
        raise UsageError(what, 'ask for them: --timestamps segment (timestamps="segment")')


def _words(start: float, end: float, text: str) -> list[dict[str, Any]]:
    """The words of a segment, each with as much of its time as it has of its characters."""
    found, place, second = [], 0, (end - start) / len(text)
    for word in text.split(" "):
        last = place + len(word)
        found.append({"word": word, "start": start + place * second, "end": start + last * second})
        place = last + 1
    return found


def _lines(words: Sequence[Mapping[str, Any]], starts: Sequence[float] = ()) -> Iterator[Cue]:
    """Words joined to lines that are short enough, in characters and seconds, and end where one of `starts` comes."""
    line: list[Mapping[str, Any]] = []
    for word in words:
        long = line and (len(_joined([*line, word])) > WIDTH or word["end"] - line[0]["start"] > SECONDS)
        if long or (line and any(line[-1]["start"] < start <= word["start"] for start in starts)):
            yield _lasting(line[0]["start"], line[-1]["end"], _joined(line))
            line = []
        line.append(word)
    if line:
        yield _lasting(line[0]["start"], line[-1]["end"], _joined(line))


def _joined(words: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(str(word["word"]).strip() for word in words)


def _lasting(start: float, end: float, text: str) -> Cue:
    return start, max(end, start + _SHORTEST), text


def _time(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and milliseconds: 01:02:03,456."""
    thousandths = max(0, round(seconds * 1000))
    minutes, thousandths = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{thousandths // 1000:02}{mark}{thousandths % 1000:03}"


def _escaped(text: str) -> str:
    """What WebVTT would read as markup, as text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
