"""Pytest plugin of the notebook stage: the longest first, a line for each, a failure beyond its budget.

Budgets are seconds of a machine like the one they were set on. A slower one, or one with busy neighbours, gets as much more time as it
takes for a fixed piece of work, timed again and again while the notebooks run.
"""

import json
import statistics
import time
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path

import pytest

from mythoslab.classroom.run import is_stderr, is_widget

#: Seconds that the fixed work, ten steps of training, took where the budgets were set: 05 takes some nine thousand of them in 110 s.
USUAL = 0.12
#: Seconds after which it is timed again.
EVERY = 20.0

seconds, slowness = defaultdict(float), defaultdict(list)
timed = {"when": -EVERY, "path": None}


@lru_cache(maxsize=1)
def _fixed_work():
    import torch

    from mythoslab.recurrence import ForestModel, train_forest

    torch.set_num_threads(1)

    def work():
        torch.manual_seed(0)
        train_forest(ForestModel(), n_steps=10, n_passes=range(3, 5), length=4, seed=0)

    work()  # the first time loads code
    return work


def how_slow() -> float:
    """How many times longer than usual the fixed work takes now; at least one."""
    work = _fixed_work()
    start = time.perf_counter()
    work()
    return max(1.0, (time.perf_counter() - start) / USUAL)


def budget(path: Path) -> int:
    """Seconds that a notebook's metadata allow it."""
    return json.loads(path.read_text(encoding="utf-8"))["metadata"]["mythoslab"]["budget_s"]


def over_budget(path: Path, taken: float, slow: float = 1.0) -> str | None:
    """One sentence if a notebook took longer than its metadata allow on a machine so many times slower, else nothing."""
    if taken > slow * budget(path):
        here = f", here {slow * budget(path):.0f} s" if slow > 1 else ""
        took = f"{path.name} took {taken:.0f} s, and its budget is {budget(path)} s{here}"
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
        assert item.output_timeout, "nbval has another name for it now"
        item.output_timeout = 60  # seconds, in place of 5: a busy machine may fall silent


@pytest.hookimpl(trylast=True)  # when the kernel has been started
def pytest_runtest_setup(item):
    # nbval reads what a cell says only when it has ended, and of more than a thousand messages those that find no room are lost.
    kernel = item.parent.kernel
    if kernel is not None and kernel.is_alive():
        kernel.kc.iopub_channel.socket.set_hwm(0)
    if item.path != timed["path"] or time.monotonic() - timed["when"] > EVERY:
        item.user_properties.append(("slowness", how_slow()))
        timed.update(path=item.path, when=time.monotonic())


def pytest_runtest_logreport(report):
    name = report.nodeid.partition("::")[0]
    seconds[name] += report.duration
    if report.when == "teardown":
        slowness[name] += [value for kind, value in report.user_properties if kind == "slowness"]


def _late(root: Path) -> dict[str, str]:
    """What to say of the notebooks that took too long."""
    told = {name: over_budget(root / name, taken, statistics.mean(slowness[name])) for name, taken in seconds.items()}
    return {name: sentence for name, sentence in told.items() if sentence}


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("notebooks")
    late = _late(config.rootpath)
    for name, taken in sorted(seconds.items()):
        slow = statistics.mean(slowness[name])
        terminalreporter.write_line(f"{taken:6.0f} s  {name}" + (f"  (a machine {slow:.1f} times slower)" if slow > 1 else ""))
        if name in late:
            terminalreporter.write_line(f"FAILED {late[name]}", red=True)


def pytest_sessionfinish(session, exitstatus):
    on_controller = not hasattr(session.config, "workerinput")
    if on_controller and exitstatus == pytest.ExitCode.OK:
        if _late(session.config.rootpath):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
