"""`mmhub plugins new`: write the package of a new plugin from the templates that ship with mmhub."""

from __future__ import annotations

import keyword
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click

from mmhub import __version__
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.discovery import command_table
from mmhub.errors import MmhubError, TrustError, UsageError, did_you_mean
from mmhub.install.request import check_name, known_plugins
from mmhub.plugins import call_hook, get_index
from mmhub.records import canonical
from mmhub.registry import read_registries
from mmhub.spec import API, DataSource

LONGEST = 40  # characters of a name: the lines of the templates have room for that
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_.]+[A-Za-z0-9]+)*")
_MODALITY = re.compile(r"[a-z][a-z0-9_]*")
_OWN_MODALITIES = ("text", "image", "audio")

# what a ModuleDict of encoders cannot hold; written down because importing torch takes seconds
_TORCH_WORDS = """
add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches eval
extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys load_state_dict
modules mtia named_buffers named_children named_modules named_parameters parameters pop register_backward_hook
register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
set_submodule share_memory smart_apply state_dict to to_empty train training type update values xpu zero_grad
"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is special about one kind of plugin.

    Attributes:
        what: words for the description. part: the module that holds the code. provides: the kind of what the name
        stands for, as `provides` of registry.toml has it, '' if the name is the package's alone. needs: requirements.
        hooks: is the part the module of its hooks? untyped: modules without type information.
    """

    what: str
    part: str
    provides: str = ""
    needs: tuple[str, ...] = ("torch",)
    hooks: bool = False
    untyped: tuple[str, ...] = ()


KINDS = {
    "text-encoder": Kind(what="text encoder", part="encoder", provides="text_encoder"),
    "image-encoder": Kind(
        what="image encoder", part="encoder", provides="image_encoder", needs=("numpy", "pillow", "torch")
    ),
    "audio-encoder": Kind(
        what="audio encoder",
        part="encoder",
        provides="audio_encoder",
        needs=("soundfile", "torch"),
        untyped=("soundfile",),
    ),
    "encoder": Kind(what="encoder", part="encoder", provides="{modality}_encoder"),
    "fusion": Kind(what="fusion", part="fusion", provides="fusion"),
    "head": Kind(what="task head", part="head", provides="decoder"),
    "data-source": Kind(what="data source", part="source", provides="data_source", needs=(), hooks=True),
    "tracker": Kind(what="experiment tracker", part="tracker", needs=(), hooks=True),
    "guard": Kind(what="guard", part="guard", needs=(), hooks=True),
    "command": Kind(what="command", part="command", provides="command", needs=("click",)),
}


@click.command()
@click.argument("kind")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.  [default: mmhub-NAME]")
@click.option("--modality", help="What an `encoder` reads, if not text, images or audio.  [default: NAME]")
@json_option
@quiet_option
def new(kind: str, name: str, out: Path | None, modality: str | None, as_json: bool, quiet: bool) -> None:
    """Write the package of a new plugin: something small of that KIND that works, with tests.

    NAME is what recipes will call it; the package becomes mmhub-NAME. KIND is one of:

    \b
      text-encoder   image-encoder   audio-encoder
      encoder        of any other modality
      fusion         joins modalities
      head           turns what they say into answers
      data-source    reads rows for training
      tracker        follows training runs
      guard          refuses inputs and cleans answers
      command        runs as `mmhub NAME`
    """
    kind, modality = _usual_kind(kind, modality)
    if kind not in KINDS:
        raise UsageError(f"there is no kind {kind!r}", did_you_mean(kind, KINDS) or f"kinds: {', '.join(KINDS)}")
    name = _check_name(name)
    modality = _check_modality(kind, name, modality)
    _check_free(KINDS[kind], name, modality)
    folder = out or Path(f"mmhub-{name}")
    content = dict(render(kind, name, modality))
    _write(folder, content)
    steps = _next_steps(folder, name)
    data = {
        "kind": kind,
        "name": name,
        "distribution": f"mmhub-{name}",
        "module": _module(name),
        "folder": str(folder),
        "files": sorted(content),
        "next": steps,
    }
    emit(data, as_json, f"{folder}")
    note(f"wrote {len(content)} files; what to do next:\n" + "\n".join(f"  {step}" for step in steps), quiet or as_json)


def render(kind: str, name: str, modality: str) -> Iterator[tuple[str, str]]:
    """Yield path and content of every file of a package."""
    parts, module = KINDS[kind], _module(name)
    words = _words(parts, name, modality)
    common, own = (files("mmhub") / "templates" / folder for folder in ("package", kind))
    places = {
        "init.py": f"{module}/__init__.py",
        "mmhub.toml": f"{module}/mmhub.toml",
        "words.txt": f"{module}/words.txt",
        f"{parts.part}.py": f"{module}/{parts.part}.py",
        "test.py": f"tests/test_{parts.part}.py",
        "test_contract.py": "tests/test_contract.py",
        "ci.yml": ".github/workflows/ci.yml",
        "gitignore": ".gitignore",
    }
    words["usage"] = Template((own / "usage.md.tmpl").read_text("utf-8")).substitute(words).strip()
    for template in (*common.iterdir(), *own.iterdir()):
        file = template.name.removesuffix(".tmpl")
        if file != "usage.md":
            yield places.get(file, file), Template(template.read_text("utf-8")).substitute(words)
    yield f"{module}/py.typed", ""


def _words(kind: Kind, name: str, modality: str) -> dict[str, str]:
    """What stands in for the placeholders of the templates."""
    major, minor = __version__.split(".")[:2]
    span, module = f">={major}.{minor},<{int(major) + 1}", _module(name)
    override = f"\n[[tool.mypy.overrides]]\nmodule = {list(kind.untyped)}\nignore_missing_imports = true\n"
    return {
        "name": name,
        "title": _title(name, kind.part),
        "dist": f"mmhub-{name}",
        "module": module,
        "entry": f"{module}.{kind.part}" if kind.hooks else module,
        "modality": modality,
        "summary": f"The {kind.what} `{name}` for mmhub",
        "range": span,
        "needs": ", ".join(f'"{need}"' for need in (f"mmhub{span}", *kind.needs)),
        "mypy": override.replace("'", '"') if kind.untyped else "",
        "api": str(API),
        "year": time.strftime("%Y"),
    }


def _module(name: str) -> str:
    return "mmhub_" + name.replace("-", "_")


def _title(name: str, part: str) -> str:
    """Begin the names of classes: `tiny` and `tiny-encoder` -> `Tiny`, to which `Encoder` is added."""
    words = name.split("-")
    kept = words[:-1] if len(words) > 1 and words[-1] == part else words
    return "".join(word.capitalize() for word in kept)


def _next_steps(folder: Path, name: str) -> list[str]:
    place = str(folder) if re.fullmatch(r"[\w./-]+", str(folder)) else f"'{folder}'"
    tester = [] if find_spec("pytest") else ["pip install pytest" if find_spec("pip") else "uv pip install pytest"]
    return [f"cd {place}", "mmhub plugins install -e .", f"mmhub plugins check {name}", *tester, "pytest"]


def _usual_kind(kind: str, modality: str | None) -> tuple[str, str | None]:
    """Take what people write for a kind: `text_encoder`, `decoder`, or `encoder --modality text`."""
    kind = kind.lower().replace("_", "-")
    kind = {"decoder": "head", "datasource": "data-source", "source": "data-source"}.get(kind, kind)
    if kind == "encoder" and modality in _OWN_MODALITIES:
        return f"{modality}-encoder", None
    if kind.endswith("-encoder") and kind.removesuffix("-encoder") == modality:
        return kind, None
    return kind, modality


# --- what is refused


def _check_name(given: str) -> str:
    """Return the short name in its canonical spelling, without `mmhub-`."""
    if not _NAME.fullmatch(given):
        raise UsageError(
            f"{given!r} cannot be the name of a package", "use letters, digits and '-', a letter first: my-encoder"
        )
    name = canonical(given).removeprefix("mmhub-")
    if len(name) > LONGEST:
        raise UsageError(f"the name has {len(name)} characters, more than {LONGEST}", "choose a shorter one")
    if name == "mmhub" or not name[0].isalpha():
        raise UsageError(f"{given!r} leaves no name after 'mmhub-' that begins with a letter", "choose another")
    if keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
        raise UsageError(f"{name!r} is a word of Python itself", f"choose another name, such as my-{name}")
    return name


def _check_modality(kind: str, name: str, modality: str | None) -> str:
    if kind != "encoder":
        if modality is not None:
            raise UsageError(f"--modality is for the kind 'encoder', not for {kind!r}", "leave it out")
        return ""
    modality = name.replace("-", "_") if modality is None else modality
    if modality in _OWN_MODALITIES:
        raise UsageError(f"{modality!r} has a kind of its own", f"mmhub plugins new {modality}-encoder NAME")
    if not _MODALITY.fullmatch(modality) or len(modality) > LONGEST or modality == "fused":
        raise UsageError(
            f"{modality!r} cannot be a modality", "use lower-case letters, digits and '_', a letter first: heart_rate"
        )
    if modality in _TORCH_WORDS.split():
        raise UsageError(f"{modality!r} cannot be a modality: it is a word of PyTorch", f"try {modality}_data")
    return modality


def _check_free(kind: Kind, name: str, modality: str) -> None:
    """Refuse a name that would make two plugins, or two things of one kind, hard to tell apart."""
    distribution, registries = f"mmhub-{name}", read_registries()
    installed = get_index().plugin(distribution)
    if installed:
        raise UsageError(
            f"a plugin of that name is installed: {installed}",
            f"choose another name, or remove it first: mmhub plugins uninstall {distribution}",
        )
    if registries.plugin_requirement(distribution):
        raise UsageError(f"a registry lists a plugin called {distribution}", "choose another name")
    try:
        check_name(distribution, known_plugins(registries))
    except TrustError as error:
        why = error.message.partition("; ")[0]
        raise UsageError(f"{why}: `mmhub plugins install` would refuse it", "choose another name") from None
    if not kind.provides:
        return
    provides = kind.provides.format(modality=modality)
    owner = _provider(provides, name) or registries.requirement(f"{provides}:{name}")
    if owner:
        raise UsageError(f"the {kind.what} {name!r} exists already, in {owner}", "choose another name")
    if kind.provides == "data_source" and len(name) < 2:
        raise UsageError(f"'{name}:' would be a drive of Windows", "choose a name of two letters or more")


def _provider(provides: str, name: str) -> str:
    """Say what provides that name, '' if nothing that is installed does."""
    if provides == "command":
        from mmhub.cli.main import COMMANDS

        owners: Mapping[str, str] = {command: row[2] for command, row in command_table().items()}
        return "mmhub itself" if name in COMMANDS else owners.get(name, "")
    if provides == "data_source":
        sources = [source.scheme for source in call_hook("mmhub_datasets") if isinstance(source, DataSource)]
        return "mmhub itself" if name == "hub" else "an installed plugin" if name in sources else ""
    found = [part for part in get_index().components(provides) if part.spec.name == name]
    return f"{found[0].distribution} {found[0].version}" if found else ""


# --- writing


def _write(folder: Path, content: Mapping[str, str]) -> None:
    """Write a folder that is not there yet; when that fails half-way, nothing of it stays."""
    if os.path.lexists(folder):
        raise UsageError(f"'{folder}' exists, and nothing is overwritten", "name another folder with --out")
    try:
        os.makedirs(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        for place, text in content.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(folder, error) from None
        raise


def _cannot_write(folder: Path, error: OSError) -> MmhubError:
    return MmhubError(f"cannot write to '{folder}': {error.strerror or error}", "choose another folder with --out")
