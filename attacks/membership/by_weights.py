"""Attacks that hold the released weights: gradients of single records."""

import numpy as np
import numpy.typing as npt

from attacks.membership.table import Attack
from attacks.membership.view import View

Floats = npt.NDArray[np.float64]


class GradientNorm(Attack):
    """Minus the norm of the record's gradient over the adapter: what was fitted pulls no more."""

    name = "gradient-norm"
    source = "Nasr et al. 2019; as in MIMIR"
    level = "weights"
    cost = "2 forward and backward"

    def scores(self, view: View) -> Floats:
        return -np.log(np.maximum(view.target.gradients.norm, 1e-12))


class GradientAlignment(Attack):
    """How fast the loss still falls when the adapter's change of the weights is scaled up."""

    name = "gradient-alignment"
    source = "GradAudit (arXiv 2606.24774): alignment with the update; here its directional derivative"
    level = "weights"
    cost = "2 forward and backward"

    def scores(self, view: View) -> Floats:
        found = view.target.gradients
        return -found.alignment / np.maximum(found.norm, 1e-12)


class FirstOrderFall(Attack):
    """The fall of the loss that the base model's own gradient predicts for this adapter."""

    name = "first-order-fall"
    source = "inner product with the update (Nasr et al. 2019; Andrew et al. 2024), at the base model"
    level = "weights"
    cost = "2 forward and backward"

    def scores(self, view: View) -> Floats:
        return view.target.gradients.start


ATTACKS: tuple[Attack, ...] = (GradientNorm(), GradientAlignment(), FirstOrderFall())
