"""Time tasks in turn."""

import time
from collections.abc import Callable, Mapping

import torch


def in_turn(tasks: Mapping[str, Callable[[], object]], n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in rounds in which every task has its turn; a first round, which is slower, does not count."""
    seconds = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(n_rounds):
        for name, task in tasks.items():
            _wait()
            start = time.perf_counter()
            task()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
