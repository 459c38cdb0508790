"""The command line: instant help, one sentence for a mistake, and a doctor that looks at this machine."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest

import mythoslab
from mythoslab import cli
from mythoslab.classroom import doctor, style
from mythoslab.classroom.course import DATA


def test_help_and_import_load_neither_torch_nor_matplotlib():
    code = (
        "import sys; from mythoslab import classroom, cli; cli._parser().format_help(); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "matplotlib", "nbdev", "IPython", "nbformat"} & set(loaded)


def test_the_version_is_the_installed_one(capsys):
    assert mythoslab.__version__ == version("mythoslab")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == mythoslab.__version__


@pytest.mark.parametrize(
    "error, code, told",
    [
        (ValueError("do this instead"), 2, "mythoslab: do this instead\n"),
        (OSError("the disk is full: free some space"), 2, "mythoslab: the disk is full: free some space\n"),
        (MemoryError(), 2, "mythoslab: there is not enough memory for this: take fewer passes or tokens, or a smaller preset\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1310720000 bytes."), 2,
         "mythoslab: there is not enough memory for this: take fewer passes or tokens, or a smaller preset\n"),
        (KeyboardInterrupt(), 130, "mythoslab: stopped\n"),
        (KeyboardInterrupt("stopped after step 3, this goes on"), 130, "mythoslab: stopped after step 3, this goes on\n"),
    ],
)
def test_mistakes_and_interruptions_end_without_traceback(monkeypatch, capsys, error, code, told):
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "_progress", fail)
    assert cli.main(["progress"]) == code
    assert capsys.readouterr().err == told


def test_other_mistakes_are_ours_and_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_progress", lambda options: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["progress"])

    def fail(options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cli, "_progress", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["progress"])


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_output_is_no_traceback(closed):
    command = f"{shlex.quote(sys.executable)} -m mythoslab progress {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_an_empty_prompt_is_refused_by_name(capsys):
    assert cli.main(["ask", "", "--from", str(DATA / "course")]) == 2
    assert capsys.readouterr().err == "mythoslab: the prompt is empty: give a text to go on with\n"


def run_command(arguments, **environment):
    command = [sys.executable, "-m", "mythoslab.cli", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(buffered):
    command = run_command(["progress"], PYTHONUNBUFFERED=buffered)
    command.stdout.close()
    assert (command.wait(), command.stderr.read()) == (141, b"")


def test_a_terminal_without_dashes_still_gets_the_table():
    told, errors = run_command(["progress"], PYTHONIOENCODING="latin-1").communicate()
    assert b"?" in told and errors == b""


def test_an_old_python_is_told_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert cli.main(["progress"]) == 2
    assert capsys.readouterr().err.startswith("mythoslab: this is Python ")


@pytest.mark.parametrize(
    "words, told",
    [
        (("train", "--preset", "forest", "--seed", "-1"), "--seed is -1; it must be from 0 to 1,000,000,000,000,000"),
        (("train", "--preset", "forest", "--seed", str(2**64 - 1)), "it must be from 0 to 1,000,000,000,000,000"),
        (("train", "--preset", "forest", "--steps", "0"), "--steps is 0; it must be from 1 to"),
        (("train", "--preset", "tiny", "--out", ""), "the folder to save to is"),
        (("evidence", "--seeds", "1000000000"), "the number of seeds is 1000000000; it must be from 1 to 1,000"),
        (("workbook", ""), "there is no"),
        (("ask", "Hi", "--from", str(DATA / "course"), "--passes", "1000000"), "--passes is 1000000; it must be from 1 to 10,000"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_sentence(words, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("mythoslab: ") and error.count("\n") == 1 and told in error
    assert not any(tmp_path.iterdir())


def test_results_that_are_no_text_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "mine").write_bytes(b"\xff\xfe")
    assert cli.main(["evidence", "--out", str(tmp_path / "mine")]) == 2
    assert "mine holds no results of trials: choose another file with --out" in capsys.readouterr().err


def test_a_folder_of_somebody_unknown_is_taken_by_its_name():
    run = run_command(["--version"], MYTHOSLAB_WORKBOOKS="~nobody-here/x")
    assert run.communicate()[1] == b"" and run.returncode == 0


def test_an_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["wrokbook"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "wrokbook" in told and "workbook" in told.replace("wrokbook", "")


def test_the_doctor_finds_this_machine_well_and_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MYTHOSLAB_WORKBOOKS", str(tmp_path / "workbooks"))
    assert doctor.doctor()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines) and any(
        sys.version.split()[0] in line for line in lines
    )
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert not doctor.doctor()
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert len(wrong) == 2 and all("make lab" in line for line in wrong)


def _lightness(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_the_first_four_colours_survive_grey_and_the_others_are_dashed():
    import matplotlib.pyplot as plt

    steps = sorted(_lightness(colour) for colour in style.COLOURS[:4])
    assert all(upper - lower >= 10 for lower, upper in zip(steps, steps[1:]))
    with plt.rc_context():
        style.use()
        cycle = list(plt.rcParams["axes.prop_cycle"])
        figure, axes = plt.subplots()
        assert _lightness(plt.rcParams["axes.facecolor"]) - max(_lightness(c) for c in style.COLOURS) > 20
        assert figure.get_facecolor()[3] == 1, "a dark page must not shine through"
        plt.close(figure)
    assert [entry["color"] for entry in cycle] == list(style.COLOURS)
    assert [entry["linestyle"] for entry in cycle] == ["-"] * 4 + ["--"] * 3
