"""Model cards as HTML that cannot act: no raw HTML gets through, and no picture is fetched from elsewhere."""

import functools
import html
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

MAX_CHARS = 256 << 10  # of one text; what is longer is cut off
_SCHEMES = ("http", "https", "mailto", "")
_NO_TEXT = (
    re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL),
    re.compile(r"<(script|style)\b.*?(?:</\1\b[^<>]*>|\Z)", re.DOTALL | re.IGNORECASE),
    re.compile(r"</?[a-zA-Z!?][^<>]*(?:>|\Z)"),
)


@functools.lru_cache(maxsize=64)
def render(text: str, link_root: str, picture_root: str) -> Markup:
    """Return the HTML of a card. Relative links lead below `link_root`, relative pictures below `picture_root`."""
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS] + "\n\n(The rest is left out.)\n"
    parser = MarkdownIt("commonmark", {"linkify": False}, renderer_cls=_Renderer).enable(["table", "strikethrough"])
    return Markup(parser.render(text, {"link_root": link_root, "picture_root": picture_root}))


class _Renderer(RendererHTML):
    def html_block(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        text = _text_of(tokens[at].content)
        return f"<p>{html.escape(text)}</p>\n" if text else ""

    def html_inline(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        return " " if tokens[at].content.lower().startswith("<br") else ""

    def heading_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """Name the heading, so that a table of contents works, and put it below the heading of the page."""
        slug = re.sub(r"[^\w\- ]", "", tokens[at + 1].content.lower()).strip().replace(" ", "-")
        return f'<{_lower(tokens[at].tag)} id="card-{html.escape(slug)}">'

    def heading_close(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        return f"</{_lower(tokens[at].tag)}>\n"

    def td_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """Align a cell by class: the policy of the page refuses the style that the parser gives it."""
        side = str(tokens[at].attrGet("style") or "").partition(":")[2]
        return f'<{tokens[at].tag} class="{side}">' if side in ("right", "center") else f"<{tokens[at].tag}>"

    th_open = td_open

    def link_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        target = _address(str(tokens[at].attrGet("href") or ""), env["link_root"])
        return f'<a href="{html.escape(target)}" rel="nofollow noreferrer noopener">' if target else "<a>"

    def image(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        source = str(tokens[at].attrGet("src") or "")
        words = html.escape(self.renderInlineAsText(tokens[at].children, options, env))
        if source.startswith("data:image/") or _is_relative(source):
            target = source if source.startswith("data:") else _address(source, env["picture_root"])
            return f'<img src="{html.escape(target)}" alt="{words}" loading="lazy">'
        return f"[{words or 'picture'}]"  # a link around it may say more; a request elsewhere would tell who reads this


def _lower(tag: str) -> str:
    return f"h{min(int(tag[1:]) + 1, 6)}"


def _is_relative(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc and not address.startswith(("/", "\\"))


def _address(address: str, root: str) -> str:
    """Return where a link leads: below `root` if it is relative, nowhere if it could run something."""
    if address.startswith("#"):
        return "#card-" + address[1:].lower()
    try:
        scheme = urlsplit(address).scheme.lower()
    except ValueError:
        return ""
    if scheme not in _SCHEMES:
        return ""
    return root + address.removeprefix("./") if _is_relative(address) else address


def _text_of(source: str) -> str:
    """Return the text between tags; comments, scripts and styles have none. Each pattern reads the source once."""
    for pattern in _NO_TEXT:
        source = pattern.sub("", source)
    return html.unescape(source).strip()
