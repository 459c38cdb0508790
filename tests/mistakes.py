"""Tests of the checks of a notebook: each mistake is named, and the finished code is right."""

import inspect
from collections.abc import Callable, Sequence

import pytest

from mythoslab.classroom.checks import check, reference


def edited(topic: str, name: str, *changes: tuple[str, str]) -> Callable:
    """What a learner would have defined: the code of the finished one, with each first text of ``changes`` replaced by the second."""
    module = reference(topic)
    source = inspect.getsource(inspect.unwrap(getattr(module, name)))
    for old, new in changes:
        assert old in source, (name, old)
        source = source.replace(old, new)
    namespace = {**vars(module), "__name__": "__main__"}
    exec(source, namespace)
    return namespace[name]


def mistakes_are_named(
    mistakes: Sequence[tuple[str, Callable, str]], finished: Sequence[Callable]
) -> tuple[Callable, Callable]:
    """Two tests: that each mistake is named, and that finished code is handed back as right.

    Args:
        mistakes: Name of the exercise, code as a learner might write it, and words of the sentence that names the cause.
        finished: The finished code of every exercise.
    """
    ids = [f"{name}-{cause}" for name, _, cause in mistakes]

    @pytest.mark.parametrize("name, wrong, cause", mistakes, ids=ids)
    def names_the_cause(name, wrong, cause, capsys):
        wrong.__name__ = name
        handed_back = check(wrong)
        line = capsys.readouterr().out
        assert line.startswith(f"{name}: not yet.") and cause in line, line
        assert handed_back is not wrong

    @pytest.mark.parametrize("right", finished, ids=lambda part: part.__name__)
    def accepts_the_finished_code(right, capsys):
        handed_back = check(right)
        line = capsys.readouterr().out
        assert line == f"{right.__name__}: right.\n", line
        assert handed_back is right

    return names_the_cause, accepts_the_finished_code
