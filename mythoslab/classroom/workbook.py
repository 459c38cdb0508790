"""From notebook to workbook: the same cells, with the bodies of the exercises left to the learner."""

from __future__ import annotations

import ast
import json

from .course import notebook_of, notebooks, read_notebook, shown, tagged, workbooks, write_whole

__all__ = ["write_workbooks", "workbook_of", "blanked"]

YOUR_TURN = 'raise NotImplementedError("your turn")'


def write_workbooks(topic: str | None = None) -> None:
    """Write the workbook of one topic, or of all, and leave alone every workbook that exists.

    Raises:
        ValueError: there is no such topic, or the folder of workbooks cannot be written.
    """
    for notebook in notebooks() if topic is None else [notebook_of(topic)]:
        workbook = workbooks() / notebook.name
        if workbook.exists():
            print(f"{shown(workbook)} exists and stays as it is; rename it to get a fresh one")
        else:
            source = json.dumps(workbook_of(read_notebook(notebook)), indent=1, ensure_ascii=False)
            write_whole(workbook, source + "\n")
            print(f"wrote {shown(workbook)}")


def workbook_of(notebook: dict) -> dict:
    """The notebook without outputs and without its exercises' bodies; every cell keeps its id and place."""
    cells = []
    for cell in notebook["cells"]:
        source = blanked(cell["source"]) if tagged(cell, "exercise") else cell["source"]
        cell = {**cell, "source": source.splitlines(keepends=True)}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        cells.append(cell)
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "widgets"}
    return {**notebook, "metadata": metadata, "cells": cells}


def blanked(source: str) -> str:
    """Python source whose functions and methods keep decorators, signature and docstring and lose their body.

    Args:
        source: Valid Python. Everything outside the bodies keeps its formatting.

    Returns:
        The source, each body ``raise NotImplementedError("your turn")``.
    """
    lines = source.split("\n")
    for function in sorted(_functions(ast.parse(source)), key=lambda node: node.lineno, reverse=True):
        first = function.body[0]
        has_docstring = ast.get_docstring(function, clean=False) is not None
        if has_docstring and len(function.body) == 1:
            continue
        if _shares_a_line(function, lines, has_docstring):  # def f(x): return x
            line, column = (
                (first.end_lineno, first.end_col_offset)
                if has_docstring
                else (first.lineno, first.col_offset)
            )
            kept = lines[line - 1].encode()[:column].decode() + ("; " if has_docstring else "")
            lines[line - 1 : function.end_lineno] = [kept + YOUR_TURN]
        else:
            start = first.end_lineno if has_docstring else _end_of_signature(first, lines)
            lines[start : _end_of_body(function, lines)] = [" " * first.col_offset + YOUR_TURN]
    return "\n".join(lines)


def _functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        else:
            yield from _functions(child)


def _shares_a_line(function: ast.FunctionDef, lines: list[str], has_docstring: bool) -> bool:
    first = function.body[0]
    before = lines[first.lineno - 1].encode()[: first.col_offset].strip()
    return bool(before) or has_docstring and function.body[1].lineno == first.end_lineno


def _end_of_signature(first: ast.stmt, lines: list[str]) -> int:
    line = min(node.lineno for node in (first, *getattr(first, "decorator_list", []))) - 1
    while not lines[line - 1].strip() or lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


def _end_of_body(function: ast.FunctionDef, lines: list[str]) -> int:
    """A comment indented like the body belongs to it, also below its last statement."""
    end = function.end_lineno
    for number in range(end, len(lines)):
        line = lines[number].lstrip()
        if line and not (line.startswith("#") and len(lines[number]) - len(line) > function.col_offset):
            break
        end = number + 1 if line else end
    return end
