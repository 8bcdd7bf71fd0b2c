"""A trainer under test: what `dpaudit check` and `dpaudit audit-trainer` ask of training code that they don't know.

`module:factory` names a callable `factory(records=None, *, seed, noise_seed=None) -> trainer`. Without records the
trainer uses its own. A record is one unit (what one person contributes), anything that the trainer understands: the
caller only drops, doubles, swaps or replaces items of `trainer.records` to build neighbouring data sets.

Three rules make a trainer testable:

- `seed` fixes initial parameters and sampling;
- the noise of step t depends on (noise_seed, t, parameter name) alone, never on records or indices, so that two
  neighbouring data sets can be compared under frozen noise (noise_seed None: fresh noise);
- C, sigma, q, T and the expected batch size are public numbers: they don't follow the records handed in.

Conventions. `claim.noise_multiplier` is sigma / C whatever the relation (Laplace: scale / C, where C bounds the L1
norm). For `zeroth-order` the private quantity is one number per direction: `released()` either returns those numbers
(under names that are no parameters) or rank-one tensors named and shaped like the parameters, with `direction()`
giving the public direction of the last step. For `correlated` noise `mixing(steps)` may return the (steps, steps)
matrix M whose row t makes the noise of step t out of white noise of standard deviation sigma * C.

`step` is given sets of indices: a trainer whose own sampler never repeats an index need not cope with a repeated one. A
fault may start late (after a warm-up, when a unit comes a second time, in a batch that is larger than one physical
batch) or exist only in production (`noise_seed=None`); the step contract looks there too.
A trainer may say in `unavailable` (method name -> reason) why it does not offer an optional method.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dpaudit.claims import StepClaim

Record = Any

REQUIRED = ("records", "claim", "step", "released", "parameters")
OPTIONAL = (
    "extreme_records",
    "sample",
    "applied",
    "select",
    "gradient",
    "inject",
    "canaries",
    "score",
    "epsilon",
    "save",
    "load",
    "assign",
    "direction",
    "mixing",
)


@runtime_checkable
class Trainer(Protocol):
    """The part that every trainer must offer."""

    @property
    def records(self) -> Sequence[Record]:
        """The units in use."""

    @property
    def claim(self) -> StepClaim:
        """What the trainer says about one of its steps."""

    def step(self, indices: Sequence[int]) -> None:
        """One logical DP step on exactly these records, as a set; may be empty."""

    def released(self) -> Mapping[str, Tensor | None]:
        """Of the last step, for every block that received noise, pruned later or not.

        (sum of clipped gradients + noise) / expected batch size, before pruning and optimiser, shaped like the
        parameter of that name; None = no noise was drawn for this block.
        """

    def parameters(self) -> Mapping[str, Tensor]:
        """The trained parameters by name."""


class Full(Trainer, Protocol):
    """Everything that may be offered; each method opens more checks, and none of these is required."""

    def extreme_records(self) -> Sequence[Record]:
        """Records that push gradients as far as they go: huge, zero, NaN."""

    def sample(self) -> Sequence[int]:
        """The indices of the sampler's next draw; every call draws afresh."""

    def applied(self) -> set[str]:
        """Blocks that the last step really updated."""

    def select(self, noisy: Mapping[str, Tensor]) -> set[str]:
        """The update mask as a function of a noisy gradient."""

    def gradient(self, record: Record) -> Mapping[str, Tensor]:
        """One record's gradient at the present parameters, before clipping."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """Add a canary gradient to the next step, before clipping, as one more unit."""

    def canaries(self, n: int, seed: int) -> Sequence[Record]:
        """Records to insert."""

    def score(self, record: Record) -> float:
        """Higher = "was in training"."""

    def epsilon(self, delta: float) -> float:
        """What the trainer says it has spent so far."""

    def save(self, path: Path) -> None:
        """Write a checkpoint to the file `path`."""

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the trained parameters and nothing else: histories can then be compared at equal parameters."""

    def direction(self) -> Mapping[str, Tensor]:
        """Zeroth-order only: the public direction of the last step."""

    def mixing(self, steps: int) -> Tensor:
        """Correlated noise only: lower-triangular (steps, steps) matrix from white noise to the noise of each step."""


def lacking(trainer: object, name: str) -> str:
    """Why an optional method is not offered: what the trainer's `unavailable` says, if it has one."""
    reasons = getattr(trainer, "unavailable", None)
    said = reasons.get(name) if isinstance(reasons, Mapping) else None
    return f"no {name}(): {said}" if isinstance(said, str) else f"the trainer offers no {name}()"


class Factory(Protocol):
    """Builds a fresh trainer."""

    def __call__(
        self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None
    ) -> Trainer: ...
