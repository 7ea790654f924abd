"""The model card: metadata the Hub indexes and a generated section, merged into whatever the user wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmhub.checkpoint import CheckpointConfig
from mmhub.errors import TrustError, UsageError
from mmhub.hub.cache import as_table, read_json
from mmhub.hub.readme import parse_metadata, strings
from mmhub.hub.search import read_modalities
from mmhub.hub.statements import intended_use, limits, rows_of, stated_in, training_data
from mmhub.interfaces import TASKS, Task, find_task

START, END = "<!-- mmhub: generated from here -->", "<!-- mmhub: to here; text outside is kept -->"


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a README into its YAML metadata and its text."""
    text = text.removeprefix("\ufeff")
    found = re.match(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    if not found:
        return {}, text
    try:
        data = parse_metadata(found[1])
    except ValueError as error:
        raise UsageError(f"the metadata at the top of README.md is not YAML: {error}", "correct it") from None
    return (data if isinstance(data, dict) else {}), text[found.end() :]


def join_cards(local: str, remote: str) -> str:
    """Return the card to go on from: the text of `local` where the user wrote any, else that of `remote`.

    Metadata keys of both are kept; the local value wins.
    """
    import yaml

    (ours, text), (theirs, remote_text) = read_card(local), read_card(remote)
    theirs = _own_metadata(theirs, remote_text)
    data = theirs | ours
    if theirs.get("tags") or ours.get("tags"):
        data["tags"] = _joined(theirs.get("tags"), strings(ours.get("tags")))
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n" + (
        text if _own_text(text) or not _own_text(remote_text) else remote_text
    )


def merge_card(
    folder: Path,
    config: CheckpointConfig,
    *,
    name: str,
    old: str = "",
    metadata: Mapping[str, Any] | None = None,
    summary: str = "",
    library: str = "mmhub",
    architecture: str = "",
) -> str:
    """Return the README for a checkpoint: `old` with our metadata keys and generated section renewed.

    Keys and text that mmhub does not generate stay as the user left them. `library` is whose layout it is published in,
    and `architecture` what that library calls the model.
    """
    import yaml

    data, text = read_card(old)
    data = _own_metadata(data, text)
    data |= {key: value for key, value in (metadata or {}).items() if value}
    facts = _provenance(folder)
    data |= _origins(facts, data, bases_of(config) if library == "mmhub" else [])
    data["library_name"] = library
    task = find_task(config.task)
    modalities = tuple(read_modalities(config.components, config.task))
    tag = task.pipeline_tag(modalities)
    if tag:
        data["pipeline_tag"] = tag
    plugins = [str(record["distribution"]) for record in config.requires]  # so that a search can tell what to install
    known = ["mmhub", config.task, *modalities, *plugins] if library == "mmhub" else [config.task, *modalities]
    data["tags"] = _joined(data.get("tags"), known)
    results = read_results(folder)
    if results:
        data["model-index"] = [_model_index(name, config.task, tag, results)]
    use = _own_use(config, task, name, modalities) if library == "mmhub" else _library_use(library, architecture, name)
    said = {key: text.replace(START, "").replace(END, "").strip() for key, text in stated_in(facts).items()}
    said = {
        "intended_use": intended_use(config, modalities, strings(data.get("language"))),
        "limits": limits(config, facts, results),
        "training_data": training_data(facts) or "Not recorded.",
    } | said
    made = f"A {config.task} model that takes {' and '.join(modalities)}, made with mmhub."
    intro = summary or said.get("summary") or made
    section = f"{START}\n{_section(facts, config, [intro, '', '## Use', '', *use], results, said)}\n{END}"
    body = _replace_section(text, section, name)
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{body}"


def _provenance(folder: Path) -> dict[str, Any]:
    return as_table(read_json(folder / "provenance.json"))


def bases_of(config: CheckpointConfig) -> list[str]:
    """The repositories whose weights a checkpoint lacks, for it holds only adapters of them."""
    adapters = [record.adapter for record in config.components.values() if record.adapter]
    return [one.base.name for one in adapters if one.weights and one.base and one.base.commit]


def _origins(facts: Mapping[str, Any], known: Mapping[str, Any], adapted: Sequence[str]) -> dict[str, Any]:
    """The metadata by which a Hub draws a model's family tree: base models and data sets, those known first."""
    found: dict[str, Any] = {}
    bases = [*adapted, *(parent["repo"] for parent in facts.get("parents") or () if parent.get("repo"))]
    if bases:
        found["base_model"] = _joined(known.get("base_model"), bases)
        relation = "adapter" if adapted else "finetune"
        found["base_model_relation"] = known.get("base_model_relation") or relation
    runs = facts.get("stages") or [facts]
    parts = [part for run in runs for part in (run.get("data") or {}).values()]
    ids = [part["id"] for part in parts if part.get("id") and not part.get("readers")]  # a plugin's source is no Hub's
    names = [_dataset(one) for one in ids]
    return found | ({"datasets": _joined(known.get("datasets"), names)} if names else {})


def _joined(known: Any, found: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*strings(known), *found]))


def _own_metadata(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The metadata of a card without what mmhub generated for the version it described: that may be true no more."""
    _, start, rest = text.partition(START)
    if not start:
        return dict(data)
    section = rest.partition(END)[0]
    kept = {key: value for key, value in data.items() if key not in ("model-index", "pipeline_tag", "library_name")}
    parts = re.findall(r"^\| (\w+)_encoder \|", section, re.MULTILINE)
    generated = {"mmhub", "text", "image", "audio", *parts, *TASKS}
    accounted = {
        "tags": [tag for tag in strings(data.get("tags")) if tag in generated or tag.startswith("mmhub-")],
        "base_model": re.findall(r"started from `([^`#]+)", section),
        "datasets": [_dataset(one) for one in re.findall(r" rows of `([^`]+)`", section)],
    }
    for key, names in accounted.items():
        if key in kept:
            kept[key] = [one for one in strings(kept[key]) if one not in names]
    for key in [key for key in accounted if kept.get(key) == []]:
        del kept[key]
    if "base_model" not in kept:
        kept.pop("base_model_relation", None)
    return kept


def _dataset(source: str) -> str:
    """The repository in the name of a Hub data set, such as `hub:org/name@v1#all:train`."""
    return re.split("[@#:]", re.sub("^(hub|hf-hub):", "", source))[0]


def _pinned(parent: Mapping[str, str]) -> str:
    pin = f"commit {parent['commit'][:12]}" if parent.get("commit") else f"sha256 {parent.get('sha256', '?')[:12]}"
    return f"`{parent['name']}` ({pin})"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The measured results stored in the checkpoint's eval/ folder."""
    results = []
    for path in sorted((folder / "eval").glob("*.json")):
        result = as_table(read_json(path))
        if not isinstance(result.get("metrics"), dict) or not isinstance(result.get("subsets", {}), dict):
            raise TrustError(f"'{path}' holds no results as `mmhub eval` writes them", "remove it, or measure again")
        results.append({"rows": "?", **result})
    return results


def _replace_section(text: str, section: str, name: str) -> str:
    before, after = around_section(text)
    if not before or _TITLE.fullmatch(before):  # ours; the name may have changed since
        before = f"# {name}"
    return f"\n{before}\n\n{section}\n" + (f"\n{after}\n" if after else "")


_TITLE = re.compile(r"# \S+")


def around_section(text: str) -> tuple[str, str]:
    """Return what people wrote before and after the generated section of a card without its metadata."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return (before.strip(), after.strip()) if start and end else (text.strip(), "")


def _own_text(text: str) -> bool:
    before, after = around_section(text)
    return bool(after) or bool(before and not _TITLE.fullmatch(before))


def _model_index(name: str, task: str, tag: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entries = []
    for result in results:
        subsets = {"": result["metrics"], **result.get("subsets", {})}
        metrics = [
            {"type": kind, "name": f"{name} ({subset} only)" if subset else name, "value": round(value, 6)}
            for subset, values in subsets.items()
            for kind, name, value in _numbers(values)
        ]
        dataset = {"name": result.get("data", "data"), "type": result.get("data", "data")}
        entries.append({"task": {"type": tag or task, "name": task}, "dataset": dataset, "metrics": metrics})
    return {"name": name, "results": entries}


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield the metric, the name of one of its values and that value: metrics such as recall have several."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((key, f"{key} {name}", number) for _, name, number in _numbers(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "rows" and math.isfinite(value):
            yield key, key, float(value)


def _section(
    facts: Mapping[str, Any],
    config: CheckpointConfig,
    start: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    said: Mapping[str, str],
) -> str:
    lines = [*start, "## Parts", "", "| part | component |", "|---|---|"]
    lines += [f"| {role} | `{record.use}` |" for role, record in config.components.items()]
    if config.guards:
        names = ", ".join(f"`{record.use}`" for record in config.guards)
        lines += ["", f"Guards, without which it is not loaded: {names}."]
    for result in results:
        lines += ["", f"## Results on {result.get('data', 'held-out data')} ({result['rows']} rows)", ""]
        lines += _table(result)
    lines += ["", "## Training data", "", said["training_data"], "", "## Training", "", *_training(facts)]
    lines += ["", "## Intended use and limits", "", said["intended_use"], "", said["limits"], ""]
    lines += [
        "Measured on the data named above and on nothing else. Check it on your own data, for each group of",
        "people it affects, before you rely on it, and do not let it decide about people where nobody can overrule it.",
    ]
    return "\n".join(lines)


def _own_use(config: CheckpointConfig, task: Task, name: str, modalities: Sequence[str]) -> list[str]:
    needs = " ".join(f'"{r["distribution"]}{r["specifier"]}"' for r in config.requires)
    needs += ' "mmhub[lora]"' if any(record.adapter for record in config.components.values()) else ""
    flags = {"text": "--text TEXT", "image": "--image FILE", "audio": "--audio FILE"}
    options = " ".join(flags.get(m, f"--input {m}=VALUE") for m in modalities)
    call = f'generate {name} "TEXT"' if modalities == ("text",) and task.writes else f"predict {name} {options}"
    if task.converses:
        call = " ".join(["chat", name, *(flags[m] for m in modalities if m in ("image", "audio"))])
    lines = ["```sh", f"pip install {needs}", f"mmhub {call}", "```", ""]
    if task.converses:
        others = ", ".join(m for m in modalities if m != "text")
        lines += (
            [f"Items ({others}) may stand anywhere in a conversation, any number of them or none.", ""]
            if others
            else []
        )
    elif len(modalities) > 1:
        lines += ["Any subset of the inputs works; what is missing is left out of the command.", ""]
    return lines


def _library_use(library: str, architecture: str, name: str) -> list[str]:
    auto = "AutoModel" + "".join(re.findall(r"For[A-Z]\w*$", architecture))
    code = {
        "transformers": f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")',
        "sentence-transformers": (
            f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")'
        ),
        "timm": f'import timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True)',
    }.get(library)
    return [f"In the layout of {library}; mmhub loads it, too.", "", *(["```python", code, "```", ""] if code else [])]


def _table(result: Mapping[str, Any]) -> list[str]:
    subsets = result.get("subsets", {})
    apart = sum(values.get("rows", 0) for values in subsets.values()) == result["rows"]  # each row is in one of them
    whole = "all rows" if apart or result.get("task") == "chat" else "all inputs given"
    rows = {whole: result["metrics"], **{f"{k} only": v for k, v in result.get("subsets", {}).items()}}
    keys = [name for _, name, _ in _numbers(result["metrics"])]
    lines = ["| inputs | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for label, values in rows.items():
        known = {name: number for _, name, number in _numbers(values)}
        cells = (f"{known[key]:.4f}" if key in known else "" for key in keys)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _training(facts: Mapping[str, Any]) -> list[str]:
    origins = [f"The {parent['part']} started from {_pinned(parent)}." for parent in facts.get("parents") or ()]
    if "steps" not in facts:
        return [*origins, "Not trained by mmhub." if origins else "Not recorded."]
    how = f"seed {facts.get('seed', '?')}, in {facts.get('seconds', '?')} s on {facts.get('hardware', '?')}"
    stages = facts.get("stages") or ()
    what = "" if stages else f" over {rows_of(facts)}"
    lines = [f"{facts.get('steps', '?')} optimizer steps{what}, {how}."]
    for number, stage in enumerate(stages, 1):
        parts = ", ".join(stage.get("parts", ()))
        steps = f"{stage.get('steps', '?')} steps on {parts}, over {rows_of(stage)}"
        lines.append(f"Stage {number}, {stage.get('name', '?')}: {steps}.")
    lines += origins
    code = facts.get("code")
    if code:
        changed = ", with uncommitted changes" if code.get("dirty") else ""
        lines.append(f"Code: commit {code['commit'][:12]}{changed}.")
    versions = facts.get("versions", {})
    if versions:
        lines.append("Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".")
    return lines
