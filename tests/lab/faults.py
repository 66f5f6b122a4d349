"""Things that go wrong on the way: what to play, on which path, how many times."""

from __future__ import annotations

import fnmatch
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

_STALL_SECONDS = 3600


@dataclass(frozen=True)
class Fault:
    """What happens to the responses for a path; lengths are of the response's body."""

    path: str
    """Shell pattern, such as `/tiny.gguf` or `/llama.cpp.git/*`."""
    status: int | None = None
    """Answer with this status and no content."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers, or other ones: Location, Retry-After, ETag."""
    cut_after: int | None = None
    """Close the connection after this many bytes, though more were announced."""
    stall_after: int | None = None
    """Send nothing more after this many bytes, and keep the connection open."""
    bytes_per_second: int | None = None
    """Send no faster than this."""
    corrupt_at: int | None = None
    """Send this byte wrong."""
    extra_length: int = 0
    """Announce a length that differs by this."""
    no_ranges: bool = False
    """Pretend to know nothing of ranges: always the whole file."""
    times: int | None = None
    """How many responses it happens to; None: all of them."""
    serial: int = 0

    def __str__(self) -> str:
        played = {k: v for k, v in asdict(self).items() if v not in (None, 0, False, {})}
        return " ".join(f"{k}={v}" for k, v in played.items() if k not in ("path", "serial"))

    def spoil(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the body as the fault would have it."""
        sent = 0
        for piece in self._pieces(body):
            chunk = piece
            if self.corrupt_at is not None and sent <= self.corrupt_at < sent + len(chunk):
                at = self.corrupt_at - sent
                chunk = chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :]
            for limit in (self.cut_after, self.stall_after):
                if limit is not None and sent + len(chunk) > limit:
                    yield chunk[: limit - sent]
                    if limit == self.stall_after:
                        time.sleep(_STALL_SECONDS)
                    raise ConnectionAbortedError
            yield chunk
            sent += len(chunk)

    def _pieces(self, body: Iterable[bytes]) -> Iterator[bytes]:
        if self.bytes_per_second is None:
            yield from body
            return
        size = max(1, self.bytes_per_second // 10)
        began, sent = time.monotonic(), 0
        for chunk in body:
            for start in range(0, len(chunk), size):
                piece = chunk[start : start + size]
                sent += len(piece)
                # By the clock, since many short sleeps would each be a little too long.
                ahead = began + sent / self.bytes_per_second - time.monotonic()
                if ahead > 0.01:
                    time.sleep(ahead)
                yield piece


class FaultFile:
    """The faults to play, handed from a test to the server through a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._played: Counter[int] = Counter()

    def write(self, faults: Iterable[Fault]) -> None:
        """Replace the faults."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps([asdict(fault) for fault in faults]))
        temporary.replace(self._path)

    def read(self) -> list[Fault]:
        """Return the faults, the newest last."""
        if not self._path.exists():
            return []
        return [Fault(**fault) for fault in json.loads(self._path.read_text())]

    def take(self, path: str) -> Fault | None:
        """Return the newest fault for this path that has not been played often enough yet."""
        for fault in reversed(self.read()):
            if not fnmatch.fnmatchcase(path, fault.path):
                continue
            if fault.times is None or self._played[fault.serial] < fault.times:
                self._played[fault.serial] += 1
                return fault
        return None
