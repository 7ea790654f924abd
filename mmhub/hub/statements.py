"""What a card states of a model: intended use, limits and training data, by its owner or from what is recorded.

Laying the card out is left to `mmhub.hub.card`, refusing what lacks a statement to `mmhub.hub.gate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mmhub.checkpoint import CheckpointConfig
from mmhub.hub.cache import as_table
from mmhub.hub.readme import strings

Kind = Literal["intended_use", "limits", "training_data"]
KINDS: tuple[Kind, ...] = ("intended_use", "limits", "training_data")

_HEADINGS: dict[Kind, str] = {  # as people name them, and as the Hub's own templates do
    "intended_use": r"(intended|direct|downstream|primary) (uses?|users?)( .*)?|uses|use cases?",
    "limits": r"(known )?limit(ation)?s?( .*)?|bias(es)?\b.*|risks?\b.*|out[- ]of[- ]scope.*|caveats\b.*"
    r"|intended uses? (&|and) limit(ation)?s",
    "training_data": r"training (data|details|sets?|datasets?|corpus)( .*)?|data|datasets?",
}
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(\S.*?)[ \t#]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_LABEL = re.compile(r"[\W_]{0,9}(\*\*|__)[^*_]{1,80}(\*\*|__):?")  # of a line, such as "- **Languages:**"
_PLACEHOLDER = re.compile(
    r"more information needed|to ?do|tb[ad]|fix ?me|x{3,}|coming soon|to be (added|written|filled in)"
    r"|fill (this )?in|your text( here)?|(write|describe|add|insert) .{1,40} here"
)
_LONGEST = 200  # characters of a line that is a heading or a placeholder
_MOST_LABELS = 10  # named in a sentence


def stated_in(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what a recipe's `[card]` said, as provenance.json keeps it: statements, and the summary."""
    said = as_table(facts.get("card"))
    return {key: text for key in ("summary", *KINDS) if isinstance(text := said.get(key), str) and text.strip()}


def stated_under_headings(text: str) -> dict[Kind, bool]:
    """Return which statements have a heading in a text written by people, and whether anything stands under it.

    >>> stated_under_headings("## Intended use\\nToys.\\n## Limitations\\n[More Information Needed]\\n")
    {'intended_use': True, 'limits': False}
    """
    found: dict[Kind, bool] = {}
    for title, content in _sections(text):
        for kind, pattern in _HEADINGS.items():
            if re.fullmatch(pattern, title):
                found[kind] = found.get(kind, False) or not all(map(_says_nothing, content))
    return found


def _says_nothing(line: str) -> bool:
    """Is a line empty, or a placeholder?"""
    if len(line) > _LONGEST:
        return not line.strip()
    label = _LABEL.match(line)
    words = " ".join(re.findall(r"[^\W_]+", line[label.end() :] if label else line)).casefold()
    return not words or _PLACEHOLDER.fullmatch(words) is not None


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each heading in small letters, and the lines under it, those of smaller headings too."""
    text = re.sub(r"<!--.*?(-->|\Z)", "", text, flags=re.DOTALL)
    lines: list[tuple[int, str]] = []  # (level of a heading, 0 of other lines; its text)
    fenced = False
    for line in text.splitlines():
        fence = _FENCE.match(line) is not None
        found = None if fenced or fence else _HEADING.match(line[:_LONGEST])
        fenced ^= fence
        lines.append((len(found[1]), found[2]) if found else (0, "code" if fenced or fence else line))
    for number, (level, title) in enumerate(lines):
        if level:
            after = lines[number + 1 :]
            end = next((i for i, (other, _) in enumerate(after) if 0 < other <= level), len(after))
            plain = re.sub(r"\[optional\]|[*_`:]", "", title).strip().casefold()
            yield plain, [line for other, line in after[:end] if not other]


# -- from what is recorded --------------------------------------------------------------------------------------


def intended_use(config: CheckpointConfig, modalities: Sequence[str], languages: Sequence[str]) -> str:
    """Say what a model was made for, by its task, inputs, languages and labels."""
    spoken = f" in {_listed(languages)}" if languages else ""
    labels = _labels(config)
    into = ""
    if labels:
        few = labels if len(labels) <= _MOST_LABELS else labels[:3]
        more = "" if few is labels else f"{len(labels)} labels, among them "
        into = f", into {more or 'the labels '}{_listed(few)}"
    return f"Made for {config.task} from {_listed(modalities)}{spoken}{into}."


def limits(config: CheckpointConfig, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Say on what a model was measured and how well it did, and what was not measured."""
    measured = [f"{result['rows']} rows of {result.get('data', 'held-out data')}" for result in results]
    if not measured:
        return "No measured result is recorded, so how well it does is not known."
    numbers = [number for result in results for number in _first_numbers(result["metrics"])]
    well = f": {', '.join(numbers)}" if numbers else ""
    unlike = "Other inputs, such as those of other sources, languages or conditions,"
    unseen = " It can give no other labels than those above." if _labels(config) else ""
    return f"Measured on {_listed(measured)}{well}. {unlike} were not measured.{unseen}"


def training_data(facts: Mapping[str, Any]) -> str:
    """Say what a model was trained and validated on, "" where nothing is recorded."""
    runs = [as_table(run) for run in facts.get("stages") or [facts]]
    parts = [as_table(run.get("data")) for run in runs]
    sources = list(dict.fromkeys(rows_of(run) for run, data in zip(runs, parts, strict=True) if data.get("train")))
    if not sources:
        return ""
    valid = as_table(parts[-1].get("valid"))
    held = f" Validated on {rows_of({'data': {'train': valid}})}." if valid else ""
    overlap = as_table(as_table(facts.get("overlap")).get("valid"))
    line = f" {overlap_line(overlap)}." if overlap else ""
    return f"Trained on {_listed(sources)}.{held}{line}"


def rows_of(facts: Mapping[str, Any]) -> str:
    """What a run, or a stage of it, was trained on."""
    data = facts.get("data", {}).get("train", {})
    source = ", ".join(f"`{file['name']}` ({file['sha256'][:12]})" for file in data.get("files", []))
    if data.get("readers"):
        source = f"{source or '`' + data['id'] + '`'} (read by {', '.join(data['readers'])})"
    elif data.get("id"):
        source = f"`{data['id']}` ({str(data.get('revision', '?'))[:12]})"
    return f"{data.get('rows', '?')} rows of {source or 'unrecorded data'}"


def overlap_line(found: Mapping[str, Any]) -> str:
    """Say how much of an evaluation set is in the training data, as `mmhub.overlap` found it; no full stop."""
    if "skipped" in found:
        why = found["skipped"] if isinstance(found["skipped"], str) else "nobody says why"
        return f"Whether evaluation rows are among the training rows was not looked up: {why[:200]}"
    count, rows, share = (_number(found.get(key)) for key in ("exact", "checked_rows", "exact_share"))
    line = f"{count:.0f} of {rows:.0f} evaluation rows ({share:.1%}) are in the training data as they are"
    if found.get("ngram_rows"):
        keys = ("ngram", "ngram_rows", "ngram_share", "n", "ngram_half")
        some, texts, part, n, half = (_number(found.get(key)) for key in keys)
        line += f", {some:.0f} of {texts:.0f} texts ({part:.1%}) share {n:.0f} words in a row with it"
        line += f" and {half:.0f} most of theirs" if half else ""
    if count and (repeats := _number(found.get("repeats"))):
        line += f" ({repeats:.1%} of them occur more than once among themselves)"
    return line


def _number(value: Any) -> float:
    """A number that a stranger wrote, 0 of what is none or absurd."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53
    return float(value) if known else 0.0


def _labels(config: CheckpointConfig) -> list[str]:
    decoder = config.components.get("decoder")
    return strings(decoder.config.get("labels")) if decoder else []


def _first_numbers(metrics: Mapping[str, Any]) -> list[str]:
    """The first metric that is a number, which is the task's own."""
    return [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, (int, float))][:1]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "nothing"
