"""Answers a question from a folder of documents, with a model that runs on this machine.

    python workflow.py "How high is the lighthouse, and who built it?"
    nalar run nalar.toml answer --stream --trace "question=How high is the lighthouse, and who built it?"

The first runs it as a plain program, the second as actors that are spread over worker processes. The program is the same:
run by `nalar`, the calls in `answer` are messages to actors, each returns at once with a future, the searches and the
readings run at the same time, a value is waited for where it is used, and what the writer yields is printed as it comes.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nalar_mq.agents.llm import BlockingLlm
from nalar_mq.agents.tools import Library, highlight

DOCUMENTS = os.environ.get("ANALYST_DOCS") or str(Path(__file__).parent / "documents")
MOST_READINGS = 4
SHORT_ENOUGH = 400  # characters


def plan(question: str) -> list[str]:
    """The questions inside a question, one for each thing that is asked."""
    parts = re.split(
        r"[?;]\s*|,?\s+and\s+(?=(?:who|what|when|where|why|how|which|does|is|are)\b)", question.strip(), flags=re.I
    )
    return [f"{part.strip()}?" for part in parts if part.strip()]


class Librarian:
    """Knows the documents."""

    def __init__(self, folder: str) -> None:
        self.index = Library(folder)

    def find(self, question: str) -> list[tuple[str, str]]:
        """Where something about the question stands, and the sentences there that come closest to it; best first."""
        found = self.index.search(question, limit=2)
        near = [passage for passage in found if passage.score > found[0].score / 2]
        return [(passage.source, highlight(question, passage.text)) for passage in near]


class Reader:
    """Reads a few sentences with a question in mind."""

    def __init__(self) -> None:
        self.llm = BlockingLlm(max_tokens=40)

    def read(self, question: str, text: str) -> str:
        """What the sentences say to the question."""
        return self.llm.chat(f'Read this: "{text}"\nNow answer in one sentence: {question}', stop=["\n"])


class Writer:
    """Makes one answer of what the readers noted."""

    def __init__(self) -> None:
        self.llm = BlockingLlm(max_tokens=80)

    def write(self, notes: list[str]) -> Iterator[str]:
        """The notes as one answer, piece by piece; few notes need no rewriting."""
        if sum(map(len, notes)) < SHORT_ENOUGH:
            yield from (f"{note} " for note in notes)
        else:
            yield from self.llm.stream(f"{' '.join(notes)}\nWrite this again as one text.", stop=["\n\n"])


def choose(parts: list[str], found: list[list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    """What is to be read: for each part of the question the best place, and for a single part also the second."""
    most = 1 if len(parts) > 1 else 2
    readings = [(part, *passage) for part, passages in zip(parts, found, strict=True) for passage in passages[:most]]
    return readings[:MOST_READINGS]


def answer(question: str) -> Iterator[str]:
    """Plans, searches, reads and writes; yields the text as it is written, then where it comes from."""
    parts = plan(question)
    librarian = Librarian(DOCUMENTS)
    found = [librarian.find(part) for part in parts]
    readings = choose(parts, found)
    if not readings:
        yield "The documents say nothing about that.\n"
        return
    notes = [Reader().read(part, text) for part, _, text in readings]
    yield from Writer().write(notes)
    yield "\n\nWhat the readers noted, and where it stands:\n"
    for note, (_, source, quote) in zip(notes, readings, strict=True):
        yield f"- {note}\n  {source}: {quote}\n"


if __name__ == "__main__":
    for piece in answer(" ".join(sys.argv[1:]) or "How high is the lighthouse, and who built it?"):
        print(piece, end="", flush=True)
