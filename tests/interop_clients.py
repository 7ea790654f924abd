"""What people do with other libraries and a Hub, as `interop_clients.py LIBRARY FOLDER`: run in a process of its own.

These clients read HF_ENDPOINT when they are imported, so `tests/test_interop.py` starts them with it set. Nothing here
knows of mmhub: models of a few thousand random numbers are pushed and loaded again by the libraries' own functions,
large files once as Xet and once as LFS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIALS, "the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "good"]
TEXT = "the cat sat on a mat"


def transports() -> Iterator[str]:
    """Switch the client to Xet, its default, then to LFS."""
    from huggingface_hub import constants

    for name in ("xet", "lfs"):
        constants.HF_HUB_DISABLE_XET = name == "lfs"
        yield name


def tiny_tokenizer() -> Any:
    """A word tokenizer as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", model_max_length=32, **names)


def tiny_config(kind: str = "BertConfig", **settings: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return getattr(transformers, kind)(vocab_size=len(WORDS), max_position_embeddings=40, **sizes, **settings)


def with_transformers(folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel
    from transformers import BertForSequenceClassification as Classifier

    tokenizer = tiny_tokenizer()
    labels = {0: "bad", 1: "good", 2: "so-so"}
    for name in transports():
        encoder = BertModel(tiny_config()).eval()
        classifier = Classifier(tiny_config(num_labels=3, id2label=labels)).eval()
        for repo, model in ((f"team/bert-{name}", encoder), (f"team/bert-{name}-labels", classifier)):
            model.push_to_hub(repo)
            tokenizer.push_to_hub(repo)
        again = AutoModel.from_pretrained(f"team/bert-{name}")
        ids = AutoTokenizer.from_pretrained(f"team/bert-{name}")([TEXT, "a mat"], padding=True, return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(again(**ids).last_hidden_state, encoder(**ids).last_hidden_state)
            reloaded = AutoModelForSequenceClassification.from_pretrained(f"team/bert-{name}-labels")
            logits = reloaded(**ids).logits
            assert torch.equal(logits, classifier(**ids).logits)
            assert reloaded.config.id2label == labels
            mean = torch.stack(
                [again(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (TEXT, "a mat")]
            )
    expected = {"embedding": mean.tolist(), "scores": logits.softmax(-1).tolist()}  # of the last transport
    (folder / "expected.json").write_text(json.dumps(expected))


def with_timm(folder: Path) -> None:
    import timm
    import torch
    from timm.models import push_to_hf_hub

    picture = torch.rand(1, 3, 64, 64)
    for name in transports():
        model = timm.create_model("test_resnet", num_classes=3).eval()
        config = {"label_names": ["cat", "dog", "fox"], "license": "mit"}
        push_to_hf_hub(model, f"team/timm-{name}", model_config=config)
        again = timm.create_model(f"hf-hub:team/timm-{name}", pretrained=True).eval()
        assert again.num_classes == 3
        with torch.no_grad():
            assert torch.equal(again(picture), model(picture))


def with_sentence_transformers(folder: Path) -> None:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertModel

    BertModel(tiny_config()).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    for name in transports():
        modules = [Transformer(str(folder / "bert")), Pooling(16, pooling_mode="mean"), Normalize()]
        model = SentenceTransformer(modules=modules, device="cpu")
        model.push_to_hub(f"team/sentences-{name}")
        again = SentenceTransformer(f"team/sentences-{name}", device="cpu")
        assert np.array_equal(again.encode([TEXT, "a mat"]), model.encode([TEXT, "a mat"]))
    (folder / "expected.json").write_text(json.dumps({"embedding": again.encode([TEXT, "a mat"]).tolist()}))


def with_datasets(folder: Path) -> None:
    from datasets import Dataset, load_dataset

    rows = {"text": [f"text {i}" for i in range(50)], "label": [i % 3 for i in range(50)]}
    for name in transports():
        Dataset.from_dict(rows).push_to_hub(f"team/rows-{name}", num_shards=3)
        again = load_dataset(f"team/rows-{name}", split="train")
        assert again.to_dict() == rows
        streamed = load_dataset(f"team/rows-{name}", split="train", streaming=True)
        assert [row["text"] for row in streamed] == rows["text"]


def with_a_module_of_ones_own(folder: Path) -> None:
    import torch
    from huggingface_hub import PyTorchModelHubMixin

    class Net(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(width, 2)

    for name in transports():
        net = Net(width=5)
        net.push_to_hub(f"team/net-{name}")
        again = Net.from_pretrained(f"team/net-{name}")
        assert torch.equal(again.layer.weight, net.layer.weight)


CLIENTS: dict[str, Callable[[Path], None]] = {
    "transformers": with_transformers,
    "timm": with_timm,
    "sentence-transformers": with_sentence_transformers,
    "datasets": with_datasets,
    "mixin": with_a_module_of_ones_own,
}

if __name__ == "__main__":
    CLIENTS[sys.argv[1]](Path(sys.argv[2]))
