"""How a model is computed changes neither what it computes nor the names of its weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmhub.build import compose
from mmhub.config import TrainRecipe
from mmhub.device import find_precision, use_fast_matmul
from mmhub.engine import compute
from mmhub.engine.blocks import find_blocks
from mmhub.engine.compute import autocast, prepare_model
from mmhub.errors import UsageError
from mmhub.model import Model
from tests.conftest import png, recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SAMPLES: list[dict[str, Any]] = [{"text": "a good thing", "image": png(0)}, {"text": "a bad", "image": None}]


def model_of(architecture: str = "test_resnet", dropout: float = 0.0, kind: str = "transformer", **text: Any) -> Model:
    torch.manual_seed(0)
    config = {"dim": 16, "dropout": dropout, "word_dropout": 0.0} | text
    if kind == "transformer":
        config = {"depth": 2, "heads": 2} | config
    return compose(
        encoders={
            "text": {"use": kind, "config": config},
            "image": {"use": "timm", "config": {"architecture": architecture}},
        },
        fusion={"use": "attention", "config": {"dim": 16, "heads": 2, "dropout": dropout, "modality_dropout": 0.0}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"], "dropout": 0.0}},
        texts=["a good thing", "a bad thing"],
    )


def step(model: Model, precision: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """The loss of one training step and the gradient of every parameter."""
    torch.manual_seed(1)
    batch = model.train().collate([{name: sample[name] for name in model.modalities} for sample in SAMPLES])
    batch.targets = torch.tensor([0, 1])
    with autocast(CPU, precision):
        loss = model(batch).loss
    assert loss is not None
    loss.backward()
    grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), grads


def assert_same(found: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]], atol: float = 0.0) -> None:
    for got, expected in zip([found[0], *found[1]], [want[0], *want[1]], strict=True):
        assert torch.allclose(got.float(), expected.float(), atol=atol, rtol=0), (got - expected).abs().max()


@pytest.fixture(autouse=True)
def _matmul_precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_the_blocks_of_every_part_are_found_by_the_names_modules_have() -> None:
    model = model_of("test_vit")
    names = [name for name, _ in find_blocks(model)]
    assert names[:2] == ["encoders.text.layers.blocks.0", "encoders.text.layers.blocks.1"]
    assert names[-2:] == ["fusion.encoder.blocks.0", "fusion.encoder.blocks.1"]
    assert [name for name in names if name.startswith("encoders.image.")]
    assert all(model.get_submodule(name) is block for name, block in find_blocks(model))


@pytest.mark.parametrize(
    ("architecture", "count"), [("vit_tiny_patch16_224", 12), ("resnet18", 8), ("swin_tiny_patch4_window7_224", 4)]
)
def test_the_layouts_of_timm_have_blocks(architecture: str, count: int) -> None:
    import timm

    with torch.device("meta"):
        assert len(find_blocks(timm.create_model(architecture))) == count


def test_the_layouts_of_transformers_have_blocks() -> None:
    from transformers import AutoModel, BertConfig, GPT2Config, T5Config, Wav2Vec2Config, WhisperConfig

    configs: list[tuple[Any, dict[str, int]]] = [
        (BertConfig(num_hidden_layers=3), {"BertLayer": 3}),
        (GPT2Config(n_layer=3), {"GPT2Block": 3}),
        (T5Config(num_layers=3), {"T5Block": 6}),
        (Wav2Vec2Config(num_hidden_layers=3), {"Wav2Vec2EncoderLayer": 3}),
        (WhisperConfig(encoder_layers=3, decoder_layers=2), {"WhisperEncoderLayer": 3, "WhisperDecoderLayer": 2}),
    ]
    for config, want in configs:
        with torch.device("meta"):
            kinds = [type(block).__name__ for _, block in find_blocks(AutoModel.from_config(config))]
        assert {kind: kinds.count(kind) for kind in kinds} == want


def test_single_layers_mixed_lists_and_blocks_within_blocks_are_no_blocks() -> None:
    def block() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(4, 1, 4)

    outer = nn.ModuleList([nn.TransformerEncoder(block(), 2, enable_nested_tensor=False) for _ in range(2)])
    model = nn.ModuleDict(
        {
            "mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            "mixed": nn.ModuleList([block(), nn.Linear(4, 4)]),
            "one": nn.ModuleList([block()]),
            "stages": nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block(), block())),
            "outer": outer,
        }
    )
    names = [name for name, _ in find_blocks(model)]
    assert names == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "outer.0", "outer.1"]


# -- what changes nothing --------------------------------------------------------------------------------------------


def test_the_default_recipe_leaves_a_model_on_a_cpu_alone() -> None:
    model, want = model_of(), step(model_of())
    prepare_model(model, TrainRecipe(), CPU, torch.float32)
    assert_same(step(model), want)
    assert torch.get_float32_matmul_precision() == "highest"


def test_recomputed_blocks_give_the_same_step_with_dropout_and_run_twice() -> None:
    options = TrainRecipe(activation_checkpointing=True)
    model, want = model_of("test_vit", dropout=0.3), step(model_of("test_vit", dropout=0.3))
    keys = list(model.state_dict())
    calls: list[str] = []
    for name, block in find_blocks(model):
        part = next(iter(block.children()))
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    prepare_model(model, options, CPU, torch.float32)
    assert_same(step(model), want)
    names = [name for name, _ in find_blocks(model)]
    assert sorted(calls) == sorted(names * 2)
    calls.clear()
    model.eval().predict(SAMPLES[:1])
    assert sorted(calls) == sorted(names)
    assert list(model.state_dict()) == keys


def test_a_frozen_encoder_is_not_recomputed() -> None:
    model = model_of("test_vit")
    model.freeze("image")
    calls: list[int] = []
    model.get_submodule("encoders.image").register_forward_hook(lambda *_: calls.append(1))
    prepare_model(model, TrainRecipe(activation_checkpointing=True), CPU, torch.float32)
    step(model)
    assert len(calls) == 1


def test_what_has_no_blocks_cannot_be_compiled_or_recomputed_by_them() -> None:
    model = compose(
        encoders={"image": {"use": "timm", "config": {"architecture": "test_resnet"}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
    )
    for options in (TrainRecipe(compile="blocks"), TrainRecipe(activation_checkpointing=True)):
        with pytest.raises(UsageError, match="no repeated blocks"):
            prepare_model(model, options, CPU, torch.float32)


def test_channels_last_is_for_convolutional_encoders_on_a_gpu() -> None:
    model = model_of()
    prepare_model(model, TrainRecipe(), CPU, torch.float32)
    weights = [p for p in model.encoders["image"].parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights
    assert all(weight.is_contiguous() for weight in weights)
    want = step(model)
    prepare_model(model, TrainRecipe(), GPU, torch.float32)
    assert not any(weight.is_contiguous() for weight in weights)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    seen: list[Tensor] = []
    first = next(part for part in model.encoders["image"].modules() if isinstance(part, nn.Conv2d))
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    assert_same(step(model), want, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()
    vit = model_of("test_vit")
    prepare_model(vit, TrainRecipe(), GPU, torch.float32)
    assert all(p.is_contiguous() for p in vit.parameters())


def test_a_gpu_multiplies_fp32_in_tf32_and_a_cpu_does_not() -> None:
    use_fast_matmul(CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    use_fast_matmul(GPU)
    assert torch.get_float32_matmul_precision() == "high"


def test_a_prepared_model_is_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    from mmhub.checkpoint import load

    model = model_of("test_vit").eval()
    want = model.predict(SAMPLES)
    prepare_model(model, TrainRecipe(activation_checkpointing=True), GPU, torch.float32)
    assert load(model.save(tmp_path / "model")).eval().predict(SAMPLES) == want


# -- compiling -------------------------------------------------------------------------------------------------------


def test_compiling_is_for_each_block_or_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    model = model_of("test_vit")
    prepare_model(model, TrainRecipe(compile="blocks"), CPU, torch.float32)
    assert compiled == [block for _, block in find_blocks(model)]
    compiled.clear()
    prepare_model(model, TrainRecipe(compile="model"), CPU, torch.float32)
    assert compiled == [model]


def test_compiling_without_a_compiler_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        prepare_model(model_of(), TrainRecipe(compile="blocks"), CPU, torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.parametrize(("what", "recompute"), [("blocks", False), ("blocks", True), ("model", False)])
def test_a_compiled_model_takes_the_same_step(what: Any, recompute: bool) -> None:
    def text_model() -> Model:
        torch.manual_seed(0)
        return compose(
            encoders={
                "text": {
                    "use": "transformer",
                    "config": {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, "word_dropout": 0.0},
                }
            },
            decoder={"use": "classification", "config": {"labels": ["no", "yes"], "dropout": 0.0}},
            texts=["a good thing", "a bad thing"],
        )

    model, want = text_model(), step(text_model())
    keys = list(model.state_dict())
    prepare_model(model, TrainRecipe(compile=what, activation_checkpointing=recompute), CPU, torch.float32)
    assert_same(step(model), want, atol=1e-5)
    assert list(model.state_dict()) == keys


# -- precision -------------------------------------------------------------------------------------------------------


def test_pure_bf16_is_computed_like_bf16() -> None:
    assert find_precision("bf16-pure", CPU) is find_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_pure_bf16_stores_what_is_trained_in_bf16_and_norms_in_fp32(kind: str) -> None:
    model, want = model_of(kind=kind), step(model_of(kind=kind))
    model.freeze("image")
    prepare_model(model, TrainRecipe(precision="bf16-pure"), CPU, torch.bfloat16)
    for name, module in model.named_modules():
        dtypes = {p.dtype for p in module.parameters(recurse=False)}
        exact = "Norm" in type(module).__name__ or isinstance(module, nn.LSTM) or name.startswith("encoders.image")
        assert dtypes <= {torch.float32 if exact else torch.bfloat16}, name
    loss, grads = step(model, torch.bfloat16)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.allclose(loss.float(), want[0], rtol=5e-2)


def test_sharding_keeps_fp32_shards_and_computes_in_bf16_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = model_of()
    prepare_model(model, TrainRecipe(precision="bf16-pure", parallel="fsdp"), CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_will_be_sharded_stays_contiguous_as_fsdp_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = model_of()
    prepare_model(model, TrainRecipe(parallel="fsdp"), GPU, torch.float32)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_autocast_is_off_in_fp32() -> None:
    x = torch.randn(2, 2)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_run_in_pure_bf16_goes_on_bit_for_bit(tables: Path, tmp_path: Path) -> None:
    from mmhub.engine import train

    table = recipe(tables, max_steps=4, checkpoint_every=2, keep=9, precision="bf16-pure", optimizer="muon")
    out = tmp_path / "run"
    want = (train(table, out).model / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    shutil.rmtree(out / "model")
    assert (train(table, out, resume=True).model / "model.safetensors").read_bytes() == want


# -- fp8 -------------------------------------------------------------------------------------------------------------

FP8 = TrainRecipe(fp8=True, precision="bf16")


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(("device", "capability"), [(CPU, (9, 0)), (GPU, (8, 0))])
def test_fp8_needs_a_gpu_that_has_it(
    device: torch.device, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UsageError, match=r"compute capability 8\.9"):
        prepare_model(model_of(), FP8, device, torch.bfloat16)


@pytest.mark.usefixtures("new_gpu")
def test_fp8_needs_torchao_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not fp32"):
        prepare_model(model_of(), TrainRecipe(fp8=True, precision="fp32"), GPU, torch.float32)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match="pip install torchao"):
        prepare_model(model_of(), FP8, GPU, torch.bfloat16)


@pytest.mark.usefixtures("new_gpu")
def test_fp8_is_for_large_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def convert(model: nn.Module, *, module_filter_fn: Any) -> None:
        chosen.extend(name for name, module in model.named_modules() if module_filter_fn(module, name))

    fake = ModuleType("torchao.float8")
    fake.convert_to_float8_training = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    model = model_of()
    with pytest.raises(UsageError, match="1024 wide"):
        prepare_model(model, FP8, GPU, torch.bfloat16)
    monkeypatch.setattr(compute, "LARGE", 16)
    prepare_model(model, FP8, GPU, torch.bfloat16)
    assert "encoders.text.layers.blocks.0.mlp.0" in chosen
    assert not [name for name in chosen if name.startswith("decoder")]  # two labels are no multiple of 16


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("what", ["off", "blocks"])
def test_a_step_on_a_gpu_is_that_of_a_cpu(precision: Any, what: Any) -> None:
    model, want = model_of(), step(model_of())
    model = model.to(GPU)
    dtype = find_precision(precision, GPU)
    prepare_model(model, TrainRecipe(precision=precision, compile=what), GPU, dtype)
    batch = model.train().collate(SAMPLES).to(GPU)
    batch.targets = torch.tensor([0, 1], device=GPU)
    with autocast(GPU, dtype):
        loss = model(batch).loss
    assert loss is not None
    loss.backward()
    assert torch.allclose(loss.cpu().float(), want[0], rtol=1e-3 if dtype == torch.float32 else 5e-2)
