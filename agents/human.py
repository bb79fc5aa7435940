"""People as tools: for programs that ask somebody and go on with the answer.

Named in a manifest, they ask by the runtime (`nalar_mq.ask`): in a job the question survives everything, and `nalar ps
--waiting` lists it. In a plain program they ask at the terminal.

    [tools.ask]
    source = "nalar_mq.agents.human:ask"
    timeout_s = inf
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from nalar_mq.call_context import current_context
from nalar_mq.people import ask as ask_outside

_YES: Final = ("y", "yes", "true")
_NO: Final = ("n", "no", "false")


def ask(question: str, choices: Sequence[str] = (), timeout_s: float | None = None, default: str | None = None) -> str:
    """The answer of a person, as a text; one of `choices` if there are any.

    Raises:
        CallTimeoutError: nobody has answered within `timeout_s`, and there is no `default`.
    """
    if current_context.get() is None:
        return _asked_at_terminal(question, choices)
    schema: dict[str, Any] = {"type": "string"} | ({"enum": [*choices]} if choices else {})
    fallback = {} if default is None else {"default": default}
    return str(ask_outside(question, schema=schema, timeout_s=timeout_s, **fallback).value())


def approve(question: str, timeout_s: float | None = None, default: bool | None = None) -> bool:
    """True if a person says yes.

    Raises:
        CallTimeoutError: nobody has answered within `timeout_s`, and there is no `default`.
    """
    if current_context.get() is None:
        return _asked_at_terminal(question, (*_YES, *_NO)) in _YES
    fallback = {} if default is None else {"default": default}
    return bool(ask_outside(question, schema={"type": "boolean"}, timeout_s=timeout_s, **fallback).value())


def _asked_at_terminal(question: str, choices: Sequence[str]) -> str:
    hint = f" ({', '.join(choices)})" if choices else ""
    while True:
        answer = input(f"{question}{hint} ").strip()
        if not choices or answer in choices:
            return answer
