"""`audit_model`: a checkpoint or adapter trained elsewhere, with its base, its records and its owner's coins.

Scores are losses against the base model, the tests those of a one-run game (attacks.games.reading). That the coins
were fair, independent and drawn before training is the owner's statement; dpaudit checks what can be checked: their
number, that ids match, that no picture has two coins, and that a classifier that never sees the model can't guess them.
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
from attacks.external.options import ModelOptions
from attacks.external.records import join, read_coins, read_units, shared_pictures
from attacks.games import reading
from attacks.games.played import Games, Played, sound
from attacks.games.white_box import wrong_claim
from attacks.scores import STATISTIC, calibrate, losses
from dpaudit import atomic, verdict
from dpaudit.analysis.scores import COIN_LEVEL, heads_p_value
from dpaudit.bounds.pld import check_dp_sgd
from dpaudit.documents import AuditDocument, Check, Claim, RunInfo
from dpaudit.errors import UsageError
from trainers import adapter_files, model_files
from trainers.data.local import PICTURE_UNIT
from trainers.opened import told_as
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

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
    check_model_folder(options.model)
    claim = claim_of(options)
    units = read_units(options.records, options.images)
    coins, coins_sha256 = join(units, read_coins(options.coins)), atomic.sha256_file(options.coins)
    twice = shared_pictures(units)
    for first, second in twice[:3]:
        log(f"warning: ids {first!r} and {second!r} show the same picture")
    levels = {"confidence": options.confidence, "alpha": options.alpha}
    plan = Plan(reading.planned(KIND, len(coins), claim, **levels), options.seed, reading.SIGMA_REDUCTION)
    checks = _checks(list(units.values()), coins, coins_sha256, len(twice), options.seed)
    settings = _settings(options, coins_sha256)
    folder = None if out is None else AuditFolder.take(out, "model", settings)
    if folder is not None:
        atomic.write_text(folder.run.private / "plan.json", plan.to_json() + "\n", mode=0o600)
    wrong = wrong_claim(claim, reading.SIGMA_REDUCTION) if options.sigma is not None else None
    about: dict[str, Any] = {"coins_sha256": coins_sha256, "alternative": wrong}
    played = Played(sound(checks), **about)
    if played.validity.sound:
        frame = coins.assign(score=_scores(options, list(units.values()), log))
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


def claim_of(options: ModelOptions) -> Claim:
    """--epsilon and --delta, with the mechanism where all of it is given."""
    claim = Claim(epsilon=options.epsilon, delta=options.delta, relation="add-remove", unit=PICTURE_UNIT)
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


def _load_base(options: ModelOptions) -> VisionLanguageModel:
    """--base: typed by the auditor, so that a hub id may be fetched."""
    source = None if options.base == "reference" else options.base
    return VisionLanguageModel.load(source, device=options.device, fetch=True, flag="--base")


def load_trained(options: ModelOptions) -> VisionLanguageModel:
    """The trained model: --base with the adapter on top, or the checkpoint. UsageError when they don't fit together."""
    base = _load_base(options)
    if (options.model / ADAPTER).is_file():
        base.load_adapter(options.model, "--model")
        return base
    model = VisionLanguageModel.load(str(options.model.resolve()), device=options.device, flag="--model")
    ours, theirs = ({name: tuple(value.shape) for name, value in item.hf.named_parameters()} for item in (model, base))
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if different:
        raise UsageError(
            f"--base {options.base}: is not what --model was fine-tuned from: {len(different)} weights differ in name "
            f"or shape, the first is {different[0]}"
        )
    return model


def _scores(options: ModelOptions, units: list[Unit], log: Callable[[str], None]) -> Floats:
    log(f"losses of {len(units)} records under the base model")
    base = _load_base(options)
    with told_as("--base: can't be run on the records"):
        before = losses(base, units)
    del base
    log("losses under the trained model")
    trained = load_trained(options)
    with told_as("--model: can't be run on the records"):
        after = losses(trained, units)
    for flag, values in (("--base", before), ("--model", after)):
        if not np.isfinite(values).all():
            raise UsageError(f"{flag}: its loss on {int((~np.isfinite(values)).sum())} records is not a finite number")
    if np.allclose(before, after, rtol=1e-6, atol=1e-7):
        raise UsageError("--model: answers every record exactly as --base does; was it saved before training?")
    return calibrate(before, after, np.full(len(units), KIND))


def _checks(units: list[Unit], coins: pd.DataFrame, coins_sha256: str, pairs: int, seed: int) -> list[Check]:
    members = coins["member"].to_numpy(dtype=bool)
    inside, count = int(members.sum()), len(members)
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
            name="pictures differ",
            status="fail" if pairs else "pass",
            measured=f"{pairs} pictures under more than one id",
            allowed="0",
            explanation="The unit is the picture with all its questions: one picture with two coins is in and out at "
            "the same time."
            if pairs
            else "No picture has two coins (compared by pixels).",
        ),
        blind_check(units, members, seed=seed, what="records"),
    ]


def _settings(options: ModelOptions, coins_sha256: str) -> dict[str, Any]:
    weights = {file.name: atomic.sha256_file(file) for file in sorted(options.model.glob("*.safetensors"))}
    numbers = {"epsilon": options.epsilon, "delta": options.delta, "seed": options.seed}
    mechanism = {"sigma": options.sigma, "rate": options.rate, "steps": options.steps}
    return {**numbers, **mechanism, "model": weights, "base": Path(options.base).name, "coins": coins_sha256}
