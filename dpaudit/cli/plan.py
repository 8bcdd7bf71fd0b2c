"""`dpaudit plan`: how many canaries it takes to refute a wrong claim, before any training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpaudit.cli import console

if TYPE_CHECKING:
    from dpaudit.analysis.plan import PlanDocument

THEORIES = {
    "exact-likelihood": "the white-box game as it is played, with its directions that hold no canary",
    "order-statistic": "score files whose canaries act on separate directions",
    "f-dp": "any canaries, whatever they do to each other",
}


def command(
    claim_sigma: Annotated[float | None, typer.Option(help="Claimed noise multiplier; required.")] = None,
    claim_rate: Annotated[
        float | None, typer.Option(help="Claimed Poisson sample rate (1: all records in every step); required.")
    ] = None,
    claim_steps: Annotated[int | None, typer.Option(help="Claimed number of steps; required.")] = None,
    claim_epoch: Annotated[
        int | None, typer.Option(help="Steps per epoch of random allocation (default: Poisson sampling).")
    ] = None,
    alternative: Annotated[
        str, typer.Option(help="Alternative to detect: 30% (sigma smaller by that much), noise-missing, no-dp.")
    ] = "30%",
    canaries: Annotated[str, typer.Option(help="Numbers of canaries to compare, separated by commas.")] = (
        "50,100,200,500,1000,2000,5000,10000"
    ),
    delta: Annotated[float, typer.Option(help="delta of the claim.")] = 1e-5,
    alpha: Annotated[float, typer.Option(help="Level of the claim test.")] = 0.001,
    confidence: Annotated[float, typer.Option(help="Confidence of the bounds.")] = 0.95,
    figure: Annotated[Path | None, typer.Option(help="Also draw power over canaries: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Plan an audit: number of guesses, power and expected p-value for a claim and an alternative.

    The power is that of an ideal attack, an upper limit for a real one. Fix the number of guesses of the row that you
    use before training; it then needs no correction.
    """
    from dpaudit import validate
    from dpaudit.analysis import plan
    from dpaudit.analysis.stating import stated_claim
    from dpaudit.cli import external

    needed: dict[str, object] = {"--claim-sigma": claim_sigma, "--claim-rate": claim_rate, "--claim-steps": claim_steps}
    external.required(needed, "e.g. dpaudit plan --claim-sigma 1.0 --claim-rate 0.05 --claim-steps 200")
    sizes = parse_sizes(canaries)
    level = validate.real("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
    mechanism = {"sigma": claim_sigma, "rate": claim_rate}
    claim = stated_claim(**mechanism, steps=claim_steps, epoch=claim_epoch, delta=delta, named=console.claim_flag)
    assert claim is not None
    document = plan.document(
        claim,
        alpha=level,
        alternative=plan.parse_alternative(alternative),
        sizes=sizes,
        confidence=validate.confidence(confidence),
    )
    if figure is not None:
        draw(document, figure)
        console.log(f"figure: {figure}")
    if as_json:
        console.emit(document)
    else:
        show(document, confidence)


def parse_sizes(text: str) -> list[int]:
    """'100,1000' as ascending whole numbers."""
    from dpaudit import validate
    from dpaudit.errors import rejected

    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise rejected("--canaries", text, "whole numbers separated by commas") from error
    return [validate.count("--canaries", size, least=1, most=1_000_000) for size in sizes]


def show(document: "PlanDocument", confidence: float) -> None:
    """The plan for people."""
    claim = document.claim
    console.say(
        f"Claim: eps = {claim.epsilon:.3f} at delta = {claim.delta:g} (sigma {claim.noise_multiplier:g}, "
        f"q {claim.sample_rate:g}, T {claim.steps}, {claim.sampling}, {claim.relation})"
    )
    console.say(f"Alternative: {document.alternative}; claim test at alpha = {document.alpha:g}")
    for theory, meaning in THEORIES.items():
        console.say("")
        console.say(f"{theory}: {meaning}")
        console.say(f"  {'canaries':>9} {'top':>7} {'bottom':>7} {'power':>7}  expected p")
        for row in document.rows:
            if row.theory == theory:
                top, bottom = ("-" if side is None else side for side in (row.top, row.bottom))
                expected = "-" if row.expected_p is None else f"{row.expected_p:.2g}"
                console.say(f"  {row.canaries:>9} {top:>7} {bottom:>7} {row.power:>7.1%}  {expected}")
        needed = document.canaries_needed[theory]
        console.say(
            "  80 % power: " + (f"{needed} canaries" if needed else f"more than {document.rows[-1].canaries} canaries")
        )
    exceed = document.guesses_to_exceed
    console.say(
        f"\nA bound that assumes nothing passes the claimed eps with confidence {confidence:g} only with "
        + (f"{exceed} guesses, all right." if exceed else "more guesses than any game has.")
    )
    console.say("Power of counted guesses is that of an ideal attack; a real one finds less.")
    console.say(console.LIMIT_SENTENCE)


def draw(document: "PlanDocument", path: Path) -> None:
    """Power over the number of canaries, one line per theory."""
    from dpaudit.errors import EnvironmentFailure, rejected

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise rejected("--figure", str(path), "a file name that ends in .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (theory, meaning), marker in zip(THEORIES.items(), "Dos", strict=True):
        rows = [row for row in document.rows if row.theory == theory]
        axes.plot([r.canaries for r in rows], [r.power for r in rows], marker=marker, label=f"{theory}: {meaning}")
    axes.axhline(0.8, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="canaries", ylabel=f"power at alpha = {document.alpha:g}", ylim=(-0.02, 1.02))
    axes.set_title(f"Ideal attack, if {document.alternative}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise EnvironmentFailure(f"--figure {path}: can't be written ({error})") from error
    finally:
        plt.close(figure)
