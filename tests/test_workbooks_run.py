"""Every notebook as a workbook: it runs to its end unfilled, and saves the same bytes when filled.

Cells tagged ``experiment`` are skipped, so they must not be needed by the others.
"""

import os

import nbformat
import pytest

from mythoslab.classroom.course import notebooks, read_notebook, reference_module, tagged, topic_of
from mythoslab.classroom.run import Client
from mythoslab.classroom.saved import checked_names, defined_names
from mythoslab.classroom.workbook import workbook_of

NOTEBOOKS = {path.stem: path for path in notebooks()}
WITH_EXERCISES = [
    name
    for name, path in NOTEBOOKS.items()
    if any(tagged(cell, "exercise") for cell in read_notebook(path)["cells"])
]


def run(path, book: dict, workbooks) -> dict[str, str]:
    """Run a notebook in the folder of workbooks; what each cell printed."""
    workbooks.mkdir()
    book["cells"] = [cell for cell in book["cells"] if not tagged(cell, "experiment")]
    file = workbooks / path.name
    nbformat.write(nbformat.from_dict(book), file)
    ran = nbformat.read(file, as_version=4)
    client = Client(
        ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(workbooks)}}
    )
    client.execute(env={**os.environ, "MYTHOSLAB_WORKBOOKS": str(workbooks), "OMP_NUM_THREADS": "1"})
    return {cell.id: "".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in ran.cells}


def verdicts(book: dict, printed: dict[str, str]) -> list[str]:
    return [
        line for cell in book["cells"] if tagged(cell, "check") for line in printed[cell["id"]].splitlines()
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_unfilled_it_runs_to_its_end_with_nothing_attempted(name, tmp_path):
    path = NOTEBOOKS[name]
    book = workbook_of(read_notebook(path))
    printed = run(path, book, tmp_path / "workbooks")
    expected = [
        f"{exercise}: not attempted yet – the reference stands in."
        for exercise in checked_names(read_notebook(path))
    ]
    assert verdicts(book, printed) == expected
    assert not (tmp_path / "workbooks" / "saved").exists()


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_filled_with_the_reference_it_passes_every_check_and_saves_the_same_bytes(name, tmp_path):
    path = NOTEBOOKS[name]
    book = read_notebook(path)
    printed = run(path, book, tmp_path / "workbooks")
    assert verdicts(book, printed) == [f"{exercise}: right." for exercise in checked_names(book)]
    saved = tmp_path / "workbooks" / "saved" / f"{topic_of(path)}.py"
    assert saved.read_bytes() == reference_module(topic_of(path)).read_bytes()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_exercise_is_followed_by_the_check_of_what_it_defines(name):
    cells = read_notebook(NOTEBOOKS[name])["cells"]
    for index, cell in enumerate(cells):
        if tagged(cell, "exercise"):
            following = cells[index + 1]
            assert tagged(following, "check"), f"no check after the exercise #{cell['id']}"
            checked = checked_names({"cells": [following]})
            assert checked and set(checked) <= set(defined_names(cell["source"])), (
                f"#{following['id']} checks {checked}"
            )
    checked = checked_names({"cells": cells})
    assert len(checked) == len(set(checked))
