"""Data parallel training: several processes (ranks), one run.

Started by `torchrun --nproc-per-node 2 -m dpaudit train …` or `accelerate launch -m dpaudit train …`, or by anything
else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Unit i belongs to rank i mod size, for encoding and for
gradients. In a step

1. every rank derives the batch of all units from the run's key, and adds up the clipped gradients of its own part;
2. the parts are summed on rank 0 (`Ranks.add`): nobody else ever holds the sum without noise;
3. rank 0 puts the step into the ledger, on disk, adds the noise PRF(key, step, name) *once*, and sends the noisy mean
   to all (`Ranks.publish`), who wait for it;
4. every rank makes the same update from the same numbers.

So a step is that of a single process but for the order in which float32 numbers are added (about 1e-7 relative), its
noise is that of a single process to the bit, no rank can apply what the ledger doesn't know, and a run may be resumed
on another number of ranks. Rank 0 alone touches the run folder; key, configuration and checkpoint reach the others from
it, so they need no common file system. What travels between ranks (the key, sums without noise) is not encrypted: the
network must be inside the trust boundary.

A rank that dies takes the run with it: the others stop with EnvironmentFailure as soon as their next exchange fails, at
once when its connection closes, after DPAUDIT_RANK_TIMEOUT seconds (default 600) when it hangs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpaudit import errors
from dpaudit.errors import DpauditError, EnvironmentFailure, UsageError, rejected
from trainers.gradients import Gradient, UnitSum

T = TypeVar("T")
TIMEOUT = "DPAUDIT_RANK_TIMEOUT"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group(Protocol):
    """The processes of one run, as one of them sees them."""

    rank: int
    size: int
    sharded: bool

    @property
    def first(self) -> bool:
        """Whether this process is rank 0: the one that writes, reports and adds noise."""
        ...

    def own(self, units: Sequence[T]) -> list[T]:
        """The units that this rank encodes and computes."""
        ...

    def share(self, batch: Sequence[int]) -> list[int]:
        """The units of a batch that are this rank's own, numbered among its own units."""
        ...

    def add(self, part: UnitSum, batch: Sequence[int]) -> UnitSum:
        """The sum over all ranks on rank 0, norms and losses in the batch's order; elsewhere `part` as it is."""
        ...

    def publish(self, make: Callable[[], Gradient], like: Gradient) -> Gradient:
        """What `make` returns on rank 0, on every rank. Nobody goes on before rank 0 has made it."""
        ...

    def from_first(self, work: Callable[[], bytes]) -> bytes:
        """What `work` returns on rank 0, on every rank; its DpauditError likewise."""
        ...

    def passes(self, wanted: int) -> int:
        """Passes through the model that this rank must make when it needs `wanted`: more with sharded weights."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Around passes through a sharded model: a lost rank shows there first."""
        ...

    def agree(self, what: str, value: bytes) -> None:
        """EnvironmentFailure on every rank unless all ranks hold the same `value`."""
        ...

    def device(self, wanted: str) -> str:
        """The device of this rank's model."""
        ...


class Alone:
    """A single process: everything is its own, nothing is sent."""

    rank, size, first, sharded = 0, 1, True, False

    def own(self, units: Sequence[T]) -> list[T]:
        return list(units)

    def share(self, batch: Sequence[int]) -> list[int]:
        return [int(unit) for unit in batch]

    def add(self, part: UnitSum, batch: Sequence[int]) -> UnitSum:
        return part

    def publish(self, make: Callable[[], Gradient], like: Gradient) -> Gradient:
        return make()

    def from_first(self, work: Callable[[], bytes]) -> bytes:
        return work()

    def passes(self, wanted: int) -> int:
        return wanted

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, what: str, value: bytes) -> None:
        return None

    def device(self, wanted: str) -> str:
        return wanted


@dataclass
class Ranks:
    """This process among several, by torch.distributed: gloo between CPUs, NCCL between GPUs."""

    rank: int
    size: int
    local: int = 0  # rank on this machine: which GPU
    sharded: bool = False  # whether the ranks gather weights for every pass
    started: bool = False  # whether rank 0 has sent anything

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, units: Sequence[T]) -> list[T]:
        return list(units[self.rank :: self.size])

    def share(self, batch: Sequence[int]) -> list[int]:
        return [int(unit) // self.size for unit in batch if unit % self.size == self.rank]

    def add(self, part: UnitSum, batch: Sequence[int]) -> UnitSum:
        names = sorted(part.gradient)
        places = torch.tensor([place for place, unit in enumerate(batch) if unit % self.size == self.rank])
        seen = torch.zeros(2, len(batch), device=part.norms.device)
        if len(places):
            seen[:, places.to(seen.device)] = torch.stack([part.norms, part.losses]).float()
        flat = torch.cat([*(part.gradient[name].float().reshape(-1) for name in names), seen.reshape(-1)])
        with self._exchange():
            dist.reduce(flat, dst=0)
        if not self.first:
            return part
        sizes = [part.gradient[name].numel() for name in names]
        *values, statistics = torch.split(flat, [*sizes, 2 * len(batch)])
        whole = {name: value.view_as(part.gradient[name]) for name, value in zip(names, values, strict=True)}
        norms, losses = statistics.view(2, len(batch))
        return UnitSum(whole, norms, losses)

    def publish(self, make: Callable[[], Gradient], like: Gradient) -> Gradient:
        names = sorted(like)
        made = make() if self.first else like
        flat = torch.cat([made[name].float().reshape(-1) for name in names])
        with self._exchange():
            dist.broadcast(flat, src=0)
        values = torch.split(flat, [like[name].numel() for name in names])
        return {name: value.view_as(like[name]) for name, value in zip(names, values, strict=True)}

    def from_first(self, work: Callable[[], bytes]) -> bytes:
        content = b""
        if self.first:
            try:
                content = b"+" + work()
            except DpauditError as error:
                self.tell(error)
                raise
        self.started = True
        content = self._send(content)
        if content[:1] == b"-":
            raise _failure(*json.loads(content[1:]))
        return content[1:]

    def tell(self, error: DpauditError) -> None:
        """End the others, who wait in `from_first`, with this error of rank 0."""
        self.started = True
        self._send(b"-" + json.dumps([type(error).__name__, str(error)]).encode())

    def _send(self, content: bytes) -> bytes:
        """Bytes of rank 0 on every rank, as tensors (never pickled)."""
        size = torch.tensor([len(content)])
        with self._exchange():
            dist.broadcast(size, src=0)
            buffer = torch.zeros(int(size), dtype=torch.uint8)
            if self.first:
                buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def passes(self, wanted: int) -> int:
        if not self.sharded:
            return wanted
        most = torch.tensor([wanted])
        with self._exchange():
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # FSDP's own exchanges fail with these words; any other RuntimeError is a defect and keeps its traceback.
            if self.sharded and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
                raise self._lost(error) from error
            raise

    def agree(self, what: str, value: bytes) -> None:
        mine = torch.tensor(list(hashlib.sha256(value).digest()), dtype=torch.uint8)
        all_values = [torch.zeros_like(mine) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(all_values, mine)
        others = [rank for rank, other in enumerate(all_values) if not torch.equal(other, all_values[0])]
        if others:
            raise EnvironmentFailure(f"rank {others[0]}: has other {what} than rank 0; start every rank alike")

    def device(self, wanted: str) -> str:
        if wanted == "cpu" or not torch.cuda.is_available():
            return wanted
        if wanted not in ("auto", "cuda"):
            raise rejected("model.device", wanted, "auto, cuda or cpu with several ranks: LOCAL_RANK chooses the GPU")
        if self.local >= torch.cuda.device_count():
            raise EnvironmentFailure(
                f"LOCAL_RANK {self.local}: this machine has {torch.cuda.device_count()} CUDA device(s); start as many "
                "processes as it has, or set model.device=cpu"
            )
        return f"cuda:{self.local}"

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """torch.distributed reports every lost connection and timeout as RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> EnvironmentFailure:
        why = " ".join(str(error).split()).rpartition("] ")[2][:120]
        return EnvironmentFailure(
            f"rank {self.rank} of {self.size}: lost another rank ({why}); what was spent is in the ledger, and "
            "dpaudit train --resume continues"
        )


@contextmanager
def leading(group: Group) -> Iterator[None]:
    """Around a run on rank 0: an error before its first `from_first` ends the waiting ranks with the same line."""
    if group.size == 1:
        yield
        return
    assert isinstance(group, Ranks)
    group.started = False
    try:
        yield
    except DpauditError as error:
        if not group.started:
            group.tell(error)
        raise


def _failure(name: str, text: str) -> DpauditError:
    """The error that rank 0 met, as it is called there."""
    kind = getattr(errors, name, DpauditError)
    return kind(text) if isinstance(kind, type) and issubclass(kind, DpauditError) else DpauditError(text)


ALONE = Alone()
_current: Group = ALONE


def current() -> Group:
    """The group that `joined` entered, otherwise this process alone."""
    return _current


@contextmanager
def joined() -> Iterator[Group]:
    """Be a rank while this lasts, where a launcher has said so; alone otherwise.

    Raises UsageError or EnvironmentFailure when the launcher's variables are incomplete or the others don't come.
    """
    global _current
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        yield ALONE
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UsageError(f"{missing[0]}: not set, but WORLD_SIZE is {size}; start with torchrun or accelerate launch")
    group = Ranks(_number("RANK", 0), size, _number("LOCAL_RANK", 0))
    if not 0 <= group.rank < size:
        raise rejected("RANK", group.rank, f"0 to {size - 1}")
    seconds = _number(TIMEOUT, 600)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=group.rank, world_size=size, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise EnvironmentFailure(f"rank {group.rank} of {size}: the ranks don't find each other ({why})") from error
    _current = group
    try:
        yield group
        dist.destroy_process_group()  # not after a failure: that may wait for the rank that is gone
    finally:
        _current = ALONE


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise rejected(name, text, "a whole number")
    return int(text)


def fingerprint(parameters: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over the bits of all parameters, to see whether ranks still agree."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(name.encode() + parameters[name].detach().float().cpu().numpy().tobytes())
    return digest.digest()
