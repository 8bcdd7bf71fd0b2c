"""A trainer under test during a game: every call under a time limit, every answer checked at the door.

The step contract has a door of its own (attacks.contract.probe), which remembers what it was told; a game asks each
question once, in the order of a training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attacks.contract.guard import MethodFailure, call
from attacks.contract.subject import as_tensor
from dpaudit.claims import StepClaim
from trainers.protocol import OPTIONAL, REQUIRED, lacking

_MISSING = object()


class Subject:
    """One trainer. Raises MethodFailure (a UsageError: one line that names the method) for whatever goes wrong."""

    def __init__(self, trainer: Any, limit: float) -> None:
        self.trainer, self.limit = trainer, limit
        for name in REQUIRED:
            if call(name, getattr, trainer, name, _MISSING, limit=limit) is _MISSING:
                raise MethodFailure(name, f"missing; the trainer must offer {', '.join(REQUIRED)}")

    @classmethod
    def build(
        cls,
        factory: Callable[..., Any],
        records: Sequence[Any] | None,
        *,
        seed: int,
        noise_seed: int | None,
        limit: float,
    ) -> "Subject":
        """A fresh trainer."""
        items = None if records is None else list(records)
        return cls(call("factory", factory, items, seed=seed, noise_seed=noise_seed, limit=limit), limit)

    def offers(self, *names: str) -> bool:
        """Whether all of these optional methods are there."""
        assert set(names) <= set(OPTIONAL)
        return all(callable(getattr(self.trainer, name, None)) for name in names)

    def lacking(self, name: str) -> str:
        """Why an optional method is not there."""
        return lacking(self.trainer, name)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return call(f"{name}()", getattr(self.trainer, name), *arguments, limit=self.limit)

    def records(self) -> list[Any]:
        """The units in use."""
        found: list[Any] = call("records", lambda: list(self.trainer.records), limit=self.limit)
        return found

    def claim(self) -> StepClaim:
        """The validated claim."""
        value = call("claim", lambda: self.trainer.claim, limit=self.limit)
        if not isinstance(value, StepClaim):
            raise MethodFailure("claim", f"got {type(value).__name__}; accepted: dpaudit.claims.StepClaim")
        return value

    def sample(self) -> list[int]:
        """The indices of the next batch."""
        value = self._ask("sample")
        units = len(self.trainer.records)
        try:
            indices = [int(index) for index in value]
        except (TypeError, ValueError):
            raise MethodFailure("sample()", f"returned {type(value).__name__}; accepted: a list of indices") from None
        if any(not 0 <= index < units for index in indices):
            bad = next(index for index in indices if not 0 <= index < units)
            raise MethodFailure("sample()", f"drew index {bad}; accepted: 0 to {units - 1} ({units} records)")
        return indices

    def step(self, indices: Sequence[int]) -> None:
        """One step."""
        name = "step()" if len(indices) else "step([]), a batch without records"
        call(name, self.trainer.step, list(indices), limit=self.limit)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters."""
        return {name: tuple(value.shape) for name, value in self.values().items()}

    def values(self) -> dict[str, Tensor]:
        """The trained parameters, float32 on the CPU."""
        return {name: value for name, value in self._tensors("parameters").items() if value is not None}

    def size(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def released(self) -> dict[str, Tensor | None]:
        """Of the last step, float32 on the CPU."""
        return self._tensors("released")

    def gradient(self, record: Any) -> dict[str, Tensor]:
        """One record's gradient before clipping."""
        return {name: value for name, value in self._tensors("gradient", record).items() if value is not None}

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """A canary gradient for the next step."""
        self._ask("inject", dict(gradient))

    def canaries(self, count: int, seed: int) -> list[Any]:
        """Records to insert, exactly `count`."""
        value = self._ask("canaries", count, seed)
        if not isinstance(value, Sequence) or len(value) != count:
            found = f"{len(value)} records" if isinstance(value, Sequence) else type(value).__name__
            raise MethodFailure("canaries()", f"returned {found}; accepted: a list of the {count} that were asked for")
        return list(value)

    def score(self, record: Any) -> float:
        """Higher = was in training. Not finite: a sign of a broken model, told apart by the caller."""
        return call("score()", lambda: float(self.trainer.score(record)), limit=self.limit)  # type: ignore[no-any-return]

    def epsilon(self, delta: float) -> float:
        """What the trainer says it has spent."""
        value = self._ask("epsilon", delta)
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if math.isnan(number) or number < 0:
            raise MethodFailure("epsilon()", f"returned {value!r:.40}; accepted: a number >= 0, or inf")
        return number

    def _tensors(self, name: str, *arguments: Any) -> dict[str, Tensor | None]:
        value = self._ask(name, *arguments)
        if not isinstance(value, Mapping) or not value:
            raise MethodFailure(f"{name}()", f"returned {type(value).__name__}; accepted: a dict of tensors by name")
        out: dict[str, Tensor | None] = {}
        for key, tensor in value.items():
            none = tensor is None and name == "released"
            out[str(key)] = (
                None if none else as_tensor(f"{name}()", key, tensor).detach().to("cpu", torch.float32, copy=True)
            )
        return out
