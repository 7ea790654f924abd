"""Low-rank adapters: trained alone, saved apart from their base, read by PEFT, published, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi, constants

from mmhub.adapters import adapter_of, apply_lora, merge
from mmhub.build import compose
from mmhub.checkpoint import ComponentRecord
from mmhub.cli.models import models
from mmhub.config import LoraRecipe, check_recipe, dump_recipe
from mmhub.engine import train
from mmhub.errors import NetworkError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.files import sha256
from mmhub.hub import load, pull, push
from mmhub.hub.describe import describe
from mmhub.hub.foreign import join, write_layout
from mmhub.interfaces import ForeignParts, Policy
from mmhub.model import Model
from mmhub.names import resolve
from mmhub.weights import read_tensors, write_tensors
from tests.conftest import Cli

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
HEAD = {"use": "classification", "config": {"labels": ["no", "yes"]}}
TEXTS = ["a good thing", "a bad one"]
ROWS = [{"text": text} for text in TEXTS]


def made(text: dict[str, Any], **others: Any) -> Model:
    return compose(encoders={"text": {"use": "transformers"} | text, **others}, decoder=HEAD, texts=TEXTS).eval()


def moved(model: Model) -> Model:
    """As if trained: fresh adapters change nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    encoder: Any = made({"config": BERT}).encoders["text"]
    plain = join(ForeignParts(encoder=encoder, encoder_id="mmhub-text/transformers"), "base")
    return write_layout(plain, tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture
def adapted(base: Path) -> Model:
    return moved(made({"init": str(base), "lora": {"rank": 4}}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- in a model -------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_no_answer_and_alone_is_trained_of_its_part(base: Path) -> None:
    torch.manual_seed(0)
    plain, model = made({"init": str(base)}), made({"init": str(base), "lora": {"rank": 4}})
    assert torch.equal(embedded(model), embedded(plain))
    trained = {name for name, p in model.encoders["text"].named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.encoders["text"].named_parameters() if "lora_" in name}
    assert len(trained) == 8 and "text" not in model.frozen
    assert all(p.requires_grad for p in model.decoder.parameters())


def embedded(model: Model) -> torch.Tensor:
    processor: Any = model.encoders["text"].processor
    items = processor(TEXTS, Policy())
    with torch.no_grad():
        found: torch.Tensor = model.encoders["text"](items.data, items.mask).tokens
    return found


@pytest.mark.parametrize(
    ("kind", "settings", "targets"),
    [
        ("distilbert", {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 1}, ["q_lin", "v_lin"]),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}, ["c_attn"]),
        ("roberta", BERT | {"model_type": "roberta"}, ["query", "value"]),
    ],
)
def test_each_type_of_model_has_usual_targets(kind: str, settings: dict[str, Any], targets: list[str]) -> None:
    model = made({"config": {**settings, "model_type": kind}, "lora": {}})
    record = adapter_of(model.encoders["text"])
    assert record is not None and record.targets == targets
    before = embedded(moved(model))
    assert torch.allclose(embedded(merge(model)), before, atol=1e-5)


def test_the_layers_of_our_own_parts_are_named_in_targets() -> None:
    own = {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2}}
    model = made(own | {"lora": {"targets": ["qkv", "attention.out"]}})
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    with pytest.raises(UsageError, match=r"which layers of the text_encoder.*qkv"):
        made(own | {"lora": {}})
    with pytest.raises(UsageError, match=r"no linear layer 'qvk' for an adapter; did you mean 'qkv'"):
        made(own | {"lora": {"targets": ["qvk"]}})


def test_what_makes_no_sense_is_refused(adapted: Model) -> None:
    with pytest.raises(UsageError, match="has a low-rank adapter already"):
        apply_lora(adapted, "text_encoder", LoraRecipe())
    with pytest.raises(UsageError, match="rank >= 1"):
        made({"config": BERT, "lora": {"rank": 0}})
    with pytest.raises(UsageError, match="no low-rank adapter to merge"):
        merge(made({"config": BERT}))


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr("mmhub.adapters.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'mmhub\[lora\]'"):
        made({"init": str(base), "lora": {}})


# -- in a folder ------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_saved_and_a_load_answers_as_before(adapted: Model, tmp_path: Path) -> None:
    want = adapted.predict(ROWS)
    adapted.save(tmp_path / "one")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").stat().st_size < 1000  # the head
    model = load(tmp_path / "one")
    assert model.predict(ROWS) == want
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in adapted.named_parameters() if p.requires_grad
    }
    model.save(tmp_path / "two")
    for name in names(tmp_path / "one") - {"provenance.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers renamed
def test_peft_reads_the_adapter_onto_the_plain_base(adapted: Model, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    adapted.save(tmp_path / "model")
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "model").eval()
    processor: Any = adapted.encoders["text"].processor
    items = processor(TEXTS, Policy())
    with torch.no_grad():
        states = theirs(input_ids=items.data, attention_mask=items.mask.long()).last_hidden_state
    wanted = embedded(adapted)
    assert torch.allclose(states * items.mask.unsqueeze(-1), wanted, atol=1e-6)
    assert not torch.allclose(wanted, embedded(made({"init": str(base)})), atol=1e-2)


def test_a_language_model_with_tied_embeddings(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    start: Any = compose("language-modelling", decoder={"use": "transformers-lm", "config": config}, texts=TEXTS)
    start.decoder.model.save_pretrained(tmp_path / "base")
    for name, content in start.decoder.processor.files().items():
        (tmp_path / "base" / name).write_bytes(content)
    part = {"use": "transformers-lm", "init": str(tmp_path / "base"), "lora": {"rank": 2}}
    model: Any = moved(compose("language-modelling", decoder=part).eval())
    model.save(tmp_path / "model")
    assert "model.safetensors" not in names(tmp_path / "model")
    again: Any = load(tmp_path / "model")
    assert again.decoder.model.lm_head.weight is again.decoder.model.transformer.wte.weight
    ids = torch.tensor([[2, 5, 6, 7]])
    with torch.no_grad():
        want, found = (one.decoder.model(input_ids=ids).logits for one in (model, again))
        assert torch.equal(found, want)
        assert torch.allclose(merge(again).decoder.model(input_ids=ids).logits, want, atol=1e-5)  # type: ignore[operator]
    assert not torch.allclose(want, start.decoder.model(input_ids=ids).logits, atol=1e-3)


def test_an_adapter_for_a_part_of_a_checkpoint_of_ours(tmp_path: Path) -> None:
    made({"config": BERT}).save(tmp_path / "ours")
    model = moved(made({"use": "", "init": f"{tmp_path / 'ours'}#text", "lora": {"rank": 2}}))
    want = model.predict(ROWS)
    model.save(tmp_path / "adapter")
    record = adapter_of(load(tmp_path / "adapter").encoders["text"])
    assert record is not None and record.base is not None and record.base.component == "text"
    assert load(tmp_path / "adapter").predict(ROWS) == want
    alone = load(f"{tmp_path / 'adapter'}#text")
    assert torch.equal(embedded(alone), embedded(model))


def test_a_base_that_changed_or_is_gone_is_named(adapted: Model, base: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(base, tmp_path / "mine")
    model = made({"init": str(mine), "lora": {"rank": 4}})
    model.save(tmp_path / "model")
    weights = mine / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TrustError, match=r"adapter for '.*mine', whose weights have changed"):
        load(tmp_path / "model")
    shutil.rmtree(mine)
    with pytest.raises(NotFoundError, match=r"adapter for '.*mine', which is not there"):
        load(tmp_path / "model")


def test_a_damaged_adapter_is_refused(adapted: Model, tmp_path: Path) -> None:
    adapted.save(tmp_path / "model")
    path = tmp_path / "model" / "adapter_model.safetensors"
    tensors = dict(read_tensors(path))

    def rewrite(changed: dict[str, torch.Tensor]) -> None:
        write_tensors(changed, path)
        table = json.loads((tmp_path / "model" / "config.json").read_text())
        table["files"][path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        (tmp_path / "model" / "config.json").write_text(json.dumps(table))

    first = min(tensors)
    rewrite({name: tensor.clone() for name, tensor in tensors.items() if name != first})
    with pytest.raises(TrustError, match="lacks tensor 'base_model"):
        load(tmp_path / "model")
    rewrite({name: tensor[:1].clone() for name, tensor in tensors.items()})
    with pytest.raises(TrustError, match=r"has shape \[1, "):
        load(tmp_path / "model")
    rewrite({name: tensor * float("nan") for name, tensor in tensors.items()})
    with pytest.raises(TrustError, match="NaN or infinity"):
        load(tmp_path / "model")


def test_without_a_base_everything_is_saved(tmp_path: Path) -> None:
    model = moved(made({"config": BERT, "lora": {"rank": 4, "targets": ["dense"]}}))
    want = model.predict(ROWS)
    model.save(tmp_path / "model")
    assert "adapter_model.safetensors" not in names(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.predict(ROWS) == want
    assert adapter_of(again.encoders["text"]) == adapter_of(model.encoders["text"])
    assert not any(p.requires_grad for name, p in again.encoders["text"].named_parameters() if "lora_" not in name)


def test_several_parts_have_a_file_each(base: Path, tmp_path: Path) -> None:
    audio = {"use": "wav2vec2", "config": {"config": TINY_AUDIO}}
    start = compose(encoders={"audio": audio}, decoder=HEAD)
    start.save(tmp_path / "audio")
    part = {"init": str(tmp_path / "audio"), "lora": {"rank": 2}}
    model = moved(made({"init": str(base), "lora": {"rank": 4}}, audio=part))
    want = model.predict(ROWS)
    model.save(tmp_path / "model")
    assert {"adapter_model-text_encoder.safetensors", "adapter_config-audio_encoder.json"} <= names(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.predict(ROWS) == want
    parts = describe(resolve(str(tmp_path / "model"))).components
    for role in ("text_encoder", "audio_encoder"):
        size = (tmp_path / "model" / f"adapter_model-{role}.safetensors").stat().st_size
        assert parts[role]["bytes"] == size
    record = adapter_of(again.encoders["audio"])
    assert record is not None and record.targets == ["q_proj", "v_proj"] and record.rank == 2


TINY_AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": [8, 8],
    "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@pytest.mark.slow  # only timm has a part with both, and it takes seconds to import
def test_buffers_that_training_changes_are_saved_beside_the_adapter(tmp_path: Path) -> None:
    image = {"use": "timm", "config": {"architecture": "test_maxvit", "image_size": 32}}
    compose(encoders={"image": image}, decoder=HEAD).save(tmp_path / "base")
    part = {"init": str(tmp_path / "base"), "lora": {"targets": ["qkv"]}}
    model = compose(encoders={"image": part}, decoder=HEAD)
    name, mean = next(one for one in model.encoders["image"].named_buffers() if one[0].endswith("running_mean"))
    mean += 1
    model.save(tmp_path / "model")
    assert torch.equal(dict(load(tmp_path / "model").encoders["image"].named_buffers())[name], mean)


# -- merged -----------------------------------------------------------------------------------------------------


def test_merged_weights_answer_the_same_and_are_an_ordinary_checkpoint(adapted: Model, tmp_path: Path) -> None:
    want = embedded(adapted)
    adapted.save(tmp_path / "model")
    done = CliRunner().invoke(models, ["merge", str(tmp_path / "model"), str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in json.loads(done.stdout)["files"]
    assert not {name for name in names(tmp_path / "merged") if name.startswith("adapter_")}
    again = CliRunner().invoke(models, ["merge", str(tmp_path / "model"), str(tmp_path / "merged")])
    assert isinstance(again.exception, UsageError) and again.exception.message.endswith("merged' exists")
    merged = load(tmp_path / "merged")
    assert adapter_of(merged.encoders["text"]) is None
    (parent,) = json.loads((tmp_path / "merged" / "provenance.json").read_text())["parents"]
    assert (parent["part"], parent["name"]) == ("text_encoder", "bert")
    assert torch.allclose(embedded(merged), want, atol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())


# -- in training ------------------------------------------------------------------------------------------------


def recipe(base: Path, folder: Path) -> dict[str, Any]:
    rows = [f"a {'good' if i % 2 else 'bad'} thing {i},{'yes' if i % 2 else 'no'}" for i in range(16)]
    (folder / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    text = {"use": "transformers", "init": str(base), "lora": {"rank": 2, "dropout": 0.1}}
    return {
        "task": "classification",
        "model": {"encoders": {"text": text}},
        "data": {"train": str(folder / "train.csv"), "valid_fraction": 0.25, "inputs": {"text": "text"},
                 "target": "label"},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "keep": 9},
    }  # fmt: skip


def test_a_run_trains_the_adapter_and_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    plan = recipe(base, tmp_path)
    whole = train(plan, tmp_path / "whole").model
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    steps = sorted((tmp_path / "part" / "checkpoints").glob("step-*"))
    for step in steps[1:]:
        shutil.rmtree(step)
    shutil.rmtree(tmp_path / "part" / "model")
    again = train(plan, tmp_path / "part", resume=True).model
    for name in ("adapter_model.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    model = load(whole)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    start = dict(made({"init": str(base)}).encoders["text"].named_parameters())
    for name, parameter in model.encoders["text"].named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, start[name.replace(".base_layer", "")]), name


@pytest.mark.slow  # five fresh processes
@pytest.mark.timeout(1800)
def test_the_command_line_trains_publishes_and_merges(base: Path, tmp_path: Path, cli: Cli, hub: str) -> None:
    api = HfApi(endpoint=hub, token=False)
    api.create_repo("org/base")
    api.upload_folder(repo_id="org/base", folder_path=base)
    plan = recipe(base, tmp_path)
    plan["model"]["encoders"]["text"]["init"] = "hub:org/base"
    (tmp_path / "recipe.toml").write_text(dump_recipe(check_recipe(plan)))
    steps = [
        ["train", "recipe.toml", "--out", "run"],
        ["push", "./run/model", "org/tuned", "--license", "mit"],
        ["models", "merge", "org/tuned", "merged"],
        ["predict", "org/tuned", "--text", "a good thing", "--json"],
        ["predict", "./merged", "--text", "a good thing", "--json"],
    ]
    done = [cli(*step) for step in steps]
    assert [one.returncode for one in done] == [0] * 5, [one.stderr for one in done]
    first, second = (json.loads(one.stdout)["predictions"][0] for one in done[-2:])
    assert first["label"] == second["label"] and first["score"] == pytest.approx(second["score"], abs=1e-5)


# -- on a Hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def published(hub: str, client: None, base: Path, tmp_path: Path) -> tuple[str, Model]:
    """The commit of a base on the Hub, and a model with an adapter for it."""
    api = HfApi(endpoint=hub, token=False)
    api.create_repo("org/base")
    commit = api.upload_folder(repo_id="org/base", folder_path=base).oid
    return commit, moved(made({"init": "hub:org/base", "lora": {"rank": 4}}))


def test_an_adapter_for_a_base_on_this_machine_is_not_published(hub: str, client: None, adapted: Model) -> None:
    with pytest.raises(UsageError, match=r"is on this machine alone; merge it"):
        push(adapted, "org/mine", license="mit")


def test_a_published_adapter_brings_its_base(
    published: tuple[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, model = published
    want = model.predict(ROWS)
    sent = push(model, "org/tuned", license="mit")
    assert "adapter_model.safetensors" in sent.files and sent.files["model.safetensors"] < 1000
    config = json.loads((model.save(tmp_path / "copy") / "config.json").read_text())
    assert config["components"]["text_encoder"]["adapter"]["base"] == {"name": "org/base", "commit": commit}
    peft_config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert (peft_config["base_model_name_or_path"], peft_config["revision"]) == ("org/base", commit)

    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere))
    monkeypatch.setenv("HF_HUB_CACHE", str(elsewhere))
    about = describe(resolve("hub:org/tuned"))
    (found,) = about.bases
    assert (found["name"], found["commit"], found["cached"]) == ("org/base", commit, False)
    assert found["bytes"] > 10_000
    assert about.card["base_model"] == ["org/base"]
    shown = CliRunner().invoke(models, ["show", "hub:org/tuned"]).stdout
    assert f"base: org/base @ {commit[:12]} (" in shown and "fetched with it" in shown and "base of the text" in shown
    assert load("hub:org/tuned").predict(ROWS) == want
    assert describe(resolve("hub:org/tuned")).bases[0]["cached"]
    card = (pull("hub:org/tuned") / "README.md").read_text()
    assert "base_model_relation: adapter" in card and '"mmhub[lora]"' in card

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("hub:org/tuned").predict(ROWS) == want
    shutil.rmtree(next(elsewhere.rglob("models--org--base/snapshots")).parent)
    with pytest.raises(NetworkError, match=rf"text_encoder is an adapter for 'org/base' at {commit[:12]}"):
        load("hub:org/tuned")


def test_a_published_adapter_for_somebody_elses_folder_is_refused(
    published: tuple[str, Model], hub: str, tmp_path: Path
) -> None:
    _, model = published
    folder = model.save(tmp_path / "forged")
    table = json.loads((folder / "config.json").read_text())
    table["components"]["text_encoder"]["adapter"]["base"] = {"name": "/home/somebody/bert", "sha256": "0" * 64}
    (folder / "config.json").write_text(json.dumps(table))
    api = HfApi(endpoint=hub, token=False)
    api.create_repo("org/forged")
    api.upload_folder(repo_id="org/forged", folder_path=folder)
    with pytest.raises(TrustError, match="adapter for weights on another machine"):
        load("hub:org/forged")


def test_a_library_layout_has_the_adapter_merged(published: tuple[str, Model], tmp_path: Path) -> None:
    model = load("hub:org/base")
    apply_lora(model, "text_encoder", LoraRecipe(rank=2), "hub:org/base")
    want = embedded(moved(model))
    push(model, "org/plain", license="mit", layout="transformers")
    assert torch.allclose(embedded(load("hub:org/plain")), want, atol=1e-5)


def test_records_of_parts_without_an_adapter_are_as_before(tmp_path: Path) -> None:
    assert "adapter" not in msgspec.to_builtins(ComponentRecord("a/b"))
