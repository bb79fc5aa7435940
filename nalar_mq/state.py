"""Managed state: what an agent keeps of a session, in what looks like a list, a dict or one value.

    @agent
    class Notebook:
        notes: ManagedList[str]
        seen: ManagedDict[str, int]
        title: ManagedValue[str] = ManagedValue("untitled")

        @method
        async def note(self, text: str) -> int:
            self.notes.append(text)
            self.seen[text] = self.seen.get(text, 0) + 1
            return len(self.notes)

Annotating a field is declaring it: it is bound to the session of the running call. A call sees what earlier calls have
committed and its own changes; if it fails or is cancelled, nothing of it stays. Values are whatever can travel between actors.
A value inside is replaced as a whole: change it and assign it back, else the call fails with `StateMutatedError`.

Everything that lists and dicts do is there, and `list(x)` or `dict(x)` gives a plain one. They are no subclasses of those, so
that code written in C, such as `heapq`, cannot change them unseen; across calls they travel as plain ones.
"""

from __future__ import annotations

import ast
import bisect
import functools
import itertools
import operator
import sys
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
    ValuesView,
)
from collections.abc import ItemsView as AbstractItemsView
from typing import Any, Final, Generic, NamedTuple, Protocol, Self, SupportsIndex, TypeVar, cast, overload

import msgspec

from nalar_mq import values
from nalar_mq.errors import DirectiveError, StateSchemaError
from nalar_mq.field_types import Elements, classes_in, describe, elements_of, fits, kind_in
from nalar_mq.session_state import Entries, SessionState, bytes_of, cell_from, cells_from, hold, pair_from, pairs_from, value_of

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")

_STATE: Final = "_nalar_state"
_FIRST: Final = 1 << 63
_APART: Final = 1 << 32
_ROOM: Final = 1 << 24
_REACH: Final = 16
_MISSING: Final[Any] = object()
_NONE: Final[Any] = None

_Follow = Callable[[Sequence[tuple[int, bytes | None]]], None]
"""Has a field take the entries of a session that is on its way: order, and data, which is missing where the entry is gone."""


class _New(NamedTuple):
    """Entries that a field has not had, in their order."""

    orders: Sequence[int]
    entries: Sequence[bytes]


def _new_after(last: int, changes: Sequence[tuple[int, bytes | None]]) -> _New | None:
    """The changes, if they are nothing but new entries, in their order, after the one at `last`."""
    orders, entries = [order for order, _ in changes], [data for _, data in changes if data is not None]
    is_new = len(entries) == len(orders) > 0 and orders[0] > last
    return _New(orders, entries) if is_new and all(map(operator.lt, orders, orders[1:])) else None


class ManagedList(MutableSequence[T]):
    """A list that the runtime keeps for a session. An append writes one entry, however long the list is."""

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._state = SessionState()
        self._field = ""
        self._elements: Elements | None = None
        self._cells: list[Any] = []
        self._orders: list[int] = []
        self.extend(items)

    def _bind(self, state: SessionState, field: str, entries: Sequence[tuple[int, bytes]]) -> None:
        self._state, self._field = state, field
        self._orders = [order for order, _ in entries]
        self._cells = [cell_from(data) for _, data in entries]

    def _entries(self) -> list[tuple[int, bytes]]:
        return [(order, bytes_of(cell)) for order, cell in zip(self._orders, self._cells, strict=True)]

    def _follower(self) -> _Follow:
        return self._take

    def _take(self, changes: Sequence[tuple[int, bytes | None]]) -> None:
        if new := _new_after(self._orders[-1] if self._orders else -1, changes):
            self._cells.extend(cells_from(new.entries))
            self._orders.extend(new.orders)
            return
        for order, data in changes:
            if data is not None and (not self._orders or order > self._orders[-1]):
                self._cells.append(cell_from(data))
                self._orders.append(order)
                continue
            position = bisect.bisect_left(self._orders, order)
            stop = position + (position < len(self._orders) and self._orders[position] == order)
            self._cells[position:stop] = [] if data is None else [cell_from(data)]
            self._orders[position:stop] = [] if data is None else [order]

    def __nalar_plain__(self) -> list[T]:
        return [value_of(cell) for cell in self._cells]

    # Reading.

    def _given(self, cells: Iterable[Any]) -> list[T]:
        give, field = self._state.give, self._field
        return [give(field, cell) for cell in cells]

    def __len__(self) -> int:
        return len(self._cells)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self._given(self._cells[index])
        return cast("T", self._state.give(self._field, self._cells[index]))

    def __iter__(self) -> Iterator[T]:
        give, field = self._state.give, self._field
        for cell in self._cells:
            yield give(field, cell)

    def __reversed__(self) -> Iterator[T]:
        give, field = self._state.give, self._field
        for cell in reversed(self._cells):
            yield give(field, cell)

    def __contains__(self, value: object) -> bool:
        return any(found is value or found == value for found in self)

    def index(self, value: Any, start: SupportsIndex = 0, stop: SupportsIndex = sys.maxsize) -> int:
        """The position of the first item that equals `value`, from `start` to before `stop`.

        Raises:
            ValueError: there is none.
        """
        first, last, _ = slice(start, stop).indices(len(self._cells))
        for position in range(first, min(last, len(self._cells))):
            found = self[position]
            if found is value or found == value:
                return position
        raise ValueError(f"{value!r} is not in list")

    def count(self, value: Any) -> int:
        """How many items equal `value`."""
        return sum(found is value or found == value for found in self)

    def copy(self) -> list[T]:
        """A plain list of the items."""
        return list(self)

    def __repr__(self) -> str:
        return repr(list(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, ManagedList)):
            return NotImplemented
        return list(self) == _plain_list(cast("list[T]", other))

    def __lt__(self, other: list[T] | ManagedList[T]) -> bool:
        return list(self) < _plain_list(other)

    def __le__(self, other: list[T] | ManagedList[T]) -> bool:
        return list(self) <= _plain_list(other)

    def __gt__(self, other: list[T] | ManagedList[T]) -> bool:
        return list(self) > _plain_list(other)

    def __ge__(self, other: list[T] | ManagedList[T]) -> bool:
        return list(self) >= _plain_list(other)

    def __add__(self, other: list[T] | ManagedList[T]) -> list[T]:
        return list(self) + _plain_list(other)

    def __radd__(self, other: list[T]) -> list[T]:
        return _plain_list(other) + list(self)

    def __mul__(self, times: SupportsIndex) -> list[T]:
        return list(self) * times

    __rmul__ = __mul__

    # Changing.

    @overload
    def __setitem__(self, index: SupportsIndex, value: T) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[T]) -> None: ...
    def __setitem__(self, index: SupportsIndex | slice, value: Any) -> None:
        if not isinstance(index, slice):
            position = self._position(index)
            self._splice(position, position + 1, [value])
            return
        start, stop, step = index.indices(len(self._cells))
        items = list(value)
        if step == 1:
            self._splice(start, max(start, stop), items)
            return
        positions = range(start, stop, step)
        if len(items) != len(positions):
            found = f"attempt to assign sequence of size {len(items)} to extended slice of size {len(positions)}"
            raise ValueError(found)
        cells = list(self._cells)
        for position, cell in zip(positions, self._new_cells(items), strict=True):
            cells[position] = cell
        self._rearrange(cells)

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        if not isinstance(index, slice):
            position = self._position(index)
            self._splice(position, position + 1, [])
            return
        start, stop, step = index.indices(len(self._cells))
        if step == 1:
            self._splice(start, max(start, stop), [])
            return
        with self._state.lock:
            gone = set(range(start, stop, step))
            self._keep_only([position for position in range(len(self._cells)) if position not in gone])

    def insert(self, index: SupportsIndex, value: T) -> None:
        """Puts `value` before the item at `index`."""
        position = slice(index, None).indices(len(self._cells))[0]
        self._splice(position, position, [value])

    def append(self, value: T) -> None:
        """Puts `value` behind the last item."""
        self._splice(len(self._cells), len(self._cells), [value])

    def extend(self, values: Iterable[T]) -> None:
        """Puts all `values` behind the last item."""
        items = list(values)
        self._splice(len(self._cells), len(self._cells), items)

    def pop(self, index: SupportsIndex = -1) -> T:
        """Removes the item at `index` and returns it.

        Raises:
            IndexError: there is none.
        """
        if not self._cells:
            raise IndexError("pop from empty list")
        value = self[index]
        del self[index]
        return value

    def remove(self, value: T) -> None:
        """Removes the first item that equals `value`.

        Raises:
            ValueError: there is none.
        """
        del self[self.index(value)]

    def clear(self) -> None:
        """Removes all items."""
        self._splice(0, len(self._cells), [])

    def reverse(self) -> None:
        """Turns the order of the items around."""
        with self._state.lock:
            self._rearrange(self._cells[::-1])

    @overload
    def sort(self: ManagedList[Any], *, key: None = None, reverse: bool = False) -> None: ...
    @overload
    def sort(self, *, key: Callable[[T], Any], reverse: bool = False) -> None: ...
    def sort(self, *, key: Callable[[T], Any] | None = None, reverse: bool = False) -> None:
        """Puts the items in order; those that are equal keep theirs."""
        items: list[Any] = list(self)
        ranks: list[Any] = items if key is None else [key(item) for item in items]
        positions = sorted(range(len(items)), key=ranks.__getitem__, reverse=reverse)
        with self._state.lock:
            if len(self._cells) != len(items):
                raise ValueError("list modified during sort")
            self._rearrange([self._cells[position] for position in positions])

    def __iadd__(self, values: Iterable[T]) -> Self:
        self.extend(values)
        return self

    def __imul__(self, times: SupportsIndex) -> Self:
        count = operator.index(times)
        if count > 0:
            self.extend(list(self) * (count - 1))
        else:
            self.clear()
        return self

    def _position(self, index: SupportsIndex) -> int:
        try:
            return range(len(self._cells))[index]
        except IndexError:
            raise IndexError("list index out of range") from None

    def _new_cells(self, items: list[Any]) -> list[Any]:
        state, field, elements = self._state, self._field, self._elements
        state.check_writable(field)
        if elements is not None:
            exact = elements.exact
            for item in items:
                if type(item) not in exact:
                    elements.check(item, f"an item of {state.name_of(field)}")
        return [state.cell(field, item) for item in items]

    def _splice(self, start: int, stop: int, items: list[Any]) -> None:
        """Puts `items` in the place of those from `start` to before `stop`, and writes no more than that."""
        new = self._new_cells(items)
        state, field = self._state, self._field
        with state.lock:
            old = self._cells[start:stop]
            kept = min(len(old), len(new))
            fresh = self._orders_for(stop, len(new) - kept) if len(new) > kept else []
            orders = [*self._orders[start : start + kept], *fresh]
            for order in self._orders[start + kept : stop]:
                state.drop(field, order)
            for order, cell in zip(orders, new, strict=True):
                state.put(field, order, cell)
            old_orders = self._orders[start:stop]
            self._cells[start:stop] = new
            self._orders[start:stop] = orders
            hold(old, False)
            hold(new, True)

            def undo() -> None:
                self._cells[start : start + len(new)] = old
                self._orders[start : start + len(new)] = old_orders
                hold(new, False)
                hold(old, True)

            state.on_roll_back(undo)

    def _rearrange(self, cells: list[Any]) -> None:
        """Has as many items as before in other places; writes those that are not where they were."""
        state, field = self._state, self._field
        state.check_writable(field)
        with state.lock:
            for order, before, after in zip(self._orders, self._cells, cells, strict=True):
                if before is not after:
                    state.put(field, order, after)
            self._replace(cells, self._orders)

    def _keep_only(self, positions: list[int]) -> None:
        state, field = self._state, self._field
        state.check_writable(field)
        with state.lock:
            orders = [self._orders[position] for position in positions]
            for order in set(self._orders).difference(orders):
                state.drop(field, order)
            self._replace([self._cells[position] for position in positions], orders)

    def _replace(self, cells: list[Any], orders: list[int]) -> None:
        old, old_orders = self._cells[:], self._orders[:]
        hold(old, False)
        hold(cells, True)
        self._cells[:], self._orders[:] = cells, orders

        def undo() -> None:
            hold(cells, False)
            hold(old, True)
            self._cells[:], self._orders[:] = old, old_orders

        self._state.on_roll_back(undo)

    def _orders_for(self, at: int, count: int) -> list[int]:
        """Numbers for `count` entries before the one at `at`."""
        orders = self._orders
        if at == len(orders):
            before = orders[-1] if orders else _FIRST
            return [before + _APART * number for number in range(1, count + 1)]
        if at == 0:
            return [orders[0] - _APART * number for number in range(count, 0, -1)]
        if orders[at] - orders[at - 1] <= count:
            self._make_room(at, count)
        before, room = orders[at - 1], orders[at] - orders[at - 1]
        return [before + room * number // (count + 1) for number in range(1, count + 1)]

    def _make_room(self, at: int, count: int) -> None:
        """Numbers the entries around a place anew, as few of them as it takes to have room."""
        orders, reach = self._orders, max(_REACH, count)
        while True:
            first, last = max(0, at - reach), min(len(orders), at + reach)
            wanted = (last - first + count + 2) * _ROOM
            low = orders[first - 1] if first else orders[0] - wanted
            high = orders[last] if last < len(orders) else orders[-1] + wanted
            if high - low >= wanted:
                break
            reach *= 2
        old, step = orders[first:last], (high - low) // (last - first + count + 1)
        places = (position + 1 if position < at else position + 1 + count for position in range(first, last))
        new = [low + step * (place - first) for place in places]
        for order in old:
            self._state.drop(self._field, order)
        for order, cell in zip(new, self._cells[first:last], strict=True):
            self._state.put(self._field, order, cell)
        orders[first:last] = new

        def undo() -> None:
            self._orders[first:last] = old

        self._state.on_roll_back(undo)


class _Slot(msgspec.Struct, eq=False):
    """What a dict keeps for a key: the key itself, the number of its entry, and the cell of the value."""

    key: Any
    order: int
    cell: Any


class ManagedDict(MutableMapping[K, V]):
    """A dict that the runtime keeps for a session. Setting a key writes one entry, however many there are."""

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        self._state = SessionState()
        self._field = ""
        self._keys: Elements | None = None
        self._elements: Elements | None = None
        self._slots: dict[Any, _Slot] = {}
        self._next = _FIRST
        self.update(items)

    def _bind(self, state: SessionState, field: str, entries: Sequence[tuple[int, bytes]]) -> None:
        self._state, self._field = state, field
        self._slots = {}
        for order, data in entries:
            key, cell = pair_from(data)
            self._slots[key] = _Slot(key, order, cell)
        self._next = entries[-1][0] + 1 if entries else _FIRST

    def _entries(self) -> list[tuple[int, bytes]]:
        return [(slot.order, values.encode(slot.key) + bytes_of(slot.cell)) for slot in self._slots.values()]

    def _follower(self) -> _Follow:
        return functools.partial(self._take, {slot.order: slot for slot in self._slots.values()})

    def _take(self, by_order: dict[int, _Slot], changes: Sequence[tuple[int, bytes | None]]) -> None:
        slots, is_in_order = self._slots, True
        if (new := _new_after(self._next - 1, changes)) and self._take_new(by_order, new):
            return
        for order, data in changes:
            former = by_order.pop(order, None)
            key, cell = (_MISSING, None) if data is None else pair_from(data)
            if former is not None and former.key != key and slots.get(former.key) is former:
                del slots[former.key]
            if data is None:
                continue
            old = slots.get(key)
            if old is not None and old.order != order:  # it went and came again
                del slots[key]
                old = None
            is_in_order = is_in_order and (old is not None or order >= self._next)
            by_order[order] = slots[key] = _Slot(key, order, cell)
            self._next = max(self._next, order + 1)
        if not is_in_order:
            self._put_in_order()

    def _take_new(self, by_order: dict[int, _Slot], new: _New) -> bool:
        """Takes entries that come after all others, all at once; False if one of the keys is there already."""
        keys, cells = pairs_from(new.entries)
        if len({*keys}) < len(keys) or not self._slots.keys().isdisjoint(keys):
            return False
        slots = list(map(_Slot, keys, new.orders, cells))
        self._slots.update(zip(keys, slots, strict=True))
        by_order.update(zip(new.orders, slots, strict=True))
        self._next = new.orders[-1] + 1
        return True

    def _put_in_order(self) -> None:
        self._slots = {slot.key: slot for slot in sorted(self._slots.values(), key=lambda slot: slot.order)}

    def __nalar_plain__(self) -> dict[K, V]:
        return {key: value_of(slot.cell) for key, slot in self._slots.items()}

    # Reading.

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, key: K) -> V:
        return cast("V", self._state.give(self._field, self._slots[key].cell))

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __iter__(self) -> Iterator[K]:
        return iter(self._slots)

    def __reversed__(self) -> Iterator[K]:
        return reversed(self._slots)

    def keys(self) -> KeysView[K]:
        """A live view of the keys, in the order in which they came."""
        return _Keys(self)

    def values(self) -> ValuesView[V]:
        """A live view of the values."""
        return _Values(self)

    def items(self) -> AbstractItemsView[K, V]:
        """A live view of the pairs."""
        return _Items(self)

    def copy(self) -> dict[K, V]:
        """A plain dict of the items."""
        return dict(self.items())

    def __repr__(self) -> str:
        return repr(self.copy())

    def __eq__(self, other: object) -> bool:
        return self.copy() == _plain_dict(other) if isinstance(other, (dict, ManagedDict)) else NotImplemented

    def __or__(self, other: Mapping[K, V]) -> dict[K, V]:
        return self.copy() | _plain_dict(other) if isinstance(other, (dict, ManagedDict)) else NotImplemented

    def __ror__(self, other: Mapping[K, V]) -> dict[K, V]:
        return _plain_dict(other) | self.copy() if isinstance(other, (dict, ManagedDict)) else NotImplemented

    # Changing.

    def __setitem__(self, key: K, value: V) -> None:
        state, field, slots = self._state, self._field, self._slots
        state.check_writable(field)
        if self._keys is not None and type(key) not in self._keys.exact:
            self._keys.check(key, f"a key of {state.name_of(field)}")
        if self._elements is not None and type(value) not in self._elements.exact:
            self._elements.check(value, f"a value of {state.name_of(field)}")
        values.encode(key, None, f"a key of {field or 'a managed dict'}")
        cell = state.cell(field, value)
        with state.lock:
            former = slots.get(key)
            if former is None:
                slot = _Slot(key, self._next, cell)
                self._next += 1
            else:
                slot = _Slot(former.key, former.order, cell)
                hold([former.cell], False)
            slots[key] = slot
            hold([cell], True)
            state.put(field, slot.order, slot.key, cell)

            def undo() -> None:
                hold([cell], False)
                if former is None:
                    del self._slots[key]
                else:
                    self._slots[key] = former
                    hold([former.cell], True)

            state.on_roll_back(undo)

    def __delitem__(self, key: K) -> None:
        state, field = self._state, self._field
        state.check_writable(field)
        with state.lock:
            slot = self._slots.pop(key)
            state.drop(field, slot.order)
            state.on_rolled_back(field, self._put_in_order)
            hold([slot.cell], False)

            def undo() -> None:
                self._slots[slot.key] = slot
                hold([slot.cell], True)

            state.on_roll_back(undo)

    def popitem(self) -> tuple[K, V]:
        """Removes the pair that came last and returns it.

        Raises:
            KeyError: there is none.
        """
        key = next(reversed(self._slots), _MISSING)
        if key is _MISSING:
            raise KeyError("popitem(): dictionary is empty")
        return key, self.pop(key)

    def clear(self) -> None:
        """Removes all pairs."""
        state, field = self._state, self._field
        state.check_writable(field)
        with state.lock:
            old, self._slots = self._slots, {}
            for slot in old.values():
                state.drop(field, slot.order)
                hold([slot.cell], False)

            def undo() -> None:
                self._slots = old
                hold([slot.cell for slot in old.values()], True)

            state.on_roll_back(undo)

    def __ior__(self, other: Mapping[K, V] | Iterable[tuple[K, V]]) -> Self:
        self.update(other)
        return self


class _Keys(KeysView[K]):
    def __reversed__(self) -> Iterator[K]:
        return reversed(cast("ManagedDict[K, Any]", self._mapping))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"dict_keys({list(self)})"


class _Values(ValuesView[V]):
    def __reversed__(self) -> Iterator[V]:
        mapping = cast("ManagedDict[Any, V]", self._mapping)  # type: ignore[attr-defined]
        return (mapping[key] for key in reversed(mapping))

    def __repr__(self) -> str:
        return f"dict_values({list(self)})"


class _Items(AbstractItemsView[K, V]):
    def __reversed__(self) -> Iterator[tuple[K, V]]:
        mapping = cast("ManagedDict[K, V]", self._mapping)  # type: ignore[attr-defined]
        return ((key, mapping[key]) for key in reversed(mapping))

    def __repr__(self) -> str:
        return f"dict_items({list(self)})"


class ManagedValue(Generic[T]):
    """One value that the runtime keeps for a session; `default` until one has been set."""

    def __init__(self, default: T = _NONE) -> None:
        self._state = SessionState()
        self._field = ""
        self._elements: Elements | None = None
        self._default = default
        self._cell: Any = _MISSING

    def _bind(self, state: SessionState, field: str, entries: Sequence[tuple[int, bytes]]) -> None:
        self._state, self._field = state, field
        self._cell = cell_from(entries[-1][1]) if entries else _MISSING

    def _entries(self) -> list[tuple[int, bytes]]:
        return [] if self._cell is _MISSING else [(_FIRST, bytes_of(self._cell))]

    def _follower(self) -> _Follow:
        return self._take

    def _take(self, changes: Sequence[tuple[int, bytes | None]]) -> None:
        for _, data in changes:
            self._cell = _MISSING if data is None else cell_from(data)

    def __nalar_plain__(self) -> T:
        return self._default if self._cell is _MISSING else cast("T", value_of(self._cell))

    @property
    def value(self) -> T:
        """The value; assign to it to change it."""
        if self._cell is not _MISSING:
            return cast("T", self._state.give(self._field, self._cell))
        return cast("T", values.decode(values.encode(self._default)))  # nobody changes what all sessions begin with

    @value.setter
    def value(self, value: T) -> None:
        state, field = self._state, self._field
        state.check_writable(field)
        elements = self._elements
        if elements is not None and type(value) not in elements.exact and value is not self._default:
            elements.check(value, state.name_of(field))  # what it begins with may be put back
        cell = state.cell(field, value)
        with state.lock:
            old, self._cell = self._cell, cell
            hold([old], False)
            hold([cell], True)
            state.put(field, _FIRST, cell)

            def undo() -> None:
                self._cell = old
                hold([cell], False)
                hold([old], True)

            state.on_roll_back(undo)

    def __repr__(self) -> str:
        return f"ManagedValue({self.value!r})"


def _plain_list(value: list[T] | ManagedList[T]) -> list[T]:
    return list(value) if isinstance(value, ManagedList) else value


def _plain_dict(value: Any) -> dict[Any, Any]:
    return cast("dict[Any, Any]", value.copy() if isinstance(value, ManagedDict) else value)


# Declaring fields and binding them.

Managed = ManagedList[Any] | ManagedDict[Any, Any] | ManagedValue[Any]
_PLAIN_KINDS: Final[dict[type[Any], tuple[object, ...]]] = {
    ManagedList: (list, "list", "List", "typing.List"),
    ManagedDict: (dict, "dict", "Dict", "typing.Dict"),
}
_KINDS: Final[tuple[type[Any], ...]] = (ManagedList, ManagedDict, ManagedValue)


def _fill(part: ManagedDict[Any, Any], items: Mapping[Any, Any]) -> None:
    part.clear()
    part.update(items)


class _Declared:
    """Gives an instance the field of its session; on the class, the field says that it has none."""

    def __init__(self, name: str, kind: type[Any], default: Any, annotation: Any, base: type) -> None:
        self.name = name
        self._kind = kind
        self._default = default
        self._annotation = annotation
        self._base = base

    def description(self) -> str:
        """What it holds, as it is kept: `list[int]`. Not before the module of its class has been run."""
        return describe(kind_name(self._kind), self._annotation, self._base.__module__, self._base)

    def fits(self, kept: str) -> bool:
        """True unless what a field of that description has kept cannot be in this one."""
        return fits(kept, self.description(), classes_in(self._annotation, self._base.__module__, self._base))

    def made(self) -> Managed:
        """The field of a session that has not begun."""
        part: Any = ManagedValue(self._default) if self._kind is ManagedValue else self._kind()
        keys, elements = self._wanted
        if self._kind is ManagedDict:
            part._keys = keys
        part._elements = elements
        return cast("Managed", part)

    @functools.cached_property
    def _wanted(self) -> tuple[Elements | None, Elements | None]:
        """What its keys and its values have to be. Of a plain `list` or `dict` nothing is wanted, as in plain Python."""
        if _kind_of(self._annotation, self._base) is None:
            return None, None
        found = elements_of(self._annotation, self._base.__module__, self._base)
        return (found[0] if len(found) > 1 else None), (found[-1] if len(found) > 0 else None)

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        return _parts_of(instance)[self.name]

    def __set__(self, instance: object, value: Any) -> None:
        state = state_of(instance)
        part: Any = state.parts[self.name]
        if value is part:
            return  # the end of `+=` and the like
        if state.is_beginning and state.was_kept:
            return  # what an `__init__` begins with was begun before
        if isinstance(part, ManagedList):
            part[:] = value
        elif isinstance(part, ManagedDict):
            _fill(cast("Any", part), dict(value))
        else:
            raise TypeError(f"assign to `self.{self.name}.value`: `self.{self.name}` itself is a ManagedValue")

    def __delete__(self, instance: object) -> None:
        raise AttributeError(f"{self.name!r} is managed state and cannot be deleted")


def declare(cls: type, plain: Iterable[str] = ()) -> dict[str, type[Any]]:
    """Finds the managed fields of an agent's class by its annotations, and has them bound in its instances.

    Args:
        cls: of the agent.
        plain: fields that are annotated as `list` or `dict` and are to be managed as well.

    Raises:
        DirectiveError: a field has content before there is a session, or instances cannot have attributes.
    """
    fields: dict[str, type[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            kind = _kind_of(annotation, base)
            if kind is None:
                continue
            fields[name] = kind
            default = vars(base).get(name)
            if not isinstance(default, _Declared):
                setattr(base, name, _Declared(name, kind, _default_of(cls, name, kind, default), annotation, base))
    for name in plain:
        fields[name] = _declare_plain(cls, name)
    if fields and not cls.__dictoffset__:
        raise DirectiveError(f"class {cls.__qualname__}: managed state needs instances with a `__dict__`: remove `__slots__`")
    return fields


def _declare_plain(cls: type, name: str) -> type[Any]:
    for base in cls.__mro__:
        annotation = written = vars(base).get("__annotations__", {}).get(name)
        if annotation is None:
            continue
        if isinstance(annotation, str):
            annotation = annotation.partition("[")[0].strip()
        origin = getattr(annotation, "__origin__", annotation)
        kind = next((kind for kind, names in _PLAIN_KINDS.items() if origin in names), None)
        default = vars(base).get(name)
        if kind is None:
            break
        if default and not isinstance(default, _Declared):
            raise DirectiveError(f"class {cls.__qualname__}: field {name!r} begins empty in every session: remove its content")
        if not isinstance(default, _Declared):
            setattr(base, name, _Declared(name, kind, None, written, base))
        return kind
    raise DirectiveError(
        f"class {cls.__qualname__}: 'managed' names {name!r}, which is not annotated as list or dict in the body of the class: "
        f"write `{name}: list[...]` there"
    )


def descriptions_of(cls: type, fields: Iterable[str]) -> dict[str, str]:
    """What these managed fields of an agent's class hold, by name: `list[int]`. Not before its module has been run."""
    declared = {one.name: one for one in _declared_in(cls)}
    return {field: declared[field].description() for field in fields}


def field_fits(cls: type, name: str, kept: str) -> bool:
    """True unless what a field of that description has kept cannot be in the one that the class has now."""
    declared = {one.name: one for one in _declared_in(cls)}.get(name)
    return declared is not None and declared.fits(kept)


def kind_name(kind: type[Any]) -> str:
    """`list`, `dict` or `value`."""
    return kind.__name__.removeprefix("Managed").lower()


def _default_of(cls: type, name: str, kind: type[Any], default: Any) -> Any:
    where = f"class {cls.__qualname__}: field {name!r}"
    if default is None:
        return None
    if not isinstance(default, kind):
        raise DirectiveError(f"{where} is a {kind.__name__} and cannot begin as {default!r}: leave the value out")
    if isinstance(default, ManagedValue):
        return default._default  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]
    if default:
        raise DirectiveError(f"{where} begins empty in every session: fill it in a method, when it is empty")
    return None


def _kind_of(annotation: Any, base: type) -> type[Any] | None:
    """The class of managed state that an annotation names, whether the rest of it can be evaluated yet or not."""
    if isinstance(annotation, str):
        annotation = _outermost(annotation, base)
    origin = getattr(annotation, "__origin__", annotation)
    return next((kind for kind in _KINDS if origin is kind), None)


def _outermost(text: str, base: type) -> Any:
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    node = node.value if isinstance(node, ast.Subscript) else node
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    found = getattr(sys.modules.get(base.__module__), node.id, None)
    for name in reversed(path):
        found = getattr(found, name, None)
    return found


def _declared_in(cls: type) -> Iterator[_Declared]:
    found = (vars(base).values() for base in reversed(cls.__mro__))
    return (value for value in itertools.chain.from_iterable(found) if isinstance(value, _Declared))


def bind(instance: object, state: SessionState, entries: Entries) -> None:
    """Gives an instance that has just been made the state of its session."""
    parts: dict[str, Any] = {}
    for declared in _declared_in(type(instance)):
        part: Any = declared.made()
        parts[declared.name] = part
        part._bind(state, declared.name, entries.get(declared.name, ()))
    _give(instance, state, parts)


def _give(instance: object, state: SessionState, parts: dict[str, Any]) -> None:
    state.parts = parts
    vars(instance)[_STATE] = state


def state_of(instance: object) -> SessionState:
    """The state that an instance is bound to."""
    found = vars(instance).get(_STATE)
    if found is None:
        bind(instance, SessionState(type(instance).__qualname__), {})
        found = vars(instance)[_STATE]
    return cast("SessionState", found)


def _parts_of(instance: object) -> Mapping[str, Any]:
    return state_of(instance).parts


def plain_from(kinds: Mapping[str, str], entries: Entries) -> dict[str, Any]:
    """Fields of a session as plain lists, dicts and values; a value that was never set is left out."""
    plain: dict[str, Any] = {}
    for field, description in kinds.items():
        kind = kind_in(description)
        some = entries.get(field, [])
        if kind == "list":
            plain[field] = [value_of(cell_from(data)) for _, data in some]
        elif kind == "dict":
            plain[field] = {key: value_of(cell) for key, cell in (pair_from(data) for _, data in some)}
        elif some:
            plain[field] = value_of(cell_from(some[-1][1]))
    return plain


def entries_from(cls: type, plain: Mapping[str, Any]) -> dict[str, list[tuple[int, bytes]]]:
    """The entries of fields of that class which have those plain contents.

    Raises:
        StateSchemaError: there is no such field, or it cannot have that content.
    """
    declared = {one.name: one for one in _declared_in(cls)}
    entries: dict[str, list[tuple[int, bytes]]] = {}
    for field, content in plain.items():
        if field not in declared:
            raise StateSchemaError(f"class {cls.__qualname__} has no field {field!r}; it has: {', '.join(declared)}")
        part, entered = declared[field].made(), content
        if isinstance(part, ManagedValue):
            part.value = content
        elif isinstance(part, ManagedDict) and isinstance(content, Mapping):
            _fill(part, entered)
        elif isinstance(part, ManagedList) and isinstance(content, (list, tuple)):
            part.extend(entered)
        else:
            raise StateSchemaError(f"class {cls.__qualname__}: {field!r} cannot become {content!r:.60}")
        entries[field] = part._entries()  # pyright: ignore[reportPrivateUsage]
    return entries


class _Readable(Protocol):
    def _entries(self) -> list[tuple[int, bytes]]: ...

    def _follower(self) -> _Follow: ...


class Arrival:
    """The fields of a session that comes here part by part, before there is an instance and until calls run.

    Args:
        cls: of its agent; entries of fields that it does not have are left out.
    """

    def __init__(self, cls: type) -> None:
        self._parts: dict[str, Any] = {declared.name: declared.made() for declared in _declared_in(cls)}
        self._followers: dict[str, _Follow] = {name: part._follower() for name, part in self._parts.items()}

    def take_field(self, field: str, entries: Sequence[tuple[int, bytes | None]]) -> None:
        """`take`, for entries of one field: order, and data unless it is gone."""
        if field in self._followers:
            self._followers[field](entries)

    def take(self, changes: Iterable[tuple[str, int, bytes | None]]) -> None:
        """Has the fields be what they are where they come from, after changes: field, order, and data unless it is gone."""
        by_field: dict[str, list[tuple[int, bytes | None]]] = {}
        for field, order, data in changes:
            by_field.setdefault(field, []).append((order, data))
        for field, some in by_field.items():
            self.take_field(field, some)

    def bind(self, instance: object, state: SessionState) -> None:
        """Gives the fields to an instance that has just been made, and goes on taking changes for them."""
        for name, part in self._parts.items():
            part._state, part._field = state, name
        _give(instance, state, self._parts)


def entries_of(state: SessionState) -> dict[str, list[tuple[int, bytes]]]:
    """All entries of a session, as `bind` takes them."""
    parts = cast("Mapping[str, _Readable]", state.parts)
    return {name: part._entries() for name, part in parts.items()}  # pyright: ignore[reportPrivateUsage]
