"""Where a model's guards come from: tables {use, config} of recipes, of checkpoints, and of the file MMHUB_GUARDS."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mmhub.config import GuardRecipe
from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError, UsageError
from mmhub.interfaces.config import decode_config, encode_config
from mmhub.plugins import Component
from mmhub.records import cause
from mmhub.registry import find_component

if TYPE_CHECKING:
    from mmhub.spec import Guard


class GuardRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A guard in config.json."""

    use: str
    schema: int = 1
    config: dict[str, Any] = {}


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file that MMHUB_GUARDS names."""

    guards: list[GuardRecipe] = []


@dataclass(frozen=True)
class GuardSource:
    """A guard that is configured: its component, its configuration, and the folder that relative paths start from."""

    component: Component
    config: Any
    folder: Path | None = None

    @property
    def record(self) -> GuardRecord:
        """How a checkpoint holds it."""
        return GuardRecord(self.component.id, self.component.spec.schema, encode_config(self.config))

    def build(self, model: Any) -> Guard:
        """Return the guard of a model.

        Raises:
            PluginError: its code fails.
        """
        try:
            guard: Guard = self.component.load()(self.config, model=model, folder=self.folder)
        except MmhubError:
            raise
        except Exception as error:
            what = f"plugin {self.component.distribution} {self.component.version} cannot build its guard"
            raise PluginError(f"{what} {self.component.spec.name!r}: {cause(error)}") from error
        return guard


def read_guards(tables: Sequence[GuardRecipe], where: str, folder: Path | None = None) -> list[GuardSource]:
    """Check tables {use, config}; `where` is the file or recipe that errors name.

    Raises:
        PluginError, NotFoundError: nobody provides a guard. UsageError: its configuration is wrong.
    """
    found = []
    for number, table in enumerate(tables, 1):
        place = f"{where}: guards {number}"
        if not table.use:
            raise UsageError(f"{place}: the key 'use' is missing", 'name a guard, such as use = "wordlist"')
        component = find_component("guard", table.use)
        found.append(GuardSource(component, decode_config(component.load().Config, table.config, place), folder))
    return found


def guards_of_process() -> list[GuardSource]:
    """Return the guards that MMHUB_GUARDS adds to every model of this process.

    Raises:
        NotFoundError, InputError, UsageError, PluginError: the file is missing, unreadable or wrong.
    """
    name = os.environ.get("MMHUB_GUARDS", "")
    if not name:
        return []
    path = Path(name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no file of guards '{path}'", "MMHUB_GUARDS names a TOML file with [[guards]]") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the guards '{path}': {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"'{path}' nests too deeply") from None
    tables = decode_config(_File, table, str(path)).guards
    if not tables:
        raise UsageError(f"'{path}' names no guard", "give it tables [[guards]], or unset MMHUB_GUARDS")
    return read_guards(tables, str(path), path.absolute().parent)
