"""The multi-run audit: many trainings, one canary that a fair coin puts in or leaves out of each.

Trainings are independent, so the classical bounds hold (Clopper-Pearson, Gaussian DP, with a threshold that is valid at
all thresholds at once), and the order-statistics test of the claim is exact: each coin passes through the claimed
mechanism by itself. Sampling and initial parameters are drawn anew for each run; the score of an untrained trainer with
the same seed takes out what the initialisation brought.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.canaries import Plan, coin_frame
from attacks.contract.loading import load_factory
from attacks.external.canaries import STATISTIC
from attacks.external.contents import fingerprint
from attacks.external.evidence import gather
from attacks.external.folder import AuditFolder
from attacks.external.options import LEAST_RUNS, TrainerOptions
from attacks.external.setting import Playing, Setting, seed_of
from attacks.games.played import Played
from attacks.games.reading import SIGMA_REDUCTION, finite
from attacks.scores import calibrate
from dpaudit import atomic, untrusted
from dpaudit.analysis.claim import claim_test, claimed_event
from dpaudit.analysis.plan import bound_guesses, plan
from dpaudit.analysis.scores import Options as ScoreOptions
from dpaudit.analysis.scores import independent_run_tests
from dpaudit.analysis.tables import ScoreTable
from dpaudit.documents import Claim, Test
from dpaudit.errors import UsageError
from dpaudit.executors import Executor
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers.progress import Reporter, Silent, StepReport

KIND = "run"
TITLE = "runs: one canary in or out of each"
SHARES = {"counts": 0.6, "bets": 0.3}  # of the evidence of the runs' coins; a tenth is not staked

Floats = npt.NDArray[np.float64]


class ManyRuns:
    """Trainings with one target, each with one fair, independent coin about it (the same target in all of them)."""

    name, label, kind = "many runs", "multi-run audit", KIND

    def __init__(self, setting: Setting, claim: Claim) -> None:
        count = setting.options.runs or LEAST_RUNS
        content = fingerprint(target_of(setting))
        heads = setting.key.uniform(count, step=0, name=KIND, purpose="coins") < 0.5
        self.frame = coin_frame((f"run-{index:05d}", KIND, bool(head), content) for index, head in enumerate(heads))
        self.guesses = guesses(count, claim, **setting.levels)

    @staticmethod
    def why_not(setting: Setting) -> str | None:
        """None when it can be played; otherwise why not."""
        return setting.no_records

    def play(self, at: Playing, confidence: float) -> tuple[Played, Claim]:
        """Train what is not trained yet."""
        setting, heads = at.setting, at.heads(KIND)
        steps, path = setting.steps, at.folder.path
        at.log(f"{len(heads)} trainings of {steps} steps; can be interrupted; --out {path} continues them")
        many = _on(at.executor, setting, at.folder, heads) if at.executor is not None else None
        scores, stated = train(setting, heads, at.folder.runs_log, at.reporter("runs"), many)
        frame, claim = at.scored(KIND, scores), setting.claim(stated)
        levels = {"confidence": confidence, "alpha": setting.options.alpha}
        read = partial(tests, frame["score"].to_numpy(), heads, at.coins.plan, claim, **levels)
        return at.read(frame, [], TITLE, read), claim


def guesses(runs: int, claim: Claim, *, alpha: float, confidence: float) -> dict[str, tuple[int, int]]:
    """Guesses of the claim test: from the number of runs and the claim alone."""
    if claimed_event(claim) is None:
        r = bound_guesses("order-statistic", canaries=runs, delta=claim.delta, confidence=confidence)
        return {KIND: (r - r // 2, r // 2)}
    row = plan(claim, canaries=runs, alpha=alpha, alternative=1 - SIGMA_REDUCTION, separate=True)
    return {KIND: (row.top, row.bottom)}


def target_of(setting: Setting) -> Any:
    """The canary whose membership is at stake in every run."""
    return setting.first.canaries(1, seed_of(setting.key, "target"))[0]


def train_one(setting: Setting, target: Any, index: int, member: bool) -> dict[str, Any]:
    """Run number `index`: {"run", "before", "after", "epsilon"}."""
    purpose = f"run {index}"
    before = setting.trainer(purpose).score(target)
    records = [*setting.records, target] if member else list(setting.records)
    subject = setting.trainer(purpose, records)
    for _, indices in setting.batches(subject, purpose, Silent()):
        subject.step(indices)
    stated = setting.stated_epsilon(subject)
    after = subject.score(target)
    return {"run": index, "before": _plain(before), "after": _plain(after), "epsilon": _plain(stated)}


def _plain(value: float | None) -> float | str | None:
    return value if value is None or np.isfinite(value) else str(float(value))


def job(payload: dict[str, Any]) -> dict[str, Any]:
    """`train_one` for an executor (dpaudit.executors): a process of its own; the key is in the folder of the audit."""
    options = TrainerOptions(**{**payload["options"], "audits": tuple(payload["options"]["audits"])})
    key = Key.load(RunFolder(Path(payload["folder"])).noise_key)
    factory = partial(load_factory(options.target, limit=options.time_limit), **options.arguments)
    setting = Setting.of(factory, options, key)
    return train_one(setting, target_of(setting), int(payload["run"]), bool(payload["member"]))


def _on(executor: Executor, setting: Setting, folder: AuditFolder, members: Any) -> Callable[[Any], Any]:
    """The trainings named, on an executor. A job reads the key where it lies: it is in no message to a cluster."""
    shared = {"options": dataclasses.asdict(setting.options), "folder": str(folder.path.resolve())}

    def run_all(indices: Any) -> Any:
        payloads = [{**shared, "run": index, "member": bool(members[index])} for index in indices]
        for outcome in executor.run("attacks.external.runs:job", payloads):
            if outcome.error is not None or outcome.result is None:
                raise outcome.failure(f"run {payloads[outcome.index]['run']}")
            yield outcome.result

    return run_all


def train(
    setting: Setting,
    members: npt.NDArray[np.bool_],
    log: Path,
    reporter: Reporter,
    run_all: Callable[[Sequence[int]], Any] | None = None,
) -> tuple[Floats, float | None]:
    """Train what `log` does not hold yet; returns the scores (runs,) and the eps stated after the last run.

    `log`: JSON lines, one a finished run, so that an interrupted audit continues. `run_all`: yields the
    results of the runs named, in any order (None: one after the other, here).
    """
    done = read_log(log, len(members))
    missing = [index for index in range(len(members)) if index not in done]
    if done:
        reporter.phase(f"{len(done)} of {len(members)} runs are there already")
    target = target_of(setting)
    results = run_all(missing) if run_all else (train_one(setting, target, i, bool(members[i])) for i in missing)
    for result in results:
        atomic.append_line(log, json.dumps(result))
        done[int(result["run"])] = result
        reporter.step(StepReport(len(done), len(members), None, None, None))
    reporter.close()
    rows = [done[index] for index in range(len(members))]
    before = finite(np.array([float(row["before"]) for row in rows]))
    after = finite(np.array([float(row["after"]) for row in rows]))
    stated = [row["epsilon"] for row in rows if row["epsilon"] is not None]
    scores = calibrate(-before, -after, np.full(len(rows), KIND))
    return scores, max(float(value) for value in stated) if stated else None


def read_log(log: Path, runs: int) -> dict[int, dict[str, Any]]:
    """Finished runs by number; a line torn by a kill is left out. UsageError for a file that is something else."""
    found: dict[int, dict[str, Any]] = {}
    if not log.is_file():
        return found
    lines = untrusted.read_text(log, untrusted.MOST_LOG, errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = untrusted.parse_json(line)
            index = int(row["run"])
            float(row["before"]), float(row["after"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise UsageError(f"{log}: line {number} is damaged; delete the folder and audit again") from None
        if 0 <= index < runs:
            found[index] = row
    return found


def tests(
    scores: Floats, members: npt.NDArray[np.bool_], plans: Plan, claim: Claim, *, confidence: float, alpha: float
) -> tuple[Test, ...]:
    """Bounds for independent runs, the exact claim test, and the e-value by which repeated audits merge."""
    ids = np.array([f"run-{index:05d}" for index in range(len(scores))])
    table = ScoreTable(ids, members, scores)
    found = independent_run_tests(table, ScoreOptions(delta=claim.delta, confidence=confidence, name=TITLE))
    top, bottom = plans.guesses[KIND]
    found += claim_test(
        scores,
        members,
        claim=claim,
        top=top,
        bottom=bottom,
        rng=np.random.default_rng([plans.tie_seed, 3]),
        alpha=alpha,
        share=SHARES["counts"],
        confidence=confidence,
        separate=True,
    )
    named = [test.model_copy(update={"name": TITLE, "statistic": STATISTIC}) for test in found]
    return (*named, _evidence(scores, members, named[0], claim))


def _evidence(scores: Floats, members: npt.NDArray[np.bool_], like: Test, claim: Claim) -> Test:
    found = gather(scores, members, claim)
    return like.model_copy(
        update={
            "bound": "e-process",
            "assumes": "none" if claimed_event(claim) is None else "claimed-mechanism",
            "selection": "each run guessed from the runs before it",
            "guesses": found.guesses,
            "correct": found.right,
            "epsilon_lower": None,
            "ceiling": None,
            "p_value": found.p_value,
            "statement": "each run is a bet of the runs before it; the e-values of repeated audits multiply",
            "e_value": found.e_value,
            "share": SHARES["bets"],
            "estimate": False,
            "decides": True,
        }
    )
