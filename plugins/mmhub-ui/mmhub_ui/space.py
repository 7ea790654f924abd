"""A folder that is a Hugging Face Space with this app for one model, and the app that runs in it.

README.md           the Space's settings, and what it is
app.py              starts `space_app`
registry.toml       which model: pinned to a commit of the Hub, or the checkpoint in model/
requirements.txt    mmhub, this plugin, and those that the model needs
model/              a local model's checkpoint; .gitattributes puts its weights into Git LFS
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.cli.output import note
from mmhub.cli.text import size_text
from mmhub.errors import UsageError
from mmhub.files import disk_errors, new_folder

if TYPE_CHECKING:
    from mmhub.hub.describe import Description
    from mmhub.names import Resolved

_LARGE = 1_000_000_000  # bytes; a Space is built anew from its repository after each change

_APP = '''"""Try {name} in a browser: an app made by `mmhub ui --export-space`."""

from mmhub_ui.space import launch, space_app

app = space_app(__file__, {name!r})

if __name__ == "__main__":
    launch(app)
'''

_REQUIREMENTS = """\
# Without a GPU torch can be a tenth of the size: add a line `--extra-index-url ADDRESS` above the others, with the
# package index for CPUs that PyTorch's installation page names.
{requirements}
"""

_README = """---
{settings}---

# {name}

{summary}An app that runs mmhub on one model, {where}. It takes what people type and upload,
shows the model's answer, and keeps nothing.

On your machine: `pip install -r requirements.txt`, then `python app.py`. As a Space: `hf upload ORG/NAME . --repo-type
space`. {secret}
"""


def export_space(names: Sequence[str], folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Write a Space for one model to a new folder, all of it or nothing; return what was written.

    A Hub model is fetched by the Space, at the commit it has now; a local model's checkpoint is copied.

    Raises:
        UsageError: not one whole model is named, or the folder is not empty.
        MmhubError: the model cannot be found or read, or has something in its files that may not be published.
    """
    if len(names) != 1:
        raise UsageError("a Space is for one model", "mmhub ui NAME --export-space DIR")
    if folder.resolve() == Path.cwd():
        raise UsageError(f"'{folder}' is the current folder", "name a new folder with --export-space")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists", "name a new folder with --export-space")
    from mmhub.hub.pull import resolve_name

    found = resolve_name(names[0])
    if found.component:
        raise UsageError(f"'{names[0]}' is a part, and a Space shows a whole model", "leave out '#...'")
    if found.kind == "compose":
        raise UsageError(f"'{names[0]}' is a composition, not a checkpoint", "train it from a recipe first")
    with disk_errors("the Space", folder), new_folder(folder) as new:
        size = _write(new, names[0], found)
    if size > _LARGE:
        note(f"the weights take {size_text(size)}: push the model (mmhub push) and make the Space from its name", quiet)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"out": str(folder), "model": names[0], "files": files, "bytes": size}


def space_app(file: str, name: str) -> Any:
    """Return the app of the Space that the app.py `file` is in: that model, and no other name or folder."""
    os.chdir(Path(file).resolve().parent)  # where registry.toml says what the name means
    from mmhub_ui.app import build_app
    from mmhub_ui.context import Context

    return build_app(Context(names=(name,), locked=True))


def launch(app: Any) -> None:
    """Start the app where the Space wants it: Gradio reads the address from GRADIO_SERVER_NAME and _PORT."""
    from mmhub_ui.app import launch_options

    app.launch(**launch_options())


# -- what is written --------------------------------------------------------------------------------------------------


def _write(space: Path, asked: str, found: Resolved) -> int:
    """Write all files; return the bytes of the model among them."""
    from mmhub.hub.describe import describe

    name = _plain(found)
    if found.kind == "local":
        assert found.path is not None
        _copy_model(found.path, space / "model")
        about = describe(replace(found, path=space / "model"))
        ref, where, repos = {"ref": "local:./model"}, "which is in `model/`", []
        (space / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    else:
        about = describe(found)
        ref = {"ref": f"hub:{found.repo_id}", "commit": about.commit}
        where = f"[{found.repo_id}](https://huggingface.co/{found.repo_id}) at `{about.commit[:12]}`"
        repos = [str(found.repo_id)]
    requires = _requirements(about)
    entry = ref | {"task": about.task, "license": about.license, "summary": about.summary}
    texts = {
        "app.py": _APP.format(name=name),
        "registry.toml": _registry(name, entry),
        "requirements.txt": _REQUIREMENTS.format(requirements="\n".join(requires)),
        "README.md": _README.format(
            settings=_settings(name, about, repos),
            name=name,
            summary=f"{about.summary}\n\n" if about.summary else "",
            where=where,
            secret="A private model needs a secret HF_TOKEN that may read it." if repos else "",
        ).rstrip()
        + "\n",
    }
    for file, text in texts.items():
        (space / file).write_text(text, encoding="utf-8")
    return (about.size or 0) if found.kind == "local" else 0


def _plain(found: Resolved) -> str:
    """A name fit for a registry: the last word of where it leads, a run's name for its model/."""
    path = found.path.resolve() if found.path else None
    last = (path.parent.name if path.name == "model" else path.name) if path else str(found.repo_id).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "model"


def _copy_model(source: Path, target: Path) -> None:
    """Copy what may be published of a checkpoint; another library's model is written as one of ours."""
    import mmhub
    from mmhub.checkpoint import is_checkpoint, read_config, verify_files
    from mmhub.hub.staging import stage

    if not is_checkpoint(source):
        mmhub.load(source).save(target)
        return
    config = read_config(source)
    bases = [part.adapter.base for part in config.components.values() if part.adapter and part.adapter.weights]
    if any(base and not base.commit for base in bases):
        raise UsageError(
            f"'{source}' adapts weights that are on this machine alone", "merge it first: mmhub models merge"
        )
    for name in stage(source).files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2((source / name).resolve(), target / name)
    verify_files(target, config)


def _requirements(about: Description) -> list[str]:
    """What pip installs: distributions with their ranges."""
    from mmhub.checkpoint import compatible_range

    found = dict.fromkeys(["mmhub", "mmhub-ui"], "")
    found |= {name: bounds for name, _, bounds in (text.partition(" ") for text in about.requires)}
    return [f"{name}{bounds or compatible_range(metadata.version(name))}" for name, bounds in sorted(found.items())]


def _registry(name: str, entry: Mapping[str, str]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items() if value]
    return "\n".join(["schema = 1", "", f'[models."{name}"]', *lines, ""])


def _settings(name: str, about: Description, repos: Sequence[str]) -> str:
    """The front matter that makes a repository a Space."""
    import gradio
    from huggingface_hub import SpaceCardData

    settings = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=gradio.__version__,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license=about.license or None,
        models=list(repos) or None,
        tags=["mmhub"],
    )
    return settings.to_yaml() + "\n"
