"""The managed state of one session: its entries, who may change them, and what the running call has changed.

A field of an agent (`ManagedList`, `ManagedDict`, `ManagedValue`) is a table of entries: an order number, and a value.
Appending to a list or setting a key writes one entry, whatever the size of the rest.

Life of a change:

    begin ──▶ changed in place, with a way back ──▶ seal ──▶ commit      the call succeeded
                                                      │
                                                      └────▶ roll_back   it failed or was cancelled: nothing of it stays

Values are plain (None, booleans, numbers, text, bytes) or nested. A nested one is kept as its bytes. A call that reads it gets
an object of its own; `seal` compares all that were handed out with their bytes, so that a change which nobody assigned back
is an error and not lost. What a call keeps of them beyond its end is detached from the state.

Only the call that holds the session changes anything. Its re-entrant children read what it has changed so far. Code outside
any session, such as a unit test that makes an agent itself, has state that nobody keeps: there everything is allowed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from nalar_mq import values
from nalar_mq.call_context import CallContext, current_context
from nalar_mq.errors import StateMutatedError, StateWriteError
from nalar_mq.stores import Kept

_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes})
_SHOWN: Final = 60
# Of what MessagePack writes with a first byte from 0xC0 on: nil, booleans, floating-point numbers and integers; 0 for the rest.
_SIZES: Final = (1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 5, 9, 2, 3, 5, 9, 2, 3, 5, 9)

_decode_array: Final = msgspec.msgpack.Decoder(list[Any]).decode

Entries = Mapping[str, list[tuple[int, bytes]]]
"""By field the entries of a session, in their order."""


class Change(NamedTuple):
    """One entry of a session that a call has written; `data` is None where it is gone."""

    field: str
    order: int
    data: bytes | None


class Nested:
    """A value that can be changed from inside: its bytes, and the object that the running call has been given."""

    __slots__ = ("data", "is_held", "is_out", "value")

    def __init__(self, data: bytes, value: Any = None, *, is_out: bool = False) -> None:
        self.data = data
        self.value = value
        self.is_out = is_out
        self.is_held = not is_out

    def take_back(self) -> None:
        """Whoever has the object keeps it; the next one gets another."""
        self.value, self.is_out = None, False


def cell_from(data: bytes) -> Any:
    """What a field keeps for an entry read from elsewhere."""
    first = data[0] if data else 0xC1
    is_nested = 0x80 <= first <= 0x9F or 0xDC <= first <= 0xDF or 0xC7 <= first <= 0xC9 or 0xD4 <= first <= 0xD8
    return Nested(data) if is_nested else values.decode(data)


def bytes_of(cell: Any) -> bytes:
    """The bytes of what a field keeps."""
    return cell.data if type(cell) is Nested else values.encode(cell)


def value_of(cell: Any) -> Any:
    """The value of what a field keeps, for nobody to change."""
    return values.decode(cell.data) if type(cell) is Nested else cell


class SessionState:
    """The managed state of one session of an agent.

    Reading is for any thread and never waits. Changes are for the threads of one call at a time.

    Args:
        where: what it belongs to, for messages.
        is_kept: False for state of its own, that anybody may change and nobody keeps.

    Attributes:
        parts: its fields by name.
        kept: where in the stores it is; None if it is in memory alone.
        is_beginning: the `__init__` of unmodified code is running, which gives a new session what it begins with.
    """

    def __init__(self, where: str = "", *, is_kept: bool = False) -> None:
        self.where = where
        self.is_kept = is_kept
        self.lock = threading.RLock()
        self.parts: dict[str, Any] = {}
        self.kept: Kept | None = None
        self.is_beginning = False
        self._writer: CallContext | None = None
        self._written: dict[tuple[str, int], tuple[Any, ...] | None] = {}
        self._way_back: list[Callable[[], None]] = []
        self._way_end: dict[str, Callable[[], None]] = {}
        self._out: list[tuple[str, Nested]] = []

    # What fields do.

    def check_writable(self, field: str) -> None:
        """Raises `StateWriteError` unless the running code is the call that holds the session."""
        if self.is_beginning and not self.was_kept:
            return
        if self.is_kept and (self._writer is None or current_context.get() is not self._writer):
            raise StateWriteError(f"{self.name_of(field)} {_why_not(self._writer)}")

    def put(self, field: str, order: int, *cells: Any) -> None:
        """Notes that an entry consists of `cells` from now on: a value, or a key and a value."""
        if self.is_kept:
            self._written[field, order] = cells

    def drop(self, field: str, order: int) -> None:
        """Notes that an entry is gone."""
        if self.is_kept:
            self._written[field, order] = None

    def on_roll_back(self, undo: Callable[[], None]) -> None:
        """How the change just made is taken back."""
        if self.is_kept:
            self._way_back.append(undo)

    def on_rolled_back(self, field: str, settle: Callable[[], None]) -> None:
        """What the field does once all changes have been taken back."""
        if self.is_kept:
            self._way_end[field] = settle

    def cell(self, field: str, value: Any) -> Any:
        """What the field keeps for `value`.

        Raises:
            ValueNotEncodableError: it cannot be kept.
        """
        if type(value) in _PLAIN:
            return value
        nested = Nested(values.encode(value, None, self.name_of(field)), value, is_out=True)
        if self.is_kept:
            self._out.append((field, nested))
        return nested

    def give(self, field: str, cell: Any) -> Any:
        """The value of a cell, for the running code to use."""
        if type(cell) is not Nested:
            return cell
        if cell.is_out:
            return cell.value
        if self.is_kept and self._writer is None:
            return values.decode(cell.data)
        with self.lock:
            if not cell.is_out:
                cell.value, cell.is_out = values.decode(cell.data), True
                self._out.append((field, cell))
        return cell.value

    # What the host does.

    @property
    def was_kept(self) -> bool:
        """True if something of the session was committed before."""
        return self.kept is not None and self.kept.session.is_kept

    def end_beginning(self) -> None:
        """What the session begins with is there: the first call that succeeds commits it as well."""
        self.is_beginning = False
        with self.lock:
            for _, nested in self._out:
                nested.take_back()
            self._way_back, self._way_end, self._out = [], {}, []

    def begin(self, writer: CallContext) -> None:
        """The call of that context may change the state from now on."""
        self._writer = writer

    def seal(self) -> list[Change]:
        """What the call has changed; it changes nothing after that.

        Raises:
            StateMutatedError: a value was changed in place and not assigned back.
        """
        with self.lock:
            for field, nested in self._out:
                if nested.is_held and not _is_unchanged(nested):
                    raise StateMutatedError(
                        f"{self.name_of(field)}: a value was changed in place, and the state has not seen it: "
                        f"assign it back as a whole, as in `state[key] = value`; it is now {_shown(nested.value)}"
                    )
            self._writer = None
            return [
                Change(field, order, None if cells is None else b"".join(map(bytes_of, cells)))
                for (field, order), cells in self._written.items()
            ]

    def commit(self) -> None:
        """The changes are what everybody sees."""
        with self.lock:
            self._forget_call()

    def roll_back(self) -> None:
        """Nothing of the call stays."""
        with self.lock:
            for undo in reversed(self._way_back):
                undo()
            for settle in self._way_end.values():
                settle()
            self._forget_call()

    def _forget_call(self) -> None:
        for _, nested in self._out:
            nested.take_back()
        self._writer = None
        self._written, self._way_back, self._way_end, self._out = {}, [], {}, []

    def name_of(self, field: str) -> str:
        """What a field is called in messages."""
        return f"{self.where}.{field}" if self.where else field or "a managed value"


def hold(cells: Iterable[Any], is_held: bool) -> None:
    """Cells come into their field, or leave it: whoever has the value of one that has left may do with it what he likes."""
    for cell in cells:
        if type(cell) is Nested:
            cell.is_held = is_held


def pair_from(data: bytes) -> tuple[Any, Any]:
    """The cells of an entry that is a key and a value."""
    size = _size_of_first(data)
    return values.decode(data[:size]), cell_from(data[size:])


def cells_from(entries: Sequence[bytes]) -> list[Any]:
    """`cell_from` of each; plain values are read all at once."""
    return _plain_in(entries, 1) or [cell_from(data) for data in entries]


def pairs_from(entries: Sequence[bytes]) -> tuple[list[Any], list[Any]]:
    """The keys and the values of what `pair_from` makes of each; plain ones are read all at once."""
    found = _plain_in(entries, 2)
    if found:
        return found[::2], found[1::2]
    pairs = [pair_from(data) for data in entries]
    return [key for key, _ in pairs], [cell for _, cell in pairs]


def _plain_in(entries: Sequence[bytes], parts: int) -> list[Any]:
    """The values that the entries consist of, each of so many; empty if one of them is not plain."""
    count = len(entries) * parts
    if (
        not count
        or (parts == 1 and type(cell_from(entries[0])) is Nested)
        or (parts == 2 and type(pair_from(entries[0])[1]) is Nested)
    ):
        return []
    try:
        found = _decode_array(b"".join((b"\xdd", count.to_bytes(4, "big"), *entries)))
    except Exception:  # the attempt at the one that is wrong says what is wrong with it
        return []
    return found if _PLAIN.issuperset(map(type, found)) else []


def _size_of_first(data: bytes) -> int:
    first = data[0] if data else 0xC1
    if first < 0x80 or first >= 0xE0:
        return 1
    if 0xA0 <= first <= 0xBF:
        return 1 + (first & 0x1F)
    if 0xC0 <= first <= 0xD3 and (size := _SIZES[first - 0xC0]):
        return size
    key, _ = msgspec.msgpack.decode(b"\x92" + data, type=tuple[msgspec.Raw, msgspec.Raw])
    return len(bytes(key))


def _is_unchanged(nested: Nested) -> bool:
    try:
        return values.encode(nested.value) == nested.data
    except Exception:
        return False


def _why_not(writer: CallContext | None) -> str:
    running = current_context.get()
    if writer is not None and running is not None and running.call_id != writer.call_id:
        return "can only be read here: another call holds the session, as a rule one that waits for this one"
    return (
        "can only be changed by a call, while it runs: `__init__`, `on_start` and `on_stop` run more than once in the life "
        "of a session, and code that a call has left behind belongs to none"
    )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"an instance of {type(value).__qualname__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
