"""What was run by whom, as `apps/witness.py` writes it down."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path


def result_of(n: int) -> int:
    """What `steps` returns for it."""
    second = (n * n + 1) ** 2
    return int(((second % 7) ** 2 + (second % 11) ** 2) ** 2)


class Witness:
    """Reads the file as it grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[tuple[str, str, int]] = []
        self._read_bytes = 0
        file.touch()

    def read(self) -> None:
        with self.file.open("rb") as file:
            file.seek(self._read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            what, key, pid = line.split()
            self.lines.append((what, key, int(pid)))

    def began(self, prefix: str = "") -> int:
        """How many runs of keys that begin so have begun."""
        self.read()
        return sum(what == "began" and key.startswith(prefix) for what, key, _ in self.lines)

    def runs(self) -> dict[str, list[int]]:
        """Who began each key, in order."""
        self.read()
        runs: defaultdict[str, list[int]] = defaultdict(list)
        for what, key, pid in self.lines:
            if what == "began":
                runs[key].append(pid)
        return runs

    def repeated(self) -> dict[str, list[int]]:
        """The keys that were begun more than once."""
        return {key: pids for key, pids in self.runs().items() if len(pids) > 1}

    def unexplained(self, dead: Iterable[int], frozen: Iterable[int] = ()) -> dict[str, list[int]]:
        """The keys that were begun again although whoever had them last lived on.

        A process may have been frozen just between its decision to begin a call and that call's first line, which it then
        writes when it wakes up: one call for each of them is no fault of anybody.
        """
        gone, excused = set(dead), set(frozen)
        found: dict[str, list[int]] = {}
        for key, pids in self.repeated().items():
            if gone.issuperset(pids[:-1]):
                continue
            if pids[-1] in excused and gone.issuperset(pids[:-2]):
                excused.remove(pids[-1])
            else:
                found[key] = pids
        return found

    def repeated_in_spite_of_its_result(self) -> dict[str, list[int]]:
        """The keys `x/n` that were begun again after somebody had begun `x/m` that needs their result."""
        needs = {"2": ("1",), "3": ("2",), "4": ("2",), "5": ("3", "4")}
        settled: set[str] = set()
        wrong: dict[str, list[int]] = {}
        for what, key, pid in self.lines:
            job, _, step = key.partition("/")
            if what == "began" and step:
                if key in settled:
                    wrong.setdefault(key, []).append(pid)
                settled.update(f"{job}/{earlier}" for earlier in needs.get(step, ()))
        return wrong

    def unended(self) -> list[str]:
        """The keys that were begun and never ended."""
        ended = Counter(key for what, key, _ in self.lines if what == "ended")
        return [key for key in self.runs() if not ended[key]]
