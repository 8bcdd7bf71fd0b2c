"""Several trainings at once on one set of cached inputs: the same models as as many single trainings, in less time.

A `Stack` holds K trainings that share frozen weights, cached picture tokens and packed questions; each has its own
key, members, adapter and optimiser. A step collects the batches of all K, runs them through `RowModel` in physical
batches of mixed rows (every row under its own model's adapter), clips each unit, and hands every model its sum. Noise,
pruning and update are the trainer's own code, so each model is the one that `trainers.run.train` would have made with
the same key and members (tested to float32 rounding).
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dpaudit.config import RunConfig
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import updates
from trainers.gradients import Plain, UnitSum, clip_factors
from trainers.inputs import Rows, UnitInputs, fusion_noise
from trainers.plan import Plan, fusion_std
from trainers.records import Dataset, Unit
from trainers.rows import RowModel, row_gradients
from trainers.run import train
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel

Adapter = dict[str, Tensor]

ROWS_AT_ONCE = 32  # of all models together: 1.5 MB of row gradients for the reference model, inside the cache
STACK_SIZES = (1, 2, 4, 8)
PROBE_STEPS = 3
WORTH_IT = 0.9  # a larger stack must cost at most this share of a smaller one: it is also lost as a whole


@dataclass(frozen=True)
class Trial:
    """One training: its key and the units (indices into the shared inputs) that take part, in their order."""

    key: Key
    units: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shared:
    """What all trainings of a study share. `rows` is None where only the ordinary path computes this model."""

    config: RunConfig
    plan: Plan
    model: VisionLanguageModel
    units: Sequence[Unit]
    inputs: UnitInputs
    rows: RowModel | None

    @classmethod
    def of(cls, config: RunConfig, plan: Plan, model: VisionLanguageModel, units: Sequence[Unit]) -> "Shared":
        """Encode the units once, attach an adapter to `model` (its values don't matter), see which path computes it."""
        if not hasattr(model.hf, "peft_config"):
            model.attach_lora(config.model.lora, generator=np.random.default_rng(0))
        inputs = UnitInputs(model, units)
        return cls(config, plan, model, units, inputs, RowModel.of(model, inputs) if stackable(config) else None)


def stackable(config: RunConfig) -> bool:
    """Whether a step of this configuration is "clip row gradients of shared inputs, add noise to every block"."""
    return (
        config.method in ("non-private", "dp-sgd", "dual-priv")
        and config.privacy.clipping == "flat"
        and config.model.lora.train == "both"
        and not config.training.average
        and config.training.augmentations == 1
        and config.fusion.release == "none"  # released tokens carry the noise of their own training
        and not (config.pruning.by == "previous" and config.pruning.keep < 1)
    )


def initial_adapter(model: VisionLanguageModel, key: Key) -> Adapter:
    """The adapter that a training with this key starts from: `VisionLanguageModel.attach_lora`, without a model."""
    rng = key.generator(purpose="initialisation")
    out: Adapter = {}
    for name, like in sorted(model.adapter_parameters().items()):
        values = torch.zeros_like(like, dtype=torch.float32)
        if "lora_A" in name:
            bound = 1.0 / np.sqrt(like.shape[1])
            values.copy_(torch.as_tensor(rng.uniform(-bound, bound, size=tuple(like.shape)), dtype=torch.float32))
        out[name] = values
    return out


class Stack:
    """K trainings side by side. `step(t)` takes all of them one step further; `adapters()` are the results."""

    def __init__(self, shared: Shared, trials: Sequence[Trial], *, rows_at_once: int = ROWS_AT_ONCE) -> None:
        assert shared.rows is not None
        self.shared, self.trials, self.rows_at_once = shared, list(trials), rows_at_once
        start = [initial_adapter(shared.model, trial.key) for trial in trials]
        names = list(start[0])
        self.stacked = {name: torch.stack([one[name] for one in start]) for name in names}
        self.members = [self._trainer(index) for index in range(len(trials))]

    def _trainer(self, index: int) -> Trainer:
        # Parameters are views into the stack: an in-place update of one model updates its slice.
        parameters = {name: nn.Parameter(value[index]) for name, value in self.stacked.items()}
        shared = self.shared
        return Trainer(
            config=shared.config,
            plan=shared.plan,
            key=self.trials[index].key,
            model=shared.model,
            inputs=shared.inputs,
            parameters=parameters,
            optimizer=updates.make_optimizer(parameters, shared.config.training, noise=shared.plan.noise_std),
            path=Plain(shared.model, parameters),  # not used: the stack computes all models' sums
            pruning=updates.Pruning.of(parameters, shared.config.pruning),
            average=updates.Average(0.0),
            rows_at_once=ROWS_AT_ONCE,
        )

    def step(self, step: int) -> None:
        """One step of every model."""
        plan = self.shared.plan
        batches = [
            trial.units[plan.sampler.batch(trial.key, step=step, units=len(trial.units))] for trial in self.trials
        ]
        sums = self.clipped_sums(step, batches)
        for trainer, total in zip(self.members, sums, strict=True):
            trainer.update(step, trainer.noisy_mean(step, total))

    def clipped_sums(self, step: int, batches: Sequence[npt.NDArray[np.int64]]) -> list[UnitSum]:
        """The clipped sum of every model's own batch at its present parameters."""
        jobs = [(model, int(unit)) for model, batch in enumerate(batches) for unit in batch]
        total = {name: torch.zeros_like(value) for name, value in self.stacked.items()}
        norms, losses, owners = [], [], []
        private = self.shared.config.method != "non-private"
        for chunk in self._chunks(jobs):
            gradients, unit_losses, owner = self._unit_gradients(step, chunk)
            squares = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients.values()]).sum(dim=0)
            norm = squares.sqrt()
            factors = clip_factors(norm, self.shared.plan.max_grad_norm) if private else torch.ones_like(norm)
            for name, value in gradients.items():
                shape = (-1, *[1] * (value.dim() - 1))
                clean = torch.where((factors > 0).view(shape), value, torch.zeros_like(value))
                total[name].index_add_(0, owner, clean * factors.view(shape))
            norms.append(norm)
            losses.append(unit_losses)
            owners.append(owner)
        empty = torch.zeros(0)
        norm, loss = (torch.cat(parts) if parts else empty for parts in (norms, losses))
        owner = torch.cat(owners) if owners else torch.zeros(0, dtype=torch.int64)
        return [
            UnitSum({name: value[model] for name, value in total.items()}, norm[owner == model], loss[owner == model])
            for model in range(len(batches))
        ]

    def _chunks(self, jobs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Jobs (model, unit) in physical batches of at most `rows_at_once` rows; a unit is never split."""
        inputs = self.shared.inputs
        places = _split([inputs.rows_of(unit) for _, unit in jobs], self.rows_at_once)
        return [[jobs[place] for place in part] for part in places]

    def _unit_gradients(self, step: int, jobs: Sequence[tuple[int, int]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Gradient (U, ...) and loss (U,) of every job's unit under its model, and the models (U,)."""
        assert self.shared.rows is not None
        rows = self.shared.inputs.select([unit for _, unit in jobs])
        owner = torch.tensor([model for model, _ in jobs], dtype=torch.int64)
        models = owner[rows.owner.cpu()]
        rows = self._noised(step, jobs, rows)
        adapters = {name: value.index_select(0, models) for name, value in self.stacked.items()}
        gradients, losses = row_gradients(rows, self.shared.rows, adapters)
        per_unit = torch.zeros(rows.units).index_add(0, rows.owner, losses * rows.weight)
        if rows.units == rows.packed.rows:  # one picture a unit: its weight is 1
            return gradients, per_unit, owner
        added = {
            name: torch.zeros(rows.units, *value.shape[1:]).index_add(
                0, rows.owner, value * rows.weight.view(-1, *[1] * (value.dim() - 1))
            )
            for name, value in gradients.items()
        }
        return added, per_unit, owner

    def _noised(self, step: int, jobs: Sequence[tuple[int, int]], rows: Rows) -> Rows:
        """Fusion noise as every model's own training would draw it: keyed by its key, the step and the picture."""
        shared = self.shared
        std = fusion_std(shared.config, shared.plan)
        fused = shared.inputs.fused
        if std <= 0 or not fused:
            return rows
        shape = (fused, rows.tokens.shape[2])
        noise = np.stack(
            [
                fusion_noise(self.trials[model].key, step=step, picture=name, shape=shape, std=std)
                for model, unit in jobs
                for name in (picture.id for picture in shared.units[unit].pictures)
            ]
        )
        tokens = rows.tokens.clone()
        tokens[:, -fused:] += torch.from_numpy(noise).to(tokens)
        return replace(rows, tokens=tokens)

    def adapters(self) -> list[Adapter]:
        """The adapters as they stand, one dict a model."""
        return [
            {name: value[index].detach().clone() for name, value in self.stacked.items()}
            for index in range(len(self.trials))
        ]


def _split(sizes: Sequence[int], most: int) -> list[list[int]]:
    out: list[list[int]] = []
    used = 0
    for place, size in enumerate(sizes):
        if not out or used + size > most:
            out.append([])
            used = 0
        out[-1].append(place)
        used += size
    return out


def train_stack(
    shared: Shared, trials: Sequence[Trial], *, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> list[Adapter]:
    """The adapters of several trainings. progress(step, steps) after every step."""
    stack = Stack(shared, trials)
    for step in range(1, shared.plan.steps + 1):
        stack.step(step)
        progress(step, shared.plan.steps)
    return stack.adapters()


def train_alone(shared: Shared, trial: Trial, place: Path, dataset: Dataset) -> Adapter:
    """One training by the trainer itself, in the run folder `place`: for what a stack can't do.

    dataset: what the study's configuration names; its training units are replaced by the trial's.
    """
    shutil.rmtree(place, ignore_errors=True)
    config = shared.config.model_copy(
        update={"canaries": shared.config.canaries.model_copy(update={"count": 0}),
                "data": shared.config.data.model_copy(update={"public_size": shared.plan.candidates})}
    )  # fmt: skip
    run = RunFolder.create(place)
    run.write_config(config)
    model = VisionLanguageModel.load(config.model.path, device=config.model.device, precision=config.model.precision)
    members = replace(dataset, train=tuple(shared.units[unit] for unit in trial.units))
    with run.lock():
        train(config, run, key=trial.key, dataset=members, model=model)
    return {name: value.detach().float().cpu().clone() for name, value in model.adapter_parameters().items()}


@torch.no_grad()
def losses_under(shared: Shared, adapter: Adapter, units: Sequence[int]) -> npt.NDArray[np.float64]:
    """(U,) losses of units under one adapter, without fusion noise."""
    parts = []
    for chunk in shared.inputs.chunks(units, 2 * ROWS_AT_ONCE):
        rows = shared.inputs.select(chunk)
        if shared.rows is not None:
            rows_adapter = {name: value.expand(rows.packed.rows, *value.shape) for name, value in adapter.items()}
            per_row = shared.rows.losses(rows, rows_adapter)
        else:
            for name, value in shared.model.adapter_parameters().items():
                value.copy_(adapter[name])
            per_row = shared.model.losses(rows.tokens, rows.packed)
        per_unit = torch.zeros(rows.units, device=per_row.device).index_add(0, rows.owner, per_row * rows.weight)
        parts.append(per_unit.double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty(0)


def best_stack(shared: Shared, trials: Sequence[Trial], *, clock: Callable[[], float] = time.perf_counter) -> int:
    """How many trainings to stack: the smallest size that a probe of a few steps finds no clearly cheaper one for."""
    if shared.rows is None:
        return 1
    chosen, cheapest = 1, float("inf")
    for size in STACK_SIZES:
        if size > len(trials):
            break
        stack = Stack(shared, trials[:size])
        stack.step(1)  # warms caches and allocators
        began = clock()
        for step in range(2, 2 + PROBE_STEPS):
            stack.step(step)
        cost = (clock() - began) / size
        if cost < WORTH_IT * cheapest:
            chosen, cheapest = size, cost
    return chosen
