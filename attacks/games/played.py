"""What a game returns: what was tossed, what was seen, what its controls showed. No verdict."""

from dataclasses import dataclass
from typing import Any

from dpaudit.documents import (
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


@dataclass(frozen=True)
class Played:
    """One game as it was played. coins_sha256: hash of its coin file; coins: which coins of that file it uses."""

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

    def document(
        self,
        game: Any,
        *,
        number: int,
        previous_sha256: str | None,
        about: About,
        claim: Claim | None,
        alpha: float,
        supplied: bool = False,
        command: str | None = None,
    ) -> GameDocument:
        """The record of this game, number `number` in the order of play."""
        return GameDocument(
            game=game,
            number=number,
            previous_sha256=previous_sha256,
            about=about,
            claim=claim,
            alternative=self.alternative,
            coins_sha256=self.coins_sha256,
            coins=self.coins,
            alpha=alpha,
            tests=self.tests,
            validity=self.validity,
            controls=self.controls,
            supplied=supplied,
            scores=self.scores,
            gallery=self.gallery,
            attacks=self.attacks,
            exposure=self.exposure,
            regeneration=self.regeneration,
            command=command,
        )


def unsound(name: str, problem: str) -> Played:
    """A game that must not be scored: no test, no number, only the reason."""
    check = Check(name=name, status="fail", measured=problem, allowed="an unedited game", explanation=problem)
    return Played(Validity(sound=False, checks=(check,)))
