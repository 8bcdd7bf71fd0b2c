"""Assembles the commands and turns every expected failure into one line and the right exit code."""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from dpaudit import __version__, extras, printable, temporary
from dpaudit.cli import console, supervised
from dpaudit.errors import DpauditError

# typer brings its own copy of click in newer releases and the real one in older: the base of its usage errors is
# ClickException in both.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
SETTINGS = {"help_option_names": ["-h", "--help"]}
ABOUT = "Privacy audits for DP fine-tuning of vision-language models."

# Command name -> module with a typer function `command`. Modules are imported only when their command runs, so that
# `dpaudit bound` never pays for torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("dpaudit.cli.demo", "Train, audit, benchmark and report on the embedded data, in minutes."),
    "train": ("dpaudit.cli.train", "Fine-tune a vision-language model, with or without differential privacy."),
    "audit": ("dpaudit.cli.audit", "Test the eps that a run, a trainer or a model claims."),
    "audit-trainer": ("dpaudit.cli.audit_trainer", "Audit training code that dpaudit did not write."),
    "audit-model": ("dpaudit.cli.audit_model", "Audit a model that is already trained, using its owner's coins."),
    "check": ("dpaudit.cli.check", "Test single DP-SGD steps of training code (about a minute)."),
    "bugs": ("dpaudit.cli.bugs", "Benchmark the audits: which planted bugs does each of them find?"),
    "benchmark": ("dpaudit.cli.benchmark", "Measure VQA accuracy of a run with lmms-eval."),
    "sweep": ("dpaudit.cli.sweep", "Train, benchmark and compare a grid of configurations (resumable)."),
    "report": ("dpaudit.cli.report", "Write a report on runs, sweeps or documents (HTML and other formats)."),
    "keygen": ("dpaudit.cli.keygen", "Make a key pair for signing releases."),
    "sign": ("dpaudit.cli.sign", "Sign the release of a run."),
    "verify": ("dpaudit.cli.verify", "Check the signature of a release."),
    "features": ("dpaudit.cli.features", "Show or delete the encoded pictures that runs share."),
    "scores": ("dpaudit.cli.scores", "Audit membership scores from any source."),
    "bound": ("dpaudit.cli.bound", "Calculate a lower bound on eps from counts."),
    "plan": ("dpaudit.cli.plan", "Plan an audit: canaries and guesses needed to refute a wrong claim."),
    "doctor": ("dpaudit.cli.doctor", "Check the installation and print a command that fixes each problem."),
}


class LazyGroup(TyperGroup):
    """Commands by name; each module is imported on first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name=cmd_name, context_settings=SETTINGS)(module.command)
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


def _show_version(wanted: bool) -> None:
    if wanted:
        console.say(f"dpaudit {__version__}")
        raise typer.Exit(console.DONE)


def _group() -> Any:
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback(context_settings=SETTINGS, help=f"{ABOUT}\n\n{console.LIMIT_SENTENCE}")
    def root(
        version: bool = typer.Option(
            False, "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        return None

    return typer.main.get_command(app)


_INTERRUPTED = "dpaudit: interrupted; finished work is kept"


def _one_line(text: str) -> str:
    """A message, which may quote a file that somebody else wrote."""
    return printable.field(text, printable.MOST)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Other packages' notices to their own developers would bury the lines that our users should read.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    temporary.remove_abandoned()
    try:
        result = _group().main(args=arguments, prog_name="dpaudit", standalone_mode=False)
        code = result if isinstance(result, int) else console.DONE
        if code == console.INTERRUPTED:  # newer typer turns Ctrl-C into this code by itself
            console.log(_INTERRUPTED)
        return code
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.log(_INTERRUPTED)
        return console.INTERRUPTED
    except CommandLineError as error:
        where = getattr(error, "ctx", None)
        hint = f" (see '{where.command_path} --help')" if where is not None else ""
        console.log(f"dpaudit: {_one_line(error.format_message())}{hint}")  # type: ignore[attr-defined]
        return console.USAGE
    except DpauditError as error:
        console.log(f"dpaudit: {_one_line(str(error))}")
        return error.exit_code
    except BrokenPipeError:
        return _reader_gone()
    except ModuleNotFoundError as error:
        words = sys.argv[1:] if arguments is None else list(arguments)
        lacking = extras.missing(error, words[0] if words else "this")
        if lacking is None:
            return _defect(error)
        console.log(f"dpaudit: {_one_line(str(lacking))}")
        return lacking.exit_code
    except OSError as error:  # a folder that may not be read, a disk that fails: never a defect of a command line
        where = f"{error.filename}: " if error.filename is not None else ""
        console.log(f"dpaudit: {_one_line(where + (error.strerror or str(error) or type(error).__name__))}")
        return console.ENVIRONMENT
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer turns a broken pipe into exit code 1: our "refuted"
            return _reader_gone()
        return _defect(stop)  # code under audit that ends the process: with 0 or 1 it would choose our verdict
    except BaseException as error:
        return _defect(error)


def _defect(error: BaseException) -> int:
    """A defect of dpaudit: the traceback for its developers, and a code that no verdict has (Python's own is 1)."""
    for part in traceback.format_exception(error):
        for text in part.splitlines():
            console.log(f"| {text}")  # a message of several lines can start none of its own
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    console.log(f"dpaudit: defect: {_one_line(what)}; no verdict was reached. Please report the lines above")
    return console.DEFECT


def _reader_gone() -> int:
    """The reader (`| head`) has gone: end quietly, also in Python's own last flush; but nothing was delivered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return console.ENVIRONMENT


def _open_streams() -> None:
    """A standard stream that the shell has closed leads nowhere, instead of into the next file that is opened."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _delivered(code: int) -> int:
    """`code`, or that of the environment where standard output could not be written (a full disk, a reader that left).

    What can't be written is dropped here, since Python's own last flush would end with a code of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)
            code = console.ENVIRONMENT if stream is sys.stdout else code
    return code


def main() -> None:
    """Console entry point."""
    _open_streams()
    sys.exit(_delivered(supervised.run(run) if supervised.wanted(sys.argv[1:]) else run()))
