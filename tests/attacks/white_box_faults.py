"""Trainers for the white-box game: what is wrong with the noise, the clipping, or the way in for canary gradients.

A channel counts as open only where an injected gradient reaches every released sum. `inject` may be dead from the
start, from some step on, for some coordinates, or only when a batch holds other records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
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


class NoEmpty(Toy):
    """Can't take a batch without records, which its sampler hardly ever draws; no fault of privacy."""

    def step(self, indices: Sequence[int]) -> None:
        if not len(indices):
            raise RuntimeError("expected groups to be greater than 0, but got groups=0")
        super().step(indices)


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


class LastClean(Remembering):
    """The last of the steps has no noise."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh * (len(before) != 24)


class FirstClean(Remembering):
    """The first step has no noise."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh * (len(before) > 0)


class Alternating(Remembering):
    """Half of the noise and 1.32 times it in turn: right on average."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh * (0.5 if len(before) % 2 else 1.75**0.5)


class SomeClean(Remembering):
    """250 of 2,500 coordinates have no noise, the others a little more: right on average."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh * np.where(np.arange(len(fresh)) < 250, 0.0, (10 / 9) ** 0.5)


class LowRank(Remembering):
    """Noise in a fixed subspace of 60 dimensions, right on average."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        if not before:
            self.basis = np.linalg.qr(np.random.default_rng(3).normal(size=(len(fresh), 60)))[0]
        return self.basis @ (self.basis.T @ fresh) * (len(fresh) / 60) ** 0.5


class Signs(Remembering):
    """Plus or minus sigma C: the claimed size, not the claimed law."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return np.sign(fresh)


class TwoBlocks(Toy):
    """The same weights in two blocks: a body and a head of 40."""

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        return {"body": flat[:-40], "head": flat[-40:]}

    def released(self) -> Mapping[str, Tensor | None]:
        return self.cut(self.last)

    def parameters(self) -> Mapping[str, Tensor]:
        return self.cut(self.w)

    def gradient(self, record: Tensor) -> Mapping[str, Tensor]:
        return self.cut(-record)

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        super().inject({"w": torch.cat([gradient["body"], gradient["head"]])})


class HeadClean(Remembering, TwoBlocks):
    """No noise in the head."""

    def following(self, fresh: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
        return fresh * (np.arange(len(fresh)) < len(fresh) - 40)


class HeadHidden(HeadClean):
    """And says so: None where no noise was drawn, though the head is trained."""

    def released(self) -> Mapping[str, Tensor | None]:
        return {**super().released(), "head": None}


class HeadFrozen(TwoBlocks):
    """The head is neither trained nor released: nothing leaks there, and nothing was looked at."""

    def step(self, indices: Sequence[int]) -> None:
        before = self.w[-40:].clone()
        super().step(indices)
        self.w[-40:] = before

    def released(self) -> Mapping[str, Tensor | None]:
        return {**super().released(), "head": None}


class SampleAll(Toy):
    """sample() draws every record in every step."""

    def sample(self) -> list[int]:
        return list(range(len(self.records)))


class SampleOften(Toy):
    """Twice the claimed rate."""

    def sample(self) -> list[int]:
        return np.flatnonzero(self.sampler.random(len(self.records)) < 2 * self.rate).tolist()


class SampleInTurn(Toy):
    """Every record or none: the right number on average."""

    def sample(self) -> list[int]:
        return list(range(len(self.records))) if self.done % 4 == 3 else []


class Lies(Toy):
    """The noisy sum is shown, and the weights follow the clean one."""

    def step(self, indices: Sequence[int]) -> None:
        before, injected = self.w.clone(), list(self.injected)
        super().step(indices)
        rows = [-self.records[index] for index in indices] + injected
        clean = sum((row / max(1.0, float(row.norm())) for row in rows), torch.zeros_like(before))
        self.w = before - clean / 5.0


class UnclippedBesideLarge(Unclipped):
    """Records so large that the noise can't be seen beside them: nothing of chance is left to refute with."""

    def __init__(self, records: Sequence[Tensor] | None = None, **options: Any) -> None:
        super().__init__([30 * one for one in Toy(seed=0).records] if records is None else records, **options)


class HalvesClipped(Toy):
    """Each half of a gradient is clipped to C by itself: a unit moves the sum by up to sqrt 2 C."""

    def step(self, indices: Sequence[int]) -> None:
        rows = [-self.records[index] for index in indices] + self.injected
        half = len(self.w) // 2
        clipped = [
            torch.cat([part / max(1.0, float(part.norm())) for part in (row[:half], row[half:])]) for row in rows
        ]
        self.clip, self.records, kept = False, [-one for one in clipped], self.records
        self.injected = []
        super().step(range(len(clipped)))
        self.records = kept


class UnclippedNotFrozen(Unclipped):
    """Its noise does not follow noise_seed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "noise_seed": None})


class UnclippedShifted(Unclipped):
    """What is injected moves the stream of the noise on: equal steps differ by more than the gradient."""

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        self.noise_rng.normal(size=7)
        super().inject(gradient)


class Alike(Toy):
    """Records that pull the same way, as those of a real training do; each counts `weight` times."""

    weight = 1.0

    def __init__(self, records: Sequence[Tensor] | None = None, **options: Any) -> None:
        own = [3 * torch.ones_like(one) + one for one in Toy(seed=0).records]
        super().__init__(own if records is None else records, **options)

    def step(self, indices: Sequence[int]) -> None:
        once = sum((-one / max(1.0, float(one.norm())) for one in (self.records[i] for i in indices)), torch.zeros(()))
        super().step(indices)
        more = (self.weight - 1) * once / 5.0
        self.last, self.w = self.last + more, self.w - more


class HalfMore(Alike):
    weight = 1.5


class Twice(Alike):
    weight = 2.0


class Thrice(Alike):
    weight = 3.0


class WithoutRecords(Alike):
    weight = 0.0


class AlikeMoreNoise(Alike):
    """Half as much noise again."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"noise": 1.5, **options})


class NotFinite(TwoBlocks):
    """From the sixth step on one number of the head is NaN in what is released."""

    def released(self) -> Mapping[str, Tensor | None]:
        shown = super().released()
        if self.done > 5:
            shown["head"][3] = float("nan")  # type: ignore[index]
        return shown


class SomeScoresLost(Toy):
    """Every third candidate scores NaN after training."""

    def score(self, record: Tensor) -> float:
        value = super().score(record)
        return float("nan") if self.done and round(1e6 * float(record[0])) % 3 == 0 else value


class AllScoresLost(Toy):
    def score(self, record: Tensor) -> float:
        return float("nan") if self.done else super().score(record)
