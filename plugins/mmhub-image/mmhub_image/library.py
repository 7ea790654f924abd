"""The transformers library, which this plugin needs for its models of pictures alone, without what it prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmhub.errors import PluginError


def library() -> Any:
    """Return the module.

    Raises:
        PluginError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        what = "vision towers and image processors of transformers need that library"
        raise PluginError(what, "pip install 'transformers>=5.5,<6'") from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep its loading bars, reports and advice off the terminal."""
    library()
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300]
