"""FLOPs are counted for every tower, as the formulas say, and counting leaves no trace."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmhub.adapters import apply_lora
from mmhub.batch import Batch, Encoded, Features, Items
from mmhub.build import compose
from mmhub.config import LoraRecipe
from mmhub.engine.flops import Sizes, TrainingCost, _attention, _missing_formulas, peak_flops
from mmhub.interfaces import Encoder
from mmhub.model import Model
from tests.conftest import flac, png, three_modalities
from tests.fake_parts import Numbers, fake_model
from tests.fake_plugins import ROOT

LABELS = {"use": "classification", "config": {"labels": ["no", "yes"], "dropout": 0.0}}
WORDS = {"kind": "word"}


class Around(Encoder):
    """An encoder around any module of (N, S, 8) -> (N, S, D)."""

    modality, padding_invariant = "numbers", True
    Config: Any = None

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__(None, Numbers())
        self.inner, self.dim = module, dim

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Any = None) -> Numbers:
        return Numbers()

    @classmethod
    def load_processor(cls, config: Any, state: Any, files: Any) -> Numbers:
        return Numbers()

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        tokens = self.inner(data)
        return Features(tokens[0] if isinstance(tokens, tuple) else tokens, mask)


class Turned(nn.Conv1d):
    """A convolution over positions."""

    def forward(self, data: Tensor) -> Tensor:
        return super().forward(data.transpose(1, 2)).transpose(1, 2)


def batch_of(*lengths: int, width: int = 8) -> Batch:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    data = torch.randn(len(lengths), max(lengths), width) * mask[..., None]
    items = Items(data, mask, torch.arange(len(lengths)), len(lengths))
    return Batch({"numbers": items}, len(lengths), targets=torch.zeros(len(lengths)))


def sizes_of(batch: Batch) -> Sizes:
    return Sizes(batch.size, {name: (items.lengths, items.rows) for name, items in batch.items.items()})


def flops(module: nn.Module, dim: int, *lengths: int, freeze: bool = False) -> float:
    model = fake_model(Around(module, dim))
    if freeze:
        model.freeze("numbers")
    cost = TrainingCost(model)
    cost.measure(batch_of(30, 4))
    return cost.of(sizes_of(batch_of(*lengths)))


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_a_recurrent_layer_costs_its_matrices_at_each_real_position(kind: type[nn.RNNBase], gates: int) -> None:
    found = flops(kind(8, 16, batch_first=True), 16, 5, 12)
    assert found == pytest.approx(3 * 2 * gates * (8 * 16 + 16 * 16) * 17)
    both = flops(kind(8, 16, num_layers=2, bidirectional=True, batch_first=True), 32, 5, 12)
    assert both == pytest.approx(3 * 2 * gates * 2 * (8 * 16 + 16 * 16 + 32 * 16 + 16 * 16) * 17)


def test_the_recurrent_kernels_have_the_same_formula() -> None:
    from mmhub.engine.flops import _cudnn_rnn, _mkldnn_rnn

    weights = [(64, 8), (64, 16), (64,), (64,)]
    assert _cudnn_rnn((12, 1, 8), weights, 0) == _cudnn_rnn((12, 8), weights) == 2 * 4 * (8 * 16 + 16 * 16) * 12
    assert _mkldnn_rnn((12, 3, 8), (64, 8), (64, 16)) == 3 * _cudnn_rnn((12, 8), weights)


def test_a_convolution_costs_its_kernel_at_each_output() -> None:
    assert flops(Turned(8, 6, 5, padding=2), 6, 10, 20) == pytest.approx(3 * 2 * 5 * 8 * 6 * 30)


def test_attention_costs_the_square_of_each_length_and_padding_nothing() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, dropout=0.0)

    def formula(length: int) -> int:
        return length * 2 * (4 * 8 * 8 + 2 * 8 * 32) + 4 * 8 * length**2

    for lengths in ((30,), (7, 19, 30), (100,)):
        assert flops(layer, 8, *lengths) == pytest.approx(3 * sum(map(formula, lengths)))


def test_frozen_parts_cost_once_and_twice_where_gradients_pass() -> None:
    linear = 2 * 8 * 8 * 10
    stack = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert flops(stack, 8, 10) == pytest.approx(9 * linear)
    assert flops(copy.deepcopy(stack), 8, 10, freeze=True) == pytest.approx(3 * linear)
    stack[0].requires_grad_(False)
    assert flops(stack, 8, 10) == pytest.approx((1 + 3 + 3) * linear)
    stack[0].requires_grad_(True)
    stack[1].requires_grad_(False)
    assert flops(stack, 8, 10) == pytest.approx((3 + 2 + 3) * linear)


@pytest.mark.slow
def test_a_vision_transformer_costs_what_its_paper_says() -> None:
    """ViT-B/16 at 224: 17.58 GMACs by timm's table, the head left out."""
    model = compose(
        encoders={"image": {"use": "timm", "config": {"architecture": "vit_base_patch16_224"}}}, decoder=LABELS
    )
    cost = TrainingCost(model)
    batch = model.collate([{"image": png(1)}] * 2)
    cost.measure(batch)
    assert cost.of(sizes_of(batch)) / 2 / 3 == pytest.approx(2 * 17.58e9, rel=0.005)


def text_model(kind: str, **config: Any) -> Model:
    texts = ["one two three four five six seven eight nine ten eleven twelve"]
    encoder = {"use": kind, "config": config}
    return compose(encoders={"text": encoder}, decoder=LABELS, tokenizer=WORDS, texts=texts).eval()


def measured(model: Model, *samples: dict[str, Any]) -> tuple[TrainingCost, Batch]:
    cost, batch = TrainingCost(model), model.collate(samples)
    cost.measure(batch)
    return cost, batch


def test_a_text_transformer_costs_layers_and_attention() -> None:
    model = text_model("transformer", dim=32, depth=2, heads=2)
    cost, batch = measured(model, {"text": "one two three four five six seven eight nine"}, {"text": "one two"})
    lengths = batch.items["text"].lengths.tolist()
    expected = sum(2 * (2 * 12 * 32 * 32 * n + 4 * 32 * n * n) + 2 * 32 * 2 for n in lengths)
    assert cost.of(sizes_of(batch)) == pytest.approx(3 * expected)


def test_a_packed_lstm_is_counted_too() -> None:
    model = text_model("lstm", dim=16, embedding_dim=8, depth=1, bidirectional=False, pooling="mean")
    cost, batch = measured(model, {"text": "one two three four five six"}, {"text": "one"})
    positions = int(batch.items["text"].mask.sum())
    assert cost.of(sizes_of(batch)) == pytest.approx(3 * (2 * 4 * (8 * 16 + 16 * 16) * positions + 2 * 2 * 16 * 2))


def test_every_tower_of_three_is_counted_and_what_joins_them() -> None:
    model = three_modalities("a b c d e f g")
    whole = {"image": png(1), "audio": flac(1, 0.5), "text": "a b c d e f g"}
    cost, batch = measured(model, whole)
    alone = [cost.of(sizes_of(model.collate([{name: value}]))) for name, value in whole.items()]
    total = cost.of(sizes_of(batch))
    assert all(part > 0 for part in alone)
    assert total > 0.9 * sum(alone)
    model.unimodal_loss = 0.5
    assert measured(model, whole)[0].of(sizes_of(batch)) > total  # each modality answers alone as well
    for name in whole:
        model.freeze(name)
    model.unimodal_loss = 0.0
    assert measured(model, whole)[0].of(sizes_of(batch)) < 0.5 * total


def test_stand_ins_for_other_processes_are_no_part_of_the_cost() -> None:
    model = three_modalities("a b c d")
    whole = {"image": png(1), "audio": flac(1, 0.5), "text": "a b c d"}
    cost, batch = measured(model, whole)
    model.stand_ins = dict(batch.items)
    again = TrainingCost(model)
    again.measure(batch)
    assert again.of(sizes_of(batch)) == pytest.approx(cost.of(sizes_of(batch)))


def test_a_modality_that_comes_later_is_measured_then() -> None:
    model = three_modalities("a b c d")
    cost, batch = measured(model, {"text": "a b c d"})
    both = model.collate([{"text": "a b c d", "image": png(1)}])
    before = cost.of(sizes_of(both))
    cost.measure(both)
    found = cost.of(sizes_of(both))
    assert found > before
    cost.measure(batch)
    assert cost.of(sizes_of(both)) == found, "what is known is not measured again"


def test_cached_features_cost_nothing_but_what_reads_them() -> None:
    model = text_model("transformer", dim=32, depth=2, heads=2)
    _, batch = measured(model, {"text": "one two three four five six"})
    items = batch.items["text"]
    cost = TrainingCost(model)
    cost.measure(Batch({}, 1, features={"text": Encoded(model.encode(batch.items, 1)["text"], items.rows)}))
    assert cost.of(Sizes(1, {}, {"text": (items.lengths, items.rows)})) == pytest.approx(
        3 * 2 * 32 * 2
    )  # the head alone


QWEN = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
OWN = {"dim": 32, "depth": 2, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}


def chat_model(use: str) -> Model:
    torch.manual_seed(0)
    return compose(
        task="chat",
        encoders={
            "image": {"use": "timm", "config": {"architecture": "test_vit", "image_size": 64}},
            "audio": {"use": "cnn", "config": {"sample_rate": 8000}},
        },
        decoder={"use": use, "config": QWEN if use == "transformers-lm" else OWN},
        tokenizer=WORDS,
        texts=["what is this now a cat or dog " + " ".join(f"word{i}" for i in range(300))] * 3,
    )


def asked(*kinds: str, seconds: float = 0.5) -> dict[str, Any]:
    """A question about media, and its answer."""
    media = [{"type": kind, kind: png(1) if kind == "image" else flac(1, seconds)} for kind in kinds]
    question = {"role": "user", "content": [*media, {"type": "text", "text": "what is this now"}]}
    return {"messages": [question, {"role": "assistant", "content": "a cat or dog"}]}


def freeze_for(stage: str, model: Model) -> None:
    """Leave to be trained what a stage trains."""
    if stage != "everything":
        model.freeze("image")
    if stage in ("projectors", "adapters", "last block"):
        model.freeze("audio")
        model.decoder.requires_grad_(False)
    if stage == "adapters":
        apply_lora(model, "decoder", LoraRecipe(rank=4, targets=["q_proj", "v_proj"]))
    if stage == "last block":
        model.fusion.requires_grad_(False)
        next(module for name, module in model.decoder.named_modules() if name.endswith(".1")).requires_grad_(True)


def counted_by_torch(model: Model, batch: Batch) -> float:
    """What PyTorch counts in a training step, with the input gradient that formulas give the first trained layers."""

    def flow(module: nn.Module, inputs: tuple[Tensor]) -> Any:
        return (inputs[0] if inputs[0].requires_grad else inputs[0].clone().requires_grad_(True), *inputs[1:])

    def backward(gradient: Any, *shapes: Any, **more: Any) -> int:
        return 2 * _attention(*shapes[:3])

    stems = [next(m for m in e.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))) for e in model.encoders.values()]
    for module in [*stems, *(m for m in model.fusion.modules() if isinstance(m, nn.Linear))]:
        if any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(flow)
    formulas = _missing_formulas() | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        loss = model.train()(batch).loss
        assert loss is not None
        loss.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    ("use", "stage"),
    [
        ("transformer-lm", "everything"),
        ("transformer-lm", "frozen picture encoder"),
        ("transformer-lm", "projectors"),
        ("transformer-lm", "last block"),
        ("transformers-lm", "everything"),
        ("transformers-lm", "adapters"),
    ],
)
def test_a_conversation_costs_what_pytorch_counts(use: str, stage: str) -> None:
    model = chat_model(use)
    freeze_for(stage, model)
    both = asked("image", "audio")
    rows = [both, asked("audio", "image"), both]  # of one length, for `transformers-lm` computes padding
    if use == "transformer-lm":
        rows = [both, asked("audio"), asked(), asked("image", "image"), asked("image")]
    batch = model.collate(rows)
    batch.targets = model.language_model.count_targets(batch.items["text"])
    cost = TrainingCost(model)
    cost.measure(batch)
    assert cost.of(sizes_of(batch)) == pytest.approx(counted_by_torch(model, batch), rel=0.005)


@pytest.mark.parametrize(
    ("picture", "sound"),
    [
        ({"kind": "resampler", "queries": 12}, {"kind": "resampler", "queries": 64, "depth": 1}),
        pytest.param({"kind": "mlp", "shuffle": 2}, {"stack": 4}, marks=pytest.mark.slow),
    ],
)
def test_projectors_that_make_fewer_tokens_cost_what_pytorch_counts(picture: Any, sound: Any) -> None:
    model = compose(
        task="chat",
        encoders={
            "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 64}},
            "audio": {"use": "transformer", "config": {"sample_rate": 8000, "dim": 16, "depth": 1, "heads": 2}},
        },
        fusion={"use": "interleave", "config": {"projectors": {"image": picture, "audio": sound}}},
        decoder={"use": "transformer-lm", "config": OWN},
        tokenizer=WORDS,
        texts=["what is this now a cat or dog"] * 3,
    )
    cost, _ = measured(model, asked("image"), asked("audio", seconds=8.0))
    batch = model.collate([asked("image", "audio", seconds=2.0), asked("audio", "image", seconds=2.0)])
    batch.targets = model.language_model.count_targets(batch.items["text"])
    assert cost.of(sizes_of(batch)) == pytest.approx(counted_by_torch(model, batch), rel=0.02)


def test_pictures_that_were_encoded_before_cost_their_projector_and_their_places() -> None:
    model = chat_model("transformer-lm")
    freeze_for("frozen picture encoder", model)
    cost, batch = measured(model, asked("image", "image"), asked("image"), asked())
    pictures = batch.items.pop("image")
    features = model.encode_items("image", pictures)
    kept = Batch(batch.items, batch.size, features={"image": Encoded(features, pictures.rows)})
    again = TrainingCost(model)
    again.measure(kept)
    sizes = sizes_of(batch)
    sizes.features["image"] = features.lengths, pictures.rows
    whole = sizes_of(batch)
    whole.items["image"] = pictures.lengths, pictures.rows
    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter, torch.no_grad():
        model.encode_items("image", pictures)
    assert again.of(sizes) == pytest.approx(cost.of(whole) - counter.get_total_flops())


def draw() -> None:
    """Use every random state there is."""
    torch.rand(1)
    random.random()
    np.random.rand()


def test_counting_changes_nothing() -> None:
    model = three_modalities("a b c d")
    model.train()
    model.freeze("image")
    batch = model.collate([{"image": png(1), "audio": flac(1), "text": "a b c"}] * 2)
    model.encoders["text"].register_forward_hook(lambda *_: draw())
    draw()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    TrainingCost(model).measure(batch)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[2] == states[2][2], "its place in the sequence"
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("name", "bf16", "tf32"),
    [
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835.5, 417.8),
        ("NVIDIA A100-SXM4-40GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ],
)
def test_known_gpus_have_a_peak(name: str, bf16: float, tf32: float) -> None:
    assert peak_flops(name, torch.bfloat16) == bf16 * 1e12
    assert peak_flops(name, torch.float32) == tf32 * 1e12
    assert peak_flops(name, torch.float32, fast_fp32=False) is None


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", ""],
)
def test_no_peak_is_guessed_for_others(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_the_documented_peaks_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "watching.md").read_text()
    rows = re.findall(r"^\| ([A-Z][^|]*\d[^|]*) \| ([\d.,]+) \| ([\d.]+|[\d,]+) \|$", text, re.MULTILINE)
    names = {"A100": "A100-SXM4-80GB", "H100 SXM": "H100 80GB HBM3"}
    assert len(rows) == 10
    for cards, *figures in rows:
        for card in cards.split(", "):
            name = names.get(card, card.replace("RTX", "GeForce RTX"))
            found = [peak_flops(f"NVIDIA {name}", kind) for kind in (torch.bfloat16, torch.float32)]
            assert found == [float(figure.replace(",", "")) * 1e12 for figure in figures], card


@pytest.mark.gpu
def test_a_gpu_counts_what_the_processor_counts() -> None:
    for kind in ("transformer", "lstm"):
        model = text_model(kind, dim=32)
        text = {"text": "one two three four five six seven eight nine"}
        cost, batch = measured(model, text)
        expected = cost.of(sizes_of(batch))
        moved = TrainingCost(model.to("cuda"), torch.bfloat16)
        moved.measure(batch.to("cuda"))
        assert moved.of(sizes_of(batch.to("cuda"))) == pytest.approx(expected)
