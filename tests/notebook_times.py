"""Pytest plugin of the notebook stage: the longest first, a line for each, a failure beyond its budget."""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest

from mythoslab.classroom.run import is_stderr, is_widget

seconds = defaultdict(float)


def budget(path: Path) -> int:
    """Seconds that a notebook's metadata allow it."""
    return json.loads(path.read_text(encoding="utf-8"))["metadata"]["mythoslab"]["budget_s"]


def over_budget(path: Path, taken: float) -> str | None:
    """One sentence if a notebook took longer than its metadata allow, else nothing."""
    if taken > budget(path):
        took = f"{path.name} took {taken:.0f} s, and its budget is {budget(path)} s"
        return f"{took}: make it faster, or raise budget_s"
    return None


def compare_lasting(compare, *outputs, **options):
    """Compare outputs strictly, but for progress bars and widgets, which differ in every run."""

    def lasting(some):
        return [output for output in some if not (is_stderr(output) or is_widget(output))]

    return compare(*map(lasting, outputs), **options)


def pytest_collection_modifyitems(items):
    budgets = {path: budget(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: -budgets[item.path])
    for item in items:
        item.compare_outputs = partial(compare_lasting, item.compare_outputs)


def pytest_runtest_logreport(report):
    seconds[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("notebooks")
    for name, taken in sorted(seconds.items()):
        terminalreporter.write_line(f"{taken:6.0f} s  {name}")
        slow = over_budget(config.rootpath / name, taken)
        if slow:
            terminalreporter.write_line(f"FAILED {slow}", red=True)


def pytest_sessionfinish(session, exitstatus):
    on_controller = not hasattr(session.config, "workerinput")
    if on_controller and exitstatus == pytest.ExitCode.OK:
        if any(over_budget(session.config.rootpath / name, taken) for name, taken in seconds.items()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
