"""Assembles the commands and turns every expected failure into one line and the right exit code."""

import importlib
import sys
from collections.abc import Sequence

import click
import typer

from dpaudit import __version__
from dpaudit.cli import console
from dpaudit.errors import DpauditError

# Command name -> module with a function `command`. Modules are imported only when their command runs, so that
# `dpaudit bound` never pays for torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("dpaudit.cli.demo", "The whole story in minutes on the embedded data."),
    "train": ("dpaudit.cli.train", "Fine-tune a vision-language model, with or without differential privacy."),
    "audit": ("dpaudit.cli.audit", "Attack a run and say what its claim of eps is worth."),
    "benchmark": ("dpaudit.cli.benchmark", "VQA utility of a run through lmms-eval."),
    "report": ("dpaudit.cli.report", "One self-contained HTML file over one or more runs."),
    "scores": ("dpaudit.cli.scores", "Audit score arrays from anywhere."),
    "bound": ("dpaudit.cli.bound", "The bounds as a calculator."),
    "plan": ("dpaudit.cli.plan", "How many canaries it takes to refute a wrong claim, before any training."),
    "doctor": ("dpaudit.cli.doctor", "What this machine can run, what is broken, and the command that mends it."),
}


class LazyGroup(click.Group):
    """Commands by name; each module is imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        return module.command()  # type: ignore[no-any-return]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


def typer_command(function: object, name: str) -> click.Command:
    """One typer function as a click command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name)(function)  # type: ignore[type-var]
    return typer.main.get_command(app)


def _group() -> click.Group:
    group = LazyGroup(
        name="dpaudit",
        help="Privacy audits for DP fine-tuning of vision-language models.\n\n" + console.LIMIT_SENTENCE,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, prog_name="dpaudit")(group)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = _group().main(args=arguments, prog_name="dpaudit", standalone_mode=False)
        return result if isinstance(result, int) else console.DONE
    except (click.exceptions.Exit, typer.Exit) as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        console.log("dpaudit: interrupted; what was written stays, nothing is lost")
        return console.INTERRUPTED
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f" (see '{where.command_path} --help')" if where is not None else ""
        console.log(f"dpaudit: {error.format_message()}{hint}")
        return console.USAGE
    except DpauditError as error:
        console.log(f"dpaudit: {' '.join(str(error).split())}")
        return error.exit_code
    except BrokenPipeError:
        return console.DONE


def main() -> None:
    """Console entry point."""
    sys.exit(run())
