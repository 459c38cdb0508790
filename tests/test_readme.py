"""The README promises what is there: links, notebooks, commands, and a figure that a notebook drew."""

import re
from pathlib import Path

import nbformat
import pytest

from mythoslab.classroom.course import ROOT, notebooks
from mythoslab.classroom.run import readme_figures
from mythoslab.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_course_map_lists_every_notebook_in_order_with_minutes_that_cover_its_budget():
    rows = re.findall(r"^\| \[[^]]+\]\(notebooks/(\w+\.ipynb)\) \|[^|]+\| ([\d½]+) \|$", README, re.M)
    assert [name for name, _ in rows] == [path.name for path in notebooks()]
    for path, (_, written) in zip(notebooks(), rows):
        minutes = sum(0.5 if part == "½" else float(part) for part in re.findall(r"\d+|½", written))
        budget = nbformat.read(path, as_version=4).metadata["mythoslab"]["budget_s"] / 60
        assert budget / 2 <= minutes <= 2 * budget, f"{path.name}: {minutes} minutes, and a budget of {budget:.1f}"


def test_commands_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = capsys.readouterr().out
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    commands = set(re.findall(r"`mythoslab (\w+)", README + CARD))
    assert commands and all(re.search(rf"^ +{command} ", offered, re.M) for command in commands)
    assert set(re.findall(r"^make (\w+)|`make (\w+)", README, re.M)) <= {(t, "") for t in targets} | {("", t) for t in targets}


def test_figure_is_the_one_a_notebook_drew():
    drawn = {}
    for path in notebooks():
        drawn |= readme_figures(nbformat.read(path, as_version=4))
    shown = re.findall(r"!\[[^]]+\]\((data/[\w-]+\.png)\)", README)
    assert shown
    for name in shown:
        assert (ROOT / name).read_bytes() == drawn[Path(name).stem]


def test_verdicts_are_those_of_the_notebook():
    """Claim by claim, in the notebook's order: its verdict, or how many of its tests say yes."""
    book = nbformat.read(ROOT / "notebooks" / "12_evidence.ipynb", as_version=4)
    (cell,) = (cell for cell in book.cells if cell.id == "verdict-table")
    told = cell.outputs[0]["data"]["text/markdown"].splitlines()[2:]
    found = []
    for claim, questions, tests, text, _ in ([part.strip(" *") for part in row.strip("|").split("|")] for row in told):
        yes, no = (len(re.findall(rf": {answer}\b", tests)) for answer in ("yes", "no"))
        verdict = "" if questions == "holds in part" else f"{questions}, "
        found.append((f"{verdict}{yes} of {yes + no}", text))
    rows = README.split("| claim | on questions | on text |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    written = [tuple(part.strip() for part in row.strip("|").split("|")[1:]) for row in rows]
    assert written == found
