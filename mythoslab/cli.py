"""The command line: thin, and each command imports only what it needs."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__

MOST = 10**15  # of steps, tokens and seeds


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; those of the process by default.

    Returns:
        0 when all is well, 1 when a command looked for something wrong and found it, 2 for a mistake of the
        user, told in one sentence, 130 when interrupted, 141 when nobody reads on (``mythoslab … | head``).
    """
    if sys.version_info < (3, 10):
        return _refuse(
            f"this is Python {sys.version.split()[0]}, and the course needs 3.10 or newer: install it"
        )
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a dash still gets the rest
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tells of it at its end
        return 141
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):  # as PyTorch words it on a CPU and a GPU
            raise
        return _refuse("there is not enough memory for this: take fewer passes or tokens, or a smaller preset")
    except KeyboardInterrupt as interruption:
        print(f"mythoslab: {str(interruption) or 'stopped'}", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"mythoslab: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mythoslab", description="Build a recurrent-depth transformer from scratch."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "workbook", help="write workbooks: notebooks with the exercises left to you"
    )
    command.add_argument("topic", nargs="?", metavar="TOPIC", help="such as recurrence; all by default")
    command.set_defaults(run=_workbook)

    command = commands.add_parser("progress", help="show which parts of the package are yours")
    command.set_defaults(run=_progress)

    command = commands.add_parser("restore", help="bring the reference back in place of your saved module")
    command.add_argument("topic", metavar="TOPIC")
    command.set_defaults(run=_restore)

    command = commands.add_parser("train", help="train a looped language model on real text, and measure it")
    command.add_argument("--preset", required=True, metavar="NAME", help="forest (a minute), tiny (minutes) or course (an hour and a half); course-loop, course-flat and course-stack to compare with")
    command.add_argument("--text", metavar="FILE", help="UTF-8 text; the Python reference by default")
    command.add_argument("--out", metavar="DIR", help="folder to save to, in place of a model that lies there; runs/NAME by default")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another model")
    command.add_argument("--steps", type=int, metavar="N", help="steps of training, without those of the halting head; those of the preset by default")
    command.add_argument("--resume", action="store_true", help="go on where the same command was interrupted")
    command.set_defaults(run=_train)

    command = commands.add_parser("ask", help="let the trained model continue a prompt")
    command.add_argument("prompt", metavar="PROMPT", help='such as "The for statement"; one that begins with a dash after --')
    command.add_argument("--from", dest="folder", default="runs/tiny", metavar="DIR", help="runs/tiny by default")
    command.add_argument("--passes", type=int, metavar="N", help="most passes of a token; by default as trained, or 4 times that where it can stop")
    command.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to write, 100 by default")
    command.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is the likeliest; 0.7")
    command.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens with this share of chances")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text")
    command.set_defaults(run=_ask)

    command = commands.add_parser("evidence", help="train and measure many small models, to put the claims of the course on trial: hours, a line for each")
    command.add_argument("--only", metavar="GROUP", help="depth, parts, failure, mean, controls, chains or text; all by default")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="models of each trial, 3 by default; of three trials four times as many")
    command.add_argument("--out", default="runs/evidence.jsonl", metavar="FILE", help="results; what is in it is not run again")
    command.set_defaults(run=_evidence)

    command = commands.add_parser("export", help="write the package's modules from the notebooks")
    command.add_argument("--check", action="store_true", help="write nothing; fail if they differ")
    command.set_defaults(run=_export)

    command = commands.add_parser("doctor", help="look at this machine: what is wrong, and how to mend it")
    command.set_defaults(run=_doctor)
    return parser


def _workbook(options):
    from .classroom.workbook import write_workbooks

    write_workbooks(options.topic)


def _progress(options):
    from .classroom.saved import progress

    progress()


def _restore(options):
    from .classroom.saved import restore

    restore(options.topic)


def _train(options):
    from .training import TRAINING, train_preset

    if options.preset == "forest":
        return _train_forest(options)
    if options.preset not in TRAINING:
        raise ValueError(f"there is no preset '{options.preset}' to train: choose one of {', '.join(TRAINING)}, forest")
    _within(1, MOST, steps=options.steps)
    _within(0, MOST, seed=options.seed)
    train_preset(
        options.preset,
        text=options.text,
        out=options.out and os.path.expanduser(options.out),
        seed=options.seed,
        n_steps=options.steps,
        resume=options.resume,
    )


def _within(least, most, **values):
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} is {value}; it must be from {least} to {most:,}")


def _train_forest(options):
    """Train the small model of notebook 00 on questions of up to five links, and try it on nineteen."""
    import time
    from pathlib import Path

    import torch

    from .classroom.course import can_write
    from .questions import two_chains
    from .recurrence import ForestModel, accuracy_by_depth, save_forest, train_forest

    steps, out = 1000 if options.steps is None else options.steps, Path("runs/forest" if options.out is None else os.path.expanduser(options.out))
    if options.resume:
        raise ValueError("--resume goes with a language model: the preset forest takes a minute, train it anew")
    if options.text is not None:
        raise ValueError("--text goes with a language model: the preset forest is trained on questions")
    _within(1, MOST, steps=steps)
    _within(0, MOST, seed=options.seed)
    can_write(out)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    start, model = time.perf_counter(), ForestModel(n_labels=40)
    train_forest(model, n_steps=steps, n_passes=range(4, 10), seed=options.seed)
    seconds = time.perf_counter() - start
    command = f"mythoslab train --preset forest --seed {options.seed} --steps {steps}"
    about = {"command": command, "seconds": f"{seconds:.0f}", "torch": torch.__version__}
    save_forest(model, out / "forest.safetensors", **about)

    draw = torch.Generator().manual_seed(options.seed + 1)
    questions = two_chains(128, length=20, n_colours=4, n_labels=40, generator=draw)
    by_pass = accuracy_by_depth(model, questions, 32)
    depths = (1, 3, 5, 10, 15, 19)
    print("right answers, in %; trained on up to 5 links, and 50 is chance")
    print("links    " + "".join(f"{depth:6}" for depth in depths))
    for n_passes in (1, 6, 16, 32):
        shares = "".join(f"{100 * by_pass[n_passes - 1, depth]:6.0f}" for depth in depths)
        print(f"{n_passes:2} {'passes' if n_passes > 1 else 'pass  '}{shares}")
    print(f"saved to {out / 'forest.safetensors'} after {seconds:.0f} s of training")


def _ask(options):
    from .thinking import strip_terminal, usual_passes, write_text
    from .training import choose_device, load

    _within(1, 10_000, passes=options.passes)  # each takes memory
    _within(0, MOST, tokens=options.tokens, seed=options.seed)
    model, tokenizer = load(options.folder)
    passes = usual_passes(model) if options.passes is None else options.passes
    length, context = len(tokenizer.encode(options.prompt)), model.config.context_length
    if length == 0:
        raise ValueError("the prompt is empty: give a text to go on with")
    if length > context:
        raise ValueError(f"the prompt has {length:,} tokens; it must have at most {context:,}, the context of this model")
    pieces = write_text(
        model.to(choose_device()),
        tokenizer,
        options.prompt,
        options.tokens,
        max_passes=passes,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=options.stop or (),
        seed=options.seed,
    )
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    counts = []
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        counts += piece.passes
        shown = strip_terminal([piece.text], [max(piece.passes)], passes) if coloured else piece.text
        print(shown, end="", flush=True)
    print()
    if counts:
        mean = sum(counts) / len(counts)
        print(f"passes of a token: {mean:.1f} on average, {min(counts)} to {max(counts)}", file=sys.stderr)


def _evidence(options):
    from .classroom.evidence import evidence

    evidence(options.out, options.only, options.seeds)


def _export(options):
    from .classroom import export

    if not options.check:
        for module in export.export():
            print(f"wrote {module}")
        return 0
    found = export.differences()
    for sentence in found:
        print(sentence, file=sys.stderr)
    if found:
        print("run 'mythoslab export' to write the modules from the notebooks", file=sys.stderr)
    return 1 if found else 0


def _doctor(options):
    from .classroom.doctor import doctor

    return 0 if doctor() else 1


if __name__ == "__main__":
    sys.exit(main())
