"""Attacks that hold the released weights: gradients of single records, and how records pull on each other."""

import numpy as np
import numpy.typing as npt

from attacks.membership.attack import Attack
from attacks.membership.gram import unmixed
from attacks.membership.view import View

Floats = npt.NDArray[np.float64]


class UnmixedUpdate(Attack):
    """Projections of the adapter's change on all records' gradients at the base model, solved together for every coin:
    what a record's neighbours put into its projection is taken out."""

    name = "unmixed-update"
    source = "ours (attacks.membership.gram): inner products with the update, unmixed by restricted ML"
    level = "weights"
    cost = "3 forward and backward; of the units that took part for certain, 1"

    def scores(self, view: View) -> Floats:
        return unmixed(view.target.gradients.start, view.gram, view.kinds)


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


ATTACKS: tuple[Attack, ...] = (UnmixedUpdate(), GradientNorm(), GradientAlignment(), FirstOrderFall())
