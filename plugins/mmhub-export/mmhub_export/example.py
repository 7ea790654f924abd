"""The example beside an export: a short program for exactly this model that has no mmhub, put together from pieces.

It reads raw inputs as mmhub does, runs the graphs, and prints an answer as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.files import write_file
from mmhub_export.record import plain_name

_RUN = {
    "onnx": """

@functools.cache
def session(graph):
    return onnxruntime.InferenceSession(str(HERE / f"{graph}.onnx"), providers=["CPUExecutionProvider"])


def run(graph, **inputs):
    return session(graph).run(None, inputs)
""",
    "torch-export": """

@functools.cache
def program(graph):
    return torch.export.load(HERE / f"{graph}.pt2").module(check_guards=False)


def run(graph, **inputs):
    with torch.no_grad():
        return [found.numpy() for found in program(graph)(*(torch.from_numpy(given) for given in inputs.values()))]
""",
}

_TEXT = """

def read_text(text, *pair):
    tokenizer = Tokenizer.from_file(str(HERE / READ["text"]["tokenizer"]))
    if READ["text"].get("max_length"):
        tokenizer.enable_truncation(READ["text"]["max_length"])
    ids = tokenizer.encode(text, *pair).ids or [READ["text"]["empty_id"]]
    return {"data": np.array([ids]), "mask": np.ones((1, len(ids)), bool)}
"""

_WHOLE_TEXT = """

def encoded(*texts):
    found = Tokenizer.from_file(str(HERE / READ["text"]["tokenizer"])).encode(*texts)
    if len(found.ids) > (READ["text"].get("max_length") or len(found.ids)):
        sys.exit(f"these are more than the {READ['text']['max_length']} tokens the model reads at once: shorten them")
    return found


def read_text(*texts):
    ids = encoded(*texts).ids or [READ["text"]["empty_id"]]
    return {"data": np.array([ids]), "mask": np.ones((1, len(ids)), bool)}
"""

_PICTURE = """

def picture(path):
    found = ImageOps.exif_transpose(Image.open(path))
    levels = np.array(found) if found.mode.startswith("I") else np.zeros(1)
    if found.mode == "F" or levels.min() < 0 or levels.max() > 0xFFFF:
        sys.exit(f"{path} has pixels of unknown range: convert it to 8 bits a channel")
    if found.mode.startswith("I"):  # 16 bits: the high byte, and what is clear is white
        if isinstance(found.info.get("transparency"), int):
            levels[levels == found.info["transparency"]] = 0xFFFF
        found = Image.fromarray((levels.astype(np.uint16) >> 8).astype(np.uint8))
    if found.has_transparency_data:
        found = found.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
    return found.convert("RGB")
"""

_IMAGE = """

def read_image(path):
    height, width = READ["image"]["image_size"]
    kept = READ["image"].get("crop_pct") or 1.0
    shown = picture(path)
    tall, wide = int(height / kept), int(width / kept)
    if READ["image"].get("crop_mode") == "center":
        short = min(shown.size)
        scaled = (int(tall * shown.width / short), int(tall * shown.height / short))
    else:
        scaled = (wide, tall)
    shown = shown.resize(scaled, Image.Resampling[READ["image"]["interpolation"].upper()])
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    pixels = np.asarray(shown.crop((left, top, left + width, top + height)))
    return {"data": np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]}
"""

_LIBRARY_IMAGE = """

def read_image(path):
    settings = READ["image"]["settings"]  # of transformers' image processor READ["image"]["kind"]
    size, crop = settings["size"], settings.get("crop_size") or settings["size"]
    shown = picture(path)
    if "height" in size:
        shown = shown.resize((size["width"], size["height"]), settings.get("resample", 2))
    else:
        ratio = size["shortest_edge"] / min(shown.size)
        shown = shown.resize([int(side * ratio) for side in shown.size], settings.get("resample", 2))
    if "height" in crop:
        left, top = (shown.width - crop["width"]) // 2, (shown.height - crop["height"]) // 2
        shown = shown.crop((left, top, left + crop["width"], top + crop["height"]))
    return {"data": np.ascontiguousarray(np.asarray(shown).transpose(2, 0, 1))[None]}
"""

_SOUND = """

def samples(path, wanted):
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != wanted:
        sys.exit(f"{path} has {rate} Hz: bring it to {wanted} Hz first")
    if not len(sound):
        sys.exit(f"{path} has no sound in it")
    return sound.mean(1)
"""

_AUDIO = """

def read_audio(path):
    sound = samples(path, READ["audio"]["sample_rate"])
    if READ["audio"].get("do_normalize"):
        sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    return {"data": sound[None], "mask": np.ones((1, len(sound)), bool)}
"""

_FRAMES = """

def read_audio(path):
    how, frames = READ["audio"]["log_mel"], READ["audio"]["frames"]
    sound = samples(path, how["sample_rate"])
    if len(sound) > frames * how["hop"]:
        sys.exit(f"{path} is longer than the {how['seconds']:g} seconds that the model hears at once: cut it first")
    real = -(-len(sound) // how["hop"])
    padded = np.pad(np.pad(sound, (0, frames * how["hop"] - len(sound))), how["window"] // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(how["window"]) / how["window"])
    places = np.arange(frames)[:, None] * how["hop"] + np.arange(how["window"])
    power = np.abs(np.fft.rfft(padded[places] * window)) ** 2
    mel = np.log10(np.maximum(power @ np.load(HERE / how["filters"]), 1e-10)).T
    mel = (np.maximum(mel, mel.max() - 8) + 4) / 4
    return {"data": mel[None].astype(np.float32), "mask": (np.arange(frames) < real)[None]}
"""

_STREAMS = '''

def streams():
    """What the encoders give, by name; a modality that is missing is one token that is not real."""
    found = {}
    for name in MODALITIES:
        outputs = RECORD["graphs"][f"{name}_encoder"]["outputs"]
        if getattr(given, name) is not None:
            tensors = run(f"{name}_encoder", **READERS[name](getattr(given, name)))
        else:
            width = {key: outputs[key]["shape"][-1] for key in outputs}
            empty = {"tokens": np.zeros((1, 1, width["tokens"]), np.float32), "token_mask": np.zeros((1, 1), bool)}
            tensors = [*empty.values(), *(np.zeros((1, width[key]), np.float32) for key in outputs if key == "pooled")]
        found |= {f"{name}_{key}": tensor for key, tensor in zip(outputs, tensors)}
    return found
'''

_SOFTMAX = """

def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
"""

_ANSWERS = {
    "softmax": """
scores = softmax(logits[0] / ANSWER["temperature"])
best = int(scores.argmax())
answer = {"label": ANSWER["labels"][best], "score": float(scores[best])}
""",
    "sigmoid": """
scores = dict(zip(ANSWER["labels"], (1 / (1 + np.exp(-logits[0].astype(float)))).tolist()))
answer = {"labels": [label for label in scores if scores[label] >= ANSWER["threshold"]], "scores": scores}
""",
    "value": """
answer = {"value": float(logits[0, 0]) * ANSWER["std"] + ANSWER["mean"]}
""",
    "vector": """
answer = {"vector": logits[0].tolist()}
""",
    "logits": """
answer = {"logits": logits[0].tolist()}
""",
    "ctc": """
best = logits[0].argmax(-1)
labels = [int(label) for place, label in enumerate(best) if label and (not place or label != best[place - 1])]
answer = {"text": " ".join("".join(ANSWER["pieces"][label] for label in labels).split())}
""",
    "softmax of each word's first token": """
tags, end, offsets = [], 0, encoded(given.text).offsets
for word in given.text.split():
    start = given.text.index(word, end)
    end = start + len(word)
    first = next((place for place, (a, b) in enumerate(offsets) if b > max(a, start) and a < end), None)
    if first is None:
        sys.exit(f"the word {word!r} has no token")
    tags.append(ANSWER["labels"][int(logits[0, first].argmax())])
answer = {"tags": tags}
""",
    "span": """
pair = encoded(given.text, given.context)
inside = [place for place, text in enumerate(pair.sequence_ids) if text == 1]
if not inside:
    sys.exit("the context is empty")
start, end = logits[0, :, 0], logits[0, :, 1]
pairs = [(a, b) for a in inside for b in inside if a <= b < a + ANSWER["max_answer_tokens"]]
first, last = max(pairs, key=lambda span: start[span[0]] + end[span[1]])
answer = {"text": given.context[pair.offsets[first][0] : pair.offsets[last][1]].strip()}
if ANSWER.get("unanswerable") and start[0] + end[0] - start[first] - end[last] > ANSWER.get("threshold", 0):
    answer = {"text": ""}
""",
}

_PAIRS = """
answer = {side: run(f"{side}_tower", **READERS[side](getattr(given, side)))[0][0].tolist()
          for side in MODALITIES if getattr(given, side) is not None}
if len(answer) == 2:
    answer["cosine"] = float(np.dot(*answer.values()))
"""

_LANGUAGE = """
tokenizer = Tokenizer.from_file(str(HERE / READ["text"]["tokenizer"]))
ids = tokenizer.encode(given.text, add_special_tokens=False).ids
if READ["text"].get("begin_id") is not None:
    ids = [READ["text"]["begin_id"], *ids]
score, known, most = None, len(ids), ANSWER["context"] or len(ids) + 20
if not 0 < known < most:
    sys.exit(f"the text has {known} tokens: the model reads 1 or more, and at most {most} with what it writes")
while len(ids) < min(known + 20, most):  # the most probable token each time
    logits = run("model", ids=np.array([ids]), mask=np.ones((1, len(ids)), bool))[0][0]
    if score is None:
        chances = np.log(softmax(logits[:-1].astype(float)))
        score = float(chances[np.arange(known - 1), ids[1:]].sum())  # log P of the text given its first token
    if int(logits[-1].argmax()) in READ["text"]["stop_ids"]:
        break
    ids.append(int(logits[-1].argmax()))
written = [token for token in ids[known:] if token not in READ["text"]["hidden"]]
answer = {"score": score, "text": tokenizer.decode(written, skip_special_tokens=False)}
"""

_WRITE = """
read, ids, most = streams(), list(ANSWER["begin"]), ANSWER["generation"]["max_new_tokens"]
while len(ids) < len(ANSWER["begin"]) + min(most, ANSWER["context"] or most):  # the most probable token each time
    logits = run("decoder", ids=np.array([ids]), **read)[0][0, -1]
    logits[ANSWER["suppress"]] = -np.inf
    if len(ids) == len(ANSWER["begin"]):
        logits[ANSWER["suppress_first"]] = -np.inf
    if int(logits.argmax()) in ANSWER["stop"]:
        break
    ids.append(int(logits.argmax()))
tokenizer = Tokenizer.from_file(str(HERE / READ["written"]["tokenizer"]))
written = [token for token in ids[len(ANSWER["begin"]) :] if token not in READ["written"]["hidden"]]
answer = {"text": tokenizer.decode(written, skip_special_tokens=False)}
"""


def write_example(name: str, task: str, format: str, facts: Mapping[str, Any], folder: Path) -> None:
    """Write README.md and, where there is an example of such a model, example.py."""
    code = _code(format, facts)
    if code:
        write_file(folder / "example.py", code)
    write_file(folder / "README.md", _readme(plain_name(name), task, format, facts, code))


def _code(format: str, facts: Mapping[str, Any]) -> str:
    """The example, "" for models that are put together from too many pieces."""
    graphs, read, answer = facts["graphs"], facts["preprocessing"], facts["answer"]
    names = [name for name in read if name != "written"]
    if "language_model" in graphs or not set(names) <= {"text", "image", "audio"}:
        return ""
    whole = answer["kind"] in ("span", "softmax of each word's first token")  # of which none may be cut off
    readers = {"text": _WHOLE_TEXT if whole else _TEXT, "image": _PICTURE + _IMAGE, "audio": _SOUND + _AUDIO}
    if "settings" in read.get("image", ()):
        readers["image"] = _PICTURE + _LIBRARY_IMAGE
    if "log_mel" in read.get("audio", ()):
        readers["audio"] = _SOUND + _FRAMES
    several = "head" in graphs or "decoder" in graphs
    spoken = answer["kind"] == "next token" and not several
    body = _body(graphs, answer, names)
    parts = [_RUN[format], *(readers[name] for name in names if not spoken), _STREAMS if several else ""]
    parts += [_SOFTMAX if "softmax" in body else ""]
    made = ", ".join(f'"{name}": read_{name}' for name in names)
    table = "" if spoken or "READERS" not in body + _STREAMS * several else f"READERS = {{{made}}}\n"
    return (
        _start(format, names, answer, "".join(parts) + body)
        + "".join(parts)
        + "\n"
        + _arguments(names, answer)
        + table
        + body
        + _END
    )


def _body(graphs: Mapping[str, Any], answer: Mapping[str, Any], names: list[str]) -> str:
    if answer["kind"] == "cosine":
        return _PAIRS
    if answer["kind"] == "next token":
        return _WRITE if "decoder" in graphs else _LANGUAGE
    if "head" in graphs:
        return '\nlogits = run("head", **streams())[0]' + _ANSWERS[answer["kind"]]
    pair = ", given.context" if answer["kind"] == "span" else ""
    return f'\nlogits = run("model", **read_{names[0]}(given.{names[0]}{pair}))[0]' + _ANSWERS[answer["kind"]]


_END = "print(json.dumps(answer, ensure_ascii=False))\n"


def _start(format: str, names: list[str], answer: Mapping[str, Any], code: str) -> str:
    library = "onnxruntime" if format == "onnx" else "torch"
    standard = ["argparse", "functools", "json", *(["sys"] if "sys." in code else [])]
    others = ["numpy as np", library, *(["soundfile"] if "soundfile." in code else [])]
    lines = [f"import {name}" for name in standard] + ["from pathlib import Path", ""]
    lines += [f"import {name}" for name in others]
    lines += ["from PIL import Image, ImageOps"] if "image" in names else []
    lines += ["from tokenizers import Tokenizer"] if "text" in names or answer["kind"] == "next token" else []
    lines += [
        "",
        "HERE = Path(__file__).parent",
        'RECORD = json.loads((HERE / "export.json").read_text(encoding="utf-8"))',
        'READ, ANSWER, MODALITIES = RECORD["preprocessing"], RECORD["answer"], RECORD["modalities"]',
    ]
    return "\n".join(lines) + "\n"


def _arguments(names: list[str], answer: Mapping[str, Any]) -> str:
    several = len(names) > 1
    names = [*names, *(["context"] if answer["kind"] == "span" else [])]
    lines = "".join(f'parser.add_argument("--{name}"{"" if several else ", required=True"})\n' for name in names)
    lines = f"\nparser = argparse.ArgumentParser()\n{lines}given = parser.parse_args()\n"
    if several:
        options = ", ".join(f"--{name}" for name in names)
        lines += "if all(value is None for value in vars(given).values()):\n"
        lines += f'    parser.error("give at least one of {options}")\n'
    if answer["kind"] == "softmax of each word's first token":
        lines += 'given.text = " ".join(given.text.split())\n'
    return lines


def _readme(name: str, task: str, format: str, facts: Mapping[str, Any], code: str) -> str:
    rows, answer = "\n".join(_row(graph) for graph in facts["graphs"].values()), facts["answer"]
    return _README.format(
        name=name,
        task=task,
        format="ONNX" if format == "onnx" else "torch.export",
        rows=rows,
        notes=(_PROGRAMS if format == "torch-export" else "") + _heard(facts["preprocessing"].get("audio", {})),
        media=_MEDIA if "language_model" in facts["graphs"] else "",
        greedy=_greedy(answer.get("generation", {})) if code else "",
        example=f"\n## Example\n\n`example.py`:\n\n```python\n{code}```\n" if code else "",
    )


def _greedy(generation: Mapping[str, Any]) -> str:
    """What the example leaves out of how the model itself writes, "" where that is all."""
    usual = {"beams": 1, "temperature": 0, "repetition_penalty": 1, "min_new_tokens": 0, "stop": []}
    own = [f"{key} {generation[key]}" for key in usual if generation.get(key, usual[key]) not in (usual[key], ())]
    return _GREEDY.format(own=", ".join(own)) if own else ""


def _heard(audio: Mapping[str, Any]) -> str:
    return _HEARD.format(seconds=audio["log_mel"]["seconds"]) if "log_mel" in audio else ""


def _row(graph: Mapping[str, Any]) -> str:
    def shown(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {one['type']} ({', '.join(map(str, one['shape']))})" for name, one in values.items())

    limits = [f"{name} {key} {most}" for name, limit in graph["limits"].items() for key, most in limit.items()]
    alone = [] if graph["padding"] else ["rows of one length together, never padded"]
    cells = (f"`{graph['file']}`", shown(graph["inputs"]), shown(graph["outputs"]), "; ".join(limits + alone))
    return f"| {' | '.join(cells)} |"


_PROGRAMS = """
A .pt2 file is an archive of tensors and a description of the graph, for `torch.export.load` alone. mmhub never reads
one. Load only files whose origin you trust: compare them with the sha256 in export.json first.
"""

_HEARD = """
The model hears {seconds:g} seconds of sound at once. `mmhub predict` reads longer recordings in parts, the example
refuses them.
"""

_MEDIA = """
The language model reads embedded tokens: `embedding` turns ids into them, an encoder a picture or sound. Put them
behind each other in the order in which they are said, as `chat_template.jinja` lays out a conversation, and run
`language_model` on all; the next token is the best of the last row of logits.
"""

_GREEDY = """
The example writes the most probable token each time. `mmhub predict` writes as `generation` in `answer` says, here with
{own}, so its texts may differ.
"""

_README = """# {name}, as {format}

A model for {task}, written by `mmhub export`. It runs without mmhub. Masks are bool, True is real, and padding stands
on the right. `export.json` holds how raw inputs become tensors (`preprocessing`), what logits mean (`answer`), and how
near the graphs come to the model (`checks`).

| graph | inputs | outputs | limits |
|---|---|---|---|
{rows}
{notes}{media}{greedy}{example}"""
