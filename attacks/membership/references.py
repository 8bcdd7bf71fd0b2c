"""Reference models: trainings like the target's on fresh coins, many at a time, each kept as soon as it is done.

A study belongs to a finished target run. Its trial t has a key of its own, derived from the run's, and from that key
its coins over the candidates, its batches, noise and initial adapter; what is not a candidate always takes part, as in
the target. So every trial is the model that `dpaudit train` would make with that key and those members, and with k
trials every one can be a target with the others as references (half-split, leave-one-out).

Cheap because the towers' tokens are computed once a process and not once a training, training goes through
`attacks.membership.stacked`, processes start once for many trainings, and every trial starts from the same base. A
trial on disk is never trained again. All of it stays in the run's private part: these are models of private data.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attacks.membership.members import coins as draw_coins
from attacks.membership.records import StudyRecords, study_records
from attacks.membership.stacked import Shared, Trial, best_stack, losses_under, train_alone, train_stack
from dpaudit import atomic, untrusted
from dpaudit.errors import DpauditError
from dpaudit.executors import Executor, LocalExecutor
from dpaudit.forks import TRAINING
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder

Floats = npt.NDArray[np.float64]
FOLDER = "references"
STOP = "stop"  # a file that asks the workers to end after the trainings in hand
WORKER = "attacks.membership.references:work"
POLL = 1.0  # seconds


def folder_of(run: RunFolder) -> Path:
    """Where a run's reference models live."""
    return run.private / FOLDER


def trial_path(run: RunFolder, index: int) -> Path:
    """The file of one trial."""
    return folder_of(run) / f"trial-{index:04d}.safetensors"


def trial_key(key: Key, index: int) -> Key:
    """The key of a trial: nobody releases these models, so 63 bits of the run's own key suffice."""
    return Key.from_seed(int(key.generator(purpose="reference trial", step=index).integers(2**63)))


def trial_of(records: StudyRecords, index: int) -> tuple[Trial, npt.NDArray[np.bool_]]:
    """A trial and its coins over the candidates."""
    key = trial_key(records.key, index)
    inside = draw_coins(key, records.candidates)
    return Trial(key, np.concatenate([records.fixed(), records.places()[inside]])), inside


@dataclass(frozen=True)
class Study:
    """Finished trials. losses, inside: (k, m); population: (k, n); index: (k,) their numbers."""

    losses: Floats
    inside: npt.NDArray[np.bool_]
    population: Floats
    index: npt.NDArray[np.int64]


def load_study(run: RunFolder, count: int) -> Study:
    """The finished ones among the first `count` trials, in order. A damaged file counts as not finished."""
    found: list[tuple[int, dict[str, torch.Tensor]]] = []
    for index in range(count):
        tensors = _read(trial_path(run, index))
        if tensors is not None:
            found.append((index, tensors))
    if not found:
        return Study(np.empty((0, 0)), np.empty((0, 0), bool), np.empty((0, 0)), np.empty(0, np.int64))
    return Study(
        losses=np.stack([tensors["losses"].numpy() for _, tensors in found]),
        inside=np.stack([tensors["inside"].numpy().astype(bool) for _, tensors in found]),
        population=np.stack([tensors["population"].numpy() for _, tensors in found]),
        index=np.array([index for index, _ in found]),
    )


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    if not path.is_file():
        return None
    try:
        tensors = untrusted.read_tensors(path)
    except (ValueError, OSError):
        return None
    return tensors if {"losses", "inside", "population"} <= set(tensors) else None


def train_references(
    run: RunFolder,
    count: int,
    *,
    processes: int | None = None,
    executor: Executor | None = None,
    log: Callable[[str], None] = lambda _: None,
    decided: Callable[[Study], bool] = lambda _: False,
) -> Study:
    """Train what is missing of `count` trials and return all that are finished.

    decided(study) is asked whenever a trial is done; once it says yes, no further training starts. processes: shares
    into which the trials are divided, default one for each core. executor: where the shares run (None: processes here).
    A share that runs again after its worker died continues with what is missing. Raises DpauditError when one fails.
    """
    place = folder_of(run)
    atomic.make_folder(place, mode=0o700)
    _clear(place)
    missing = [index for index in range(count) if _read(trial_path(run, index)) is None]
    if not missing:
        return load_study(run, count)
    workers = min(processes or os.cpu_count() or 1, len(missing))
    shares = [missing[worker::workers] for worker in range(workers)]
    log(f"{len(missing)} reference models in {workers} processes")
    watch = _Watch(run, count, len(missing), log, decided)
    runner = executor or LocalExecutor(processes=workers, threads_per_process=1, modules=TRAINING)
    payloads = [
        {"run": str(run.path.resolve()), "trials": share, "worker": worker} for worker, share in enumerate(shares)
    ]
    with watch:
        failed = [outcome for outcome in runner.run(WORKER, payloads) if outcome.error is not None]
    if failed:
        raise failed[0].failure("reference models")
    _clear(place)
    return load_study(run, count)


def _clear(place: Path) -> None:
    """Remove what the workers and the watch tell each other."""
    for left in [place / STOP, *place.glob("progress-*.json")]:
        left.unlink(missing_ok=True)


class _Watch:
    """Looks at the study's folder while the workers run: says how far they are and when it is decided."""

    def __init__(
        self, run: RunFolder, count: int, missing: int, log: Callable[[str], None], decided: Callable[[Study], bool]
    ) -> None:
        self.run, self.count, self.missing, self.log, self.decided = run, count, missing, log, decided
        self._end = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        began, seen, shown = time.monotonic(), -1, -1.0
        while not self._end.wait(POLL):
            study = load_study(self.run, self.count)
            if len(study.index) != seen and len(study.index) and self.decided(study):
                atomic.write_text(folder_of(self.run) / STOP, "decided\n")
                self.log(f"{len(study.index)} reference models decide: no further training starts")
                self.decided = lambda _: False
            seen = len(study.index)
            done = self._share()
            if done >= shown + 0.1 or (shown < 0 < done):
                shown = done
                spent = time.monotonic() - began
                left = f", {spent * (1 - done) / done:.0f} s left" if 0 < done < 1 else ""
                self.log(f"reference models: {seen} of {self.count} done, {done:.0%} of the steps{left}")

    def _share(self) -> float:
        """The share of all missing steps that is done."""
        total = 0.0
        for path in folder_of(self.run).glob("progress-*.json"):
            try:
                total += float(untrusted.read_json(path, 1 << 12)["trainings"])
            except (OSError, ValueError, KeyError):
                continue  # between two writes of a worker
        return total / self.missing


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One worker process: train the trials of its share, a stack at a time, each written as soon as it is done."""
    torch.set_num_threads(1)
    run = RunFolder(Path(payload["run"]))
    records = study_records(run)
    shared = records.shared()
    missing = [index for index in payload["trials"] if _read(trial_path(run, index)) is None]
    if not missing:
        return {"trained": 0, "stack": 0}
    waiting = [(index, *trial_of(records, index)) for index in missing]
    size = best_stack(shared, [trial for _, trial, _ in waiting])
    progress = folder_of(run) / f"progress-{int(payload['worker'])}.json"
    finished, last = 0, 0.0
    for at in range(0, len(waiting), size):
        if (folder_of(run) / STOP).exists():
            break
        group = waiting[at : at + size]

        def told(step: int, steps: int, *, before: int = finished, models: int = len(group)) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > POLL or step == steps:
                last = now
                atomic.write_text(progress, json.dumps({"trainings": before + models * step / steps}))

        if shared.rows is not None:
            adapters = train_stack(shared, [trial for _, trial, _ in group], progress=told)
        else:
            adapters = [
                train_alone(shared, trial, folder_of(run) / f"run-{index:04d}", records.dataset)
                for index, trial, _ in group
            ]
        for (index, _, inside), adapter in zip(group, adapters, strict=True):
            _write(run, records, shared, index, inside, adapter)
        finished += len(group)
    return {"trained": finished, "stack": size}


def _write(
    run: RunFolder,
    records: StudyRecords,
    shared: Shared,
    index: int,
    inside: npt.NDArray[np.bool_],
    adapter: dict[str, torch.Tensor],
) -> None:
    tensors = {f"adapter//{name}": value for name, value in adapter.items()}
    tensors["losses"] = torch.from_numpy(losses_under(shared, adapter, records.places().tolist()))
    tensors["population"] = torch.from_numpy(losses_under(shared, adapter, records.population().tolist()))
    tensors["inside"] = torch.from_numpy(inside.astype(np.uint8))
    if not all(math.isfinite(float(value.double().sum())) for value in tensors.values()):
        raise DpauditError(f"reference model {index}: a weight or loss is not finite; lower training.learning-rate")
    atomic.write_tensors(trial_path(run, index), tensors, {"trial": str(index)}, mode=0o600)
