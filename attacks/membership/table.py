"""The table of attacks."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from attacks.membership import by_logits, by_references, by_text, by_weights
from attacks.membership.attack import Attack
from attacks.membership.view import View
from dpaudit.errors import DpauditError, rejected

Floats = npt.NDArray[np.float64]


def attacks() -> Mapping[str, Attack]:
    """Every attack by its name, the default first."""
    modules = (by_logits, by_weights, by_text, by_references)
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
