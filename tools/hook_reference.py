"""Write docs/hooks.md from the hooks and their records: `python tools/hook_reference.py > docs/hooks.md`."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

from mmhub import hookspecs, interfaces, spec

ROOT = Path(__file__).parents[1]
RECORDS = (
    spec.DataSource,
    spec.DataRequest,
    spec.Tracker,
    spec.Guard,
    interfaces.ForeignReader,
    interfaces.ForeignParts,
    interfaces.ForeignWriter,
)
INTRO = """# Hooks

Made from `mmhub/hookspecs.py` by `tools/hook_reference.py`; do not edit.

A plugin implements a hook in the module that its `mmhub` entry point names, marked with `mmhub.spec.hookimpl`, and
lists the hook's name under `hooks` in its `mmhub.toml`. The module is imported only when one of those hooks fires.
Arguments are passed by name, and an implementation may take fewer. New arguments may be added to a hook, none is taken
away or renamed within one `api`. A plugin that fails in a hook costs one line on stderr and its own results, unless
its text here says otherwise.

Components (encoders, fusions, decoders), commands and model names need no hook: the manifest alone declares them
([write a plugin](write-a-plugin.md)).

```python
from mmhub.spec import DataSource, hookimpl


@hookimpl
def mmhub_datasets() -> list[DataSource]:
    return [DataSource(scheme="sql", open=open_table, summary="a table of an SQLite file")]
```
"""


def reference() -> str:
    """Return docs/hooks.md."""
    parts = [INTRO, "| hook | used by |\n|---|---|"]
    parts[1] += "".join(f"\n| [`{name}`](#{name}) | {', '.join(users(name))} |" for name in hookspecs.hook_names())
    parts += [_hook(name) for name in hookspecs.hook_names()]
    parts += ["## Records", *(_record(cls) for cls in RECORDS)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def users(hook: str) -> list[str]:
    """Return the plugins of this repository that declare a hook."""
    manifests = sorted(
        [*ROOT.glob("plugins/*/mmhub_*/mmhub.toml"), *ROOT.glob("examples/plugins/*/mmhub_*/mmhub.toml")]
    )
    return [path.parents[1].name for path in manifests if hook in tomllib.loads(path.read_text()).get("hooks", [])]


def _hook(name: str) -> str:
    function = getattr(hookspecs, name)
    return f"## {name}\n\n```python\ndef {name}{_signature(function)}\n```\n\n{_markdown(function)}"


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def _record(cls: type) -> str:
    module = "mmhub.interfaces" if cls.__module__.startswith("mmhub.interfaces") else cls.__module__
    members = [f"- `{name}: {kind}`" for name, kind in inspect.get_annotations(cls).items() if not name.startswith("_")]
    members = [] if "Attributes:" in (cls.__doc__ or "") else members
    members += [f"- `{name}{_method(value)}`: {_first_line(value)}" for name, value in _methods(cls)]
    return f"### {module}.{cls.__name__}\n\n{_markdown(cls)}\n\n" + "\n".join(members)


def _methods(cls: type) -> list[tuple[str, Any]]:
    return [(n, v) for n, v in vars(cls).items() if inspect.isfunction(v) and not n.startswith("_") and v.__doc__]


def _method(function: Any) -> str:
    return _signature(function).replace("(self, ", "(").replace("(self)", "()")


def _first_line(function: Any) -> str:
    return " ".join((inspect.getdoc(function) or "").split())


def _markdown(thing: Any) -> str:
    """Turn a docstring's `Args:` and `Attributes:` sections into lists; the rest stays as it is."""
    lines: list[str] = []
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line in ("Args:", "Attributes:"):
            inside = True
            line = f"**{'Arguments' if line == 'Args:' else 'Attributes'}**\n"
        elif inside and line.strip():
            line = re.sub(r"^    (\w[\w, ]*): ", lambda found: f"- {_code(found[1])}: ", line)
            line = line.replace("        ", "  ", 1) if line.startswith("        ") else line
        lines.append(line)
    return "\n".join(lines)


def _code(names: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in names.split(","))


if __name__ == "__main__":
    print(reference(), end="")
