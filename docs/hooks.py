"""mkdocs: the pages of commands and of settings are made from the program itself, so that they can't go stale."""

import importlib
from typing import Any

COMMANDS, SETTINGS = "<!-- commands -->", "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of every command, and every setting, where a page asks for them."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return markdown.replace(SETTINGS, settings()) if SETTINGS in markdown else markdown


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
    return f"| {flags} | {_cell(getattr(parameter, 'help', None) or '')}{shown} |"


def settings() -> str:
    """One section for each part of the configuration: its fields, what they accept and their defaults."""
    from dpaudit.config import RunConfig

    schema = RunConfig.model_json_schema(by_alias=True)
    return "\n".join([*_section("", schema, schema["$defs"]), *_by_method()])


def _by_method() -> list[str]:
    """The defaults that a method changes, for any checkpoint and for the reference model alone."""
    from dpaudit.config.defaults import METHOD_DEFAULTS, REFERENCE_DEFAULTS

    rows = [
        f"| `{method}` | {_flat(changed) or '–'} | {_flat(REFERENCE_DEFAULTS[method])} |"
        for method, changed in METHOD_DEFAULTS.items()
    ]
    head = ["| method | any model | the reference model, besides |", "|---|---|---|"]
    return ["### Defaults of the methods", "", *head, *rows, ""]


def _flat(tree: dict[str, Any], name: str = "") -> str:
    keys = {f"{name}.{key}".lstrip("."): value for key, value in tree.items()}
    found = [_flat(value, key) if isinstance(value, dict) else f"`{key}={value}`" for key, value in keys.items()]
    return ", ".join(found)


def _section(name: str, schema: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """The section and those inside it; sections that have fields of their own come first."""
    rows, inside = [], []
    for field, about in schema["properties"].items():
        if "$ref" in about:
            inside += _section(f"{name}.{field}".lstrip("."), parts[about["$ref"].rpartition("/")[2]], parts)
            continue
        default = about.get("default")
        shown = (
            "–" if default is None else f"`{str(default).lower() if isinstance(default, bool) else _value(default)}`"
        )
        key = f"{name}.{field}".lstrip(".")
        rows.append(f"| `{key}` | {_accepted(about)} | {shown} | {_cell(about.get('description', ''))} |")
    head = [f"### {name}", "", schema["description"], ""] if name else []
    return [*head, "| setting | accepts | default | what it is |", "|---|---|---|---|", *rows, "", *inside]


def _value(default: Any) -> str:
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) else str(default)


def _accepted(about: dict[str, Any]) -> str:
    """What one field accepts, from its schema."""
    if "anyOf" in about:
        return " or ".join(_accepted(part) for part in about["anyOf"] if part.get("type") != "null")
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if about["type"] == "array":
        return f"list of {_accepted(about['items'])}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    limits = [
        f"{sign} {about[key]:g}"
        for keys, sign in ((("minimum", "ge"), "≥"), (("exclusiveMinimum", "gt"), ">"), (("maximum", "le"), "≤"),
                           (("exclusiveMaximum", "lt"), "<"))
        for key in keys
        if key in about
    ]  # fmt: skip
    return " ".join([words[about["type"]], ", ".join(limits)]).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
