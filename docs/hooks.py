"""mkdocs: the page of commands is made from the command line's own help, so that it can't go stale."""

import importlib
from typing import Any

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of every command where the page asks for it."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """One section a command: what it is for, its usage, its options with their help."""
    import typer
    from typer.main import get_command

    from dpaudit.cli.app import COMMANDS, SETTINGS

    parts = []
    for name, (module, about) in COMMANDS.items():
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=name, context_settings=SETTINGS)(importlib.import_module(module).command)
        command = get_command(app)
        parts.append(f"## dpaudit {name}\n\n{command.help or about}\n")
        rows = [_row(parameter) for parameter in command.params]
        parts.append("| | what it is |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    flags = ", ".join(f"`{flag}`" for flag in parameter.opts) if parameter.param_type_name == "option" else f"`{name}`"
    default = parameter.default
    shown = f" Default: `{default}`." if default not in (None, False, (), []) and not callable(default) else ""
    text = str(getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    return f"| {flags} | {text}{shown} |"
