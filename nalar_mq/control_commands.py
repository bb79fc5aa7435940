"""What the commands about policies do, without the command line: `cli` reads the options, this carries them out.

show, history     read what is kept at the broker; no controller is needed; show asks it whether its policy fails
top               asks the controller that leads
explain           asks the processes, and reads the history
explain-access    reads what holds
test, record      listen to the reports of all processes, as a controller does, and publish nothing
replay            reads a file
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec

from nalar_mq.actions import Allow, Decided, Ranking, State, States, decode_decision
from nalar_mq.address import Address, Subjects, random_token
from nalar_mq.client import connect
from nalar_mq.commands import BrokerChoice, on_signals, settings_of
from nalar_mq.config import Settings
from nalar_mq.controllers.deciding import PERIOD_S, decider_of
from nalar_mq.controllers.decision_ledger import open_history, read_history
from nalar_mq.controllers.explaining import Explained, explained
from nalar_mq.controllers.leadership import leader_in, open_lead
from nalar_mq.controllers.observer import Observer
from nalar_mq.controllers.overview import Overview, decode_overview
from nalar_mq.controllers.recording import Recorded, Recording, read_recording
from nalar_mq.controllers.rehearsal import Rehearsal
from nalar_mq.controllers.rehearsal import replay as replay_on
from nalar_mq.controllers.view import View
from nalar_mq.directives import did_you_mean
from nalar_mq.errors import BrokerError, ConfigError, WireError
from nalar_mq.identity import new_secret, presented
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.rules import Admission
from nalar_mq.transport import Transport

_ANSWERED_WITHIN_S: Final = 3.0
_STATES: Final = "states"

Take = Callable[[Decided], None]


class InForce(msgspec.Struct, frozen=True, kw_only=True):
    """What holds now.

    Attributes:
        leader: the controller that decides; empty for none, and then what was decided last holds on.
        policy: what it asks, as far as that is known.
        error: why that gives no answer, or cannot be loaded as it is now; empty if all is well, or nobody says.
        term, number: which record of which lead this is; 0 and 0 if nothing has ever been decided.
        states: routes, priorities of single sessions, limits and permissions.
        ranked: sessions that were given priorities at once, and why, as told last; None if none were.
    """

    leader: str
    policy: str
    term: int
    number: int
    states: tuple[State, ...]
    ranked: Ranking | None
    error: str = ""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy was tried on, and how that went.

    Attributes:
        rounds: how often it was asked.
        failures: how often it gave no answer.
        refused: actions that were not admitted, each time they were said.
        processes, futures: that it had to look at in the end.
    """

    rounds: int
    failures: int
    refused: int
    processes: int
    futures: int


@contextlib.asynccontextmanager
async def _connected(settings: Settings) -> AsyncGenerator[tuple[NatsTransport, Subjects]]:
    name, subjects = random_token("client"), Subjects(settings.namespace)
    access = presented(settings.broker, name, new_secret())
    async with await NatsTransport.connect(access, name=name, inbox=subjects.inbox(name)) as transport:
        yield transport, subjects


async def in_force(choice: BrokerChoice, *, app: Path | None) -> InForce:
    """What holds now, and who decides."""
    settings = settings_of(choice, app)
    async with _connected(settings) as (transport, subjects):
        leader = await leader_in(await open_lead(transport, subjects, settings.lease_s))
        entries = await read_history(await open_history(transport, subjects), subjects)
        record = await _states_in(transport, subjects)
        of_term = [entry for entry in entries if entry.term == record.term]
        ranked = next((entry.ranked for entry in reversed(of_term) if entry.ranked), None)
        policy = of_term[-1].policy if of_term else ""
        seen = await _asked(transport, subjects) if leader else None
        return InForce(
            leader=leader,
            policy=policy,
            term=record.term,
            number=record.number,
            states=record.states,
            ranked=ranked,
            error=seen.error if seen is not None else "",
        )


async def _asked(transport: NatsTransport, subjects: Subjects) -> Overview | None:
    """What the controller that leads sees; None if none answers."""
    try:
        answer = await transport.request(subjects.overview, b"", timeout_s=_ANSWERED_WITHIN_S)
        return decode_overview(answer.data)
    except (BrokerError, WireError):
        return None


async def _states_in(transport: Transport, subjects: Subjects) -> States:
    kept = await (await transport.key_value(subjects.control_bucket)).get(_STATES)
    return States(0, 0, 0) if kept is None or kept.value is None else decode_decision(kept.value, States)


async def history(choice: BrokerChoice, *, app: Path | None, limit: int) -> list[Decided]:
    """The last `limit` entries of the history, the oldest first."""
    async with _connected(settings_of(choice, app)) as (transport, subjects):
        entries = await read_history(await open_history(transport, subjects), subjects)
        return entries[len(entries) - min(limit, len(entries)) :]


class Access(msgspec.Struct, frozen=True):
    """Whether somebody may call an agent, and by which rule; None if there is none about it, and everybody may.

    Attributes:
        is_known: the caller is there now: served, or a process.
    """

    is_allowed: bool
    rule: Allow | None
    is_known: bool = True


async def access(choice: BrokerChoice, *, app: Path | None, caller: str, target: str, tenant: str) -> Access:
    """Whether `caller`, on behalf of a tenant, may call `target` by the rules that hold now.

    Raises:
        ConfigError: nobody serves the target, and there is no rule about it.
    """
    async with connect(settings=settings_of(choice, app)) as client:
        process = client.process
        states = (await _states_in(process.transport, process.subjects)).states
        served, members = process.table.known_actors(), {name for name, _ in await client.members()} - {process.name}
    admission = Admission()
    admission.take_states(states)
    rules = [state for state in states if isinstance(state, Allow) and state.agent == target]
    if not rules and target not in served:
        raise ConfigError(
            f"nobody serves {target!r}: " + (did_you_mean(target, tuple(served)) if served else "nothing is served")
        )
    is_known = caller in served or caller in members
    return Access(admission.rule_against(target, caller, tenant) is None, rules[-1] if rules else None, is_known)


async def explain(choice: BrokerChoice, *, app: Path | None, call: str) -> Explained:
    """All that is known to have happened to a call, and why.

    Raises:
        ConfigError: it is not the id of a call.
        UnknownCallError: no process remembers it.
    """
    try:
        id = bytes.fromhex(call)
    except ValueError:
        advice = "`nalar explain` takes the id of one, which `nalar trace` and `nalar top` show"
        raise ConfigError(f"{call!r} is no call: {advice}") from None
    async with connect(settings=settings_of(choice, app)) as client:
        process = client.process
        others = [Address(name, member.incarnation) for name, member in await client.members() if name != process.name]
        views = await process.lookout.ask(others, records=True, explain=id)
        history = await read_history(await open_history(process.transport, process.subjects), process.subjects)
    return explained(id, views, history)


async def overviews(choice: BrokerChoice, *, app: Path | None, every_s: float) -> AsyncGenerator[Overview | None]:
    """What the controller that leads sees, again and again; None while none answers."""
    async with _connected(settings_of(choice, app)) as (transport, subjects):
        while True:
            yield await _asked(transport, subjects)
            await asyncio.sleep(every_s)


async def test(choice: BrokerChoice, *, app: Path | None, policy: str, seconds: float, take: Take) -> Trial:
    """Asks a policy about what is there now, for so many seconds; nothing of what it says takes effect.

    Raises:
        PolicyLoadError: there is no such policy.
    """
    rehearsal = Rehearsal(await decider_of(policy))
    settings = settings_of(choice, app)
    loop = asyncio.get_running_loop()
    async with _connected(settings) as (transport, subjects), Observer(transport, subjects, lease_s=settings.lease_s) as seen:
        while not seen.is_informed:
            await asyncio.sleep(PERIOD_S)
            seen.collect()
        began = loop.time()
        while True:
            seen.collect()
            now = loop.time()
            for entry in await rehearsal.step(seen.view, now, seen.complaints(), at_s=now - began):
                take(entry)
            if loop.time() - began >= seconds:
                break
            await asyncio.sleep(PERIOD_S)
        return _trial(rehearsal, seen.view)


async def record(choice: BrokerChoice, *, app: Path | None, file: Path, seconds: float | None) -> Recording:
    """Writes what is reported into a file, for so many seconds or until SIGINT or SIGTERM; returns what was written.

    Raises:
        RecordingError: the file is there already, or cannot be written.
    """
    settings = settings_of(choice, app)
    loop = asyncio.get_running_loop()
    came: list[Recorded] = []
    stop = asyncio.Event()
    with Recording(file) as recording, on_signals(stop.set):
        began = loop.time()

        def keep(sender: str, data: bytes, at: float) -> None:
            came.append(Recorded(at - began, sender, data))

        async with _connected(settings) as (transport, subjects), Observer(transport, subjects, tap=keep) as seen:
            while not stop.is_set() and (seconds is None or loop.time() - began < seconds):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), PERIOD_S)
                seen.collect()
                for report in came:
                    recording.add(report)
                came.clear()
        return recording


async def replay(file: Path, policy: str, take: Take) -> Trial:
    """Asks a policy about what was recorded.

    Raises:
        PolicyLoadError: there is no such policy.
        RecordingError: the file is no recording, or damaged.
    """
    rehearsal, view = Rehearsal(await decider_of(policy)), View()
    async for entry in replay_on(rehearsal, read_recording(file), view):
        take(entry)
    return _trial(rehearsal, view)


def _trial(rehearsal: Rehearsal, view: View) -> Trial:
    return Trial(
        rounds=rehearsal.rounds,
        failures=rehearsal.failures,
        refused=rehearsal.refused,
        processes=len(view.processes),
        futures=len(view.futures),
    )
