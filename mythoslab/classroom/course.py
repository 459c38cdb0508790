"""Where the course lies on disk, and how its notebooks are named."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"


class UserError(ValueError):
    """Something only the user can mend; the message is one sentence that says what to do."""


def workbooks() -> Path:
    """Folder of the learner's workbooks: ``$MYTHOSLAB_WORKBOOKS``, from the course's folder on, or ``workbooks`` in it."""
    return Path(ROOT, os.path.expanduser(os.environ.get("MYTHOSLAB_WORKBOOKS") or "workbooks")).resolve()


def saved_modules() -> Path:
    """Folder of the learner's own modules, inside the folder of workbooks."""
    return workbooks() / "saved"


def saved_module(topic: str) -> Path:
    """File that holds the learner's own module of a topic, once it is saved."""
    return saved_modules() / f"{topic}.py"


def reference_module(topic: str) -> Path:
    """File that holds the course's module of a topic, if its notebook exports one."""
    return PACKAGE / f"{topic}.py"


def topic_of(notebook: Path) -> str:
    """``notebooks/02_recurrence.ipynb`` → ``recurrence``."""
    return notebook.stem.partition("_")[2]


def notebooks() -> list[Path]:
    """All notebooks of the course, in order.

    Raises:
        UserError: the package was installed without the course's folder around it.
    """
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(
            f"there are no notebooks in {NOTEBOOKS}: clone the course and run this from the clone"
        )
    return found


def notebook_of(topic: str) -> Path:
    """Notebook of a topic; ``recurrence``, ``02_recurrence`` and ``02_recurrence.ipynb`` name the same.

    Raises:
        UserError: there is no such topic; the message suggests the nearest one.
    """
    by_topic = {topic_of(notebook): notebook for notebook in notebooks()}
    plain = Path(topic).name
    plain = plain[: -len(".ipynb")] if plain.endswith(".ipynb") else plain
    plain = plain.lstrip("0123456789").lstrip("_")
    if plain in by_topic:
        return by_topic[plain]
    from difflib import get_close_matches

    nearest = get_close_matches(plain, by_topic, n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(by_topic)}"
    raise UserError(f"there is no topic '{topic}': {hint}")


def read_notebook(path: Path) -> dict:
    """Read a notebook as plain JSON, each cell's source joined to one string.

    Raises:
        UserError: the file is missing, cannot be read or is no notebook.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
    except OSError as error:
        raise UserError(f"cannot read {shown(path)} ({error.strerror}): put it back, or make it readable")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{shown(path)} is damaged and no longer a notebook: bring an earlier version back")
    return notebook


def tagged(cell: dict, tag: str) -> bool:
    """Whether a notebook cell carries a tag."""
    return tag in cell.get("metadata", {}).get("tags", [])


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, so that nobody ever sees half of it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            part = Path(folder, path.name)
            part.write_text(text, encoding="utf-8", newline="\n")
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {shown(path)} ({error.strerror}): make its folder writable")


def can_write(folder: Path) -> None:
    """Make the folder if it is missing, and be sure that files can be written to it.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {shown(folder)} ({error.strerror}): choose a folder of your own") from None


def shown(path: Path) -> str:
    """A path as people read it: relative to the course where it lies inside."""
    try:
        return path.relative_to(ROOT).as_posix()
    except ValueError:
        return str(path)
