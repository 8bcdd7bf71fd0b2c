"""The state of a training and its one private step: clipped sum, noisy mean, pruned update.

Batch, noise and random masks of step t are functions of (key, t, name), so a step can be repeated and resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpaudit.config import RunConfig
from dpaudit.errors import UsageError, rejected
from dpaudit.randomness import Key
from trainers import updates
from trainers.augmentation import augmented
from trainers.distributed import ALONE, Group
from trainers.features import Features
from trainers.fusion import release_of
from trainers.ghost import Ghost
from trainers.gradients import (
    CLIPPING,
    ClipRule,
    Gradient,
    GradientPath,
    Hooks,
    MicroBatch,
    Plain,
    UnitSum,
    add_sums,
    choose_checkpointing,
    clip_factors,
    whole_units,
)
from trainers.inputs import Rows, UnitInputs
from trainers.memory import row_memory, rows_at_once
from trainers.noise import Noise, worth_drawing_ahead
from trainers.plan import Plan, fusion_std
from trainers.records import Unit
from trainers.rows import AdapterRows
from trainers.sharding import shard
from trainers.vlm import VisionLanguageModel
from trainers.zeroth_order import ZerothOrder, laplace

AT_ONCE = 1 << 24  # numbers of injected gradients that are added together


class InjectedRows(Protocol):
    """(k, parameters) gradients over all trained parameters in name order; a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        """(n, parameters) float32 of n of them."""
        ...


@dataclass
class Trainer:
    """The state of a run between steps."""

    config: RunConfig
    plan: Plan
    key: Key
    model: VisionLanguageModel
    inputs: UnitInputs
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    path: GradientPath
    pruning: updates.Pruning
    average: updates.Average
    rows_at_once: int
    injected: InjectedRows | None = None  # gradient canaries, units after the real ones
    zeroth: ZerothOrder | None = None  # method dp-zo: numbers instead of gradients
    group: Group = ALONE  # with several ranks `inputs` holds this rank's own units only

    @classmethod
    def build(
        cls,
        config: RunConfig,
        plan: Plan,
        key: Key,
        model: VisionLanguageModel,
        units: Sequence[Unit],
        features: Features | None = None,
        group: Group = ALONE,
    ) -> "Trainer":
        """Choose reducer and adapter, encode the units once (or find them in `features`), set up the optimiser."""
        model.set_reducer(config.reducer)
        parameters = model.attach_lora(config.model.lora, generator=key.generator(purpose="initialisation"))
        if group.sharded:
            shard(model, parameters, group, config.model.device)
        shown = augmented(units, config.training.augmentations)
        inputs = UnitInputs(model, shown, features=features, release=release_of(config, key))
        longest = inputs.longest
        if longest > model.max_positions:
            raise UsageError(
                f"data.train: the longest question with its answer needs {longest} positions with the picture; "
                f"accepted: at most {model.max_positions}, the model's context"
            )
        path = gradient_path(config, model, parameters, inputs, sharded=group.sharded)
        clip = CLIPPING[config.privacy.clipping]
        zeroth = ZerothOrder(model, parameters, config.zeroth_order, clip) if config.method == "dp-zo" else None
        optimizer = updates.make_optimizer(parameters, config.training, noise=plan.noise_std)
        pruning = updates.Pruning.of(parameters, config.pruning)
        average = updates.Average(config.training.average)
        rows = rows_at_once(
            config.training.rows_at_once,
            model,
            parameters,
            None if zeroth is not None else path,
            longest=longest,
            answers=inputs.answers,
            gib=config.training.memory,
        )
        shared = (config, plan, key, model, inputs, parameters, optimizer, path, pruning, average, rows)
        return cls(*shared, zeroth=zeroth, group=group)

    @property
    def released(self) -> Mapping[str, torch.Tensor]:
        """Tensors like those that a step adds up and noises: one a parameter, or the numbers of method dp-zo."""
        return self.parameters if self.zeroth is None else self.zeroth.released

    @cached_property
    def noise(self) -> Noise:
        """The source of the noise of all steps."""
        return Noise(self.key, secure=self.config.privacy.noise == "secure")

    def draw_ahead(self, step: int) -> None:
        """Begin with the noise of `step` while its gradient is computed, where a core is idle meanwhile."""
        laplacian = self.zeroth is not None and self.zeroth.config.noise != "gaussian"
        if self.plan.claim is None or laplacian or self.group.sharded or not worth_drawing_ahead(self.model.device):
            return
        names = self.chosen(step) if self.partial else set(self.released)
        self.noise.draw_ahead({name: tuple(self.released[name].shape) for name in names}, step=step, std=self._std)

    def clipped_sum(self, step: int, units: Sequence[int]) -> UnitSum:
        """Sum of the clipped gradients of some units at the present parameters, with the fusion noise of `step`."""
        if self.partial:
            with updates.trainable_only(self.parameters, self.chosen(step)) as chosen:
                return self._sum(step, units, self.path.over(chosen), chosen)
        path: Callable[[Rows, float], UnitSum] = self.path
        if self.zeroth is not None:
            path = partial(self.zeroth.clipped_sum, lines=self.zeroth.lines(self.key, step))
        return self._sum(step, units, path, self.released)

    @property
    def partial(self) -> bool:
        """Whether a step computes, clips and noises a part of the adapter only, settled before the batch is seen."""
        return self.pruning.ahead or self.config.model.lora.train == "alternating"

    def chosen(self, step: int) -> set[str]:
        """The parameters that `step` computes: by earlier noisy gradients, or B and A in turn."""
        if self.config.model.lora.train != "alternating":
            return self.pruning.chosen(self._coins(step))
        other = "lora_A" if step % 2 else "lora_B"  # B first: while it is zero, A has no gradient
        return {name for name in self.parameters if other not in name}

    def _coins(self, step: int) -> np.random.Generator:
        """The public coins of the pruning of `step`."""
        return self.key.generator(purpose="pruning", step=step)

    def _sum(
        self,
        step: int,
        units: Sequence[int],
        path: Callable[[Rows, float], UnitSum],
        like: Mapping[str, torch.Tensor],
    ) -> UnitSum:
        std, size = fusion_std(self.config, self.plan), self.plan.max_grad_norm
        one_by_one = self.group.sharded and self.config.training.gradient_path == "micro-batch"
        chunks = self.inputs.chunks(units, 1 if one_by_one else self.rows_at_once)
        idle = self.group.passes(len(chunks)) - len(chunks)

        def sums(chosen: Sequence[list[int]]) -> Iterator[UnitSum]:
            for chunk in chosen:
                part = self.inputs.select(chunk, key=self.key, step=step, fusion_std=std)
                yield whole_units(path(part, size), part)

        with self.group.guard():
            total = add_sums(sums(chunks), like, self.model.device)
            for _ in sums([[0]] * idle):  # any unit will do for an idle pass: its sum is thrown away
                pass
        return total

    def with_injected(self, known: UnitSum, canaries: npt.NDArray[np.int64]) -> UnitSum:
        """`known` plus the sampled gradient canaries, each clipped as one more unit: in the blocks of this step."""
        if self.injected is None or not len(canaries):
            return known
        names = sorted(self.parameters)
        sizes = [self.parameters[name].numel() for name in names]
        total = dict(known.gradient)
        most = max(1, AT_ONCE // sum(sizes))
        for at in range(0, len(canaries), most):
            parts = torch.split(self.injected[torch.from_numpy(canaries[at : at + most])], sizes, 1)
            rows = {name: part for name, part in zip(names, parts, strict=True) if name in total}
            norms = torch.stack([part.norm(dim=1) for part in rows.values()]).norm(dim=0)
            factors = clip_factors(norms, self.plan.max_grad_norm)
            for name, value in total.items():
                total[name] = value + (factors @ rows[name]).view_as(value).to(value.device)
        return UnitSum(total, known.norms, known.losses)

    def noisy_mean(self, step: int, total: UnitSum) -> Gradient:
        """(sum + N(0, (sigma C)^2)) / expected batch size; without a claim the plain mean."""
        size = self.plan.expected_batch_size
        if self.plan.claim is None:
            return {name: value / size for name, value in total.gradient.items()}
        noise = self._noise(step, self._std, total.gradient)
        # Secure noise is float64: so is the sum, until the one rounding at the end.
        return {name: ((value + noise[name]) / size).to(value.dtype) for name, value in total.gradient.items()}

    @property
    def _std(self) -> float:
        """Of the noise on the sum, in units of the gradient."""
        return self.config.planted.noise_scale * self.plan.noise_multiplier * self.plan.max_grad_norm

    def _noise(self, step: int, scale: float, like: Gradient) -> Gradient:
        """The noise of `step`: Gaussian of std `scale`, or Laplace of that scale where the method says so."""
        if self.zeroth is None or self.zeroth.config.noise == "gaussian":
            return self.noise.of(like, step=step, std=scale)
        return {
            name: scale * laplace(self.key, value.numel(), step=step, name=name).to(value.device)
            for name, value in like.items()
        }

    def update(self, step: int, noisy: Gradient) -> set[str]:
        """Prune and apply; returns the blocks that were updated."""
        if self.zeroth is not None:
            noisy = self.zeroth.update(noisy, self.zeroth.lines(self.key, step))
        kept = self.pruning.select(noisy, self._coins(step))
        self.pruning.observe(noisy)
        rate = updates.learning_rate(self.config.training, step=step, steps=self.plan.steps)
        updates.apply_update(self.parameters, noisy, kept, self.optimizer, rate)
        self.average.observe(self.parameters)
        return kept


PATHS: dict[str, Callable[[VisionLanguageModel, Mapping[str, nn.Parameter], ClipRule], GradientPath]] = {
    "hooks": Hooks,
    "micro-batch": MicroBatch,
    "ghost": Ghost,
}


def gradient_path(
    config: RunConfig,
    model: VisionLanguageModel,
    parameters: Mapping[str, nn.Parameter],
    inputs: UnitInputs,
    *,
    sharded: bool = False,
) -> GradientPath:
    """The path of a training: as configured; plain sums without privacy.

    `auto` is one adapter a row on a CPU where `trainers.rows` computes the model, otherwise Opacus' hooks; ghost norms
    where a gradient a row needs far too much memory. A function of configuration, model, kind of device and data alone,
    so that a run that is resumed on the same kind of device takes the same path; `release/environment.json` says which.
    Raises UsageError for a path that does not compute this model.
    """
    kind = config.training.gradient_path
    if sharded and kind in ("ghost", "rows"):  # FSDP drops a layer's weights after the first backward pass
        raise rejected("training.gradient-path", kind, "auto, hooks or micro-batch with training.parallel=fsdp")
    path = _automatic(config, model, parameters, inputs, sharded) if kind == "auto" else None
    if path is None and kind == "rows":
        path = _rows(config, model, parameters, inputs)
        if path is None:
            other = (
                "auto, hooks, ghost or micro-batch; rows computes float32 Llama decoders with both LoRA factors trained"
            )
            raise rejected("training.gradient-path", "rows", other)
    if path is None and config.method == "non-private":
        path = Plain(model, parameters)
    if path is None:
        path = PATHS[kind](model, parameters, CLIPPING[config.privacy.clipping])
    model.set_checkpointing(choose_checkpointing(config.training.gradient_checkpointing, path))
    return path


def _rows(
    config: RunConfig, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], inputs: UnitInputs
) -> GradientPath | None:
    clip = None if config.method == "non-private" else CLIPPING[config.privacy.clipping]
    return AdapterRows.of(model, parameters, inputs, clip)


def _automatic(
    config: RunConfig,
    model: VisionLanguageModel,
    parameters: Mapping[str, nn.Parameter],
    inputs: UnitInputs,
    sharded: bool,
) -> GradientPath | None:
    """What `auto` is; None: the plain sum of a training without privacy."""
    chosen, clip = config.training, CLIPPING[config.privacy.clipping]
    hooks = None
    if config.method != "non-private":
        hooks = Hooks(model, parameters, clip)
        model.set_checkpointing(choose_checkpointing(chosen.gradient_checkpointing, hooks))
        memory = row_memory(model, parameters, hooks, longest=inputs.longest, answers=inputs.answers)
        free = chosen.rows_at_once == "auto" and not sharded and chosen.gradient_checkpointing != "reentrant"
        if free and memory.ghost_pays(chosen.memory):
            return Ghost(model, parameters, clip)
    whole = not sharded and chosen.gradient_checkpointing == "none" and config.method != "dp-zo"
    rows = _rows(config, model, parameters, inputs) if whole and model.device.type == "cpu" else None
    return rows or hooks
