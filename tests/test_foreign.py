"""Models of other libraries: who is asked to read them, what is refused, and what the command line makes of them."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants

import mmhub
from mmhub.checkpoint import read_config
from mmhub.errors import ExitCode, MmhubError, PluginError, TrustError, UsageError
from mmhub.hub.client import cache_dir
from mmhub.hub.foreign import find_reader, join, load_foreign, recognise, write_layout
from mmhub.interfaces import ForeignParts, Generation, Policy
from mmhub.plugins import get_index
from tests.fake_parts import fake_model
from tests.fake_plugins import Site, make_site, run
from tests.interop_clients import tiny_config, tiny_tokenizer
from tests.tiny_models import upload

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

# A plugin that reads folders of a made-up library: its config.json has a `rows` key.
PLUGIN = """
api = 1
hooks = ["mmhub_load_foreign", "mmhub_write_foreign"]
[[components]]
kind = "numbers_encoder"
name = "sensitive"
factory = "{package}.parts:Sensitive"
[[components]]
kind = "decoder"
name = "scores"
factory = "{package}.parts:Scores"
"""
PARTS = """
from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import ForeignParts, ForeignReader, ForeignWriter
from mmhub.spec import hookimpl
from tests.fake_parts import Numbers, Scores, Sensitive

def read(folder):
    if (folder / "broken").exists():
        raise ZeroDivisionError("by zero\\nand more")
    if (folder / "damaged").exists():
        raise TrustError("rows are missing")
    encoder = Sensitive(Sensitive.Config(dim=3), Numbers())
    parts = ForeignParts(encoder=encoder, encoder_id="mmhub-fake/sensitive", left_out="RowsForCounting")
    if not (folder / "head").exists():
        return parts
    decoder = Scores(Scores.Config(), {"numbers": encoder.stream})
    return ForeignParts(encoder=encoder, encoder_id="mmhub-fake/sensitive", decoder=decoder,
                        decoder_id="mmhub-fake/scores", task="regression")

@hookimpl
def mmhub_load_foreign(folder, config):
    if "rows" in config:
        refusal = UsageError("it has too many rows", "take fewer") if config["rows"] > 9 else None
        yield ForeignReader(library="rows", read=read, refusal=refusal)

@hookimpl
def mmhub_write_foreign(encoder, decoder, layout):
    if layout != "rows":
        return []
    def write(folder):
        if decoder is not None:
            raise UsageError("rows have no room for a head")
        (folder / "config.json").write_text("{}")
    return [ForeignWriter(layout="rows", write=write)]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = make_site(tmp_path, monkeypatch)
    site.install("mmhub-fake", PLUGIN, parts=PARTS)
    return site


def rows(site: Site, *files: str, **config: Any) -> str:
    folder = site.work / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"rows": 2} | config))
    for name in files:
        (folder / name).touch()
    return "./model"


def test_a_plugin_reads_the_folder_and_the_parts_become_an_ordinary_model(site: Site) -> None:
    model = mmhub.load(rows(site, "head"))
    assert {role: source.id for role, source in model.sources.items()} == {
        "numbers_encoder": "mmhub-fake/sensitive",
        "fusion": "mmhub/streams",
        "decoder": "mmhub-fake/scores",
    }
    assert (model.task.name, model.name, model.training) == ("regression", "./model", False)
    samples = [{"numbers": "1 2"}, {"numbers": "3"}]
    model.save("saved")
    assert [part["distribution"] for part in read_config(Path("saved")).requires] == ["mmhub", "mmhub-fake"]
    assert mmhub.load("./saved").predict(samples) == model.predict(samples)


def test_a_model_without_a_head_embeds_and_says_how_to_get_one(site: Site) -> None:
    model = mmhub.load(rows(site))
    vectors = model.embed({"numbers": "1 2 3"})
    assert isinstance(vectors, torch.Tensor) and vectors.shape == (1, 3)
    message = (
        "this model has no task head, for mmhub cannot run its RowsForCounting: it only embeds; "
        "train a head by a recipe: [model.encoders.numbers] init = its name"
    )
    model.save("saved")
    for one in (model, mmhub.load("./saved")):
        with pytest.raises(UsageError, match=re.escape(message)):
            one.predict({"numbers": "1"})
        with pytest.raises(UsageError, match="no task head"):
            one.decoder.encode_targets([1])
    with pytest.raises(UsageError, match="'embedding' has nothing to train"):
        type(model.decoder).fit(None, [1])


def test_a_reader_says_in_one_line_what_it_will_not_or_cannot_read(site: Site) -> None:
    with pytest.raises(UsageError, match=r"'./model' cannot be loaded: it has too many rows; take fewer"):
        mmhub.load(rows(site, rows=10))
    with pytest.raises(TrustError, match="rows are missing"):
        mmhub.load(rows(site, "damaged"))
    with pytest.raises(PluginError) as caught:
        mmhub.load(rows(site, "broken"))
    assert caught.value.message == "'./model' cannot be read as a rows model: ZeroDivisionError: by zero and more"


def test_a_model_that_two_plugins_read_is_an_error_that_says_how_to_choose(site: Site) -> None:
    site.install("mmhub-fake2", PLUGIN, parts=PARTS)
    get_index(rescan=True)
    with pytest.raises(PluginError, match=r"read by more than one plugin \(rows and rows\).*MMHUB_DISABLE_PLUGINS"):
        mmhub.load(rows(site))


def test_what_no_plugin_reads_is_refused_as_before(site: Site) -> None:
    (site.work / "other").mkdir()
    (site.work / "other" / "config.json").write_text('{"width": 5}')
    with pytest.raises(TrustError, match="is not an mmhub checkpoint"):
        mmhub.load("./other")
    (site.work / "other" / "config.json").write_text('{"width"')
    with pytest.raises(TrustError, match="is not valid JSON"):
        mmhub.load("./other")


def test_a_layout_is_written_by_a_plugin_or_refused(site: Site, tmp_path: Path) -> None:
    model = mmhub.load(rows(site))
    assert (write_layout(model, tmp_path / "out", "rows") / "config.json").read_text() == "{}"
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_layout(model, tmp_path / "out", "rows")
    with pytest.raises(UsageError, match="the columns layout cannot hold a mmhub-fake/sensitive encoder"):
        write_layout(model, tmp_path / "new", "columns")
    with pytest.raises(UsageError, match="no room for a head"):
        write_layout(mmhub.load(rows(site, "head")), tmp_path / "new", "rows")
    assert not (tmp_path / "new").exists()
    two = fake_model()
    two.encoders["more"] = two.encoders["numbers"]
    with pytest.raises(UsageError, match="holds one encoder, and this model has numbers, more"):
        write_layout(two, tmp_path / "new", "rows")


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"model_type": "bert"}, [], ("transformers", "text_encoder", "transformers")),
        ({"model_type": "bert"}, ["modules.json"], ("sentence-transformers", "text_encoder", "transformers")),
        ({"model_type": "wavlm"}, [], ("transformers", "audio_encoder", "wavlm")),
        ({"architecture": "resnet18"}, [], ("timm", "image_encoder", "timm")),
        ({"width": 5}, [], ("", "", "")),
    ],
)
def test_a_library_is_known_by_its_config(config: dict[str, Any], files: list[str], expected: Any) -> None:
    assert recognise(config, files) == expected


# --- real libraries, through a Hub and the command line

REPO = "team/foreign"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A folder that transformers saved."""
    from transformers import BertForSequenceClassification

    labels = {0: "bad", 1: "good"}
    BertForSequenceClassification(tiny_config(num_labels=2, id2label=labels)).save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def content(folder: Path, **config: Any) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | config).encode()}


@pytest.mark.usefixtures("client")
def test_the_command_line_predicts_measures_and_shows_a_foreign_repository(
    hub: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(hub, REPO, content(classifier) | {"modeling_evil.py": b"1 / 0", "pytorch_model.bin": b"x"})
    code, out, err = run(capsys, "predict", REPO, "--text", "the cat", "--text", "a mat", "--json")
    assert code == 0, err
    answers = json.loads(out)["predictions"]
    assert [set(answer["scores"]) for answer in answers] == [{"bad", "good"}] * 2
    table = tmp_path / "rows.csv"
    table.write_text(
        "sentence,label\n"
        + "".join(f"{text},{one['label']}\n" for text, one in zip(["the cat", "a mat"], answers, strict=True))
    )
    code, out, err = run(
        capsys, "eval", REPO, "--data", str(table), "--inputs", "text=sentence", "--target-column", "label", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["metrics"]["accuracy"] == 1.0
    code, out, err = run(capsys, "models", "show", REPO, "--json")
    assert json.loads(out)["loadable"].startswith("yes, and as the start of a text encoder")
    fetched = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not {"modeling_evil.py", "pytorch_model.bin"} & fetched
    code, out, err = run(capsys, "pull", REPO)
    assert (code, out.strip()) == (0, str(next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*"))))


@pytest.mark.usefixtures("client")
def test_a_missing_plugin_is_named_before_any_weights_are_fetched(
    hub: str, classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, REPO, content(classifier))
    index = get_index()
    others = tuple(plugin for plugin in index.plugins if plugin.distribution != "mmhub-text")
    monkeypatch.setattr("mmhub.plugins._index", type(index)(others))
    monkeypatch.setattr("mmhub.plugins.has_changed", lambda: False)  # or it is looked for again, and found
    code, out, err = run(capsys, "predict", REPO, "--text", "a")
    assert (code, out) == (ExitCode.PLUGIN, "")
    assert f"'{REPO}' is a transformers model" in err and 'plugins install "mmhub-text>=0.1,<1"' in err
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "whole", "needed"),
    [("whisper", "WhisperForConditionalGeneration", "mmhub-text"), ("wav2vec2", "Wav2Vec2ForCTC", "mmhub-heads")],
)
def test_a_plugin_that_only_a_part_of_a_model_needs_is_named_before_its_weights_are_there(
    kind: str, whole: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mmhub_audio")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [whole]}))
    index = get_index()
    others = tuple(plugin for plugin in index.plugins if plugin.distribution != needed)
    monkeypatch.setattr("mmhub.plugins._index", type(index)(others))
    monkeypatch.setattr("mmhub.plugins.has_changed", lambda: False)
    with pytest.raises(PluginError, match="'speech' is a transformers model: ") as caught:
        find_reader("speech", tmp_path)
    assert needed in str(caught.value)
    (tmp_path / "model.safetensors").touch()  # all is there, without a vocabulary: it is read as an encoder
    assert not find_reader("speech", tmp_path).components


@pytest.mark.parametrize(
    ("config", "dropped", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "", "brings code of its own (auto_map in config.json)"),
        ({}, "model.safetensors", "has no safetensors weights; mmhub does not read pickle files"),
        ({"architectures": ["BertLMHeadModel"]}, "", "a 'bert' is a language model only with is_decoder = true"),
        ({"model_type": ["bert"]}, "", "model of type ['bert'], which the installed mmhub-text does not read"),
        ({"model_type": "no-such-model"}, "", "model of type 'no-such-model', which the installed mmhub-text does not"),
    ],
)
@pytest.mark.usefixtures("client")
def test_a_repository_that_is_refused_costs_one_line(
    hub: str, classifier: Path, config: dict[str, Any], dropped: str, message: str
) -> None:
    files = content(classifier, **config) | {"pytorch_model.bin": b"x"}
    files.pop(dropped, None)
    upload(hub, REPO, files)
    with pytest.raises(MmhubError) as caught:
        mmhub.load(REPO)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.fixture
def writers(tmp_path: Path) -> Path:
    """A folder with a language model and one with a translator, as transformers saved them."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    language = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **ids)
    GPT2LMHeadModel(language).save_pretrained(tmp_path / "language")
    translator = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **ids)
    T5ForConditionalGeneration(translator).save_pretrained(tmp_path / "translator")
    for name in ("language", "translator"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "task", "roles"),
    [
        ("language", "language-modelling", ["fusion", "decoder"]),
        ("translator", "translation", ["text_encoder", "fusion", "decoder"]),
    ],
)
def test_a_model_that_writes_text_loads_writes_is_saved_and_written_back(
    writers: Path, name: str, task: str, roles: list[str], tmp_path: Path
) -> None:
    model = mmhub.load(str(writers / name))
    assert (model.task.name, model.modalities, list(model.sources)) == (task, ("text",), roles)
    samples = [{"text": "the cat sat"}, {"text": "a"}]
    answers = model.predict(samples)
    assert all(isinstance(answer["text"], str) for answer in answers)
    model.save(tmp_path / "saved")
    assert mmhub.load(str(tmp_path / "saved")).predict(samples) == answers
    again = mmhub.load(str(write_layout(model, tmp_path / "back")))
    assert again.predict(samples) == answers


@pytest.mark.parametrize("name", ["language", "translator"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_writes_the_tokens_that_transformers_writes(writers: Path, name: str, beams: int) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: Any = AutoModelForCausalLM if name == "language" else AutoModelForSeq2SeqLM
    theirs, model = kind.from_pretrained(writers / name).eval(), mmhub.load(str(writers / name))
    texts = ["the cat sat", "a", "on the mat the cat sat"]
    answers = model.generate([{"text": text} for text in texts], Generation(max_new_tokens=8, beams=beams))
    for text, answer in zip(texts, answers, strict=True):
        ids = model.processors["text"]([text], Policy()).data
        written = theirs.generate(ids, max_new_tokens=8, num_beams=beams, do_sample=False)[0]
        written = written[ids.shape[1] :] if name == "language" else written[1:]
        assert answer["text"] == model.decoder.processor.decode(written.tolist())  # type: ignore[union-attr, operator]


def test_a_language_model_of_ours_has_no_other_layout(tmp_path: Path) -> None:
    config = {"use": "rnn-lm", "config": {"dim": 8, "embedding_dim": 8}}
    model = mmhub.compose("language-modelling", decoder=config, tokenizer={"kind": "byte"})
    with pytest.raises(UsageError, match="transformers has no recurrent language model such as this RNNLM"):
        write_layout(model, tmp_path / "out")


def test_a_plugin_must_give_an_encoder_or_what_reads_text() -> None:
    with pytest.raises(PluginError, match="without an encoder and without a decoder that reads text"):
        join(ForeignParts(task="language-modelling"), "x")


def test_a_damaged_safetensors_file_is_refused_before_a_library_sees_it(classifier: Path) -> None:
    (classifier / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(TrustError, match="not a sound safetensors file"):
        load_foreign("x", classifier)


@pytest.mark.usefixtures("client")
def test_a_foreign_base_is_fine_tuned_by_a_recipe_and_written_back(classifier: Path, tmp_path: Path) -> None:
    from mmhub.engine import train

    table = tmp_path / "train.csv"
    table.write_text("text,label\n" + "the cat sat,good\na mat,bad\n" * 8)
    recipe = {
        "task": "classification",
        "model": {"base": str(classifier)},
        "data": {"train": str(table), "valid": str(table), "inputs": {"text": "text"}, "target": "label"},
        "train": {"epochs": 8, "batch_size": 4, "learning_rate": 1e-2},
    }
    model = train(recipe, tmp_path / "run").load()
    answers = model.predict([{"text": "the cat sat"}, {"text": "a mat"}])
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    from transformers import pipeline

    theirs = pipeline("text-classification", str(write_layout(model, tmp_path / "back")), device="cpu")
    found = theirs(["the cat sat", "a mat"])
    assert [one["label"] for one in found] == ["good", "bad"]
    assert [one["score"] for one in found] == pytest.approx([answer["score"] for answer in answers], abs=1e-5)


def sentences() -> Any:
    """An untrained sentence-transformers model of all its modules."""
    table = {key: value for key, value in tiny_config().to_dict().items() if key in SIZES}
    config = {"config": {"model_type": "bert", **table}, "pooling": ["max", "mean"], "normalize": True}
    text = {"use": "sentence-transformers", "config": config | {"dense": [{"size": 5, "activation": "relu"}]}}
    return mmhub.compose("embedding", encoders={"text": text}, texts=["the cat sat", "a mat"])


@pytest.mark.usefixtures("client")
def test_all_modules_of_a_sentence_transformers_repository_are_fetched_and_used(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sentences()
    folder = write_layout(model, tmp_path / "out", "sentence-transformers")
    upload(hub, REPO, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)})
    samples = [{"text": "the cat"}, {"text": "a mat"}]
    expected, found = model.embed(samples), mmhub.load(REPO).embed(samples)
    assert isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(mmhub.load(REPO).embed(samples), found)  # type: ignore[arg-type]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    next(Path(constants.HF_HUB_CACHE).rglob("1_Pooling/config.json")).unlink()
    assert torch.equal(mmhub.load(REPO).embed(samples), found)  # type: ignore[arg-type]


def no_listing(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("what mmhub itself completed is not listed again")


@pytest.mark.usefixtures("client")
def test_what_another_library_left_in_the_cache_is_completed_once(
    hub: str, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = upload(hub, REPO, content(classifier) | {"spm.model": b"x"})
    api, theirs = HfApi(endpoint=hub, token=False), ["config.json", "model.safetensors"]
    api.snapshot_download(REPO, cache_dir=cache_dir(), allow_patterns=theirs)
    answers = mmhub.load(f"{REPO}@{commit}").predict([{"text": "the cat"}])
    snapshot = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*"))
    assert {"tokenizer.json", "spm.model"} <= {path.name for path in snapshot.iterdir()}
    monkeypatch.setattr(import_module("mmhub.hub.pull"), "list_files", no_listing)
    assert mmhub.load(f"{REPO}@{commit}").predict([{"text": "the cat"}]) == answers


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_modules_that_transformers_did_not_ask_for_are_fetched_and_the_old_layout_loads(
    hub: str, tmp_path: Path, old: bool
) -> None:
    model = sentences()
    folder = write_layout(model, tmp_path / "out", "sentence-transformers")
    if old:
        to_old_layout(folder)
    upload(hub, REPO, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)})
    theirs = ["config.json", "*model.safetensors", "*tokenizer*"]
    HfApi(endpoint=hub, token=False).snapshot_download(
        REPO, cache_dir=cache_dir(), allow_patterns=theirs, ignore_patterns="2_Dense/*"
    )
    samples = [{"text": "the cat"}, {"text": "a mat"}]
    torch.testing.assert_close(mmhub.load(REPO).embed(samples), model.embed(samples), atol=1e-6, rtol=0)


def to_old_layout(folder: Path) -> None:
    """Move the transformer into a folder of its own, as sentence-transformers did before version 2."""
    modules = json.loads((folder / "modules.json").read_text())
    assert modules[0]["path"] == ""
    modules[0]["path"] = "0_Transformer"
    (folder / "0_Transformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(folder / "0_Transformer" / path.name)
    (folder / "modules.json").write_text(json.dumps(modules))


SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"}


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
