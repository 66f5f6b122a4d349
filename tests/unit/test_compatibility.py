from __future__ import annotations

from pathlib import Path

import pytest

from tasks import compatibility
from tasks.compatibility import Case
from tasks.rules import tables
from tasks.rules.findings import Severity

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CASES = list(compatibility.cases())


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == compatibility.markdown(), "run: ./run python -m tasks.compatibility"


def test_the_page_has_every_distribution_and_family_bare_and_in_wsl() -> None:
    assert len(CASES) >= 60
    assert len({case.title for case in CASES}) == len(CASES)
    for wsl in (False, True):
        systems = {
            (case.probe.os_id, case.probe.os_version) for case in CASES if case.probe.wsl is wsl
        }
        assert len(systems) == len(tables.distributions())
    modern = {"turing", "ampere", "ada", "hopper", "blackwell-consumer", "pascal"}
    shown = {tables.cards()[device].family.name for device in compatibility.CARDS.values()}
    assert modern <= shown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_host_is_served_or_told_why_not(case: Case) -> None:
    errors = [each for each in case.findings if each.severity is Severity.ERROR]
    assert all(each.cause and each.fix for each in errors)
    row = compatibility.row(case)
    assert row[0] == case.title
    assert all(row[1:4]) or errors
