"""The noise of a step: drawn by several threads, and drawn ahead while the gradient is computed.

Every tensor's noise is a function of (key, step, name) alone, so neither the number of threads nor the moment of
drawing can change a number: the result is bit-identical to drawing one name after the other.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dpaudit.randomness import Key
from trainers.gradients import Gradient

Shapes = Mapping[str, tuple[int, ...]]
Floats = npt.NDArray[np.floating]
FEW = 200_000  # numbers that one thread draws faster than several are started


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
    _ahead: dict[tuple[int, str, tuple[int, ...]], Future[Floats]] = field(default_factory=dict, repr=False)

    def of(self, like: Mapping[str, torch.Tensor], *, step: int, std: float) -> Gradient:
        """Noise of std `std` for every tensor of `like`, on its device: float32, or float64 where secure."""
        drawn = self._standard({name: tuple(value.shape) for name, value in like.items()}, step)
        if self.secure:
            return {name: torch.from_numpy(std * drawn[name]).to(value.device) for name, value in like.items()}
        return {name: torch.from_numpy(drawn[name]).to(value.device) * std for name, value in like.items()}

    def draw_ahead(self, shapes: Shapes, *, step: int) -> None:
        """Begin with the noise of `step` in the background; `of` takes it. Needs neither records nor gradients."""
        self._ahead = self._submit(shapes, step)

    def close(self) -> None:
        """Stop the threads; noise that nobody took is thrown away."""
        self._ahead = {}
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _standard(self, shapes: Shapes, step: int) -> dict[str, Floats]:
        begun, self._ahead = self._ahead, {}
        missing = {name: shape for name, shape in shapes.items() if (step, name, shape) not in begun}
        if self.threads == 1 or sum(math.prod(shape) for shape in missing.values()) < FEW:
            drawn = {name: self._one(name, shape, step) for name, shape in missing.items()}
        else:
            begun |= self._submit(missing, step)
            drawn = {}
        return {name: drawn[name] if name in drawn else begun[step, name, shapes[name]].result() for name in shapes}

    def _submit(self, shapes: Shapes, step: int) -> dict[tuple[int, str, tuple[int, ...]], Future[Floats]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads or torch.get_num_threads(), thread_name_prefix="noise")
        # The largest first, so that no thread ends with a big one while the others are idle.
        names = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
        return {(step, name, shapes[name]): self._pool.submit(self._one, name, shapes[name], step) for name in names}

    def _one(self, name: str, shape: tuple[int, ...], step: int) -> Floats:
        draw = self.key.secure_normal if self.secure else self.key.normal
        return draw(shape, step=step, name=name)


def worth_drawing_ahead(device: torch.device) -> bool:
    """Whether a processor core is idle while the gradient is computed: on an accelerator, or with threads to spare."""
    return device.type != "cpu" or torch.get_num_threads() < (os.cpu_count() or 1)
