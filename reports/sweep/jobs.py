"""The jobs of a sweep, as an executor runs them: one cell trained, some cells measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpaudit import online
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import LedgerRow
from dpaudit.ledger import Ledger
from dpaudit.runs import RunFolder
from reports import card

TRAIN = "reports.sweep.jobs:train"
MEASURE = "reports.sweep.jobs:measure"


def train_payload(
    config: RunConfig, out: Path, row: LedgerRow | None, audits: Sequence[str], features: Path
) -> dict[str, Any]:
    """What `train` takes. features: the folder of encoded pictures that the cells share."""
    return {
        "features": str(features.resolve()),
        "config": config.model_dump(mode="json", by_alias=True),
        "out": str(out.resolve()),
        "row": row.model_dump(mode="json") if row is not None else None,
        "audits": list(audits),
        "online": online.allowed(),
    }


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Train the cell of `payload`, or go on where it stopped, and audit it where asked; nothing is done twice."""
    from trainers.feature_folder import shared

    if payload["online"]:
        online.allow()
    config, out = resolve(payload["config"]), Path(payload["out"])
    with shared(Path(payload["features"])):
        run = _trained(config, out)
        _audited(run, config, payload["audits"])
    if payload["row"] is not None:  # after the audit, which judges this cell's own claim and not the choice among cells
        declare(run, LedgerRow.model_validate(payload["row"]))
    card.renew(out)
    return {}


def _trained(config: RunConfig, out: Path) -> RunFolder:
    from attacks.training import resume_run, start_run
    from trainers.progress import Live

    run = RunFolder(out)
    if run.finished or run.ledger.exists():
        resume_run(out, reporter=Live(out.name))
    else:
        start_run(config, out, reporter=Live(out.name))
    return run


def _audited(run: RunFolder, config: RunConfig, audits: Sequence[str]) -> None:
    if audits and not run.audit.exists():
        from attacks.audit import audit
        from attacks.options import Options

        audit(run.path, Options(audits=tuple(audits), device=config.model.device))


def declare(run: RunFolder, row: LedgerRow | None) -> None:
    """Write the ledger row of the sweep into a cell's ledger; a larger sweep replaces the row of a smaller one.

    Taking the lock also finishes what a killed process left undone in the folder.
    """
    with run.lock():
        if row is None:
            return
        ledger = Ledger.load(run.ledger)
        old = next((own for own in ledger.rows if own.path == row.path), None)
        if old == row:
            return
        if old is None:
            ledger.add_row(row)
        else:
            ledger.replace_row(row)
    card.renew(run.path)


def measure(payload: dict[str, Any]) -> dict[str, Any]:
    """Benchmark the runs of `payload` in one start of lmms-eval."""
    from reports.benchmark import benchmark_many

    benchmark_many([RunFolder.open(Path(run)) for run in payload["runs"]], device=payload["device"], processes=1)
    return {}
