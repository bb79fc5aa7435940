"""Policies that are tried on recordings, and the files those are kept in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.actions import Decided
from nalar_mq.changes import Changes
from nalar_mq.columns import DONE, QUEUED, Serves
from nalar_mq.controllers.deciding import Trusted, decider_of
from nalar_mq.controllers.policies import ShortestRemaining
from nalar_mq.controllers.policy import Action, kill, set_priority
from nalar_mq.controllers.recording import Recorded, Recording, read_recording
from nalar_mq.controllers.rehearsal import Rehearsal, replay
from nalar_mq.controllers.view import View
from nalar_mq.errors import PolicyLoadError, RecordingDamagedError, RecordingError, RecordingVersionError
from nalar_mq.messages import Call

REPORTS = [Recorded(0.0, "w1", b"one"), Recorded(0.25, "w2", b""), Recorded(1.5, "w1", bytes(range(256)))]


def written(path: Path, reports: Iterable[Recorded] = REPORTS) -> Path:
    with Recording(path) as recording:
        for report in reports:
            recording.add(report)
    assert recording.size_bytes == path.stat().st_size
    return path


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert list(read_recording(written(tmp_path / "t"))) == REPORTS
    assert list(read_recording(written(tmp_path / "empty", []))) == []


def test_a_recording_whose_writer_was_killed_is_good_up_to_there(tmp_path: Path) -> None:
    path = written(tmp_path / "t")
    whole = path.read_bytes()
    first = written(tmp_path / "first", REPORTS[:1]).stat().st_size
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        found = list(read_recording(path))
        assert found == REPORTS[: len(found)]
        assert found


@given(st.data())
def test_no_changed_byte_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = written(tmp_path_factory.mktemp("r") / "t")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = list(read_recording(path))
    except RecordingError:
        return
    # A length that has grown reaches beyond the end: that looks like a writer that was killed.
    assert found == REPORTS[: len(found)]
    assert len(found) < len(REPORTS)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", RecordingError, "is no recording"),
        (b"nalar-mq state 1\n", RecordingError, "is no recording"),
        (b"nalar-mq telemetry one\n", RecordingError, "is no recording"),
        (b"nalar-mq telemetry 9\n", RecordingVersionError, "version 9"),
        (b"nalar-mq telemetry 1\n" + b"\xff" * 64, RecordingDamagedError, "do not match their checksum"),
        (b"nalar-mq telemetry 1\n" + bytes(64), RecordingDamagedError, "do not match their checksum"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes, error: type[Exception], says: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(error, match=says):
        list(read_recording(path))


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="nowhere cannot be read"):
        list(read_recording(tmp_path / "nowhere"))
    written(tmp_path / "t")
    with pytest.raises(RecordingError, match="t cannot be written: File exists"):
        Recording(tmp_path / "t")


def a_day() -> list[Recorded]:
    """Two workers, one of which works for a while, and somebody who talks nonsense."""
    workers = {name: Changes(name, 1, "n") for name in ("w1", "w2")}
    for changes in workers.values():
        changes.set_serves({"a": Serves("agent")})
    reports: list[Recorded] = []
    calls = [workers["w1"].begin(Call(f"{n:016}".encode(), "a", "run", b"", session=f"s{n}"), 0.0, QUEUED) for n in range(5)]
    for turn in range(12):
        if turn >= 6 and calls:
            workers["w1"].end(calls.pop(), DONE, turn / 4)
        for name, changes in workers.items():
            reports += [Recorded(turn / 4, name, data) for data in changes.reports(turn / 4, 4_000)]
    reports.insert(3, Recorded(0.1, "w2", b"nonsense"))
    return reports


def told(policy: object, reports: Iterable[Recorded]) -> tuple[list[Decided], Rehearsal]:
    rehearsal = Rehearsal(Trusted(policy))  # type: ignore[arg-type]

    async def play() -> list[Decided]:
        return [entry async for entry in replay(rehearsal, reports, View())]

    return asyncio.run(play()), rehearsal


class Wants:
    def __init__(self, say: Callable[[View], Iterable[Action]]) -> None:
        self.decide = say


def test_a_replay_tells_what_would_have_been_decided_and_refused_and_when() -> None:
    def say(view: View) -> Iterable[Action]:
        if view.now > 2.0:
            raise ValueError("too late")
        if "s4" in view.sessions:
            yield set_priority("s4", 3, reason="it is the last")
        yield kill("nobody")

    entries, rehearsal = told(Wants(say), a_day())
    first, later, broken = entries
    assert [(state.session, state.reason) for state in first.began] == [("s4", "it is the last")]  # type: ignore[union-attr]
    assert [(refused.action, refused.reason) for refused in first.refused] == [
        ("all of nobody stops", "there is no worker 'nobody'")
    ]
    assert [(unused.process, unused.error) for unused in first.reports] == [("w2", "MalformedReportError")]
    assert 1.5 <= later.at_s <= 2.0
    assert len(later.ended) == 1
    assert broken.error == "ValueError: too late"
    assert broken.at_s > 2.0
    assert rehearsal.failures == rehearsal.rounds - rehearsal.refused


def test_a_replay_says_the_same_however_often_it_is_made() -> None:
    first, rehearsal = told(ShortestRemaining(), a_day())
    assert first
    assert rehearsal.rounds == 9
    assert told(ShortestRemaining(), a_day())[0] == first


async def test_policies_that_came_with_the_runtime_are_found_by_name() -> None:
    assert str(await decider_of(None)) == "default"
    assert str(await decider_of("ShortestRemaining")) == "ShortestRemaining"
    for name in ("Nope", "Composed", "np", "default", ""):
        with pytest.raises(PolicyLoadError, match=r"take one of .*ShortestRemaining"):
            await decider_of(name)
