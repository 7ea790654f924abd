"""Where words begin and end: silence is heard, near to where a model puts the edges of words, and not elsewhere."""

from __future__ import annotations

import pytest
import torch

from mmhub.speech.silence import loudness, settle, silences

RATE = 8000


def sound(*parts: tuple[float, float]) -> torch.Tensor:
    """Noise of these (amplitude, seconds), one behind the other."""
    torch.manual_seed(0)
    return torch.cat([amplitude * torch.randn(round(seconds * RATE)) for amplitude, seconds in parts])


SPOKEN = sound((1e-3, 0.3), (0.2, 0.4), (1e-3, 0.1), (0.2, 0.3), (1e-3, 0.2))  # words at 0.3 to 0.7 and 0.8 to 1.1


def test_loudness_is_the_power_of_each_hundredth_of_a_second_in_decibels() -> None:
    loud = loudness(torch.cat((torch.ones(80), torch.full((81,), 0.1))), RATE)
    assert loud.tolist() == pytest.approx([0.0, -20.0, -20.0], abs=0.01)  # one sample is left over


def test_steps_last_as_long_at_any_rate() -> None:
    for rate in (11025, 22050, 44100, 48000):
        loud = loudness(torch.cat((torch.zeros(90 * rate), torch.ones(5 * rate))), rate)
        assert len(loud) == 9500 and int((loud > -50).nonzero()[0]) in (8999, 9000)


def test_silence_is_found_where_it_is() -> None:
    found = [edge for part in silences(loudness(SPOKEN, RATE)) for edge in part]
    assert found == pytest.approx([0, 0.3, 0.7, 0.8, 1.1, 1.3], abs=0.011)


def test_words_begin_and_end_where_silence_does() -> None:
    said = [{"word": "one", "start": 0.2, "end": 0.62}, {"word": "two", "start": 0.7, "end": 1.2}]
    one, two = settle(said, loudness(SPOKEN, RATE))
    edges = [one["start"], one["end"], two["start"], two["end"]]
    assert edges == pytest.approx([0.26, 0.7 + 0.1 / 3, 0.8 - 0.1 / 3, 1.14], abs=0.011)  # with a little of the silence
    assert said[0]["start"] == 0.2  # what was given is left alone


def test_a_stop_inside_a_word_is_no_end_of_it() -> None:
    spoken = sound((1e-3, 0.1), (0.2, 0.3), (1e-3, 0.05), (0.2, 0.1), (1e-3, 0.15), (0.2, 0.4), (1e-3, 0.1))
    said = [{"word": "eight", "start": 0.1, "end": 0.6}, {"word": "two", "start": 0.65, "end": 1.1}]
    one, two = settle(said, loudness(spoken, RATE))
    assert [one["end"], two["start"]] == pytest.approx([0.59, 0.66], abs=0.011)


def test_edges_stay_without_silence_and_far_from_it() -> None:
    said = [{"word": "one", "start": 0.1, "end": 0.5}, {"word": "two", "start": 0.5, "end": 0.9}]
    assert settle(said, loudness(sound((0.2, 1.0)), RATE)) == said
    late = [{"word": "one", "start": 0.9, "end": 1.2}]
    spoken = sound((1e-3, 0.2), (0.2, 1.2), (1e-3, 0.6))
    assert settle(late, loudness(spoken, RATE))[0]["start"] == 0.9
    assert settle([], loudness(SPOKEN, RATE)) == [] and settle(said, torch.zeros(0)) == said
