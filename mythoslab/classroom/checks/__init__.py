"""Checks: try the learner's code, say in one sentence what is wrong, and let the notebook go on.

A check is a function that takes the learner's object and raises :class:`Mistake` with the sentence to show.
It lives in the file of its notebook, for example ``checks/recurrence.py``::

    @checks("RMSNorm")
    def rms_norm(RMSNorm):
        x = torch.randn(2, 3, 8)
        expected = reference("recurrence").RMSNorm(8)(x)
        expect_close(RMSNorm(8)(x), expected, "Divide by the root of the mean square of each position.")
"""

from __future__ import annotations

import importlib
import linecache
import pkgutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference as _reference
from ..saved import last_run

__all__ = [
    "Mistake",
    "Steps",
    "attempt",
    "check",
    "checks",
    "expect",
    "expect_close",
    "expect_gradients",
    "expect_raises",
    "expect_shape",
    "reference",
    "results",
]


class Mistake(Exception):
    """What is wrong with the learner's code: one sentence that names the cause and where to look."""


class Steps(TorchDispatchMode):
    """Count the operations of PyTorch in a ``with`` block; too many are a :class:`Mistake` with the sentence."""

    def __init__(self, sentence: str, most: int = 100_000):
        super().__init__()
        self.sentence, self.most, self.count = sentence, most, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count > self.most:
            raise Mistake(self.sentence)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Result:
    """Verdict of a check (right, not right yet, not attempted yet), its line, and the source that ran."""

    verdict: str
    line: str
    source: str | None


#: Outcome of the latest check of each name in this session.
results: dict[str, Result] = {}

_checks: dict[str, Callable[[Any], None]] = {}


def checks(name: str) -> Callable:
    """Register the decorated function as the check of what the learner calls ``name``."""

    def register(function):
        if name in _checks:
            raise KeyError(f"there are two checks for {name}")
        _checks[name] = function
        return function

    return register


def reference(topic: str):
    """The course's own module of a topic, whatever the learner has saved."""
    return importlib.import_module(f"{_reference.__name__}.{topic}")


def check(learners):
    """Try the learner's class or function, print one line about it, and hand back what to go on with.

    Args:
        learners: A class or function that bears the name of an exercise.

    Returns:
        The learner's own object where it is right, else the reference's.

    Raises:
        ValueError: no exercise has this name.
    """
    name = getattr(learners, "__name__", type(learners).__name__)
    _load_all()
    if name not in _checks:
        raise ValueError(f"no exercise is called {name}: keep the name that the exercise gives")
    if str(learners.__module__).startswith(_reference.__name__) and name in results:
        print(results[name].line)  # run again, after the reference stood in
        return learners

    result = results[name] = _run(name, learners)
    print(result.line)
    if result.verdict == "right":
        return learners
    return getattr(reference(_checks[name].__module__.rpartition(".")[2]), name)


def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


def _run(name: str, learners) -> Result:
    source = last_run(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            _checks[name](learners)
    except Exception as error:
        if _is_your_turn(error):
            line = f"{name}: not attempted yet – the reference stands in."
            return Result("not attempted yet", line, source)
        sentence = str(error) if isinstance(error, Mistake) else _describe(error, learners.__module__)
        return Result("not right yet", f"{name}: not yet. {sentence} The reference stands in.", source)
    return Result("right", f"{name}: right.", source)


def _is_your_turn(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, NotImplementedError) and error.args == ("your turn",):
        return True
    return _is_your_turn(error.__cause__ or error.__context__)


def _describe(error: Exception, module: str) -> str:
    message = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
    place = f", in the line '{linecache.getline(*frames[-1]).strip()}'" if frames else ""
    return f"It raised {type(error).__name__}: {message}{place}."


def attempt(call: Callable[[], Any], sentence: str) -> Any:
    """What a call gives; a :class:`Mistake` with the sentence if PyTorch or Python cannot carry it out."""
    try:
        return call()
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError):
        raise Mistake(sentence) from None


def expect(holds: bool, sentence: str) -> None:
    """Raise :class:`Mistake` with the sentence unless something holds."""
    if not holds:
        raise Mistake(sentence)


def expect_shape(actual, shape: tuple[int, ...], what: str) -> None:
    """Expect a tensor of a shape; ``what`` names it in the sentence, for example ``"The output"``."""
    expect(actual is not None, f"{what} is None: is a return missing?")
    expect(isinstance(actual, Tensor), f"{what} should be a tensor, and it is a {type(actual).__name__}.")
    got = tuple(actual.shape)
    expect(got == tuple(shape), f"{what} should have the shape {tuple(shape)}, and it has {got}.")


def expect_close(
    actual,
    expected: Tensor,
    sentence: str,
    *,
    mistakes: dict[str, Tensor] | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """Expect a tensor with the numbers of another, up to a tolerance; a wrong shape is named as such.

    Args:
        sentence: What to say of numbers that are wrong in a way of their own.
        mistakes: What to say instead, if the numbers are those of a known mistake.
    """
    expect_shape(actual, expected.shape, "The result")
    close = lambda numbers: torch.allclose(actual.to(expected), numbers, atol=atol, rtol=rtol)  # noqa: E731
    if not close(expected):
        known = [
            cause
            for cause, numbers in (mistakes or {}).items()
            if numbers.shape == expected.shape and close(numbers)
        ]
        raise Mistake(known[0] if known else sentence)


#: What cuts a gradient off, said of numbers that are right.
CUT_OFF = "The numbers are right, and they cannot be learned from: no gradient, or a wrong one, comes back. Leave out no_grad, detach, .data and .item()."


def expect_gradients(theirs: Callable, ours: Callable, *inputs, sentence: str = CUT_OFF) -> None:
    """Expect the gradients that the reference gives, by the inputs and, of modules with the same weights, by those.

    Args:
        theirs, ours: Modules or functions of ``inputs``, with a tensor as their result.
        inputs: Tensors and other arguments.
    """

    def gradients(of):
        given = [part.detach().clone().requires_grad_() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs]
        leaves = [part for part in given if isinstance(part, Tensor) and part.requires_grad]
        if isinstance(of, nn.Module):
            leaves += [weight for _, weight in sorted(of.named_parameters())]
        with torch.enable_grad():
            result = of(*given)
        if not result.requires_grad:
            return None
        weigh = torch.linspace(-1, 1, result.numel()).view_as(result)
        return torch.autograd.grad((result * weigh).sum(), leaves, allow_unused=True, materialize_grads=True)

    got, expected = gradients(theirs), gradients(ours)
    alike = got is not None and all(torch.allclose(mine, needed, atol=1e-4, rtol=1e-3) for mine, needed in zip(got, expected, strict=True))
    expect(alike, sentence)


def expect_raises(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], sentence: str) -> None:
    """Expect a call to raise an error; blanked exercises still count as not attempted."""
    try:
        call()
    except error:
        return
    except NotImplementedError:
        raise
    except Exception:
        pass
    raise Mistake(sentence)
