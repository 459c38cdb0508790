"""Workbooks: exercises lose their bodies and nothing else, and every notebook of the course survives it."""

import ast
import inspect
import json
import textwrap

import pytest
import torch.nn.modules

from mythoslab.classroom.workbook import YOUR_TURN, blanked, workbook_of


def test_body_goes_and_everything_around_it_stays():
    source = textwrap.dedent('''\
        #| export
        import math

        SCALE = 2.0  # stays


        @staticmethod
        def grow(
            x: float,  # the length
            *,
            by: float = SCALE,
        ) -> float:
            """Length after growing.

            Indented like this.
            """
            # multiply, do not add
            def inner():
                return x * by

            return inner()
            # done


        class Ruler:
            unit = "cm"

            @property
            def name(self): return "ruler"

            async def measure(self):

                # look closely
                return (
                    1
                )

            def described(self):
                """Say what it is."""
    ''')
    assert blanked(source) == textwrap.dedent('''\
        #| export
        import math

        SCALE = 2.0  # stays


        @staticmethod
        def grow(
            x: float,  # the length
            *,
            by: float = SCALE,
        ) -> float:
            """Length after growing.

            Indented like this.
            """
            raise NotImplementedError("your turn")


        class Ruler:
            unit = "cm"

            @property
            def name(self): raise NotImplementedError("your turn")

            async def measure(self):
                raise NotImplementedError("your turn")

            def described(self):
                """Say what it is."""
    ''')


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def f(x): return 'é', x  # why", f"def f(x): {YOUR_TURN}"),
        ('def f(x): "é"; return x', f'def f(x): "é"; {YOUR_TURN}'),
        ("def f(\n    x,\n): return (\n    x\n)", f"def f(\n    x,\n): {YOUR_TURN}"),
        ("if True:\n    def f():\n        @wraps\n        def g(): ...\n        return g\nx = 1", None),
    ],
)
def test_unusual_layouts_are_blanked_too(source, expected):
    expected = expected or f"if True:\n    def f():\n        {YOUR_TURN}\nx = 1"
    assert blanked(source) == expected


def _bodies_removed(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = node.body[:1] if ast.get_docstring(node) is not None else []
    return ast.dump(tree)


@pytest.mark.parametrize(
    "module", [textwrap, json.decoder, inspect, torch.nn.modules.activation], ids=lambda m: m.__name__
)
def test_signatures_decorators_and_docstrings_of_real_modules_survive(module):
    source = inspect.getsource(module)
    blank = blanked(source)
    assert _bodies_removed(blank) == _bodies_removed(source)
    for node in ast.walk(ast.parse(blank)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
            assert ast.unparse(node.body[-1]) == YOUR_TURN.replace('"', "'")


def test_a_workbook_keeps_ids_and_order_and_drops_outputs():
    exercise = {"cell_type": "code", "id": "e", "metadata": {"tags": ["exercise"]}, "execution_count": 3}
    exercise |= {"source": "#| export\ndef f():\n    return 1", "outputs": [{"output_type": "stream"}]}
    prose = {"cell_type": "markdown", "id": "m", "metadata": {}, "source": "def f():\n    return 1"}
    book = workbook_of({"cells": [prose, exercise], "metadata": {"widgets": {}, "x": 1}, "nbformat": 4})
    assert [cell["id"] for cell in book["cells"]] == ["m", "e"]
    assert "".join(book["cells"][0]["source"]) == prose["source"]
    assert "".join(book["cells"][1]["source"]) == f"#| export\ndef f():\n    {YOUR_TURN}"
    assert book["cells"][1]["outputs"] == [] and book["cells"][1]["execution_count"] is None
    assert book["metadata"] == {"x": 1} and exercise["outputs"]
