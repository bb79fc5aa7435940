"""What was decided about calls in one process, and why: the last of it, for whoever asks. Pure.

A note is about one call, by its id, or about all calls of a session or to an actor. What costs a note is a decision, not a
call: one about which nobody has decided anything leaves none.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from nalar_mq.messages import Explanation

KEPT: Final = 10_000


class _Note(NamedTuple):
    id: bytes
    session: str
    actor: str
    explanation: Explanation


class Explanations:
    """The last `kept` notes."""

    def __init__(self, kept: int = KEPT) -> None:
        self._notes: deque[_Note] = deque(maxlen=kept)

    def note(self, at_s: float, what: str, reason: str, *, id: bytes = b"", session: str = "", actor: str = "") -> None:
        """Something was decided at `at_s`: about the call `id`, or about all of the session and the actor that are named."""
        self._notes.append(_Note(id, session, actor, Explanation(at_s, what, reason)))

    def of_call(self, id: bytes) -> list[Explanation]:
        """What was decided about this one call."""
        return [note.explanation for note in self._notes if note.id == id]

    def of_session(self, session: str, actor: str, until_s: float) -> list[Explanation]:
        """What was decided until then about all calls of a session, or to an actor, or of the one to the other."""
        return [
            note.explanation
            for note in self._notes
            if not note.id
            and note.explanation.at_s <= until_s
            and (note.session or note.actor)
            and note.session in ("", session)
            and note.actor in ("", actor)
        ]
