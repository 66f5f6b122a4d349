"""What may be skipped, and how long a test may take."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import cache

import hypothesis
import pytest

# How long an example takes says how busy the machine is, not whether the rule holds.
hypothesis.settings.register_profile("llamastead", deadline=None)
hypothesis.settings.load_profile("llamastead")

LAB_TIMEOUT_SECONDS = (
    1800  # a host is made, or llama.cpp compiled, within the first test that needs it
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests in the lab more time than the default, unless they set their own."""
    for item in items:
        if item.get_closest_marker("lab") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LAB_TIMEOUT_SECONDS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests in the lab, before any fixture is made, where there can't be one."""
    if item.get_closest_marker("lab") and (reason := lab_obstacle()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skipped lab is a failure: there, everything has to be shown."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and item.get_closest_marker("lab") and in_ci():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"with CI=true the lab may not be skipped. {reason}"
    return report


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


@cache
def lab_obstacle() -> str | None:
    """Why there can't be a lab here; None if there can."""
    from tests import lab  # noqa: PLC0415  (only here, so that other tests do without it)

    return lab.obstacle()
