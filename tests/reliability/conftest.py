"""A counter of what was tried, which the slow tests print at their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.attacks import Attacks


@pytest.fixture
def attacks(capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> Attacks:
    """Tries that are held to the contract and counted."""
    return Attacks(capsys, record_property)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line per test that attacked, also where workers ran them."""
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "attacks" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")
