"""Where the keys of a TOML text stand, for messages; the values are read by `tomllib`.

The scanner walks over the text once. It knows strings (four kinds), comments and brackets, so that a key is only seen at
the beginning of a line outside all of them. Keys inside an inline table have no line of their own: they get the line of
the key that the inline table belongs to.
"""

from __future__ import annotations

import re
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str, ...]

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_DOTTED})[ \t]*\]\]?")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
_PART = re.compile(_KEY)
_TOKEN = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]''',
    re.DOTALL,
)


class TomlLines:
    """Line numbers, from 1, of the tables and keys of one text; tolerates text that is not TOML."""

    def __init__(self, text: str) -> None:
        self._lines: dict[KeyPath, int] = {}
        self._scan(text)

    def of(self, key: KeyPath) -> int:
        """The line of `key`, or of the closest key that it lies in; 1 if nothing of it is known."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._lines:
                return self._lines[key[:length]]
        return 1

    def _scan(self, text: str) -> None:
        table: KeyPath = ()
        position, line = 0, 1
        while position < len(text):
            header = _HEADER.match(text, position)
            assignment = None if header else _ASSIGNMENT.match(text, position)
            if header:
                table = _parts(header[1])
                self._note(table, line)
                position = header.end()
            elif assignment:
                self._note(table + _parts(assignment[1]), line)
                position = assignment.end()
            end = _end_of_statement(text, position)
            line += text.count("\n", position, end)
            position = end

    def _note(self, key: KeyPath, line: int) -> None:
        for length in range(1, len(key) + 1):
            self._lines.setdefault(key[:length], line)


def _end_of_statement(text: str, position: int) -> int:
    """Just after the line break that ends the statement going on at `position`."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        mark = token[0]
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            depth = max(0, depth - 1)
        elif mark == "\n" and depth == 0:
            return token.end()
    return len(text)


def _parts(dotted: str) -> KeyPath:
    return tuple(_unquoted(part) for part in _PART.findall(dotted))


def _unquoted(part: str) -> str:
    if part[0] == "'":
        return part[1:-1]
    if part[0] == '"':
        return re.sub(r"\\(.)", r"\1", part[1:-1])
    return part
