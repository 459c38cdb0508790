"""A learner's own modules: saved from a workbook, put before the reference, and taken away again."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .course import (
    NOTEBOOKS,
    PACKAGE,
    UserError,
    notebook_of,
    notebooks,
    read_notebook,
    reference_module,
    saved_module,
    saved_modules,
    shown,
    tagged,
    topic_of,
    workbooks,
    write_whole,
)

__all__ = ["save", "restore", "progress", "put_saved_modules_first"]


def put_saved_modules_first(package_path: list[str]) -> None:
    """Let saved modules take the place of the reference ones, unless they cannot be imported.

    Args:
        package_path: ``mythoslab.__path__``, changed in place.
    """
    package_path.insert(0, str(saved_modules()))
    sys.meta_path.insert(0, _SavedModules)


class _SavedModules:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, topic = name.rpartition(".")
        saved = saved_module(topic)
        if package == PACKAGE.name and os.path.isfile(saved) and reference_module(topic).is_file():  # no, too, where it may not look
            return spec_from_file_location(name, saved, loader=_SavedLoader(name, str(saved)))


class _SavedLoader(SourceFileLoader):
    def path_stats(self, path):
        raise OSError("never cache: two saves within a second would look alike")

    def exec_module(self, module):
        topic = self.name.rpartition(".")[2]
        try:
            super().exec_module(module)
            missing = _public_names(reference_module(topic)) - vars(module).keys()
            if missing:
                raise ImportError(f"it lacks {', '.join(sorted(missing))}")
        except (Exception, SystemExit) as error:
            print(
                f"{self.name}: your saved module cannot be imported "
                f"({type(error).__name__}: {_first_line(error)}), so the reference stands in; "
                f"save it again from its workbook or run 'mythoslab restore {topic}'.",
                file=sys.stderr,
            )
            spec = spec_from_file_location(self.name, reference_module(topic))
            sys.modules[self.name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[self.name])


def _public_names(file: Path) -> set[str]:
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    return set()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def save(topic: str) -> None:
    """Save the module of the notebook that runs, and let the next import find it.

    In ``notebooks/`` the module becomes the course's own, ``mythoslab/TOPIC.py``. In the folder of workbooks
    it becomes the learner's, once every check of the workbook has passed in this session: the code saved is
    the code that ran, and it has passed the same checks once more in a process of its own.

    Args:
        topic: The notebook's topic, for example ``"recurrence"``.

    Raises:
        ValueError: there is no such topic, the notebook runs elsewhere, or a folder cannot be written.
    """
    notebook = notebook_of(topic)
    topic = topic_of(notebook)
    here = Path.cwd().resolve()
    if here == NOTEBOOKS:
        from .export import export

        export(topic)
        print(f"saved {shown(reference_module(topic))}")
    elif here == workbooks():
        _save_workbook(topic, here / notebook.name)
    else:
        raise UserError(
            f"save() works in {shown(NOTEBOOKS)} and in {shown(workbooks())}, and this runs in {here}: "
            "open the notebook there"
        )
    _forget(topic)


def _save_workbook(topic: str, path: Path) -> None:
    from .checks import results
    from .export import module_source

    workbook = read_notebook(path)
    names = checked_names(read_notebook(NOTEBOOKS / path.name))  # a workbook may have lost a check
    not_right = {name: results[name].verdict if name in results else "not checked yet" for name in names}
    not_right = {name: verdict for name, verdict in not_right.items() if verdict != "right"}
    for name in names:
        if name not in not_right and results[name].source != last_run(name):
            not_right[name] = "changed since its check"
    if not_right:
        listed = ", ".join(f"{name} ({verdict})" for name, verdict in not_right.items())
        print(f"{topic}: not saved, because these are missing: {listed}. The reference stays in place.")
        return

    for cell in workbook["cells"]:
        if tagged(cell, "exercise"):
            defined = defined_names(cell["source"])  # a helper may be there in several cells, so what was checked goes first
            ran = [last_run(name) for name in sorted(defined, key=lambda name: name not in names)]
            cell["source"] = next((source for source in ran if source), cell["source"])
    source = module_source(path.name, workbook)
    problem = _problem_when_imported_afresh(topic, source, names)
    if problem:
        print(f"{topic}: not saved, because on its own, away from this notebook, it fails: {problem}")
        return
    write_whole(saved_module(topic), source)
    print(f"saved {shown(saved_module(topic))}: {topic} is yours now")


def checked_names(notebook: dict) -> list[str]:
    """Names that the check cells of a notebook pass to ``check``, in order."""
    calls = (
        node
        for cell in notebook["cells"]
        if tagged(cell, "check")
        for node in ast.walk(ast.parse(cell["source"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check"
    )
    return [ast.unparse(call.args[0]) for call in calls]


def defined_names(source: str) -> list[str]:
    """Names that a cell's source defines by ``def``, ``class`` or assignment; none where it is not Python."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def last_run(name: str) -> str | None:
    """Source of the last export cell run in this kernel that defines a name; ``None`` where none did."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    shell = get_ipython()
    ran = shell.history_manager.input_hist_raw if shell else []
    exported = (source for source in reversed(ran) if source.startswith("#| export"))
    return next((source for source in exported if name in defined_names(source)), None)


def _problem_when_imported_afresh(topic: str, source: str, names: list[str]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder).resolve() / "saved"
        if saved_modules().is_dir():
            shutil.copytree(saved_modules(), saved)
        write_whole(saved / f"{topic}.py", source)
        run = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import _try_out; _try_out({topic!r}, {names!r})"],
            env={**os.environ, "MYTHOSLAB_WORKBOOKS": folder},
            capture_output=True,
            text=True,
        )
    last_words = (run.stdout + run.stderr).strip().splitlines()
    return None if run.returncode == 0 else (last_words or ["the process ended without a word"])[-1]


def _try_out(topic: str, names: list[str]) -> None:
    module = importlib.import_module(f"{PACKAGE.name}.{topic}")
    if Path(module.__file__) != saved_module(topic):
        sys.exit(1)
    from .checks import check, results

    for name in names:
        if check(getattr(module, name)) is not getattr(module, name):
            sys.exit(results[name].line)  # to stderr, as the last line, after any warning


def _forget(topic: str) -> None:
    importlib.invalidate_caches()
    sys.modules.pop(f"{PACKAGE.name}.{topic}", None)
    vars(sys.modules[PACKAGE.name]).pop(topic, None)


def restore(topic: str) -> None:
    """Bring the reference of a topic back by removing the learner's saved module; the workbook stays.

    Raises:
        ValueError: there is no such topic, or the saved module cannot be removed.
    """
    topic = topic_of(notebook_of(topic))
    saved = saved_module(topic)
    if not saved.exists():
        print(f"{topic}: nothing of yours is saved, the reference is in place already")
        return
    try:
        saved.unlink()
    except OSError as error:
        raise UserError(f"cannot remove {shown(saved)} ({error.strerror}): make its folder writable")
    print(f"{topic}: the reference is back; your workbook is untouched")


def progress() -> None:
    """Print a table of the notebooks: how many exercises each has, and whose module the others import."""
    print(f"{'notebook':<20} {'exercises':>9}  module")
    for path in notebooks():
        n_exercises = sum(tagged(cell, "exercise") for cell in read_notebook(path)["cells"])
        print(f"{path.stem:<20} {n_exercises or '–':>9}  {_whose(topic_of(path))}")


def _whose(topic: str) -> str:
    if not reference_module(topic).is_file():
        return "–"
    if not saved_module(topic).is_file():
        return "reference"
    module = importlib.import_module(f"{PACKAGE.name}.{topic}")
    return (
        "yours" if Path(module.__file__) == saved_module(topic) else "reference: your saved module is broken"
    )
