"""Text and HTML that the app shows: errors, notes, tables and cards, in which nothing that strangers wrote can act."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmhub.errors import MmhubError

CARD_CHARS = 2**16
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})  # what gr.HTML would run


def escaped(value: Any) -> str:
    """Return text for HTML."""
    return html.escape(str(value)).translate(_TEMPLATE)


def note(text: str) -> str:
    """Return a line that tells something, as HTML."""
    return f'<p class="mm-note" role="status">{escaped(text)}</p>' if text else ""


def failure(error: MmhubError, files: Iterable[str] = ()) -> str:
    """Return what is wrong and what to do, as HTML. Of the `files` of this machine the names alone are said."""
    lines = "".join(f"<p>{escaped(one)}</p>" for one in failure_lines(error, files))
    return f'<div class="mm-error" role="alert">{lines}</div>'


def failure_lines(error: MmhubError, files: Iterable[str] = ()) -> list[str]:
    """Return what is wrong and what to do, in words."""
    lines = [error.message, error.hint or ""]
    for file in files:
        lines = [line.replace(file, Path(file).name) for line in lines]
    return [line for line in lines if line]


def told(action: Callable[[], str], files: Iterable[str] = ()) -> str:
    """Return the HTML of an action, or of its error."""
    try:
        return action()
    except MmhubError as error:
        return failure(error, files)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), caption: str = "") -> str:
    """Return a table as HTML; without a header the first cell of a row names it."""
    if not rows:
        return ""
    cells = "".join(f"<th scope=col>{escaped(one)}</th>" for one in header)
    head = f"<thead><tr>{cells}</tr></thead>" if header else ""
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    body = "".join(_row(row, named=not header) for row in rows)
    return f'<div class="mm-scroll"><table class="mm-facts">{title}{head}<tbody>{body}</tbody></table></div>'


def _row(row: Sequence[Any], named: bool) -> str:
    first = f"<th scope=row>{escaped(row[0])}</th>" if named else f"<td>{escaped(row[0])}</td>"
    return f"<tr>{first}{''.join(f'<td>{escaped(cell)}</td>' for cell in row[1:])}</tr>"


def card(text: str) -> str:
    """Return a model card in Markdown as HTML: its tags are shown and not obeyed, and no picture is fetched."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.add_render_rule("image", _picture)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("heading_open", _heading)
    parser.add_render_rule("heading_close", _heading)
    rest = "\n\n(The rest is left out.)\n" if len(text) > CARD_CHARS else ""
    found = parser.render(_body(_uncommented(text[:CARD_CHARS])) + rest)
    return f'<div class="mm-card">{found.translate(_TEMPLATE)}</div>'


def _uncommented(text: str) -> str:
    """A card without its comments; what is opened and not closed is text."""
    kept, place = [], 0
    while (start := text.find("<!--", place)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        kept.append(text[place:start])
        place = end + 3
    return "".join([*kept, text[place:]])


def _body(text: str) -> str:
    """A card without its metadata."""
    if not text.startswith("---"):
        return text
    _, closed, body = text[3:].partition("\n---")
    return body.partition("\n")[2] if closed else text


def _picture(renderer: Any, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
    return f"[{html.escape(renderer.renderInlineAsText(tokens[at].children, options, env)) or 'picture'}]"


def _link(renderer: Any, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
    """Links leave by a click alone, to the web or a mailbox; relative ones lead nowhere here."""
    address = str(tokens[at].attrGet("href") or "")
    try:
        good = urlsplit(address).scheme.lower() in ("http", "https", "mailto")
    except ValueError:
        good = False
    return f'<a href="{html.escape(address)}" target="_blank" rel="nofollow noreferrer noopener">' if good else "<a>"


def _heading(renderer: Any, tokens: Sequence[Any], at: int, options: Any, env: Any) -> str:
    """Headings stand below that of the page."""
    level = min(int(tokens[at].tag[1:]) + 1, 6)
    return f"<h{level}>" if tokens[at].nesting == 1 else f"</h{level}>\n"
