"""The store of one worker: the managed state of its sessions in one LMDB folder, and what their last calls came to.

A store is opened by one process at a time, which holds a lock on the folder until it ends, however it ends. Each write is one
transaction with one fsync: the changes of a session, and the id and the result of the call that made them, are there together
or not at all.

What is in it (all numbers big-endian, so that they sort):

    about      format, id, copy, directory, openings, counts -> crc, what it is; owner: who may write
    sessions   actor NUL session             -> crc, header: number, by field how many entries and the xor of their crcs, and
                                                the keys of its last records
    names      hash of the same key          -> number; a session that only one of the two trees knows is damaged
    entries    number, field NUL, order      -> crc of field, order and data; data
    records    kind, commit, place in it     -> crc, record: call, session, when, result
    calls      number, call                  -> crc, key of its record, key of the record before it

LMDB checks nothing that it reads. Therefore a folder is examined before it is opened (`pages`), and must not be older than the
last commit (kept in a file beside it, since a damaged page can have LMDB go back by one commit and not know it). A session is
checked whole when it is loaded: each entry against its checksum, all together against the header, and the chain of its
records from the last to the last one that has expired, since a call whose record is missing would run again.

Records come in the order of commits, so that they are written side by side and expire from one end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import operator
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

import lmdb
import msgspec

from nalar_mq import pages
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
# Examined whole in a tenth of a second, for which the calls of a dead worker wait; of a larger file only what leads to other
# pages, and the free list.
EXAMINED_BYTES: Final = 16 * 1024 * 1024
_FIRST_MAP: Final = 64 * 1024 * 1024
_LARGEST_MAP: Final = 1 << 40
_EXPIRED_AT_ONCE: Final = 4  # for each record that is written
_PIECE: Final = 2_000
DEPARTED_AT_ONCE: Final = 1_000
_ROW_BYTES: Final = 128  # what a row counts beside its data
_LOCK_FILE: Final = "owner"
_COMMITS_FILE: Final = "commits"
_DATA_FILE: Final = "data.mdb"
_READERS_FILE: Final = "lock.mdb"
_READERS_BYTES: Final = 8192
_LITTLE_ROOM: Final = 1024 * 1024
_TREES: Final = ("about", "sessions", "names", "entries", "records", "calls")
_CRC: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_RECORD_KEY: Final = struct.Struct(">cQI")
_COUNTS: Final = struct.Struct(">QQ13s13s")
CHECKSUM_BYTES: Final = _CRC.size
_SHORTEST_KEY: Final = 17  # of an entry
_KINDS: Final = (b"c", b"j")

Entries = dict[str, list[tuple[int, bytes]]]
"""By field the entries of a session, in their order."""

Change = tuple[str, int, bytes | None]
"""Field, order and data of one entry; no data where it is gone."""

Row = tuple[bytes, bytes]
"""One entry as it stands in a store: its key, which begins with the number of its session there; its checksum and its data."""

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
        kinds: what each field holds: `list[int]`, `dict` and so on (`field_types`).
        standing: one of `HERE`, `STAGED`, `LEAVING` and `LEFT`; only what is here is served.
        other: the store that it comes from or goes to, if it is not just here.
        last: the keys of its last records: of a call, and of a call of a job.
    """

    number: int
    sums: dict[str, tuple[int, int]] = {}
    used_s: float = 0.0
    schema: int = 0
    kinds: dict[str, str] = {}
    standing: str = ""
    other: str = ""
    last: tuple[bytes, bytes] = (b"", b"")


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


class Lump(NamedTuple):
    """Rows that match their checksums, and by field what they say: orders and data, and what these add to a header's sums."""

    rows: Sequence[Row]
    entries: dict[str, list[tuple[int, bytes]]]
    sums: dict[str, tuple[int, int]]

    def changes(self) -> Iterator[Change]:
        """The same one by one."""
        return ((field, order, data) for field, some in self.entries.items() for order, data in some)


class Commit(NamedTuple):
    """What one call has changed, and what it came to; both become durable at once.

    A part of a session that comes from another store is written in the same way, with the outcomes of its former calls, and
    with rows of that store, which are checked: they come before the changes.
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
    lump: Lump | None = None


class Whole(NamedTuple):
    """All of a session at one moment."""

    header: Header
    entries: Entries
    outcomes: list[Outcome]


class Removal(NamedTuple):
    """A session is to be forgotten, whatever is known of it."""

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


def lump_of(rows: Sequence[Row]) -> Lump | None:
    """None if one of the rows is not what was written."""
    entries: dict[str, list[tuple[int, bytes]]] = {}
    sums: dict[str, tuple[int, int]] = {}
    crc32, number = zlib.crc32, int.from_bytes
    for name, some in itertools.groupby(rows, _field_of):
        found: list[tuple[int, bytes]] = []
        sum_ = 0
        for key, value in some:
            data = value[4:]
            crc = crc32(data, crc32(key[8:]))
            if number(value[:4], "big") != crc or len(value) < CHECKSUM_BYTES or len(key) < _SHORTEST_KEY:
                return None
            found.append((number(key[-8:], "big"), data))
            sum_ ^= crc
        try:
            field = name.decode()
        except UnicodeDecodeError:
            return None
        former = sums.get(field, (0, 0))
        entries.setdefault(field, []).extend(found)
        sums[field] = former[0] + len(found), former[1] ^ sum_
    return Lump(rows, entries, sums)


def _field_of(row: Row) -> bytes:
    return row[0][8:-9]


def names_in(key: bytes) -> tuple[str, str]:
    """Actor and session that a key stands for."""
    actor, _, session = key.decode("utf-8", "backslashreplace").partition("\0")
    return actor, session


def examine(folder: Path, *, whole: bool = True) -> list[str]:
    """What is wrong with the files of a store that nobody writes to; empty if nothing is found.

    Args:
        folder: of the store.
        whole: read all pages however large the file is.
    """
    path = folder / _DATA_FILE
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"]
    try:
        if os.fstat(file).st_size:
            _check_pages(file, whole=whole)
    except (pages.PagesDamaged, pages.LayoutUnknown, OSError) as error:
        return [f"{path}: {error}"]
    finally:
        os.close(file)
    return []


def _check_pages(file: int, txn: int | None = None, *, whole: bool) -> None:
    meta = pages.read_meta(file, txn)
    pages.check(file, meta, whole=whole or os.fstat(file).st_size <= EXAMINED_BYTES)


class Store:
    """The store in one folder, open in this process until `close`.

    Reading is for any thread, and never waits but while the file grows. Writing is for one thread at a time.

    Attributes:
        id: of the store, for ever.
        folder: where it is.
        directory: the directory of sessions that it belongs to; empty until `belong_to`.
        copy: of this folder; another one, made of what was shipped elsewhere, has the same id and another copy.
        openings: tokens of the last ones, as the directory may know them (`openings`).
        commits: transactions that have changed sessions so far.
        is_read_only: it was opened by `read`, and nothing can be written.
    """

    def __init__(self, folder: Path, env: lmdb.Environment, lock: int, limit_bytes: int, *, is_read_only: bool = False) -> None:
        self.folder = folder
        self.id = ""
        self.directory = ""
        self.copy = ""
        self.openings: tuple[str, ...] = ()
        self.is_read_only = is_read_only
        self._env = env
        self._lock = lock
        self._limit_bytes = limit_bytes
        self._token = os.urandom(16)
        self._guard = _Guard()
        self._writing_once = threading.Lock()
        self._commits_file = -1
        self._trees: dict[str, Tree] = {}
        self._counts = _Counts(0, 1, b"", b"")

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

    @classmethod
    def read(cls, folder: Path, *, whole: bool = False) -> Self:
        """Opens the store in `folder` for reading only, whoever has it open; what is committed meanwhile is seen too.

        Args:
            folder: of the store.
            whole: examine all pages first, however large the file is.

        Raises:
            StoreDamagedError: its files are not what was written.
            StoreVersionError: another version has written it.
            StoreError: there is no store in the folder, or it cannot be read.
        """
        file = _shared(folder)
        try:
            env = _opened_to_read(folder)
            try:
                _examine_open(env, file, folder, whole=whole)
                store = cls(folder, env, file, _LARGEST_MAP, is_read_only=True)
                store._open_trees(_read_commits(folder))
            except BaseException:
                env.close()
                raise
        except BaseException:
            os.close(file)
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

    def _open_trees(self, commits_seen: int) -> None:
        try:
            self._trees["about"] = self._env.open_db(b"about", create=False)
            with self._env.begin() as txn:
                found = self._format(txn)
            if found != FORMAT:
                raise _other_format(self.folder, found)
            self._trees = {name: self._env.open_db(name.encode(), create=False) for name in _TREES}
            with self._env.begin() as txn:
                self._read_about(txn, commits_seen)
        except lmdb.Error as error:
            raise _translated(error, self.folder) from error

    def _begin(self, upgrades: Mapping[int, Upgrade], id: str) -> None:
        commits_seen = _read_commits(self.folder)
        try:
            if self._env.stat()["entries"]:
                self._write_once(lambda txn: self._upgrade(txn, upgrades))
            elif commits_seen:
                raise _damaged(self.folder, f"it is empty, and had been written {commits_seen:,} times")
            else:
                self._write_once(lambda txn: self._make(txn, id))
            self._env.reader_check()
            self._write_once(lambda txn: self._take(txn, commits_seen))
            self._commits_file = os.open(self.folder / _COMMITS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except lmdb.Error as error:
            raise _translated(error, self.folder) from error
        except OSError as error:
            raise _unusable(error, self.folder) from error
        self._note_commits()

    def _make(self, txn: Txn, id: str) -> None:
        self._trees = {name: self._env.open_db(name.encode(), txn=txn) for name in _TREES}
        self._put_about(txn, b"format", _U64.pack(FORMAT))
        self._put_about(txn, b"id", (id or os.urandom(8).hex()).encode())
        self._put_about(txn, b"copy", os.urandom(8).hex().encode())
        self._put_about(txn, b"directory", b"")
        self._put_about(txn, b"counts", self._counts.packed())

    def _upgrade(self, txn: Txn, upgrades: Mapping[int, Upgrade]) -> None:
        self._trees = {"about": self._env.open_db(b"about", txn=txn, create=False)}
        found = self._format(txn)
        is_old = found < FORMAT
        if found > FORMAT or (is_old and found not in upgrades):
            raise _other_format(self.folder, found)
        self._trees = {name: self._env.open_db(name.encode(), txn=txn, create=is_old) for name in _TREES}
        while found < FORMAT:
            if found not in upgrades:
                raise _other_format(self.folder, found)
            upgrades[found](txn, self._trees)
            found += 1
            self._put_about(txn, b"format", _U64.pack(found))

    def _take(self, txn: Txn, commits_seen: int) -> None:
        self._read_about(txn, commits_seen)
        txn.put(b"owner", self._token, db=self._trees["about"])

    def _read_about(self, txn: Txn, commits_seen: int) -> None:
        self.id = self._about(txn, b"id").decode()
        self.copy = self._about(txn, b"copy").decode()
        self.directory = self._about(txn, b"directory").decode()
        if txn.get(b"openings", db=self._trees["about"]) is not None:  # not before it was opened under a broker
            self.openings = tuple(self._about(txn, b"openings").decode().split())
        self._counts = _Counts.unpacked(self._about(txn, b"counts"))
        commits = self._counts.commits
        if commits < commits_seen:
            raise _damaged(self.folder, f"it has {commits:,} commits and had {commits_seen:,}: the last ones are gone")

    def _format(self, txn: Txn) -> int:
        return int(_U64.unpack(self._about(txn, b"format"))[0])

    def _about(self, txn: Txn, name: bytes) -> bytes:
        data = _checked(txn.get(name, b"", db=self._trees["about"]), name)
        if data is None:
            raise _damaged(self.folder, f"its {name.decode()} does not match its checksum")
        return data

    def _put_about(self, txn: Txn, name: bytes, data: bytes) -> None:
        txn.put(name, _sum(name, data) + data, db=self._trees["about"])

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
        self._write_once(lambda txn: self._put_about(txn, b"directory", directory.encode()))
        self.directory = directory

    def note_openings(self, tokens: tuple[str, ...]) -> None:
        """Keeps the tokens of the last openings."""
        self._write_once(lambda txn: self._put_about(txn, b"openings", " ".join(tokens).encode()))
        self.openings = tokens

    def rename(self, folder: Path) -> None:
        """Gives its folder another name, which must be free; it stays open.

        Raises:
            OSError: the name is taken.
        """
        self.folder.rename(folder)
        self.folder = folder

    @property
    def commits(self) -> int:
        """Transactions that have changed sessions so far."""
        return self._counts.commits

    def restamp(self, commits: int) -> None:
        """Counts on from `commits`: what is here is what another copy of this store had after so many."""
        counts = self._counts._replace(commits=commits)
        self._write_once(lambda txn: self._put_about(txn, b"counts", counts.packed()))
        self._counts = counts
        self._note_commits()

    # Reading.

    def session(self, actor: str, name: str) -> Session:
        """What is known of a session; of one that was never written, that it is not kept.

        Raises:
            StateDamagedError: it cannot be read.
        """
        session = Session(actor, name, None)
        with self._reading() as txn:
            session.header = self.header(txn, session.key)
        return session

    def header(self, txn: Txn, key: bytes) -> Header | None:
        """The header under a key, as a transaction sees it.

        Raises:
            StateDamagedError: it cannot be read.
        """
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
        with self._reading() as txn:
            return self._loaded(txn, session.key, header)

    def _loaded(self, txn: Txn, key: bytes, header: Header) -> Entries:
        self._check_records(txn, key, header)
        fields: Entries = {}
        sums: dict[str, tuple[int, int]] = {}
        for field, order, crc, data in self._entries(txn, key, header.number):
            fields.setdefault(field, []).append((order, data))
            count, sum_ = sums.get(field, (0, 0))
            sums[field] = count + 1, sum_ ^ crc
        for field, (count, sum_) in header.sums.items():
            found = sums.pop(field, (0, 0))
            if found != (count, sum_):
                what = f"{found[0]:,} entries were found and {count:,} were written"
                raise self._session_damaged(key, f"{field}: {what}" + ("" if found[0] != count else ", others"))
        if sums:
            raise self._session_damaged(key, f"{', '.join(sorted(sums))}: entries that nobody has written")
        return fields

    def whole(self, actor: str, name: str) -> Whole | None:
        """All of a session as it is at one moment, whoever writes meanwhile; None if it is not kept.

        Of one that lives in another store, that it does.

        Raises:
            StateDamagedError: something is missing or is not what was written.
        """
        key = key_of(actor, name)
        with self._reading() as txn:
            header = self.header(txn, key)
            if header is None:
                return None
            if header.standing == LEFT:
                return Whole(header, {}, [])
            return Whole(header, self._loaded(txn, key, header), self._outcomes(txn, key, header))

    def findings(self) -> Iterator[str]:
        """Reads all there is, as it is at one moment, and tells what is not as it was written."""
        with self._reading() as txn:
            numbers: set[bytes] = set()
            for key, _ in _with_prefix(txn, self._trees["sessions"], b""):
                try:
                    header = self.header(txn, key)
                    if header is not None:
                        numbers.add(_U64.pack(header.number))
                        if header.standing != LEFT:
                            self._loaded(txn, key, header)
                except StateDamagedError as error:
                    yield str(error)
            yield from self._stray(txn, numbers)
            yield from self._unindexed(txn)

    def _stray(self, txn: Txn, numbers: set[bytes]) -> Iterator[str]:
        for number in dict.fromkeys(number for _, number in _with_prefix(txn, self._trees["names"], b"")):
            if number not in numbers:
                yield f"{self.folder}: a session is known by its number alone ({number.hex()})"
        with txn.cursor(db=self._trees["entries"]) as cursor:
            found = cursor.first()
            while found:
                number = cursor.key()[:8]
                if number not in numbers:
                    yield f"{self.folder}: entries belong to no session that can be read ({number.hex()})"
                found = cursor.set_range(number + b"\xff" * 8)

    def _unindexed(self, txn: Txn) -> Iterator[str]:
        calls = self._trees["calls"]
        for key, value in _with_prefix(txn, self._trees["records"], b""):
            record = _decode(value, key, _RECORD)
            if record is None:
                yield f"{self.folder}: record {key.hex()} does not match its checksum"
                continue
            index = _U64.pack(record.number) + record.call
            listed = _checked(txn.get(index, b"", db=calls), index)
            if listed is None or listed[: _RECORD_KEY.size] != key:
                yield f"{self.folder}: record {key.hex()} cannot be found by its call {record.call.hex()}"

    def _check_records(self, txn: Txn, key: bytes, header: Header) -> None:
        """That all records of a session that have not expired can be found by their calls."""
        before: dict[bytes, bytes] = {}
        size = _RECORD_KEY.size
        for call, value in _with_prefix(txn, self._trees["calls"], _U64.pack(header.number)):
            data = _checked(value, call)
            if data is None:
                raise self._session_damaged(key, "the list of its calls does not match its checksums")
            before[data[:size]] = data[size:]
        counts = _Counts.unpacked(self._about(txn, b"counts"))
        for last, expired in zip(header.last, counts.expired, strict=True):
            while last > expired:
                if last not in before:
                    raise self._session_damaged(key, "what one of its calls came to is missing")
                last = before[last]

    def _entries(self, txn: Txn, key: bytes, number: int) -> Iterator[tuple[str, int, int, bytes]]:
        prefix = _U64.pack(number)
        for entry_key, value in _with_prefix(txn, self._trees["entries"], prefix):
            crc = zlib.crc32(value[4:], zlib.crc32(entry_key[8:]))
            if len(value) < 4 or _CRC.unpack_from(value)[0] != crc or len(entry_key) < _SHORTEST_KEY:
                raise self._session_damaged(key, "an entry does not match its checksum")
            yield entry_key[8:-9].decode(), _U64.unpack(entry_key[-8:])[0], crc, value[4:]

    def rows(self, session: Session, after: bytes, limit_bytes: int) -> tuple[list[Row], bytes]:
        """Entries of a session as they stand, unchecked, from the one after the key `after`, at least one; and the last key.

        It is empty when there are no more. What is read takes about `limit_bytes`, and with that what its last row has.
        """
        found: list[Row] = []
        if session.header is None:
            return found, b""
        size, prefix = 0, _U64.pack(session.header.number)
        with self._reading() as txn, txn.cursor(db=self._trees["entries"]) as cursor:
            if cursor.set_range(after + b"\0" if after else prefix):
                for row in cursor:
                    key, value = row
                    if key[:8] != prefix:
                        break
                    found.append(row)
                    size += len(value) + _ROW_BYTES
                    if size >= limit_bytes:
                        return found, key
        return found, b""

    def entries(self, session: Session, wanted: Iterable[tuple[str, int]]) -> list[Change]:
        """Some entries of a session as they are now; without data those that are not there.

        Raises:
            StateDamagedError: an entry is not what was written.
        """
        header = session.header
        found: list[Change] = []
        with self._reading() as txn:
            for field, order in wanted:
                key = _U64.pack(0 if header is None else header.number) + field.encode() + b"\0" + _U64.pack(order)
                value = txn.get(key, db=self._trees["entries"])
                data = None if value is None else _checked(value, key[8:])
                if value is not None and data is None:
                    raise self._session_damaged(session.key, "an entry does not match its checksum")
                found.append((field, order, data))
        return found

    def outcomes(self, session: Session) -> list[Outcome]:
        """What the calls of a session came to that are still remembered.

        Raises:
            StateDamagedError: it cannot be read.
        """
        if session.header is None:
            return []
        with self._reading() as txn:
            return self._outcomes(txn, session.key, session.header)

    def _outcomes(self, txn: Txn, key: bytes, header: Header) -> list[Outcome]:
        found: list[Outcome] = []
        for index, value in _with_prefix(txn, self._trees["calls"], _U64.pack(header.number)):
            record_key = self._record_key(key, index, value)
            data = txn.get(record_key, db=self._trees["records"])
            record = None if data is None else _decode(data, record_key, _RECORD)
            if record is not None:
                found.append(Outcome(record.call, record.payload, record.at_s, record_key[:1] == _KINDS[1]))
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
            index = _U64.pack(header.number) + call
            value = txn.get(index, db=self._trees["calls"])
            if value is None:
                return None
            key = self._record_key(session.key, index, value)
            data = txn.get(key, db=self._trees["records"])
        record = None if data is None else _decode(data, key, _RECORD)
        if record is None or record.call != call:
            raise self._session_damaged(session.key, f"what call {call.hex()} came to cannot be read")
        return record

    def _record_key(self, key: bytes, index: bytes, value: bytes) -> bytes:
        data = _checked(value, index)
        if data is None:
            raise self._session_damaged(key, "the list of its calls does not match its checksums")
        return data[: _RECORD_KEY.size]

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

    def write_together(self, writes: Sequence[Write]) -> None:
        """Makes all of them durable in one transaction, or none.

        Raises:
            StoreFullError: there is no room for them.
            StoreError: they cannot be written.
        """
        self._write_all(writes, time.time())

    def _write_alone(self, write: Write, now_s: float) -> Exception | None:
        try:
            self._write_all([write], now_s)
        except StoreLostError:
            raise
        except StoreError as error:
            return error
        return None

    def _write_all(self, writes: Sequence[Write], now_s: float) -> None:
        batch = _Batch(self, self._trees, self._counts, now_s)

        def apply(txn: Txn) -> None:
            self._put_about(txn, b"counts", batch.apply(txn, writes).packed())

        self._write_once(apply)
        self._counts = batch.counts
        self._note_commits()
        for session, header in batch.headers():
            session.header = header

    def _write_once(self, apply: Callable[[Txn], object]) -> None:
        """One transaction; the map grows as often as it takes."""
        with self._writing_once:
            if self._lock < 0:
                raise StoreError(f"{self.folder} has been closed", str(self.folder))
            self._write_while_open(apply)

    def _write_while_open(self, apply: Callable[[Txn], object]) -> None:
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
            data = _U64.pack(self._counts.commits)
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

    def compact_here(self) -> None:
        """Puts a copy without free pages in the place of the file, at once or not at all; the store is closed then.

        Raises:
            StoreBusyError: somebody reads it.
            StoreError: the folder cannot be written.
        """
        copy = self.folder / "compacted"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            _check_unread(self.folder)
            self.compact(copy)
            with self._guard.alone():
                self._env.close()
            _put_in_place(copy / _DATA_FILE, self.folder)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
            self.close()

    def close(self) -> None:
        """Gives the store to whoever wants it; idempotent."""
        with self._writing_once:  # what opens it may have been cancelled, and writes yet, in a thread
            if self._lock < 0:
                return
            with self._guard.alone():
                self._env.close()
            if self._commits_file >= 0:
                os.close(self._commits_file)
            os.close(self._lock)
            self._lock = -1


class _Counts(NamedTuple):
    """What a store counts: commits, the number of the next session, and the last records of each kind that have expired."""

    commits: int
    next: int
    expired_call: bytes
    expired_job: bytes

    @property
    def expired(self) -> tuple[bytes, bytes]:
        return self.expired_call, self.expired_job

    @classmethod
    def unpacked(cls, data: bytes) -> Self:
        return cls(*_COUNTS.unpack(data))

    def packed(self) -> bytes:
        return _COUNTS.pack(*self)


class _Draft:
    """The header of a session while its changes are written."""

    __slots__ = ("kinds", "last", "number", "other", "prefix", "schema", "standing", "sums")

    def __init__(self, number: int, header: Header | None) -> None:
        self.number = number
        self.prefix = _U64.pack(number)
        self.sums = {} if header is None else dict(header.sums)
        self.last = [b"", b""] if header is None else list(header.last)
        self.standing = HERE if header is None else header.standing
        self.other = "" if header is None else header.other
        self.schema = 0
        self.kinds: Mapping[str, str] = {}

    def header(self, now_s: float) -> Header:
        """What it has become."""
        last = self.last[0], self.last[1]
        return Header(self.number, self.sums, now_s, self.schema, dict(self.kinds), self.standing, self.other, last)


class _Batch:
    """Writes that become durable in one transaction; can be applied again where that has failed."""

    def __init__(self, store: Store, trees: Mapping[str, Tree], counts: _Counts, now_s: float) -> None:
        self.counts = counts
        self._store = store
        self._trees = trees
        self._before = counts
        self._now_s = now_s
        self._next = counts.next
        self._drafts: dict[bytes, _Draft | None] = {}
        self._sessions: list[Session] = []
        self._headers: dict[bytes, Header | None] = {}

    def headers(self) -> Iterable[tuple[Session, Header | None]]:
        """What has become of the sessions."""
        return ((session, self._headers[session.key]) for session in self._sessions)

    def apply(self, txn: Txn, writes: Sequence[Write]) -> _Counts:
        """Writes all of them; returns what the store counts then."""
        self._next = self._before.next
        self._drafts.clear()
        self._headers.clear()
        self._sessions = [write.session for write in writes]
        commit = self._before.commits + 1
        for place, write in enumerate(writes):
            if isinstance(write, Removal):
                self._remove(txn, write.session)
            elif isinstance(write, Departure):
                self._depart(txn, write)
            else:
                self._apply(txn, write, commit, place)
        self._put_headers(txn)
        expired = self._expire(txn, _EXPIRED_AT_ONCE * len(writes))
        self.counts = _Counts(commit, self._next, *expired)
        return self.counts

    def _draft(self, txn: Txn, session: Session, header: Header | None) -> _Draft:
        draft = self._drafts.get(session.key)
        if draft is not None:
            return draft
        if header is None or session.key in self._drafts:
            draft = _Draft(self._next, None)
            txn.put(_digest(session.key), draft.prefix, db=self._trees["names"])
            self._next += 1
        else:
            draft = _Draft(header.number, header)
            if txn.get(_digest(session.key), db=self._trees["names"]) != draft.prefix:
                what = f"session {session.name!r} of {session.actor!r} was removed meanwhile"
                raise StoreError(what, str(self._store.folder))
        self._drafts[session.key] = draft
        return draft

    def _apply(self, txn: Txn, commit: Commit, number: int, place: int) -> None:
        draft = self._draft(txn, commit.session, commit.session.header)
        if commit.call and draft.standing == LEFT:
            where = f"session {commit.session.name!r} of {commit.session.actor!r} is in store {draft.other}"
            raise StoreError(f"{where}: nothing is written of it here", str(self._store.folder))
        draft.schema, draft.kinds, draft.standing, draft.other = commit.schema, commit.kinds, commit.standing, commit.other
        if commit.lump is not None and commit.lump.rows:
            self._apply_lump(txn, commit.lump, draft)
        self._apply_changes(txn, commit.changes, draft)
        if commit.call:
            outcome = Outcome(commit.call, commit.payload, self._now_s, commit.is_job)
            self._record(txn, draft, outcome, number, place << 16)
        for position, outcome in enumerate(commit.records, 1):
            self._record(txn, draft, outcome, number, place << 16 | position)

    def _apply_changes(self, txn: Txn, changes: Iterable[Change], draft: _Draft) -> None:
        tree, sums, prefix = self._trees["entries"], draft.sums, draft.prefix
        for field, order, data in changes:
            key = field.encode() + b"\0" + _U64.pack(order)
            count, sum_ = sums.get(field, (0, 0))
            if data is None:
                old = txn.pop(prefix + key, tree)
            else:
                crc = zlib.crc32(data, zlib.crc32(key))
                old = txn.replace(prefix + key, _CRC.pack(crc) + data, tree)
                count, sum_ = count + 1, sum_ ^ crc
            if old is not None:
                count, sum_ = count - 1, sum_ ^ _CRC.unpack_from(old)[0]
            sums[field] = count, sum_

    def _apply_lump(self, txn: Txn, lump: Lump, draft: _Draft) -> None:
        """Puts rows of another store, with a number of this one, side by side if none of them is there, else one by one."""
        prefix = draft.prefix
        rows = [(prefix + key[8:], value) for key, value in lump.rows]
        with txn.cursor(db=self._trees["entries"]) as cursor:
            is_amid = cursor.set_range(rows[0][0])
            is_sorted = all(map(operator.lt, rows, itertools.islice(rows, 1, None)))
            if not is_sorted or (is_amid and cursor.key() <= rows[-1][0]):
                self._apply_changes(txn, lump.changes(), draft)
                return
            cursor.putmulti(rows, append=not is_amid)
        for field, (count, sum_) in lump.sums.items():
            former = draft.sums.get(field, (0, 0))
            draft.sums[field] = former[0] + count, former[1] ^ sum_

    def _record(self, txn: Txn, draft: _Draft, outcome: Outcome, commit: int, place: int) -> None:
        """One that is there already stays as it is: what was shipped may be applied again."""
        kind = int(outcome.is_job)
        key = _RECORD_KEY.pack(_KINDS[kind], commit, place)
        index, data = draft.prefix + outcome.call, key + draft.last[kind]
        if not txn.put(index, _sum(index, data) + data, overwrite=False, db=self._trees["calls"]):
            return
        _put(txn, self._trees["records"], key, Record(outcome.call, draft.number, outcome.at_s, outcome.payload))
        draft.last[kind] = key

    def _depart(self, txn: Txn, departure: Departure) -> None:
        key = departure.session.key
        draft = self._drafts.get(key)
        if draft is None:
            header = None if key in self._drafts else self._store.header(txn, key)
            if header is not None and header.standing not in (departure.standing, LEFT):
                self._headers[key] = header
                return
            draft = self._draft(txn, departure.session, header)
        elif draft.standing not in (departure.standing, LEFT):
            return
        tree = self._trees["entries"]
        with txn.cursor(db=tree) as cursor:
            cursor.set_range(draft.prefix)
            for _ in range(DEPARTED_AT_ONCE):
                if not cursor.key().startswith(draft.prefix):  # after the last one there is no key
                    break
                cursor.delete()
        draft.sums, draft.schema, draft.kinds, draft.standing, draft.other = {}, 0, {}, LEFT, departure.other

    def _put_headers(self, txn: Txn) -> None:
        for key, draft in self._drafts.items():
            header = None
            if draft is not None:
                header = draft.header(self._now_s)
                _put(txn, self._trees["sessions"], key, header)
            self._headers[key] = header

    def _remove(self, txn: Txn, session: Session) -> None:
        draft = self._drafts.get(session.key)
        names = self._trees["names"]
        prefix = draft.prefix if draft is not None else txn.get(_digest(session.key), db=names)
        if prefix is not None:
            entries = self._trees["entries"]
            for key in [key for key, _ in _with_prefix(txn, entries, prefix)]:
                txn.delete(key, db=entries)
            txn.delete(_digest(session.key), db=names)
        txn.delete(session.key, db=self._trees["sessions"])
        self._drafts[session.key] = None

    def _expire(self, txn: Txn, limit: int) -> tuple[bytes, bytes]:
        call, job = self._before.expired
        return (
            self._expire_kind(txn, _KINDS[0], RECORD_S, limit) or call,
            self._expire_kind(txn, _KINDS[1], JOB_RECORD_S, limit) or job,
        )

    def _expire_kind(self, txn: Txn, kind: bytes, kept_s: float, limit: int) -> bytes:
        """Removes the oldest records that are kept no more, and returns the key of the last of them."""
        records, calls = self._trees["records"], self._trees["calls"]
        last = b""
        for key, record in self._oldest(txn, kind, kept_s, limit):
            txn.delete(key, db=records)
            if record is not None:
                txn.delete(_U64.pack(record.number) + record.call, db=calls)
            last = key
        return last

    def _oldest(self, txn: Txn, kind: bytes, kept_s: float, limit: int) -> list[tuple[bytes, Record | None]]:
        """The oldest records, up to the last one known to be kept no more; one that cannot be read says nothing of its age."""
        found: list[tuple[bytes, Record | None]] = []
        expired = 0
        for key, value in _with_prefix(txn, self._trees["records"], kind):
            record = _decode(value, key, _RECORD)
            if len(found) == limit or (record is not None and self._now_s - record.at_s < kept_s):
                break
            found.append((key, record))
            if record is not None:
                expired = len(found)
        return found[:expired]


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


_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGNS_OF_DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)
_HEADER: Final = msgspec.msgpack.Decoder(Header)
_RECORD: Final = msgspec.msgpack.Decoder(Record)


def _sum(key: bytes, data: bytes) -> bytes:
    return _CRC.pack(zlib.crc32(data, zlib.crc32(key)))


def _checked(value: bytes, key: bytes) -> bytes | None:
    """What was written under `key`; None if `value` is something else."""
    data = value[4:]
    return data if value[:4] == _sum(key, data) else None


def _put(txn: Txn, tree: Tree, key: bytes, value: Header | Record) -> None:
    data = msgspec.msgpack.encode(value)
    txn.put(key, _sum(key, data) + data, db=tree)


def _decode(value: bytes, key: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """What stands under `key`; None if it is not what was written there."""
    data = _checked(value, key)
    if data is None:
        return None
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()


def _with_prefix(txn: Txn, tree: Tree, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with txn.cursor(db=tree) as cursor:
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value


def _damaged(folder: Path, what: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"{folder} is damaged: {what}; it is not opened: put a copy of it or an export in its place (nalar state import)",
        str(folder),
    )


def _other_format(folder: Path, found: int) -> StoreVersionError:
    if found > FORMAT:
        what = f"knows formats up to {FORMAT}: run the version that wrote it, or a later one"
    else:
        what = (
            f"cannot bring it to {FORMAT}: export it with the version that wrote it (nalar state export), and import that here"
        )
    return StoreVersionError(f"{folder} has format {found}, and this version of nalar-mq {what}", str(folder))


def _full(folder: Path) -> StoreFullError:
    return StoreFullError(f"{folder} is full: make room on its disk, or drop sessions (nalar state drop)", str(folder))


def _unusable(error: OSError, folder: Path) -> StoreError:
    if error.errno in _NO_ROOM:
        return _full(folder)
    return StoreError(f"the state of sessions cannot be kept in {folder}: {error.strerror or error}", str(folder))


def _is_disk_full(folder: Path) -> bool:
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _LITTLE_ROOM


def _translated(error: lmdb.Error, folder: Path) -> StoreError:
    if isinstance(error, lmdb.MapFullError) or any(os.strerror(reason) in str(error) for reason in _NO_ROOM):
        return _full(folder)
    if os.strerror(errno.EIO) in str(error) and _is_disk_full(folder):
        return _full(folder)  # LMDB calls a write that was cut short an error of the device
    if isinstance(error, _SIGNS_OF_DAMAGE):
        return _damaged(folder, str(error))
    return StoreError(f"{folder} cannot be used: {error}", str(folder))


def _locked(folder: Path, owner: str) -> int:
    """The lock on a folder; the kernel takes it back when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(error, folder) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, msgspec.json.encode(Owner(owner, os.getpid())), 0)
    except BlockingIOError:
        os.close(lock)
        raise _busy(folder) from None
    except OSError as error:
        if error.errno not in _NO_ROOM:  # a lock holds without its holder's name
            os.close(lock)
            raise _unusable(error, folder) from error
    return lock


def _busy(folder: Path) -> StoreBusyError:
    holder = owner_of(folder)
    who = f"{holder.name!r}, process {holder.pid}" if holder is not None else "another process"
    return StoreBusyError(f"{folder} is open in {who}", str(folder))


def _shared(folder: Path) -> int:
    """The file of a store, which nobody puts another in the place of as long as it is open here."""
    path = folder / _DATA_FILE
    try:
        while True:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
            os.close(file)
    except FileNotFoundError:
        raise StoreError(f"there is no store in {folder}", str(folder)) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", str(folder)) from error


def owner_of(folder: Path) -> Owner | None:
    """Who opened the store in a folder last; it may have ended."""
    try:
        return msgspec.json.decode((folder / _LOCK_FILE).read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _check_unread(folder: Path) -> None:
    file = os.open(folder / _DATA_FILE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StoreBusyError(f"{folder} is being read by another process", str(folder)) from None
    finally:
        os.close(file)


def _put_in_place(data: Path, folder: Path) -> None:
    try:
        for path in (data, folder):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(file)
            os.close(file)
            if path == data:
                (folder / _READERS_FILE).unlink(missing_ok=True)  # it knows the transactions of the other file
                data.replace(folder / _DATA_FILE)
    except OSError as error:
        raise _unusable(error, folder) from error


def _opened(folder: Path, limit_bytes: int) -> lmdb.Environment:
    path = folder / _DATA_FILE
    if not path.exists() and _read_commits(folder):
        raise _damaged(folder, f"{_DATA_FILE} is missing")
    for finding in examine(folder, whole=False):
        raise _damaged(folder, finding)
    size = path.stat().st_size if path.exists() else 0
    map_size = min(max(_FIRST_MAP, 1 << (size * 2).bit_length()), max(limit_bytes, size))
    try:
        _give_room(folder / _READERS_FILE)
        return lmdb.open(str(folder), map_size=map_size, max_dbs=len(_TREES) + 2, readahead=False, meminit=False, mode=0o600)
    except lmdb.Error as error:
        raise _translated(error, folder) from error
    except OSError as error:
        raise _unusable(error, folder) from error


def _give_room(path: Path) -> None:
    """Has the file where LMDB keeps its readers stand on the disk: it is mapped, and a full disk would end the process."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(file).st_size
        if size < _READERS_BYTES:
            os.pwrite(file, bytes(_READERS_BYTES - size), size)
    finally:
        os.close(file)


def _opened_to_read(folder: Path) -> lmdb.Environment:
    def opened(lock: bool) -> lmdb.Environment:
        return lmdb.open(
            str(folder),
            map_size=_LARGEST_MAP,
            max_dbs=len(_TREES) + 2,
            readonly=True,
            create=False,
            readahead=False,
            lock=lock,
        )

    try:
        try:
            return opened(True)
        except lmdb.Error:
            if os.access(folder / _READERS_FILE, os.W_OK):
                raise
            return opened(False)  # nobody can write there
    except lmdb.Error as error:
        raise _translated(error, folder) from error


def _examine_open(env: lmdb.Environment, file: int, folder: Path, *, whole: bool) -> None:
    """Examines what is in force now, while a reader holds it and others may write."""
    while True:
        with env.begin() as txn:
            try:
                _check_pages(file, txn.id(), whole=whole)
                return
            except pages.TransactionGone:
                continue  # two commits came between
            except (pages.PagesDamaged, pages.LayoutUnknown, OSError) as error:
                raise _damaged(folder, f"{folder / _DATA_FILE}: {error}") from None


def _read_commits(folder: Path) -> int:
    """How many commits the store is known to have had at least; 0 if that is not known."""
    try:
        data = (folder / _COMMITS_FILE).read_bytes()
    except OSError:
        return 0
    if len(data) != 12 or _CRC.unpack_from(data, 8)[0] != zlib.crc32(data[:8]):
        return 0
    return int(_U64.unpack_from(data)[0])
