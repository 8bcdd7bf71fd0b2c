"""The games of a run: `release/games/NN-NAME.json`, one document a game, in the order of play, each with the hash of
the one before.

A document is written once and never edited. Taking one out, changing one or changing their order is noticed: hashes are
in the chain, in `release/SHA256SUMS`, and in `audit.json`. Somebody who can write all of these can still forge the
whole (docs/threat-model.md).
"""

from collections.abc import Sequence
from pathlib import Path

from dpaudit import atomic, checksums
from dpaudit.documents import AuditDocument, GameDocument
from dpaudit.errors import UsageError
from dpaudit.evidence import calibrate
from dpaudit.runs import RunFolder
from dpaudit.verdict import wanted

GAMES = "games"


def read(run: RunFolder) -> tuple[GameDocument, ...]:
    """All games of a run; an audit of version 1 stands as the first of them. UsageError for a broken chain."""
    return read_release(run.release)


def read_release(release: Path) -> tuple[GameDocument, ...]:
    """`read` where only the released part of a run is at hand."""
    folder, counted = release / GAMES, release / "audit.json"
    paths = sorted(folder.glob("[0-9][0-9]*.json")) if folder.is_dir() else []
    listed = {name for name in checksums.read(release / checksums.SUMS) if name.startswith(f"{folder.name}/")}
    missing = sorted(listed - {f"{folder.name}/{path.name}" for path in paths})
    if missing:
        raise UsageError(
            f"{release / missing[0]}: missing; a game that was played can't be taken back, restore it from a copy"
        )
    games: list[GameDocument] = []
    for path in paths:
        game = GameDocument.read(path)
        before = games[-1].sha256() if games else None
        if game.number != len(games) + 1 or game.previous_sha256 != before or f"{game.name}.json" != path.name:
            raise UsageError(
                f"{path}: does not follow the game before it (edited, or one taken out); restore {folder} from a copy"
            )
        games.append(game)
    audit = AuditDocument.read(counted) if counted.is_file() else None
    if audit is None:
        return tuple(games)
    if not games and not audit.games:
        return (earlier(audit),)
    written = {game.sha256() for game in games}
    lost = [entry.name for entry in audit.games if entry.sha256 not in written]
    if lost:
        raise UsageError(
            f"{folder / lost[0]}.json: missing or edited, but {counted.name} counts it; restore it from a copy"
        )
    return tuple(games)


def add(run: RunFolder, game: GameDocument) -> None:
    """Write a game's document; the caller holds the lock. An earlier audit of version 1 is kept as document 1."""
    if game.number == 2 and not run.games.is_dir() and run.audit.is_file():
        _write(run, earlier(AuditDocument.read(run.audit)))
    _write(run, game)


def _write(run: RunFolder, game: GameDocument) -> None:
    atomic.make_folder(run.games)
    run.write_sealed(run.games / f"{game.name}.json", game.to_json().encode())


def earlier(audit: AuditDocument) -> GameDocument:
    """An audit of version 1 as one game: its p-values calibrated with equal shares, its powers (earned by no control)
    dropped."""
    deciding = [test for test in audit.tests if test.decides and not test.estimate and test.p_value is not None]
    share = 1.0 / max(1, len(deciding))
    tests = []
    for test in audit.tests:
        update: dict[str, object] = {"power": None, "control": "played before controls were required"}
        if test in deciding:
            assert test.p_value is not None
            update |= {"e_value": calibrate.e_value(test.p_value, wanted=wanted(share, audit.alpha)), "share": share}
        tests.append(test.model_copy(update=update))
    return GameDocument(
        game="earlier audit",
        number=1,
        previous_sha256=None,
        about=audit.run.about if audit.run is not None else "weights",
        claim=audit.claim,
        alternative=audit.alternative,
        coins_sha256=audit.run.coins_sha256 if audit.run is not None else None,
        alpha=audit.alpha,
        tests=tuple(tests),
        kept=0.0,
        validity=audit.validity,
        scores=audit.scores,
        gallery=audit.gallery,
        attacks=audit.attacks,
        exposure=audit.exposure,
        regeneration=audit.regeneration,
        fusion=audit.fusion,
        contract=audit.contract,
        command=audit.run.command if audit.run is not None else None,
    )


def following(games: Sequence[GameDocument]) -> tuple[int, str | None]:
    """Number of the next game, and the hash that it continues."""
    return len(games) + 1, games[-1].sha256() if games else None
