"""The white-box game: gradient canaries, every noisy gradient seen.

Each candidate is a unit vector, all of them orthonormal; when its coin says so it takes part in training as one more
unit whose gradient is `scale * C` times that vector, Poisson-sampled, clipped and noised by the code under test like
any other. The auditor knows the data and sees every released gradient, so it subtracts what the known records
contributed and projects the rest. What that shows, and what it says about the coins, is dpaudit.evidence.channel: the
channel is known exactly, so nothing is counted and the evidence is a likelihood ratio. Spare directions that hold no
canary show the noise by itself (dpaudit.evidence.noise).

Where the known records can't be subtracted (a trainer that shows no gradients), or the auditor sees the final update
alone (`final`), or directions are random and meet (`random`), the channel is not known: the coins are then read by the
f-DP theorem (attacks.games.reading), and no power is stated.

Sources: Nasr et al. 2023 (arXiv 2302.07956), Steinke et al. 2023 (arXiv 2305.08846).
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attacks.canaries import ALL, Plan, coin_frame
from attacks.games import controls
from attacks.games.directions import Directions, Kind, Rows, draw
from dpaudit.documents import Control
from dpaudit.errors import rejected
from dpaudit.evidence.channel import Channel
from dpaudit.evidence.game import SPARE
from dpaudit.evidence.places import PlacedNoise
from dpaudit.evidence.records import Records
from dpaudit.randomness import Key
from trainers.gradients import Gradient

KIND = "gradient"
FINAL = "-final"  # at the end of the coin file's kind: the final update only
DEFAULT_COUNT = 1000
PARAMETERS_PER_CANARY = 10  # fewer, and orthogonal directions would crowd out the model's own gradient
SCALES = (1.0, 100.0)  # half of the canaries arrive at norm C, half far above: both must be clipped to C
SIGMA_REDUCTION = 0.1  # the wrong claim to find: the true sigma is so much smaller
WORDS = {"orthogonal": "orthonormal", "dirac": "single-coordinate", "random": "random"}

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass
class GradientGame:
    """`count` directions with independent fair coins: orthonormal, single coordinates, or random unit vectors.

    known: whether `observe` is told what the other records contributed. predicted: whether it is the auditor's own
    prediction, so that a comparison shows how records are clipped and counted; a sum that the training computed itself
    shows nothing of it. final: nothing is seen of the steps; `see_final` scores the sum of all updates. epoch: t of
    random allocation; None: Poisson sampling. beside: controls of whoever plays it. unreadable: the first release with
    a number that is not finite, in words; nothing is read of it and of what follows.
    """

    count: int
    key: Key
    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    directions: Kind = "orthogonal"
    final: bool = False
    known: bool = True
    epoch: int | None = None
    predicted: bool = True
    members: Bools = field(init=False)
    arrived: controls.Arrived = field(init=False)
    liveness: list[controls.Liveness] = field(init=False, default_factory=list)
    beside: list[Control] = field(init=False, default_factory=list)
    places: PlacedNoise | None = field(init=False, default=None)
    records: Records = field(init=False, default_factory=Records)
    unreadable: str | None = field(init=False, default=None)
    _seen: list[npt.NDArray[np.float32]] = field(init=False, default_factory=list)
    _empty: list[npt.NDArray[np.float32]] = field(init=False, default_factory=list)
    vectors: Directions | None = field(init=False, default=None)
    _last: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.members = self.key.uniform(self.count, step=0, name="gradient canaries", purpose="coins") < 0.5
        self.arrived = controls.Arrived()
        self._last = np.zeros(self.count)

    @property
    def kind(self) -> str:
        """What the coin file calls these canaries: 'gradient', 'gradient-dirac', 'gradient-random-final', …"""
        named = KIND if self.directions == "orthogonal" else f"{KIND}-{self.directions}"
        return named + (FINAL if self.final else "")

    @property
    def exact(self) -> bool:
        """Whether the channel is known, so that coins have a likelihood."""
        return self.known and not self.final and self.directions != "random"

    @property
    def loud(self) -> Bools:
        """(m,) which canaries arrive far above C. Clipped as they must be they look like the others."""
        return np.array([SCALES[index % len(SCALES)] > 1 for index in range(self.count)])

    @property
    def inserted(self) -> npt.NDArray[np.intp]:
        """(k,) numbers of the canaries whose coin put them in."""
        return np.flatnonzero(self.members)

    @property
    def plan(self) -> Plan:
        """A quarter of the candidates guessed on each side, for the bound that assumes nothing; the wrong claim."""
        side = max(1, self.count // 4)
        seed = int(self.key.generator(purpose="gradient ties").integers(2**31))
        return Plan({ALL: (side, side), self.kind: (side, side)}, seed, SIGMA_REDUCTION)

    def frame(self) -> pd.DataFrame:
        """The coin file's rows: id, kind, member, content (a hash of the name: the key defines the direction)."""
        tossed = zip((f"gradient-{index:05d}" for index in range(self.count)), self.members.tolist(), strict=True)
        return coin_frame((name, self.kind, head, hashlib.sha256(name.encode()).hexdigest()) for name, head in tossed)

    def rows(self, parameters: int) -> Rows:
        """(k, parameters) gradients of the inserted canaries. Raises UsageError when there is not room for them."""
        room = parameters // PARAMETERS_PER_CANARY
        if self.count > room:
            why = f"{parameters} trained parameters, {PARAMETERS_PER_CANARY} for each gradient canary"
            raise rejected("--count", self.count, f"at most {room} ({why})")
        drawn = self.count + min(SPARE, parameters - self.count)
        rng = self.key.generator(purpose="gradient directions")
        self.vectors = draw(self.directions, drawn, parameters, rng)
        norms = [SCALES[index % len(SCALES)] * self.max_grad_norm for index in self.inserted]
        return Rows(self.vectors, torch.from_numpy(self.inserted), torch.tensor(norms))

    @property
    def spare(self) -> int:
        """Directions without canaries; none where directions meet or the steps are not seen."""
        return 0 if self.final or self.directions == "random" else max(0, len(self.vectors or ()) - self.count)

    def see_final(self, start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> None:
        """Scores from the first and the last weights alone: an update goes against the gradient."""
        self._finite("the final update", {name: start[name] - end[name].detach() for name in start})
        moved = torch.cat([(start[name] - end[name].detach()).flatten().float().cpu() for name in sorted(start)])
        self._last = self._products(moved)[: self.count]

    def project(self, difference: Gradient) -> Floats:
        """(m + K,) what a difference of releases shows along the directions, in units of C of the sum."""
        return self._along(_joined(difference))

    def _along(self, flat: torch.Tensor) -> Floats:
        return self._products(flat) * self.expected_batch_size / self.max_grad_norm

    def _products(self, flat: torch.Tensor) -> Floats:
        assert self.vectors is not None, "rows() draws them"
        return self.vectors.along(flat).double().numpy()

    def observe(
        self,
        step: int,
        noisy: Gradient,
        known: Gradient,
        taken: npt.NDArray[np.intp],
        without: Callable[[], Gradient] | None = None,
        absent: Collection[str] = (),
    ) -> None:
        """One step: what it shows along every direction; the first steps with canaries are checked for liveness.

        known: clipped sum of the records. taken: the inserted canaries in this step. without: the release of the same
        step and noise without them. absent: blocks that this step did not release, for which `noisy` holds stand-ins.
        """
        if not self._finite(f"step {step}", noisy):
            return
        if without is not None and len(taken) and len(self.liveness) < controls.LIVE_STEPS:
            there = without()
            moved = self.project({name: noisy[name] - there[name] for name in noisy})
            self.liveness.append(controls.Liveness.of(moved, self.inserted[taken], f"step {step}"))
        if self.final:
            return
        size = self.expected_batch_size
        left = _joined({name: noisy[name] - known[name] / size for name in noisy})
        shown = self._along(left)
        assert self.vectors is not None
        held = self.vectors.total(torch.from_numpy(self.inserted[taken]))
        self._place(noisy, left, held, absent)
        if self.exact and self.predicted:
            self._compare(known, left, held, absent)
        self._seen.append(shown[: self.count].astype(np.float32))
        self._empty.append((shown[self.count :] / self.noise_multiplier).astype(np.float32))
        self.arrived.add(shown[: self.count][self.inserted[taken]])

    def _finite(self, where: str, release: Gradient) -> bool:
        """Whether every release so far, and this one, holds finite numbers alone."""
        for name in sorted(release) if self.unreadable is None else ():
            bad = release[name].numel() - int(torch.isfinite(release[name]).sum())
            if bad:
                self.unreadable = (
                    f"{where}: {bad:,} of {release[name].numel():,} numbers in block {name} are not finite"
                )
                break
        return self.unreadable is None

    def _compare(self, known: Gradient, left: torch.Tensor, held: torch.Tensor, absent: Collection[str]) -> None:
        """What one step shows beyond records and canaries, along the sum of its records; blocks not released say
        nothing."""
        covariance = variance = 0.0
        names = sorted(known)
        sizes = [known[name].numel() for name in names]
        for name, beyond, canaries in zip(names, torch.split(left, sizes), torch.split(held, sizes), strict=True):
            if name not in absent:
                mine = known[name].flatten().cpu().double() / self.max_grad_norm
                shown = beyond.double() * (self.expected_batch_size / self.max_grad_norm) - canaries
                covariance += float(shown @ mine)
                variance += float(mine @ mine)
        self.records.add(covariance, variance)

    def _place(self, noisy: Gradient, left: torch.Tensor, held: torch.Tensor, absent: Collection[str]) -> None:
        """The kept coordinates of one step, over sigma C. held: what its canaries put in, over C; each is clipped to C
        along a unit vector."""
        if self.places is None:
            blocks = [(name, noisy[name].numel()) for name in sorted(noisy) if noisy[name].numel()]
            self.places = PlacedNoise(blocks, self.key.generator(purpose="coordinates looked at"))
        kept = torch.from_numpy(self.places.kept)
        whole = len(kept) == len(left)
        unit = self.expected_batch_size / (self.max_grad_norm * self.noise_multiplier)
        released = _joined(noisy)
        shown, total = (left, released) if whole else (left[kept], released[kept])
        self.places.add(
            shown.double().numpy() * unit - held[kept].double().numpy() / self.noise_multiplier,
            total.double().numpy() * unit,
            absent,
        )

    def seen(self) -> Floats:
        """(m, T) in units of C."""
        return np.stack(self._seen, axis=1).astype(np.float64) if self._seen else np.zeros((self.count, 0))

    def empty(self) -> Floats:
        """(T, K) what every step showed along the spare directions, over sigma C."""
        return np.stack(self._empty).astype(np.float64) if self._empty else np.zeros((0, self.spare))

    def scores(self) -> Floats:
        """(m,) log-likelihood ratios under the claim, or projections of the final update."""
        if self.final:
            return self._last
        return self.channel.log_ratio(self.seen())

    @property
    def channel(self) -> Channel:
        """What the claim says about the steps that were seen."""
        return Channel(self.noise_multiplier, self.sample_rate, max(1, len(self._seen)), self.epoch)


def _joined(gradient: Gradient) -> torch.Tensor:
    """(P,) float32 on the CPU, blocks in name order."""
    return torch.cat([gradient[name].flatten().float().cpu() for name in sorted(gradient)])
