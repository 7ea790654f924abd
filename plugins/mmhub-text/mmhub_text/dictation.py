"""Writing down speech as Whisper does, Radford et al. 2022 (arXiv:2212.04356): what stands before a text, which token
may follow which, and times as tokens. How windows of a long recording are joined is the library's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE, _decode_asr

from mmhub.batch import Bundle
from mmhub.errors import UsageError, did_you_mean
from mmhub.interfaces import ComponentConfig
from mmhub_text.library import quiet

if TYPE_CHECKING:
    from mmhub_text.transformers_seq2seq import TransformersSeq2Seq

TICK = 0.02  # seconds from one time token to the next, and what a token of the encoder stands for


class Speech(ComponentConfig, frozen=True):
    """What a model of transcripts knows beside text, by the ids of its tokens.

    `languages` are those it can be told to hear, by codes such as "en"; none: it knows one alone. `tasks` are
    "transcribe" and "translate", into English. `language` and `task` are what the model's folder says: without a
    language it is detected, without a task none is named. `untimed` stands before a text without times; the ids above
    it are times, 20 ms apart, of which the first that is written is at most `latest_start`.
    """

    untimed: int
    languages: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it
    tasks: dict[str, int] = {}  # noqa: RUF012
    language: str = ""
    task: str = ""
    latest_start: int | None = None


def read_speech(table: Mapping[str, Any], known: Mapping[str, int]) -> Speech | None:
    """Read the library's generation settings; None where nothing names a token for texts without times.

    What older folders say in `forced_decoder_ids` counts, as there, where they name no language and no task. What such
    settings do not name, as those of folders with a config.json alone, is found among the tokens, `known`, by its name;
    languages only where one is forced, for models of English alone have these tokens, too.
    """
    untimed = table.get("no_timestamps_token_id")
    untimed = untimed if isinstance(untimed, int) else known.get("<|notimestamps|>")
    if untimed is None:
        return None
    forced = [token for _, token in table.get("forced_decoder_ids") or () if token is not None]
    languages = {name.strip("<|>"): number for name, number in dict(table.get("lang_to_id") or {}).items()}
    tasks = dict(table.get("task_to_id") or {})
    if not languages and not tasks:
        named = {code: known[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in known}
        if any(number in forced for number in named.values()):
            languages = named
            tasks = {name: known[f"<|{name}|>"] for name in ("transcribe", "translate") if f"<|{name}|>" in known}
    language, task = str(table.get("language") or ""), str(table.get("task") or "")
    if not language and not task:
        language = next((name for name, number in languages.items() if number in forced), "")
        task = next((name for name, number in tasks.items() if number in forced), "")
    elif language and not task and "transcribe" in tasks:
        task = "transcribe"
    return Speech(
        untimed=untimed,
        languages=languages,
        tasks=tasks,
        language=_code(language, languages) if language else "",
        task=task,
        latest_start=table.get("max_initial_timestamp_index"),
    )


class Dictation:
    """A decoder that has been told what to listen for; `mmhub.generate.write` takes it for the decoder itself.

    Attributes:
        language: the code of the language that is spoken, "" to detect it in each window. task: "" for none.
        times: does it write times between the words?
    """

    def __init__(
        self, decoder: TransformersSeq2Seq, language: str = "", translate: bool = False, times: bool = False
    ) -> None:
        speech = decoder.config.speech
        assert speech is not None
        if (language or translate) and not speech.languages:
            what = "this model knows one language alone"
            raise UsageError(what, "leave language and translate out, or take a model of several languages")
        self.decoder, self._speech, self.times = decoder, speech, times
        language = language or decoder.config.language
        self.language = _code(language, speech.languages) if language else ""
        self.task = "translate" if translate else (speech.task or ("transcribe" if language else ""))
        if self.task and self.task not in speech.tasks:
            raise UsageError(
                f"this model has no token for {self.task!r}", f"it has {', '.join(speech.tasks) or 'none'}"
            )
        self.processor, self.start, self.generation = decoder.processor, decoder.start, decoder.generation
        self._rules = WhisperTimeStampLogitsProcessor(
            SimpleNamespace(  # type: ignore[arg-type]  # of the library's settings it reads these alone
                no_timestamps_token_id=speech.untimed,
                eos_token_id=decoder.processor.end_id,
                bos_token_id=decoder.processor.begin_id,
                max_initial_timestamp_index=speech.latest_start,
            ),
            begin_index=0,
        )

    @property
    def detects(self) -> bool:
        """Is the language found out for each row?"""
        return bool(self._speech.languages) and not self.language

    @property
    def lead(self) -> tuple[int, ...]:
        """What stands before the text, behind the start and the language."""
        task = (self._speech.tasks[self.task],) if self.task else ()
        return (*task, *(() if self.times else (self._speech.untimed,)))

    @property
    def known(self) -> tuple[int, ...]:
        """What stands before every text behind the start; with `detects`, a language comes first."""
        language = (self._speech.languages[self.language],) if self.language else ()
        return (*language, *self.lead)

    @property
    def context(self) -> int | None:
        """How many tokens of text there are positions for."""
        before = 1 + len(self.known) + int(self.detects)
        return None if self.decoder.positions is None else max(1, self.decoder.positions - before)

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        state = self.decoder.opened(bundle)
        start = torch.full((len(state.mask), 1), self.start, device=state.mask.device)
        lead = start.new_tensor(self.known).expand(len(start), -1)
        if not self.detects:
            return self.decoder.go_on(torch.cat((start, lead), 1), state)
        logits, state = self.decoder.go_on(start, state)
        numbers = start.new_tensor(list(self._speech.languages.values()))
        spoken = numbers[logits[:, numbers].argmax(1)]
        return self.decoder.go_on(torch.cat((spoken[:, None], lead), 1), state)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.decoder.step(ids, state)

    def select(self, state: Any, rows: Tensor) -> Any:
        return self.decoder.select(state, rows)

    def limit(self, scores: Tensor, written: Tensor) -> Tensor:
        """Exclude tokens: see `TransformersSeq2Seq.limit`; and make times come in pairs and ascend."""
        scores = self.decoder.limit(scores, written)
        found: Tensor = self._rules(written, scores) if self.times else scores  # type: ignore[arg-type]
        return found

    def heard(self, ids: Sequence[int]) -> tuple[list[int], float | None]:
        """Return which of the ids written about a window hold, and the seconds of it they cover, None for all.

        Two times next to each other end a segment; what is said behind the last of them is listened to once more.
        """
        ids = list(ids[:-1] if ids and ids[-1] in self.processor.stop_ids else ids)
        first = self._speech.untimed + 1
        marks = [token >= first for token in ids]  # not asked for, some may come all the same
        ends = [place + 1 for place in range(len(marks) - 1) if marks[place] and marks[place + 1]]
        if not ends or marks[-2:] == [False, True]:
            return ids, None
        return ids[: ends[-1] + 1], (ids[ends[-1] - 1] - first) * TICK

    def joined(self, windows: Sequence[tuple[Sequence[int], float, float, float]]) -> dict[str, Any]:
        """Join what was written about windows that follow each other: (ids, seconds, seconds left and right that are
        heard better in the neighbour). Return {"text"}, with times also "segments": [{"text", "start", "end"}].
        """
        outputs = [{"tokens": np.array([list(ids)], np.int64), "stride": tuple(times)} for ids, *times in windows]
        with quiet():  # it warns of a segment without an end, which is the recording's
            text, more = _decode_asr(
                _Tokens(self.processor),
                outputs,
                return_timestamps=self.times or None,
                return_language=None,
                time_precision=TICK,
            )
        if not self.times:
            return {"text": text}
        last = sum(seconds - left - right for _, seconds, left, right in windows)
        return {"text": text, "segments": _segments(more["chunks"], last)}


def _segments(chunks: Sequence[Mapping[str, Any]], last: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for chunk in chunks:
        start, end = chunk["timestamp"]
        start = (found[-1]["end"] if found else 0.0) if start is None else start
        found.append({"text": chunk["text"], "start": start, "end": max(start, round(last, 2)) if end is None else end})
    return found


class _Tokens:
    """Our tokenizer, with the names by which the library's joining asks for it."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        added = processor.tokenizer.get_added_tokens_decoder()
        self.all_special_ids = [number for number, token in added.items() if token.special]
        self.eos_token_id = processor.end_id
        self.language: str | None = None

    def convert_tokens_to_ids(self, name: str) -> int:
        found: int | None = self._processor.tokenizer.token_to_id(name)
        return -1 if found is None else found

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        text: str = self._processor.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    @staticmethod
    def _strip_prompt(ids: list[int], *_: Any) -> list[int]:
        return ids  # none is ever given


def _code(language: str, known: Mapping[str, int]) -> str:
    """The code of a language that is given by its code or English name.

    Raises:
        UsageError: the model does not know it.
    """
    name = language.lower().strip("<|>")
    code: str = TO_LANGUAGE_CODE.get(name, name)
    if code not in known:
        names = {full for full, short in TO_LANGUAGE_CODE.items() if short in known} | set(known)
        raise UsageError(f"this model knows no language {language!r}", did_you_mean(name, names) or "e.g. en")
    return code
