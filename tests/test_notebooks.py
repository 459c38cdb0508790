"""The form of every notebook: run in order, claims proven, exercises checked, nothing used too early."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mythoslab.classroom.course import PACKAGE, ROOT, UserError, notebooks, topic_of
from mythoslab.classroom.export import differences
from mythoslab.classroom.run import main, run
from tests.notebook_times import compare_lasting, how_slow, over_budget

NOTEBOOKS = notebooks()
TOPICS = [topic_of(path) for path in NOTEBOOKS]
# The way in and the way out show what the whole course built, and export nothing.
WITHOUT_MODULE = {"00_start_here", "12_evidence"}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def python(cell):
    """Source of a code cell without the lines that only IPython understands."""
    return re.sub(r"^[%!].*$", "", cell.source, flags=re.M)


def asserts(cell):
    nodes = ast.walk(ast.parse(python(cell))) if cell.cell_type == "code" else ()
    return any(isinstance(node, ast.Assert) for node in nodes)


def makes_claim(cell):
    last_paragraph = cell.source.strip().split("\n\n")[-1]
    return cell.cell_type == "markdown" and last_paragraph.startswith("**Claim.**")


def saves(topic, source):
    """Where Python code saves the module of a topic, under whichever name ``save`` was imported."""
    return re.search(rf'^(?:\w+\.)?save\w*\("{topic}"\)', source, re.M)


def run_faults(notebook):
    """Cells never run, run out of order or ended in an unplanned error; outputs that mean nothing later."""
    for position, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count is None:
            yield f"{cell.id}: never run"
        elif cell.execution_count != position:
            yield f"{cell.id}: run out of order, as {cell.execution_count} in place of {position}"
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"{cell.id}: {output.ename}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"{cell.id}: something on stderr is stored: {output.text[:60]!r}"
            if "check" in tags(cell) and ": not yet." in output.get("text", ""):
                yield f"{cell.id}: the check that is stored did not pass"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"{cell.id}: a stored widget opens as an error: store outputs with make notebooks"
            if re.search(r"(?<![\w~.-])/(?:root|home|Users|tmp|work)/", json.dumps(output)):
                yield f"{cell.id}: a path of one machine in an output"


def form_faults(notebook):
    """What the template asks for: title, budget, ids, claims, checks, a figure, a save."""
    first = notebook.cells[0].source.splitlines()
    if not (first and first[0].startswith("# ") and any(line.startswith("> ") for line in first)):
        yield "the first cell needs '# Title' and '> one sentence'"
    if not 0 < notebook.metadata.get("mythoslab", {}).get("budget_s", 0) <= 150:
        yield "metadata need mythoslab.budget_s, at most 150 seconds"
    ids = [cell.id for cell in notebook.cells]
    if len(set(ids)) < len(ids):
        yield "two cells share an id"
    # Eight hexadecimal digits first: what JupyterLab makes up for a new cell.
    readable = re.compile(r"(?!(?=[a-f]*\d)[0-9a-f]{8}(-|$))[a-z][a-z0-9]*(-[a-z0-9]+)*")
    yield from (f"{name}: not a readable id" for name in ids if not readable.fullmatch(name))
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None]):
        proves = following is not None and "claim" in tags(following) and asserts(following)
        claims = cell.cell_type == "markdown" and "**Claim.**" in cell.source
        if claims and not (makes_claim(cell) and proves):
            yield f"{cell.id}: a claim is a last paragraph, and the cell after it, tagged 'claim', asserts it"
        if "nbval-ignore-output" in tags(cell) and not asserts(cell):
            yield f"{cell.id}: output is not compared, and nothing is asserted"
        if "exercise" in tags(cell):
            if not cell.source.startswith("#| export"):
                yield f"{cell.id}: an exercise that is not exported"
            if following is None or "check" not in tags(following):
                yield f"{cell.id}: an exercise without its check"
    for before, cell in zip([None, *notebook.cells], notebook.cells):
        if "claim" in tags(cell) and (before is None or not makes_claim(before)):
            yield f"{cell.id}: asserts a claim that nobody made"
        if "check" in tags(cell) and (before is None or "exercise" not in tags(before)):
            yield f"{cell.id}: checks no exercise"
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "no figure"


def lesson_faults(notebook, topic):
    """What a notebook with a module needs besides."""
    cells = code_cells(notebook)
    if cells[0].source.strip() != f"#| default_exp {topic}":
        yield f"the first code cell is '#| default_exp {topic}'"
    if not any(saves(topic, cell.source) for cell in cells[-2:]):
        yield "the last cells save the module"
    n_exercises = sum("exercise" in tags(cell) for cell in cells)
    if not 2 <= n_exercises <= 4:
        yield f"two to four exercises, not {n_exercises}"


def imported_topics(source):
    """Modules of the course that Python code imports, wherever in the code the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("mythoslab."))
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 0 and parts[0] == "mythoslab":
                parts = parts[1:]
            elif node.level != 1:
                continue
            yield from [parts[0]] if parts and parts[0] else [name.name for name in node.names]


def order_faults(topic, source, topics):
    """Imports of the notebook's own module or of one that comes later."""
    too_early = topics[topics.index(topic) :]
    return [f"{topic} imports {name}" for name in imported_topics(source) if name in too_early]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_follows_the_template(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    faults = [*run_faults(notebook), *form_faults(notebook)]
    if path.stem not in WITHOUT_MODULE:
        faults += lesson_faults(notebook, topic_of(path))
    assert not faults


def test_modules_are_what_the_notebooks_export():
    # Before any notebook runs: the cell that saves would mend what differs.
    assert not differences()


@pytest.mark.parametrize("topic", TOPICS)
def test_module_imports_only_earlier_ones(topic):
    module = PACKAGE / f"{topic}.py"
    if module.exists():
        assert not order_faults(topic, module.read_text(encoding="utf-8"), TOPICS)


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem not in WITHOUT_MODULE], ids=lambda path: path.stem
)
def test_notebook_imports_only_earlier_modules_and_its_own_once_saved(path):
    source = "\n".join(python(cell) for cell in code_cells(nbformat.read(path, as_version=4)))
    saved = saves(topic_of(path), source)
    assert not order_faults(topic_of(path), source[: saved and saved.start()], TOPICS)


def sound():
    """A small notebook in which nothing is wrong."""

    def code(count, cell_id, source, *tags):
        return new_code_cell(source, id=cell_id, execution_count=count, metadata={"tags": list(tags)})

    cells = [
        new_markdown_cell("# Title\n\n> One sentence.", id="title"),
        code(1, "default-exp", "#| default_exp small"),
        code(2, "f", "#| export\ndef f():\n    pass", "exercise"),
        code(3, "check-f", "f = check(f)", "check"),
        code(4, "g", "#| export\ndef g():\n    pass", "exercise"),
        code(5, "check-g", "g = check(g)", "check"),
        new_markdown_cell("**Claim.** It holds.", id="claim"),
        code(6, "proof", "assert f() is None", "claim"),
        code(7, "save", 'save("small")'),
    ]
    cells[3].outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo="})]
    return new_notebook(cells=cells, metadata={"mythoslab": {"budget_s": 10}})


def faults_after(change):
    notebook = sound()
    change(notebook)
    return " | ".join([*run_faults(notebook), *form_faults(notebook), *lesson_faults(notebook, "small")])


WIDGET = "application/vnd.jupyter.widget-view+json"


def set_(cell, **values):
    return lambda notebook: notebook.cells[cell].update(values)


def tag(cell, *names):
    return lambda notebook: notebook.cells[cell].metadata.update(tags=list(names))


def test_sound_notebook_has_no_faults():
    assert faults_after(lambda notebook: None) == ""


@pytest.mark.parametrize(
    "change, fault",
    [
        (set_(4, execution_count=None), "never run"),
        (set_(4, execution_count=9), "out of order"),
        (set_(4, outputs=[new_output("error", ename="KeyError", evalue="", traceback=[])]), "KeyError"),
        (set_(4, outputs=[new_output("stream", name="stderr", text="10%|#")]), "stderr"),
        (set_(4, outputs=[new_output("stream", name="stdout", text="/" + "home/me/x")]), "one machine"),
        (set_(5, outputs=[new_output("stream", name="stdout", text="g: not yet. It gave 1.")]), "did not pass"),
        (set_(0, source="# Title"), "one sentence"),
        (lambda notebook: notebook.metadata.mythoslab.update(budget_s=200), "150 seconds"),
        (set_(4, id="f"), "share an id"),
        (set_(4, id="8f53_A"), "not a readable id"),
        (set_(4, id="c0ffee12"), "not a readable id"),
        (set_(4, id="c1f3a9b2-1d2e-4f5a-8b7c-0123456789ab"), "not a readable id"),
        (set_(7, source="f()"), "asserts it"),
        (set_(7, source="# assert f() is None"), "asserts it"),
        (tag(7), "asserts it"),
        (set_(8, outputs=[new_output("display_data", {WIDGET: {"model_id": "3f"}})]), "opens as an error"),
        (set_(6, source="It holds."), "nobody made"),
        (tag(8, "nbval-ignore-output"), "nothing is asserted"),
        (set_(2, source="def f():\n    pass"), "not exported"),
        (tag(3), "without its check"),
        (tag(2), "checks no exercise"),
        (set_(3, outputs=[]), "no figure"),
        (tag(4), "not 1"),
        (set_(8, source="pass"), "save the module"),
        (set_(1, source="pass"), "default_exp small"),
        (set_(1, source="#| default_exp large"), "default_exp small"),
    ],
)
def test_fault_is_found(change, fault):
    assert fault in faults_after(change)


@pytest.mark.parametrize(
    "source",
    [
        "import mythoslab.late",
        "from mythoslab.late import f",
        "from mythoslab import late",
        "from .late import f",
        "from . import late",
        "def f():\n    from .late import g",
    ],
)
def test_import_from_later_in_the_course_is_found(source):
    assert order_faults("middle", source, ["early", "middle", "late"]) == ["middle imports late"]
    assert not order_faults("middle", source.replace("late", "early"), ["early", "middle", "late"])


def small_notebook(folder, name="00_small", budget_s=10, **sources):
    path = Path(folder, f"{name}.ipynb")
    cells = [new_code_cell(source, id=cell_id) for cell_id, source in sources.items()]
    for cell in cells:
        if cell.id == "planned":
            cell.metadata["tags"] = ["raises-exception"]
    nbformat.write(new_notebook(cells=cells, metadata={"mythoslab": {"budget_s": budget_s}}), path)
    return path


def test_running_stores_what_says_something_and_the_same_again(tmp_path):
    path = small_notebook(
        tmp_path,
        answer="import time, tqdm\nfor _ in tqdm.tqdm(range(2)):\n    time.sleep(0.2)\n6 * 7",
        widget="from ipywidgets import interact\ninteract(lambda passes: print(passes), passes=(1, 9));",
        warn="import sys\nprint('mind the gap', file=sys.stderr)",
        slow="for i in range(3):\n    print(i, flush=True)\n    time.sleep(0.3)",
    )
    run(path)
    answer, widget, warn, slow = nbformat.read(path, as_version=4).cells
    assert [output.data for output in answer.outputs] == [{"text/plain": "42"}]
    assert [output.text for output in widget.outputs] == ["5\n"]
    assert [output.text for output in warn.outputs] == ["mind the gap\n"]
    assert [output.text for output in slow.outputs] == ["0\n1\n2\n"]
    once = path.read_text()
    run(path)
    assert path.read_text() == once


@pytest.mark.parametrize(
    "source, problem",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os\nos._exit(1)", "the kernel died"),
        ("import time\ntime.sleep(60)", "longer than 2 s"),
    ],
)
def test_running_stops_at_the_cell_that_fails_and_stores_nothing(tmp_path, source, problem):
    path = small_notebook(tmp_path, fine="1", planned="int('x')", fails=source, later="2")
    before = path.read_text()
    with pytest.raises(UserError, match=f"00_small.ipynb, cell fails: .*{problem}"):
        run(path, timeout=2)
    assert path.read_text() == before


def test_running_an_unknown_topic_is_told_in_one_sentence(capsys):
    assert main(["questoins"]) == 2
    assert capsys.readouterr().err == "stopped: there is no topic 'questoins': did you mean 'questions'?\n"


def test_notebook_stage_lets_progress_bars_move_and_fails_beyond_the_budget(tmp_path):
    bar = "from tqdm{} import tqdm\nfor _ in tqdm(range(3), mininterval=0, miniters=1):\n    pass\nprint(1)"
    bars = small_notebook(tmp_path, name="01_bars", budget_s=60, bar=bar.format(""), widget=bar.format(".auto"))
    run(bars)
    bars.write_text(bars.read_text().replace("range(3)", "range(6000)"))  # with more to say than nbval hears by itself
    run(small_notebook(tmp_path, name="07_slow", budget_s=1, sleep="import time\ntime.sleep(10)"))
    stage = ["-n0", "--nbval", "--nbval-current-env", "-p", "tests.notebook_times"]
    stage += ["--rootdir", tmp_path, tmp_path]
    done = subprocess.run([sys.executable, "-m", "pytest", *stage], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and " 3 passed" in done.stdout, done.stdout
    assert re.search(r"^ +\d+ s  01_bars.ipynb", done.stdout, re.M)
    late = re.findall(r"^FAILED (\w+).ipynb took \d+ s, and its budget is 1 s", done.stdout, re.M)
    assert late == ["07_slow"]


def test_a_budget_grows_with_the_slowness_of_the_machine_and_not_otherwise(tmp_path):
    path = small_notebook(tmp_path, name="07_slow", budget_s=10, fine="1")
    assert over_budget(path, 10) is None and over_budget(path, 24, 2.5) is None
    assert over_budget(path, 11) == "07_slow.ipynb took 11 s, and its budget is 10 s: make it faster, or raise budget_s"
    assert over_budget(path, 26, 2.5) == "07_slow.ipynb took 26 s, and its budget is 10 s, here 25 s: make it faster, or raise budget_s"
    assert how_slow() >= 1


def test_notebook_stage_compares_everything_that_lasts():
    def same(test, reference):
        return test == reference

    bar, one, two = (
        new_output("stream", name=name, text=text)
        for name, text in [("stderr", "50%"), ("stdout", "1"), ("stdout", "2")]
    )
    widget = new_output("display_data", {WIDGET: {"model_id": "3f"}, "text/plain": "0%"})
    assert compare_lasting(same, [bar, one, widget], [one])
    assert not compare_lasting(same, [bar, one], [bar, two])
    assert not compare_lasting(same, [one], [])
