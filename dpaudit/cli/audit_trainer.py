"""`dpaudit audit-trainer`: the games on training code that dpaudit did not write."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console
from dpaudit.cli.executor import Address, ExecutorName, GpusPerTrial


def command(
    factory: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The trainer under test.")],
    white_box: Annotated[bool, typer.Option("--white-box", help="White-box game with injected gradients.")] = False,
    canaries: Annotated[bool, typer.Option("--canaries", help="Canary game with whole records.")] = False,
    contract: Annotated[bool, typer.Option("--contract", help="Step contract on the trainer.")] = False,
    runs: Annotated[
        int | None, typer.Option(help="Number of trainings, each with one canary either included or left out.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Number of canaries of a game (default: 300 records; 1,000 gradients, if they fit)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each training (default: as in its claim).")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An argument of the factory.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The claimed eps (default: as the trainer states).")] = None,
    delta: Annotated[
        float | None, typer.Option(help="The claimed delta (default: as the trainer states, else 1e-5).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed that makes coins and noise repeatable.")] = None,
    time_limit: Annotated[float, typer.Option(help="Time limit of one call of the trainer, in seconds.")] = 30.0,
    processes: Annotated[int | None, typer.Option(help="Number of trainings of --runs that run at a time.")] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    gpus_per_trial: GpusPerTrial = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the audit (default: a new one under audits/).")] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="EPS", help="Exit 1 when the best lower bound on eps exceeds EPS.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Joint confidence of all bounds.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Level of the claim test.")] = 0.001,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when the verdict is inconclusive.")] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Audit training code that dpaudit did not write: test its claimed eps with games on whole trainings.

    MODULE:FACTORY names a factory of dpaudit.under_test (docs/under-test.md) or of the protocol
    (docs/step-contract.md). The default is every game that the trainer allows, except --runs, which needs many
    trainings. An interrupted audit continues in its folder.
    """
    from attacks.external.options import TrainerOptions
    from dpaudit import validate
    from dpaudit.cli import external
    from dpaudit.cli.audit import finish
    from dpaudit.cli.executor import choose

    if fail_above is not None:
        validate.real("--fail-above", fail_above, low=0.0, high=float("inf"))
    elsewhere: dict[str, object] = {"--processes": processes, "--executor": None if executor == "local" else executor}
    elsewhere |= {"--address": address, "--gpus-per-trial": gpus_per_trial}
    if runs is None:
        external.refuse(elsewhere, "belongs to --runs N")
    many = None
    if any(value is not None for value in elsewhere.values()):
        many = choose(executor, processes, 1, address, gpus_per_trial)
    named = {"canaries": canaries, "contract": contract, "white-box": white_box}
    options = TrainerOptions(
        target=factory,
        arguments=external.arguments_of(setting or ()),
        audits=tuple(name for name, wanted in named.items() if wanted),
        count=count,
        runs=runs,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        alpha=alpha,
        seed=seed,
        time_limit=time_limit,
        command=shlex.join(["dpaudit", *sys.argv[1:]]),
    )
    finish(external.trainer(options, out, many), as_json=as_json, strict=strict, fail_above=fail_above)
