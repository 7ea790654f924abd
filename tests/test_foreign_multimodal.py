"""Multimodal language models of transformers, opened as models of ours: equal to the library, and trained further."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmhub
from mmhub.errors import MmhubError, TrustError, UsageError
from mmhub.hub.foreign import find_reader, load_foreign
from mmhub.interfaces import Generation
from tests.conftest import Cli
from tests.tiny_models import upload
from tests.tiny_vision_models import logits_of, pictures, save_model, talk, text_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub uploads
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # InternVL's own processor
]

FIRST, SECOND, THIRD = pictures()
TALKS = [
    talk("what is in the picture? ", FIRST),
    talk(FIRST, "compare them", SECOND),
    talk("hello two dogs"),
    [
        *talk(THIRD, "and"),
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        *talk("or none", SECOND),
    ],
]
KINDS = [("llava", "clip_vision_model"), ("idefics3", "idefics3_vision"), ("internvl", "internvl_vision")]
MORE = [("llava", "siglip_vision_model"), ("smolvlm", "smolvlm_vision"), ("vipllava", "clip_vision_model")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that transformers wrote, with CLIP and Llama inside."""
    path = tmp_path_factory.mktemp("models") / "llava"
    save_model(path)
    return path


def answers(model: Any, length: int = 6) -> list[str]:
    samples = [{"messages": messages} for messages in TALKS]
    found = model.generate(samples, Generation(max_new_tokens=length))
    return [one["text"] for one in found]


def logits(model: Any, talks: list[Any] | None = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(model.collate([{"messages": messages} for messages in talks or TALKS])).logits
    return found


@pytest.mark.parametrize(("kind", "tower"), [*KINDS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)])
def test_logits_and_greedy_texts_are_the_librarys_own(kind: str, tower: str, tmp_path: Path) -> None:
    theirs, processor = save_model(tmp_path, kind, tower)
    ours = load_foreign("tiny", tmp_path)
    expected = torch.stack([logits_of(theirs, processor, messages) for messages in TALKS])
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)  # in one batch
    torch.testing.assert_close(torch.cat([logits(ours, [one]) for one in TALKS]), expected, atol=1e-4, rtol=0)
    assert (ours.task.name, ours.modalities) == ("chat", ("image", "text"))
    for messages, text in zip(TALKS, answers(ours), strict=True):
        assert text.strip() == text_of(theirs, processor, messages, 6).strip()


OTHERS: list[dict[str, Any]] = [
    {"vision_feature_layer": [-2, 1]},
    {"vision_feature_select_strategy": "full"},
    {"vision_feature_layer": -1, "multimodal_projector_bias": False},
    {"text": "qwen2"},
    {"text": "mistral", "tie_word_embeddings": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_what_a_llava_may_choose_is_followed(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs, processor = save_model(tmp_path, **settings)
    expected = torch.stack([logits_of(theirs, processor, messages) for messages in TALKS])
    torch.testing.assert_close(logits(load_foreign("tiny", tmp_path)), expected, atol=1e-4, rtol=0)


def renamed(folder: Path, target: Path, names: dict[str, str]) -> Path:
    """A copy whose tensors begin with other names."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())

    def name_of(name: str) -> str:
        old = next((one for one in names if name.startswith(one)), "")
        return names.get(old, "") + name[len(old) :]

    save_file({name_of(k): v for k, v in load_file(folder / "model.safetensors").items()}, target / "model.safetensors")
    return target


def test_the_names_of_old_and_of_new_folders_are_both_known(folder: Path, tmp_path: Path) -> None:
    expected = logits(load_foreign("tiny", folder))
    new = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    old = {"vision_tower.": "vision_tower.vision_model."}
    for place, names in (("new", new), ("old", old)):
        torch.testing.assert_close(logits(load_foreign("tiny", renamed(folder, tmp_path / place, names))), expected)


def test_an_opened_model_is_saved_and_loaded_as_one_of_ours(folder: Path, tmp_path: Path) -> None:
    model = mmhub.load(str(folder))
    model.save(tmp_path / "saved")
    again = mmhub.load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model)) and answers(again) == answers(model)
    assert {role: source.id for role, source in again.sources.items()} == {
        "image_encoder": "mmhub-image/transformers-vision",
        "fusion": "mmhub/interleave",
        "decoder": "mmhub-text/transformers-lm",
    }
    assert not any(file.suffix in (".py", ".bin") for file in (tmp_path / "saved").rglob("*"))


def test_an_opened_model_is_trained_further_with_adapters(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from mmhub.engine import train

    rows = []
    for number, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{number}.png")
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what is it?"}]
        rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "task": "chat",
        "model": {
            "base": str(folder),
            "decoder": {"lora": {"rank": 2}},
            "encoders": {"image": {"freeze": True}},
        },
        "data": {"train": str(tmp_path / "train.jsonl")},
        "train": {"epochs": 1, "batch_size": 3, "learning_rate": 1e-2},
    }
    before = load_foreign("tiny", folder)
    run = train(recipe, tmp_path / "run")
    after = mmhub.load(str(run.model))
    theirs, ours = before.state_dict(), after.state_dict()
    assert torch.equal(
        theirs["encoders.image.tower.pre_layrnorm.weight"], ours["encoders.image.tower.pre_layrnorm.weight"]
    )
    assert not torch.equal(
        theirs["fusion.projectors.image.body.0.weight"], ours["fusion.projectors.image.body.0.weight"]
    )
    assert not torch.allclose(logits(before), logits(after))


def test_an_opened_model_is_found_on_a_hub_and_published_there(folder: Path, hub: str, tmp_path: Path) -> None:
    upload(hub, "team/llava", {file.name: file.read_bytes() for file in folder.iterdir()})
    model = mmhub.load("team/llava")
    mmhub.push(model, "team/mine", license="mit")
    assert torch.equal(logits(mmhub.load("team/mine")), logits(load_foreign("tiny", folder)))


@pytest.mark.slow
def test_the_command_line_answers_about_a_picture_with_the_folder(folder: Path, cli: Cli, tmp_path: Path) -> None:
    FIRST.save(tmp_path / "first.png")
    text = "what is in the picture? "
    given = ["predict", str(folder), "--image", str(tmp_path / "first.png"), "--text", text, "--json"]
    said = json.loads(cli(*given).stdout)["predictions"][0]["text"]
    model = load_foreign("tiny", folder)
    assert said == model.predict({"messages": talk(FIRST, text)})[0]["text"]


def test_its_parts_can_start_parts_of_a_new_model(folder: Path) -> None:
    from mmhub.build import compose

    model = compose(
        task="chat",
        encoders={"image": {"use": "transformers-vision", "init": str(folder), "config": {"layer": -2}}},
        decoder={"use": "transformers-lm", "init": str(folder)},
    )
    theirs = load_foreign("tiny", folder)
    for name in ("decoder.model.lm_head.weight", "encoders.image.tower.pre_layrnorm.weight"):
        assert torch.equal(model.state_dict()[name], theirs.state_dict()[name])


def test_what_is_said_of_such_a_folder_names_what_it_can_start(folder: Path) -> None:
    from mmhub.hub.describe import describe
    from mmhub.names import resolve

    said = describe(resolve(str(folder))).loadable
    assert said.startswith("yes") and said.endswith(f'decoder: use = "transformers-lm", init = "{folder}"')


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2_vl", "text_config": None}, "a multimodal model of model_type 'qwen2_vl' is not read here"),
    ({"model_type": "llava_next"}, "a multimodal model of model_type 'llava_next' is not read here"),
    (
        {"model_type": "qwen2_audio", "vision_config": None, "audio_config": {}},
        "a multimodal model of model_type 'qwen2_audio' is not read here",
    ),
    ({"vision_config": {"model_type": "vit"}}, "its vision tower is a 'vit'"),
    ({"projector_hidden_act": "relu"}, "its projector_hidden_act is 'relu'"),
    ({"text_config": {"model_type": "t5"}}, "model_type 't5' is no language model that can be run here"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_read_is_refused_by_its_config_alone(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(folder) | changes))
    with pytest.raises(MmhubError, match=re.escape(f"'it' cannot be loaded: {message}")) as caught:
        find_reader("it", tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [{"model_type": ["llava"]}, {"vision_config": "x"}, {"text_config": [1]}, {"vision_feature_layer": "x"}],
    ids=str,
)
def test_a_strange_configuration_is_an_error_of_mmhubs(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    strange = renamed(folder, tmp_path / "strange", {})
    (strange / "config.json").write_text(json.dumps(config_of(folder) | changes))
    with pytest.raises(MmhubError) as caught:
        load_foreign("it", strange)
    assert "\n" not in caught.value.message


def test_damaged_folders_are_errors_that_say_what_lacks(folder: Path, tmp_path: Path) -> None:
    names = {"multi_modal_projector.linear_1.": "multi_modal_projector.linear_9."}
    with pytest.raises(TrustError, match=r"the projector in '.*' has an unknown tensor 'linear_9"):
        load_foreign("it", renamed(folder, tmp_path / "projector", names))
    with pytest.raises(TrustError, match=r"holds no tensors named 'model.multi_modal_projector"):
        load_foreign("it", renamed(folder, tmp_path / "joint", {"multi_modal_projector.": "nothing."}))
    with pytest.raises(TrustError, match=r"lack 1 tensor\(s\), such as 'lm_head.weight'"):
        load_foreign("it", renamed(folder, tmp_path / "head", {"language_model.lm_head.": "nothing."}))
    short = renamed(folder, tmp_path / "short", {})
    table = config_of(folder)
    table["text_config"]["num_hidden_layers"] = 0
    (short / "config.json").write_text(json.dumps(table))
    with pytest.raises(TrustError, match=r"no place for \d+ tensor\(s\) of its language model"):
        load_foreign("it", short)
    silent = renamed(folder, tmp_path / "silent", {})
    (silent / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UsageError, match=r"the chat template in '.*' never writes '<image>'"):
        load_foreign("it", silent)
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template"):
        load_foreign("it", silent)
