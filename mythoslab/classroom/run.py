"""Run the notebooks in order and store their outputs: ``python -m mythoslab.classroom.run [TOPIC …]``."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from base64 import b64decode
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from .course import UserError, notebook_of, notebooks, read_notebook, shown, write_whole


class Client(NotebookClient):
    """Runs notebooks, and leaves what an ``Output`` widget shows in the cell, where it can be read without a kernel.

    The stand-in that nbclient opens for such a widget answers the kernel, and was seen to wait for ever.
    """

    interrupted = False

    def on_comm_open_jupyter_widget(self, msg):
        return None

    @asynccontextmanager
    async def async_setup_kernel(self, **kwargs):
        """As nbclient does it, but Ctrl-C ends the cell that runs; nbclient would end its kernel twice, and fail."""

        def stop():
            self.interrupted, self.shutdown_kernel = True, "immediate"
            if self.task_poll_for_reply:
                self.task_poll_for_reply.cancel()

        async with super().async_setup_kernel(**kwargs):
            with suppress(NotImplementedError, RuntimeError):  # on Windows, and in other threads
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
            yield


def run(path: Path, timeout: int = 900) -> float:
    """Run one notebook in a fresh kernel, in its own folder, and store its outputs in it.

    Nothing is written if a cell fails. What changes from run to run and says nothing – widgets, progress
    bars, times – is not stored.

    Args:
        path: The notebook.
        timeout: Seconds that a cell may take.

    Returns:
        The seconds it took.

    Raises:
        UserError: a cell failed; the message names the notebook, the cell and the error.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    read_notebook(path)
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = Client(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    running = []
    client.on_cell_execute = lambda cell, cell_index: running.append(cell.id)
    try:
        client.execute()
    except CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        problem = f"took longer than {timeout} s"
    except DeadKernelError:
        if client.interrupted:
            raise KeyboardInterrupt from None
        problem = "the kernel died, perhaps for want of memory"
    else:
        problem = None
    if problem:
        raise UserError(f"{shown(path)}, cell {running[-1]}: {problem}")
    taken = time.perf_counter() - started
    _keep_what_says_something(notebook)
    write_whole(path, nbformat.writes(notebook) + "\n")
    for name, picture in readme_figures(notebook).items():
        Path(path.parent.parent, "data", f"{name}.png").write_bytes(picture)
    return taken


def readme_figures(notebook) -> dict[str, bytes]:
    """PNG pictures of the cells tagged ``readme``, by cell id: the README shows what a notebook drew."""
    return {
        cell.id: b64decode(output.data["image/png"])
        for cell in notebook.cells
        if "readme" in cell.metadata.get("tags", [])
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    }


def _keep_what_says_something(notebook) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            had_progress_bar = any(is_stderr(output) and "\r" in output.text for output in cell.outputs)
            cell.outputs = _joined(
                output
                for output in cell.outputs
                if not (is_widget(output) or had_progress_bar and is_stderr(output))
            )
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}


def _joined(outputs) -> list:
    """Printed text in one piece: where the kernel cuts it depends on the time."""
    joined = []
    for output in outputs:
        follows_on = joined and output.output_type == "stream" and joined[-1].get("name") == output.name
        if follows_on:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def is_stderr(output) -> bool:
    """Whether an output went to stderr: a progress bar, or a warning."""
    return output.output_type == "stream" and output.name == "stderr"


def is_widget(output) -> bool:
    """Whether an output is a widget: it lives in the kernel that made it, and stored it opens as an error."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main(topics: list[str]) -> int:
    """Run the notebooks of some topics, or all of them, and print a line for each."""
    try:
        for path in [notebook_of(topic) for topic in topics] or notebooks():
            budget = read_notebook(path)["metadata"].get("mythoslab", {}).get("budget_s", "?")
            print(f"{run(path):6.0f} s of {budget:>3}  {shown(path)}", flush=True)
    except UserError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
