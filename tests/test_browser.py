"""A learner's way in, in a real browser: JupyterLab opens a workbook, runs it, and its slider moves."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from playwright.sync_api import sync_playwright

from mythoslab.classroom.course import notebook_of, read_notebook
from mythoslab.classroom.workbook import write_workbooks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A running JupyterLab on a new folder of workbooks: its address and token."""
    assert CHROMIUM, "the browser test needs Chromium: apt-get install chromium"
    workbooks = tmp_path / "workbooks"
    monkeypatch.setenv("MYTHOSLAB_WORKBOOKS", str(workbooks))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for part in ("config", "data", "runtime"):
        monkeypatch.setenv(f"JUPYTER_{part.upper()}_DIR", str(tmp_path / part))
    write_workbooks()
    # All cells stay in the page, also those that are scrolled out of sight.
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(tmp_path / "settings"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=course"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["--allow-root"]
    log = tmp_path / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=workbooks, stdout=output, stderr=output)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api?token=course", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.parametrize("topic", ["start_here", "questions"])
def test_workbook_runs_and_its_slider_changes_what_it_says(topic, lab):
    path = notebook_of(topic)
    budget = 1000 * (60 + 2 * read_notebook(path)["metadata"]["mythoslab"]["budget_s"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(f"{lab}/lab/tree/{path.name}?token=course&reset", timeout=90_000)
        idle = page.get_by_text("Python 3 (ipykernel) | Idle")
        idle.wait_for(timeout=90_000)  # what runs earlier is lost
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        handle = page.locator(".noUi-handle").first
        handle.wait_for(timeout=budget)
        said = page.locator(".widget-output, .jupyter-widgets-output-area")
        said = said.filter(has_text=re.compile(r"\S")).first
        said.wait_for(timeout=60_000)
        idle.wait_for(timeout=budget)
        before = said.inner_text()
        handle.focus()
        handle.press("ArrowRight")
        page.wait_for_function(
            "([element, before]) => element.innerText.trim() && element.innerText !== before",
            arg=[said.element_handle(), before],
            timeout=60_000,
        )
        assert not page.get_by_text("Error displaying widget").count()
        browser.close()
