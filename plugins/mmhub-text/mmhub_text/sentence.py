"""sentence-transformers models: a transformers encoder with its pooling, dense layers and normalisation on top."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec
import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub.layers import masked_mean
from mmhub_text.library import find_folder, pooling_modes, read_json, read_table, read_weights
from mmhub_text.pretrained import Transformers
from mmhub_text.processor import TextProcessor

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
    "torch.nn.modules.linear.Identity": nn.Identity,
}
_BY_NAME = {kind.__name__.lower(): kind for kind in ACTIVATIONS.values()}


class DenseLayer(ComponentConfig, frozen=True):
    """A linear layer on the pooled vector, and what follows it."""

    size: int
    bias: bool = True
    activation: Literal["tanh", "relu", "gelu", "sigmoid", "identity"] = "tanh"


class SentenceTransformers(Encoder):
    """One vector a text, as `SentenceTransformer.encode` gives it (Reimers and Gurevych 2019, arXiv:1908.10084)."""

    modality: ClassVar[str] = "text"

    class Config(ComponentConfig, frozen=True):
        """`config` and `max_length` are those of the `transformers` encoder; the rest is what follows it, in order.

        Several ways of pooling are laid side by side; `normalize` scales the vector to length 1.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        max_length: int | None = None
        pooling: tuple[Pooling, ...] = ("mean",)
        dense: tuple[DenseLayer, ...] = ()
        normalize: bool = False

        def __post_init__(self) -> None:
            if not self.pooling:
                raise ValueError("pooling must name at least one way")

    def __init__(self, config: Config, processor: TextProcessor) -> None:
        words = Transformers(_words(config), processor)
        config = msgspec.structs.replace(config, config=words.config.config, max_length=words.config.max_length)
        super().__init__(config, processor)
        self.words = words
        self.padding_invariant = words.padding_invariant
        self.dim = words.dim
        self.pooled_dim = words.dim * len(config.pooling)
        self.dense = nn.ModuleList()
        for layer in config.dense:
            self.dense.append(nn.Linear(self.pooled_dim, layer.size, bias=layer.bias))
            self.pooled_dim = layer.size
        self.activations = [_BY_NAME[layer.activation]() for layer in config.dense]

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> TextProcessor:
        return Transformers.make_processor(_words(config), tokenizer)

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> TextProcessor:
        return TextProcessor.from_state(state, files)

    @classmethod
    def from_library(cls, config: Config, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        """Read a sentence-transformers folder: JSON, tokenizer files and safetensors only.

        Raises:
            UsageError: it does something that this encoder does not. TrustError: a file is damaged or missing.
        """
        pooling, dense, normalize = _read_modules(path)
        layers = [_dense_layer(folder) for folder in dense]
        _check_settings(path)
        words = Transformers.from_library(_words(config), path, tokenizer)
        if read_table(find_folder(path) / "sentence_bert_config.json").get("do_lower_case"):
            _lower(words.processor)
        table = {"config": words.config.config, "max_length": words.config.max_length}
        made = cls.Config(**table, pooling=tuple(pooling), dense=tuple(layers), normalize=normalize)  # type: ignore[arg-type]
        with torch.device("meta"):  # the loaded parts take these parts' place
            encoder = cls(made, words.processor)
        encoder.words = words
        for layer, folder in zip(encoder.dense, dense, strict=True):
            weights = {name.removeprefix("linear."): tensor for name, tensor in read_weights(folder).items()}
            try:
                layer.load_state_dict(weights, assign=True)
            except RuntimeError:
                raise TrustError(f"the weights in '{folder}' are not those its config.json describes") from None
        return encoder

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode ids (N, S) to tokens (N, S, D) and pooled (N, P)."""
        tokens = self.words(data, mask).tokens
        pooled = torch.cat([_pool(mode, tokens, mask) for mode in self.config.pooling], dim=-1)
        for layer, activation in zip(self.dense, self.activations, strict=True):
            pooled = activation(layer(pooled))
        if self.config.normalize:
            pooled = F.normalize(pooled, dim=-1)
        return Features(tokens=tokens, mask=mask, pooled=pooled)


def _words(config: SentenceTransformers.Config) -> Transformers.Config:
    return Transformers.Config(config=config.config, max_length=config.max_length, pooling="mean")


def _pool(mode: Pooling, tokens: Tensor, mask: Tensor) -> Tensor:
    """Summarise (N, T, D) by the real tokens, (N, T) -> (N, D)."""
    lengths = mask.sum(1, keepdim=True)
    if mode == "cls":
        return tokens[:, 0]
    if mode == "lasttoken":
        return tokens[torch.arange(len(tokens), device=tokens.device), lengths[:, 0] - 1]
    if mode == "max":
        return tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)
    if mode == "weightedmean":
        weights = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).to(tokens.dtype)
        return (tokens * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
    mean = masked_mean(tokens, mask)
    return mean * lengths.to(tokens.dtype).sqrt() if mode == "mean_sqrt_len_tokens" else mean


def refusal(path: Path) -> UsageError | TrustError | None:
    """Say by modules.json alone why a sentence-transformers model is not read."""
    try:
        _read_modules(path)
    except (UsageError, TrustError) as error:
        return error
    return None


def _read_modules(path: Path) -> tuple[list[str], list[Path], bool]:
    """The ways of pooling, the folders of the dense layers, and whether the result is normalised."""
    kinds = [(_kind(str(one.get("type", ""))), str(one.get("path", ""))) for one in _modules(path)]
    kinds = [(kind, place) for kind, place in kinds if kind != "Dropout"]
    names = [kind for kind, _ in kinds]
    normalize = names[2:] != [] and names[-1] == "Normalize"
    dense = kinds[2:-1] if normalize else kinds[2:]
    if names[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind, _ in dense):
        raise UsageError(
            f"'{path}' is made of {', '.join(names)}; mmhub runs a Transformer, Pooling, Dense layers and Normalize",
            "load it with sentence-transformers",
        )
    folders = [path / place for _, place in kinds]
    for folder in folders:
        if not Path(os.path.normpath(folder)).is_relative_to(os.path.normpath(path)):
            raise TrustError(f"'{path / 'modules.json'}' names the folder '{folder}', which lies outside")
    return pooling_modes(read_table(folders[1] / "config.json")), folders[2 : 2 + len(dense)], normalize


def _kind(module: str) -> str:
    """The short name of a module of the library itself; one of the repository's own may be called the same."""
    return module.rpartition(".")[2] if module.startswith("sentence_transformers.") else module


def _modules(path: Path) -> list[dict[str, Any]]:
    modules = read_json(path / "modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(one, dict) for one in modules):
        raise TrustError(f"'{path / 'modules.json'}' should list the modules of a sentence-transformers model")
    return modules


def _dense_layer(folder: Path) -> DenseLayer:
    table = read_table(folder / "config.json")
    activation = ACTIVATIONS.get(str(table.get("activation_function", "torch.nn.modules.activation.Tanh")))
    size = table.get("out_features")
    if activation is None or table.get("use_residual") or not isinstance(size, int):
        what = "a residual connection" if table.get("use_residual") else f"{table.get('activation_function')}"
        raise UsageError(f"the dense layer in '{folder}' has {what}, which mmhub does not run")
    return DenseLayer(size=size, bias=bool(table.get("bias", True)), activation=activation.__name__.lower())  # type: ignore[arg-type]


def _check_settings(path: Path) -> None:
    """Refuse what changes an embedding and is not done here."""
    task = read_table(find_folder(path) / "sentence_bert_config.json").get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UsageError(f"'{path}' uses its transformer for {task}, not feature-extraction")
    settings = read_table(path / "config_sentence_transformers.json")
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    prompt = prompts.get(name) if name and isinstance(prompts, dict) else None
    if prompt:
        raise UsageError(
            f"'{path}' puts the prompt {str(prompt)[:60]!r} before every text, which mmhub does not do",
            "load it with sentence-transformers, or remove default_prompt_name and write the prompt into your texts",
        )


def _lower(processor: TextProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer is not None
    before = tokenizer.normalizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([before] if before else [])])
