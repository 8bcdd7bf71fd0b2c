"""Attacks with reference models: trainings like the target's on other coins. Formulas: attacks.membership.formulas.

All of them read losses on the scale of the answer's probability p = exp(-loss), kind by kind: constants that are
estimated over records (variances, priors, the population) must not mix kinds.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from attacks.membership import formulas
from attacks.membership.attack import Attack
from attacks.membership.view import References, View

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def population_of(references: References, kind: str) -> tuple[Floats, Floats]:
    """Losses (n,) and (k, n) of the public records of a kind under the target and the references; all of them where
    there are none of this kind."""
    mine = references.population_kinds == kind
    if not mine.any():
        mine = np.ones_like(mine)
    return references.population_target[mine], references.population[:, mine]


class ReferenceAttack(Attack):
    """Scores from the target's losses and those of the reference models, kind by kind.

    formula: of a kind's target losses, reference losses and who was inside; with `against_population` also of the
    public records' losses.
    """

    needs = frozenset({"references"})
    cost = "1 forward of target and references; k trainings"
    formula: ClassVar[Callable[..., Floats]]
    against_population: ClassVar[bool] = False

    def scores(self, view: View) -> Floats:
        references, losses = view.references, view.target.loss
        assert references is not None

        def of_kind(kind: str, mine: Indices) -> Floats:
            more = (population_of(references, kind),) if self.against_population else ()
            return self.formula(losses[mine], references.losses[:, mine], references.inside[:, mine], *more)

        return view.by_kind(of_kind)


class Bavaria(ReferenceAttack):
    """Log ratio of Student-t predictive densities, every record's mean and variance under a shared prior; the default
    with reference models."""

    name = "bavaria"
    source = "BaVarIA-t (arXiv 2603.11799)"
    formula = staticmethod(formulas.bavaria)


class LiraOnline(ReferenceAttack):
    """Log ratio of normal densities of the confidence under IN and OUT models."""

    name = "lira-online"
    source = "Carlini et al. 2022, online"
    formula = staticmethod(formulas.lira_online)


class LiraOffline(ReferenceAttack):
    """How far the confidence lies above what OUT models give."""

    name = "lira-offline"
    source = "Carlini et al. 2022, offline"
    formula = staticmethod(formulas.lira_offline)


class Rmia(ReferenceAttack):
    """The share of public records that the record beats in relative probability gained."""

    name = "rmia"
    source = "Zarifzadeh et al. 2024"
    formula = staticmethod(formulas.rmia)
    against_population = True


class InfoRmia(ReferenceAttack):
    """Relative probability gained, in bits, against what public records gained."""

    name = "informia"
    source = "InfoRMIA (arXiv 2510.05582)"
    formula = staticmethod(formulas.informia)
    against_population = True


class AttackR(ReferenceAttack):
    """The share of OUT models with a larger loss."""

    name = "attack-r"
    source = "Ye et al. 2022"
    formula = staticmethod(formulas.attack_r)


ATTACKS: tuple[Attack, ...] = (Bavaria(), LiraOnline(), LiraOffline(), Rmia(), InfoRmia(), AttackR())
