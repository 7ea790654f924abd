"""Search by meaning: the vectors of a folder's files, or a table's rows, kept in a folder of their own.

`build` makes and renews an index, `Index.open` reads one, `Index.search` finds what is near to a text, a picture or a
sound. The vectors are a model's, their search is faiss's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmhub.lazy import lazy

if TYPE_CHECKING:
    from mmhub.index.builder import Built, build
    from mmhub.index.store import Index

__all__ = ["Built", "Index", "build"]
_HOMES = {"Built": "builder", "Index": "store", "build": "builder"}

__getattr__, __dir__ = lazy(__name__, _HOMES)
