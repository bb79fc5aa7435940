"""Which words a few texts use most. A plain program: nothing of the runtime is imported in it.

    python flow.py
    nalar run nalar.toml report

Run by `nalar`, `Reader` and `Shelf` live in worker processes, the readings overlap, and the answer is the same.
"""

import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
TIMES = os.environ.get("READING_TIMES")  # a file in which readers note when they began and ended


@dataclass
class Reading:
    title: str
    words: int
    favourite: str


class Reader:
    """Reads as slowly as a model would."""

    def __init__(self, pause_s: float, ignored: set[str]) -> None:
        self.pause_s = pause_s
        self.ignored = ignored

    def read(self, title: str) -> Reading:
        began = time.monotonic()
        words = re.findall(r"\w+", (TEXTS / f"{title}.txt").read_text().lower())
        time.sleep(self.pause_s)
        favourite, _ = Counter(word for word in words if word not in self.ignored).most_common(1)[0]
        if TIMES:
            with open(TIMES, "a") as times:
                times.write(f"{title} {began} {time.monotonic()}\n")
        return Reading(title, len(words), favourite)


class Shelf:
    """Remembers what was read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readings: list[Reading] = []

    def add(self, reading: Reading) -> None:
        self.readings.append(reading)

    def longest(self) -> Reading:
        return max(self.readings, key=lambda reading: reading.words)


def report(pause_s: float = 1.0) -> str:
    """Reads all texts and one that is not there."""
    reader = Reader(pause_s, ignored={"the", "and", "a", "in", "is", "are"})
    readings = [reader.read(path.stem) for path in sorted(TEXTS.glob("*.txt"))]
    shelf = Shelf("summer")
    for reading in readings:
        shelf.add(reading)
    try:
        shelf.add(reader.read("winter"))
    except FileNotFoundError:
        missing = "winter"
    lines = [f"{reading.title}: {reading.words} words, most often {reading.favourite!r}" for reading in readings]
    return "\n".join([*lines, f"{shelf.name}: the longest is {shelf.longest().title}, {missing} is missing"])


if __name__ == "__main__":
    print(report())
