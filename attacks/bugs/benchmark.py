"""Every planted bug against every audit available, as one document."""

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from attacks.bugs.black_box import CanaryResult, canary_game
from attacks.bugs.game import ALPHA, release_game
from attacks.bugs.paths import PathRow
from attacks.bugs.row import Bug
from attacks.contract import run_checks, verdict
from attacks.contract.influence import ISOLATION, OUTSIDE, Bench
from attacks.contract.probe import Probe
from dpaudit.documents import Document, Part

REPLAY = (ISOLATION, OUTSIDE)


class BugRow(Part):
    """One planted bug and who caught it."""

    name: str
    catalogue: str = Field(description="Ids of the catalogue in docs/planted-bugs.md.")
    what: str
    source: str
    kind: str = Field(default="", description="Kind of fault, as in docs/planted-bugs.md.")
    effect: str | None = Field(default=None, description="What becomes of the guarantee.")
    seen_by: str | None = Field(default=None, description="The kind of audit that could see it at all.")
    violation: bool = Field(
        default=True, description="False: nothing leaks, but the training is not what it says, so a pass is wrong."
    )
    verdict: str | None = Field(default=None, description="Of the step contract: pass, fail or inconclusive.")
    caught: bool = Field(description="An audit says so; where nothing leaks, the contract does not say pass.")
    contract: tuple[str, ...] = Field(description="Checks of the step contract that failed.")
    isolation: bool = Field(description="Exact replay alone: another record, or one outside the batch, reaches a unit.")
    game_p: float | None = Field(description="p-value of the white-box release game; null = not played.")
    game: bool = Field(description="Whether the game refutes the claimed noise at its level.")
    canaries_p: float | None = Field(
        default=None, description="p-value of the black-box canary game (whole trainings); null = not played."
    )
    canaries: bool = Field(default=False, description="Whether that game refutes the claim at the same level.")
    why_not: str | None = Field(default=None, description="Why no audit can see it, where that is so.")
    seconds: float

    @property
    def stopped(self) -> bool:
        """Whether the step contract alone is enough: a check fails, or, where nothing leaks, it does not pass."""
        return bool(self.contract) or (not self.violation and self.verdict not in (None, "pass"))


class ControlRow(Part):
    """A correct trainer: no check may fail."""

    name: str
    seeds: int
    alarms: int
    verdicts: dict[str, int]
    game_alarms: int | None = Field(default=None, description="Of the statistical game; null = not played.")
    seconds: float


class BugsDocument(Document):
    """What `dpaudit bugs --json` prints."""

    kind: Literal["bugs"] = "bugs"
    bugs: tuple[BugRow, ...]
    caught: int
    caught_by_contract: int
    game_alpha: float = ALPHA
    controls: tuple[ControlRow, ...] = ()
    token_paths: tuple[PathRow, ...] = Field(
        default=(), description="The fusion audit on planted token paths, and on the correct one with each reducer."
    )


def add_canaries(done: BugRow, row: Bug, *, seed: int = 0) -> BugRow:
    """The row with the black-box canary game played."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        played = CanaryResult(False) if row.slow else canary_game(row.factory, seed=seed)
    caught = done.caught or played.caught
    return done.model_copy(
        update={
            "canaries_p": played.p_value if played.played else None,
            "canaries": played.caught,
            "caught": caught,
            "why_not": None if caught else row.out_of_reach,
            "seconds": round(done.seconds + time.monotonic() - began, 2),
        }
    )


def run_bug(row: Bug, *, seed: int = 0, game: bool = True) -> BugRow:
    """The contract, and the release game if asked for."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bug may divide by zero
        probe = Probe(row.factory, seed=seed, target=row.target)
        checks = run_checks(probe)
        outcome = verdict(checks)
        failed = tuple(check.name for check in checks if check.status == "fail")
        played = release_game(probe, Bench(probe), seed=seed) if game and not row.slow else None
    stopped = bool(failed) or (not row.violation and outcome != "pass")
    caught = stopped or (played is not None and played.caught)
    return BugRow(
        name=row.name,
        catalogue=row.catalogue,
        what=row.what,
        source=row.source,
        kind=row.kind,
        effect=row.effect,
        seen_by=row.seen_by,
        violation=row.violation,
        verdict=outcome,
        caught=caught,
        contract=failed,
        isolation=any(name in REPLAY for name in failed),
        game_p=played.p_value if played is not None and played.played else None,
        game=played is not None and played.caught,
        why_not=None if caught else row.out_of_reach,
        seconds=round(time.monotonic() - began, 2),
    )


def run_bugs(rows: Sequence[Bug], *, seed: int = 0, game: bool = True, canaries: bool = False) -> Iterator[BugRow]:
    """One after the other, so that a caller can show progress."""
    for row in rows:
        done = run_bug(row, seed=seed, game=game)
        yield add_canaries(done, row, seed=seed) if canaries else done


def document(
    rows: Sequence[BugRow], controls: Sequence[ControlRow] = (), token_paths: Sequence[PathRow] = ()
) -> BugsDocument:
    """The whole table."""
    return BugsDocument(
        bugs=tuple(rows),
        caught=sum(row.caught for row in rows),
        caught_by_contract=sum(row.stopped for row in rows),
        controls=tuple(controls),
        token_paths=tuple(token_paths),
    )
