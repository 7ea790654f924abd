"""A team hub that speaks the Hugging Face Hub protocol, for loopback use and for tests.

`HubServer` is the whole public surface: it runs the server inside a program. `mmhub hub serve` runs it in a terminal.
"""

from mmhub_hubserver.server import HubServer

__all__ = ["HubServer"]
