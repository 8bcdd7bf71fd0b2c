"""`dpaudit demo`: train three ways, attack, benchmark and report, on the embedded handwriting."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpaudit import extras
from dpaudit.cli import console
from dpaudit.errors import DpauditError, EnvironmentFailure
from dpaudit.executors import job_environment
from dpaudit.forks import TRAINING, Fork, ForkServer, end, how

CANARIES = 300
WHITE_BOX_RUN = "dual-priv"
ACCEPTED = {"audit": (0, 1, 3)}  # a verdict is a result, whatever it says
AT_ONCE = 2  # trainings side by side, one thread each: small matrices gain nothing from more threads

# What is trained. Everything not named here is the default of `dpaudit train`; the settings were chosen on public
# synthetic pictures only: the learning rate for a short training by benchmarks/recipes.py.
SHORT = ("training.epochs=10", "training.learning-rate=0.02")
RUNS: dict[str, tuple[str, ...]] = {
    "non-private": ("method=non-private",),
    "dp-sgd": ("method=dp-sgd", *SHORT),
    "dual-priv": ("method=dual-priv", *SHORT),
}


START = ("non-private", "dual-priv", "dp-sgd")  # two processes are busy longest when the longest chains start first


def command(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("demo"),
    canaries: Annotated[int, typer.Option(help="Canary candidates per run.", min=30)] = CANARIES,
    seed: Annotated[
        int | None, typer.Option(help="Make the demo repeatable; its runs must then not be released.")
    ] = None,
) -> None:
    """Train, audit, benchmark and report on the embedded data, in minutes.

    Trains OUT/runs/non-private, dp-sgd and dual-priv with canaries, audits and benchmarks them, and writes
    OUT/report.html. Run it again after an interruption: finished parts are kept.
    """
    extras.require_lmms_eval("demo")
    began = time.monotonic()
    runs = {name: out / "runs" / name for name in RUNS}
    console.log(f"dpaudit demo: three fine-tunings with {canaries} canary candidates each, then audit and benchmark")
    paths = [str(path) for path in runs.values()]
    report = out / "report.html"
    title = "dpaudit demo: three ways to fine-tune on handwriting"
    with ForkServer(TRAINING, job_environment(1), apart=False) as server:
        _together(server, [[_training(name, runs[name], canaries, seed), _audit(name, runs[name])] for name in START])
        _together(server, [[["benchmark", *paths]]])
        _together(server, [[["report", *paths, "-o", str(report), "--title", title]]])
    _summary([Path(path) for path in paths])
    console.say("")
    console.say(console.LIMIT_SENTENCE)
    console.say(f"Report: {report}   ({time.monotonic() - began:.0f} s)")


def _training(name: str, path: Path, canaries: int, seed: int | None) -> list[str]:
    from dpaudit.runs import RunFolder

    if RunFolder(path).ledger.exists():
        return ["train", "--resume", str(path)]
    extra = [] if seed is None else ["--seed", str(seed)]
    return ["train", *RUNS[name], "--canaries", str(canaries), *extra, "--out", str(path)]


def _audit(name: str, path: Path) -> list[str]:
    """The method under audit also gets the white-box game, whose test has the power to find a wrong claim."""
    extra = ["--canaries", "--fusion", "--white-box"] if name == WHITE_BOX_RUN else []
    return ["audit", str(path), *extra]


def _rank(chain: Sequence[list[str]]) -> int:
    """What goes first: trainings, since audits follow them; then the longest audit, so that it isn't the last alone."""
    return 0 if chain[0][0] == "train" else 1 if "--white-box" in chain[0] else 2


def _together(server: ForkServer, chains: Sequence[Sequence[list[str]]]) -> None:
    """Run chains of dpaudit commands, at most AT_ONCE side by side; stops all when one fails or on Ctrl-C."""
    waiting = [list(chain) for chain in chains]
    running: list[tuple[list[list[str]], Fork]] = []
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                chain = waiting.pop(0)
                arguments = chain[0]
                console.log(f"$ {shlex.join(['dpaudit', *arguments])}")
                running.append((chain, server.start("dpaudit.cli.app:run", arguments, argv=arguments)))
            server.listen(1.0)
            for entry in list(running):
                chain, process = entry
                code = process.poll()
                if code is None:
                    continue
                running.remove(entry)
                if code not in ACCEPTED.get(chain[0][0], (0,)):
                    kind = EnvironmentFailure if code < 0 else DpauditError
                    raise kind(f"demo: {shlex.join(['dpaudit', *chain[0]])} {how(code)}")
                if chain[1:]:
                    waiting.append(chain[1:])
                    waiting.sort(key=_rank)
    finally:
        end([process for _, process in running])


def _summary(paths: Sequence[Path]) -> None:
    from dpaudit.documents import AuditDocument, BenchmarkDocument
    from dpaudit.runs import RunFolder
    from dpaudit.verdict import headline

    rows = [("run", "claim", "audited eps >=", "ceiling", "verdict", "exact match")]
    base = None
    for path in paths:
        run = RunFolder(path)
        audit, bench = AuditDocument.read(run.audit), BenchmarkDocument.read(run.benchmark)
        best = headline(audit)
        task, metrics = next(iter(bench.tasks.items()))
        base = bench.base[task]["exact_match"].value if bench.base else base
        claim = "none" if audit.claim is None else f"eps {float(audit.claim.epsilon):g}"
        rows.append(
            (
                path.name,
                claim,
                "-" if best is None or best.epsilon_lower is None else f"{best.epsilon_lower:.2f}",
                "-" if best is None or best.ceiling is None else f"{best.ceiling:.2f}",
                audit.verdict,
                f"{metrics['exact_match'].value:.3f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        console.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if base is not None:
        console.say(f"base model before fine-tuning: exact match {base:.3f}")
