"""Checkpoint folders: bit-exact, data only, strict, and never half written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmhub import checkpoint, files, hashes, weights
from mmhub.checkpoint import (
    ALLOWED,
    compatible_range,
    is_checkpoint,
    load,
    load_encoder,
    read_config,
    save,
)
from mmhub.errors import ExitCode, MmhubError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.files import sha256, write_file
from mmhub.fusion.streams import Streams
from mmhub.model import Columns, Model
from mmhub.weights import (
    ALIGNMENT,
    Stored,
    check_header,
    copy_parameters,
    fill,
    meta_parameters,
    quantized_state,
    read_tensors,
    write_weights,
)
from tests.conftest import flac, png, three_modalities
from tests.fake_parts import Numbers, Scores, Sensitive, component, fake_model

SAMPLES: list[dict[str, Any]] = [
    {"image": png(0), "audio": flac(0), "text": "a good thing"},
    {"audio": flac(2, seconds=0.4)},
    {"text": "a bad thing"},
]


def make_model() -> Model:
    model = three_modalities("a good thing", "a bad thing")
    model.columns = Columns({"image": "picture"}, "label", ("picture", "label"))
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module")
def _saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(_saved, tmp_path / "model")


@pytest.fixture
def split(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint split by component, as large models are."""
    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", 1000)
    return model.save(tmp_path / "split")


def outputs(model: Model) -> Tensor:
    with torch.no_grad():
        return model(model.collate(SAMPLES)).logits


def same(one: Model, other: Model) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in pairs)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def rehash(folder: Path) -> None:
    """Make config.json agree with the files, as somebody would who crafts a checkpoint."""
    found = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in folder.iterdir() if p.is_file()}
    found.pop("config.json")
    change_config(folder, lambda table: table.update(files=found))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file)
    rehash(folder)


# -- what is saved comes back


def test_a_loaded_model_is_bit_exact(model: Model, saved: Path) -> None:
    found = load(saved, name="org/thing")
    assert same(model, found)
    assert torch.equal(outputs(model), outputs(found))
    assert model.predict(SAMPLES) == found.predict(SAMPLES)
    assert not any(module.training for module in found.modules())
    assert (found.name, found.columns, found.task) == ("org/thing", model.columns, model.task)
    assert found.sources == model.sources
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))


def test_weights_stand_where_matrix_products_round_as_before(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    state = {f"decoder.{i}": torch.arange(3 * (i + 5)).to(kinds[i % len(kinds)]) for i in range(40)}
    state |= {"decoder.empty": torch.zeros(0, 3), "decoder.one": torch.tensor(2.5), "decoder.big": torch.ones(64, 64)}
    write_weights(state, tmp_path)
    found = dict(read_tensors(tmp_path / "model.safetensors"))
    mapped = [tensor for tensor in found.values() if tensor.nbytes and tensor.dtype != torch.bool]
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in mapped)
    theirs = load_file(tmp_path / "model.safetensors")
    assert found.keys() == theirs.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
    assert all(torch.equal(theirs[name], state[name]) for name in state)


def test_a_loaded_model_can_be_saved_again_over_its_own_files(saved: Path) -> None:
    found = load(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with torch.no_grad():
        first = next(found.parameters()).add_(1)
    found.save(saved)
    assert {path.name for path in saved.iterdir()} == set(before)
    again = load(saved)
    assert same(found, again)
    assert torch.equal(next(again.parameters()), first)


def test_a_loaded_model_trains_and_leaves_its_files_alone(saved: Path) -> None:
    found, before = load(saved), (saved / "model.safetensors").read_bytes()
    found.train()
    batch = found.collate([*SAMPLES, {"image": png(1)}])
    batch.targets = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = found(batch).loss
        assert loss is not None
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in found.parameters() if p.requires_grad)
    assert not same(found, load(saved))
    assert (saved / "model.safetensors").read_bytes() == before


def test_private_copies_keep_values_and_ties() -> None:
    model = tied_model()
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    copy_parameters(model)
    assert all(tensor.data_ptr() != before[name] for name, tensor in model.named_parameters())
    assert model.decoder.scale is model.encoders["numbers"].layer.bias  # type: ignore[union-attr]


def test_the_folder_holds_data_files_alone(saved: Path, split: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in split.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        *(f"model-{role}.safetensors" for role in load(split).parts()),
    }
    assert all(ALLOWED.fullmatch(path.name) for path in (*saved.iterdir(), *split.iterdir()))
    with (saved / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_config_json_holds_names_numbers_and_hashes_and_no_import_path(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    table = json.loads(text)
    assert (table["mmhub_format"], table["library_name"], table["task"]) == (1, "mmhub", "classification")
    assert {role: part["use"] for role, part in table["components"].items()} == {
        "image_encoder": "mmhub-image/timm",
        "audio_encoder": "mmhub-audio/cnn",
        "text_encoder": "mmhub-text/lstm",
        "fusion": "mmhub/attention",
        "decoder": "mmhub-heads/classification",
    }
    assert {part["weights"] for part in table["components"].values()} == {"model.safetensors"}
    assert table["components"]["text_encoder"]["processor"]["files"] == {"tokenizer.json": "tokenizer.json"}
    assert table["components"]["fusion"]["config"]["dim"] == 16
    required = {record["distribution"]: record for record in table["requires"]}
    assert set(required) == {"mmhub", "mmhub-audio", "mmhub-heads", "mmhub-image", "mmhub-text"}
    assert required["mmhub-audio"]["components"] == ["audio_encoder:cnn"]
    assert required["mmhub-audio"]["specifier"].startswith(">=")
    assert table["files"] == {
        name: {"sha256": sha256(saved / name), "bytes": (saved / name).stat().st_size}
        for name in ("model.safetensors", "tokenizer.json")
    }
    assert table["data"] == {
        "inputs": {"image": "picture"},
        "target": "label",
        "columns": ["picture", "label"],
        "document": "row",
    }
    assert not [word for word in ("mmhub_image", "mmhub.", "auto_map", "torch", str(saved.parent)) if word in text]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        folder = fake_model().save(tmp_path / "model")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


@pytest.mark.parametrize(
    ("version", "others"),
    [("0.3.2", ["0.3.0", "0.9"]), ("1.4", ["1.5.1"]), ("0.2.0.dev3+g12", ["0.2"]), ("2.0rc1", ["2.1"]), ("3", [])],
)
def test_a_version_can_read_what_it_wrote(version: str, others: list[str]) -> None:
    from packaging.specifiers import SpecifierSet

    specifier = SpecifierSet(compatible_range(version))
    assert all(specifier.contains(other, prereleases=True) for other in [version, *others])
    assert not specifier.contains("99")
    assert compatible_range("0.3.2") == ">=0.3,<1"


# -- splitting


def test_a_large_model_is_split_by_component_and_loads_the_same(model: Model, split: Path) -> None:
    assert same(model, load(split))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["decoder.head.layers.1.bias"] == "model-decoder.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())


def test_an_encoder_is_loaded_from_its_own_files_alone(model: Model, split: Path) -> None:
    for path in split.glob("model-*.safetensors"):
        if "audio" not in path.name:
            path.unlink()
    (split / "tokenizer.json").unlink()
    encoder, source = load_encoder(split, "audio_encoder")
    assert source == model.sources["audio_encoder"]
    want = model.encoders["audio"].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in encoder.state_dict().items())


def test_an_encoder_is_loaded_from_a_file_it_shares(model: Model, saved: Path) -> None:
    encoder, _ = load_encoder(saved, "text_encoder")
    want = model.encoders["text"].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in encoder.state_dict().items())
    assert encoder.processor.state() == model.processors["text"].state()


def test_an_encoder_of_another_name_is_not_found(saved: Path) -> None:
    with pytest.raises(NotFoundError, match="has no component 'txt_encoder'; did you mean 'text_encoder'"):
        load_encoder(saved, "txt_encoder")
    with pytest.raises(NotFoundError, match="it has image_encoder, audio_encoder, text_encoder"):
        load_encoder(saved, "lm")


def test_a_large_component_is_split_into_shards(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", 1000)
    monkeypatch.setattr(weights, "SHARD_BYTES", 4000)
    folder = model.save(tmp_path / "model")
    shards = sorted(path.name for path in folder.glob("model-text_encoder-*"))
    assert len(shards) > 1
    assert shards[0] == f"model-text_encoder-00001-of-{len(shards):05}.safetensors"
    for path in folder.glob("model-*-of-*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
    assert same(model, load(folder))


def test_one_component_with_all_the_weights_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", 1)
    places = write_weights({"text_encoder.a": torch.ones(3)}, tmp_path)
    assert (tmp_path / places["text_encoder"]).is_file()


# -- tied weights


def tied_model() -> Model:
    model = fake_model()
    model.decoder.scale = model.encoders["numbers"].layer.bias  # type: ignore[union-attr]
    return model


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let checkpoints of fake models be loaded."""
    classes = {"sensitive": Sensitive, "streams": Streams, "scores": Scores}
    found = {name: component("?", name) for name in classes}
    for name, cls in classes.items():
        object.__setattr__(found[name], "load", lambda cls=cls: cls)
    monkeypatch.setattr(checkpoint, "find_component", lambda kind, use: found[use.partition("/")[2]])
    monkeypatch.setattr(checkpoint, "unmet_requirements", lambda requires, index: [])


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("single", [10**9, 1])
def test_tied_weights_are_stored_once_and_tied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: int
) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", single)
    folder = tied_model().save(tmp_path / "model")
    assert read_config(folder).tied == {"decoder.scale": "numbers_encoder.layer.bias"}
    found = load(folder)
    assert found.decoder.scale is found.encoders["numbers"].layer.bias  # type: ignore[union-attr]
    assert same(found, tied_model())
    assert len(list(found.parameters())) == 2


@pytest.mark.usefixtures("fakes")
def test_an_encoder_whose_tensor_is_stored_with_another_part_is_complete(tmp_path: Path) -> None:
    folder = tied_model().save(tmp_path / "model")

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.scale"] = tensors.pop("numbers_encoder.layer.bias")

    change_weights(folder, swap)
    change_config(folder, lambda t: t.update(tied={"numbers_encoder.layer.bias": "decoder.scale"}))
    encoder, _ = load_encoder(folder, "numbers_encoder")
    assert torch.equal(encoder.layer.bias, tied_model().decoder.scale)  # type: ignore[union-attr,arg-type]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    "tied", [{"decoder.scale": "nobody.scale"}, {"nobody": "decoder.scale"}, {"decoder.new": "decoder.scale"}]
)
def test_a_tie_to_nowhere_is_refused(tmp_path: Path, tied: dict[str, str]) -> None:
    folder = fake_model().save(tmp_path / "model")
    change_config(folder, lambda table: table.update(tied=tied))
    with pytest.raises(TrustError, match=r"belongs to no component|decoder.new is unexpected"):
        load(folder)


# -- damaged and hostile checkpoints


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(TrustError) as caught:
        load(folder)
    assert caught.value.exit_code == ExitCode.TRUST == 5
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("place", [0, 20, -1])
def test_one_flipped_bit_is_noticed(saved: Path, place: int) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[place] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    refused(saved, "model.safetensors' is damaged: its sha256 is", "instead of")


def test_a_changed_tokenizer_is_noticed(saved: Path) -> None:
    path = saved / "tokenizer.json"
    path.write_text(path.read_text().replace("good", "evil"))
    refused(saved, "tokenizer.json", "damaged")


def test_a_truncated_file_is_noticed(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-7])
    refused(saved, f"has {len(data) - 7} bytes instead of {len(data)}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_noticed(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, name, "is missing from the checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-audio_encoder.safetensors"])
def test_a_damaged_part_is_noticed_when_an_encoder_is_loaded_alone(split: Path, name: str) -> None:
    data = (split / name).read_bytes()
    (split / name).write_bytes(
        data.replace(b"total_size", b"total_sizf") if "index" in name else data[:-1] + bytes([data[-1] ^ 1])
    )
    with pytest.raises(TrustError, match=f"{name}' is damaged"):
        load_encoder(split, "audio_encoder")


def test_tensors_must_fit_the_model_exactly(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["fusion.query"]
        tensors["decoder.head.layers.1.bias"] = torch.zeros(7)
        tensors["decoder.more"] = torch.zeros(1)
        tensors["fusion.kinds.text"] = tensors["fusion.kinds.text"].long()

    change_weights(saved, change)
    refused(
        saved,
        "decoder.head.layers.1.bias has shape [7], not [2]",
        "fusion.query is missing",
        "decoder.more is unexpected",
        "fusion.kinds.text has type int64, not float32",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_no_number_is_refused_by_name(
    saved: Path, value: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = min(key for key in load_file(saved / "model.safetensors") if key.startswith("decoder."))
    change_weights(saved, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    for _ in range(2):  # the outcome is not remembered as good
        with pytest.raises(TrustError, match="NaN or infinity") as caught:
            load(saved)
        assert name in str(caught.value)
        assert caught.value.exit_code == ExitCode.TRUST
    with pytest.raises(TrustError, match="NaN or infinity"):
        load(saved, allow_partial=True)
    monkeypatch.setenv("MMHUB_ALLOW_NONFINITE", "1")
    load(saved)
    assert f"warning: the weights in '{saved}' hold NaN or infinity: {name}" in capfd.readouterr().err


def test_a_buffer_may_hold_infinity_but_not_nan(saved: Path) -> None:
    name = next(key for key in load_file(saved / "model.safetensors") if key.endswith("running_var"))
    change_weights(saved, lambda tensors: tensors[name].fill_(float("inf")))
    load(saved)
    change_weights(saved, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(TrustError, match="NaN or infinity"):
        load(saved)


def test_large_numbers_whose_sum_overflows_are_numbers(saved: Path) -> None:
    name = next(key for key in load_file(saved / "model.safetensors") if key.startswith("decoder."))
    change_weights(saved, lambda tensors: tensors[name].fill_(3e38))
    load(saved)


def test_weights_are_searched_for_nan_once(split: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0.0)
    searched: list[Tensor] = []
    real = weights._is_finite
    monkeypatch.setattr(weights, "_is_finite", lambda tensor: searched.append(tensor) or real(tensor))
    load_encoder(split, "text_encoder")
    assert searched
    load(split)
    count = len(searched)
    load(split)
    load_encoder(split, "text_encoder")
    assert len(searched) == count
    change_weights(split, lambda tensors: None, "model-decoder.safetensors")
    load(split)
    assert len(searched) > count


def test_a_tensor_of_no_component_is_unexpected(saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors.update({"evil.weight": torch.zeros(1)}))
    refused(saved, "evil.weight is unexpected")


def test_many_misfits_are_counted(saved: Path) -> None:
    change_weights(saved, lambda t: [t.pop(n) for n in list(t) if n.startswith("image")])
    refused(saved, "is missing", "; and ")


def test_a_narrower_float_in_the_file_is_widened(saved: Path, model: Model) -> None:
    change_weights(saved, lambda t: t.update({"fusion.query": t["fusion.query"].bfloat16()}))
    found = load(saved).fusion.query
    assert found.dtype == torch.float32
    assert torch.equal(found, model.fusion.query.bfloat16().float())  # type: ignore[operator,union-attr]


def test_a_partial_load_keeps_what_fits_and_starts_the_rest_fresh(
    model: Model, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["decoder.head.layers.1.bias"]
        del tensors["fusion.query"]
        tensors["fusion.more"] = torch.zeros(1)

    change_weights(saved, change)
    found = load(saved, allow_partial=True)
    mine, theirs = model.state_dict(), found.state_dict()
    differ = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert differ == {"decoder.head.layers.1.bias", "fusion.query"}
    assert outputs(found).isfinite().all()
    assert "warning: the weights in" in (err := capsys.readouterr().err)
    assert "fusion.query is missing" in err


def test_a_newer_format_says_to_upgrade(saved: Path) -> None:
    change_config(
        saved, lambda table: table.update(mmhub_format=checkpoint.FORMAT + 1, task="telepathy", components=[])
    )
    with pytest.raises(PluginError, match="has format 4, this mmhub reads up to 3; upgrade mmhub"):
        load(saved)


def test_a_newer_task_or_schema_says_to_upgrade(saved: Path) -> None:
    change_config(saved, lambda table: table["components"]["fusion"].update(schema=2))
    with pytest.raises(PluginError, match=r"mmhub/attention .* reads configurations up to schema 1, not 2; upgrade it"):
        load(saved)
    change_config(saved, lambda table: table.update(task="telepathy"))
    with pytest.raises(PluginError, match="is for an unknown task 'telepathy'; upgrade mmhub"):
        load(saved)


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/passwd", "x.py", "a/b.safetensors", "model.bin", "model.safetensors\n"]
)
def test_forbidden_file_names_are_refused(saved: Path, name: str) -> None:
    change_config(saved, lambda table: table["files"].update({name: {"sha256": "0", "bytes": 1}}))
    refused(saved, "lists the file", "which no checkpoint may hold")


@pytest.mark.parametrize("name", ["../outside.safetensors", "README.md", "model-other.safetensors"])
def test_weights_must_be_files_with_a_hash(saved: Path, name: str) -> None:
    shutil.copy(saved / "model.safetensors", saved.parent / "outside.safetensors")
    change_config(saved, lambda table: table["components"]["fusion"].update(weights=name))
    refused(saved, f"uses the file '{name}', which it does not list")


def test_processor_files_must_have_a_hash(saved: Path) -> None:
    change_config(saved, lambda t: t["components"]["text_encoder"]["processor"]["files"].update(x="../../etc/passwd"))
    refused(saved, "uses the file '../../etc/passwd'")


@pytest.mark.parametrize("place", ["../outside.safetensors", "model-other.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(split: Path, place: str) -> None:
    shutil.copy(split / "model-fusion.safetensors", split.parent / "outside.safetensors")
    path = split / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["fusion.query"] = place
    path.write_text(json.dumps(index))
    rehash(split)
    refused(split, "points to", place, "which config.json does not list")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"fusion.query": 3}}', "not json"])
def test_a_broken_index_is_refused(split: Path, text: str) -> None:
    (split / "model.safetensors.index.json").write_text(text)
    rehash(split)
    refused(split, "")


def test_a_tensor_in_two_files_is_refused(split: Path) -> None:
    change_weights(split, lambda t: t.update({"fusion.query": torch.zeros(16)}), "model-decoder.safetensors")
    refused(split, "fusion.query is in two files")


@pytest.mark.parametrize(
    "content",
    ["", "{", "5", "null", "[]", "{}", *(f'{{"mmhub_format": {x}}}' for x in ("true", "1", "NaN")), "[" * 100_000],
)
def test_a_damaged_config_is_refused(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    refused(saved, "config.json")
    assert isinstance(is_checkpoint(saved), bool)


def test_numbers_that_json_does_not_have_are_refused(saved: Path) -> None:
    path = saved / "config.json"
    text = path.read_text()
    for number in ("NaN", "Infinity", "1e999"):
        path.write_text(text.replace('"dropout": 0.1', f'"dropout": {number}'))
        refused(saved, "is not valid JSON", number)


def test_a_config_that_a_component_refuses_names_the_component(saved: Path) -> None:
    change_config(saved, lambda table: table["components"]["fusion"]["config"].update(import_path="os:system"))
    refused(saved, "config.json: mmhub/attention: unknown key 'import_path'")


def test_a_processor_state_that_makes_no_sense_is_refused(saved: Path) -> None:
    change_config(saved, lambda table: table["components"]["text_encoder"]["processor"].update(state={}))
    refused(saved, "processor of mmhub-text/lstm cannot read", "pad_id")


@pytest.mark.parametrize("role", ["fusion", "decoder"])
def test_every_model_has_a_fusion_and_a_decoder(saved: Path, role: str) -> None:
    change_config(saved, lambda table: table["components"].pop(role))
    refused(saved, f"lacks {role}")


def test_other_roles_are_refused(saved: Path) -> None:
    change_config(saved, lambda t: t["components"].update(loader=t["components"]["fusion"]))
    refused(saved, "lists the component 'loader'")


def test_no_folder_and_no_checkpoint_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere' does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(TrustError, match=r"config\.json' is no plain file"):
        load(tmp_path)


def raw_safetensors(path: Path, header: str | bytes, data: bytes = b"", size: int | None = None) -> Path:
    head = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(head) if size is None else size) + head + data)
    return path


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a":{ONE},"a":{ONE}}}', "it names 'a' twice"),
        (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ONE}}}', "it names 'x' twice"),
        (f'{{"a\\u001b[31m":{ONE}}}', "not printable"),
        (f'{{"a\\n":{ONE}}}', "not printable"),
        ('{"a":{"dtype":"F32","shape":[' + "1," * 16 + '1],"data_offsets":[0,4]}}', "more than 16 dimensions"),
        ("not json", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("[]", "not a table"),
        ('{"a":5}', "not a table"),
        ('{"a":[1,2]}', "not a table"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(TrustError, match=message):
        check_header(path)


def test_a_header_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    for size, message in ((2**60, "claims"), (10_000_001, "claims"), (500, "truncated"), (0, "truncated")):
        with pytest.raises(TrustError, match=message):
            check_header(raw_safetensors(tmp_path / "x.safetensors", "{}", size=size))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(TrustError, match="truncated"):
        check_header(tmp_path / "empty.safetensors")
    with pytest.raises(TrustError, match="No such file"):
        check_header(tmp_path / "none.safetensors")


def test_too_many_tensors_are_refused_quickly(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{i}":{{"shape":[0]}}' for i in range(100_001)) + "}"
    with pytest.raises(TrustError, match="it holds 100001 tensors"):
        check_header(raw_safetensors(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[1152921504606846976,0],"data_offsets":[0,0]}',
        '{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[9],"data_offsets":[0,4]}',
        '{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}',
        '{"shape":5}',
    ],
)
def test_a_hostile_tensor_is_refused_with_one_class_of_error(saved: Path, entry: str) -> None:
    raw_safetensors(saved / "model.safetensors", f'{{"fusion.query":{entry}}}', b"\0" * 4)
    rehash(saved)
    refused(saved, "")


# -- plugins that are not there


def test_a_missing_plugin_is_told_before_any_weight_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"distribution": "mmhub-nose", "specifier": ">=0.3,<1", "components": ["smell_encoder:nose"]}
    change_config(saved, lambda table: table["requires"].append(record))
    (saved / "model.safetensors").write_bytes(b"damaged, which nobody looks at yet")
    with pytest.raises(PluginError, match=r"thing needs 1 plugin: mmhub-nose >=0\.3,<1 \(not installed") as caught:
        load(saved, name="thing")
    assert caught.value.exit_code == 4
    assert 'install: mmhub plugins install "mmhub-nose>=0.3,<1"' in str(caught.value)


def test_an_encoder_asks_for_its_own_plugin_alone(saved: Path) -> None:
    absent = {"distribution": "mmhub-nose", "specifier": ">=0.3", "components": []}
    change_config(saved, lambda table: table["requires"].append(absent))
    load_encoder(saved, "audio_encoder")
    change_config(saved, lambda table: [r.update(specifier=">=77") for r in table["requires"]])
    with pytest.raises(PluginError, match=r"#audio_encoder needs 1 plugin: mmhub-audio >=77"):
        load_encoder(saved, "audio_encoder")


# -- writing over what is there


def test_saving_again_keeps_what_the_user_put_there(model: Model, saved: Path) -> None:
    kept = {"README.md": "mine", "LICENSE": "MIT", "notes.txt": "n", ".gitattributes": "g", ".git/HEAD": "ref"}
    stale = {"provenance.json": "{}", "eval/classification.json": "{}", "model-old.safetensors": "x"}
    for name, text in {**kept, **stale, ".config.json.1.tmp": "half"}.items():
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text(text)
    os.symlink("nowhere", saved / "link")
    model.save(saved)
    assert {name: (saved / name).read_text() for name in kept} == kept
    assert os.readlink(saved / "link") == "nowhere"
    assert not [name for name in (*stale, ".config.json.1.tmp") if (saved / name).exists()]
    assert same(model, load(saved))


def test_other_folders_and_files_are_not_written_over(model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(UsageError, match=f"{name}' exists and is no mmhub checkpoint; name another folder"):
            model.save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert is_checkpoint(model.save(tmp_path / "empty"))
    assert is_checkpoint(model.save(tmp_path / "deep" / "er"))


def test_the_current_folder_is_not_swapped_away(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    with pytest.raises(UsageError, match="is the current folder"):
        model.save(".")
    monkeypatch.chdir(saved.parent)
    assert is_checkpoint(model.save("model"))


def test_a_linked_folder_is_replaced_where_it_is(model: Model, saved: Path) -> None:
    link = saved.parent / "link"
    link.symlink_to(saved)
    model.save(link)
    assert link.is_symlink()
    assert is_checkpoint(saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["link", "model"]


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


@pytest.mark.parametrize("where", ["safetensors", "config", "sync"])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_behind(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"safetensors": "mmhub.weights._write_aligned", "config": "mmhub.checkpoint.write_file"}
    monkeypatch.setattr(target.get(where, "mmhub.files.sync"), full)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(MmhubError, match=r"cannot write the checkpoint to '.*model': no space left on the device"):
        model.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert beside(saved) == ["model"]


def test_too_little_space_is_noticed_before_anything_is_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    with pytest.raises(MmhubError, match=r"no space left on the device \([\d,]+ bytes are needed and 1,234 are free\)"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_write_that_the_system_refuses_keeps_the_old_checkpoint(model: Model, saved: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            MmhubError, match=r"cannot write the checkpoint to '.*model': file too large; free some space"
        ):
            model.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert beside(saved) == ["model"]
    assert same(model, load(saved))


def test_a_folder_that_may_not_be_written_is_said(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(MmhubError, match="permission denied; choose a folder you may write to"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_with_or_without_the_systems_help(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (saved / "README.md").write_text("mine")
    model.save(saved)
    assert beside(saved) == ["model"]
    assert (saved / "README.md").read_text() == "mine"
    assert same(model, load(saved))


def test_a_swap_that_fails_half_way_is_undone(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = os.rename, []

    def broken(one: Any, other: Any) -> None:
        calls.append(one)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        rename(one, other)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="input/output error"):
        model.save(saved)
    assert beside(saved) == ["model"]
    assert same(model, load(saved))


def test_what_a_killed_process_left_is_swept_up_and_a_live_ones_is_not(model: Model, saved: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (saved.parent / f".model.{dead.pid}.tmp").mkdir()
    (saved.parent / f".model.{os.getppid()}.tmp").mkdir()
    (saved.parent / f".other.{dead.pid}.tmp").mkdir()
    model.save(saved)
    assert beside(saved) == [f".model.{os.getppid()}.tmp", f".other.{dead.pid}.tmp", "model"]


def test_a_kill_at_any_moment_leaves_an_old_or_a_new_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mmhub.files import new_folder\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    with new_folder(Path(sys.argv[1])) as folder:\n"
        "        [(folder / name).write_text(str(number)) for name in 'abc']\n"
        "    print(number, flush=True)\n"
    )
    target = tmp_path / "target"
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(3 + round_):
            last = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().split()  # `communicate` would lose what is buffered here
        process.communicate()
        last = int(rest[-1]) if rest else last
        (found,) = {(target / name).read_text() for name in "abc"}
        assert int(found) in (last, last + 1)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_file(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


# -- processors' files


class Written(Numbers):
    """A processor with a file."""

    def __init__(self, name: str = "tokenizer.json", content: bytes = b"{}") -> None:
        self.name, self.content = name, content

    def files(self) -> dict[str, bytes]:
        return {self.name: self.content}


def encoder_with(name: str, content: bytes = b"{}") -> Sensitive:
    return Sensitive(Sensitive.Config(), Written(name, content))


@pytest.mark.parametrize("name", ["../x.json", "vocab.txt", "config.json", "model.safetensors", "README.md", "code.py"])
def test_a_plugin_cannot_write_other_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match=r"mmhub-fake/sensitive 0\.1\.0 wants to save the file"):
        fake_model(encoder_with(name)).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_two_parts_with_a_file_of_the_same_name_keep_both(tmp_path: Path) -> None:
    model = fake_model(encoder_with("preprocessor_config.json", b"one"))
    for modality, content in (("second", b"two"), ("third", b"one")):
        model.encoders[modality] = encoder_with("preprocessor_config.json", content)
        model.sources[f"{modality}_encoder"] = model.sources["numbers_encoder"]
    config = read_config(save(model, tmp_path / "model"))
    places = {role: part.processor.files for role, part in config.components.items() if part.processor}
    assert places == {
        "numbers_encoder": {"preprocessor_config.json": "preprocessor_config.json"},
        "second_encoder": {"preprocessor_config.json": "preprocessor_config-second_encoder.json"},
        "third_encoder": {"preprocessor_config.json": "preprocessor_config.json"},
    }
    assert (tmp_path / "model" / "preprocessor_config-second_encoder.json").read_bytes() == b"two"


def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    kinds = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32, torch.complex64),
    ]
    path = tmp_path / "x.safetensors"
    tensors = {f"{i}": torch.randn(3, 4).to(kind) for i, kind in enumerate(kinds)}
    save_file(tensors | {"none": torch.zeros(0, 4), "one": torch.tensor(5.0)}, path)
    found, expected = dict(read_tensors(path)), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
    assert found["one"] == 5


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    header = (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    path = raw_safetensors(tmp_path / "x.safetensors", header, b"\x07" + struct.pack("<f", 1.5))
    found = dict(read_tensors(path))
    assert found["a"].item() == 7 and found["b"].item() == 1.5


def test_what_is_written_to_a_mapped_tensor_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5000)}, path)
    one, other = (dict(read_tensors(path))["a"] for _ in range(2))
    one.add_(1)
    assert one.sum() == 10_000 and other.sum() == 5000 and load_file(path)["a"].sum() == 5000
    assert one.untyped_storage().nbytes() == one.nbytes  # a copy of one tensor does not take the others along


def test_what_was_just_saved_is_neither_hashed_nor_searched(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path / "cache"))
    folder, broken = model.save(tmp_path / "model"), make_model()
    with torch.no_grad():
        next(broken.decoder.parameters()).fill_(torch.nan)
    broken.save(tmp_path / "broken")
    with pytest.raises(TrustError, match="NaN or infinity"):
        load(tmp_path / "broken")
    monkeypatch.setattr(hashes, "_read_hash", lambda *_: pytest.fail("hashed again"))
    monkeypatch.setattr(weights, "_is_finite", lambda _: pytest.fail("searched again"))
    assert same(load(folder), model)


class Halved(nn.Module):
    """Keeps half of what its files hold: a module with ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.inner = nn.LSTM(2, 2)
        self.register_buffer("count", torch.zeros(1))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state | {f"{prefix}weight": state[f"{prefix}weight"] / 2}, prefix, *rest)


@pytest.mark.parametrize("own", [True, False])
def test_modules_take_their_tensors_in_their_own_way(
    tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        monkeypatch.delattr(Halved, "_load_from_state_dict")
    weights._is_plain.cache_clear()
    source = {f"fusion.{name}": torch.rand_like(value) for name, value in Halved().state_dict().items()}
    save_file(source, tmp_path / "model.safetensors")
    with meta_parameters():
        part = Halved()
    part.weight.requires_grad_(False)
    stored = Stored(tmp_path, {"fusion": "model.safetensors"}, {}, {"model.safetensors"})
    fill({"fusion": part}, stored, allow_partial=False)
    weights._is_plain.cache_clear()
    assert torch.equal(part.weight, source["fusion.weight"] / (2 if own else 1))
    assert torch.equal(part.count, source["fusion.count"])  # type: ignore[arg-type]
    assert not part.weight.requires_grad and part.inner.weight_ih_l0.requires_grad
    assert part.inner._flat_weights[0] is part.inner.weight_ih_l0  # what the recurrent kernels really use
    assert part.inner(torch.ones(1, 1, 2))[0].isfinite().all()


# -- the meta device


class Table(nn.Module):
    """A module with a parameter and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.register_buffer("count", torch.tensor(5))


def test_parameters_are_on_meta_and_buffers_stay_real() -> None:
    with meta_parameters():
        inside = Table()
        with meta_parameters():
            Table()
        linear = nn.Linear(2, 2)
    assert inside.weight.is_meta
    assert linear.bias.is_meta
    assert not inside.weight.requires_grad
    assert inside.angles.tolist() == [0.0, 1.0, 2.0]  # type: ignore[operator,union-attr]
    assert inside.count == 5
    assert not Table().weight.is_meta


@pytest.mark.slow
def test_building_on_meta_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from torch import nn; from mmhub.weights import meta_parameters\n"
        "with meta_parameters():\n"
        "    weight = nn.Embedding(3, 3).weight; nn.init.normal_(weight, std=0.1); nn.init.xavier_normal_(weight)\n"
        "assert torch.randn(9).normal_().std() > 0\n"
        "sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_meta_device_is_left_after_an_error_and_never_entered_by_other_threads() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(Table().weight.is_meta))

    def break_inside() -> None:
        with meta_parameters():
            thread.start()
            thread.join()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        break_inside()
    assert found == [False]
    assert not Table().weight.is_meta
    assert nn.Linear(2, 2).weight.std() > 0
    assert not {"normal_", "uniform_", "zero_", "fill_"} & vars(Tensor).keys()  # inherited, as before


# -- weights in 8 bits


@pytest.fixture
def quantized(model: Model, tmp_path: Path) -> Path:
    """A checkpoint whose larger weights are codes of 8 bits."""
    return save(model, tmp_path / "int8", quantized_state(model.parts()), quantized="int8")


def a_scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(":scale"))


def test_codes_of_8_bits_come_back_as_weights_within_half_a_step(model: Model, quantized: Path) -> None:
    stored, found = load_file(quantized / "model.safetensors"), load(quantized)
    scales = {name.removesuffix(":scale"): stored[name] for name in stored if name.endswith(":scale")}
    assert len(scales) > 5
    assert all(stored[name].dtype == torch.int8 for name in scales)
    wanted, loaded = ({f"{r}.{k}": v for r, p in m.parts().items() for k, v in p.state_dict().items()}
                      for m in (model, found))  # fmt: skip
    assert wanted.keys() == loaded.keys()
    for name, weight in wanted.items():
        assert loaded[name].dtype == weight.dtype
        error = (loaded[name] - weight).abs()
        assert bool((error <= 0.5001 * scales[name]).all()) if name in scales else torch.equal(loaded[name], weight)
    assert {**found.state_dict()}.keys() == model.state_dict().keys()
    assert not torch.equal(outputs(found), outputs(model))
    torch.testing.assert_close(outputs(found), outputs(model), atol=0.05, rtol=0.05)


def test_a_model_of_8_bits_is_trained_and_saved_in_full_again(quantized: Path, tmp_path: Path) -> None:
    found = load(quantized)
    again = load(found.save(tmp_path / "again"))
    assert same(found, again)
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert read_config(tmp_path / "again").mmhub_format == 1  # older versions read it
    assert quantized_state(again.parts()).keys() == load_file(quantized / "model.safetensors").keys()


def test_one_part_of_8_bits_is_read_alone(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", 1000)
    folder = save(model, tmp_path / "int8", quantized_state(model.parts()), quantized="int8")
    (folder / "model-image_encoder.safetensors").unlink()
    found, _ = load_encoder(folder, "text")
    wanted = model.encoders["text"].state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=0.01, rtol=0)


def test_an_mmhub_that_knows_no_codes_says_to_upgrade(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(PluginError, match="has format 2, this mmhub reads up to 1; upgrade mmhub"):
        load(quantized)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(a_scale(t)), "has type int8, not float32"),
        (lambda t: t.pop(a_scale(t).removesuffix(":scale")), ":scale has no codes"),
        (lambda t: t[a_scale(t)].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t[a_scale(t)].fill_(float("inf")), "too large"),
        (lambda t: t[a_scale(t)].fill_(1e38), "too large"),
        (lambda t: t[a_scale(t)].neg_(), "negative"),
        (lambda t: t.update({a_scale(t): torch.ones(3, 3)}), "which does not fit codes of shape"),
        (lambda t: t.update({a_scale(t): t[a_scale(t)].int()}), "scale has type int32"),
        (lambda t: t.update({a_scale(t)[:-6]: t[a_scale(t)[:-6]].short()}), "codes of type int16, not int8"),
        (lambda t: t.update({"decoder.odd:scale": torch.ones(3)}), "decoder.odd:scale has no codes"),
        (lambda t: t.update({a_scale(t) + ":scale": torch.ones(1, 1)}), ":scale:scale has no codes"),
        (lambda t: t.update({a_scale(t): t[a_scale(t)].double()}), "scale has type float64"),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_refused(quantized: Path, change: Any, problem: str) -> None:
    change_weights(quantized, change)
    with pytest.raises(TrustError, match=problem):
        load(quantized)


def test_codes_of_what_no_model_has_are_never_widened() -> None:
    def codes() -> dict[str, Tensor]:
        return {name: torch.ones(4, 4, dtype=torch.int8) for name in ("a.fits", "a.junk", "a.wide")}

    found = codes() | {name + ":scale": torch.ones(4, 1) for name in codes()}
    assert weights._restore(found, {"a.fits": torch.ones(4, 4), "a.wide": torch.ones(4, 5)}) == []
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert kinds == {"a.fits": torch.float32, "a.junk": torch.int8, "a.wide": torch.int8}


@pytest.mark.parametrize("size", [65504.0, 1e-7])
def test_the_largest_and_the_smallest_rows_of_16_bits_survive_8(size: float) -> None:
    layer = nn.Linear(64, 32).half()
    with torch.no_grad():
        layer.weight.copy_(size * torch.linspace(-1, 1, 64))
    found = quantized_state({"decoder": layer})
    assert found["decoder.weight:scale"].dtype == torch.float32
    assert weights._restore(found, {"decoder.weight": layer.weight}) == []
    assert found["decoder.weight"].dtype == torch.float16
    error = (found["decoder.weight"].double() - layer.weight.double()).abs().max()
    assert error <= size / 250 + 6e-8  # half a step, and the step of the smallest fp16 numbers
    found = quantized_state({"decoder": layer})
    found["decoder.weight:scale"] *= 66000 / size
    (problem,) = weights._restore(found, {"decoder.weight": layer.weight})
    assert problem == "decoder.weight:scale holds a number that is too large"


def test_codes_are_read_only_where_config_json_says_so(quantized: Path) -> None:
    change_config(quantized, lambda table: table.update(mmhub_format=1))
    with pytest.raises(TrustError, match="quantised as 'int8'; format 2 knows 'int8' alone"):
        load(quantized)
    change_config(quantized, lambda table: table.update(mmhub_format=2, quantized="int3"))
    with pytest.raises(TrustError, match="quantised as 'int3'"):
        load(quantized)
    change_config(quantized, lambda table: table.pop("quantized"))
    with pytest.raises(TrustError, match="weight:scale is unexpected"):
        load(quantized)


def test_a_scale_belongs_to_an_output_and_small_or_thin_tensors_stay() -> None:
    layers = nn.ModuleDict(
        {
            "linear": nn.Linear(64, 32),
            "convolution": nn.Conv2d(16, 32, 3),
            "words": nn.Embedding(64, 32),
            "small": nn.Linear(8, 8),
            "thin": nn.Linear(16, 1024),
            "norm": nn.LayerNorm(2048),
        }
    )
    found = quantized_state({"decoder": layers})
    scales = {name: tuple(found[name].shape) for name in found if name.endswith(":scale")}
    assert scales == {
        "decoder.linear.weight:scale": (32, 1),
        "decoder.convolution.weight:scale": (32, 1, 1, 1),
        "decoder.words.weight:scale": (64, 1),
    }
    with torch.no_grad():
        layers["linear"].weight[0] = float("inf")  # type: ignore[union-attr, index]
    with pytest.raises(TrustError, match=r"decoder\.linear\.weight is infinite or not a number"):
        quantized_state({"decoder": layers})


def test_a_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(64, 32)
    nn.init.zeros_(layer.weight)
    found = quantized_state({"decoder": layer})
    assert not found["decoder.weight"].any()
    assert torch.isfinite(found["decoder.weight:scale"]).all()
