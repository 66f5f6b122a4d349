"""The memory that a host has for its servers: of its cards, and its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from tasks.probe import Probe
from tasks.rules import nvidia
from tasks.rules.architecture import Shape
from tasks.rules.fit import HOST_MARGIN_BYTES, Demand, Fit, Place, Verdict, fit
from tasks.settings import Settings

GIB = 1024**3

Neighbour = tuple[Settings, Fit]
"""Another model on the same host, and where it lies."""


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
    cards = nvidia.identify(probe.gpus)[0]
    if any(card.memory_gib is None for card in cards):
        return None
    if settings.server_gpu_devices is not None:
        cards = tuple(
            cards[number] for number in settings.server_gpu_devices if number < len(cards)
        )
    # As the card is sold. The driver keeps less than 1 % of it back, which the margin covers; with
    # ECC on GDDR memory it is a sixteenth.
    return tuple(Place(card.name, (card.memory_gib or 0) * GIB) for card in cards), host


def _used_by_others(probe: Probe) -> int:
    """Bytes that other processes hold, beyond the margin that is left for the system anyway."""
    if probe.memory_bytes is None or probe.memory_available_bytes is None:
        return 0
    ours = sum(each.anonymous_bytes or 0 for each in probe.services.values() if each.is_ours)
    others = probe.memory_bytes - probe.memory_available_bytes - ours
    return max(0, others - HOST_MARGIN_BYTES)


def judge(
    settings: Settings, probe: Probe, shape: Shape | None, others: Iterable[Neighbour] = ()
) -> Fit | None:
    """How a model stands on this host, beside others; None where too little is known."""
    found = places(settings, probe)
    if shape is None or found is None:
        return None
    return fit(shape, Demand.of(settings), *_left(settings, *found, others))


def _left(
    settings: Settings, cards: tuple[Place, ...], host: Place, others: Iterable[Neighbour]
) -> tuple[tuple[Place, ...], Place]:
    """The same places, less what other models on this host are given of them."""
    taken: dict[int | None, int] = {}
    for theirs, found in others:
        numbers = [*_numbers(theirs, len(found.shares) - 1), None]
        for number, share in zip(numbers, found.shares, strict=True):
            # Each process keeps a margin of its own on a card; the host's is there once.
            margin = share.margin if number is not None and share.memory.total else 0
            taken[number] = taken.get(number, 0) + share.memory.total + margin
    ours = _numbers(settings, len(cards))
    left = [_less(card, taken.get(number, 0)) for number, card in zip(ours, cards, strict=True)]
    return tuple(left), _less(host, taken.get(None, 0))


def _less(place: Place, taken: int) -> Place:
    return replace(place, size=place.size - taken, taken=taken)


def _numbers(settings: Settings, count: int) -> Iterable[int]:
    """Numbers of the cards that a server uses, in its order."""
    devices = settings.server_gpu_devices
    return range(count) if devices is None else devices[:count]


def fits(
    settings: Settings, probe: Probe, others: Iterable[Neighbour] = ()
) -> Callable[[Shape], bool] | None:
    """What tells whether a model fits as asked for; None where the memory is not known."""
    if places(settings, probe) is None:
        return None

    def does(shape: Shape) -> bool:
        found = judge(settings, probe, shape, others)
        return found is None or found.verdict is Verdict.FITS

    return does
