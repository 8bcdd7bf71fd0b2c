"""`dpaudit audit`: attack a run and say what its claim of eps is worth."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dpaudit.cli import console
from dpaudit.cli.executor import Address, Chosen, ExecutorName, GpusPerTrial, choose

if TYPE_CHECKING:
    from dpaudit.documents import AuditDocument, FusionAudit, ScoreSummary, Test


def command(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A finished run folder.")] = None,
    canaries: Annotated[
        bool, typer.Option("--canaries", help="Canary game; trains a twin if the run has no canaries.")
    ] = False,
    mia: Annotated[
        bool, typer.Option("--mia", help="Membership inference on canaries, or on real records of a twin.")
    ] = False,
    fusion: Annotated[
        bool, typer.Option("--fusion", help="Token path: isolation test, and what the tokens reveal.")
    ] = False,
    contract: Annotated[bool, typer.Option("--contract", help="Step contract on this run's trainer.")] = False,
    white_box: Annotated[bool, typer.Option("--white-box", help="White-box game with injected gradients.")] = False,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of canaries of a twin or a game (default: 300 records; 1,000 gradients, if they fit)."
        ),
    ] = None,
    directions: Annotated[
        str, typer.Option(help="--white-box: directions of the gradient canaries: orthogonal, dirac or random.")
    ] = "orthogonal",
    final_only: Annotated[
        bool, typer.Option("--final-only", help="--white-box: the auditor sees only the final update.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat games that were already played, with fresh coins.")
    ] = False,
    references: Annotated[int, typer.Option(metavar="K", help="--mia: number of reference models to train.")] = 0,
    trainer: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Audit a trainer that dpaudit did not write.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="--trainer: an argument of the factory.")
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(help="--trainer: number of trainings, each with one canary either included or left out."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="--trainer: steps of each training (default: as in its claim).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Number of trainings of --runs or --references that run at a time.")
    ] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    gpus_per_trial: GpusPerTrial = None,
    time_limit: Annotated[
        float, typer.Option(help="--trainer: time limit of one call of the trainer, in seconds.")
    ] = 30.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="--trainer: seed that makes coins and noise repeatable.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Audit a checkpoint or PEFT adapter trained elsewhere.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="--model: the base model that it was fine-tuned from.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="--model: table with id and image, question, answer, or with id and text."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--model: images by image_id, if stored separately.")
    ] = None,
    coins: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="--model: table with id and member, the fair coins of the records."),
    ] = None,
    claim_sigma: Annotated[float | None, typer.Option(help="--model: claimed noise multiplier.")] = None,
    claim_rate: Annotated[float | None, typer.Option(help="--model: claimed Poisson sample rate.")] = None,
    claim_steps: Annotated[int | None, typer.Option(help="--model: claimed number of steps.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="--trainer, --model: the claimed eps (default: as the trainer states).")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="--trainer, --model: the claimed delta (default: as the trainer states, else 1e-5)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="--trainer, --model: folder for the audit.")] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="EPS", help="Exit 1 when the best lower bound on eps exceeds EPS.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Joint confidence of all bounds.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Level of the claim test.")] = 0.001,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    online: Annotated[bool, console.ONLINE_OPTION] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when the verdict is inconclusive.")] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Test the eps that a run, a trainer or a model claims.

    For a RUN, the default is the canary game (if the run was trained with canaries) and the isolation test.
    --contract takes about a minute more. --white-box, and --canaries on a run without canaries, train a twin first.

    --trainer MODULE:FACTORY is `dpaudit audit-trainer MODULE:FACTORY`: training code that dpaudit did not write.
    --model PATH --base PATH --records FILE --coins FILE --epsilon E is `dpaudit audit-model PATH ...`: a model that is
    already trained, with its owner's coins. The --help of these two commands lists only the options that apply.
    """
    from attacks.external.options import ModelOptions, TrainerOptions
    from attacks.options import Options, prepare
    from dpaudit import validate
    from dpaudit.cli import external
    from dpaudit.errors import UsageError
    from dpaudit.online import allow
    from dpaudit.runs import RunFolder

    if online:
        allow()
    if fail_above is not None:
        validate.real("--fail-above", fail_above, low=0.0, high=float("inf"))
    flags = {"canaries": canaries, "mia": mia, "fusion": fusion, "contract": contract, "white-box": white_box}
    named = tuple(name for name, wanted in flags.items() if wanted)
    of_trainer: dict[str, object] = {"--set": setting, "--runs": runs, "--steps": steps, "--seed": seed}
    of_model: dict[str, object] = {"--base": base, "--records": records, "--coins": coins, "--images": images}
    of_model |= {"--claim-sigma": claim_sigma, "--claim-rate": claim_rate, "--claim-steps": claim_steps}
    both: dict[str, object] = {"--epsilon": epsilon, "--delta": delta, "--out": out}
    if (run is not None) + (trainer is not None) + (model is not None) != 1:
        raise UsageError("audit: accepted: exactly one of RUN, --trainer MODULE:FACTORY and --model PATH")
    many = _many(runs, references, processes, executor, address, gpus_per_trial)
    if run is None:
        external.refuse({"--references": references or None}, "belongs to RUN --mia")
        played = {
            "--directions": None if directions == "orthogonal" else directions,
            "--final-only": final_only or None,
            "--again": again or None,
        }
        external.refuse(played, "belongs to RUN --white-box")
    if trainer is not None:
        external.refuse(of_model, "belongs to --model")
        asked = TrainerOptions(
            target=trainer,
            arguments=external.arguments_of(setting or ()),
            audits=named,
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
        document = external.trainer(asked, out, many)
        finish(document, as_json=as_json, strict=strict, fail_above=fail_above)
    if model is not None:
        external.refuse(of_trainer | dict.fromkeys([f"--{name}" for name in named], True), "has no effect with --model")
        needed: dict[str, object] = {"--base": base, "--records": records, "--coins": coins, "--epsilon": epsilon}
        external.required(needed, "--model needs --base, --records, --coins and --epsilon")
        assert base is not None and records is not None and coins is not None and epsilon is not None
        trained = ModelOptions(
            model=model,
            base=base,
            records=records,
            coins=coins,
            images=images,
            epsilon=epsilon,
            delta=1e-5 if delta is None else delta,
            sigma=claim_sigma,
            rate=claim_rate,
            steps=claim_steps,
            confidence=confidence,
            alpha=alpha,
            device=device,
            command=typed(model),
        )
        finish(external.model(trained, out), as_json=as_json, strict=strict, fail_above=fail_above)
    assert run is not None
    external.refuse(of_trainer | of_model | both, "belongs to --trainer or --model")
    console.existing(run, "run")
    options = Options(
        audits=named,
        count=count,
        references=references,
        directions=directions,
        final_only=final_only,
        again=again,
        confidence=confidence,
        alpha=alpha,
        device=device,
        command=typed(run),
    )
    prepare(RunFolder.open(run), options)  # a wrong flag is told before the heavy imports

    from attacks.audit import audit
    from reports import card
    from trainers.progress import Live

    with many.connection if many else nullcontext():
        shares, runner = (many.lanes, many.make(None)) if many else (None, None)
        document = audit(run, options, reporter=Live("twin"), log=console.log, processes=shares, executor=runner)
    card.renew(run, console.log)
    sharper = None if white_box else f"dpaudit audit {shlex.quote(str(run))} --white-box"
    finish(document, as_json=as_json, strict=strict, fail_above=fail_above, sharper=sharper)


def _many(
    runs: int | None, references: int, processes: int | None, executor: str, address: str | None, gpus: float | None
) -> Chosen | None:
    """Where many trainings run; None: where nothing was asked for. Raises UsageError where there are none."""
    from dpaudit.errors import UsageError

    given: dict[str, object] = {"--processes": processes, "--executor": None if executor == "local" else executor}
    given |= {"--address": address, "--gpus-per-trial": gpus}
    asked = [flag for flag, value in given.items() if value is not None]
    if not asked:
        return None
    if runs is None and not references:
        raise UsageError(f"{asked[0]}: belongs to --trainer --runs N or --mia --references K")
    return choose(executor, processes, 1, address, gpus)


def finish(
    document: "AuditDocument", *, as_json: bool, strict: bool, fail_above: float | None, sharper: str | None = None
) -> NoReturn:
    """Print the document and end with the exit code of its verdict and the gate. sharper: a command that sees more."""
    if as_json:
        console.emit(document)
    else:
        for line in describe(document, sharper):
            console.say(line)
    console.finish(console.exit_code(document, strict=strict, fail_above=fail_above))


def typed(run: Path) -> str:
    """The command line for the document, a path that leads elsewhere cut to its name: it tells who works where."""
    from dpaudit.config import public_path

    words = [public_path(str(run)) or run.name if word == str(run) else word for word in sys.argv[1:]]
    return shlex.join(["dpaudit", *words])


def describe(document: "AuditDocument", sharper: str | None = None) -> list[str]:
    """The document as aligned text, for people. sharper: a command that sees more, named where this saw too little."""
    from dpaudit.documents import ABOUT
    from dpaudit.printable import field

    assert document.run is not None
    claim = document.claim
    lines = [f"run       {field(document.run.name, 80)} ({document.run.method}); audits {ABOUT[document.run.about]}"]
    if claim is None:
        lines.append("claim     none")
    else:
        lines.append(
            f"claim     eps = {float(claim.epsilon):.4g} at delta = {claim.delta:g} "
            f"({claim.relation}; unit: {field(claim.unit)})"
        )
    lines += _games(document)
    lines += [f"verdict   {document.verdict}", *(f"          {field(reason, 800)}" for reason in document.reasons)]
    if document.verdict == "inconclusive" and sharper is not None:
        lines.append(f"next      {sharper} (tests the noise itself, in a twin of the training)")
    lines.append("")
    if document.tests:
        lines += [*_table(document.tests), ""]
    for summary in document.scores:
        low, high = summary.auc_low or 0.0, summary.auc_high or 1.0
        lines.append(f"AUC       {summary.auc:.3f} ({low:.3f} to {high:.3f})  {summary.name}")
        lines.append(f"          {_rates(summary)}")
    if document.attacks:
        lines.append("attacks   AUC on the half of the records that chose among them")
        lines += [
            f"          {row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})  {row.name}{' *' if row.chosen else ''}"
            for row in document.attacks
        ]
    lines += [
        f"exposure  {row.kind}: members {row.bits_members:.2f} bits of {row.most_bits:.0f} "
        f"({row.bits_members_base:.2f} under the base model), others {row.bits_others:.2f}; p = {row.p_value:.2g}"
        for row in document.exposure
    ]
    lines += [
        f"answers   {row.half}: members {row.members:.1%} ({row.members_low:.1%} to {row.members_high:.1%}), others "
        f"{row.others:.1%}; base model {row.members_base:.1%} and {row.others_base:.1%}"
        for row in document.regeneration
    ]
    shown = {item.name for item in document.controls}
    for check in (check for check in document.validity.checks if check.name not in shown):
        allowed = f"; allowed: {check.allowed}" if check.allowed else ""
        lines.append(f"validity  {check.status}: {field(check.name)} ({field(check.measured)}{allowed})")
    lines += [f"control   {item.outcome}: {item.name} ({field(item.measured)})" for item in document.controls]
    if document.fusion is not None:
        lines += _fusion(document.fusion)
    if document.contract is not None:
        made = [check for check in document.contract.checks if check.status != "not applicable"]
        lines.append(f"contract  {document.contract.verdict}: {len(made)} checks of the step contract")
        lines += [
            f"          fail: {field(check.name)} ({field(check.measured)})" for check in made if check.status == "fail"
        ]
    lines += [f"ledger    {row.status}: {field(row.path)}" for row in document.ledger]
    return [*lines, "", console.LIMIT_SENTENCE]


def _games(document: "AuditDocument") -> list[str]:
    """The games in the order of play with the evidence after each, where there is more to say than the tests do."""
    from dpaudit.documents import ABOUT, WITHOUT_COINS
    from dpaudit.printable import field

    lines = []
    for entry in document.games:
        if entry.game in WITHOUT_COINS:
            continue
        power = "no power earned" if entry.power is None else f"power {entry.power:.0%}"
        evidence = f"log evidence {float(entry.log_evidence):.1f}, of all so far {float(entry.log_product):.1f}"
        lines.append(f"game      {entry.name}: {ABOUT[entry.about]}; {evidence}; {power}")
        if entry.alternative is not None:
            lines.append(f"          alternative: {field(entry.alternative, 400)}")
    return lines


def _rates(summary: "ScoreSummary") -> str:
    """TPR at 10, 1 and 0.1 % FPR, each with its interval or as not resolvable."""
    parts = []
    for rate, point in summary.tpr_at_fpr.items():
        found = "not resolvable" if point is None else f"{point.tpr:.3f}"
        if point is not None and point.tpr_low is not None and point.tpr_high is not None:
            found += f" ({point.tpr_low:.3f} to {point.tpr_high:.3f})"
        parts.append(f"{float(rate):.1%} FPR: {found}")
    return "TPR at " + ", ".join(parts)


def _fusion(part: "FusionAudit") -> list[str]:
    lines = [f"fusion    training: {part.training}; if tokens leave: {part.release}"]
    if part.leak is not None:
        lines.append(f"          first leak: {part.leak.stage} ({part.leak.observable}), {part.leak.how}")
    lines += [f"          {check.status}: {check.name}" for check in part.checks]
    if part.sensitivity:
        share = max(row.largest / row.bound for row in part.sensitivity)
        lines.append(f"          one unit moved the clipped sum by at most {share:.3f} of its bound")
    if part.released is not None:
        lines.append(f"          {part.released.statement}")
    return lines


def _table(tests: "tuple[Test, ...]") -> list[str]:
    rows: list[tuple[str, ...]] = [("test", "method", "records", "guesses", "right", "eps >=", "ceiling", "conf.", "")]
    rows += [_row(test) for test in tests]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    text = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:8], widths[2:8], strict=True)]
        text.append("  ".join([*left, *right, row[8]]).rstrip())
    return text


def _row(test: "Test") -> tuple[str, ...]:
    from dpaudit.printable import field

    notes = []
    if test.p_value is not None:
        notes.append(f"p = {test.p_value:.3g}")
    if test.e_value is not None:
        notes.append(f"e = {float(test.e_value):.3g}, share {test.share:.2g}{', refutes' if test.refutes else ''}")
    if test.assumes != "none":
        notes.append(f"assumes {test.assumes}")
    lower, top = test.epsilon_lower, test.ceiling
    if full := console.at_ceiling(test):
        notes.append(full)
    if not test.decides or test.estimate:
        notes.append("informs only")
    return (
        field(test.name, 120),
        field(test.bound, 80),
        str(test.n),
        "-" if test.guesses is None else str(test.guesses),
        "-" if test.correct is None else str(test.correct),
        "-" if lower is None else f"{lower:.2f}",
        "-" if top is None else f"{top:.2f}",
        f"{test.confidence:.4g}",
        "; ".join(notes),
    )
