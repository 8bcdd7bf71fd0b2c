"""The part of `dpaudit audit` for trainers and models that dpaudit did not write."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dpaudit
from dpaudit.cli import console
from dpaudit.errors import UsageError, rejected

if TYPE_CHECKING:
    from attacks.external.options import ModelOptions, TrainerOptions
    from dpaudit.cli.executor import Chosen
    from dpaudit.documents import AuditDocument


def refuse(given: Mapping[str, object], why: str) -> None:
    """UsageError for the first option that was given although it says nothing here."""
    for flag, value in given.items():
        if value not in (None, False, [], ()):
            raise UsageError(f"{flag}: {why}")


def required(given: Mapping[str, object], why: str) -> None:
    """UsageError for the first option that is missing."""
    for flag, value in given.items():
        if value is None:
            raise UsageError(f"{flag}: missing; {why}")


def arguments_of(pairs: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE pairs as keyword arguments of a factory; values as YAML scalars (1 is a number, true a truth value)."""
    import yaml

    found: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in ("records", "seed", "noise_seed"):
            raise rejected("--set", pair, "NAME=VALUE, a keyword argument of the factory other than records and seeds")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        found[name] = value if isinstance(value, bool | int | float) else text
    return found


def leave_folder() -> None:
    """`python -m dpaudit` puts the working directory first on sys.path; its `trainers/` must not become ours.

    It comes back once our packages are imported (attacks.contract.loading).
    """
    here = Path.cwd()
    if here != Path(dpaudit.__file__).resolve().parents[1]:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]


def trainer(options: "TrainerOptions", out: Path | None, chosen: "Chosen | None") -> "AuditDocument":
    """Audit `--trainer`. What foreign code prints goes to stderr: stdout holds our result.

    chosen: where the trainings of --runs are; None: in this process, one by one.
    """
    leave_folder()
    with contextlib.redirect_stdout(sys.stderr):
        from attacks.contract.guard import start_watchdog
        from attacks.external.trainer import audit_trainer
        from trainers.progress import Live

        start_watchdog(lambda line: console.log(f"dpaudit: {line}"))
        with chosen.connection if chosen else contextlib.nullcontext():
            executor = chosen.make(None) if chosen else None
            document, place = audit_trainer(
                options,
                out,
                reporter=lambda name: Live(name, "training" if name == "runs" else "step"),
                log=console.log,
                executor=executor,
            )
    console.log(f"written to {place} (dpaudit report {place} makes a page of it)")
    return document


def model(options: "ModelOptions", out: Path | None) -> "AuditDocument":
    """Audit `--model`."""
    from attacks.external.model import audit_model

    document = audit_model(options, out, log=console.log)
    if out is not None:
        console.log(f"written to {out} (dpaudit report {out} makes a page of it)")
    return document
