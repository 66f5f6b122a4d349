"""The memory that a host has for a server: of its cards, and its own."""

from __future__ import annotations

from collections.abc import Callable

from tasks.probe import Probe
from tasks.rules import nvidia
from tasks.rules.architecture import Shape
from tasks.rules.fit import HOST_MARGIN_BYTES, Demand, Fit, Place, Verdict, fit
from tasks.settings import Settings

GIB = 1024**3


def places(settings: Settings, probe: Probe) -> tuple[tuple[Place, ...], Place] | None:
    """Cards and host, with what a server may use of each; None where that is not known.

    It is what there is, less what others use; not what is free: a server of ours that runs now
    will have made room by then.
    """
    if probe.memory_bytes is None:
        return None
    host = Place("this host", probe.memory_bytes - _used_by_others(probe))
    if settings.llama_cpp_backend == "cpu":
        return (), host
    cards, _ = nvidia.identify(probe.gpus)
    if any(card.memory_gib is None for card in cards):
        return None
    # As the card is sold. The driver keeps less than 1 % of it back, which the margin covers; with
    # ECC on GDDR memory it is a sixteenth.
    return tuple(Place(card.name, (card.memory_gib or 0) * GIB) for card in cards), host


def _used_by_others(probe: Probe) -> int:
    """Bytes that other processes hold, beyond the margin that is left for the system anyway."""
    if probe.memory_bytes is None or probe.memory_available_bytes is None:
        return 0
    ours = (probe.server.anonymous_bytes or 0) if probe.server else 0
    others = probe.memory_bytes - probe.memory_available_bytes - ours
    return max(0, others - HOST_MARGIN_BYTES)


def judge(settings: Settings, probe: Probe, shape: Shape | None) -> Fit | None:
    """How a model stands on this host; None where too little is known."""
    found = places(settings, probe)
    if shape is None or found is None:
        return None
    return fit(shape, Demand.of(settings), *found)


def fits(settings: Settings, probe: Probe) -> Callable[[Shape], bool] | None:
    """What tells whether a model fits as asked for; None where the memory is not known."""
    if places(settings, probe) is None:
        return None

    def does(shape: Shape) -> bool:
        found = judge(settings, probe, shape)
        return found is None or found.verdict is Verdict.FITS

    return does
