"""What an attack may look at: the records, their kinds, and lazily what target and base model say of them.

An attack never sees a coin of the target: a `View` holds none. Reference models come with their own coins, which were
drawn independently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from attacks.membership.gradients import UnitGradients, unit_gradients
from attacks.membership.gram import Gram, base_gram
from attacks.membership.signals import Signals, signals
from attacks.membership.units import Asked
from trainers.inputs import UnitInputs
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.str_]


class Access:
    """One model and what it says of the records, each computed once. `adapted`: it carries the run's adapter."""

    def __init__(self, model: VisionLanguageModel, units: Sequence[Unit], *, adapted: bool) -> None:
        self.model, self.units, self.adapted = model, list(units), adapted

    @cached_property
    def inputs(self) -> UnitInputs:
        """The records, encoded by the model's own tower and reducer."""
        return UnitInputs(self.model, self.units)

    @cached_property
    def signals(self) -> Signals:
        """One forward pass."""
        return signals(self.model, self.units, inputs=self.inputs)

    @property
    def loss(self) -> Floats:
        """(U,) losses."""
        return self.signals.loss

    @cached_property
    def answers(self) -> list[str]:
        """Greedy answers to all questions, in the order of units, pictures and questions."""
        return Asked.of(self.units).answered_by(self.model)

    @cached_property
    def gradients(self) -> UnitGradients:
        """Norms of the records' gradients and how far they agree with the adapter; for an adapted model."""
        return unit_gradients(self.model, self.units, self.inputs)


@dataclass(frozen=True)
class References:
    """Losses under k reference models. losses, inside: (k, m) for the m records; population: (k, n) for n public
    records that no model was trained on, with their kinds (n,) and losses under the target (n,)."""

    losses: Floats
    inside: Bools
    population: Floats
    population_kinds: Kinds
    population_target: Floats

    @property
    def count(self) -> int:
        """k."""
        return len(self.losses)


@dataclass
class View:
    """Records (m), their kinds, both models, reference losses where there are any, and a seed for what is random.

    others: units that took part for certain, as far as the attacker knows them. max_grad_norm: C of the training,
    infinite without clipping.
    """

    units: Sequence[Unit]
    kinds: Kinds
    target: Access
    base: Access
    references: References | None = None
    seed: int = 0
    others: Sequence[Unit] = ()
    max_grad_norm: float = math.inf
    _per_kind: dict[str, npt.NDArray[np.intp]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._per_kind = {str(kind): np.flatnonzero(self.kinds == kind) for kind in np.unique(self.kinds)}

    @cached_property
    def gram(self) -> Gram:
        """How the records pull on each other, computed once."""
        return base_gram(self.target.model, self.units, self.others, max_grad_norm=self.max_grad_norm)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one use, the same at every call."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def by_kind(self, score: Callable[[str, npt.NDArray[np.intp]], Floats]) -> Floats:
        """(m,) scores put together from score(kind, indices) of each kind: constants estimated over records must not
        mix kinds whose losses live on different scales."""
        out = np.zeros(len(self.units))
        for kind, mine in self._per_kind.items():
            out[mine] = score(kind, mine)
        return out
