"""Texts and media in one stream: everything where it was written, whatever else is in the batch, packed or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmhub
from mmhub.batch import Batch, Bundle, Features, Plan, pad_sequences
from mmhub.errors import UsageError
from mmhub.fusion.interleave import Interleave
from mmhub.interfaces import Policy, Stream, decode_config
from mmhub.layers import line_up
from mmhub.model import Model
from mmhub.testing import find_checks
from mmhub.testing.standins import stand_ins_installed
from mmhub.weights import meta_parameters

DIM = 8
INPUTS = {"text": Stream(DIM), "image": Stream(5, pooled=3), "audio": Stream(3)}
Row = list[Any]  # ids of text, each a number, and items, each (modality, number of tokens)

PLACES: list[Row] = [
    [("image", 4), 1, 2, ("audio", 3), 3],
    [1, 2],
    [("audio", 2), ("image", 1), ("audio", 5), ("image", 4), 4, 5, ("image", 1), 6],
    [7, ("audio", 1), ("audio", 1), ("audio", 1), ("audio", 1)],
    [("image", 1)],
    [1, ("image", 0), 2],
    [],
    [3],
]


def build(config: Mapping[str, Any] | None = None, inputs: dict[str, Stream] = INPUTS) -> Interleave:
    torch.manual_seed(0)
    return Interleave(decode_config(Interleave.Config, config or {}, "fusion"), inputs).eval()


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bundle_of(rows: Sequence[Row], weights: bool = True) -> tuple[Bundle, Plan]:
    """What a fusion is given of rows; the features of an item follow from its size and place."""
    table = drawn((10, DIM), 0)
    texts = [torch.tensor([part for part in row if isinstance(part, int)], dtype=torch.long) for row in rows]
    ids, mask = pad_sequences([torch.cat([text, torch.zeros(1, dtype=torch.long)]) for text in texts])
    mask = torch.arange(mask.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
    loss = (ids % 3) * 0.5 * mask if weights else None
    tokens = (table[ids] * mask[..., None]).requires_grad_()
    bundle = {"text": Features(tokens, mask, ids=ids.masked_fill(~mask, -1), loss=loss)}
    for name in ("image", "audio"):
        found = [(r, p, one[1]) for r, row in enumerate(rows) for p, one in enumerate(row) if _is(one, name)]
        items, real = pad_sequences([item_of(name, size, p) for _, p, size in found] or [torch.zeros(1, width(name))])
        real = real if found else real & False
        bundle[name] = Features(items, real, rows=torch.tensor([r for r, _, _ in found] or [0]))
    places = [[(one[0], p) for p, one in enumerate(row) if not isinstance(one, int)] for row in rows]
    return bundle, Plan.of(places, ["image", "audio"])


def _is(one: Any, name: str) -> bool:
    return not isinstance(one, int) and one[0] == name


def width(name: str) -> int:
    return INPUTS[name].dim


def item_of(name: str, size: int, place: int) -> Tensor:
    return drawn((size, width(name)), 100 * place + 10 * size + len(name))


def by_hand(fusion: Interleave, row: Row) -> tuple[Tensor, list[int], list[float]]:
    """The tokens, ids and weights of one row, part by part."""
    table = drawn((10, DIM), 0)
    tokens, ids, weights = [torch.zeros(0, DIM)], [], []
    for place, part in enumerate(row):
        if isinstance(part, int):
            tokens.append(table[part][None])
            ids.append(part)
            weights.append((part % 3) * 0.5)
            continue
        item = item_of(part[0], part[1], place)[None]
        found, real = fusion.projectors[part[0]](item, torch.ones(1, part[1], dtype=torch.bool))
        tokens.append(found[real])
        ids += [-1] * int(real.sum())
        weights += [0.0] * int(real.sum())
    return torch.cat(tokens), ids, weights


@pytest.mark.parametrize("config", [{}, {"projectors": {"image": {"kind": "mlp"}, "audio": {"stack": 2}}}], ids=str)
def test_texts_and_media_stand_where_they_were_written(config: dict[str, Any]) -> None:
    fusion = build(config)
    bundle, plan = bundle_of(PLACES)
    fused = fusion(bundle, plan=plan)["fused"]
    assert fused.parts is None and fused.ids is not None and fused.loss is not None
    assert not fused.tokens[~fused.mask].any() and bool((fused.ids[~fused.mask] == -1).all())
    for row, parts in enumerate(PLACES):
        tokens, ids, weights = by_hand(fusion, parts)
        real = fused.mask[row]
        assert real.tolist() == [True] * len(ids) + [False] * (len(real) - len(ids))
        torch.testing.assert_close(fused.tokens[row][real], tokens, atol=1e-6, rtol=1e-5)
        assert fused.ids[row][real].tolist() == ids
        assert fused.loss[row][real].tolist() == pytest.approx(weights)


def test_a_row_alone_is_what_it_is_in_a_batch() -> None:
    fusion = build()
    whole = fused_rows(fusion, PLACES)
    for row, parts in enumerate(PLACES):
        torch.testing.assert_close(fused_rows(fusion, [parts])[0], whole[row], atol=1e-6, rtol=1e-5)


def fused_rows(fusion: Interleave, rows: Sequence[Row]) -> list[Tensor]:
    bundle, plan = bundle_of(rows)
    fused = fusion(bundle, plan=plan)["fused"]
    return [tokens[mask] for tokens, mask in zip(fused.tokens, fused.mask, strict=True)]


def test_without_a_plan_media_stand_before_the_text() -> None:
    rows: list[Row] = [[("image", 2), ("image", 1), ("audio", 2), 1, 2], [3], [("audio", 1), 4, 5, 6]]
    bundle, plan = bundle_of(rows)
    one, other = build()(bundle, plan=plan)["fused"], build()(bundle)["fused"]
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
    assert one.ids is not None and other.ids is not None and torch.equal(one.ids, other.ids)


def test_gradients_reach_texts_and_items_at_their_own_positions() -> None:
    fusion = build()
    bundle, plan = bundle_of(PLACES)
    for name in ("image", "audio"):
        bundle[name].tokens.requires_grad_()
    fused = fusion(bundle, plan=plan)["fused"]
    fused.tokens[2, 3:8].sum().backward()  # the second recording of the third row alone
    assert {int(row) for row in bundle["audio"].tokens.grad.any(-1).any(-1).nonzero()} == {2}  # type: ignore[union-attr]
    assert not bundle["image"].tokens.grad.any() and not bundle["text"].tokens.grad.any()  # type: ignore[union-attr]
    fusion(bundle, plan=plan)["fused"].tokens.sum().backward()
    mask = bundle["text"].mask
    grad = bundle["text"].tokens.grad
    assert grad is not None and bool((grad[mask] == 1).all()) and not grad[~mask].any()
    assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())


def test_where_no_row_has_media_the_projectors_take_part_with_nothing() -> None:
    fusion = build()
    bundle, plan = bundle_of([[1, 2], [3]])
    bundle["image"].tokens = bundle["image"].tokens.fill_(9.0).requires_grad_()
    fused = fusion(bundle, plan=plan)["fused"]
    assert torch.equal(fused.tokens, bundle["text"].tokens[:, :2]) and fused.mask.tolist() == [
        [True] * 2,
        [True, False],
    ]
    fused.tokens.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in fusion.parameters())
    assert bundle["image"].tokens.grad is not None and not bundle["image"].tokens.grad.any()


def test_a_stand_in_beside_rows_that_have_others_items_stands_nowhere() -> None:
    rows: list[Row] = [[("audio", 2), 1, 2], [("image", 3), 3]]
    bundle, plan = bundle_of(rows)
    lone = {
        name: features.select(torch.tensor([0])) if name == "text" else features for name, features in bundle.items()
    }
    lone["image"] = replace(bundle["image"], mask=bundle["image"].mask & False, rows=torch.tensor([0]))
    fused = build()(lone, plan=plan.select(slice(0, 1)))["fused"]
    assert fused.ids is not None and fused.ids.tolist() == [[-1, -1, 1, 2]]
    torch.testing.assert_close(fused.tokens[0], fused_rows(build(), rows)[0])


def test_text_becomes_the_fused_stream_unchanged() -> None:
    fusion = Interleave(Interleave.Config(), {"text": Stream(4)})
    text = Features(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), ids=torch.ones(2, 3, dtype=torch.long))
    assert fusion({"text": text}) == {"fused": text}
    assert fusion.outputs == {"fused": Stream(4)}
    bundle, plan = bundle_of([[1, 2], [3]])
    empty = {name: f if name == "text" else f.select(torch.tensor([], dtype=torch.long)) for name, f in bundle.items()}
    assert build()(empty, plan=plan)["fused"] is bundle["text"]


def test_without_marks_all_texts_but_their_first_tokens_are_predicted() -> None:
    bundle, plan = bundle_of([[("image", 2), 1, ("audio", 1), 2, 3], [4]], weights=False)
    fused = build()(bundle, plan=plan)["fused"]
    assert fused.loss is not None and fused.ids is not None
    assert fused.loss.tolist() == [[False, False, False, False, True, True], [False] * 6]


def test_of_several_texts_in_a_row_an_item_belongs_to_the_one_behind_it() -> None:
    bundle, plan = bundle_of([[("image", 1), 1, 2, ("audio", 2), 3, 4, ("image", 1)], [5]], weights=False)
    text = replace(bundle["text"], parts=torch.tensor([[4, 4, 7, 7, 0], [8, 0, 0, 0, 0]]))
    fused = build()(bundle | {"text": text}, plan=plan)["fused"]
    assert fused.parts is not None and fused.parts[0].tolist() == [4, 4, 4, 7, 7, 7, 7, 7]
    assert fused.loss is not None and fused.loss[0].tolist() == [False, False, True, False, False, False, True, False]


def test_tokens_are_counted_before_anything_is_encoded() -> None:
    config = {"projectors": {"image": {"shuffle": 2}, "audio": {"kind": "resampler", "queries": 6, "heads": 2}}}
    for separators in (False, True):
        fusion = build(config | {"separators": separators})
        rows: list[Row] = [[("image", 9), 1, ("audio", 4), ("image", 4)], [("audio", 0), ("image", 0), 1]]
        bundle, plan = bundle_of(rows)
        counts = [1 + sum(fusion.token_count(*one) for one in row if isinstance(one, tuple)) for row in rows]
        assert fusion(bundle, plan=plan)["fused"].lengths.tolist() == counts == ([18, 1] if separators else [12, 1])[:2]
        assert fusion.token_count("text", 7) == 7


def test_separators_stand_before_and_behind_each_item() -> None:
    fusion = build({"separators": True})
    bundle, plan = bundle_of([[1, ("image", 2), ("audio", 3), ("image", 0)], [("image", 1), 2]])
    fused = fusion(bundle, plan=plan)["fused"]
    image, audio = fusion.separators["image"], fusion.separators["audio"]
    for row, column, vector in ((0, 1, image[0]), (0, 4, image[1]), (0, 5, audio[0]), (0, 9, audio[1])):
        assert torch.equal(fused.tokens[row, column], vector)
    assert torch.equal(fused.tokens[1, 0], image[0]) and torch.equal(fused.tokens[1, 2], image[1])
    assert fused.lengths.tolist() == [10, 4]


def test_media_without_a_text_to_stand_in_are_refused() -> None:
    with pytest.raises(UsageError, match="joins media to the text of a language model, and there is none"):
        Interleave(Interleave.Config(), {"image": Stream(4)})


def test_a_projector_for_what_is_not_encoded_is_refused() -> None:
    for name, hint in (("imgae", "image"), ("text", "there are encoders of image, audio")):
        with pytest.raises(UsageError, match=f"there is a projector for '{name}', and no encoder") as caught:
            build({"projectors": {name: {}}})
        assert hint in str(caught.value.hint)


def test_it_is_built_on_the_meta_device_with_the_same_tensors() -> None:
    config = {"projectors": {"image": {"kind": "resampler", "heads": 2}}, "separators": True}
    with meta_parameters():
        meta = build(config).state_dict()
    assert all(tensor.is_meta for tensor in meta.values())
    assert {n: t.shape for n, t in meta.items()} == {n: t.shape for n, t in build(config).state_dict().items()}


# -- rows behind each other -------------------------------------------------------------------------------------------


def packed_of(rows: Sequence[Row], **changes: Any) -> tuple[Features, Bundle]:
    bundle, plan = bundle_of(rows)
    bundle["text"] = replace(bundle["text"], **changes)
    return build().train()(bundle, plan=plan)["fused"], bundle


def test_in_training_rows_are_put_behind_each_other_and_told_apart() -> None:
    fused, _ = packed_of(PLACES)
    rows = fused_rows(build(), PLACES)
    assert fused.parts is not None and fused.mask.shape == (3, max(map(len, rows)))
    found = [
        tokens[mask & (parts == number)]
        for tokens, mask, parts in zip(fused.tokens, fused.mask, fused.parts, strict=True)
        for number in parts[mask].unique()
    ]
    longest_first = sorted((row for row in rows if len(row)), key=len, reverse=True)
    assert sorted(len(part) for part in found) == sorted(len(row) for row in rows if len(row))
    for row in longest_first:
        assert any(part.shape == row.shape and torch.allclose(part, row, atol=1e-6) for part in found)


def test_rows_stay_where_fewer_would_not_come_of_it_or_order_matters() -> None:
    alike: list[Row] = [[1, ("image", 3), 2], [("audio", 2), 3, 4], [1, 2, 3]]
    assert packed_of(alike)[0].parts is None
    one = torch.ones(len(PLACES), dtype=torch.bool)
    fused, _ = packed_of(PLACES, continues=one)
    assert fused.parts is None and fused.continues is one
    for fusion in (build(), build({"pack": False}).train()):
        bundle, plan = bundle_of(PLACES)
        assert fusion(bundle, plan=plan)["fused"].parts is None
    with torch.no_grad():
        assert packed_of(PLACES)[0].parts is None


@pytest.mark.parametrize("lengths", [[0, 0], [5, 0], [5, 3, 2, 5, 0, 4, 1], [7], [1] * 9, [3, 3, 3, 6], [6, 0, 6, 0]])
def test_packed_rows_never_overlap_and_are_no_longer_than_the_longest(lengths: list[int]) -> None:
    text = Features(*pad_sequences([torch.ones(max(n, 1), 2) for n in lengths]))
    text.mask = torch.arange(text.mask.shape[1]) < torch.tensor(lengths)[:, None]
    ids = (torch.arange(text.mask.numel()).view(text.mask.shape) + 1).masked_fill(~text.mask, -1)
    nothing = Features(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.bool), rows=torch.tensor([0]))
    found = line_up(replace(text, ids=ids), {"image": nothing}, pack=True)
    assert found.ids is not None and found.mask.shape[1] == max(*lengths, 1)
    assert found.ids[found.mask].sort().values.tolist() == ids[text.mask].tolist()
    assert len(found.mask) <= len(lengths) and bool((found.mask == (found.ids > 0)).all())
    assert found.parts is None or not any(lengths) or bool(found.mask.any(1).all())


# -- whole models -----------------------------------------------------------------------------------------------------

TEXTS = ["one two three four five", "six seven eight nine ten"]
SMALL = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}
NO_DROPOUT = {"dropout": 0.0, "layer_dropout": 0.0, "input_dropout": 0.0, "word_dropout": 0.0, "weight_dropout": 0.0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
DECODERS: dict[str, dict[str, Any]] = {
    "transformer-lm": {"use": "transformer-lm", "config": SMALL},
    "lstm-lm": {"use": "lstm-lm", "config": {"dim": 16, "embedding_dim": 12} | NO_DROPOUT},
    "gpt2": {"use": "transformers-lm", "config": {"model_type": "gpt2", "attn_pdrop": 0.0} | GPT2},
    "llama": {"use": "transformers-lm", "config": {"model_type": "llama", "intermediate_size": 24} | LLAMA},
    "opt": {"use": "transformers-lm", "config": {"model_type": "opt", "dropout": 0.0} | OPT},  # keeps no texts apart
}
TALKS: list[Any] = [
    [("image", "1 2 3"), "one two", ("audio", "4"), "three"],
    ["four five"],
    ["six", ("audio", "1 2"), ("image", "5"), ("audio", "3 3 3"), ("image", "2 1")],
    [("audio", "2"), "seven"],
    ["eight nine ten one two three four " * 3],
]


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with stand_ins_installed(["image", "audio"]):
        yield


def model_of(name: str, **fusion: Any) -> Model:
    parts = {"image": {"use": "stand-in", "config": {"dim": 5}}, "audio": {"use": "stand-in", "config": {"dim": 3}}}
    return mmhub.compose(
        "chat",
        encoders=parts,
        fusion={"use": "interleave", "config": fusion},
        decoder=DECODERS[name],
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )


def sample(talk: Sequence[Any], answer: str = "ten nine") -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part[0], part[0]: part[1]}
        for part in talk
    ]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def batch_of(model: Model, talks: Sequence[Sequence[Any]], weights: Sequence[float] = ()) -> Batch:
    samples = [sample(talk) for talk in talks]
    for one, weight in zip(samples, weights, strict=False):
        one["messages"][-1]["weight"] = weight
    batch = model.collate(samples)
    return replace(batch, targets=model.language_model.count_targets(batch.items["text"]))


@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 2.0, 0.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(name: str, weights: tuple[float, ...]) -> None:
    found = []
    for pack in (True, False):
        model = model_of(name, pack=pack).train()
        fused: list[Features] = []
        model.fusion.register_forward_hook(lambda part, given, output, seen=fused: seen.append(output["fused"]))
        loss = model(batch_of(model, TALKS, weights)).loss
        assert loss is not None and (fused[0].parts is not None) == pack == (len(fused[0].mask) < len(TALKS))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys() and "fusion.projectors.image.body.weight" in found[0][1]
    for key, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_each_conversation_costs_in_a_batch_what_it_costs_alone(name: str) -> None:
    model = model_of(name).eval()
    whole = costs(model, TALKS)
    for row, talk in enumerate(TALKS):
        (alone,) = costs(model, [talk])
        assert len(alone) and alone.tolist() == pytest.approx(whole[row].tolist(), abs=1e-5)


@torch.no_grad()
def costs(model: Model, talks: Sequence[Sequence[Any]]) -> list[Tensor]:
    """What the trained tokens of each conversation cost."""
    batch = batch_of(model, talks)
    bundle = model.fusion(model.encode(batch.items, batch.size), plan=batch.plan)
    found = model.language_model.token_losses(bundle)
    return [row[loss > 0] for row, loss in zip(found, bundle["fused"].loss, strict=True)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_computes_what_transformers_does_of_embeddings_put_together_by_hand(name: str) -> None:
    model = model_of(name, projectors={"image": {"kind": "mlp"}, "audio": {"stack": 2}}).eval()
    lm: Any = model.language_model
    talks = [*TALKS, [("image", f"{n}") for n in range(4)], ["ten", *(("audio", "1 2 3") for _ in range(4)), "one"]]
    whole = costs(model, talks)
    for row, talk in enumerate(talks):
        script = model.processors["text"].converse(model.messages_of(sample(talk)), Policy())
        media = {name: iter([part[1] for part in talk if part[0] == name]) for name in ("image", "audio")}
        embedded, labels = [], []
        ids, weights = iter(script.ids), iter(script.weights)
        where = {place: kind for kind, place in script.places}
        for place in range(len(script.ids) + len(where)):
            if place in where:
                kind = where[place]
                data = torch.tensor([[float(number) for number in next(media[kind]).split()]])
                mask = torch.ones_like(data, dtype=torch.bool)
                tokens, real = model.fusion.projectors[kind](model.encoders[kind](data, mask).tokens, mask)  # type: ignore
                embedded.append(tokens[real])
                labels += [-100] * int(real.sum())
            else:
                number, weight = next(ids), next(weights)
                embedded.append(lm.embed(number[None]))
                labels.append(int(number) if weight > 0 else -100)
        with torch.no_grad():
            given = torch.cat(embedded)[None]
            theirs = lm.model(inputs_embeds=given, labels=torch.tensor([labels]))
        assert float(whole[row].mean()) == pytest.approx(float(theirs.loss), abs=1e-5)


def test_a_model_with_media_is_saved_and_loaded(tmp_path: Path) -> None:
    fusion = {"projectors": {"image": {"kind": "resampler", "queries": 2, "heads": 2}}, "separators": True}
    model = model_of("transformer-lm", **fusion).eval()
    loaded = mmhub.load(str(model.save(tmp_path / "model")))
    for one, other in zip(costs(model, TALKS), costs(loaded, TALKS), strict=True):
        assert torch.equal(one, other)
    assert loaded.fusion.config == model.fusion.config


@pytest.mark.slow
def test_what_torch_compiles_gives_the_same() -> None:
    fusion = build({"projectors": {"image": {"kind": "mlp"}}})
    bundle, plan = bundle_of(PLACES)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = fusion(bundle, plan=plan)["fused"].tokens
        found = torch.compile(fusion, backend="eager")(bundle, plan=plan)["fused"].tokens
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["gradients", "by-plan", "no-items", "batch-invariance", "padding-invariance"])
def test_every_kind_of_projector_keeps_the_contract(name: str) -> None:
    (check,) = (one for one in find_checks("mmhub") if one.id == f"fusion:interleave/{name}")
    image = {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2, "norm": True}
    check.with_example({"projectors": {"image": image, "audio": {"stack": 2}}, "separators": True}).run()


@pytest.mark.gpu
@pytest.mark.parametrize("pack", [True, False])
def test_on_a_gpu_everything_stands_where_it_stands_on_a_cpu(pack: bool) -> None:
    bundle, plan = bundle_of(PLACES)
    fusion = build({"pack": pack}).train()
    wanted = fusion(bundle, plan=plan)["fused"]
    moved = {name: features.to("cuda") for name, features in bundle.items()}
    found = fusion.cuda()(moved, plan=plan.to("cuda"))["fused"]
    torch.testing.assert_close(found.tokens.cpu(), wanted.tokens, atol=1e-3, rtol=1e-3)
    for key in ("mask", "ids", "loss", "parts"):
        one, other = getattr(found, key), getattr(wanted, key)
        assert one is other is None or torch.equal(one.cpu(), other)
