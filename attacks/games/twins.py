"""Twins: trainings of the audited configuration that this audit makes itself, with coins of its own.

A twin lies in the run's folder under the first name that is free; nothing that lies there already is deleted, and a
twin that was not trained by this audit is never taken for one that was.
"""

import hashlib
import os
from pathlib import Path

from attacks.canaries import save_coins
from attacks.games.directions import Kind
from attacks.games.gradients import WORDS, GradientGame
from attacks.games.played import Played
from attacks.games.white_box import read_game
from attacks.membership.stacked import initial_adapter
from attacks.training import open_run
from dpaudit import atomic, folders, stated
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import Claim, LedgerDocument
from dpaudit.errors import UsageError
from dpaudit.runs import RunFolder
from trainers.plan import Inserted, make_plan
from trainers.progress import Reporter
from trainers.run import train

PLAYED = ("poisson", "allocation")  # schemes in which each unit's steps are drawn by itself


def free(run: RunFolder, name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3, … in the run's folder that does not exist."""
    numbered = (run.path / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in numbered if not path.exists() and not path.is_symlink())


def config_of(config: RunConfig, place: Path) -> RunConfig:
    """The configuration of a twin in `place`: a seed gives every twin coins and noise of its own, which the product of
    their evidence needs."""
    if config.seed is None:
        return config
    digest = hashlib.sha256(f"{config.seed}: {place.name}".encode()).digest()
    return config.model_copy(update={"seed": int.from_bytes(digest[:4], "big") >> 1})


def latest(run: RunFolder, name: str) -> Path | None:
    """The last of NAME, NAME-2, … that exists without a gap; None without any."""
    found, number = None, 1
    while os.path.lexists(path := run.path / (name if number == 1 else f"{name}-{number}")):
        folders.require_own(path)
        found, number = path, number + 1
    return found


def require_stated(config: RunConfig, claim: Claim | None, ledger: LedgerDocument) -> None:
    """UsageError where a claim is not its configuration's, or has no price: what nobody claimed is not trained again.

    config: of the run that a twin is wanted of, which may have come with any number of steps.
    """
    for row in stated.rows(claim, config, ledger=ledger) if config.method != "non-private" else ():
        if row.path != stated.COST_ROW or (claim is not None and stated.cost(claim).epsilon is None):
            raise UsageError(f"no twin is trained: {row.explanation} {row.evidence}")


def refusal(sampling: str) -> str:
    """Why a run of another scheme is not played: its canaries' steps depend on those of other units."""
    return (
        f"--white-box: training.sampling={sampling}; accepted: {', '.join(PLAYED)}, whose likelihood ratios the game "
        "knows (the other audits judge this run)"
    )


def play_white_box(
    config: RunConfig,
    place: Path,
    *,
    count: int,
    confidence: float,
    alpha: float,
    directions: Kind = "orthogonal",
    final: bool = False,
    reporter: Reporter | None = None,
) -> tuple[Played, Claim]:
    """Train the white-box twin of a configuration in `place` and read the game. Needs a claim with Gaussian noise.

    What is seen of the steps is not part of the twin's checkpoints: an interrupted twin is left as it is, and the next
    audit trains another one. Scores of the candidates stay in the twin's private part.
    """
    plain = config.model_copy(update={"canaries": config.canaries.model_copy(update={"count": 0})})
    with open_run(plain, place, candidates=count) as (run, key, dataset, model):
        plan = make_plan(plain, dataset, count)
        claim = plan.claim
        if claim is None:
            raise UsageError("--white-box: the run makes no claim, so there is no mechanism to audit")
        if plan.sampling not in PLAYED:
            raise UsageError(refusal(plan.sampling))
        game = GradientGame(
            count,
            key,
            plan.max_grad_norm,
            plan.noise_multiplier,
            plan.sample_rate,
            plan.expected_batch_size,
            directions=directions,
            final=final,
            epoch=claim.epoch_steps,
            predicted=False,
        )
        digest = save_coins(run.coins, game.frame(), game.plan)
        inserted = Inserted(count, (), digest, f"They are gradients along {WORDS[directions]} directions, not records.")
        train(
            plain,
            run,
            key=key,
            dataset=dataset,
            model=model,
            inserted=inserted,
            reporter=reporter,
            injection=game,
        )
        if final:
            game.see_final(initial_adapter(model, key), model.adapter_parameters())
        if game.unreadable is None:
            frame = game.frame()[["id", "kind", "member"]].assign(score=game.scores())
            atomic.write_frame(run.scores, frame, mode=0o600)
    return read_game(game, claim, confidence=confidence, alpha=alpha, coins_sha256=digest), claim


def canary_twin(config: RunConfig, count: int) -> RunConfig:
    """The configuration of a twin. A local set without a reserve has no record to mislabel: the kind is left out."""
    tree = config.model_dump(mode="json", by_alias=True)
    chosen = [
        kind
        for kind in config.canaries.kinds
        if kind != "mislabelled"
        or config.data.reserve
        or (config.data.path is None and config.data.name in (None, "digits"))
    ]
    tree["canaries"] = {"count": count, "kinds": chosen}
    return resolve(tree)
