"""`dpaudit audit-model`: a model that is already trained, with its owner's coins."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    model: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or PEFT adapter trained elsewhere.")],
    base: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="The base model that it was fine-tuned from: a folder, or a hub id, which is fetched."
        ),
    ],
    records: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Table with id and image, question, answer, or with id and text or messages."
        ),
    ],
    coins: Annotated[
        Path, typer.Option(metavar="FILE", help="Table with id and member, the fair coins of the records.")
    ],
    epsilon: Annotated[float, typer.Option(help="The claimed eps.")],
    delta: Annotated[float, typer.Option(help="The claimed delta.")] = 1e-5,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Images by image_id, if stored separately.")
    ] = None,
    claim_sigma: Annotated[
        float | None, typer.Option(help="Claimed noise multiplier; makes the test stronger.")
    ] = None,
    claim_rate: Annotated[float | None, typer.Option(help="Claimed Poisson sample rate.")] = None,
    claim_steps: Annotated[int | None, typer.Option(help="Claimed number of steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the audit (default: nothing is written).")] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="EPS", help="Exit 1 when the best lower bound on eps exceeds EPS.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Joint confidence of all bounds.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Level of the claim test.")] = 0.001,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when the verdict is inconclusive.")] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Audit a model that is already trained, on records whose membership its owner decided by fair coins.

    Vision-language models and causal language models, as PEFT adapters or whole checkpoints. Records are Parquet or
    JSON Lines: id, image, question, answer; for text models (CSV too) id and text, messages, or prompt and completion.
    The coins must have been drawn before training. The score of a record is how far its loss lies below the loss that
    the base model predicts.
    """
    from attacks.external.options import ModelOptions
    from dpaudit import validate
    from dpaudit.cli import external
    from dpaudit.cli.audit import finish, typed

    if fail_above is not None:
        validate.real("--fail-above", fail_above, low=0.0, high=float("inf"))
    options = ModelOptions(
        model=model,
        base=base,
        records=records,
        coins=coins,
        images=images,
        epsilon=epsilon,
        delta=delta,
        sigma=claim_sigma,
        rate=claim_rate,
        steps=claim_steps,
        confidence=confidence,
        alpha=alpha,
        device=device,
        command=typed(model),
    )
    finish(external.model(options, out), as_json=as_json, strict=strict, fail_above=fail_above)
