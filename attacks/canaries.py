"""The canary game: candidates, coins, and what is fixed with them before the first step.

Every candidate has a fair coin of its own (never an exactly-half split, which is not the game of the one-run theorem).
Candidates are drawn from one stream of the run's key and coins from another, so that nothing in a candidate depends on
its coin; both are functions of the key alone, so that a resumed run and the audit see the same game.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from attacks.kinds import FIRST, Draft, Gradients, Kind, Materials, Sampler, Selection
from attacks.kinds_drawn import DRAWN
from attacks.kinds_optimised import Optimised
from attacks.kinds_region import FusedRegion
from attacks.kinds_sampled import Sampled
from dpaudit import atomic, untrusted, untrusted_tables
from dpaudit.config import CanaryKind
from dpaudit.errors import InvalidGame, rejected
from dpaudit.randomness import Key
from trainers.records import Dataset, Unit, looked_at

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*FIRST, *DRAWN, FusedRegion(), Optimised(), Sampled())}
ALL = "all"
COLUMNS = ["id", "kind", "member", "content"]
_PLAN = b"dpaudit.plan"


# Share of a kind's candidates that is guessed on each side. New tokens tell members and non-members apart almost
# perfectly without privacy, the other kinds only at their extremes (measured on public synthetic pictures). A share
# near one half would be wrong even with perfect scores, whenever the coins fall unevenly: of 100 fair coins fewer than
# 35 show heads (or tails) once in 560 games, fewer than 40 once in 28.
GUESSED = {"new-token": 0.35, "mislabelled": 0.1, "noise": 0.1}


@dataclass(frozen=True)
class Plan:
    """What an audit may choose, fixed and hashed together with the coins.

    guesses: for all candidates (key 'all') and for each kind, how many of the highest scores are guessed "in" and how
    many of the lowest "out". tie_seed: for ties. sigma_reduction: the alternative, "the true sigma is this much smaller
    than claimed". chosen: which of their proposals kinds that choose among some took.
    """

    guesses: dict[str, tuple[int, int]]
    tie_seed: int
    sigma_reduction: float = 0.3
    chosen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def default(cls, sizes: dict[str, int], tie_seed: int) -> "Plan":
        """GUESSED of each kind on each side, rounded up but never more than there are; all kinds together guess what
        each of them guesses.

        sizes: candidates per kind.
        """
        counts = {
            kind: (min(math.ceil(size * GUESSED.get(kind, 0.2)), size // 2),) * 2 if size > 1 else (size, 0)
            for kind, size in sizes.items()
        }
        together = (sum(top for top, _ in counts.values()), sum(bottom for _, bottom in counts.values()))
        return cls({ALL: together} | counts, tie_seed)

    def to_json(self) -> str:
        """Stable text for the coin file."""
        tree: dict[str, Any] = {"guesses": self.guesses, "tie_seed": self.tie_seed}
        tree["sigma_reduction"] = self.sigma_reduction
        if self.chosen:
            tree["chosen"] = dict(self.chosen)
        return json.dumps(tree, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Inverse of `to_json`; ValueError, KeyError or TypeError on anything else."""
        tree: Any = json.loads(text)
        guesses = {str(name): (int(top), int(bottom)) for name, (top, bottom) in tree["guesses"].items()}
        chosen = {str(kind): tuple(int(place) for place in places) for kind, places in tree.get("chosen", {}).items()}
        plan = cls(guesses, int(tree["tie_seed"]), float(tree["sigma_reduction"]), chosen)
        counts = [plan.tie_seed, *(count for pair in (*guesses.values(), *chosen.values()) for count in pair)]
        if min(counts) < 0 or not 0.0 < plan.sigma_reduction < 1.0:
            raise ValueError("a plan with negative counts, or an alternative that is none")
        return plan


@dataclass(frozen=True)
class Canary:
    """A candidate with its coin. `member`: the coin put it into the training set."""

    id: str
    kind: str
    unit: Unit
    member: bool
    description: str


@dataclass(frozen=True)
class Game:
    """All candidates of a run, inserted or not, in a fixed order."""

    candidates: tuple[Canary, ...] = ()
    plan: Plan = field(default_factory=lambda: Plan.default({}, 0))

    def members(self) -> tuple[Unit, ...]:
        """The units that the coins put into training."""
        return tuple(canary.unit for canary in self.candidates if canary.member)

    def frame(self) -> pd.DataFrame:
        """One row a candidate: id, kind, member, content (hash of its unit)."""
        return coin_frame([(item.id, item.kind, item.member, content_sha256(item.unit)) for item in self.candidates])

    def save_coins(self, path: Path) -> str:
        """Write coins and plan to `path` atomically (mode 0600) and return the SHA-256 of the file."""
        return save_coins(path, self.frame(), self.plan)

    def check_against(self, coins: "Coins") -> None:
        """Raise InvalidGame when this game is not the one of the coin file (other data, key or model).

        The plan is not compared: the one in the file was fixed before the first step and stands, whatever this version
        of dpaudit would choose today.
        """
        ours = self.frame()
        if not ours.equals(coins.frame):
            what = "candidates" if not ours["id"].equals(coins.frame["id"]) else "their contents or coins"
            raise InvalidGame(
                f"coins: {what} are not those that this run's key, data and model give; the data set, the model or the "
                "coins have changed since training"
            )


@dataclass(frozen=True)
class Coins:
    """A coin file that passed its checks. frame: columns id, kind, member, content."""

    frame: pd.DataFrame
    plan: Plan
    sha256: str


def coin_frame(rows: Iterable[tuple[str, str, bool, str]]) -> pd.DataFrame:
    """Rows (id, kind, member, content) as a coin file holds them."""
    return pd.DataFrame(list(rows), columns=COLUMNS).astype({"member": bool})


def save_coins(path: Path, frame: pd.DataFrame, plan: Plan) -> str:
    """Write coins (columns COLUMNS) and plan to `path` atomically (mode 0600) and return the SHA-256 of the file."""
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({_PLAN: plan.to_json().encode()})
    with atomic.replacing(path, 0o600) as temporary:
        pyarrow.parquet.write_table(table, temporary)
    return atomic.sha256_file(path)


def content_sha256(unit: Unit) -> str:
    """Hash of everything in a unit: pixels, questions, answers, and how they belong together."""
    digest = hashlib.sha256()
    for picture in unit.pictures:
        pixels = picture.pixels
        digest.update(repr((pixels.shape, [(q.text, q.answer, q.kind) for q in picture.questions])).encode())
        digest.update(pixels.tobytes())
        for other in picture.beside:
            digest.update(repr(other.shape).encode() + looked_at(other).tobytes())
        if any(question.history for question in picture.questions):
            digest.update(repr([question.history for question in picture.questions]).encode())
    return digest.hexdigest()


def share_out(count: int, kinds: Sequence[str]) -> dict[str, int]:
    """`count` split evenly over kinds, the first ones taking the remainder."""
    return {kind: count // len(kinds) + (place < count % len(kinds)) for place, kind in enumerate(kinds)}


def _named(draft: Draft, name: str) -> Unit:
    """The unit under the canary's name, so that its ids tell nothing and clash with none."""
    pictures = tuple(picture.derived(id=f"{name}-{place}") for place, picture in enumerate(draft.unit.pictures))
    return Unit(id=name, pictures=pictures)


def draw_game(
    dataset: Dataset,
    count: int,
    kinds: Sequence[CanaryKind],
    *,
    key: Key,
    spare_tokens: Sequence[str],
    gradients: Gradients | None = None,
    chosen: Mapping[str, tuple[int, ...]] | None = None,
    selection: Selection | None = None,
    sampler: Sampler | None = None,
) -> Game:
    """The game of a run: `count` candidates, split evenly over `kinds`, each with a fair independent coin.

    A function of the arguments and of the key's streams "canaries" (candidates) and "coins" alone. `spare_tokens`:
    tokens that nothing else uses, one needed for each candidate of kind 'new-token'. gradients, sampler: of the public
    base model, for kinds that choose by its gradients or take its texts; selection: what the run's reducer keeps;
    chosen: the kinds' choice, where it was stored with the coins. Raises UsageError when the reserve or the tokens do
    not suffice, with the numbers.
    """
    if count == 0:
        return Game()
    if not kinds or len(set(kinds)) != len(kinds) or any(kind not in KINDS for kind in kinds):
        raise rejected("canaries.kinds", list(kinds), f"different kinds out of {', '.join(KINDS)}")
    sizes = {kind: size for kind, size in share_out(count, kinds).items() if size}
    materials = Materials.of(
        dataset, spare_tokens, gradients=gradients, chosen=chosen, selection=selection, sampler=sampler
    )
    rng = key.generator(purpose="canaries")
    drafts = [(kind, draft) for kind, size in sizes.items() for draft in KINDS[kind].draw(size, materials, rng)]
    heads = key.uniform(count, step=0, name="canaries", purpose="coins") < 0.5
    tie_seed = int(rng.integers(2**31))
    return Game(
        tuple(
            Canary(name, kind, _named(draft, name), bool(heads[place]), draft.description)
            for place, (kind, draft) in enumerate(drafts)
            for name in [f"canary-{place:06d}"]
        ),
        replace(Plan.default(sizes, tie_seed), chosen=materials.chosen),
    )


def check_coins(path: Path, sha256: str | None) -> Coins:
    """Read a coin file and check that it is the one hashed before the first step. Raises InvalidGame, one line."""
    if sha256 is None:
        raise InvalidGame(f"{path}: the ledger holds no hash of the coins; they could have been written after training")
    if not path.is_file():
        raise InvalidGame(f"{path}: the coins are missing; without them membership is not known")
    found = untrusted.sha256(path, untrusted_tables.MOST_TABLE)
    if found != sha256:
        raise InvalidGame(
            f"{path}: SHA-256 {found[:12]}… is not the {sha256[:12]}… recorded before the first step; "
            "the coins were edited"
        )
    try:
        table = untrusted_tables.read_arrow(path)
        plan = Plan.from_json((table.schema.metadata or {})[_PLAN])
        frame = table.to_pandas()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidGame(f"{path}: not a coin file of dpaudit") from None
    if list(frame.columns) != COLUMNS or frame["member"].dtype != bool:
        raise InvalidGame(f"{path}: columns {list(frame.columns)}; a coin file has {COLUMNS}, member true or false")
    if frame["id"].duplicated().any():
        raise InvalidGame(f"{path}: an id occurs twice")
    return Coins(frame, plan, found)
