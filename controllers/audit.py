"""What a leader tells people of its decisions: what is new, refusals and reports that were not used included, and why.

    Decision, Unused ──note──▶ Decided ──write──▶ NS.decided, kept in NS-decisions

The same refusal, the same error and the same sort of report of the same process are told once a minute, so that a policy that
says the same nonsense four times a second does not fill the history. What the broker does not take is kept and written later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final

import msgspec

from nalar_mq.actions import Decided, Ranking, Refused, Unused, describe, encode_decided
from nalar_mq.errors import BrokerError
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.transport import Ledger

from .governing import Decision
from .guards import Refusal
from .policy import SetPriorities

AGAIN_S: Final = 60.0
RECENT: Final = 32
_UNWRITTEN: Final = 256
_NAMED: Final = 64
_KEYS: Final = 4096
_log = logger(__name__)


class AuditTrail:
    """The history of one controller.

    Args:
        controller: its name.
        policy: what it asks.
        clock: seconds since 1970, or since whatever else.

    Attributes:
        recent: the last entries that were written, or are to be.
    """

    def __init__(self, controller: str, policy: str, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._controller = controller
        self._policy = policy
        self._unwritten: deque[Decided] = deque(maxlen=_UNWRITTEN)
        self._told_at: dict[Hashable, float] = {}
        self._unused: dict[tuple[str, str], Unused] = {}
        self._is_ranked = False
        self._reason = ""
        self.recent: deque[Decided] = deque(maxlen=RECENT)

    def note_lead(self, term: int) -> None:
        """It leads from now on."""
        self._is_ranked = False
        self._add(Decided(version=WIRE_VERSION, controller=self._controller, policy=self._policy, term=term, took_lead=True))

    def note(self, term: int, decision: Decision, complaints: Iterable[Unused], now: float) -> None:
        """What has come of a round.

        Args:
            term: of the lead.
            decision: of the policy.
            complaints: reports that were not used since the last time.
            now: on the clock of the decision.
        """
        refusals = [refusal for refusal in decision.refusals if self._is_news((_what(refusal), refusal.reason), now)]
        reports = self._due(complaints, now)
        error = decision.error if decision.error and self._is_news(decision.error, now) else ""
        if error:
            _log.warning("policy.failed", error=error)
        ranked = self._new_ranking(decision)
        if not (decision.began or decision.ended or decision.acts or refusals or reports or error or ranked):
            return
        everything = (decision.began, decision.ended, decision.acts, refusals, reports)
        self._add(
            Decided(
                version=WIRE_VERSION,
                controller=self._controller,
                policy=self._policy,
                term=term,
                number=decision.number,
                began=decision.began[:_NAMED],
                ended=decision.ended[:_NAMED],
                ranked=ranked,
                acts=decision.acts[:_NAMED],
                refused=tuple(Refused(_what(refusal), refusal.reason) for refusal in refusals[:_NAMED]),
                reports=tuple(reports[:_NAMED]),
                error=error,
                left_out=sum(max(len(part) - _NAMED, 0) for part in everything),
            )
        )

    def _new_ranking(self, decision: Decision) -> Ranking | None:
        """The priorities of many, if they are given for another reason than before."""
        ranking = Ranking(*decision.ranked)
        if decision.error or (bool(ranking.sessions) == self._is_ranked and ranking.reason in ("", self._reason)):
            return None
        self._is_ranked, self._reason = bool(ranking.sessions), ranking.reason
        return ranking

    def _add(self, entry: Decided) -> None:
        entry = msgspec.structs.replace(entry, at_s=round(self._clock(), 3))
        self._unwritten.append(entry)
        self.recent.append(entry)

    def _is_news(self, key: Hashable, now: float) -> bool:
        if now - self._told_at.get(key, float("-inf")) < AGAIN_S:
            return False
        if len(self._told_at) >= _KEYS:
            self._told_at = {known: at for known, at in self._told_at.items() if now - at < AGAIN_S}
            if len(self._told_at) >= _KEYS:
                return False
        self._told_at[key] = now
        return True

    def _due(self, complaints: Iterable[Unused], now: float) -> list[Unused]:
        """The reports to be told of now; the others are counted until they are."""
        for unused in complaints:
            key = unused.process, unused.error
            before = self._unused[key].count if key in self._unused else 0
            if before or len(self._unused) < _KEYS:
                self._unused[key] = msgspec.structs.replace(unused, count=before + unused.count)
        due = [key for key in self._unused if self._is_news(key, now)]
        return [self._unused.pop(key) for key in due]

    def take(self) -> list[Decided]:
        """What has not been written yet, for whoever does not write it."""
        entries = list(self._unwritten)
        self._unwritten.clear()
        return entries

    async def write(self, ledger: Ledger, subject: str) -> None:
        """Appends what has not been written yet; what the broker does not take now stays for the next time."""
        while self._unwritten:
            entry = self._unwritten[0]
            try:
                await ledger.append(subject, encode_decided(entry))
            except BrokerError as error:
                _log.debug("history.not_kept", error=str(error))
                return
            if self._unwritten and self._unwritten[0] is entry:
                self._unwritten.popleft()


def _what(refusal: Refusal) -> str:
    action = refusal.action
    if action is None:
        return ""
    if isinstance(action, SetPriorities):
        return f"priorities of {len(action.sessions)} sessions"
    return describe(action)
