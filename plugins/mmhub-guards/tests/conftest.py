"""Fixtures of the core's tests."""

from __future__ import annotations

from tests.conftest import _one_thread, _own_caches, client, hub

__all__ = ["_one_thread", "_own_caches", "client", "hub"]
