"""The table of attacks: each says where it comes from, what it needs and what it costs, and scores records."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from attacks.membership.view import View
from dpaudit.errors import DpauditError, rejected

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


def attacks() -> Mapping[str, Attack]:
    """Every attack by its name, the default first."""
    from attacks.membership import by_gram, by_logits, by_references, by_text, by_weights

    modules = (by_logits, by_gram, by_weights, by_text, by_references)
    return {attack.name: attack for module in modules for attack in module.ATTACKS}


def default_attack(view: View) -> str:
    """Which attack speaks where none was chosen on held-out records: BaVarIA with reference models, else the loss
    against the base model."""
    return "bavaria" if view.references is not None else "loss-against-base"


def score_all(view: View, names: Sequence[str] | None = None) -> dict[str, Floats]:
    """Scores of the named attacks (default: all that apply), each finite. Raises UsageError for an unknown name."""
    known = attacks()
    for name in names or ():
        if name not in known:
            raise rejected("attack", name, list(known))
    out = {}
    for name, attack in known.items():
        if (names is None or name in names) and attack.applies(view):
            scores = np.asarray(attack.scores(view), dtype=np.float64)
            if scores.shape != (len(view.units),) or not np.isfinite(scores).all():
                raise DpauditError(f"attack {name}: a score is not finite; the model's outputs are broken")
            out[name] = scores
    return out
