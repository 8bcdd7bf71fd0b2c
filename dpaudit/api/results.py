"""What the Python door answers with: a bound, an estimate, the test of a claim, each with its limits."""

import math
from dataclasses import dataclass
from typing import Any

from dpaudit import verdict
from dpaudit.api import html
from dpaudit.documents import Claim, ScoresDocument, Test, Verdict

LIMIT = "An audit can refute a claim; it can never prove privacy."


@dataclass(frozen=True)
class Bound:
    """A lower bound on eps at `delta`, with the largest that this game could have shown (`ceiling`).

    method, assumes: the theorem and the family that it needs ("none": nothing). selection: how guesses or thresholds
    were fixed. decides: False for what informs only, beside the bound that was chosen beforehand. estimate: True where
    there is no finite-sample validity. `float(bound)` is its value.

    >>> import numpy as np, dpaudit
    >>> rng = np.random.default_rng(0)
    >>> member = rng.random(1000) < 0.5
    >>> dpaudit.Scores(rng.normal(size=1000) + 2 * member, member, coins="independent").epsilon(1e-5)
    Bound: eps >= 3.1 with confidence 0.95 at delta = 1e-05 (ceiling 3.1: reached, more canaries needed)
      steinke, assumes none; 70 of 70 guesses right, fixed by the number of records: 35 top, 35 bottom (ties: seed 0)
    """

    value: float
    ceiling: float
    confidence: float
    delta: float
    method: str
    assumes: str
    selection: str
    n: int
    guesses: int | None = None
    correct: int | None = None
    decides: bool = True
    estimate: bool = False

    @classmethod
    def of(cls, test: Test, confidence: float) -> "Bound":
        """From a test that has a bound. confidence: of the bound, or of the family that it is the best of."""
        assert test.epsilon_lower is not None and test.ceiling is not None
        return cls(
            value=float(test.epsilon_lower),
            ceiling=float(test.ceiling),
            confidence=confidence,
            delta=test.delta,
            method=test.bound,
            assumes=test.assumes,
            selection=test.selection,
            n=test.n,
            guesses=test.guesses,
            correct=test.correct,
            decides=test.decides,
            estimate=test.estimate,
        )

    @property
    def at_ceiling(self) -> bool:
        """Whether the game could have shown no more: it takes more canaries to say more."""
        return math.isfinite(self.ceiling) and 0 < self.ceiling <= self.value * (1 + 1e-6)

    @property
    def role(self) -> str:
        """What the bound may be used for."""
        return "estimate" if self.estimate else "decides" if self.decides else "informs only"

    def __float__(self) -> float:
        return self.value

    def _counted(self) -> str:
        return "" if self.guesses is None else f"{self.correct} of {self.guesses} guesses right, "

    def __repr__(self) -> str:
        top = f"{self.ceiling:.3g}" + (": reached, more canaries needed" if self.at_ceiling else "")
        role = "" if self.role == "decides" else f" [{self.role}]"
        return (
            f"Bound{role}: eps >= {self.value:.3g} with confidence {self.confidence:g} at delta = {self.delta:g} "
            f"(ceiling {top})\n  {self.method}, assumes {self.assumes}; {self._counted()}{self.selection}"
        )

    def _repr_html_(self) -> str:
        rows = {
            "ceiling": f"{self.ceiling:.4g}" + (" (reached: more canaries needed)" if self.at_ceiling else ""),
            "confidence": f"{self.confidence:g}",
            "method": f"{self.method}, assumes {self.assumes} ({self.role})",
            "records": self.n,
            "selection": f"{self._counted()}{self.selection}",
        }
        return html.table(f"eps ≥ {self.value:.4g} at delta = {self.delta:g}", rows)


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval: it describes these scores and bounds nothing. `float(estimate)` is its value.

    >>> import dpaudit
    >>> dpaudit.Scores(in_scores=range(20, 60), out_scores=range(40)).auc()
    0.875 (0.772 to 0.933 at 95 %)
    """

    value: float
    low: float
    high: float
    confidence: float
    what: str

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f} at {100 * self.confidence:g} %)"

    def _repr_html_(self) -> str:
        return html.table(f"{self.what} {self.value:.4f}", {"interval": f"{self!r}"})


@dataclass(frozen=True)
class ClaimTest:
    """What scores say of a claim; the verdict is the judge's (dpaudit.verdict), the same as the shell's.

    p_value, e_value: of the test that decides; None where none was run (an unsound game, coins that are not known).
    power: None unless a control earned it; without it nothing can be "not refuted". document: all of it, as
    `dpaudit scores --json` prints it.

    >>> import numpy as np, dpaudit
    >>> rng = np.random.default_rng(0)
    >>> member = rng.random(1000) < 0.5
    >>> scores = dpaudit.Scores(rng.normal(size=1000) + 3 * member, member, coins="independent", separate=True)
    >>> found = scores.test(sigma=1, rate=1, steps=1)
    >>> found.verdict, found.p_value < 1e-6
    ('refuted', True)
    """

    claim: Claim
    document: ScoresDocument

    @property
    def _decided(self) -> Test | None:
        return next((test for test in self.document.tests if verdict.counts(test)), None)

    @property
    def verdict(self) -> Verdict:
        """invalid, refuted, inconclusive or not refuted."""
        return self.document.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """In sentences."""
        return self.document.reasons

    @property
    def p_value(self) -> float | None:
        """Of the claim, by the test that decides."""
        return None if self._decided is None else self._decided.p_value

    @property
    def e_value(self) -> float | None:
        """Evidence against the claim: refuted at 1 / alpha."""
        found = self._decided
        return None if found is None or found.e_value is None else float(found.e_value)

    @property
    def power(self) -> float | None:
        """That the control earned."""
        return None if self._decided is None else self._decided.power

    def _rows(self) -> dict[str, Any]:
        claim = self.claim
        stated = "no mechanism stated"
        if claim.noise_multiplier is not None:
            stated = f"sigma {claim.noise_multiplier:g}, q {claim.sample_rate:g}, T {claim.steps}"
        p, e, power = self.p_value, self.e_value, self.power
        rows = {"claim": f"eps = {float(claim.epsilon):.4g} at delta = {claim.delta:g} ({stated})"}
        if p is not None and e is not None:
            shown = "not known" if power is None else f"{power:.0%}"
            rows["p-value"] = f"{p:.3g}; e-value {e:.3g} ({1 / self.document.alpha:g} refutes); power {shown}"
        return rows

    def _notes(self) -> list[str]:
        open_ = [] if self._decided is not None else [
            f"{check.name}: {check.explanation}"
            for check in self.document.validity.checks
            if check.status == "not applicable" and check.name != "blind baseline"
        ]  # fmt: skip
        return [*self.reasons, *open_, LIMIT]

    def __repr__(self) -> str:
        lines = [f"{name:8}  {value}" for name, value in self._rows().items()]
        return "\n".join([f"verdict   {self.verdict}", *lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        return html.verdict("Test of the claim", self.verdict, self._rows(), self._notes())
