"""One row of the table of planted bugs, and the kinds that they fall into."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REASONING = "design reasoning; no public case found"

KINDS = {
    "clipping": "clipping and unit",
    "isolation": "isolation",
    "noise": "noise",
    "updates": "update",
    "sampling": "sampling and accounting",
    "fusion": "token path",
    "late_noise": "noise that changes over the steps",
    "late_clipping": "clipping that changes over the steps",
    "physical_batches": "logical against physical batches",
    "production": "production only",
    "hidden_state": "state outside the parameters",
    "dead": "nothing happened",
    "probes": "few records",
    "accounting": "accounting of another scheme",
    "unusual": "one size, one moment, one delta",
    "alternating": "between draws and steps, between two units, behind the release",
    "structured": "noise with structure",
}


@dataclass(frozen=True)
class Bug:
    """One planted bug. factory: the trainer protocol's factory.

    out_of_reach: what no test of single steps can see, and why. slow: on the vision-language model, seconds each.
    effect: what becomes of the guarantee. seen_by: the kind of audit that could see it at all. violation: whether the
    guarantee is broken; False where the training is not what it says and yet leaks nothing, for which `fail`,
    `inconclusive` and `not applicable` are right and only a pass is wrong.
    """

    name: str
    catalogue: str
    factory: Callable[..., Any]
    source: str
    out_of_reach: str | None = None
    slow: bool = False
    effect: str | None = None
    seen_by: str | None = None
    violation: bool = True

    @property
    def what(self) -> str:
        """One line, from the class's own documentation."""
        return " ".join((self.factory.__doc__ or "").split())

    @property
    def target(self) -> str | None:
        """The factory as `module:name`, by which other processes build it: where the fault shows in production only."""
        module = self.factory.__module__
        return f"{module}:{self.factory.__qualname__}" if module.endswith(".production") else None

    @property
    def kind(self) -> str:
        """Its kind, which is that of the module that has it."""
        return KINDS[self.factory.__module__.rsplit(".", 1)[-1]]
