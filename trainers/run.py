"""One training run, from plan to released adapter.

Batch, noise and random masks of step t are functions of (key, t, name); the ledger is on disk before the noisy
gradient of a step is used. Hence a run that was killed anywhere and resumed ends with the same weights and ledger.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpaudit import atomic
from dpaudit import config as configuration
from dpaudit.config import ModelConfig, RunConfig
from dpaudit.environment import describe
from dpaudit.errors import DpauditError, UsageError, rejected
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import binding, checkpoints, updates
from trainers.distributed import ALONE, Group, fingerprint
from trainers.features import Features, cache_of
from trainers.fusion import for_questions, release_of
from trainers.gradients import (
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
from trainers.plan import Inserted, Plan, fusion_std, ledger_rows, make_plan
from trainers.progress import Reporter, Silent, StepReport
from trainers.records import Dataset, Unit
from trainers.sampling import poisson_batch as poisson_batch  # its first home
from trainers.sharding import local, shard
from trainers.vlm import VisionLanguageModel
from trainers.zeroth_order import ZerothOrder, laplace

# (step, released noisy gradient before pruning, clipped sum of the units that everybody knows to be there)
AfterStep = Callable[[int, Gradient, Gradient], None]


class Injection(Protocol):
    """Canaries that are gradients instead of records: units whose gradient the auditor dictates."""

    def rows(self, parameters: int) -> torch.Tensor:
        """(k, parameters) float32, the gradient of each inserted canary over all trained parameters in name order."""
        ...

    def observe(
        self, step: int, noisy: Gradient, known: Gradient, taken: npt.NDArray[np.int64], without: Callable[[], Gradient]
    ) -> None:
        """What `step` released, the clipped sum of its records, the inserted canaries it took, and what the same step
        with the same noise would have released without them."""
        ...


def noise_like(key: Key, like: Mapping[str, torch.Tensor], *, step: int, std: float, secure: bool = False) -> Gradient:
    """Gaussian noise of std `std` for every tensor that is released: PRF(key, step, its name).

    secure: in float64, as half the sum of four (Key.secure_normal); the caller adds first and rounds once.
    """
    if secure:
        return {
            name: torch.from_numpy(std * key.secure_normal(tuple(value.shape), step=step, name=name)).to(value.device)
            for name, value in like.items()
        }
    return {
        name: torch.from_numpy(key.normal(tuple(value.shape), step=step, name=name)).to(value.device) * std
        for name, value in like.items()
    }


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
    injected: torch.Tensor | None = None  # (k, parameters): gradient canaries, units after the real ones
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
        inputs = UnitInputs(model, units, features=features, release=release_of(config, key))
        longest = inputs.longest
        if longest > model.max_positions:
            raise UsageError(
                f"data.train: the longest question with its answer needs {longest} positions with the picture; "
                f"accepted: at most {model.max_positions}, the model's context"
            )
        path = gradient_path(config, model, parameters)
        zeroth = ZerothOrder(model, parameters, config.zeroth_order) if config.method == "dp-zo" else None
        optimizer = updates.make_optimizer(parameters, config.training)
        pruning = updates.Pruning.of(parameters, config.pruning)
        return cls(config, plan, key, model, inputs, parameters, optimizer, path, pruning, zeroth=zeroth, group=group)

    @property
    def released(self) -> Mapping[str, torch.Tensor]:
        """Tensors like those that a step adds up and noises: one a parameter, or the numbers of method dp-zo."""
        return self.parameters if self.zeroth is None else self.zeroth.released

    def clipped_sum(self, step: int, units: Sequence[int]) -> UnitSum:
        """Sum of the clipped gradients of some units at the present parameters, with the fusion noise of `step`."""
        if self.pruning.ahead:
            with updates.trainable_only(self.parameters, self.pruning.chosen(self._coins(step))) as chosen:
                return self._sum(step, units, gradient_path(self.config, self.model, chosen), chosen)
        path: Callable[[Rows, float], UnitSum] = self.path
        if self.zeroth is not None:
            path = partial(self.zeroth.clipped_sum, lines=self.zeroth.lines(self.key, step))
        return self._sum(step, units, path, self.released)

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
        chunks = self.inputs.chunks(units, 1 if one_by_one else self.config.training.rows_at_once)
        idle = self.group.passes(len(chunks)) - len(chunks)
        rows = [*chunks, *([[0]] * idle)]  # any unit will do for an idle pass: its sum is thrown away
        with self.group.guard():
            selected = (self.inputs.select(chunk, key=self.key, step=step, fusion_std=std) for chunk in rows)
            parts = [whole_units(path(part, size), part) for part in selected]
        return add_sums(parts[: len(chunks)], like, self.model.device)

    def with_injected(self, known: UnitSum, canaries: npt.NDArray[np.int64]) -> UnitSum:
        """`known` plus the sampled gradient canaries, each clipped as one more unit."""
        if self.injected is None or not len(canaries):
            return known
        rows = self.injected[torch.from_numpy(canaries)]
        factors = clip_factors(rows.norm(dim=1), self.plan.max_grad_norm)
        flat, at, total = factors @ rows, 0, {}
        for name in sorted(self.parameters):
            value = known.gradient[name]
            total[name] = value + flat[at : at + value.numel()].view_as(value).to(value.device)
            at += value.numel()
        return UnitSum(total, known.norms, known.losses)

    def noisy_mean(self, step: int, total: UnitSum) -> Gradient:
        """(sum + N(0, (sigma C)^2)) / expected batch size; without a claim the plain mean."""
        size = self.plan.expected_batch_size
        if self.plan.claim is None:
            return {name: value / size for name, value in total.gradient.items()}
        std = self.config.planted.noise_scale * self.plan.noise_multiplier * self.plan.max_grad_norm
        noise = self._noise(step, std, total.gradient)
        # Secure noise is float64: so is the sum, until the one rounding at the end.
        return {name: ((value + noise[name]) / size).to(value.dtype) for name, value in total.gradient.items()}

    def _noise(self, step: int, scale: float, like: Gradient) -> Gradient:
        """The noise of `step`: Gaussian of std `scale`, or Laplace of that scale where the method says so."""
        if self.zeroth is None or self.zeroth.config.noise == "gaussian":
            return noise_like(self.key, like, step=step, std=scale, secure=self.config.privacy.noise == "secure")
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
        return kept


def gradient_path(
    config: RunConfig, model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter]
) -> GradientPath:
    """Plain sums without privacy, Opacus hooks by default, the micro-batch loop when asked for."""
    path: GradientPath = Hooks(model, parameters)
    if config.method == "non-private":
        path = Plain(model, parameters)
    elif config.training.gradient_path == "micro-batch":
        path = MicroBatch(model, parameters)
    model.set_checkpointing(choose_checkpointing(config.training.gradient_checkpointing, path))
    return path


def train(
    config: RunConfig,
    run: RunFolder,
    *,
    key: Key,
    dataset: Dataset,
    model: VisionLanguageModel,
    inserted: Inserted | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    after_step: AfterStep | None = None,
    injection: Injection | None = None,
    group: Group = ALONE,
) -> Plan:
    """Train (or go on with) the run in `run`, whose lock the caller holds, and release the adapter.

    `after_step(step, noisy, known)` sees every released noisy gradient, before pruning, and the clipped sum of the
    batch's records (without gradient canaries). With several ranks (`group`) rank 0 alone touches `run`, takes
    gradient canaries and calls `after_step` and `injection.observe`. Raises UsageError before the first step when a
    setting does not fit; DpauditError when the weights did not move or a frozen one did; EnvironmentFailure when
    another rank is lost.
    """
    inserted = inserted or Inserted()
    reporter = (reporter if group.first else None) or Silent()
    plan = make_plan(config, dataset, inserted.candidates)
    units = [*dataset.train, *inserted.units]
    if group.size > len(units):
        raise rejected("WORLD_SIZE", group.size, f"at most {len(units)}, the units")
    if group.size > 1 and config.fusion.release != "none":  # ids are compared within a rank only
        raise rejected("fusion.release", config.fusion.release, "none with several ranks")
    group.agree("data", "\n".join(unit.id for unit in units).encode())
    bound = binding.binding(key, config_sha256(run), units, model) if group.first else {}
    if resume:
        group.from_first(lambda: binding.check(run.noise_key, bound))
    reporter.phase(f"encoding {sum(len(unit.pictures) for unit in units)} pictures")
    features = cache_of(run, config.training.feature_cache, model, warn=reporter.phase) if group.first else None
    trainer = Trainer.build(config, plan, key, model, group.own(units), features, group)
    group.agree("initial weights", fingerprint(trainer.parameters))
    if injection is not None and trainer.zeroth is not None:
        raise rejected("method", config.method, "a method with gradients: gradient canaries can't enter a forward pass")
    if injection is not None and trainer.pruning.ahead:
        raise rejected("pruning.by", config.pruning.by, "a policy that noises every block: gradient canaries need all")
    if injection is not None:
        trainer.injected = injection.rows(sum(parameter.numel() for parameter in trainer.parameters.values()))
    ledger = _open_ledger(config, run, dataset, plan, inserted, resume) if group.first else None
    if group.first and not resume:
        key.save(run.noise_key, bound)  # after its ledger: a key that lies alone has lost one
    frozen = _fingerprint(model, trainer.parameters)
    start = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    identity = binding.identity(bound) if group.first else ""
    for name in run.discard_damaged_checkpoints() if resume and group.first else ():
        reporter.phase(f"checkpoint {name} is damaged; going on from the one before it")
    state = (trainer.parameters, trainer.optimizer, identity)
    done = checkpoints.restore(run.checkpoints, *state, pruning=trainer.pruning, group=group) if resume else 0
    for step in range(done + 1, plan.steps + 1):
        _one_step(trainer, ledger, run, step, len(units), reporter, after_step, injection)
        if group.first and step % config.training.checkpoint_every == 0 and step < plan.steps:
            checkpoints.save(run.checkpoints, step, *state, pruning=trainer.pruning)
    reporter.close()
    _check_movement(model, trainer.parameters, start, frozen)
    group.agree("trained weights", fingerprint(trainer.parameters))
    if group.first:
        _release(run, trainer)
    return plan


def _one_step(
    trainer: Trainer,
    ledger: Ledger | None,
    run: RunFolder,
    step: int,
    units: int,
    reporter: Reporter,
    after_step: AfterStep | None,
    injection: Injection | None,
) -> None:
    began = time.perf_counter()
    plan, group = trainer.plan, trainer.group
    extra = 0 if trainer.injected is None else len(trainer.injected)
    batch = plan.sampler.batch(trainer.key, step=step, units=units + extra)
    real = [int(index) for index in batch if index < units]
    known = group.add(trainer.clipped_sum(step, group.share(real)), real)
    epsilon = plan.epsilon_after(step) if group.first else None

    def release() -> Gradient:
        taken = batch[batch >= units] - units
        total = trainer.with_injected(known, taken)
        if plan.claim is not None and ledger is not None and step > ledger.steps_started:
            ledger.start_step(step, epsilon)  # on disk before the noisy gradient exists
        noisy = trainer.noisy_mean(step, total)
        if after_step is not None:
            after_step(step, noisy, known.gradient)
        if injection is not None:
            injection.observe(step, noisy, known.gradient, taken, lambda: trainer.noisy_mean(step, known))
        return noisy

    kept = trainer.update(step, group.publish(release, known.gradient))
    if not group.first:
        return
    loss = float(known.losses.mean()) if len(known.losses) else None
    clipped = float((known.norms > plan.max_grad_norm).float().mean()) if plan.claim and len(known.norms) else None
    line = {
        "step": step,
        "batch": len(batch),
        "loss": loss if loss is None or math.isfinite(loss) else None,
        "clipped": clipped,
        "epsilon": epsilon,
        "blocks": len(kept),
        "seconds": round(time.perf_counter() - began, 4),
    }
    atomic.append_line(run.metrics, json.dumps(line))
    reporter.step(StepReport(step, plan.steps, line["loss"], clipped, epsilon))


def _open_ledger(
    config: RunConfig, run: RunFolder, dataset: Dataset, plan: Plan, inserted: Inserted, resume: bool
) -> Ledger:
    if resume:
        ledger = Ledger.load(run.ledger)
        if ledger.document.coins_sha256 != inserted.coins_sha256:
            raise UsageError(f"{run.ledger}: names other coins than {run.coins}; this is not the run that was started")
        if ledger.document.config_sha256 not in (None, atomic.sha256_file(run.config)):
            raise UsageError(f"{run.config}: not the file that this run was started with; restore it from a copy")
        return ledger
    rows = ledger_rows(config, dataset, plan, inserted)
    run.write(plan.document())
    claim = plan.claim
    steps, delta = (plan.steps, claim.delta) if claim else (None, None)
    return Ledger.create(run.ledger, rows, inserted.coins_sha256, steps, delta, run.seal(run.config))


def _fingerprint(model: VisionLanguageModel, trained: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    mine = {id(parameter) for parameter in trained.values()}
    return {
        name: (float(local(value).double().sum()), float(local(value).double().square().sum()))
        for name, value in model.hf.named_parameters()
        if id(value) not in mine
    }


def _check_movement(
    model: VisionLanguageModel,
    parameters: Mapping[str, nn.Parameter],
    start: Mapping[str, torch.Tensor],
    frozen: Mapping[str, tuple[float, float]],
) -> None:
    if all(torch.equal(parameter.detach(), start[name]) for name, parameter in parameters.items()):
        raise DpauditError("training: no trained weight moved; check model.lora.targets and training.learning-rate")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
        raise DpauditError("training: a weight is not finite; lower training.learning-rate")
    for name, value in _fingerprint(model, parameters).items():
        if value != frozen[name]:
            raise DpauditError(f"training: the frozen weight {name} moved")


def _release(run: RunFolder, trainer: Trainer) -> None:
    """Write the adapter beside its place and move it in file by file; `finish_model` hashes it last."""
    temporary = run.private / "adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with atomic.writing(temporary):
        trainer.model.save_adapter(temporary)
        settings = temporary / "adapter_config.json"
        tree = json.loads(settings.read_text(encoding="utf-8"))
        tree["base_model_name_or_path"] = configuration.public_path(trainer.model.source)  # peft writes the folder
        settings.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for file in sorted(temporary.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json"):
            atomic.write_bytes(run.model / file.name, file.read_bytes())
    shutil.rmtree(temporary, ignore_errors=True)
    ranks = f" on {trainer.group.size} ranks" if trainer.group.size > 1 else ""
    run.write(describe(f"{trainer.model.device}{ranks}", sys.argv[1:]))
    run.finish_model()


def config_sha256(run: RunFolder) -> str:
    """Hash of the configuration as released, the same from every folder."""
    return configuration.resolve(configuration.read_yaml(run.config)).sha256()


def read_config(run: RunFolder) -> RunConfig:
    """The resolved configuration of a run, with the paths that it was started with."""
    return run.read_config()


def load_model(run: RunFolder | None, device: str = "auto", *, config: RunConfig | None = None) -> VisionLanguageModel:
    """The fine-tuned model of a finished run, or the base model (run None, `config` says which base and reducer).

    The base model keeps its full tokens unless a configuration is given.
    """
    if run is None:
        base = config.model if config else ModelConfig()
        model = VisionLanguageModel.load(base.path, device=device, precision=base.precision)
        if config is not None:
            model.set_reducer(config.reducer)
            for_questions(model, config)
        return model
    run.require_finished()
    mine = read_config(run)
    model = VisionLanguageModel.load(mine.model.path, device=device, precision=mine.model.precision)
    model.set_reducer(mine.reducer)
    for_questions(model, mine)
    model.load_adapter(run.model)
    return model


def estimate_seconds(config: RunConfig, dataset: Dataset, plan: Plan) -> float:
    """Rough wall time of a run: one gradient on noise pictures of the data's size, times T. Nothing private is read."""
    sample = min(16, max(1, round(plan.expected_batch_size)))
    rng = np.random.default_rng(0)
    like = dataset.train[0].pictures[0]
    units = [
        Unit(str(index), (replace(like, id=str(index), pixels=rng.integers(0, 256, like.pixels.shape, np.uint8)),))
        for index in range(sample)
    ]
    chosen = config.model
    model = VisionLanguageModel.load(chosen.path, device=chosen.device, precision=chosen.precision)
    trainer = Trainer.build(config, plan, Key.from_seed(0), model, units)
    trainer.clipped_sum(1, range(sample))
    began = time.perf_counter()
    trainer.clipped_sum(2, range(sample))
    return (time.perf_counter() - began) / sample * plan.expected_batch_size * plan.steps
