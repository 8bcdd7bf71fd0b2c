"""`dpaudit train`: one fine-tuning."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console
from dpaudit.documents import ClaimDocument
from dpaudit.errors import UsageError
from dpaudit.online import allow
from dpaudit.printable import field


def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.SUB=VALUE]...",
            help="Settings, e.g. training.epochs=20; all are in docs/reference/settings.md and in a run's config.yaml.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")] = None,
    method: Annotated[str | None, typer.Option(help="non-private, dp-sgd, dual-priv or dp-zo.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Target eps; sigma is chosen so that it is not exceeded.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="delta of the claim.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id (default: the compact reference model).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Number of canary candidates.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Replace the secret noise key: the run must then not be released.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/METHOD).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume an interrupted run.")] = None,
    online: Annotated[
        bool,
        typer.Option("--online", help="--resume: allow downloads from the hub of what the run names (a new run may)."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print eps, sigma, steps and cost without training.")
    ] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Fine-tune a vision-language model, with or without differential privacy.

    On several GPUs: torchrun --nproc-per-node N -m dpaudit train … (docs/distributed.md).
    """
    from dpaudit.config import read_yaml, resolve

    if resume is not None:
        given = {
            "settings": overrides or None, "--config": config, "--method": method, "--epsilon": epsilon,
            "--delta": delta, "--model": model, "--device": device, "--canaries": canaries, "--seed": seed,
            "--out": out, "--dry-run": dry_run or None,
        }  # fmt: skip
        clash = [name for name, value in given.items() if value is not None]
        if clash:
            raise UsageError(f"--resume: uses the run's own configuration; drop {', '.join(clash)}")
        if online:
            allow()
        return _resume(resume, as_json)
    allow()  # the configuration is this user's own
    flags = {
        "method": method,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "model.path": model,
        "model.device": device,
        "canaries.count": canaries,
        "seed": seed,
    }
    settings = [f"{key}={value}" for key, value in flags.items() if value is not None]
    resolved = resolve(read_yaml(config) if config else {}, [*(overrides or []), *settings])
    if dry_run:
        return _dry_run(resolved, as_json)
    from attacks.training import start_run
    from trainers.distributed import joined
    from trainers.progress import Live

    target = out or Path("runs") / resolved.method
    with joined() as group:
        run = start_run(resolved, target, reporter=Live(target.name))
    if group.first:
        _finish(run.path, as_json)


def _resume(path: Path, as_json: bool) -> None:
    from attacks.training import resume_run
    from trainers.distributed import joined
    from trainers.progress import Live

    with joined() as group:
        run = resume_run(path, reporter=Live(path.name))
    if group.first:
        _finish(run.path, as_json)


def _finish(path: Path, as_json: bool) -> None:
    from dpaudit.runs import RunFolder
    from reports import card

    card.renew(path, console.log)
    document = ClaimDocument.read(RunFolder(path).claim)
    if as_json:
        return console.emit(document)
    console.say(_claim_sentence(document))
    console.say(f"run: {path}   next: dpaudit audit {path}")


def _claim_sentence(document: ClaimDocument) -> str:
    claim = document.claim
    if claim is None:
        text = "This run claims no privacy."
    else:
        text = (
            f"Claim: eps = {float(claim.epsilon):.4g} at delta = {claim.delta:g} ({claim.relation}, "
            f"unit: {field(claim.unit)}); sigma = {float(claim.noise_multiplier or 0):.4g}, "
            f"{claim.sampling} batches, q = {claim.sample_rate:.4g}, T = {claim.steps}."
        )
    why = field(document.reasons[-1], 400) if document.reasons else "no reason is given"
    return text if document.releasable else f"{text} Not for release ({why})."


def _duration(seconds: float) -> str:
    """Rounded: it is an estimate."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _dry_run(config: "object", as_json: bool) -> None:
    from attacks.training import about_data, dry_run
    from dpaudit.config import RunConfig

    assert isinstance(config, RunConfig)
    dataset, plan, cost, warnings = dry_run(config)
    for line in (*(f"warning: {warning}" for warning in warnings), *about_data(dataset)):
        console.log(line)
    document = plan.document()
    if as_json:
        return console.emit(document)
    console.say(_claim_sentence(document))
    for delta in plan.claim.curve if plan.claim else ():
        console.say(f"  eps = {float(delta.epsilon):.4g} at delta = {delta.delta:g}")
    for check in document.cross_checks:
        found = check.note if check.epsilon is None else f"eps <= {float(check.epsilon):.4g}"
        console.say(f"  cross-check by {check.accountant}: {found}")
    console.say(
        f"{plan.steps} steps, expected batch {plan.expected_batch_size:g} of {plan.candidates} candidates; "
        f"about {_duration(cost.seconds)} and {cost.bytes / 1e9:.1f} GB of memory here ({cost.how}). "
        "Nothing was trained."
    )
