"""Rows from the data sources of plugins: `SCHEME:ADDRESS`, through the hook `mmhub_datasets`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmhub.data.parts import Part, find_path, no_such_path, scheme_of, shown_name
from mmhub.data.tables import open_objects
from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError, did_you_mean
from mmhub.plugins import Plugin, hook_items, install_line
from mmhub.records import cause
from mmhub.registry import read_registries
from mmhub.spec import DataRequest, DataSource


def find_source(scheme: str) -> tuple[Plugin, DataSource]:
    """Return the data source of that scheme and the plugin it comes from.

    Raises:
        NotFoundError: nobody has it. PluginError: two plugins have it, or a known one that is not installed.
    """
    offered = list(_offered())
    found = [(plugin, source) for plugin, source in offered if source.scheme == scheme]
    if len(found) > 1:
        both = " and ".join(str(plugin) for plugin, _ in found)
        hint = f"switch one off: MMHUB_DISABLE_PLUGINS={found[0][0].distribution}"
        raise PluginError(f"the data source '{scheme}:' is provided by {both}", hint)
    if not found:
        raise _no_source(scheme, [source.scheme for _, source in offered])
    return found[0]


def _offered() -> Iterator[tuple[Plugin, DataSource]]:
    for plugin, source in hook_items("mmhub_datasets"):
        if isinstance(source, DataSource) and scheme_of(f"{source.scheme}:") == source.scheme:
            yield plugin, source
        else:
            print(f"plugin {plugin} gives no valid data source: {source!r}"[:300], file=sys.stderr)


def _no_source(scheme: str, known: list[str]) -> PluginError | NotFoundError:
    requirement = read_registries().requirement(f"data_source:{scheme}")
    if requirement:
        return PluginError(f"the data source '{scheme}:' is in a plugin that is missing", install_line([requirement]))
    names = ["hub", *known]
    hint = did_you_mean(scheme, names) or f"schemes: {', '.join(f'{name}:' for name in names)}"
    return NotFoundError(f"no file and no installed plugin's data source is called '{scheme}:'", hint)


def open_plugged(text: str, base: Path | None, split: str) -> Part:
    """Open `SCHEME:ADDRESS`; relative paths start from `base`, then from the current folder.

    Raises:
        NotFoundError: no plugin has such a source. PluginError: the plugin's code fails.
        MmhubError: what its source raises for an address it cannot read.
    """
    scheme = scheme_of(text)
    plugin, source = find_source(scheme)
    files: dict[str, Path] = {}

    def find(path: str) -> Path:
        found = find_path(path, base)
        if found is None:
            raise no_such_path(path, base)
        files[shown_name(path)] = found
        return found.absolute()

    request = DataRequest(address=text[len(scheme) + 1 :], split=split, find=find)
    part = open_objects(_contained(plugin, source, request), shown_name(text))
    if not part.rows:
        raise InputError(f"data source '{part.name}' has no rows")
    return replace(part, files={name: path for name, path in files.items() if path.is_file()}, reader=str(plugin))


def _contained(plugin: Plugin, source: DataSource, request: DataRequest) -> Iterator[Mapping[str, Any]]:
    """Yield a source's rows; whatever its code raises is one line."""
    try:
        for row in source.open(request):
            if not isinstance(row, Mapping):
                raise TypeError(f"it gave a {type(row).__name__} for a row, not a dict")
            yield row
    except MmhubError:
        raise
    except Exception as error:
        address = shown_name(f"{source.scheme}:{request.address}")
        raise PluginError(f"plugin {plugin} cannot read '{address}': {cause(error)}") from error
