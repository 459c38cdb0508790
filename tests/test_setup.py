"""The set-up: one place for versions, the torch installed, a Makefile that says what it needs."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import pytest_report_header

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked_text():
    """Names and contents of the text files, also of those not added yet, and without git."""
    listing = ["git", "grep", "--no-index", "--exclude-standard", "-zlI", ""]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        yield name, (ROOT / name).read_text(encoding="utf-8")


def imported_packages(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_conda_and_pip_agree():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain = [entry for entry in conda if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert sorted(plain) == ["pip", f"python{PROJECT['requires-python']}"]
    (project,) = pip
    extra = re.fullmatch(r"-e \.\[(\w+)\]", project)
    assert extra and extra[1] in PROJECT["optional-dependencies"]


def test_installed_torch_is_one_we_support_and_the_log_says_which():
    (wanted,) = [Requirement(need) for need in PROJECT["dependencies"] if need.startswith("torch")]
    installed = Version(version("torch"))
    assert str(wanted.specifier) == "<2.14,>=2.9"
    assert wanted.specifier.contains(installed.base_version)
    for_a_gpu = bool(torch.version.cuda or torch.version.hip)
    assert torch.backends.cuda.is_built() == for_a_gpu
    if installed.local:
        assert for_a_gpu == (installed.local != "cpu")
    header = pytest_report_header()
    assert str(installed) in header and ("CPU build" in header) == (not for_a_gpu)


def test_every_import_of_ours_is_named_as_a_dependency():
    named = {
        re.split(r"[<>=\[; ]", need)[0].lower().replace("-", "_")
        for needs in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for need in needs
    }
    named |= {"mythoslab", "tests", "benchmarks", "tomllib"}  # the last is in the standard library from Python 3.11 on
    aliases = {"yaml": "pyyaml"}
    missing = set()
    for name, text in tracked_text():
        if not name.endswith(".py"):
            continue
        for package in imported_packages(text):
            package = aliases.get(package.lower(), package.lower())
            if package not in named and package not in sys.stdlib_module_names:
                missing.add(f"{name}: {package}")
    assert not missing


def make(folder, *arguments):
    """Run make as from a shell, also where make runs the tests."""
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True)


def planned(folder, *arguments):
    """Commands that make would run, as one text."""
    done = make(folder, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_too_old_a_python_gets_one_sentence_and_exit_code_2(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for target in ("lab", "test", "train"):
        done = make(tmp_path, target, f"PYTHON={old}")
        assert done.returncode == 2
        said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        assert len(said) == 1 and "3.10 or newer" in said[0] and "Python 3.9.2" in said[0]
        assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("works", [False, True])
def test_a_venv_of_too_old_a_python_is_made_anew(tmp_path, works):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    there, new = tmp_path / ".venv" / "bin" / "python", tmp_path / "python3.12"
    there.write_text(f"#!/bin/sh\nexit {int(not works)}\n")
    new.write_text('#!/bin/sh\n[ "$2" = venv ] && echo "$@" > asked && printf "#!/bin/sh\\nexit 0\\n" > .venv/bin/python\nexit 0\n')
    for script in (there, new):
        script.chmod(0o755)
    assert make(tmp_path, ".venv/.installed", f"PYTHON={new}").returncode == 0
    asked = tmp_path / "asked"
    assert asked.read_text() == "-m venv --clear .venv\n" if not works else not asked.exists()


def run_by(user, folder, monkeypatch):
    """Let ``id`` name a user: 0 is root."""
    script = folder / "id" / "id"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh\necho {user}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)


def test_lab_installs_until_done_then_never_again_unless_requirements_change(tmp_path, monkeypatch):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    stamp = tmp_path / ".venv" / ".installed"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    assert 'install --quiet --disable-pip-version-check --editable ".[test]"' in planned(tmp_path, "lab")
    stamp.touch()
    opens = f'PATH="{tmp_path}/.venv/bin:$PATH" .venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb'
    for user, flags in [("0", "--allow-root --port 8899"), ("1000", "--port 8899")]:
        run_by(user, tmp_path, monkeypatch)
        assert planned(tmp_path, "lab", "ARGS=--port 8899").split() == [*opens.split(), *flags.split()]
    os.utime(tmp_path / "pyproject.toml", (stamp.stat().st_mtime + 60,) * 2)
    assert "pip" in planned(tmp_path, "lab")


def test_make_test_runs_unit_tests_then_notebooks_then_export_check():
    plan = planned(ROOT, "test")
    stages = [plan.index(stage) for stage in ("worksteal tests", "--nbval ", "export --check")]
    assert stages == sorted(stages) and "lax" not in plan


@pytest.mark.parametrize(
    "target, command",
    [
        ("notebooks", "python -m mythoslab.classroom.run"),
        ("train", "mythoslab train --preset tiny --seed 1"),
        ("bench", "python -m benchmarks"),
    ],
)
def test_target_runs_its_command(target, command):
    assert command in planned(ROOT, target, "ARGS=--seed 1")


def test_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: help (.+)$", text, re.M)[1].split()
    assert re.findall(r"^make (\w+)", make(ROOT).stdout, re.M) == targets


def test_ci_tests_by_make_test_alone():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("\nmake test")
    assert "pytest" not in script


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize(
    "pattern, what",
    [
        (r"(?<![\w~.-])/(?:root|home/\w+|Users/\w+|work)/", "a path of one machine"),
        (r"pypi\.org|pythonhosted|registry\.npmjs", "a registry host"),
        (r"pickle\.loads?\(|Unpickler|allow_pickle\s*=\s*True", "unpickling"),
        (r"torch\.load\(|weights_only\s*=\s*False", "unpickling by torch"),
    ],
)
def test_no_tracked_file_contains(pattern, what):
    hits = ((name, re.search(pattern, text)) for name, text in tracked_text())
    found = [f"{name}: {hit[0]}" for name, hit in hits if hit and name != "tests/test_setup.py"]
    assert not found, f"{what}: {found}"
