"""An index on disk: one JSON file that says what was indexed by which model, and one of faiss with the vectors.

Both are replaced together, at once or not at all. Vectors have length 1, so that their inner product is the cosine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from mmhub.errors import NotFoundError, PluginError, TrustError, UsageError
from mmhub.files import disk_errors, new_folder, write_file

if TYPE_CHECKING:
    from mmhub.model import Model

FORMAT = 1
NAME = ".mmhub-index"  # of the folder with an index, in the folder that was indexed; of a table, behind its name
HEADER, VECTORS = "mmhub-index.json", "vectors.faiss"
_LINKS, _BREADTH = 32, 64  # of HNSW: neighbours of a vector, and candidates that a search keeps
_AGAIN = "build it again with --rebuild"

Kind = Literal["exact", "hnsw"]
Vectors = NDArray[np.float32]  # (N, D)


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that can be found.

    A file is told from what it was before by `size` (bytes) and `mtime_ns`, a row of a table by the `digest` of its
    content. `row` counts from 1, and is 0 for a file; `text` is how a text begins.
    """

    path: str  # of a file, from the folder; of a row, the table's name
    size: int = 0
    mtime_ns: int = 0
    row: int = 0
    digest: str = ""
    text: str = ""

    @property
    def place(self) -> tuple[str, int]:
        """Where it is, whatever it holds."""
        return self.path, self.row

    @property
    def stamp(self) -> str:
        """What its vector depends on, beside the model."""
        facts = self.digest or f"{self.path}\0{self.size}\0{self.mtime_ns}"
        return hashlib.blake2b(facts.encode(errors="surrogatepass"), digest_size=16).hexdigest()


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What an index says of itself.

    `identity` is a hash of the model's weights and configuration; `source` leads from the index to what was indexed.
    """

    mmhub_index: int = FORMAT
    model: str
    identity: str
    modality: str
    source: str
    kind: Kind
    dim: int
    sha256: str = ""
    column: str = ""
    metric: str = "cosine"
    entries: list[Entry]


@final
class Index:
    """What can be searched. Nothing but the JSON file is read before the first search."""

    def __init__(self, folder: Path, header: Header, model: Model | None = None, device: str = "cpu") -> None:
        self.folder, self.header, self.device = folder, header, device
        self._model, self._checked = model, False
        self._vectors: Any = None  # faiss's index

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, model: Model | str | None = None, device: str = "cpu") -> Self:
        """Open the index of a folder or table, or an index folder itself.

        `model` stands in for the one that the index names, which is loaded on `device` for the first search.

        Raises:
            NotFoundError: there is no index. TrustError: it is damaged. PluginError: a newer mmhub wrote it.
        """
        folder = find_index(Path(path))
        header = read_header(folder)
        if isinstance(model, str):
            header, model = msgspec.structs.replace(header, model=model), None
        return cls(folder, header, model, device)

    def __len__(self) -> int:
        return len(self.header.entries)

    @property
    def source(self) -> Path:
        """The folder or table that was indexed."""
        return Path(os.path.normpath(self.folder / self.header.source))

    @property
    def vectors(self) -> Vectors:
        """All vectors in the order of the entries, (N, D)."""
        found: Vectors = self._searcher().reconstruct_n(0, len(self))
        return found

    def search(self, query: Mapping[str, Any], k: int = 10) -> list[dict[str, Any]]:
        """Return the `k` nearest to a query, such as `{"text": "a dog"}` or `{"image": "dog.png"}`, the best first.

        Each is `{"path", "score"}`, the score being the cosine, -1 to 1. A row of a table has "row", from 1, and
        "text" with the beginning of a text. Fewer than `k` come back where the index holds fewer.

        Raises:
            UsageError: the query is in a modality that cannot be compared, `k` is below 1, or the model is another one
                than the index was built with. InputError: the query cannot be read.
            NotFoundError: what was indexed is not there any more. TrustError: the index is damaged.
        """
        if k < 1:
            raise UsageError(f"cannot find {k} results", "ask for at least 1")
        if not self.source.exists():
            hint = "the results could not be opened; index it at its new place"
            raise NotFoundError(f"'{self.source}', which was indexed, is not there any more", hint)
        searcher = self._searcher()
        vector = self._embed(query)
        if self.header.kind == "hnsw":
            searcher.hnsw.efSearch = max(_BREADTH, 2 * k)
        scores, numbers = searcher.search(vector, min(k, len(self)))
        found = zip(scores[0].tolist(), numbers[0].tolist(), strict=True)
        hits = [(score, self.header.entries[number]) for score, number in found if number >= 0]
        return [self._result(score, entry) for score, entry in sorted(hits, key=lambda hit: (-hit[0], hit[1].place))]

    def _result(self, score: float, entry: Entry) -> dict[str, Any]:
        path = str(self.source if entry.row else self.source / entry.path)
        row: dict[str, Any] = {"row": entry.row} if entry.row else {}
        return {"path": path, **row, "score": min(1.0, max(-1.0, score))} | ({"text": entry.text} if entry.text else {})

    def _embed(self, query: Mapping[str, Any]) -> Vectors:
        from mmhub.hub import load
        from mmhub.index.vectors import check_query, identity_of, query_vector

        if self._model is None:
            if not self.header.model:
                raise UsageError(f"the index '{self.folder}' was built with a model without a name", "add --model NAME")
            self._model = load(self.header.model, device=self.device)
        check_query(self._model, query, self.header.modality)
        if not self._checked and identity_of(self._model) != self.header.identity:
            raise UsageError(
                f"the index was built with another model than '{self._model.name}'",
                "name that one with --model, or build the index again with --rebuild",
            )
        self._checked = True
        return query_vector(self._model, query)

    def _searcher(self) -> Any:
        if self._vectors is None:
            self._vectors = _read_vectors(self.folder, self.header)
        return self._vectors


def find_index(path: Path) -> Path:
    """Return the index folder that belongs to a folder or table, or that `path` is itself.

    Raises:
        NotFoundError: there is none.
    """
    for folder in (path, index_folder(path)):
        if (folder / HEADER).is_file():
            return folder
    if not path.exists():
        raise NotFoundError(f"no folder, table or index '{path}'", "check the path")
    raise NotFoundError(f"'{path}' has no index", f"make one: mmhub index build NAME {path}")


def index_folder(source: Path) -> Path:
    """Return where the index of a folder or table is kept unless told otherwise."""
    return source / NAME if source.is_dir() else source.with_name(source.name + NAME)


def read_header(folder: Path) -> Header:
    """Read and validate what an index says of itself.

    Raises:
        TrustError: it is damaged. PluginError: a newer mmhub wrote it.
    """
    try:
        table = json.loads((folder / HEADER).read_bytes())
        if isinstance(table.get("mmhub_index"), int) and table["mmhub_index"] > FORMAT:
            raise PluginError(
                f"the index '{folder}' has format {table['mmhub_index']}, this mmhub reads up to {FORMAT}",
                "upgrade mmhub: pip install -U mmhub",
            )
        return msgspec.convert(table, Header)
    except (ValueError, AttributeError, RecursionError, OSError, msgspec.ValidationError) as error:
        raise TrustError(f"the index '{folder}' is damaged: {error}", _AGAIN) from None


def write_index(folder: Path, header: Header, vectors: Vectors) -> Header:
    """Write an index, replacing an older one at once or not at all; return its header.

    Raises:
        MmhubError: the disk is full, or the folder not writable; an older index is untouched.
    """
    content = _faiss().serialize_index(_searchable(vectors, header.kind)).tobytes()
    header = msgspec.structs.replace(header, sha256=hashlib.sha256(content).hexdigest())
    with disk_errors("the index", folder), new_folder(folder) as aside:
        write_file(aside / VECTORS, content)
        write_file(aside / HEADER, json.dumps(msgspec.to_builtins(header), indent=1) + "\n")
    return header


def _searchable(vectors: Vectors, kind: Kind) -> Any:
    faiss = _faiss()
    dim = vectors.shape[1]
    flat = kind == "exact"
    found = faiss.IndexFlatIP(dim) if flat else faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
    found.add(np.ascontiguousarray(vectors))
    return found


def _read_vectors(folder: Path, header: Header) -> Any:
    faiss = _faiss()
    try:
        content = (folder / VECTORS).read_bytes()
    except OSError as error:
        raise TrustError(f"the index '{folder}' is damaged: {VECTORS}: {error.strerror}", _AGAIN) from None
    if hashlib.sha256(content).hexdigest() != header.sha256:
        raise TrustError(f"the index '{folder}' is damaged: {VECTORS} is not what it was", _AGAIN)
    try:
        found = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except Exception as error:  # of what is no index, faiss raises a RuntimeError or what numpy does
        reason = str(error).partition("\n")[0]
        raise TrustError(f"the index '{folder}' is damaged: {VECTORS}: {reason}", _AGAIN) from None
    kind = faiss.IndexFlat if header.kind == "exact" else faiss.IndexHNSWFlat
    same = isinstance(found, kind) and found.metric_type == faiss.METRIC_INNER_PRODUCT and header.metric == "cosine"
    if not same or found.ntotal != len(header.entries) or found.d != header.dim:
        raise TrustError(f"the index '{folder}' is damaged: its two files do not belong together", _AGAIN)
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise PluginError("indexes are searched by faiss, which is not installed", _INSTALL) from None
    return faiss


_INSTALL = "pip install 'mmhub[index]', or pip install faiss-cpu"
