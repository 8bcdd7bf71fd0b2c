"""The games of a run as a page shows them: what each was played on, what it could have found, and what it found."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dpaudit.documents import ABOUT, WITHOUT_COINS, AuditDocument, Claim, GameDocument, GameEntry, ScoreSummary, Test
from dpaudit.verdict import marked
from reports.inputs import RunReport
from reports.text import clean, number, percent

ON = {"weights": "the released weights", "procedure": "a retrained twin"}


@dataclass(frozen=True)
class GameRow:
    """One game in words. earned_by: controls. decides: the verdict rests on it, as far as it rests on one game."""

    entry: GameEntry
    about: str
    mechanism: str
    power: str
    controls: tuple[str, ...]
    earned_by: tuple[str, ...]
    decides: bool


def game_rows(run: RunReport) -> tuple[GameRow, ...]:
    """The games with coins, in the order of play."""
    if run.audit is None:
        return ()
    played = {game.name: game for game in run.games}
    first = decider(run)
    return tuple(
        GameRow(
            entry=entry,
            about=ABOUT[entry.about] + (" (a twin that was supplied)" if entry.supplied else ""),
            mechanism=mechanism(entry.claim),
            power="not earned" if entry.power is None else percent(entry.power, 0),
            controls=_controls(played.get(entry.name)),
            earned_by=_earned_by(played.get(entry.name)),
            decides=entry.name == first,
        )
        for entry in _with_coins(run)
    )


def _with_coins(run: RunReport) -> list[GameEntry]:
    assert run.audit is not None
    return [entry for entry in run.audit.games if entry.game not in WITHOUT_COINS]


def mechanism(claim: Claim | None) -> str:
    """sigma, q and T of what was attacked; a twin has its own."""
    if claim is None:
        return "no claim"
    parts = [f"sigma {number(claim.noise_multiplier, 4)}"] if claim.noise_multiplier is not None else []
    parts += [f"q {number(claim.sample_rate, 4)}"] if claim.sample_rate is not None else []
    parts += [f"T {claim.steps:,}"] if claim.steps is not None else []
    parts += [f"allocated over {claim.epoch_steps:,}"] if claim.epoch_steps is not None else []
    return ", ".join(parts) or f"eps {number(claim.epsilon)} at {number(claim.delta)} alone"


def _controls(game: GameDocument | None) -> tuple[str, ...]:
    if game is None:
        return ()
    if game.controls:
        return tuple(f"{item.name}: {item.outcome} ({clean(item.measured, 160)})" for item in game.controls)
    return tuple(dict.fromkeys(clean(test.control, 200) for test in game.tests if test.control is not None))


def _earned_by(game: GameDocument | None) -> tuple[str, ...]:
    """What earned the power, in a word or two each."""
    if game is None:
        return ()
    said = tuple(item.name for item in game.controls if item.outcome == "earned")
    return said or tuple(dict.fromkeys(clean(test.control, 80) for test in game.tests if test.control is not None))


def game_of(run: RunReport, test: Test) -> GameDocument | None:
    """The game that a test of the audit belongs to."""
    alpha = run.audit.alpha if run.audit is not None else 1.0
    return next((game for game in run.games if test in marked(game.tests, alpha)), None)


def decider(run: RunReport) -> str | None:
    """The game that says most: where the claim is refuted the largest evidence, else the largest earned power."""
    if run.audit is None:
        return None
    entries = _with_coins(run)
    if run.audit.verdict == "refuted":
        return max(entries, key=lambda entry: entry.log_evidence).name if entries else None
    earned = [entry for entry in entries if entry.power is not None]
    return max(earned, key=lambda entry: entry.power or 0.0).name if earned else None


def score_summaries(run: RunReport) -> tuple[tuple[ScoreSummary, GameDocument | None], ...]:
    """Summaries with the game that each belongs to, the deciding game's first; of a bare document without games."""
    if run.audit is None:
        return ()
    if not run.games:
        return tuple((summary, None) for summary in run.audit.scores)
    latest = {game.game: game for game in run.games if game.scores}
    first = decider(run)
    ordered = sorted(latest.values(), key=lambda game: game.name != first)
    return tuple((summary, game) for game in ordered for summary in game.scores)


def test_groups(run: RunReport) -> tuple[tuple[str | None, Sequence[Test]], ...]:
    """(name of the game, its tests as the judge marks them); one group without a name for a bare document."""
    if run.audit is None:
        return ()
    if not run.games:
        return ((None, run.audit.tests),) if run.audit.tests else ()
    return tuple((game.name, marked(game.tests, run.audit.alpha)) for game in run.games if game.tests)


def log_threshold(audit: AuditDocument) -> float:
    """The log evidence that refutes."""
    return -math.log(audit.alpha)


def next_step(run: RunReport) -> tuple[str, str] | None:
    """(command, why): the one thing to do next; an empty command where only the owner of the code can act.

    None for a bare document, about which nothing can be run. Commands run in the folder that holds the subjects.
    """
    name = shlex.quote(run.typed or run.name)
    if run.source == "scores" and run.verdict == "inconclusive":
        return "dpaudit scores FILE --control KNOWN", "scores of a game with a known leak can earn the power"
    if run.source != "run":
        return None
    if run.audit is None:
        return f"dpaudit audit {name}", "plays all games that this run allows"
    if run.verdict in ("invalid", "unsupported"):
        return "", f"fix or explain: {_first_fault(run)}"
    if run.claim is None:
        return "dpaudit train method=dp-sgd --dry-run", "states eps, noise and cost of a private training beforehand"
    return _of_claimed(run, name)


def _of_claimed(run: RunReport, name: str) -> tuple[str, str]:
    """For a run with a claim whose audit refuted, did not refute, or could not tell."""
    assert run.audit is not None and run.claim is not None
    played = {entry.game for entry in run.audit.games}
    contract = f"dpaudit audit {name} --contract"
    again = f"dpaudit audit {name} --white-box --again"
    if run.verdict == "inconclusive" and run.claim.sampling == "poisson":
        if "white-box" in played:
            return again, "plays once more with fresh coins; evidence of all games multiplies"
        return f"dpaudit audit {name} --white-box", "tests the noise itself, in a twin of the training"
    if run.audit.contract is None:
        why = (
            "shows which part of a step is wrong" if run.verdict == "refuted" else "tests one step of the training code"
        )
        return contract, why
    if run.verdict == "refuted":
        return "", f"fix the training and train again: {_first_fault(run)}"
    return f"dpaudit audit {name} --again", "plays again with fresh coins; evidence of all audits multiplies"


def _first_fault(run: RunReport) -> str:
    """What failed, the first that a reader should look at: checks of the game, private paths, the step contract."""
    assert run.audit is not None
    failed = [(check.name, check.explanation) for check in run.audit.validity.checks if check.status == "fail"]
    failed += [(row.path, row.explanation) for row in run.ledger if row.status == "UNACCOUNTED"]
    failed += [(f"control {item.name}", item.explanation) for item in run.audit.controls if item.broken]
    made = run.audit.contract.checks if run.audit.contract is not None else ()
    failed += [(check.name, check.measured) for check in made if check.status == "fail" and check.waived is None]
    if not failed:
        return "the game is unsound" if not run.audit.validity.sound else "what the tests found"
    name, why = failed[0]
    return f"{clean(name, 80)} ({clean(why, 160).rstrip('.')})"
