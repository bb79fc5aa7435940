"""Runs a workflow of unmodified Python to its end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import Any

from nalar_mq import depth, runs
from nalar_mq.call_context import current_context


def run_driver(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Runs a workflow in this thread and returns its result in values; a generator for a generator.

    All calls it makes have ended when it returns, in whichever thread they were made; an error of one that nobody has looked
    at is raised. Async workflows get an event loop of their own, since plain Python may block it.
    """
    if inspect.iscoroutinefunction(function):
        with runs.run_scope(carried=(current_context,)):
            return asyncio.run(function(*args, **kwargs))
    if inspect.isasyncgenfunction(function):
        return _drained(function, args, kwargs)
    if inspect.isgeneratorfunction(function):
        return _pieces(function, args, kwargs)
    return runs.run(function, *args, carried=(current_context,), **kwargs)


def _pieces(function: Callable[..., Iterator[Any]], args: list[Any], kwargs: dict[str, Any]) -> Generator[Any]:
    with runs.run_scope(carried=(current_context,)):
        for piece in function(*args, **kwargs):
            yield depth.deep(piece)


def _drained(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Generator[Any]:
    with runs.run_scope(carried=(current_context,)), asyncio.Runner() as runner:
        pieces = function(*args, **kwargs)
        while True:
            try:
                yield runner.run(anext(pieces))
            except StopAsyncIteration:
                return
