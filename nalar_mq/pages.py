"""The pages of an LMDB file, read without LMDB, which believes what it reads: a damaged page can end the process.

A file is sound if all of this holds:

    meta pages   two, of this machine's byte order; the one with the higher transaction is in force
    trees        each page says its own number, is reached once, and holds nodes that fill it without a gap or an overlap;
                 keys ascend, within a page and between the separators above it; all leaves are as deep as the tree says,
                 and there are as many pages and entries
    long values  lie on pages of their own, as many as their first page says
    free list    pages that are in no tree; with those of the trees they are all pages there are

What is checked belongs to one transaction, whose pages nobody overwrites while a reader holds it. So a file can be examined
while another process writes to it.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_NONE: Final = (1 << 64) - 1
_HEADER: Final = 16
_META_PAGES: Final = 2
_DEEPEST: Final = 32
_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_LONG: Final = 0x04
_META: Final = 0x08
_NODE_LONG: Final = 0x01
_NODE_TREE: Final = 0x02
_NUMBER_KEYS: Final = 0x08
_PAGE_HEAD: Final = struct.Struct("=QHHHH")
_LONG_HEAD: Final = struct.Struct("=QHHI")
_META_HEAD: Final = struct.Struct("=II16x")
_META_TAIL: Final = struct.Struct("=QQ")
_TREE: Final = struct.Struct("=IHHQQQQQ")
_NODE: Final = struct.Struct("=HHHH")
_U64: Final = struct.Struct("=Q")
_META_SIZE: Final = _HEADER + _META_HEAD.size + 2 * _TREE.size + _META_TAIL.size


class PagesDamaged(Exception):
    """A file is not sound; the text says where."""


class TransactionGone(Exception):
    """Later transactions have taken the place of the one that was asked for."""


class LayoutUnknown(Exception):
    """A file is of another layout than the one known here: of another version of LMDB, or of another kind of machine."""


class _Tree(NamedTuple):
    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    longs: int
    entries: int
    root: int


class Meta(NamedTuple):
    """What is in force in a file: a transaction, the trees it left, and how many pages the file has."""

    txn: int
    page_size: int
    pages: int
    free: _Tree
    main: _Tree


def read_meta(file: int, txn: int | None = None) -> Meta:
    """The meta page in force, or that of transaction `txn`.

    Raises:
        PagesDamaged: it cannot be read.
        TransactionGone: later transactions have taken the place of `txn`.
        LayoutUnknown: the file was written by another version of LMDB.
    """
    first = _meta(file, 0, 0)
    metas = (first, _meta(file, 1, first.page_size))
    if metas[1].page_size != first.page_size:
        raise PagesDamaged("the meta pages have different page sizes")
    if txn is None:
        return max(metas, key=lambda meta: meta.txn)
    if metas[txn & 1].txn != txn:
        raise TransactionGone(txn)
    return metas[txn & 1]


def _meta(file: int, number: int, page_size: int) -> Meta:
    data = os.pread(file, _META_SIZE, number * page_size)
    if len(data) < _META_SIZE:
        raise PagesDamaged(f"meta page {number} is beyond its end")
    own, _, flags, _, _ = _PAGE_HEAD.unpack_from(data)
    magic, version = _META_HEAD.unpack_from(data, _HEADER)
    if magic != _MAGIC or version != _VERSION:
        if _U64.pack(_MAGIC)[:4] in data[:32] and magic != _MAGIC:
            raise LayoutUnknown("the meta page is not where it is expected")
        raise PagesDamaged(f"meta page {number} is not one")
    free = _Tree(*_TREE.unpack_from(data, _HEADER + _META_HEAD.size))
    main = _Tree(*_TREE.unpack_from(data, _HEADER + _META_HEAD.size + _TREE.size))
    last, txn = _META_TAIL.unpack_from(data, _HEADER + _META_HEAD.size + 2 * _TREE.size)
    size = free.pad
    if not 512 <= size <= 32768 or size & (size - 1):
        raise PagesDamaged(f"meta page {number} says that a page has {size:,} bytes")
    if own != number or flags != _META or (txn and txn & 1 != number):
        raise PagesDamaged(f"meta page {number} is not one")
    if free.flags != _NUMBER_KEYS or main.flags:
        raise PagesDamaged(f"meta page {number} has trees of another kind")
    if last + 1 < _META_PAGES or last > 1 << 40:
        raise PagesDamaged(f"meta page {number} says that there are {last + 1:,} pages")
    return Meta(txn, size, last + 1, free, main)


def check(file: int, meta: Meta, *, whole: bool) -> None:
    """Looks for damage.

    Args:
        file: open for reading.
        meta: what is in force in it.
        whole: read all pages; else only those that lead to others, about one in a hundred, and the free list.

    Raises:
        PagesDamaged: something is not sound; the first thing found.
    """
    _Check(file, meta, whole).run()


class _Count:
    """What was found of one tree."""

    def __init__(self, name: str, tree: _Tree) -> None:
        self.name = name
        self.tree = tree
        self.branches = self.leaves = self.longs = self.entries = 0


class _Check:
    def __init__(self, file: int, meta: Meta, whole: bool) -> None:
        self._file = file
        self._size = meta.page_size
        self._meta = meta
        self._whole = whole
        self._in_file = os.fstat(file).st_size // meta.page_size
        if meta.pages > self._in_file + max(self._in_file, 1 << 20):
            raise PagesDamaged(f"it has {self._in_file:,} pages and should have {meta.pages:,}")
        self._live = bytearray(meta.pages)
        self._live[:_META_PAGES] = b"\1" * _META_PAGES

    def run(self) -> None:
        free: list[bytes] = []
        for _, flags, data in self._small_tree("the free list", self._meta.free):
            if flags:
                raise PagesDamaged("the free list holds something else")
            free.append(data)
        for key, flags, data in self._small_tree("the list of trees", self._meta.main):
            if flags == _NODE_TREE and len(data) == _TREE.size:
                self._tree(f"tree {key.decode('utf-8', 'backslashreplace')!r}", _Tree(*_TREE.unpack(data)))
            else:
                raise PagesDamaged("the list of trees holds something else")
        self._check_free(free)

    def _check_free(self, records: list[bytes]) -> None:
        live = self._live
        for data in records:
            count, rest = divmod(len(data), 8)
            if rest or not count or _U64.unpack_from(data)[0] != count - 1:
                raise PagesDamaged("a record of the free list has another length than it says")
            for page in struct.unpack_from(f"={count - 1}Q", data, 8):
                if not _META_PAGES <= page < self._meta.pages or live[page]:
                    raise PagesDamaged(f"page {page} is in the free list and elsewhere")
                live[page] = 2
        if self._whole and 0 in live:
            raise PagesDamaged(f"page {live.index(0)} is neither in a tree nor in the free list")

    def _small_tree(self, name: str, tree: _Tree) -> list[tuple[bytes, int, bytes]]:
        """The entries of a tree that is read whole in any case."""
        whole, self._whole = self._whole, True
        try:
            leaves = self._tree(name, tree, keep=True)
        finally:
            self._whole = whole
        return [entry for leaf in leaves for entry in self._entries(leaf)]

    def _tree(self, name: str, tree: _Tree, *, keep: bool = False) -> list[bytes]:
        count = _Count(name, tree)
        leaves: list[bytes] = []
        if tree.flags & ~_NUMBER_KEYS or bool(tree.flags) != (tree is self._meta.free):
            raise PagesDamaged(f"{name} is of another kind")
        if tree.depth > _DEEPEST:
            raise PagesDamaged(f"{name} is said to be {tree.depth:,} levels deep")
        if tree.root != _NONE:
            self._page(count, tree.root, 1, None, None, leaves if keep else None)
        elif tree.depth:
            raise PagesDamaged(f"{name} has no pages and is said to be {tree.depth} levels deep")
        found = (count.branches, count.leaves, count.longs, count.entries)
        said = (tree.branches, tree.leaves, tree.longs, tree.entries)
        if found[:2] != said[:2] or (self._whole and found != said):
            raise PagesDamaged(f"{name} has other pages or entries than it says: {found}, not {said}")
        return leaves

    def _page(
        self, count: _Count, page: int, level: int, low: bytes | None, high: bytes | None, leaves: list[bytes] | None
    ) -> None:
        self._reach(page, 1, count.name)
        is_leaf = level == count.tree.depth
        if is_leaf:
            count.leaves += 1
            if not self._whole:
                return
        data = os.pread(self._file, self._size, page * self._size)
        own, _, flags, lower, upper = _PAGE_HEAD.unpack_from(data)
        if own != page or flags != (_LEAF if is_leaf else _BRANCH):
            raise PagesDamaged(f"page {page} is not the page of {count.name} that it should be")
        nodes = (lower - _HEADER) >> 1
        if lower < _HEADER + 2 or lower & 1 or not lower <= upper <= self._size:
            raise PagesDamaged(f"page {page} of {count.name} has no nodes, or too many")
        pointers = struct.unpack_from(f"={nodes}H", data, _HEADER)
        if min(pointers) < upper or max(pointers) + _NODE.size > self._size:
            raise PagesDamaged(f"page {page} of {count.name} has a node that lies outside of it")
        if is_leaf:
            count.entries += nodes
            self._leaf(count, page, data, pointers, low, high)
            if leaves is not None:
                leaves.append(data)
        else:
            count.branches += 1
            for child, first, last in self._children(count, page, data, pointers, low, high):
                self._page(count, child, level + 1, first, last, leaves)

    def _reach(self, page: int, pages: int, name: str) -> None:
        if not page >= _META_PAGES or page + pages > self._meta.pages:
            raise PagesDamaged(f"{name} leads to page {page}, which does not exist")
        if page + pages > self._in_file:
            raise PagesDamaged(f"it has {self._in_file:,} pages, and {name} leads to page {page + pages - 1:,}")
        if any(self._live[page : page + pages]):
            raise PagesDamaged(f"page {page} is reached twice, now from {name}")
        self._live[page : page + pages] = b"\1" * pages

    def _children(
        self, count: _Count, page: int, data: bytes, pointers: tuple[int, ...], low: bytes | None, high: bytes | None
    ) -> list[tuple[int, bytes | None, bytes | None]]:
        """Child pages with the keys that they lie between."""
        numbers: list[int] = []
        keys: list[bytes | None] = []
        used = 0
        is_number = count.tree is self._meta.free
        for place, pointer in enumerate(pointers):
            part0, part1, part2, size = _NODE.unpack_from(data, pointer)
            numbers.append(part0 | part1 << 16 | part2 << 32)
            used += _even(_NODE.size + size)
            key = data[pointer + _NODE.size : pointer + _NODE.size + size]
            keys.append(_sortable(key) if is_number else key)
            if not place:
                keys[0] = low
        self._check_filled(count, page, data, used)
        ends = [*keys[1:], high]
        ascending = [key for key in (low, *ends) if key is not None]
        if any(after <= before for before, after in itertools.pairwise(ascending)):
            raise PagesDamaged(f"page {page} of {count.name} has keys out of their order")
        return list(zip(numbers, keys, ends, strict=True))

    def _leaf(
        self, count: _Count, page: int, data: bytes, pointers: tuple[int, ...], low: bytes | None, high: bytes | None
    ) -> None:
        used = 0
        is_number = count.tree is self._meta.free
        last: bytes | None = None
        unpack = _NODE.unpack_from
        for pointer in pointers:
            part0, part1, flags, size = unpack(data, pointer)
            start = pointer + 8
            end = start + size
            key = data[start:end]
            if is_number:
                key = _sortable(key)
            if (last is not None and key <= last) or (last is None and low is not None and key < low):
                raise PagesDamaged(f"page {page} of {count.name} has keys out of their order")
            last = key
            if flags == _NODE_LONG:
                self._long(count, page, data, end, part0 | part1 << 16)
                end += 8
            elif not flags or flags == _NODE_TREE:
                end += part0 | part1 << 16
            else:
                raise PagesDamaged(f"page {page} of {count.name} has a node of another kind")
            used += end - pointer + 1 & ~1
        if high is not None and last is not None and last >= high:
            raise PagesDamaged(f"page {page} of {count.name} has keys out of their order")
        self._check_filled(count, page, data, used)

    def _check_filled(self, count: _Count, page: int, data: bytes, used: int) -> None:
        if used != self._size - _PAGE_HEAD.unpack_from(data)[4]:
            raise PagesDamaged(f"the nodes of page {page} of {count.name} have other sizes than they should have")

    def _long(self, count: _Count, page: int, data: bytes, at: int, size: int) -> None:
        if at + 8 > self._size:
            raise PagesDamaged(f"page {page} of {count.name} has a node that lies outside of it")
        first = _U64.unpack_from(data, at)[0]
        self._reach(first, 1, count.name)
        own, _, flags, pages = _LONG_HEAD.unpack(os.pread(self._file, _LONG_HEAD.size, first * self._size))
        if own != first or flags != _LONG or pages * self._size < _HEADER + size:
            raise PagesDamaged(f"page {first} of {count.name} does not begin a long value")
        if pages > 1:
            self._reach(first + 1, pages - 1, count.name)
        count.longs += pages

    def _entries(self, data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        """Key, kind and value of the nodes of a leaf that was checked."""
        nodes = (_PAGE_HEAD.unpack_from(data)[3] - _HEADER) >> 1
        for pointer in struct.unpack_from(f"={nodes}H", data, _HEADER):
            part0, part1, flags, size = _NODE.unpack_from(data, pointer)
            start = pointer + _NODE.size + size
            length = part0 | part1 << 16
            if flags == _NODE_LONG:
                first = _U64.unpack_from(data, start)[0]
                value = os.pread(self._file, length, first * self._size + _HEADER)
                yield data[pointer + _NODE.size : start], 0, value
            else:
                yield data[pointer + _NODE.size : start], flags, data[start : start + length]


def _even(size: int) -> int:
    return size + 1 & ~1


def _sortable(key: bytes) -> bytes:
    """A number in this machine's byte order as bytes that sort as it does."""
    return key if sys.byteorder == "big" else key[::-1]
