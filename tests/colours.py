"""A retrieval model that knows three colours in pictures and in words, for tests of search: no library, no training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Features
from mmhub.embedding import Embedding
from mmhub.errors import InputError
from mmhub.fusion.streams import Streams
from mmhub.interfaces import TASKS, ComponentConfig, Encoder, PairDecoder, Policy, Processor, Stream, raw_bytes
from mmhub.layers import summary
from mmhub.model import Columns, Model
from tests.fake_parts import component

WORDS = ("red", "green", "blue")


class Pixels(Processor):
    """The mean colour of a picture."""

    modality = "image"

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            picture = Image.open(io.BytesIO(raw_bytes(raw, policy) or b"")).convert("RGB")
        except UnidentifiedImageError:
            raise InputError(f"'{raw}' is no image") from None
        colours = torch.tensor(list(picture.resize((1, 1)).tobytes()))
        return colours / 255

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls()


class Words(Pixels):
    """How often each colour is named."""

    modality = "text"

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        return torch.tensor([float(str(raw).split().count(word)) for word in WORDS])


class Colours(Encoder):
    """The three numbers as one token; remembers how many items it saw."""

    class Config(ComponentConfig):
        modality: str = "image"

    modality = "image"
    padding_invariant = True
    dim = 3

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.scale = nn.Parameter(torch.ones(3))
        self.seen = 0

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> Processor:
        return Words() if config.modality == "text" else Pixels()

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Processor:
        return cls.make_processor(config)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        self.seen += len(data)
        return Features((data * self.scale)[:, None], mask[:, :1])


class Near(PairDecoder):
    """Cosines, times ten."""

    class Config(ComponentConfig):
        pass

    dim = 3

    def __init__(self, config: Any, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.sides = ("text", "image" if "image" in inputs else "text_pair")

    def vectors(self, bundle: Bundle) -> dict[str, Tensor]:
        return {side: F.normalize(summary(bundle[side]), dim=1) for side in self.sides}

    def pair_loss(self, vectors: dict[str, Tensor], targets: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, first: Tensor, second: Tensor) -> Tensor:
        return 10 * first @ second.T


def colour_model(*modalities: str, task: str = "retrieval", columns: Columns | None = None) -> Model:
    """A model for retrieval, or one that only embeds, of pictures and words unless told otherwise."""
    names = modalities or ("text", "image")
    configs = {name: Colours.Config(modality=name) for name in names}
    encoders = {name: Colours(config, Colours.make_processor(config)) for name, config in configs.items()}
    fusion = Streams(Streams.Config(), {name: encoder.stream for name, encoder in encoders.items()})
    head: Any = Near if task == "retrieval" else Embedding
    roles = [*(f"{name}_encoder" for name in names), "fusion", "decoder"]
    sources = {role: component(role, role) for role in roles}
    return Model(TASKS[task], encoders, fusion, head(head.Config(), fusion.outputs), sources, columns).eval()


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    """Write a picture of one colour."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def pictures(folder: Path) -> Path:
    """A red, a green and a blue picture in a folder, one of them deeper down, beside a text."""
    picture(folder / "r.png", (255, 0, 0))
    picture(folder / "deep" / "g.png", (10, 240, 10))
    picture(folder / "b.png", (40, 0, 220))
    (folder / "notes.txt").write_text("red")
    return folder
