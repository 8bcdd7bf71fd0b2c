"""Attacks with reference models: trainings like the target's on other coins. Formulas: attacks.membership.formulas.

All of them read losses on the scale of the answer's probability p = exp(-loss), kind by kind: constants that are
estimated over records (variances, priors, the population) must not mix kinds.
"""

import numpy as np
import numpy.typing as npt

from attacks.membership import formulas
from attacks.membership.table import Attack
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
    """Scores from the target's losses and those of the reference models."""

    needs = frozenset({"references"})
    cost = "1 forward of target and references; k trainings"

    def scores(self, view: View) -> Floats:
        references = view.references
        assert references is not None
        losses = view.target.loss
        return view.by_kind(
            lambda kind, mine: self.kind_scores(
                losses[mine], references.losses[:, mine], references.inside[:, mine], population_of(references, kind)
            )
        )

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        """Scores of the records of one kind."""
        raise NotImplementedError


class Bavaria(ReferenceAttack):
    """Log ratio of Student-t predictive densities, every record's mean and variance under a shared prior; the default
    with reference models."""

    name = "bavaria"
    source = "BaVarIA-t (arXiv 2603.11799)"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.bavaria(target, losses, inside)


class LiraOnline(ReferenceAttack):
    """Log ratio of normal densities of the confidence under IN and OUT models."""

    name = "lira-online"
    source = "Carlini et al. 2022, online"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.lira_online(target, losses, inside)


class LiraOffline(ReferenceAttack):
    """How far the confidence lies above what OUT models give."""

    name = "lira-offline"
    source = "Carlini et al. 2022, offline"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.lira_offline(target, losses, inside)


class Rmia(ReferenceAttack):
    """The share of public records that the record beats in relative probability gained."""

    name = "rmia"
    source = "Zarifzadeh et al. 2024"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.rmia(target, losses, inside, population)


class InfoRmia(ReferenceAttack):
    """Relative probability gained, in bits, against what public records gained."""

    name = "informia"
    source = "InfoRMIA (arXiv 2510.05582)"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.informia(target, losses, inside, population)


class AttackR(ReferenceAttack):
    """The share of OUT models with a larger loss."""

    name = "attack-r"
    source = "Ye et al. 2022"

    def kind_scores(
        self, target: Floats, losses: Floats, inside: npt.NDArray[np.bool_], population: tuple[Floats, Floats]
    ) -> Floats:
        return formulas.attack_r(target, losses, inside)


ATTACKS: tuple[Attack, ...] = (Bavaria(), LiraOnline(), LiraOffline(), Rmia(), InfoRmia(), AttackR())
