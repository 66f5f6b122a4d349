"""Whether the disks bear what the plan puts on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules.findings import Finding, error

GIB = 1024**3
SPARE_BYTES = GIB // 2
"""Left free on every disk that something is put on."""


@dataclass(frozen=True)
class Need:
    """Bytes that a part of the plan puts somewhere."""

    place: str
    """One of the places that the probe measures."""
    bytes: int
    what: str


def findings(needs: Iterable[Need], probe: Probe) -> Iterator[Finding]:
    """An error for each disk that is too small for all that goes there together.

    A disk of unknown size is given the benefit of the doubt.
    """
    by_mount: dict[str, list[Need]] = {}
    for need in needs:
        if need.place in probe.disk_free_bytes:
            mount = probe.disk_mount.get(need.place, need.place)
            by_mount.setdefault(mount, []).append(need)
    for mount, together in by_mount.items():
        free = min(probe.disk_free_bytes[need.place] for need in together)
        needed = sum(need.bytes for need in together) + SPARE_BYTES
        if free < needed:
            parts = ", ".join(f"{need.what} {need.bytes / GIB:.1f} GiB" for need in together)
            yield error(
                "no-space",
                f"{mount} has {free / GIB:.1f} GiB free, but {needed / GIB:.1f} GiB are needed "
                f"({parts}, {SPARE_BYTES / GIB:.1f} GiB to spare)",
                "the work would stop half-way",
                f"Free space there (`du -xh -d 2 {mount} | sort -h | tail`), or {_more(together)}.",
            )


def _more(needs: list[Need]) -> str:
    ours = [need.place for need in needs if need.place != at.SYSTEM]
    return f"mount a larger disk at {ours[0]}" if ours else "give it a larger disk"
