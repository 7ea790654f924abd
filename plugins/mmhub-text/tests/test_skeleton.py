"""Building transformers models without initial values, and importing the library without what it does not need."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.utils import logging

from mmhub_text.deferral import deferred
from mmhub_text.library import quiet
from mmhub_text.skeleton import no_initial_weights

SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SIZES = SMALL | {"vocab_size": 9}


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, value: Any) -> None:
        register(module, name, None if value is None else torch.nn.Parameter(value.detach().to("meta")))

    monkeypatch.setattr(torch.nn.Module, "register_parameter", on_meta)


def test_only_tables_are_computed_for_parameters_without_memory(meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = LlamaModel(LlamaConfig(**SIZES)).rotary_emb.inv_freq
    seen: list[str] = []
    monkeypatch.setattr(LlamaModel, "_init_weights", lambda model, module: seen.append(type(module).__name__))
    with no_initial_weights():
        model = LlamaModel(LlamaConfig(**SIZES))
    assert seen == ["LlamaRotaryEmbedding"]
    assert torch.equal(model.rotary_emb.inv_freq, expected) and not expected.is_meta
    LlamaModel(LlamaConfig(**SIZES))
    assert len(seen) > 5  # all modules again


def test_real_parameters_are_initialised() -> None:
    with no_initial_weights():
        model = BertModel(BertConfig(**SIZES, initializer_range=0.5))
    assert 0.3 < model.embeddings.word_embeddings.weight[1:].std() < 0.7
    assert model.encoder.layer[0].output.LayerNorm.weight.eq(1).all()


def test_models_of_other_threads_are_initialised(meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(BertModel, "_init_weights", lambda model, module: seen.append(type(module).__name__))
    thread = threading.Thread(target=lambda: BertModel(BertConfig(**SIZES)))
    with no_initial_weights():
        thread.start()
        thread.join()
    assert seen.count("Linear") > 3


def test_the_library_is_quiet_inside_the_block_alone(capfd: pytest.CaptureFixture[str]) -> None:
    logger, level = logging.get_logger("transformers.some.module"), logging.get_verbosity()
    handler = logging.get_logger().handlers[0]
    before, stream = handler.level, handler.setStream(sys.stderr)  # type: ignore[attr-defined]
    try:
        with quiet():
            logger.warning("advice")
            logger.error("trouble")
            assert logging.get_verbosity() == level
        logger.warning("later")
    finally:
        handler.setStream(stream or sys.stderr)  # type: ignore[attr-defined]
    said = capfd.readouterr().err
    assert "advice" not in said and "trouble" in said and "later" in said
    assert handler.level == before


def test_a_deferred_function_is_the_real_one_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with deferred("colorsys", "rgb_to_hsv"):
        from colorsys import rgb_to_hsv

        assert not hasattr(sys.modules["colorsys"], "__file__")
    assert "colorsys" not in sys.modules
    assert rgb_to_hsv(1, 0, 0) == (0.0, 1.0, 1)
    import colorsys

    assert colorsys.rgb_to_hsv is not rgb_to_hsv


def test_whatever_else_is_asked_of_a_deferred_module_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with deferred("colorsys", "rgb_to_hsv"):
        from colorsys import ONE_THIRD

        assert sys.modules["colorsys"].ONE_THIRD is ONE_THIRD
        with pytest.raises(ImportError):
            from colorsys import nothing  # type: ignore[attr-defined]  # noqa: F401
    import colorsys

    with deferred("colorsys", "rgb_to_hsv"):
        from colorsys import rgb_to_hsv
    assert rgb_to_hsv is colorsys.rgb_to_hsv


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="older transformers imports scipy elsewhere, too"
)
def test_text_encoders_do_without_scipy() -> None:
    code = (
        "import sys, mmhub_text.library\n"
        "assert 'scipy' not in sys.modules\n"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment\n"
        "assert linear_sum_assignment([[1, 2], [0, 3]])[0].tolist() == [0, 1]\n"
        "import scipy.optimize; assert scipy.optimize.linear_sum_assignment"
    )
    pytest.importorskip("scipy")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
