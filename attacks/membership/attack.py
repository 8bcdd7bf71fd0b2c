"""What an attack is: where it comes from, what it needs, what it costs, and how it scores records."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from attacks.membership.view import View

Floats = npt.NDArray[np.float64]
Level = Literal["text", "logits", "weights"]


class Attack(ABC):
    """Records in, one score a record out, higher = "was in training". The docstring is the description for people.

    source: where it was published. level: what the attacker sees of the target. needs: beyond the target, out of
    "base" and "references". cost: in forward (and backward) passes over the records, or generations.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    level: ClassVar[Level] = "logits"
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = "1 forward"

    @abstractmethod
    def scores(self, view: View) -> Floats:
        """(m,) scores. A function of records, kinds, models and public randomness alone: never of a coin."""

    @property
    def description(self) -> str:
        """One sentence."""
        return " ".join((self.__doc__ or "").split())

    def applies(self, view: View) -> bool:
        """Whether the view has what this attack needs."""
        return "references" not in self.needs or view.references is not None
