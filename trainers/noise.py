"""The noise of a step: drawn by several threads, and drawn ahead while the gradient is computed.

Every tensor's noise is a function of (key, step, name) alone, so neither the number of threads nor the moment of
drawing can change a number: the result is bit-identical to drawing one name after the other.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dpaudit.randomness import Key
from trainers.gradients import Gradient

FEW = 200_000  # numbers that one thread draws faster than several are started


class Address(NamedTuple):
    """What the noise of one tensor is a function of, beside the key."""

    step: int
    name: str
    shape: tuple[int, ...]
    std: float


def noise_like(key: Key, like: Mapping[str, torch.Tensor], *, step: int, std: float, secure: bool = False) -> Gradient:
    """Gaussian noise of std `std` for every tensor that is released: PRF(key, step, its name).

    secure: in float64, as half the sum of four (Key.secure_normal); the caller adds first and rounds once.
    """
    return Noise(key, secure=secure, threads=1).of(like, step=step, std=std)


@dataclass
class Noise:
    """Standard normals of a key for the steps of one training.

    secure: in float64, as half the sum of four (Key.secure_normal); the caller adds first and rounds once.
    threads: how many draw at a time; 0: as many as PyTorch uses for one operation.
    """

    key: Key
    secure: bool = False
    threads: int = 0
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)
    _ahead: dict[Address, Future[torch.Tensor]] = field(default_factory=dict, repr=False)

    def of(self, like: Mapping[str, torch.Tensor], *, step: int, std: float) -> Gradient:
        """Noise of std `std` for every tensor of `like`, on its device: float32, or float64 where secure."""
        begun, self._ahead = self._ahead, {}
        wanted = [Address(step, name, tuple(value.shape), std) for name, value in like.items()]
        missing = [address for address in wanted if address not in begun]
        if self.threads == 1 or sum(math.prod(address.shape) for address in missing) < FEW:
            drawn = {address: self._one(address) for address in missing}
        else:
            begun, drawn = begun | self._submit(missing), {}
        found = [drawn[address] if address in drawn else begun[address].result() for address in wanted]
        return {name: noise.to(value.device) for (name, value), noise in zip(like.items(), found, strict=True)}

    def draw_ahead(self, shapes: Mapping[str, tuple[int, ...]], *, step: int, std: float) -> None:
        """Begin with the noise of `step` in the background; `of` takes it. Needs neither records nor gradients."""
        self._ahead = self._submit([Address(step, name, shape, std) for name, shape in shapes.items()])

    def close(self) -> None:
        """Stop the threads; noise that nobody took is thrown away."""
        self._ahead = {}
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit(self, addresses: Sequence[Address]) -> dict[Address, Future[torch.Tensor]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads or torch.get_num_threads(), thread_name_prefix="noise")
        # The largest first, so that no thread ends with a big one while the others are idle.
        ordered = sorted(addresses, key=lambda address: -math.prod(address.shape))
        return {address: self._pool.submit(self._one, address) for address in ordered}

    def _one(self, address: Address) -> torch.Tensor:
        draw = self.key.secure_normal if self.secure else self.key.normal
        return torch.from_numpy(draw(address.shape, step=address.step, name=address.name)).mul_(address.std)


def worth_drawing_ahead(device: torch.device) -> bool:
    """Whether a processor core is idle while the gradient is computed: on an accelerator, or with threads to spare."""
    return device.type != "cpu" or torch.get_num_threads() < (os.cpu_count() or 1)
