"""POST /v1/audio/transcriptions and /v1/audio/translations: what is said in a recording."""

from __future__ import annotations

from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy
from mmhub.speech.subtitles import as_text as subtitles
from mmhub_serve.bodies import Body, answer, aside, lent, only_value, read_form, shaped
from mmhub_serve.errors import Refused
from mmhub_serve.openai_parameters import TRANSCRIPTS, without_defaults
from mmhub_serve.pool import Pool
from mmhub_serve.refusals import blaming
from mmhub_serve.settings import Limits

_GRANULARITIES = "timestamp_granularities"


class TranscriptBody(Body, kw_only=True):
    model: str | None = None
    language: str | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    timestamp_granularities: list[Literal["word", "segment"]] | None = None


async def transcribe(request: Request, pool: Pool, limits: Limits, translate: bool = False) -> Response:
    """Write down a recording, or with `translate` what it says in English."""
    form = await read_form(request, limits)
    content = _file(form.pop("file", []))
    times = form.pop(_GRANULARITIES, [])
    table: dict[str, Any] = {name: only_value(form, name) for name in form}
    body = shaped(TranscriptBody, without_defaults(table, TRANSCRIPTS) | ({_GRANULARITIES: times} if times else {}))
    timed = body.response_format in ("srt", "vtt", "verbose_json")
    if times and body.response_format != "verbose_json":
        raise Refused(400, f"{_GRANULARITIES} are for verbose_json", "leave them out", param=_GRANULARITIES)
    words = "word" in (body.timestamp_granularities or ())
    options: dict[str, Any] = {"timestamps": "word" if words else "segment"} if timed else {}
    options |= {"translate": True} if translate else {}
    async with lent(request, pool, body.model) as served:
        if not served.info.hears or served.info.modalities != ("audio",):
            what = f"{served.name} is for {served.info.task} and writes down no speech"
            raise Refused(400, what, "name a model for speech-recognition", param="model")
        if body.language and not (_is_english(body.language) and _knows_english_alone(served.model)):
            options["language"] = body.language
        with blaming("file"):
            try:
                found = await served.transcribe({"audio": content}, **options)
            except UsageError as error:  # what the model cannot do
                param = _GRANULARITIES if words else "language" if body.language else "response_format"
                raise Refused(400, error.message, error.hint, param="model" if translate else param) from None
    return await _shown(found, content, body, translate, limits.policy)


def _is_english(language: str) -> bool:
    return language.lower() in ("en", "english")


def _knows_english_alone(model: Any) -> bool:
    """Is it a Whisper that cannot be told a language? Those of one language are English."""
    speech = getattr(model.decoder.config, "speech", None)
    return speech is not None and not speech.languages


def _file(values: list[str | bytes]) -> bytes:
    if len(values) != 1 or not isinstance(values[0], bytes):
        raise Refused(400, f"the form holds {len(values)} files named 'file'", "send one recording", param="file")
    return values[0]


async def _shown(
    found: dict[str, Any], content: bytes, body: TranscriptBody, translate: bool, policy: Policy
) -> Response:
    if "refused" in found:
        raise Refused(400, f"the guard {found['guard']} refused: {found['refused']}", code="content_filter")
    kind, text = body.response_format, str(found["text"]).strip()
    if kind == "text":
        return PlainTextResponse(text + "\n")
    if kind in ("srt", "vtt"):
        return PlainTextResponse(subtitles(found, f".{kind}"))
    if kind == "json":
        return answer({"text": text})
    seconds = await aside(2**30, _seconds, content, found, policy)
    table: dict[str, Any] = {"task": "translate" if translate else "transcribe", "language": body.language or ""}
    table |= {"duration": seconds}
    wanted = body.timestamp_granularities or ["segment"]
    if "segment" in wanted:
        table["segments"] = [_segment(number, one) for number, one in enumerate(found.get("segments") or ())]
    if "word" in wanted:
        table["words"] = found.get("words") or []
    return answer(table | {"text": text, "usage": {"type": "duration", "seconds": seconds}})


def _segment(number: int, one: dict[str, Any]) -> dict[str, Any]:
    """A segment with the fields of OpenAI's; what the models here do not tell is null."""
    unknown = dict.fromkeys(("avg_logprob", "compression_ratio", "no_speech_prob"))
    return {"id": number, "seek": 0, "tokens": [], "temperature": 0.0} | unknown | one


def _seconds(content: bytes, found: dict[str, Any], policy: Policy) -> float:
    """How long a recording lasts; where nobody can tell, until the last thing was said."""
    try:
        from mmhub_audio.decode import measure  # type: ignore[import-untyped]  # of whoever hears

        frames, rate = measure(content, policy)
        return round(frames / rate, 3)
    except (ImportError, InputError):
        ends = [one["end"] for one in (found.get("segments") or found.get("words") or ())]
        return float(max(ends, default=0.0))
