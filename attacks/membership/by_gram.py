"""Attacks that know how records pull on each other at the base model."""

import numpy as np
import numpy.typing as npt

from attacks.membership.gram import unmixed
from attacks.membership.table import Attack
from attacks.membership.view import View


class UnmixedUpdate(Attack):
    """Projections of the adapter's change on all records' gradients at the base model, solved together for every coin:
    what a record's neighbours put into its projection is taken out."""

    name = "unmixed-update"
    source = "ours (attacks.membership.gram): inner products with the update, unmixed by restricted ML"
    level = "weights"
    cost = "3 forward and backward; of the units that took part for certain, 1"

    def scores(self, view: View) -> npt.NDArray[np.float64]:
        return unmixed(view.target.gradients.start, view.gram, view.kinds)


ATTACKS: tuple[Attack, ...] = (UnmixedUpdate(),)
