"""A team hub that speaks the Hugging Face Hub protocol, for loopback use and for tests.

`HubServer` is the whole public surface: it runs the server inside a program. `mmhub hub serve` runs it in a terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmhub_hubserver.server import HubServer

__all__ = ["HubServer"]


def __getattr__(name: str) -> Any:
    # The server brings templates, Markdown and git along, which importing the package alone should not cost.
    if name == "HubServer":
        from mmhub_hubserver.server import HubServer

        return HubServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
