"""`dpaudit scores`: audit score arrays from anywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from dpaudit.documents import ScoresDocument, Test


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, Parquet or .npz with columns id, member, score.")],
    delta: Annotated[float, typer.Option(help="delta of the (eps, delta) that is bounded.")],
    coins: Annotated[
        str, typer.Option(help="How membership was drawn: independent (a fair toss each), half, or unknown.")
    ] = "unknown",
    confidence: Annotated[float, typer.Option(help="Confidence of the bounds.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Level of the claim test.")] = 0.001,
    claim_sigma: Annotated[float | None, typer.Option(help="Claimed noise multiplier.")] = None,
    claim_rate: Annotated[float | None, typer.Option(help="Claimed Poisson sample rate.")] = None,
    claim_steps: Annotated[int | None, typer.Option(help="Claimed number of steps.")] = None,
    claim_epoch: Annotated[
        int | None, typer.Option(help="Steps per epoch of random allocation (default: Poisson sampling).")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Claimed eps at --delta, where no mechanism is stated.")] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            help="Scores of the same kind from a game with a known leak (id, member, score); needed for stating power."
        ),
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="EPS", help="Exit 1 when the best lower bound on eps exceeds EPS.")
    ] = None,
    independent_runs: Annotated[
        bool, typer.Option("--independent-runs", help="Every row comes from a separate training.")
    ] = False,
    separate: Annotated[
        bool, typer.Option("--separate", help="Canaries act along separate (orthogonal) directions of the noise.")
    ] = False,
    features: Annotated[
        Path | None, typer.Option(help="CSV or Parquet with id and numeric features, for the blind baseline.")
    ] = None,
    id_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of ids; Parquet may hold them in its index, .npz needs none.")
    ] = "id",
    member_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of coins: 0, 1, true or false.")
    ] = "member",
    score_column: Annotated[str, typer.Option(metavar="NAME", help="Column of scores.")] = "score",
    seed: Annotated[int, typer.Option(min=0, help="Seed for breaking ties.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when the verdict is inconclusive.")] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Audit scores (higher = "was in training") of any system: validity, AUC, TPR at small FPR, bounds, verdict.

    A file cannot show how its coins were drawn: --coins independent enables the one-run bounds, --independent-runs
    those for independent runs. --claim-sigma, --claim-rate and --claim-steps test the claimed mechanism itself.
    """
    from dpaudit import validate
    from dpaudit.analysis.scores import Options, advantage, analyse
    from dpaudit.analysis.stating import stated_claim
    from dpaudit.analysis.tables import Columns, read_features, read_scores
    from dpaudit.errors import rejected

    if fail_above is not None:
        validate.real("--fail-above", fail_above, low=0.0, high=float("inf"))
    if coins not in ("independent", "half", "unknown"):
        raise rejected("--coins", coins, ("independent", "half", "unknown"))
    options = Options(
        delta=validate.delta(delta),
        confidence=validate.confidence(confidence),
        alpha=validate.real("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True),
        coins=coins,  # type: ignore[arg-type]
        independent_runs=independent_runs,
        separate=separate,
        claim=stated_claim(
            epsilon=epsilon,
            sigma=claim_sigma,
            rate=claim_rate,
            steps=claim_steps,
            epoch=claim_epoch,
            delta=delta,
            named=console.claim_flag,
        ),
        seed=seed,
        name=file.stem,
    )
    columns = Columns(id_column, member_column, score_column)
    table = read_scores(file, columns)
    values = None if features is None else read_features(features, table.ids, id_column)
    leak = None if control is None else read_scores(control, columns)
    document = analyse(table, options, features=values, control=leak)
    if as_json:
        console.emit(document)
    else:
        show(document, advantage(table) if document.validity.sound else None)
    console.finish(console.exit_code(document, strict=strict, fail_above=fail_above))


def show(document: "ScoresDocument", advantage: float | None) -> None:
    """The document for people."""
    console.say(f"Verdict: {document.verdict}")
    for reason in document.reasons:
        console.say(f"  {reason}")
    if document.claim is not None:
        claim = document.claim
        by = "no mechanism stated"
        if claim.noise_multiplier is not None:
            by = f"sigma {claim.noise_multiplier:g}, q {claim.sample_rate:g}, T {claim.steps}"
        console.say(f"Claim: eps = {claim.epsilon:.3f} at delta = {claim.delta:g} ({by}, {claim.relation})")
    console.say("Validity")
    for check in document.validity.checks:
        console.say(f"  [{check.status}] {check.name}: {check.measured}. {check.explanation}")
    for summary in document.scores:
        console.say(f"Scores: {summary.n_in} in, {summary.n_out} out")
        console.say(f"  AUC (Mann-Whitney) {summary.auc:.4f} [{summary.auc_low:.4f}, {summary.auc_high:.4f}]")
        for fpr, point in summary.tpr_at_fpr.items():
            text = (
                "not resolvable with so few non-members"
                if point is None
                else f"{point.tpr:.4f} [{point.tpr_low:.4f}, {point.tpr_high:.4f}] (at FPR {point.fpr:.4g})"
            )
            console.say(f"  TPR at FPR {float(fpr):.1%}: {text}")
        if advantage is not None:
            console.say(f"  Advantage (max TPR - FPR, threshold chosen on these records): {advantage:.4f}")
    if document.tests:
        console.say(f"Tests at delta = {document.tests[0].delta:g}")
    for test in document.tests:
        show_test(test)
    console.say(console.LIMIT_SENTENCE)


def show_test(test: "Test") -> None:
    """One test in two or three lines."""
    label = "estimate" if test.estimate else ("decides" if test.decides else "informs")
    counted = "" if test.guesses is None else f", {test.correct} of {test.guesses} guesses right"
    console.say(f"  {test.bound} [{label}; assumes {test.assumes}] {test.selection}{counted}")
    if test.epsilon_lower is not None and test.ceiling is not None:
        at_top = f"; {full}" if (full := console.at_ceiling(test)) else ""
        bound = f"eps >= {test.epsilon_lower:.4f} with confidence {test.confidence:g}"
        console.say(f"    {bound} (ceiling {test.ceiling:.4f}{at_top})")
    if test.p_value is not None:
        power = "not known" if test.power is None else f"{test.power:.0%} (earned by {test.control})"
        e = "" if test.e_value is None else f"; e = {test.e_value:.3g}"
        console.say(f"    p = {test.p_value:.3g}{e}; power {power}")
    if test.statement:
        console.say(f"    {test.statement}")
