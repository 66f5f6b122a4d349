"""A log of what was asked of the outside, one JSON object a line, for tests to read."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Server = Literal["web", "git", "proxy"]


@dataclass(frozen=True)
class Access:
    """One request and what came of it."""

    server: Server
    client: str
    method: str
    target: str
    """Path, or for the proxy the whole URL, or host:port."""
    status: int
    bytes: int = 0
    """Length of the body that was sent; for a tunnel, both ways."""
    range: str = ""
    token: bool = False
    """Whether it came with a token."""
    note: str = ""
    """`cached`, or the fault that was played."""
    time: float = 0.0


class AccessLog:
    """Appends to the log, from many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._serials = itertools.count()

    def begin(self) -> int:
        """Write down that a request is being answered; return its number."""
        serial = next(self._serials)
        self._write({"begun": serial})
        return serial

    def end(self, serial: int, access: Access) -> None:
        """Write down what came of it."""
        self._write({"ended": serial, "access": {**asdict(access), "time": time.time()}})

    def _write(self, record: dict[str, Any]) -> None:
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path, patience_seconds: float = 1) -> list[Access]:
    """Return the requests that have been answered.

    Who has received an answer to its last byte may look before it is written down: so, for as long
    as patience lasts, this waits for those that are being answered.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        # What follows the last newline is still being written.
        text = path.read_text() if path.exists() else ""
        records = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        answered = [Access(**record["access"]) for record in records if "access" in record]
        if len(records) == 2 * len(answered) or time.monotonic() > deadline:
            return answered
        time.sleep(0.02)
