"""Checks of decoders that write texts: what a token costs is what is written by, whatever stands beside it.

They do not apply to other decoders; some are about language models alone.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mmhub.interfaces import Policy
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import NotApplicableError, expect
from mmhub.testing.subject import LanguageSubject, WriterSubject, difference, lined_up, stream_of, subject_of

_RULE = "TextDecoder"
_TOLERANCE = 1e-4


def token_losses(check: Check) -> None:
    """Of a text decoder: `token_losses` is fp32, one number for each position, and 0 where nothing is predicted; each
    row has as many others as `weigh` says, and their mean is the loss."""
    subject = _writer(check)
    decoder = subject.part()
    with torch.no_grad():
        bundle, targets = subject.given(decoder)
        costs, loss = decoder.token_losses(bundle, targets), decoder(bundle, targets).loss
    good = costs.ndim == 2 and len(costs) == len(targets) and costs.dtype == torch.float32
    expect(good, f"token_losses are {tuple(costs.shape)} {costs.dtype}", f"({len(targets)}, T) float32", _RULE)
    found, counted = (costs != 0).sum(1).tolist(), decoder.weigh(targets).tolist()
    expect(found == counted, f"rows with {found} losses weigh {counted}", "as much as they have", "weigh")
    mean = float(costs.sum()) / max(1, sum(found))
    same = abs(mean - float(loss)) <= _TOLERANCE * max(1.0, mean)
    expect(same, f"the loss is {float(loss):.5g}, the mean of token_losses {mean:.5g}", "the same", _RULE)


def step_by_step(check: Check) -> None:
    """Of a text decoder: the logits of `begin` and `step`, for rows that begin with different numbers of tokens, give
    each token the probability that `token_losses` tells."""
    subject = _writer(check)
    decoder = subject.part()
    with torch.no_grad():
        logits, state, goals, costs = subject.begun(decoder)
        for step in range(goals.shape[1]):
            good = logits.ndim == 2 and len(logits) == len(goals)
            expect(good, f"logits are {tuple(logits.shape)}", f"({len(goals)}, V)", _RULE)
            cost = -logits.log_softmax(1).gather(1, goals[:, step, None])[:, 0]
            gap = difference({"-log P": cost}, {"-log P": costs[:, step]}, _TOLERANCE)
            expect(not gap, f"after {step} steps, {gap}", "what token_losses gives", _RULE)
            logits, state = decoder.step(goals[:, step], state)


def select(check: Check) -> None:
    """Of a text decoder: rows that `select` repeats, reorders or leaves out go on as they would have."""
    subject = _writer(check)
    decoder = subject.part()
    with torch.no_grad():
        _, state, goals, _ = subject.begun(decoder)
        rows = torch.tensor([len(goals) - 1, 0, 0])
        wanted, _ = decoder.step(goals[:, 0], state)
        _, state, _, _ = subject.begun(decoder)
        found, _ = decoder.step(goals[rows, 0], decoder.select(state, rows))
    gap = difference({"logits": found}, {"logits": wanted[rows]})
    expect(not gap, f"of the rows {rows.tolist()}, {gap}", "what they give unselected", "select")


def texts_apart(check: Check) -> None:
    """Of a language model: a text costs what it costs alone, beside longer ones and behind others in its row."""
    subject = _language(check)
    decoder, (one, two, three, *_) = subject.part(), subject.items()
    with torch.no_grad():
        alone = [decoder.token_losses(stream_of(decoder, [[text]]))[0] for text in (one, two, three)]
        found = decoder.token_losses(stream_of(decoder, [[one, two], [three]]))
    for what, row, wanted in (("behind another", 0, torch.cat(alone[:2])), ("beside a longer row", 1, alone[2])):
        gap = difference({"-log P": found[row, : len(wanted)]}, {"-log P": wanted})
        expect(not gap, f"{what}, {gap}", "what it costs alone", "parts")
        expect(not found[row, len(wanted) :].any(), f"{what}, padding costs something", "0", _RULE)


def media(check: Check) -> None:
    """Of a language model: what has no id is read and never predicted; it tells on what stands behind it in its text,
    and on nothing else; `begin` and `step` go on from it."""
    subject = _language(check)
    decoder, texts = subject.part(), subject.items()
    one, two, *_ = (text for text in texts if len(text) > 1)
    draw = torch.Generator().manual_seed(0)
    short, long = (torch.randn(size, decoder.dim, generator=draw) for size in (2, 9))
    rows = [[one[:1], long, one[1:]], [short, two[:1], short, two[1:]]]
    with torch.no_grad():
        costs = _costs_of_media(decoder, rows)
        for row, parts in enumerate(rows):
            alone = decoder.token_losses(lined_up(decoder, [parts]))[0]
            gap = difference({"-log P": costs[row, : len(alone)]}, {"-log P": alone})
            expect(not gap, f"with media, beside another row, {gap}", "what it costs alone", _RULE)
        changed = decoder.token_losses(lined_up(decoder, [[one[:1], -long, one[1:]], rows[1]]))
        same = torch.equal(changed[0], costs[0])
        expect(not same, "what stands behind media costs the same after other media", "something else", _RULE)
        gap = difference({"-log P": changed[1]}, {"-log P": costs[1]})
        expect(not gap, f"with other media in another row, {gap}", "the same", _RULE)
        _expect_parts(decoder, [rows[0], [short, two[:2]], [two[:2], short]])
        _expect_steps(decoder, costs, [rows[0][:2], rows[1][:3]], [one[1:], two[1:]])


def _costs_of_media(decoder: Any, rows: Any) -> Tensor:
    stream = lined_up(decoder, rows)
    costs: Tensor = decoder.token_losses(stream)
    wanted = stream["fused"].loss
    assert wanted is not None
    expect(not costs[~wanted].any(), "what is no text, or the first of one, costs something", "0", _RULE)
    expect(bool((costs[wanted] != 0).all()), "a token of text between media costs nothing", "its -log P", _RULE)
    return costs


def _expect_parts(decoder: Any, rows: Any) -> None:
    """Rows with media behind each other have the loss of padded ones."""
    counts = torch.tensor([sum(len(part) for part in parts if part.ndim == 1) - 1 for parts in rows])
    losses = []
    for pack in (False, True):
        stream = lined_up(decoder, rows, pack=pack)
        assert pack == (stream["fused"].parts is not None)
        losses.append(decoder(stream, counts).loss)
    gap = difference({"loss": losses[1]}, {"loss": losses[0]})
    expect(not gap, f"with media, and texts behind each other in a row, {gap}", "as in rows of their own", "parts")


def _expect_steps(decoder: Any, costs: Tensor, begun: Any, goals: Any) -> None:
    """Rows that begin with texts and media go on with the tokens `goals` as `token_losses` tells."""
    firsts = [sum(len(part) for part in parts) for parts in begun]
    logits, state = decoder.begin(lined_up(decoder, begun))
    for step in range(min(map(len, goals))):
        ids = torch.stack([goal[step] for goal in goals])
        cost = -logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
        wanted = torch.stack([costs[row, first + step] for row, first in enumerate(firsts)])
        gap = difference({"-log P": cost}, {"-log P": wanted}, _TOLERANCE)
        expect(not gap, f"{step} steps behind media, {gap}", "what token_losses gives", _RULE)
        logits, state = decoder.step(ids, state)


def goes_on(check: Check) -> None:
    """Of a language model that is `stateful`: a text cut in two, where `continues` is True, costs what it costs whole;
    where it is False nothing is passed on, and what is kept, rows first, has no gradient and is not saved."""
    subject = _language(check)
    if not subject.cls.stateful:
        raise NotApplicableError("it is not stateful")
    decoder = subject.part()
    text = max(subject.items(decoder.processor), key=len)
    cut = len(text) // 2
    whole = _costs(decoder, text)
    for on in (True, False):
        _costs(decoder, text[: cut + 1], continues=False)
        found = _costs(decoder, text[cut:], continues=on)[1:]
        wanted = whole[cut + 1 :] if on else _costs(decoder, text[cut:])[1:]
        gap = difference({"-log P": found}, {"-log P": wanted})
        expect(not gap, f"with continues = {on}, {gap}", "what the text costs in one piece", "continues")
    good = bool(decoder.carried) and all(len(t) == 1 and not t.requires_grad for t in decoder.carried.values())
    expect(good, "carried does not hold one detached row", "the state of each batch row", "stateful")
    saved = set(decoder.carried) & {name.rpartition(".")[2] for name in decoder.state_dict()}
    expect(not saved, f"state_dict holds {sorted(saved)}", "weights alone", "stateful")


def embed(check: Check) -> None:
    """Of a language model: `embed` gives (B, T, `dim`); in evaluation mode an id has one embedding, wherever it is."""
    subject = _language(check)
    decoder = subject.part()
    text = max(subject.items(decoder.processor), key=len)
    with torch.no_grad():
        found, alone = decoder.embed(torch.stack((text, text.flip(0)))), decoder.embed(text[-1:, None])
    shape = (2, len(text), decoder.dim)
    good = found.shape == shape and found.is_floating_point()
    expect(good, f"embed gives {tuple(found.shape)} {found.dtype}", f"{shape}, floating point", "embed")
    same = torch.equal(found[0, -1], alone[0, 0]) and torch.equal(found[1, 0], alone[0, 0])
    expect(same, "an id is embedded differently elsewhere", "one embedding for each id", "embed")


def text_processor(check: Check) -> None:
    """Of a text decoder: its processor reads ids below `vocab_size`; a document is its prompt, and the end token where
    `ends`; `decode` gives text, of special tokens none; rebuilt from state and files, it reads the same."""
    subject = _writer(check)
    processor = subject.part().processor
    for raw in subject.raws():
        ids, prompt = processor.read(raw, Policy()), processor.prompt(raw, Policy())
        low, high, size = int(ids.min()), int(ids.max()), processor.vocab_size
        good = ids.dtype == torch.long and ids.ndim == 1 and low >= 0 and high < size
        expect(good, f"of {raw!r} it reads {ids.tolist()}", f"(S,) long, 0 to {size - 1}", "LanguageProcessor")
        end = [processor.end_id] if processor.ends else []
        expect(ids.tolist() == [*prompt.tolist(), *end], f"{raw!r} is read as {ids}", "prompt and end", "prompt")
        text = processor.decode(ids.tolist())
        same = text.split() == processor.decode(prompt.tolist()).split()
        expect(isinstance(text, str) and same, f"the end of {raw!r} is decoded", "no special tokens", "decode")
    state = json.loads(json.dumps(processor.state()))
    again = subject.cls.load_processor(subject.part().config, state, processor.files())
    pairs = zip(subject.items(processor), subject.items(again), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs) and again.stop_ids == processor.stop_ids
    expect(same, "rebuilt, it reads or stops differently", "the same", "LanguageProcessor")


def _costs(decoder: Any, text: Tensor, continues: bool | None = None) -> Tensor:
    """What the tokens of one text cost, (S,)."""
    on = None if continues is None else torch.tensor([continues])
    with torch.no_grad():
        costs: Tensor = decoder.token_losses(stream_of(decoder, [[text]], on))
    return costs[0]


def _writer(check: Check) -> WriterSubject:
    subject = subject_of(check)
    if not isinstance(subject, WriterSubject):
        raise NotApplicableError("it writes no texts")
    subject.part()
    return subject


def _language(check: Check) -> LanguageSubject:
    subject = subject_of(check)
    if not isinstance(subject, LanguageSubject):
        raise NotApplicableError("it is no language model")
    subject.part()
    return subject
