"""What a game returns: what was tossed, what was seen, what its controls showed. No verdict."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from dpaudit import record, verdict
from dpaudit.documents import (
    WITHOUT_COINS,
    About,
    AttackRow,
    Check,
    Claim,
    Control,
    Extraction,
    GameDocument,
    Regeneration,
    ScoreSummary,
    Test,
    Thumbnail,
    Validity,
)
from dpaudit.runs import RunFolder


@dataclass(frozen=True)
class Played:
    """One game as it was played. coins_sha256: hash of its coin file; coins: which coins of that file it uses; kept:
    share of its evidence that no test has."""

    validity: Validity
    tests: tuple[Test, ...] = ()
    controls: tuple[Control, ...] = ()
    scores: tuple[ScoreSummary, ...] = ()
    gallery: tuple[Thumbnail, ...] = ()
    coins_sha256: str | None = None
    coins: str = "records"
    attacks: tuple[AttackRow, ...] = ()
    exposure: tuple[Extraction, ...] = ()
    regeneration: tuple[Regeneration, ...] = ()
    alternative: str | None = None
    kept: float = 0.1


@dataclass
class Games:
    """The games of one run or audit in the order of play, each written down as soon as it was played.

    run: whose release/games/ they go to, None = nowhere; the caller holds its lock. alpha, command: of this audit.
    """

    run: RunFolder | None
    alpha: float
    command: str | None
    documents: list[GameDocument] = field(default_factory=list)

    @classmethod
    def of(cls, run: RunFolder, alpha: float, command: str | None) -> "Games":
        """With those that were played earlier."""
        return cls(run, alpha, command, list(record.read(run)))

    def had(self, game: str) -> GameDocument | None:
        """The document of a game that was played."""
        return next((item for item in self.documents if item.game == game), None)

    def next_confidence(self, confidence: float) -> float:
        """Of all bounds of the next game together, when `confidence` is that of all games ever played."""
        played = sum(game.game not in WITHOUT_COINS for game in self.documents)
        return verdict.confidence_of(played + 1, confidence)

    def keep(self, game: Any, played: Played, *, about: About, claim: Claim | None, supplied: bool = False) -> None:
        """Write a game down."""
        content = {item.name: getattr(played, item.name) for item in fields(played)}
        self.add(game, about=about, claim=claim, supplied=supplied, **content)

    def add(self, game: Any, **content: Any) -> None:
        """Write the document of a game, or of a check without coins, as the next one."""
        number, previous = record.following(self.documents)
        shared = {"alpha": self.alpha, "command": self.command, "coins_sha256": None}
        document = GameDocument(game=game, number=number, previous_sha256=previous, **{**shared, **content})
        if self.run is not None:
            record.add(self.run, document)
        self.documents.append(document)


def coins_check(sha256: str, explanation: str) -> Check:
    """The check that the coins are those whose hash the ledger holds; whoever reads them has made sure of it."""
    measured, allowed = f"SHA-256 {sha256[:16]}…", "the hash in the ledger"
    return Check(name="coins", status="pass", measured=measured, allowed=allowed, explanation=explanation)


def sound(checks: Iterable[Check]) -> Validity:
    """The validity of a game with these checks."""
    found = tuple(checks)
    return Validity(sound=all(check.status != "fail" for check in found), checks=found)


def unsound(name: str, problem: str) -> Played:
    """A game that must not be scored: no test, no number, only the reason."""
    return Played(
        sound([Check(name=name, status="fail", measured=problem, allowed="an unedited game", explanation=problem)])
    )
