"""What the preflight has to say about a host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Severity(str, Enum):
    """How much a finding matters."""

    ERROR = "error"
    """It cannot work. Nothing is changed."""
    WARNING = "warning"
    """It works, but worse than it could, or not for long."""
    NOTE = "note"
    """Worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One fact about a host that matters, for the person who reads it at midnight."""

    severity: Severity
    code: str
    """Stable name in kebab-case, for programs and for the documentation."""
    cause: str
    """What is so, with the numbers."""
    consequence: str = ""
    """What comes of it."""
    fix: str = ""
    """What to do, as a command where one does it."""
    source: str = ""
    """Where that is documented, or how it was measured."""

    def within(self, instance: str) -> Finding:
        """The same, said of one of several llama-servers; the main one has no name."""
        if not instance:
            return self
        return replace(self, cause=f"server_instances.{instance}: {self.cause}")

    def about(self, setting: str) -> Finding:
        """The same, said of what another setting names than `model`."""
        if not setting:
            return self
        return replace(self, cause=f"{setting}: {self.cause.removeprefix('model: ')}")

    def __str__(self) -> str:
        parts = [self.cause]
        if self.consequence:
            parts.append(self.consequence)
        text = ": ".join(parts)
        return f"{text}. {self.fix}" if self.fix else text


def error(code: str, cause: str, consequence: str = "", fix: str = "", source: str = "") -> Finding:
    """A finding with which nothing is changed."""
    return Finding(Severity.ERROR, code, cause, consequence, fix, source)


def warning(
    code: str, cause: str, consequence: str = "", fix: str = "", source: str = ""
) -> Finding:
    """A finding that lets the deploy go on."""
    return Finding(Severity.WARNING, code, cause, consequence, fix, source)


def note(code: str, cause: str, consequence: str = "", fix: str = "", source: str = "") -> Finding:
    """A finding that is only worth knowing."""
    return Finding(Severity.NOTE, code, cause, consequence, fix, source)
