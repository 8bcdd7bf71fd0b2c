"""`audit_model`: a checkpoint or adapter trained elsewhere, with its base, its records and its owner's coins.

Scores are losses against the base model, the tests those of a one-run game (attacks.games.reading). That the coins
were fair, independent and drawn before training is the owner's statement; dpaudit checks what can be checked: their
number, that ids match, that nothing has two coins, and that a classifier that never sees the model can't guess them.
What is read and scored depends on the model's type (attacks.external.kinds), which is looked at first.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.blind import blind_check
from attacks.canaries import Plan
from attacks.external.claims import ledger_rows
from attacks.external.folder import AuditFolder, settings_sha256
from attacks.external.kinds import Kind, kind_of
from attacks.external.options import ModelOptions
from attacks.external.records import join, read_coins
from attacks.games import reading
from attacks.games.played import Games, Played, sound
from attacks.games.white_box import wrong_claim
from attacks.scores import STATISTIC, calibrate
from dpaudit import atomic, folders, verdict
from dpaudit.analysis.scores import COIN_LEVEL, heads_p_value
from dpaudit.bounds.pld import check_dp_sgd
from dpaudit.documents import AuditDocument, Check, Claim, RunInfo
from dpaudit.errors import UsageError
from trainers import adapter_files, model_files

KIND = "record"
TITLE = "records with the owner's coins"
METHOD = "model trained elsewhere"
ADAPTER, WEIGHTS = adapter_files.SETTINGS, adapter_files.WEIGHTS

Floats = npt.NDArray[np.float64]


def audit_model(
    options: ModelOptions, out: Path | None = None, *, log: Callable[[str], None] = lambda _: None
) -> AuditDocument:
    """Audit the model and return the document; with `out` it is written to OUT/release/audit.json.

    Raises UsageError (one line that names the option and what is wrong) before anything is computed.
    """
    if out is not None:
        folders.require_outside("--out", out, str(options.model), options.base)
    check_model_folder(options.model)
    kind = kind_of(options)
    claim = claim_of(options, kind.unit)
    units: dict[str, Any] = kind.read()
    coins, coins_sha256 = join(units, read_coins(options.coins)), atomic.sha256_file(options.coins)
    twice = kind.shared(units)
    member = dict(zip(coins["id"], coins["member"], strict=True))
    torn = sum(member[first] != member[second] for first, second in twice)
    for first, second in twice[:3]:
        log(f"warning: ids {first!r} and {second!r} hold the same {kind.thing}")
    levels = {"confidence": options.confidence, "alpha": options.alpha}
    plan = Plan(reading.planned(KIND, len(coins), claim, **levels), options.seed, reading.SIGMA_REDUCTION)
    checks = _checks(kind, list(units.values()), coins, coins_sha256, (len(twice), torn), options.seed)
    settings = _settings(options, coins_sha256)
    folder = None if out is None else AuditFolder.take(out, "model", settings)
    if folder is not None:
        atomic.write_text(folder.run.private / "plan.json", plan.to_json() + "\n", mode=0o600)
    wrong = wrong_claim(claim, reading.SIGMA_REDUCTION) if options.sigma is not None else None
    about: dict[str, Any] = {"coins_sha256": coins_sha256, "alternative": wrong}
    played = Played(sound(checks), **about)
    if played.validity.sound:
        frame = coins.assign(score=_scores(kind, list(units.values()), log))
        if folder is not None:
            folder.save_scores(KIND, frame)
        frame = frame.assign(kind=KIND)
        words = {"title": TITLE, "statistic": STATISTIC}
        at: dict[str, Any] = {**levels, **words, "confidence": verdict.confidence_of(1, options.confidence)}
        tests = partial(reading.one_kind_tests, frame, plan, claim=claim, **at)
        played = reading.read_scores(frame, checks, tests, title=TITLE, **about)
    games = Games(None if folder is None else folder.run, options.alpha, options.command)
    games.keep("owner's coins", played, about="weights", claim=claim)
    document = verdict.document(
        run=RunInfo(
            name=options.model.resolve().name,
            method=METHOD,
            config_sha256=settings_sha256(settings),
            coins_sha256=coins_sha256,
            command=options.command,
        ),
        claim=claim,
        alpha=options.alpha,
        confidence=options.confidence,
        games=games.documents,
        ledger=ledger_rows(claim),
    )
    if folder is not None:
        folder.finish(document, claim, ())
    return document


def claim_of(options: ModelOptions, unit: str) -> Claim:
    """--epsilon and --delta, with the mechanism where all of it is given."""
    claim = Claim(epsilon=options.epsilon, delta=options.delta, relation="add-remove", unit=unit)
    flags = {"--claim-sigma": options.sigma, "--claim-rate": options.rate, "--claim-steps": options.steps}
    if all(value is None for value in flags.values()):
        return claim
    for flag, value in flags.items():
        if value is None:
            raise UsageError(f"{flag}: missing; a mechanism needs --claim-sigma, --claim-rate and --claim-steps")
    assert options.sigma is not None and options.rate is not None and options.steps is not None
    sigma, rate, steps = check_dp_sgd(options.sigma, options.rate, options.steps)
    mechanism = {"noise_multiplier": sigma, "sampling": "poisson", "sample_rate": rate, "steps": steps}
    return claim.model_copy(update=mechanism)


def check_model_folder(path: Path) -> None:
    """Raise UsageError unless `path` holds a whole adapter or checkpoint in safetensors."""
    if not path.is_dir():
        raise UsageError(f"--model {path}: no such folder")
    if (path / "release" / "model").is_dir():
        raise UsageError(f"--model {path}: is a run folder of dpaudit; dpaudit audit {path}")
    adapter = any((path / name).exists() for name in (ADAPTER, WEIGHTS, adapter_files.PICKLED))
    if adapter:
        adapter_files.check(path, "--model")
    elif (path / "config.json").exists():
        model_files.check(path, "--model")
    else:
        raise UsageError(f"--model {path}: holds neither {ADAPTER} (a PEFT adapter) nor config.json (a checkpoint)")


def _scores(kind: Kind[Any, Any], units: list[Any], log: Callable[[str], None]) -> Floats:
    before, after = kind.scores(units, log)
    for flag, values in (("--base", before), ("--model", after)):
        if not np.isfinite(values).all():
            raise UsageError(f"{flag}: its loss on {int((~np.isfinite(values)).sum())} records is not a finite number")
    if np.allclose(before, after, rtol=1e-6, atol=1e-7):
        raise UsageError("--model: answers every record exactly as --base does; was it saved before training?")
    return calibrate(before, after, np.full(len(units), KIND))


def _checks(
    kind: Kind[Any, Any], units: list[Any], coins: pd.DataFrame, coins_sha256: str, repeated: tuple[int, int], seed: int
) -> list[Check]:
    members = coins["member"].to_numpy(dtype=bool)
    inside, count = int(members.sum()), len(members)
    pairs, torn = repeated
    p = heads_p_value(inside, count)
    return [
        Check(
            name="coins",
            status="fail" if p < COIN_LEVEL else "pass",
            measured=f"{inside} of {count} in (p = {p:.2g}); SHA-256 {coins_sha256[:16]}…",
            allowed=f"p >= {COIN_LEVEL:g} for fair independent coins",
            explanation="That each coin was a fair toss of its own before training is the owner's statement; so many "
            f"heads are {'not ' if p < COIN_LEVEL else ''}plausible for it.",
        ),
        Check(
            name=f"{kind.thing}s differ",
            status="fail" if pairs else "pass",
            measured=f"{pairs} pair{'s' * (pairs != 1)} of ids hold{'s' * (pairs == 1)} the same {kind.thing}"
            + (f", {torn} with different coins and {pairs - torn} with equal ones" if pairs else ""),
            allowed="0",
            explanation=_repeated(kind.thing, pairs, torn),
        ),
        blind_check(kind.features(units), members, seed=seed, what="records"),
    ]


def _repeated(thing: str, pairs: int, torn: int) -> str:
    """What things under two ids mean, by whether their coins agree."""
    said = []
    if torn:
        said.append(f"A {thing} whose ids have different coins is in and out at the same time.")
    if pairs > torn:
        said.append(
            f"A {thing} whose ids have equal coins is a group: it is trained on twice or not at all, and counts as two "
            "tosses."
        )
    return " ".join([*said, "Rows of one person share one id."]) if said else f"No {thing} has two ids."


def _settings(options: ModelOptions, coins_sha256: str) -> dict[str, Any]:
    weights = {file.name: atomic.sha256_file(file) for file in sorted(options.model.glob("*.safetensors"))}
    numbers = {"epsilon": options.epsilon, "delta": options.delta, "seed": options.seed}
    mechanism = {"sigma": options.sigma, "rate": options.rate, "steps": options.steps}
    return {**numbers, **mechanism, "model": weights, "base": Path(options.base).name, "coins": coins_sha256}
