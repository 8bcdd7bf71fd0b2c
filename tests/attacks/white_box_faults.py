"""Trainers for the white-box game: what is wrong with the noise, the clipping, or the way in for canary gradients.

A channel counts as open only where an injected gradient reaches every released sum. `inject` may be dead from the
start, from some step on, for some coordinates, or only when a batch holds other records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tests.attacks.external_toy import Toy


class Noise(Toy):
    """`level` times the claimed noise."""

    level = 1.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"noise": self.level, **options})


class Half(Noise):
    level = 0.5


class Ninety(Noise):
    level = 0.9


class Tenth(Noise):
    level = 0.1


class NoNoise(Noise):
    level = 0.0


class MoreNoise(Noise):
    level = 1.5


class LateHalf(Toy):
    """The claimed noise in the first five steps, half of it afterwards."""

    def step(self, indices: Sequence[int]) -> None:
        self.noise = 1.0 if self.done < 5 else 0.5
        super().step(indices)


class Unclipped(Toy):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"clip": False, **options})


class NoGradient(Toy):
    """Other records blur the projections: the game can't take their share away."""

    gradient = None  # type: ignore[assignment]


class HalfNoGradient(Half):
    gradient = None  # type: ignore[assignment]


class NoNoiseNoGradient(NoNoise):
    gradient = None  # type: ignore[assignment]


class UnclippedNoGradient(Unclipped):
    gradient = None  # type: ignore[assignment]


class Dead(Toy):
    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        pass


class DeadHalf(Half):
    inject = Dead.inject


class DeadNoNoise(NoNoise):
    inject = Dead.inject


class DeadLater(Toy):
    """Dead from the seventh step on, with half of the noise."""

    level = 0.5

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        if self.done < 6:
            super().inject(gradient)


class Faint(Toy):
    """A gradient arrives 250 times smaller, so that 100 C comes out below C."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        super().inject({name: value * 0.004 for name, value in gradient.items()})


class LastOnly(Toy):
    """Of several injected gradients the last one is kept."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        self.injected = [gradient["w"]]


class DeadBesideRecords(Toy):
    """What was injected is lost when the batch holds records."""

    def step(self, indices: Sequence[int]) -> None:
        if indices:
            self.injected = []
        super().step(indices)


class Turned(Toy):
    """The injected gradient is subtracted."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        super().inject({name: -value for name, value in gradient.items()})


class Remembering(Toy):
    """Noise of every step from the steps before it; each step alone has the claimed law."""

    def step(self, indices: Sequence[int]) -> None:
        fresh = self.noise_rng
        self.noise_rng = _Recorded(self, fresh)  # type: ignore[assignment]
        super().step(indices)
        self.noise_rng = fresh

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh


class _Recorded:
    def __init__(self, toy: Remembering, fresh: np.random.Generator) -> None:
        self.toy, self.fresh = toy, fresh

    def normal(self, size: int) -> np.ndarray:
        drawn = self.fresh.normal(size=size)
        earlier = self.toy.__dict__.setdefault("drawn", [])
        earlier.append(drawn)
        made = self.toy.following(drawn, earlier[:-1])
        self.toy.__dict__.setdefault("used", []).append(made)
        return made


class Repeats(Remembering):
    """Every second step has the noise of the step before."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return before[-1] if len(before) % 2 else fresh


class Cancels(Remembering):
    """Every second step takes back the noise of the step before."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return -before[-1] if len(before) % 2 else fresh


class Telescopes(Remembering):
    """(e_t - e_(t-1)) / sqrt 2: the sum over all steps has next to no noise."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return (fresh - before[-1]) / np.sqrt(2) if before else fresh


class Lagged(Remembering):
    """(e_t + e_(t-1)) / sqrt 2: the alternating sum has next to no noise."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return (fresh + before[-1]) / np.sqrt(2) if before else fresh


class OneAgain(Remembering):
    """A single step has the noise of an earlier one."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return before[4] if len(before) == 17 else fresh


class Pool(Remembering):
    """Five draws, used in turn."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return before[len(before) % 5] if len(before) >= 5 else fresh


class Arrays(Toy):
    """The protocol in numpy arrays."""

    def released(self) -> Mapping[str, Any]:
        return {"w": self.last.numpy()}

    def parameters(self) -> Mapping[str, Any]:
        return {"w": self.w.numpy()}

    def gradient(self, record: Tensor) -> Mapping[str, Any]:
        return {"w": -record.numpy()}
