"""From notebook to module, with nbdev; and the proof that the two agree."""

from __future__ import annotations

import ast
import json
import re
import tempfile
from pathlib import Path

from .course import (
    PACKAGE,
    UserError,
    notebook_of,
    notebooks,
    read_notebook,
    reference_module,
    shown,
    topic_of,
    write_whole,
)

__all__ = ["export", "differences", "module_source"]

HAND_WRITTEN = {"__init__", "__main__", "cli"}


def export(topic: str | None = None) -> list[str]:
    """Write the modules of all notebooks, or of one; a file that would not change is not touched.

    Args:
        topic: Topic of the notebook; all of them by default.

    Returns:
        The modules written because they changed, as paths to show.

    Raises:
        ValueError: a notebook cannot be exported or a module cannot be written; nothing is left half-written.
    """
    written = []
    for notebook in [notebook_of(topic)] if topic else notebooks():
        module, source = (
            reference_module(topic_of(notebook)),
            module_source(notebook.name, read_notebook(notebook)),
        )
        if source is not None and source != _text(module):
            write_whole(module, source)
            written.append(shown(module))
    return written


def differences() -> list[str]:
    """Say where modules and notebooks differ: one sentence for each, none where they agree."""
    found, exported = [], set()
    for path in notebooks():
        notebook, module = read_notebook(path), reference_module(topic_of(path))
        expected, actual = module_source(path.name, notebook), _text(module)
        if expected is None:
            continue
        exported.add(module)
        if actual is None:
            found.append(f"{shown(path)} has no module: {shown(module)} is missing")
        elif actual != expected:
            where = _differing_cells(notebook, expected, actual) or ["the order or spacing of its cells"]
            found += [f"{shown(module)} differs from {shown(path)} in {cell}" for cell in where]
    strays = {file for file in PACKAGE.glob("*.py") if file.stem not in HAND_WRITTEN} - exported
    return found + [f"{shown(module)} has no notebook that exports it" for module in sorted(strays)]


def _text(module: Path) -> str | None:
    return module.read_text(encoding="utf-8", errors="replace") if module.is_file() else None


def module_source(notebook_name: str, notebook: dict) -> str | None:
    """Source of the module that nbdev makes of a notebook, wherever the notebook lies.

    Args:
        notebook_name: File name, such as ``02_recurrence.ipynb``; its topic is what ``#| default_exp`` says.
        notebook: The notebook as JSON.

    Returns:
        The module's source; ``None`` for a notebook that exports nothing.

    Raises:
        ValueError: nbdev is missing, an export cell is not Python, or ``#| default_exp`` says something else.
    """
    try:
        from nbdev.export import nb_export
    except ImportError:
        raise UserError("export needs nbdev: install it with pip install 'mythoslab[course]'") from None

    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    exported = [cell for cell in code if re.match(r"#\|\s*export", cell["source"])]
    if not exported:
        return None
    for cell in exported:
        try:
            ast.parse(cell["source"])
        except SyntaxError as error:
            raise UserError(
                f"cell #{cell['id']} of {notebook_name} is not Python (line {error.lineno}: {error.msg})"
            ) from None

    topic = topic_of(Path(notebook_name))
    if f"#| default_exp {topic}" not in (cell["source"].strip() for cell in code):
        raise UserError(
            f"{notebook_name} must say '#| default_exp {topic}' in a cell of its own: add or mend it"
        )
    # The same two folders side by side as in the course, so that the markers come out the same.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy, package = root / "notebooks" / notebook_name, root / PACKAGE.name
        write_whole(copy, json.dumps(notebook))
        nb_export(copy, lib_path=package)
        return (package / f"{topic}.py").read_text(encoding="utf-8")


def _differing_cells(notebook: dict, expected: str, actual: str) -> list[str]:
    ids = [cell["id"] for cell in notebook["cells"]]
    wanted, found = _by_cell(expected), _by_cell(actual)
    named = []
    for cell_id in {**wanted, **found}:
        if wanted.get(cell_id) == found.get(cell_id):
            continue
        if cell_id in ids:
            named.append(f"cell #{cell_id} (cell {ids.index(cell_id) + 1} of {len(ids)})")
        else:
            special = {"0": "__all__", "": "its title cell"}
            named.append(special.get(cell_id, f"cell #{cell_id}, which the notebook lacks"))
    return named


def _by_cell(module: str) -> dict[str, str]:
    parts = re.split(r"^# %% .*#(\S+)$", module, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], (part.strip() for part in parts[0::2])))
