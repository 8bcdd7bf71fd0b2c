"""The game on real records: a coin decides which training units take part in a twin of the run.

Nobody can tell the members of a finished run from non-members: whoever was not in it comes from another distribution,
or is not there at all. So the game needs a training of its own. Every unit of the training split tosses a fair
independent coin, stored and hashed before the first step; the twin trains on the heads alone, with q, T, sigma and the
batch size of the declared number of units, as in the run. What it shows is about the training procedure, not about the
weights that were released.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.canaries import ALL, Plan, coin_frame, content_sha256, save_coins
from attacks.training import open_run
from dpaudit import folders
from dpaudit.analysis.plan import bound_guesses
from dpaudit.config import RunConfig
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder, discard
from trainers import data
from trainers.plan import Inserted
from trainers.progress import Reporter
from trainers.records import Dataset, Unit
from trainers.run import read_config, train
from trainers.vlm import VisionLanguageModel

KIND = "record"
LEAST = 40  # candidates; with fewer a bound of 0 is all that the report half could show
ABOUT = "They are the training units themselves; a coin decided which took part."


@dataclass(frozen=True)
class MemberGame:
    """Candidates with their coins, in the order of the training split. Exact copies of a unit play no part."""

    units: tuple[Unit, ...]
    members: npt.NDArray[np.bool_]
    plan: Plan
    copies: int = 0

    @classmethod
    def draw(cls, dataset: Dataset, key: Key) -> "MemberGame":
        """A function of the data and of the key's stream "members" alone. Raises InvalidGame for too few units."""
        units, copies = distinct(dataset.train)
        if len(units) < LEAST:
            raise InvalidGame(
                f"data.train: {len(units)} different units; membership inference on real records needs at least {LEAST}"
            )
        members = coins(key, len(units))
        tie_seed = int(key.generator(purpose="member ties").integers(2**31))
        return cls(units, members, member_plan(len(units), tie_seed), copies)

    def inside(self) -> tuple[Unit, ...]:
        """The units that take part."""
        return tuple(unit for unit, member in zip(self.units, self.members, strict=True) if member)

    def frame(self) -> pd.DataFrame:
        """The coin file's rows: id, kind, member, content."""
        tossed = zip(self.units, self.members, strict=True)
        return coin_frame((unit.id, KIND, bool(member), content_sha256(unit)) for unit, member in tossed)


def coins(key: Key, count: int) -> npt.NDArray[np.bool_]:
    """(count,) fair independent coins of a training with this key."""
    return key.uniform(count, step=0, name="members", purpose="coins") < 0.5


def distinct(units: tuple[Unit, ...]) -> tuple[tuple[Unit, ...], int]:
    """Units of different content, the first of each, and how many copies were left out.

    A copy whose coin falls the other way would make a member and a non-member the same record.
    """
    seen: dict[str, Unit] = {}
    for unit in units:
        seen.setdefault(content_sha256(unit), unit)
    return tuple(seen.values()), len(units) - len(seen)


def member_plan(count: int, tie_seed: int) -> Plan:
    """Guesses for a game on `count` real records: as many as suit the one-run bound, half on each side."""
    guesses = bound_guesses("steinke", canaries=count, delta=1e-5, confidence=0.95)
    side = (guesses - guesses // 2, guesses // 2)
    return Plan({ALL: side, KIND: side}, tie_seed)


def twin_config(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The twin's configuration: no canaries, and the number of units declared, so that q and T are the run's."""
    size = config.data.public_size or len(dataset.train)
    return config.model_copy(
        update={
            "canaries": config.canaries.model_copy(update={"count": 0}),
            "data": config.data.model_copy(update={"public_size": size}),
        }
    )


def member_twin(
    config: RunConfig, place: Path, *, reporter: Reporter | None = None, log: Callable[[str], None] = lambda _: None
) -> RunFolder:
    """The twin in `place`: trained now, gone on with, or taken as it is when finished."""
    twin = RunFolder(place)
    folders.require_own(place)
    if twin.config.is_file() and twin.finished:
        return RunFolder.open(place)
    if twin.config.is_file() and twin.ledger.is_file() and twin.noise_key.is_file():
        log(f"going on with {place}")
        return _resume(RunFolder.open(place), reporter)
    if place.exists():
        discard(place)  # stopped before its first step: nothing was trained on these coins
    plain = twin_config(config, data.load(config.data))
    what = "this audits the training procedure, not these weights"
    log(f"training a twin on the units whose coin fell heads in {place}: {what}")
    with open_run(plain, place) as (run, key, dataset, model):
        game = MemberGame.draw(dataset, key)
        digest = save_coins(run.coins, game.frame(), game.plan)
        _train(plain, run, key, dataset, model, game, digest, reporter, resume=False)
    return run


def _resume(run: RunFolder, reporter: Reporter | None) -> RunFolder:
    config = read_config(run)
    with run.lock():
        dataset = data.load(config.data)
        chosen = config.model
        model = VisionLanguageModel.load(chosen.path, device=chosen.device, precision=chosen.precision)
        key = Key.load(run.noise_key)
        digest = Ledger.load(run.ledger).document.coins_sha256
        _train(config, run, key, dataset, model, MemberGame.draw(dataset, key), digest, reporter, resume=True)
    return run


def _train(
    config: RunConfig,
    run: RunFolder,
    key: Key,
    dataset: Dataset,
    model: VisionLanguageModel,
    game: MemberGame,
    digest: str | None,
    reporter: Reporter | None,
    *,
    resume: bool,
) -> None:
    inside = game.inside()
    if not inside:
        raise UsageError(f"{run.path}: no unit's coin fell heads; delete it and audit again")
    train(
        config,
        run,
        key=key,
        dataset=replace(dataset, train=inside),
        model=model,
        inserted=Inserted(0, (), digest, ABOUT),
        resume=resume,
        reporter=reporter,
    )
