"""The store of one worker: the managed state of its sessions in one LMDB folder, and what their last calls came to.

A store is opened by one process at a time, which holds a lock on the folder until it ends, however it ends. Each write is one
transaction with one fsync: the changes of a session, and the id and the result of the call that made them, are there together
or not at all.

What is in it (all numbers big-endian, so that they sort):

    about      format, id, directory, owner, commits, sessions
    sessions   actor NUL session             -> crc, header: number, and by field how many entries and the xor of their crcs
    names      hash of the same key          -> number; a session that only one of the two trees knows is damaged
    entries    number, field NUL, order      -> crc of field, order and data; data
    records    kind, commit, place in it     -> crc, record: call, session, when, result
    calls      number, call                  -> key of its record

LMDB checks nothing that it reads. Therefore a folder is examined before it is opened (`examine`): its file is as long as its
pages say, its trees are sound, and it is not older than the last commit (kept in a file beside it, since a damaged page can
have LMDB go back by one commit and not know it). A session is checked whole when it is loaded: each entry against its
checksum, and all together against the header.

Records come in the order of commits, so that they are written side by side and expire from one end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

import lmdb
import msgspec
from lmdb.verify import VerifyError
from lmdb.verify import verify as _verify_file  # pyright: ignore[reportUnknownVariableType]

from nalar_mq.errors import (
    StateDamagedError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreForeignError,
    StoreFullError,
    StoreLostError,
    StoreVersionError,
)

T = TypeVar("T")

FORMAT: Final = 1
HERE: Final = ""
STAGED: Final = "staged"  # it is on its way here, or has come and is not served yet
LEAVING: Final = "leaving"  # all of it is in the other store, and the directory may name either
LEFT: Final = "left"  # the directory names the other store; what is left here says so
RECORD_S: Final = 3600.0  # what a call came to, for whoever sends it again; calls are not sent again after half of it
JOB_RECORD_S: Final = 7 * 24 * 3600.0
EXAMINED_BYTES: Final = 32 * 1024 * 1024  # a larger file is examined whole by `nalar state verify`, not at each start
_FIRST_MAP: Final = 64 * 1024 * 1024
_LARGEST_MAP: Final = 1 << 40
_EXPIRED_AT_ONCE: Final = 4  # for each record that is written
_PIECE: Final = 2_000
DEPARTED_AT_ONCE: Final = 500
_LOCK_FILE: Final = "owner"
_COMMITS_FILE: Final = "commits"
_DATA_FILE: Final = "data.mdb"
_TREES: Final = ("about", "sessions", "names", "entries", "records", "calls")
_CRC: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_RECORD_KEY: Final = struct.Struct(">cQI")

Entries = dict[str, list[tuple[int, bytes]]]
"""By field the entries of a session, in their order."""

Change = tuple[str, int, bytes | None]
"""Field, order and data of one entry; no data where it is gone."""

if TYPE_CHECKING:
    Txn = lmdb.Transaction[bytes]
    Tree = lmdb._Database  # pyright: ignore[reportPrivateUsage]

Upgrade = Callable[["Txn", Mapping[str, "Tree"]], None]
"""Brings a store of one format to the next, within the transaction that opens it."""


class Header(msgspec.Struct, array_like=True, frozen=True):
    """What the store knows of a session before it reads its entries.

    Attributes:
        number: stands for it in the keys of its entries; never given twice.
        sums: by field how many entries it has and the xor of their checksums.
        used_s: when its last change was committed, in seconds since 1970.
        schema: version of the agent's state.
        kinds: what each field is: `list`, `dict` or `value`.
        standing: one of `HERE`, `STAGED`, `LEAVING` and `LEFT`; only what is here is served.
        other: the store that it comes from or goes to, if it is not just here.
    """

    number: int
    sums: dict[str, tuple[int, int]] = {}
    used_s: float = 0.0
    schema: int = 0
    kinds: dict[str, str] = {}
    standing: str = ""
    other: str = ""


class Record(msgspec.Struct, array_like=True, frozen=True):
    """What a call came to.

    Attributes:
        call: its id.
        number: of its session.
        at_s: when, in seconds since 1970.
        payload: its result, as it travels.
    """

    call: bytes
    number: int
    at_s: float
    payload: bytes


class Owner(msgspec.Struct, frozen=True):
    """Who has a store open."""

    name: str
    pid: int


class Session:
    """One session of an agent in the store that keeps it. Changed by the store alone."""

    __slots__ = ("actor", "header", "key", "name")

    def __init__(self, actor: str, name: str, header: Header | None) -> None:
        self.actor = actor
        self.name = name
        self.key = key_of(actor, name)
        self.header = header

    @property
    def is_kept(self) -> bool:
        """False until something of it has been committed."""
        return self.header is not None

    @property
    def standing(self) -> str:
        """`HERE`, `STAGED`, `LEAVING` or `LEFT`."""
        return HERE if self.header is None else self.header.standing

    @property
    def schema(self) -> int:
        """The version of the agent's state that it was kept by; 0 for the first."""
        return 0 if self.header is None else self.header.schema

    @property
    def sums(self) -> dict[str, tuple[int, int]]:
        """By field how many entries it has and the xor of their checksums; fields without entries are left out."""
        return {} if self.header is None else {field: sums for field, sums in self.header.sums.items() if sums[0]}

    def serve(self) -> None:
        """It is here from now on; its next commit says so in the store."""
        if self.header is not None:
            self.header = msgspec.structs.replace(self.header, standing=HERE, other="")


class Outcome(NamedTuple):
    """What a call came to: its id, its result, when, and whether it is one of a job."""

    call: bytes
    payload: bytes
    at_s: float
    is_job: bool


class Commit(NamedTuple):
    """What one call has changed, and what it came to; both become durable at once.

    A part of a session that comes from another store is written in the same way, with the outcomes of its former calls.
    """

    session: Session
    changes: Sequence[Change]
    call: bytes
    payload: bytes
    is_job: bool = False
    schema: int = 0
    kinds: Mapping[str, str] = {}
    standing: str = HERE
    other: str = ""
    records: Sequence[Outcome] = ()


class Removal(NamedTuple):
    """A session is to be forgotten."""

    session: Session


class Departure(NamedTuple):
    """A session lives in the store `other` now: some of its entries go at each such write, and a mark stays.

    Nothing is written unless the session has the standing that is named, or none, or has left already.
    """

    session: Session
    other: str
    standing: str


Write = Commit | Removal | Departure


def key_of(actor: str, session: str) -> bytes:
    """The key of a session; names of actors and sessions contain no NUL."""
    return f"{actor}\0{session}".encode()


def names_in(key: bytes) -> tuple[str, str]:
    """Actor and session that a key stands for."""
    actor, _, session = key.decode().partition("\0")
    return actor, session


def _walked(folder: Path) -> list[str]:
    return list(_verify_file(str(folder), subdir=True))  # type: ignore[no-untyped-call]


def examine(folder: Path, *, whole: bool = True) -> list[str]:
    """What is wrong with the files of a store that nobody has open; empty if nothing is found.

    Args:
        folder: of the store.
        whole: walk all trees however large the file is; takes about a minute for a gigabyte.
    """
    path = folder / _DATA_FILE
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return []
    if size == 0:
        return [f"{path} is empty"]
    if whole or size <= EXAMINED_BYTES:
        try:
            return [f"{path}: {finding}" for finding in _walked(folder)]
        except VerifyError as error:
            return [f"{path}: {error}"]
        except Exception as error:  # the examiner itself stumbled over what it was given
            return [f"{path}: cannot be read: {error!r}"]
    return []


class Store:
    """The store in one folder, open in this process until `close`.

    Reading is for any thread, and never waits but while the file grows. Writing is for one thread at a time.

    Attributes:
        id: of the store, for ever.
        folder: where it is.
        directory: the directory of sessions that it belongs to; empty until `belong_to`.
        copy: of this folder; another one, made of what was shipped elsewhere, has the same id and another copy.
        commits: transactions that have changed sessions so far.
    """

    def __init__(self, folder: Path, env: lmdb.Environment, lock: int, limit_bytes: int) -> None:
        self.folder = folder
        self.id = ""
        self.directory = ""
        self.copy = ""
        self._env = env
        self._lock = lock
        self._limit_bytes = limit_bytes
        self._token = os.urandom(16)
        self._guard = _Guard()
        self._commits_file = -1
        self._trees: dict[str, Tree] = {}
        self._commits = 0
        self._next = 1

    @classmethod
    def open(
        cls,
        folder: Path,
        owner: str,
        *,
        limit_bytes: int = _LARGEST_MAP,
        upgrades: Mapping[int, Upgrade] | None = None,
        id: str = "",
    ) -> Self:
        """Opens the store in `folder`, or makes one there.

        Args:
            folder: of the store; its parents are made where they are missing.
            owner: name of the process, for others who want it.
            limit_bytes: what the file may grow to.
            upgrades: by format what brings a store of that format to the next one.
            id: of a store that is made here, if it has one.

        Raises:
            StoreBusyError: another process has it open.
            StoreDamagedError: its files are not what was written.
            StoreVersionError: a later version has written it.
            StoreFullError: there is no room on the disk.
            StoreError: the folder cannot be used.
        """
        lock = _locked(folder, owner)
        try:
            env = _opened(folder, limit_bytes)
            try:
                store = cls(folder, env, lock, limit_bytes)
                store._begin(upgrades or {}, id)
            except BaseException:
                env.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        return store

    @staticmethod
    def is_free(folder: Path) -> bool:
        """True if nobody has the store in `folder` open now."""
        try:
            lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(lock)
        return True

    def _begin(self, upgrades: Mapping[int, Upgrade], id: str) -> None:
        commits = _read_commits(self.folder)
        try:
            self._trees = {name: self._env.open_db(name.encode()) for name in _TREES}
            self._env.reader_check()
            self._write_once(lambda txn: self._take(txn, commits, upgrades, id))
            self._commits_file = os.open(self.folder / _COMMITS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except lmdb.Error as error:
            raise _translated(error, self.folder) from error
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written: {error.strerror or error}", str(self.folder)) from error
        self._note_commits()

    def _take(self, txn: Txn, commits_seen: int, upgrades: Mapping[int, Upgrade], id: str) -> None:
        about = self._trees["about"]
        found = txn.get(b"format", db=about)
        if found is None:
            if commits_seen:
                raise _damaged(self.folder, f"it is empty, and had been written {commits_seen:,} times")
            txn.put(b"format", _U64.pack(FORMAT), db=about)
            txn.put(b"id", (id or os.urandom(8).hex()).encode(), db=about)
            txn.put(b"copy", os.urandom(8).hex().encode(), db=about)
        else:
            self._upgrade(txn, _number(found, self.folder, "format"), upgrades)
        self.id = (txn.get(b"id", db=about) or b"").decode("ascii", "replace")
        self.copy = (txn.get(b"copy", db=about) or b"").decode("ascii", "replace")
        self.directory = (txn.get(b"directory", db=about) or b"").decode("ascii", "replace")
        self._commits = _number(txn.get(b"commits", _U64.pack(0), db=about), self.folder, "commits")
        self._next = _number(txn.get(b"sessions", _U64.pack(1), db=about), self.folder, "sessions")
        if self._commits < commits_seen:
            raise _damaged(self.folder, f"it has {self._commits:,} commits and had {commits_seen:,}: the last ones are gone")
        txn.put(b"owner", self._token, db=about)

    def _upgrade(self, txn: Txn, found: int, upgrades: Mapping[int, Upgrade]) -> None:
        if found > FORMAT:
            raise StoreVersionError(
                f"{self.folder} has format {found}, and this version of nalar-mq knows formats up to {FORMAT}: "
                f"run the version that wrote it, or a later one",
                str(self.folder),
            )
        while found < FORMAT:
            upgrade = upgrades.get(found)
            if upgrade is None:
                raise StoreVersionError(
                    f"{self.folder} has format {found}, which this version of nalar-mq cannot bring to {FORMAT}: export it "
                    f"with the version that wrote it (nalar state export), and import that here",
                    str(self.folder),
                )
            upgrade(txn, self._trees)
            found += 1
            txn.put(b"format", _U64.pack(found), db=self._trees["about"])

    def belong_to(self, directory: str) -> None:
        """Says for good which directory of sessions this store belongs to.

        Raises:
            StoreForeignError: it belongs to another one, and has sessions.
        """
        if self.directory == directory:
            return
        if self.directory and self.count():
            raise StoreForeignError(
                f"{self.folder} belongs to another directory of sessions ({self.directory}) than that of this broker and "
                f"namespace ({directory}): name the broker it was written under, or bring its {self.count():,} sessions over "
                f"with: nalar state adopt",
                str(self.folder),
            )
        self.move_to(directory)

    def move_to(self, directory: str) -> None:
        """Says that the store belongs to that directory from now on, whatever it belonged to."""
        self._write_once(lambda txn: txn.put(b"directory", directory.encode(), db=self._trees["about"]))
        self.directory = directory

    @property
    def commits(self) -> int:
        """Transactions that have changed sessions so far."""
        return self._commits

    def restamp(self, commits: int) -> None:
        """Counts on from `commits`: what is here is what another copy of this store had after so many."""
        self._write_once(lambda txn: txn.put(b"commits", _U64.pack(commits), db=self._trees["about"]))
        self._commits = commits
        self._note_commits()

    # Reading.

    def session(self, actor: str, name: str) -> Session:
        """What is known of a session; of one that was never written, that it is not kept.

        Raises:
            StateDamagedError: it cannot be read.
        """
        session = Session(actor, name, None)
        with self._reading() as txn:
            session.header = self._header(txn, session.key)
        return session

    def _header(self, txn: Txn, key: bytes) -> Header | None:
        data = txn.get(key, db=self._trees["sessions"])
        number = txn.get(_digest(key), db=self._trees["names"])
        if data is None and number is None:
            return None
        if data is None or number is None:
            raise self._session_damaged(key, "it is known in one place and not in another")
        header = _decode(data, key, _HEADER)
        if header is None:
            raise self._session_damaged(key, "its header does not match its checksum")
        if _U64.pack(header.number) != number:
            raise self._session_damaged(key, "its header belongs to another session")
        return header

    def load(self, session: Session) -> Entries:
        """All entries of a session, checked.

        Raises:
            StateDamagedError: something is missing or is not what was written.
        """
        header = session.header
        if header is None:
            return {}
        fields: Entries = {}
        sums: dict[str, tuple[int, int]] = {}
        with self._reading() as txn:
            for field, order, crc, data in self._entries(txn, session.key, header.number):
                fields.setdefault(field, []).append((order, data))
                count, sum_ = sums.get(field, (0, 0))
                sums[field] = count + 1, sum_ ^ crc
        for field, (count, sum_) in header.sums.items():
            found = sums.pop(field, (0, 0))
            if found != (count, sum_):
                what = f"{found[0]:,} entries were found and {count:,} were written"
                raise self._session_damaged(session.key, f"{field}: {what}" + ("" if found[0] != count else ", others"))
        if sums:
            raise self._session_damaged(session.key, f"{', '.join(sorted(sums))}: entries that nobody has written")
        return fields

    def _entries(self, txn: Txn, key: bytes, number: int, after: bytes = b"") -> Iterator[tuple[str, int, int, bytes]]:
        prefix = _U64.pack(number)
        for entry_key, value in _with_prefix(txn, self._trees["entries"], prefix, after):
            crc = zlib.crc32(value[4:], zlib.crc32(entry_key[8:]))
            if len(value) < 4 or _CRC.unpack_from(value)[0] != crc or len(entry_key) < 17:
                raise self._session_damaged(key, "an entry does not match its checksum")
            yield entry_key[8:-9].decode(), _U64.unpack(entry_key[-8:])[0], crc, value[4:]

    def piece(self, session: Session, after: bytes, limit_bytes: int) -> tuple[list[Change], bytes]:
        """Entries of a session from the one after the position `after`, at least one, and the position of the last.

        The position is empty when there are no more.

        Raises:
            StateDamagedError: an entry is not what was written.
        """
        header = session.header
        if header is None:
            return [], b""
        found: list[Change] = []
        size, prefix = 0, _U64.pack(header.number)
        with self._reading() as txn:
            for field, order, _, data in self._entries(txn, session.key, header.number, after):
                found.append((field, order, data))
                size += len(data) + len(field) + 16
                if size >= limit_bytes:
                    return found, prefix + field.encode() + b"\0" + _U64.pack(order)
        return found, b""

    def entries(self, session: Session, wanted: Iterable[tuple[str, int]]) -> list[Change]:
        """Some entries of a session as they are now; without data those that are not there."""
        header = session.header
        found: list[Change] = []
        with self._reading() as txn:
            for field, order in wanted:
                key = _U64.pack(0 if header is None else header.number) + field.encode() + b"\0" + _U64.pack(order)
                value = txn.get(key, db=self._trees["entries"])
                found.append((field, order, None if value is None else value[4:]))
        return found

    def outcomes(self, session: Session) -> list[Outcome]:
        """What the calls of a session came to that are still remembered."""
        header = session.header
        if header is None:
            return []
        found: list[Outcome] = []
        with self._reading() as txn:
            for _, key in _with_prefix(txn, self._trees["calls"], _U64.pack(header.number)):
                data = txn.get(key, db=self._trees["records"])
                record = None if data is None else _decode(data, key, _RECORD)
                if record is not None:
                    found.append(Outcome(record.call, record.payload, record.at_s, key[:1] == b"j"))
        return found

    def record(self, session: Session, call: bytes) -> Record | None:
        """What a call of that session came to; None if it is not known (any more).

        Raises:
            StateDamagedError: it cannot be read.
        """
        header = session.header
        if header is None:
            return None
        with self._reading() as txn:
            key = txn.get(_U64.pack(header.number) + call, db=self._trees["calls"])
            data = None if key is None else txn.get(key, db=self._trees["records"])
        if key is None:
            return None
        record = None if data is None else _decode(data, key, _RECORD)
        if record is None or record.call != call:
            raise self._session_damaged(session.key, f"what call {call.hex()} came to cannot be read")
        return record

    def count(self) -> int:
        """How many sessions it keeps."""
        with self._reading() as txn:
            return int(txn.stat(self._trees["sessions"])["entries"])

    def sessions(self, after: tuple[str, str] | None = None, limit: int = _PIECE) -> list[Session]:
        """Sessions in the order of their keys, from the one after `after`; those that are damaged come without a header."""
        found: list[Session] = []
        first = b"" if after is None else key_of(*after) + b"\0"
        with self._reading() as txn, txn.cursor(db=self._trees["sessions"]) as cursor:
            if cursor.set_range(first):
                for key, value in cursor:
                    if len(found) == limit:
                        break
                    found.append(Session(*names_in(key), _decode(value, key, _HEADER)))
        return found

    def sessions_from(self, actor: str, prefix: str, after: str | None, limit: int = _PIECE) -> list[Session]:
        """Sessions of one agent whose names begin with `prefix`, from the one after `after`."""
        found = self.sessions((actor, after) if after is not None else (actor, prefix), limit)
        return [session for session in found if session.actor == actor and session.name.startswith(prefix)]

    def size_bytes(self) -> int:
        """What the file takes on disk."""
        return (self.folder / _DATA_FILE).stat().st_size

    def _session_damaged(self, key: bytes, what: str) -> StateDamagedError:
        actor, name = names_in(key)
        return StateDamagedError(
            f"session {name!r} of {actor!r} in {self.folder} is damaged: {what}; it is not served: restore it from an "
            f"export (nalar state import), or drop it (nalar state drop)"
        )

    @contextlib.contextmanager
    def _reading(self) -> Generator[Txn]:
        with self._guard.reading():
            try:
                with self._env.begin() as txn:
                    yield txn
            except lmdb.Error as error:
                raise _translated(error, self.folder) from error

    # Writing.

    def write(self, writes: Sequence[Write], now_s: float | None = None) -> list[Exception | None]:
        """Makes all of them durable in one transaction, and says for each what went wrong; nothing of those stays.

        If together they cannot be written, each is tried by itself, so that one that is too large costs no other.

        Raises:
            StoreLostError: another process has taken the store over; nothing is written any more.
        """
        now_s = time.time() if now_s is None else now_s
        try:
            self._write_all(writes, now_s)
        except (StoreFullError, StoreError) as error:
            if isinstance(error, StoreLostError):
                raise
            return [error] if len(writes) == 1 else [self._write_alone(one, now_s) for one in writes]
        return [None] * len(writes)

    def _write_alone(self, write: Write, now_s: float) -> Exception | None:
        try:
            self._write_all([write], now_s)
        except StoreLostError:
            raise
        except StoreError as error:
            return error
        return None

    def _write_all(self, writes: Sequence[Write], now_s: float) -> None:
        headers: dict[Session, Header | None] = {}
        numbers = [0, 0]

        def apply(txn: Txn) -> None:
            headers.clear()
            numbers[:] = self._commits + 1, self._next
            for place, write in enumerate(writes):
                before = headers.get(write.session, write.session.header)
                if isinstance(write, Removal):
                    self._remove(txn, write.session.key, before)
                    headers[write.session] = None
                elif isinstance(write, Departure):
                    headers[write.session] = self._depart(txn, write, numbers, now_s)
                else:
                    headers[write.session] = self._apply(txn, write, before, numbers, place, now_s)
            self._expire(txn, now_s, _EXPIRED_AT_ONCE * len(writes))
            txn.put(b"commits", _U64.pack(numbers[0]), db=self._trees["about"])
            txn.put(b"sessions", _U64.pack(numbers[1]), db=self._trees["about"])

        self._write_once(apply)
        self._commits, self._next = numbers
        self._note_commits()
        for session, header in headers.items():
            session.header = header

    def _apply(self, txn: Txn, commit: Commit, before: Header | None, numbers: list[int], place: int, now_s: float) -> Header:
        key = commit.session.key
        number = before.number if before is not None else numbers[1]
        if before is None:
            numbers[1] += 1
            txn.put(_digest(key), _U64.pack(number), db=self._trees["names"])
        elif txn.get(_digest(key), db=self._trees["names"]) != _U64.pack(number):
            raise StoreError(
                f"session {commit.session.name!r} of {commit.session.actor!r} was removed meanwhile", str(self.folder)
            )
        sums = dict(before.sums) if before is not None else {}
        self._apply_changes(txn, _U64.pack(number), commit.changes, sums)
        header = Header(number, sums, now_s, commit.schema, dict(commit.kinds), commit.standing, commit.other)
        _put(txn, self._trees["sessions"], key, header)
        if commit.call:
            self._record(txn, number, Outcome(commit.call, commit.payload, now_s, commit.is_job), numbers[0], place << 16)
        for position, outcome in enumerate(commit.records, 1):
            self._record(txn, number, outcome, numbers[0], place << 16 | position)
        return header

    def _record(self, txn: Txn, number: int, outcome: Outcome, commit: int, place: int) -> None:
        key = _RECORD_KEY.pack(b"j" if outcome.is_job else b"c", commit, place)
        _put(txn, self._trees["records"], key, Record(outcome.call, number, outcome.at_s, outcome.payload))
        txn.put(_U64.pack(number) + outcome.call, key, db=self._trees["calls"])

    def _depart(self, txn: Txn, departure: Departure, numbers: list[int], now_s: float) -> Header:
        key = departure.session.key
        before = self._header(txn, key)
        if before is not None and before.standing not in (departure.standing, LEFT):
            return before
        number = before.number if before is not None else numbers[1]
        if before is None:
            numbers[1] += 1
            txn.put(_digest(key), _U64.pack(number), db=self._trees["names"])
        tree = self._trees["entries"]
        for entry in [entry for entry, _ in itertools.islice(_with_prefix(txn, tree, _U64.pack(number)), DEPARTED_AT_ONCE)]:
            txn.delete(entry, db=tree)
        header = Header(number, {}, now_s, standing=LEFT, other=departure.other)
        _put(txn, self._trees["sessions"], key, header)
        return header

    def _apply_changes(self, txn: Txn, prefix: bytes, changes: Iterable[Change], sums: dict[str, tuple[int, int]]) -> None:
        tree = self._trees["entries"]
        for field, order, data in changes:
            key = prefix + field.encode() + b"\0" + _U64.pack(order)
            count, sum_ = sums.get(field, (0, 0))
            if data is None:
                old = txn.pop(key, db=tree)
            else:
                crc = zlib.crc32(data, zlib.crc32(key[8:]))
                old = txn.replace(key, _CRC.pack(crc) + data, db=tree)
                count, sum_ = count + 1, sum_ ^ crc
            if old is not None:
                count, sum_ = count - 1, sum_ ^ _CRC.unpack_from(old)[0]
            sums[field] = count, sum_

    def _remove(self, txn: Txn, key: bytes, header: Header | None) -> None:
        if header is None:
            return
        prefix = _U64.pack(header.number)
        for entry in [entry for entry, _ in _with_prefix(txn, self._trees["entries"], prefix)]:
            txn.delete(entry, db=self._trees["entries"])
        txn.delete(_digest(key), db=self._trees["names"])
        txn.delete(key, db=self._trees["sessions"])

    def _expire(self, txn: Txn, now_s: float, limit: int) -> None:
        records = self._trees["records"]
        for kind, kept_s in ((b"c", RECORD_S), (b"j", JOB_RECORD_S)):
            gone: list[tuple[bytes, Record | None]] = []
            with txn.cursor(db=records) as cursor:
                found = cursor.set_range(kind)
                while found and len(gone) < limit and cursor.key()[:1] == kind:
                    record = _decode(cursor.value(), cursor.key(), _RECORD)
                    if record is not None and now_s - record.at_s < kept_s:
                        break
                    gone.append((cursor.key(), record))
                    found = cursor.next()
            for key, record in gone:
                txn.delete(key, db=records)
                if record is not None:
                    txn.delete(_U64.pack(record.number) + record.call, db=self._trees["calls"])

    def _write_once(self, apply: Callable[[Txn], object]) -> None:
        """One transaction; the map grows as often as it takes."""
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    self._check_owner(txn)
                    apply(txn)
                return
            except lmdb.MapFullError as error:
                if not self._grow():
                    raise _translated(error, self.folder) from error
            except lmdb.Error as error:
                raise _translated(error, self.folder) from error

    def _check_owner(self, txn: Txn) -> None:
        if self.id and txn.get(b"owner", db=self._trees["about"]) != self._token:
            raise StoreLostError(f"another process has taken {self.folder} over", str(self.folder))

    def _grow(self) -> bool:
        size = self._env.info()["map_size"]
        if size >= self._limit_bytes:
            return False
        with self._guard.alone():
            self._env.set_mapsize(min(size * 2, self._limit_bytes))
        return True

    def _note_commits(self) -> None:
        with contextlib.suppress(OSError):
            data = _U64.pack(self._commits)
            os.pwrite(self._commits_file, data + _CRC.pack(zlib.crc32(data)), 0)

    def compact(self, target: Path) -> None:
        """Writes a copy without free pages into the folder `target`, which must not exist.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            target.mkdir(parents=True)
            self._env.copy(str(target), compact=True)
        except (OSError, lmdb.Error) as error:
            raise StoreError(f"{target} cannot be written: {error}", str(target)) from error

    def close(self) -> None:
        """Gives the store to whoever wants it; idempotent."""
        if self._lock < 0:
            return
        with self._guard.alone():
            self._env.close()
        os.close(self._commits_file)
        os.close(self._lock)
        self._lock = -1


class _Guard:
    """Readers go side by side; what needs the environment for itself waits for them, and they for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._is_taken = False

    @contextlib.contextmanager
    def reading(self) -> Generator[None]:
        with self._condition:
            while self._is_taken:
                self._condition.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                if not self._readers:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        with self._condition:
            while self._is_taken or self._readers:
                self._condition.wait()
            self._is_taken = True
        try:
            yield
        finally:
            with self._condition:
                self._is_taken = False
                self._condition.notify_all()


_HEADER: Final = msgspec.msgpack.Decoder(Header)
_RECORD: Final = msgspec.msgpack.Decoder(Record)


def _put(txn: Txn, tree: Tree, key: bytes, value: Header | Record) -> None:
    data = msgspec.msgpack.encode(value)
    txn.put(key, _CRC.pack(zlib.crc32(data, zlib.crc32(key))) + data, db=tree)


def _decode(data: bytes, key: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """What stands under `key`; None if it is not what was written there."""
    if len(data) < 4 or _CRC.unpack_from(data)[0] != zlib.crc32(data[4:], zlib.crc32(key)):
        return None
    try:
        return decoder.decode(data[4:])
    except msgspec.MsgspecError:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()


def _with_prefix(txn: Txn, tree: Tree, prefix: bytes, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    with txn.cursor(db=tree) as cursor:
        if cursor.set_range(after + b"\0" if after else prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value


def _number(data: bytes, folder: Path, what: str) -> int:
    if len(data) != 8:
        raise _damaged(folder, f"{what} is not a number")
    return int(_U64.unpack(data)[0])


def _damaged(folder: Path, what: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"{folder} is damaged: {what}; it is not opened: put a copy of it or an export in its place (nalar state import)",
        str(folder),
    )


def _translated(error: lmdb.Error, folder: Path) -> StoreError:
    full = f"{folder} is full: make room on its disk, or drop sessions (nalar state drop)"
    if isinstance(error, lmdb.MapFullError):
        return StoreFullError(full, str(folder))
    if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError)):
        return _damaged(folder, str(error))
    if any(reason in str(error) for reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))):
        return StoreFullError(full, str(folder))
    return StoreError(f"{folder} cannot be used: {error}", str(folder))


def _locked(folder: Path, owner: str) -> int:
    """The lock on a folder; the kernel takes it back when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(f"{folder} is full: make room on its disk", str(folder)) from error
        raise StoreError(f"the state of sessions cannot be kept in {folder}: {reason}", str(folder)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, msgspec.json.encode(Owner(owner, os.getpid())), 0)
    except BlockingIOError:
        holder = owner_of(folder)
        os.close(lock)
        who = f"worker {holder.name!r}, process {holder.pid}" if holder is not None else "another process"
        raise StoreBusyError(f"{folder} is open in {who}", str(folder)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            os.close(lock)
            raise StoreError(f"{folder} cannot be locked: {error.strerror or error}", str(folder)) from error
    return lock


def owner_of(folder: Path) -> Owner | None:
    """Who opened the store in a folder last; it may have ended."""
    try:
        return msgspec.json.decode((folder / _LOCK_FILE).read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _opened(folder: Path, limit_bytes: int) -> lmdb.Environment:
    path = folder / _DATA_FILE
    if not path.exists() and _read_commits(folder):
        raise _damaged(folder, f"{_DATA_FILE} is missing")
    findings = examine(folder, whole=False)
    if findings:
        more = f", and {len(findings) - 1} more findings" if len(findings) > 1 else ""
        raise _damaged(folder, findings[0] + more)
    size = path.stat().st_size if path.exists() else 0
    map_size = min(max(_FIRST_MAP, 1 << (size * 2).bit_length()), max(limit_bytes, size))
    try:
        env = lmdb.open(str(folder), map_size=map_size, max_dbs=len(_TREES) + 2, readahead=False, meminit=False, mode=0o600)
    except lmdb.Error as error:
        raise _translated(error, folder) from error
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if size and size < expected:
        env.close()
        raise _damaged(folder, f"{path} has {size:,} bytes and should have {expected:,}")
    return env


def _read_commits(folder: Path) -> int:
    """How many commits the store is known to have had at least; 0 if that is not known."""
    try:
        data = (folder / _COMMITS_FILE).read_bytes()
    except OSError:
        return 0
    if len(data) != 12 or _CRC.unpack_from(data, 8)[0] != zlib.crc32(data[:8]):
        return 0
    return int(_U64.unpack_from(data)[0])
