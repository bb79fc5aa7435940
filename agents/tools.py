"""Tools that need no network: a calculator, a search over a folder of documents, the time."""

from __future__ import annotations

import ast
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from nalar_mq.syntax import parse_expression

_Number = int | float

_LARGEST_POWER: Final = 10_000
_LONGEST_EXPRESSION: Final = 1_000
_BINARY: Final[Mapping[type, str]] = MappingProxyType(
    {
        ast.Add: "add",
        ast.Sub: "sub",
        ast.Mult: "mul",
        ast.Div: "truediv",
        ast.FloorDiv: "floordiv",
        ast.Mod: "mod",
    }
)
_FUNCTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {name: getattr(math, name) for name in ("ceil", "cos", "exp", "floor", "log", "log10", "sin", "sqrt", "tan")}
    | {"abs": abs, "max": max, "min": min, "round": round}
)
_CONSTANTS: Final[Mapping[str, float]] = MappingProxyType({"e": math.e, "pi": math.pi})


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression, such as `2 * (3 + sqrt(16))`. Nothing but arithmetic is ever run.

    Raises:
        ValueError: it is not arithmetic, or its value is out of range.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression has at most {_LONGEST_EXPRESSION} characters")
    try:
        return _evaluate(parse_expression(expression.strip()))
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"not an arithmetic expression: {expression}") from None
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{expression} has no value: {error}") from None


def _evaluate(node: ast.expr) -> _Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result: _Number = getattr(operator, _BINARY[type(op)])(_evaluate(left), _evaluate(right))
            return result
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function: Callable[..., _Number] = _FUNCTIONS[name]
            return function(*map(_evaluate, args))
        case _:
            raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _power(base: _Number, exponent: _Number) -> _Number:
    if abs(exponent) * math.log2(abs(base) + 1) > _LARGEST_POWER:
        raise ValueError("the power is too large")
    value: _Number | complex = base**exponent
    if isinstance(value, complex):
        raise ValueError("the power is not a real number")
    return value


def now(timezone: str = "UTC") -> str:
    """The time in a zone such as `Europe/Berlin`, as ISO 8601 to the second.

    Raises:
        ValueError: no zone has that name.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"no time zone is called {timezone!r}") from None
    return datetime.now(zone).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        source: `path:line`, the path relative to the folder.
        text: what stands there.
        score: how well it fits the query; higher is better.
    """

    source: str
    text: str
    score: float = 0.0


def search(query: str, folder: str, limit: int = 3) -> list[Passage]:
    """The passages of the documents in `folder` that fit the query best; reads the folder anew each time.

    Raises:
        ValueError: there is no such folder.
    """
    return Library(folder).search(query, limit)


_SUFFIXES: Final = frozenset({".md", ".rst", ".txt"})
_LARGEST_FILE_BYTES: Final = 1 << 20
_MOST_FILES: Final = 2_000
_PASSAGE_CHARACTERS: Final = 600
_SATURATION: Final = 1.5
_LENGTH_WEIGHT: Final = 0.75
_HEADING_WEIGHT: Final = 2
_WORD: Final = re.compile(r"[^\W_]+")
_TABLE: Final = re.compile(r"\s*(\||```)")
_ITEM: Final = re.compile(r"([-*+]|\d+\.)\s")
_HEADING: Final = re.compile(r"#{1,6}\s+(.*)")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?;:])\s+|\n")
_STOP_WORDS: Final = frozenset(
    _WORD.findall(
        "a about an and are as at be been by can could did do does for from had has have how i if in into is it its me my no"
        " not of on or our should so than that the their them then there these they this those to was we were what when"
        " where which who whom whose why will with would you your"
    )
)


def highlight(query: str, text: str, limit: int = 2) -> str:
    """The sentences of `text` that share most words with `query`, and at least half as many as the best; in their order."""
    wanted = set(_words(query))
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    shared = [len(wanted.intersection(_words(sentence))) for sentence in sentences]
    best = sorted(range(len(sentences)), key=lambda number: -shared[number])[:limit]
    least = max(shared, default=0) / 2
    return " ".join(sentences[number].strip() for number in sorted(best) if shared[number] > least or number == best[0])


class Library:
    """The documents of a folder (`.md`, `.rst`, `.txt`), cut into passages and ranked by BM25.

    Folders whose names begin with a dot are left out, and so are files over 1 MiB.

    Args:
        folder: where they are, with everything below it.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"there is no folder {folder}")
        self._passages: list[Passage] = []
        self._counts: list[Counter[str]] = []
        for passage, words in _passages_below(root):
            self._passages.append(passage)
            self._counts.append(words)
        self._found_in = Counter(word for words in self._counts for word in words)
        self._mean_length = sum(words.total() for words in self._counts) / (len(self._counts) or 1)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, limit: int = 3) -> list[Passage]:
        """The best passages for a query, best first; none if no word of it occurs."""
        wanted = set(_words(query))
        scores = [(self._score(wanted, words), number) for number, words in enumerate(self._counts)]
        best = sorted(((score, -number) for score, number in scores if score > 0), reverse=True)[:limit]
        return [self._scored(-number, score) for score, number in best]

    def _scored(self, number: int, score: float) -> Passage:
        found = self._passages[number]
        return Passage(found.source, found.text, round(score, 3))

    def _score(self, wanted: Iterable[str], words: Counter[str]) -> float:
        length = 1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * words.total() / self._mean_length
        score = 0.0
        for word in wanted:
            count = words[word]
            if count:
                documents = self._found_in[word]
                rarity = math.log(1 + (len(self._counts) - documents + 0.5) / (documents + 0.5))
                score += rarity * count * (_SATURATION + 1) / (count + _SATURATION * length)
        return score


def _passages_below(root: Path) -> Iterator[tuple[Passage, Counter[str]]]:
    for path in _documents(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text("utf-8", errors="replace")
        for line, heading, body in _pieces(text):
            words = Counter(_words(body))
            for word in _words(heading):
                words[word] += _HEADING_WEIGHT
            yield Passage(f"{name}:{line}", body), words


def _documents(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "node_modules")
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in _SUFFIXES and path.is_file() and path.stat().st_size <= _LARGEST_FILE_BYTES:
                found.append(path)
        if len(found) >= _MOST_FILES:
            break
    return found[:_MOST_FILES]


def _pieces(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, heading and text of each passage: paragraphs under one heading, up to a size."""
    heading, start, body = "", 1, ""
    for line, paragraph in _paragraphs(text):
        found = _HEADING.match(paragraph)
        if body and (found or len(body) + len(paragraph) > _PASSAGE_CHARACTERS):
            yield start, heading, body
            body = ""
        if found:
            heading = found.group(1)
        else:
            start = start if body else line
            body = f"{body}\n{paragraph}" if body else paragraph
    if body:
        yield start, heading, body


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Headings, list items and paragraphs, each as one line, with the number of its first line; long ones in parts.

    Tables are left out, since their rows say little without their heads.
    """
    gathered, start = "", 1
    for number, raw in enumerate([*text.splitlines(), ""], 1):
        line = "" if _TABLE.match(raw) else raw.strip()
        ends = not line or _HEADING.match(line) or _ITEM.match(line) or _HEADING.match(gathered)
        size = len(gathered) + len(line)
        full = (size > _PASSAGE_CHARACTERS and gathered.endswith((".", ":", ";", "|"))) or size > 2 * _PASSAGE_CHARACTERS
        if gathered and (ends or full):
            yield start, gathered
            gathered = ""
        if line:
            start = start if gathered else number
            gathered = f"{gathered} {line}" if gathered else line


def _words(text: str) -> list[str]:
    words = (word.lower() for word in _WORD.findall(text))
    return [_stem(word) for word in words if word not in _STOP_WORDS]


def _stem(word: str) -> str:
    """A word without its commonest English endings, so that `calls` finds `call`."""
    for ending in ("ies", "ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word
