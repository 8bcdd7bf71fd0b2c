"""From a tree of settings to a RunConfig; every error is one line that names field, value and what is accepted."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from dpaudit.config.defaults import METHOD_DEFAULTS, REFERENCE_DEFAULTS
from dpaudit.config.reading import normalise, parse_override, short
from dpaudit.config.sections import RunConfig, dashed
from dpaudit.config.together import check_together
from dpaudit.errors import UsageError

WITHOUT_RESERVE = ["noise", "new-token"]  # canaries.kinds where no record is held back that could be mislabelled


def resolve(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Method defaults, then the file, then the overrides; validated. Raises UsageError with one line."""
    given = normalise(tree)
    for text in overrides:
        given = _merge(given, parse_override(text))
    method = given.get("method", "dp-sgd")
    defaults = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}
    model = given.get("model")
    if isinstance(method, str) and not (isinstance(model, dict) and model.get("path") is not None):
        defaults = _merge(REFERENCE_DEFAULTS.get(method, {}), defaults)
    if _holds_nothing_back(given.get("data")):
        defaults = _merge(defaults, {"canaries": {"kinds": WITHOUT_RESERVE}})
    privacy = given.get("privacy")
    if isinstance(privacy, dict) and privacy.get("noise-multiplier") is not None and "epsilon" not in privacy:
        given = _merge(given, {"privacy": {"epsilon": None}})
    try:
        config = RunConfig.model_validate(_merge(defaults, given))
    except ValidationError as error:
        raise UsageError(_message(error)) from error
    check_together(config)
    return config


def _holds_nothing_back(data: Any) -> bool:
    """Whether these are settings of a data set of the user's own from which no records are kept for canaries."""
    if not isinstance(data, dict):
        return False
    own = data.get("path") is not None or data.get("name") not in (None, "digits")
    return own and not data.get("reserve")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _where(error: Any) -> str:
    """The field, without pydantic's names for the branches of a union."""
    parts = [
        dashed(str(part))
        for part in error["loc"]
        if not str(part).startswith(("literal[", "function-", "constrained-"))
    ]
    return short(".".join(parts))


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    where = _where(first)
    if first["type"] == "extra_forbidden":
        # A key can be any text: one that is blank or holds control characters is quoted, so that the line stays one.
        shown = where if where.isprintable() and where.strip() else repr(where)
        return f"{short(shown)}: no such field{_suggestion(where)}"
    # A field of several types has one error for each.
    same = [_accepted(other) for other in error.errors() if _where(other) == where]
    text = " or ".join(dict.fromkeys(same))
    return f"{where}: got {short(repr(first.get('input')))}; {text}" if where else text


def _accepted(error: Any) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "should be a mapping of fields"
    if error["type"] == "string_pattern_mismatch":
        return "accepted: auto, cpu, mps, cuda or cuda:N"  # the only field with a pattern
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text[0].lower() + text[1:]


def _suggestion(where: str) -> str:
    """Fields that were probably meant: of that name elsewhere, or spelled much like it; else all of the section."""
    parent, _, name = where.rpartition(".")
    sections = _sections(RunConfig)
    here = sections.get(parent, [])
    elsewhere = [f"{section}.{field}".lstrip(".") for section, fields in sections.items() for field in fields]
    meant = [field for field in elsewhere if field.rpartition(".")[2] == name]
    meant = meant or [f"{parent}.{field}".lstrip(".") for field in difflib.get_close_matches(name, here, n=1)]
    if not here:  # the section itself is unknown
        meant = meant or difflib.get_close_matches(where, elsewhere, n=1, cutoff=0.8)
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    return f"; accepted{f' in {parent}' if parent else ''}: {', '.join(here or sections[''])}"


def _sections(model: type[BaseModel], name: str = "") -> dict[str, list[str]]:
    """Section name -> its fields; the configuration itself is the section without a name."""
    found: dict[str, list[str]] = {name: [dashed(field) for field in model.model_fields]}
    for field, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= _sections(info.annotation, f"{name}.{dashed(field)}".lstrip("."))
    return found
