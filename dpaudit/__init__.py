"""dpaudit: privacy audits for differentially private training.

    import dpaudit

    s = dpaudit.Scores(scores, member, coins="independent")            # score arrays from anywhere
    s.epsilon(delta=1e-5)                                              # a lower bound with its ceiling
    s.test(sigma=0.8, rate=0.04, steps=60)                             # does the claimed mechanism fit?
    dpaudit.tradeoff(sigma=0.8, rate=0.04, steps=60).plot()            # what it allows every attack
    dpaudit.check(factory)                                             # the step contract on training code
    dpaudit.audit(factory, white_box=True)                             # games on training code, or on a run folder

The names are imported on first use: `import dpaudit` costs nothing. Training under test: `dpaudit.under_test`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpaudit.api.claims import claim as claim
    from dpaudit.api.curves import Tradeoff as Tradeoff
    from dpaudit.api.curves import tradeoff as tradeoff
    from dpaudit.api.results import Bound as Bound
    from dpaudit.api.results import ClaimTest as ClaimTest
    from dpaudit.api.results import Estimate as Estimate
    from dpaudit.api.scores import Scores as Scores
    from dpaudit.api.training import Audit as Audit
    from dpaudit.api.training import Contract as Contract
    from dpaudit.api.training import audit as audit
    from dpaudit.api.training import check as check

__version__ = "0.1.0"

_DOOR = {
    "Audit": "training",
    "Bound": "results",
    "ClaimTest": "results",
    "Contract": "training",
    "Estimate": "results",
    "Scores": "scores",
    "Tradeoff": "curves",
    "audit": "training",
    "check": "training",
    "claim": "claims",
    "tradeoff": "curves",
}

__all__ = ["Audit", "Bound", "ClaimTest", "Contract", "Estimate", "Scores", "Tradeoff", "audit", "check", "claim",
           "tradeoff"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dpaudit.api.{_DOOR[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
