"""`dpaudit bound`: the bounds as a calculator."""

from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="clopper-pearson, gdp, bayes, steinke, mahloujifar or order-statistic."),
    ],
    tp: Annotated[int | None, typer.Option(help="Runs with the record, detected (true positives).")] = None,
    fn: Annotated[int | None, typer.Option(help="Runs with the record, missed (false negatives).")] = None,
    fp: Annotated[int | None, typer.Option(help="Runs without the record, flagged (false positives).")] = None,
    tn: Annotated[int | None, typer.Option(help="Runs without the record, not flagged (true negatives).")] = None,
    canaries: Annotated[int | None, typer.Option(help="Number of records with a coin (m).")] = None,
    guesses: Annotated[int | None, typer.Option(help="Number of guesses, fixed beforehand (r).")] = None,
    correct: Annotated[int | None, typer.Option(help="Number of correct guesses.")] = None,
    errors: Annotated[int | None, typer.Option(help="Number of wrong guesses.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="q: assume DP-SGD with this sample rate instead of one Gaussian release.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="T: number of steps of that DP-SGD.")] = None,
    delta: Annotated[float, typer.Option(help="delta of the (eps, delta) that is bounded.")] = 1e-5,
    confidence: Annotated[float, typer.Option(help="Confidence of the bound.")] = 0.95,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Calculate a lower bound on eps from counts, with its ceiling and what it assumes.

    clopper-pearson, gdp and bayes take --tp --fn --fp --tn of independent runs; steinke and mahloujifar take --canaries
    --guesses --correct of one run; order-statistic takes --canaries --guesses --errors [--sample-rate --steps].
    """
    from dpaudit.bounds.calculator import ASSUMPTIONS, compute

    arguments: dict[str, float | int | None] = {
        "tp": tp,
        "fn": fn,
        "fp": fp,
        "tn": tn,
        "canaries": canaries,
        "guesses": guesses,
        "correct": correct,
        "errors": errors,
        "sample-rate": sample_rate,
        "steps": steps,
    }
    result = compute(method, arguments, delta=delta, confidence=confidence)
    if as_json:
        console.emit(result)
        return
    console.say(f"eps >= {result.epsilon_lower:.4f} at delta = {delta:g}, confidence {confidence:g} ({method})")
    console.say(f"ceiling: {result.ceiling:.4f} (the largest eps that these numbers could have shown)")
    console.say(ASSUMPTIONS[result.assumes])
    if method == "order-statistic":
        console.say("exact for canaries on separate directions of the noise, no theorem for canaries that interfere")
    if result.epsilon_lower > 0 and result.epsilon_lower >= result.ceiling * (1 - 1e-6):
        console.say(
            "Every guess was right: eps may be larger than this test can measure; more canaries or runs are needed."
        )
    console.say(console.LIMIT_SENTENCE)
