"""Checks: one line that says what is wrong, and an object with which the notebook goes on."""

import pytest
import torch

from mythoslab.classroom import checks as framework
from mythoslab.classroom.checks import (
    Mistake,
    check,
    checks,
    expect,
    expect_close,
    expect_raises,
    expect_shape,
)


class TheReference:
    @staticmethod
    def double(x):
        return 2 * x


@pytest.fixture(autouse=True)
def double_is_an_exercise(monkeypatch):
    monkeypatch.setattr(framework, "_checks", {})
    monkeypatch.setattr(framework, "results", {})
    monkeypatch.setattr(framework, "_load_all", lambda: None)
    monkeypatch.setattr(framework, "reference", lambda topic: TheReference)

    @checks("double")
    def double(double):
        x = torch.randn(3)
        expect_close(double(x), 2 * x, "Multiply by two, do not add two.")


def test_right_code_is_handed_back(capsys):
    def double(x):
        return x + x

    assert check(double) is double
    assert capsys.readouterr().out == "double: right.\n"
    assert framework.results["double"].verdict == "right"


def test_wrong_code_gets_the_cause_in_one_sentence_and_the_reference(capsys):
    def double(x):
        return x + 2

    assert check(double) is TheReference.double
    line = "double: not yet. Multiply by two, do not add two. The reference stands in.\n"
    assert capsys.readouterr().out == line


def wrapped(x):
    try:
        raise NotImplementedError("your turn")
    except NotImplementedError as error:
        raise RuntimeError("while doubling") from error


def untouched(x):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize("body", [untouched, wrapped])
def test_a_blank_body_is_not_attempted_however_deep_it_lies(body, capsys):
    def double(x):
        return body(x)

    assert check(double) is TheReference.double
    assert capsys.readouterr().out == "double: not attempted yet – the reference stands in.\n"


def test_another_not_implemented_error_is_a_mistake(capsys):
    def double(x):
        raise NotImplementedError("later")

    check(double)
    assert capsys.readouterr().out.startswith(
        "double: not yet. It raised NotImplementedError: later, in the line"
    )


def test_an_unexpected_error_names_type_message_and_line(capsys):
    def double(x):
        return x * unknown_factor  # noqa: F821

    check(double)
    assert capsys.readouterr().out == (
        "double: not yet. It raised NameError: name 'unknown_factor' is not defined, in the line "
        "'return x * unknown_factor  # noqa: F821'. The reference stands in.\n"
    )


def test_a_wrong_signature_is_reported_without_a_line(capsys):
    def double():
        return 2

    double.__module__ = "the_notebook"
    check(double)
    out = capsys.readouterr().out
    assert (
        out.startswith("double: not yet. It raised TypeError: ")
        and "in the line" not in out
        and out.count("\n") == 1
    )


def test_a_check_is_deterministic_and_leaves_the_random_state_as_it_was():
    seen = []

    def double(x):
        seen.append(x)
        torch.rand(5)
        return 2 * x

    torch.manual_seed(7)
    before = torch.get_rng_state()
    check(double)
    torch.manual_seed(8)
    check(double)
    assert torch.equal(seen[0], seen[1])
    torch.manual_seed(7)
    check(double)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_name_says_to_keep_the_name():
    with pytest.raises(ValueError, match="no exercise is called <lambda>: keep the name"):
        check(lambda x: x)


def test_two_checks_cannot_share_a_name():
    with pytest.raises(KeyError, match="two checks for double"):
        checks("double")(lambda learners: None)


def test_expectations_say_what_they_got():
    with pytest.raises(Mistake, match="^no$"):
        expect(False, "no")
    with pytest.raises(Mistake, match=r"The state should have the shape \(2, 3\), and it has \(3, 2\)\."):
        expect_shape(torch.zeros(3, 2), (2, 3), "The state")
    with pytest.raises(Mistake, match="The result should be a tensor, and it is a list."):
        expect_close([1.0], torch.ones(1), "unused")
    with pytest.raises(Mistake, match="The result is None: is a return missing?"):
        expect_close(None, torch.ones(1), "unused")
    with pytest.raises(Mistake, match="off"):
        expect_close(torch.tensor([1.001]), torch.ones(1), "off")
    expect_close(torch.ones(1, dtype=torch.float64), torch.ones(1), "off")


def test_expect_raises_wants_the_error_and_lets_a_blank_body_through():
    expect_raises(ValueError, lambda: int("x"), "unused")
    with pytest.raises(Mistake, match="must refuse"):
        expect_raises(ValueError, lambda: int("1"), "It must refuse.")
    with pytest.raises(Mistake, match="must refuse"):
        expect_raises(ValueError, lambda: int([]), "It must refuse.")
    with pytest.raises(NotImplementedError):
        expect_raises(ValueError, lambda: untouched(1), "unused")
