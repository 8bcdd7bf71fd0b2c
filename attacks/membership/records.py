"""The records of a game as its reference trainings need them: who always takes part, who tosses a coin, who never.

In a run with canaries the training units always take part and the canary candidates toss coins; in a twin on real
records the training units toss. The population never takes part: held-out records of the data set, and for canaries
fresh ones of the same kinds that were drawn from a stream of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attacks.canaries import KINDS, Game, check_coins
from attacks.kinds import Materials
from attacks.membership.gradients import base_gradients
from attacks.membership.members import KIND, MemberGame
from attacks.membership.stacked import Shared
from attacks.training import redraw_game
from dpaudit.config import RunConfig
from dpaudit.documents import LedgerDocument
from dpaudit.errors import InvalidGame, UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.plan import Plan, make_plan
from trainers.records import Dataset, Unit
from trainers.run import read_config
from trainers.vlm import VisionLanguageModel

POPULATION = 200  # records, of each canary kind at most as many


@dataclass(frozen=True)
class StudyRecords:
    """Everything that target and references of one game share.

    units: fixed ones, then candidates, then population. kinds (m,): of the candidates. population_kinds (n,).
    """

    config: RunConfig
    dataset: Dataset
    plan: Plan
    key: Key
    model: VisionLanguageModel
    units: tuple[Unit, ...]
    kinds: npt.NDArray[np.str_]
    population_kinds: npt.NDArray[np.str_]

    @property
    def candidates(self) -> int:
        """m."""
        return len(self.kinds)

    def fixed(self) -> npt.NDArray[np.int64]:
        """Indices of the units that always take part."""
        return np.arange(len(self.units) - len(self.kinds) - len(self.population_kinds))

    def places(self) -> npt.NDArray[np.int64]:
        """Indices of the candidates, (m,)."""
        return np.arange(self.candidates) + len(self.fixed())

    def population(self) -> npt.NDArray[np.int64]:
        """Indices of the population, (n,)."""
        return np.arange(len(self.population_kinds)) + len(self.fixed()) + self.candidates

    def candidate_units(self) -> Sequence[Unit]:
        """The candidates themselves."""
        return [self.units[index] for index in self.places()]

    def population_units(self) -> Sequence[Unit]:
        """The population itself."""
        return [self.units[index] for index in self.population()]

    def shared(self) -> Shared:
        """Encoded, with an adapter attached to the model: for trainings."""
        return Shared.of(self.config, self.plan, self.model, self.units)


def study_records(run: RunFolder) -> StudyRecords:
    """The records of a finished run with canaries, or of a member twin, from its configuration, data and key."""
    config = read_config(run)
    dataset = data.load(config.data)
    key = Key.load(run.noise_key)
    chosen = config.model
    model = VisionLanguageModel.load(chosen.path, device=chosen.device, precision=chosen.precision)
    model.set_reducer(config.reducer)
    coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
    game = redraw_game(config, dataset, key, model, coins)
    if game is not None:
        return _canaries(config, dataset, key, model, game)
    return _members(config, dataset, key, model)


def _members(config: RunConfig, dataset: Dataset, key: Key, model: VisionLanguageModel) -> StudyRecords:
    game = MemberGame.draw(dataset, key)
    outside = _unused(dataset.test, game.units)[:POPULATION]
    return StudyRecords(
        config,
        dataset,
        make_plan(config, dataset, 0),
        key,
        model,
        (*game.units, *outside),
        np.array([KIND] * len(game.units)),
        np.array([KIND] * len(outside)),
    )


def _canaries(config: RunConfig, dataset: Dataset, key: Key, model: VisionLanguageModel, game: Game) -> StudyRecords:
    drawn, kinds = canary_population(config, dataset, key, model, game)
    return StudyRecords(
        config,
        dataset,
        make_plan(config, dataset, config.canaries.count),
        key,
        model,
        (*dataset.train, *(canary.unit for canary in game.candidates), *drawn),
        np.array([canary.kind for canary in game.candidates]),
        kinds,
    )


def canary_population(
    config: RunConfig, dataset: Dataset, key: Key, model: VisionLanguageModel, game: Game
) -> tuple[list[Unit], npt.NDArray[np.str_]]:
    """Canaries like the candidates that no training sees, each kind from the key's stream "population".

    Kinds made of real records take them from the held-out split. A kind that can't be drawn again (no spare tokens are
    left) has none; its records are then compared with those of the other kinds.
    """
    rng = key.generator(purpose="population")
    sizes = {kind: sum(canary.kind == kind for canary in game.candidates) for kind in dict.fromkeys(
        canary.kind for canary in game.candidates)}  # fmt: skip
    taken = {question.answer for canary in game.candidates for p in canary.unit.pictures for question in p.questions}
    spare = [token for token in model.spare_tokens(2 * sum(sizes.values())) if token not in taken]
    gradients = base_gradients(config)
    materials = Materials.of(replace(dataset, reserve=dataset.test), spare, gradients=gradients)
    units: list[Unit] = []
    kinds: list[str] = []
    for kind, size in sizes.items():
        try:
            drafts = KINDS[kind].draw(min(size, POPULATION), materials, rng)
        except UsageError:
            continue
        units += [replace(draft.unit, id=f"population-{kind}-{place}") for place, draft in enumerate(drafts)]
        kinds += [kind] * len(drafts)
    return units, np.array(kinds, dtype=np.str_)


def _unused(units: Sequence[Unit], candidates: Sequence[Unit]) -> list[Unit]:
    names = {unit.id for unit in candidates}
    free = [unit for unit in units if unit.id not in names]
    if not free:
        raise InvalidGame("data.test: holds no unit that is not in the training split as well; it is the population")
    return free
