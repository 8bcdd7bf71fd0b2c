"""The random streams of one trainer, and noise that repeats: a function of (noise seed, step, shape, place) alone.

Foreign code draws from torch's global generator, from generators of its own, or from numpy's. Two things are needed of
it: trainers must not disturb each other (`Streams`), and with a noise seed the noise of a step must not depend on the
records (`FrozenNoise`). The second can't be had by seeding alone, because dropout or an augmentation draws from the
same stream, as many numbers as the batch is large. Hence every draw of torch inside a step gets a seed of its own.

A generator that is kept from step to step is taken over when it draws for the first time. One that the step itself
seeds with a number that does not depend on the noise seed is left alone: what it draws is public. That is a constant,
or a fault (the same noise in every step) that must stay visible. A first step does not show which of the two it is, so
a rehearsal finds out beforehand (`rehearsal.py`); what it has not met is left alone from the second time on.
"""

import contextlib
import functools
import hashlib
import random
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS: frozenset[Any] = frozenset(
    {
        torch.normal,
        torch.randn,
        torch.randn_like,
        torch.rand,
        torch.rand_like,
        torch.bernoulli,
        torch.poisson,
        Tensor.normal_,
        Tensor.uniform_,
        Tensor.exponential_,
        Tensor.cauchy_,
        Tensor.log_normal_,
        Tensor.geometric_,
        Tensor.bernoulli_,
        Tensor.bernoulli,
    }
)
# The mask of a unit would depend on its place in the batch, so neighbours could not be compared.
_DROPOUT = {
    torch.nn.functional.dropout: 2,  # place of `training` among the arguments
    torch.nn.functional.dropout1d: 2,
    torch.nn.functional.dropout2d: 2,
    torch.nn.functional.dropout3d: 2,
    torch.nn.functional.alpha_dropout: 2,
    torch.nn.functional.feature_alpha_dropout: 2,
    torch.dropout: 2,
}


def seed_of(*parts: object) -> int:
    """63 bits that depend on all parts."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Streams:
    """torch's, numpy's and Python's global streams as one trainer has them; the caller's own are put back after use."""

    def __init__(self, seed: int) -> None:
        self.mark = seed_of("first", seed)
        self._states: tuple[Any, Any, Any] | None = None
        with self.active():
            self.seed(self.mark)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the global streams are this trainer's."""
        before = _states()
        if self._states is not None:
            _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(before)

    def seed(self, value: int) -> None:
        """All three, while active."""
        _seed_torch(value)
        np.random.seed(value % 2**32)
        random.seed(value)

    def after_construction(self, noise_seed: int | None) -> None:
        """Go on, while active, with the noise seed, or without one with secret numbers.

        Without one, a stream that the construction itself has seeded is kept: then its noise is no secret, and a
        check of the production mode must be able to see that.
        """
        if noise_seed is None and torch.initial_seed() != self.mark:
            return
        self.seed(secrets.randbits(62) if noise_seed is None else seed_of("noise", noise_seed))

    def as_without_a_seed(self, init: Callable[[], object]) -> None:
        """Go on, while active, from where a construction that is handed no seed leaves the streams.

        That is at secret numbers, unless the construction seeds them by itself.
        """
        self.seed(secrets.randbits(62))
        init()


def _seed_torch(value: int) -> None:
    """torch.manual_seed for the devices in use; it takes a stack trace for those that are not, at every call."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


Site = tuple[tuple[str, str, int], ...]  # file, function and line of every call from the step down to a draw


class Public:
    """The generators that steps of one factory seed with public numbers: where they draw, and the numbers.

    Shared by all trainers of the factory and their copies; a rehearsal fills it.
    """

    def __init__(self) -> None:
        self.sites: frozenset[Site] = frozenset()
        self.numbers: frozenset[int] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Public":
        return self

    def covers(self, seed: int) -> bool:
        """Whether the generator that is about to draw, and came with this seed, is one of them."""
        return seed in self.numbers or (bool(self.sites) and site() in self.sites)


class Met:
    """What a rehearsal notes: which seeds generators came with, and which generators are kept from step to step."""

    def __init__(self) -> None:
        self.seeds: dict[Site, list[int]] = {}
        self._kept: dict[int, tuple[Site, int]] = {}
        self._first: dict[int, tuple[Site, int]] = {}

    def seeded(self, generator: torch.Generator) -> None:
        """It draws for the first time since its owner has seeded it."""
        here, seed = site(), generator.initial_seed()
        self.seeds.setdefault(here, []).append(seed)
        self._first.setdefault(id(generator), (here, seed))

    def kept(self, generator: torch.Generator) -> None:
        """It draws again in a later step, and nobody has seeded it since."""
        self._kept[id(generator)] = self._first[id(generator)]

    def fresh(self) -> set[Site]:
        """Where generators draw none of which was kept."""
        return self.seeds.keys() - {place for place, _ in self._kept.values()}

    def public(self, other: "Met") -> tuple[frozenset[Site], frozenset[int]]:
        """(sites, numbers) at which this rehearsal and one with another noise seed met the same seeds."""
        sites = {place for place in self.fresh() & other.fresh() if self.seeds[place] == other.seeds[place]}
        kept = {seed for met in (self, other) for _, seed in met._kept.values()}
        return frozenset(sites), frozenset(seed for place in sites for seed in self.seeds[place]) - kept


_OURS = __name__.rpartition(".")[0]


def site() -> Site:
    """Of the draw that is being made, without the calls that lead to the step and without ours."""
    places: list[tuple[str, str, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == f"{_OURS}.function":  # it calls a step; a loop has a thread of its own, and there the calls end
            break
        if not module.startswith(f"{_OURS}."):
            places.append((frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lineno))
        frame = frame.f_back
    return tuple(places)


class FrozenNoise(TorchFunctionMode):
    """While active, every draw of torch is a function of (noise seed, step, function, shape, how many before it).

    public: what a rehearsal has found. met: where this trainer is a rehearsal, what it notes.
    """

    def __init__(self, noise_seed: int, public: Public | None = None) -> None:
        super().__init__()
        self.noise_seed, self.step = noise_seed, 0
        self.public = public or Public()
        self.met: Met | None = None
        self.mark = seed_of("mark", noise_seed, 0)
        self._marks = {self.mark}
        self._counts: dict[tuple[object, ...], int] = {}
        self._first_seeds: dict[int, int] = {}  # seed that a generator came with -> step in which it was met
        self._known: list[torch.Generator] = []
        self._left: list[torch.Generator] = []  # what was left alone in this step because it is public

    def begin(self, step: int) -> None:
        """A new step, on the thread whose streams are active.

        PyTorch suspends the mode while a backward pass runs. What a hook draws there comes from the global generator
        in its order, so each step seeds it otherwise.
        """
        self.step, self.mark = step, seed_of("mark", self.noise_seed, step)
        self._marks.add(self.mark)
        self._counts.clear()
        self._left.clear()
        _seed_torch(self.mark)
        np.random.seed(seed_of("numpy", self.noise_seed, step) % 2**32)
        random.seed(seed_of("python", self.noise_seed, step))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _DRAWS:
            return self._draw(func, args, options)
        if func in _DROPOUT:
            place = _DROPOUT[func]
            args = (*args[:place], False, *args[place + 1 :]) if len(args) > place else args
            if len(args) <= place:
                options["train" if func is torch.dropout else "training"] = False
        return func(*args, **options)

    def _draw(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        generator = options.get("generator") or _default_generator(args, options)
        if generator is None or not self._ours(generator):
            return func(*args, **options)
        place = (getattr(func, "__name__", str(func)), _shape(args, options))
        count = self._counts[place] = self._counts.get(place, 0) + 1
        before = generator.get_state()
        generator.manual_seed(seed_of("draw", self.noise_seed, self.step, *place, count))
        try:
            return func(*args, **options)
        finally:
            generator.set_state(before)

    def _ours(self, generator: torch.Generator) -> bool:
        """Whether nobody has seeded it since we last saw it; a generator met for the first time becomes ours, unless
        it is one that the step seeds with a public number."""
        seed = generator.initial_seed()
        if seed in self._marks:
            if self.met is not None and seed != self.mark:
                self.met.kept(generator)
            return True
        if generator is torch.default_generator or _among(generator, self._left):
            return False
        if self.met is not None:
            self.met.seeded(generator)
        if _among(generator, self._known):
            return False
        if self.public.covers(seed):
            self._left.append(generator)
            return False
        self._known.append(generator)  # keeps it alive: its identity is what it is known by
        first = self._first_seeds.setdefault(seed, self.step)
        if first != self.step:  # another one came with this very seed in an earlier step
            return False
        generator.manual_seed(self.mark)
        return True


def _among(generator: torch.Generator, others: Sequence[torch.Generator]) -> bool:
    return any(generator is other for other in others)


def _default_generator(args: Sequence[Any], options: Mapping[str, Any]) -> torch.Generator | None:
    device = options.get("device") or next((value.device for value in args if isinstance(value, Tensor)), "cpu")
    kind = torch.device(device)
    if kind.type == "cuda":
        place = torch.cuda.current_device() if kind.index is None else kind.index
        generators: Sequence[torch.Generator] = torch.cuda.default_generators
        return generators[place]
    return torch.default_generator if kind.type == "cpu" else None


def _shape(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[object, ...]:
    """Of what is drawn, as it is asked for."""
    asked = [tuple(value.shape) if isinstance(value, Tensor) else value for value in args]
    asked.append(options.get("size"))
    return tuple(str(value) for value in asked if not isinstance(value, float))


def thread_of(mode: FrozenNoise | None, function: Callable[[], None]) -> Callable[[], None]:
    """`function` under the mode, which belongs to the thread that enters it."""
    if mode is None:
        return function

    @functools.wraps(function)
    def run() -> None:
        with mode:
            function()

    return run
