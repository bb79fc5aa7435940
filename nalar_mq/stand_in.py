"""Packages that are loaded when they are first used, although others import them in any case."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def loaded_when_used(name: str) -> Generator[None]:
    """Whoever imports the package `name` within gets a stand-in, which loads it when it is first used.

    One that is not installed is not there, as ever; nobody else meets the stand-in.
    """
    if name in sys.modules or find_spec(name) is None:
        yield
        return
    stand_in = sys.modules[name] = _StandIn(name)
    try:
        yield
    finally:
        stand_in.step_aside()


class _StandIn(ModuleType):
    def step_aside(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked by the import system, not by a user
            raise AttributeError(attribute)
        self.step_aside()
        return getattr(import_module(self.__name__), attribute)
