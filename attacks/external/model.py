"""`audit_model`: a checkpoint or adapter trained elsewhere, with its base, its records and its owner's coins.

Scores are losses against the base model, the tests those of a one-run game (attacks.external.one_run). That the coins
were fair, independent and drawn before training is the owner's statement; dpaudit checks what can be checked: their
number, that ids match, that no picture has two coins, and that a classifier that never sees the model can't guess them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtr

from attacks.blind import blind_baseline
from attacks.canaries import Plan
from attacks.external.claims import ledger_rows
from attacks.external.folder import AuditFolder, settings_sha256
from attacks.external.options import ModelOptions
from attacks.external.records import join, read_coins, read_units, shared_pictures
from attacks.games import reading
from attacks.games.gradients import wrong_claim
from attacks.games.played import Played
from attacks.scores import STATISTIC, calibrate, losses
from dpaudit import atomic, record, verdict
from dpaudit.analysis.scores import COIN_LEVEL, sign_check
from dpaudit.blind import LEAST
from dpaudit.bounds.pld import check_dp_sgd
from dpaudit.bounds.roc import summarise
from dpaudit.documents import AuditDocument, Check, Claim, GameDocument, RunInfo, ScoreSummary, Test, Validity
from dpaudit.errors import UsageError
from trainers import adapter_files, model_files
from trainers.data.local import PICTURE_UNIT
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel, told_as

KIND = "record"
SHARE = 0.9  # of the evidence of the coins; a tenth is not staked
TITLE = "records with the owner's coins"
METHOD = "model trained elsewhere"
ADAPTER, WEIGHTS = adapter_files.SETTINGS, adapter_files.WEIGHTS

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Files:
    """What was read, before any model is loaded."""

    units: dict[str, Unit]
    coins: pd.DataFrame
    coins_sha256: str


def audit_model(
    options: ModelOptions, out: Path | None = None, *, log: Callable[[str], None] = lambda _: None
) -> AuditDocument:
    """Audit the model and return the document; with `out` it is written to OUT/release/audit.json.

    Raises UsageError (one line that names the option and what is wrong) before anything is computed.
    """
    check_model_folder(options.model)
    claim = claim_of(options)
    units = read_units(options.records, options.images)
    files = _Files(units, join(units, read_coins(options.coins)), atomic.sha256_file(options.coins))
    for first, second in shared_pictures(units)[:3]:
        log(f"warning: ids {first!r} and {second!r} show the same picture")
    count = len(files.coins)
    planned = reading.planned(KIND, count, claim, confidence=options.confidence, alpha=options.alpha)
    plan = Plan(planned, options.seed, reading.SIGMA_REDUCTION)
    validity = _validity(files, options.seed)
    settings = _settings(options, files)
    folder = None if out is None else AuditFolder.take(out, "model", settings)
    if folder is not None:
        atomic.write_text(folder.run.private / "plan.json", plan.to_json() + "\n", mode=0o600)
    scores = _scores(options, list(units.values()), log) if validity.sound else None
    document, game = _document(options, claim, files, plan, validity, scores, settings)
    if folder is not None:
        if scores is not None:
            folder.save_scores(KIND, files.coins.assign(score=scores))
        record.add(folder.run, game)
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


def _validity(files: _Files, seed: int) -> Validity:
    members = files.coins["member"].to_numpy(dtype=bool)
    pairs = len(shared_pictures(files.units))
    checks = [
        _coins(files, int(members.sum()), len(members)),
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
    ]
    found = blind_baseline(list(files.units.values()), members, seed=seed)
    if found is not None:
        checks.append(found.check())
    else:
        checks.append(
            Check(
                name="blind baseline",
                status="not applicable",
                measured=f"{len(members)} records",
                allowed=f"at least {LEAST}, of both classes",
                explanation="Too few records to fit a classifier that never sees the model.",
            )
        )
    return Validity(sound=all(check.status != "fail" for check in checks), checks=tuple(checks))


def _coins(files: _Files, inside: int, count: int) -> Check:
    # Normal approximation with continuity correction: at 1e-6 it only decides gross cases (as in dpaudit scores).
    far = max(0.0, abs(inside - count / 2) - 0.5) / (0.5 * np.sqrt(count))
    p = 2 * float(ndtr(-far))
    return Check(
        name="coins",
        status="fail" if p < COIN_LEVEL else "pass",
        measured=f"{inside} of {count} in (p = {p:.2g}); SHA-256 {files.coins_sha256[:16]}…",
        allowed=f"p >= {COIN_LEVEL:g} for fair independent coins",
        explanation="That each coin was a fair toss of its own before training is the owner's statement; so many heads "
        + ("are not plausible for it." if p < COIN_LEVEL else "are plausible for it."),
    )


def _settings(options: ModelOptions, files: _Files) -> dict[str, Any]:
    weights = {file.name: atomic.sha256_file(file) for file in sorted(options.model.glob("*.safetensors"))}
    numbers = {"epsilon": options.epsilon, "delta": options.delta, "seed": options.seed}
    mechanism = {"sigma": options.sigma, "rate": options.rate, "steps": options.steps}
    return {**numbers, **mechanism, "model": weights, "base": Path(options.base).name, "coins": files.coins_sha256}


def _document(
    options: ModelOptions,
    claim: Claim,
    files: _Files,
    plan: Plan,
    validity: Validity,
    scores: Floats | None,
    settings: dict[str, Any],
) -> tuple[AuditDocument, GameDocument]:
    members = files.coins["member"].to_numpy(dtype=bool)
    tests: tuple[Test, ...] = ()
    summaries: tuple[ScoreSummary, ...] = ()
    if scores is not None:
        turned = sign_check(scores, members)
        validity = Validity(sound=validity.sound and turned.status != "fail", checks=(*validity.checks, turned))
    if scores is not None and validity.sound:
        frame = files.coins.assign(kind=KIND, score=scores)
        words = {"title": TITLE, "statistic": STATISTIC}
        confidence = verdict.confidence_of(1, options.confidence)
        guesses = Plan({"all": plan.guesses[KIND], **plan.guesses}, plan.tie_seed)
        tests = (
            *reading.bound_tests(frame, guesses, confidence=confidence, delta=claim.delta, **words),
            *reading.claim_tests(
                frame,
                guesses,
                claim=claim,
                confidence=confidence,
                alpha=options.alpha,
                share=SHARE,
                key=reading.claim_key(KIND),
                **words,
            ),
        )
        tests = tuple(test.model_copy(update={"name": TITLE}) for test in tests)
        summaries = (summarise(TITLE, scores, members),)
    found = wrong_claim(claim, reading.SIGMA_REDUCTION) if options.sigma is not None else None
    played = Played(validity, tests, scores=summaries, coins_sha256=files.coins_sha256, alternative=found)
    game = played.document(
        "owner's coins",
        number=1,
        previous_sha256=None,
        about="weights",
        claim=claim,
        alpha=options.alpha,
        command=options.command,
    )
    document = verdict.document(
        run=RunInfo(
            name=options.model.resolve().name,
            method=METHOD,
            config_sha256=settings_sha256(settings),
            coins_sha256=files.coins_sha256,
            command=options.command,
        ),
        claim=claim,
        alpha=options.alpha,
        confidence=options.confidence,
        games=[game],
        ledger=ledger_rows(claim),
    )
    return document, game
