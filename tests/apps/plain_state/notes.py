"""Unmodified Python whose fields the manifest has kept."""

from __future__ import annotations


class Notes:
    texts: list[str]
    counts: dict[str, int]

    def __init__(self) -> None:
        self.texts = ["first"]
        self.counts = {}

    def note(self, text: str) -> int:
        self.texts.append(text)
        self.counts[text] = self.counts.get(text, 0) + 1
        if text == "wrong":
            raise ValueError(text)
        return len(self.texts)

    def all(self) -> tuple[list[str], dict[str, int]]:
        return list(self.texts), dict(self.counts)


def story(texts: list[str]) -> tuple[list[str], dict[str, int]]:
    notes = Notes()
    for text in texts:
        notes.note(text)
    return notes.all()
