"""What listings and descriptions say, and how they are narrowed down."""

import json
import struct
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import BadRequestError

from mmhub_hubserver import views

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

CARD = """---
license: mit
library_name: mmhub
pipeline_tag: image-classification
language: [de, en]
datasets: [lab/data]
base_model: lab/base
tags: [small]
model-index:
- name: x
---
"""


def safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header |= {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.fixture
def models(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    weights = safetensors({"a": ("F32", [1000, 1000]), "b": ("F32", [5]), "c": ("I8", [])})
    files = {
        "README.md": CARD.encode(),
        "config.json": b'{"model_type": "bert", "secret": 1}',
        "m.safetensors": weights,
    }
    for name, content in (("lab/cats", files), ("lab/dogs", {"x.txt": b"x"}), ("ann/cats", {"x.safetensors": b"junk"})):
        team.api().create_repo(name, private=False)
        changes = [CommitOperationAdd(path, one) for path, one in content.items()]
        team.api().create_commit(name, changes, commit_message="files")
    team.api().update_repo_settings("lab/dogs", gated="auto")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["ann/cats", "lab/dogs", "lab/cats"]),  # changed last comes first
        ({"search": "CAT"}, ["ann/cats", "lab/cats"]),
        ({"author": "lab"}, ["lab/dogs", "lab/cats"]),
        ({"author": "LAB", "search": "cat"}, ["lab/cats"]),
        ({"filter": "license:mit"}, ["lab/cats"]),
        ({"filter": ["mmhub", "de", "small", "dataset:lab/data"]}, ["lab/cats"]),
        ({"filter": ["mmhub", "fr"]}, []),
        ({"pipeline_tag": "image-classification"}, ["lab/cats"]),
        ({"gated": True}, ["lab/dogs"]),
        ({"gated": False}, ["ann/cats", "lab/cats"]),
        ({"num_parameters": "min:1M,max:0.002B"}, ["lab/cats"]),
        ({"num_parameters": "max:1000000"}, []),
        ({"sort": "created_at"}, ["ann/cats", "lab/dogs", "lab/cats"]),
        ({"limit": 2}, ["ann/cats", "lab/dogs"]),
    ],
)
def test_models_are_found_by(team: Any, models: None, options: dict[str, Any], expected: list[str]) -> None:
    assert [model.id for model in team.api(None).list_models(**options)] == expected


def test_parameters_are_counted_from_the_headers(team: Any, models: None) -> None:
    info = team.api(None).model_info("lab/cats")
    assert (info.safetensors.parameters, info.safetensors.total) == ({"F32": 1_000_005, "I8": 1}, 1_000_006)
    assert team.api(None).model_info("ann/cats").safetensors is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{{",
        safetensors({"a": ("F32", [-1])}),
        safetensors({"a": ("F32", [1 << 60])}),
        safetensors({"a": ("F32", [1 << 40] * 2)}),
        safetensors({"a": ("F32", [1 << 40] * 10_000)}),
        safetensors({"a": ("F32", [1] * 17)}),
        safetensors({"a": ("F" * 33, [1])}),
    ],
)
def test_damaged_headers_are_no_parameters(team: Any, models: None, content: bytes) -> None:
    team.api().upload_file(path_or_fileobj=content, path_in_repo="m.safetensors", repo_id="lab/cats")
    assert team.api(None).model_info("lab/cats").safetensors is None


def test_expand_names_fields(team: Any, models: None) -> None:
    info = team.api(None).model_info("lab/cats", expand=["config", "usedStorage", "model-index", "gguf"])
    assert (info.config, info.used_storage is not None, info.sha, info.siblings) == (
        {"model_type": "bert"},
        True,
        None,
        None,
    )
    (found,) = team.api(None).list_models(search="dogs", expand=["gated"])
    assert (found.gated, found.tags) == ("auto", None)
    with pytest.raises(BadRequestError, match='"expand" has no'):
        team.api(None).model_info("lab/cats", expand=["secrets"])


def test_listings_are_short_unless_asked(team: Any, models: None) -> None:
    (brief,) = team.api(None).list_models(search="dogs")
    assert (brief.siblings, brief.card_data) == (None, None)
    (full,) = team.api(None).list_models(search="lab/cats", full=True)
    assert full.card_data["license"] == "mit" and len(full.siblings) == 4


def test_dataset_tags_have_their_kinds(team: Any) -> None:
    team.api().create_repo("lab/data", repo_type="dataset", private=False)
    card = b"---\nlanguage: [de]\ntask_categories: [image-classification]\nsize_categories: [n<1K]\n---\n"
    team.api().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="lab/data", repo_type="dataset")
    (found,) = team.api(None).list_datasets(language="de", size_categories="n<1K")
    assert "task_categories:image-classification" in found.tags
    assert set(team.send(None, "GET", "/api/datasets-tags-by-type").data) == {
        "language",
        "size_categories",
        "task_categories",
    }
    assert team.send(None, "GET", "/api/datasets/lab/data/parquet").status == 404


def test_numbers_that_are_none_are_refused(team: Any) -> None:
    for query in ("limit=x", "cursor=-1", "num_parameters=many", "expand=x", "limit=99999999999"):
        assert team.send(None, "GET", f"/api/models?{query}").status == 400, query


def test_the_commit_that_changed_a_file_last_is_told(team: Any, models: None) -> None:
    api = team.api()
    api.upload_file(path_or_fileobj=b"1", path_in_repo="d/e/f", repo_id="lab/dogs", commit_message="new")
    found = {item.path: item for item in api.list_repo_tree("lab/dogs", recursive=True, expand=True)}
    assert {path: item.last_commit.title for path, item in found.items()} == {
        ".gitattributes": "initial commit",
        "d": "new",
        "d/e": "new",
        "d/e/f": "new",
        "x.txt": "files",
    }
    (info,) = api.get_paths_info("lab/dogs", ["d"], expand=True)
    assert (info.tree_id, info.last_commit.title) == (found["d"].tree_id, "new")


def test_raw_files_are_text_that_no_browser_runs(team: Any, models: None) -> None:
    answer = team.send(None, "GET", "/lab/cats/raw/main/m.safetensors")
    assert answer.data.startswith(b"version https://git-lfs")
    answer = team.send(None, "GET", "/lab/cats/resolve/main/README.md")
    assert answer.data == CARD.encode()
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    same = team.send(None, "GET", "/lab/cats/resolve/main/README.md", If_None_Match=answer.headers["etag"])
    assert (same.status, same.data) == (304, b"")
    head = team.send(None, "HEAD", "/lab/cats/resolve/main/README.md")
    assert (head.headers["content-length"], head.data) == (str(len(CARD)), b"")
    part = team.send(None, "GET", "/lab/cats/resolve/HEAD/README.md", Range="bytes=4-10")
    assert (part.status, part.data, part.headers["content-range"]) == (206, b"license", f"bytes 4-10/{len(CARD)}")


def test_one_broken_repository_does_not_spoil_a_listing(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    team.api().create_repo("lab/broken", private=False)
    team.api().create_repo("lab/whole", private=False)
    size = views.Described._size

    def broken(described: views.Described) -> int:
        if described.repo.id == "lab/broken":
            raise KeyError("an object is gone")
        return size(described)

    monkeypatch.setattr(views.Described, "_size", broken)
    found = team.send("ann", "GET", "/api/models?expand[]=usedStorage").data
    assert "lab/whole" in [one["id"] for one in found] and "lab/broken" not in [one["id"] for one in found]
