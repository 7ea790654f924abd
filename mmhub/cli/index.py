"""`mmhub index`: make a folder or table searchable by meaning, and search it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.options import device_option, urls_option
from mmhub.cli.output import emit, json_option, note, quiet_option, result_options, table
from mmhub.cli.predict import check_files
from mmhub.cli.text import counted, printable, size_text
from mmhub.errors import UsageError

if TYPE_CHECKING:
    from mmhub.index import Built


@click.group()
def index() -> None:
    """Search pictures, sounds and texts by what they show or say."""


@index.command()
@click.argument("name")
@click.argument("source", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the index. Default: FOLDER/.mmhub-index.")
@click.option("--modality", default="", help="Which files, where a folder has several kinds: image, audio, text.")
@click.option("--column", default="", help="The column of a table that is indexed.")
@click.option("--hnsw/--exact", "hnsw", default=None, help="Approximate search, faster on millions. Default: exact.")
@click.option("--rebuild", is_flag=True, help="Forget the index there is, as for another model.")
@click.option("--on-error", type=click.Choice(["skip", "stop"]), default="skip", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@device_option
@urls_option
@quiet_option
@json_option
def build(
    name: str,
    source: Path,
    out: Path | None,
    modality: str,
    column: str,
    hnsw: bool | None,
    rebuild: bool,
    on_error: str,
    batch_size: int,
    device: str,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Index all files below FOLDER that the model NAME reads, or the rows of a table.

    Run again, it looks at what is new or has changed, and drops what is gone; stopped, it goes on where it ended.
    Files that cannot be read are named and left out.
    """
    from mmhub.errors import NotFoundError
    from mmhub.index.builder import Options, renew
    from mmhub.interfaces import Policy

    if not source.exists():
        raise NotFoundError(f"no folder or table '{source}'", "check the path")
    options = Options(
        kind=None if hnsw is None else "hnsw" if hnsw else "exact",
        rebuild=rebuild,
        batch_size=batch_size,
        stop=on_error == "stop",
        device=device,
        policy=Policy(urls=allow_urls),
        failed=lambda path, error: note(f"skipped {printable(path)}: {printable(error)}"),
        progress=_watch(quiet),
    )
    began = time.monotonic()
    done = renew(name, source, out=out, modality=modality, column=column, options=options)
    report = _report(done, time.monotonic() - began)
    emit(report, as_json, _summary(report))


def _report(done: Built, seconds: float) -> dict[str, Any]:
    header = done.index.header
    return {
        "index": str(done.index.folder),
        "model": header.model,
        "modality": header.modality,
        "kind": header.kind,
        "dim": header.dim,
        "count": len(done.index),
        "added": done.added,
        "changed": done.changed,
        "removed": done.removed,
        "kept": done.kept,
        "failed": [{"path": path, "error": error} for path, error in done.failed],
        "seconds": round(seconds, 3),
    }


def _summary(report: dict[str, Any]) -> str:
    parts = [f"{report[key]:,} {key}" for key in ("added", "changed", "removed", "kept") if report[key]]
    parts += [f"{len(report['failed']):,} unreadable"] if report["failed"] else []
    return f"{counted(report['count'], 'vector')} in {printable(report['index'])}: {', '.join(parts)}"


def _watch(quiet: bool) -> Any:
    from tqdm import tqdm

    def watch(parts: Iterator[Any], total: int) -> Iterator[Any]:
        off = quiet or not sys.stderr.isatty()
        yield from tqdm(parts, total=total, desc="indexing", unit="batch", leave=False, disable=off)

    return watch


@index.command()
@click.argument("where", metavar="FOLDER")
@click.option("--text", help="What to look for.")
@click.option("--image", metavar="FILE", help="A picture of what to look for.")
@click.option("--audio", metavar="FILE", help="A recording of what to look for.")
@click.option("--model", help="The model, if it is somewhere else than when the index was built.")
@click.option("-k", type=int, default=10, show_default=True, help="How many results.")
@device_option
@result_options
def search(
    where: str,
    text: str | None,
    image: str | None,
    audio: str | None,
    model: str | None,
    k: int,
    device: str,
    as_json: bool,
) -> None:
    """Find what is nearest to a text, a picture or a sound, in a folder that was indexed, the best first.

    FOLDER may be a table, or an index itself. Scores are cosines of vectors, -1 to 1.
    """
    asked = {"text": text, "image": image, "audio": audio}
    query = {name: value for name, value in asked.items() if value is not None}
    if len(query) != 1:
        raise UsageError("give one query: --text, --image or --audio", "not none, not several")
    check_files(tuple(value for name, value in query.items() if name != "text"))
    from mmhub.index import Index

    results = Index.open(where, model=model, device=device).search(query, k)
    emit({"query": query, "results": results}, as_json, "\n".join(map(_line, results)))


def _line(result: dict[str, Any]) -> str:
    place = printable(result["path"]) + (f" row {result['row']}" if "row" in result else "")
    text = f"\t{printable(result['text'])}" if "text" in result else ""
    return f"{result['score']:.4f}\t{place}{text}"


@index.command()
@click.argument("where", metavar="FOLDER")
@result_options
def info(where: str, as_json: bool) -> None:
    """Say what an index holds, and by which model; nothing is loaded."""
    from mmhub.index import Index

    found = Index.open(where)
    header = found.header
    size = sum(path.stat().st_size for path in found.folder.iterdir())
    facts = {
        "index": str(found.folder),
        "source": str(found.source),
        "model": header.model,
        "identity": header.identity,
        "modality": header.modality,
        "column": header.column,
        "kind": header.kind,
        "metric": header.metric,
        "dim": header.dim,
        "count": len(found),
        "bytes": size,
    }
    shown = facts | {"identity": header.identity[:12], "bytes": size_text(size)}
    emit(facts, as_json, table(["what", "value"], [(k, printable(value)) for k, value in shown.items() if value != ""]))
