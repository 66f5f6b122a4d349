"""How a decision is made: one set of rules chooses, and judges what the user chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tasks.rules.findings import Finding, Severity


class Candidate(Protocol):
    """What can be chosen; its text is its name in full."""

    @property
    def short(self) -> str:
        """Its name where it is clear which one is meant."""
        ...


C = TypeVar("C", bound=Candidate)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Constraint(Generic[C, S]):
    """A rule: what it objects to in a candidate, given its surroundings."""

    name: str
    """The code of every finding that it yields."""
    objections: Callable[[C, S], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Decision(Generic[C]):
    """What is used, and why; or why there is nothing."""

    choice: C | None
    reason: str
    """One line for the plan."""
    findings: tuple[Finding, ...] = ()
    rejected: tuple[tuple[C, tuple[Finding, ...]], ...] = field(default=(), repr=False)
    """Candidates that were preferred, and what speaks against each."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What makes the choice impossible."""
        return errors_of(self.findings)


def errors_of(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The errors among findings."""
    return tuple(found for found in findings if found.severity is Severity.ERROR)


def validate(
    candidate: C, surroundings: S, constraints: Sequence[Constraint[C, S]]
) -> tuple[Finding, ...]:
    """Everything that speaks against a candidate, and what is worth knowing about it."""
    return tuple(
        found
        for constraint in constraints
        for found in constraint.objections(candidate, surroundings)
    )


def choose(
    candidates: Iterable[C],
    surroundings: S,
    constraints: Sequence[Constraint[C, S]],
    nothing: Callable[[Sequence[tuple[C, tuple[Finding, ...]]]], Finding],
) -> Decision[C]:
    """The first candidate without objections, else the first without errors.

    nothing: the finding for when there is none, from what speaks against each candidate.
    """
    judged = [(each, validate(each, surroundings, constraints)) for each in candidates]
    notes_only = [pair for pair in judged if not _serious(pair[1])]
    workable = [pair for pair in judged if not errors_of(pair[1])]
    for ranked in (notes_only, workable):
        if ranked:
            choice, findings = ranked[0]
            before = tuple(judged[: judged.index(ranked[0])])
            return Decision(choice, _reason(choice, before), findings, before)
    return Decision(None, "nothing fits", (nothing(judged),), tuple(judged))


def _serious(findings: Iterable[Finding]) -> bool:
    return any(found.severity is not Severity.NOTE for found in findings)


def _reason(choice: C, before: Sequence[tuple[C, tuple[Finding, ...]]]) -> str:
    if not before:
        return f"{choice}: the first choice fits"
    return f"{choice}: what comes before it does not fit ({against_each(before)})"


def against_each(judged: Sequence[tuple[C, tuple[Finding, ...]]]) -> str:
    """What speaks against each candidate, those with the same fault together."""
    alike: dict[str, list[tuple[C, str]]] = {}
    for candidate, findings in judged:
        worst = min(findings, key=lambda found: list(Severity).index(found.severity))
        alike.setdefault(worst.code, []).append((candidate, worst.cause))
    return "; ".join(_together(pairs) for pairs in alike.values())


def _together(pairs: Sequence[tuple[C, str]]) -> str:
    """The first cause in full; of the others those that say something else, or else the names."""
    (first, cause), *others = pairs
    causes, names = [cause], dict[str, None]()
    for candidate, other in others:
        if other in causes:
            continue
        if str(candidate) == str(first):
            causes.append(other)
        else:
            name = candidate.short
            names[str(candidate) if name in cause else name] = None
    said = "; ".join(causes)
    return f"{said} (likewise {', '.join(names)})" if names else said
