"""What a script on a host tells: lines of `key<TAB>value`.

Nothing here raises on odd values: what cannot be read is not there.
"""

from __future__ import annotations

from collections.abc import Iterable

from packaging.version import InvalidVersion, Version

from tasks.rules.tables import ExactVersion


class Lines:
    """The output by key."""

    def __init__(self, output: Iterable[str]) -> None:
        self._values: dict[str, list[str]] = {}
        for line in output:
            key, tab, value = line.partition("\t")
            if tab:
                self._values.setdefault(key, []).append(value.strip())

    def all(self, key: str) -> list[str]:
        """Every value of a key."""
        return self._values.get(key, [])

    def text(self, key: str) -> str | None:
        """The first value."""
        return self.all(key)[0] if self.all(key) else None

    def number(self, key: str) -> int | None:
        """The first value, if it is a whole number."""
        return number(self.text(key))

    def words(self, key: str, count: int) -> list[tuple[str, ...]]:
        """Values that have exactly count words, the last taking the rest of the line."""
        split = (tuple(value.split(" ", count - 1)) for value in self.all(key))
        return [words for words in split if len(words) == count]

    def pairs(self, key: str) -> list[tuple[str, str]]:
        """Values of two words."""
        return [(name, value) for name, value in self.words(key, 2)]

    def versions(self, key: str) -> dict[str, Version]:
        """Values that are a name and a version."""
        pairs = ((name, version(text)) for name, text in self.pairs(key))
        return {name: found for name, found in pairs if found is not None}


def number(text: str | None, base: int = 10) -> int | None:
    """A whole number, or None."""
    try:
        return int(text, base) if text else None
    except ValueError:
        return None


def version(text: str | None) -> Version | None:
    """A version that prints as it was written, or None."""
    try:
        return ExactVersion(text) if text else None
    except InvalidVersion:
        return None
