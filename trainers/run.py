"""One training run, from plan to released adapter.

Batch, noise and random masks of step t are functions of (key, t, name); the ledger is on disk before the noisy
gradient of a step is used. Hence a run that was killed anywhere and resumed ends with the same weights and ledger.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpaudit import atomic
from dpaudit import config as configuration
from dpaudit.config import ModelConfig, RunConfig
from dpaudit.documents import EnvironmentDocument, GradientPathName
from dpaudit.environment import describe
from dpaudit.errors import DpauditError, UsageError, rejected
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import binding, checkpoints, model_files
from trainers.distributed import ALONE, Group, fingerprint
from trainers.features import cache_of
from trainers.fusion import for_questions
from trainers.gradients import (
    Gradient,
)
from trainers.plan import Inserted, Plan, ledger_rows, make_plan
from trainers.progress import Reporter, Silent, StepReport
from trainers.records import Dataset
from trainers.sharding import local
from trainers.step import InjectedRows, Trainer
from trainers.vlm import VisionLanguageModel

# (step, released noisy gradient before pruning, clipped sum of the units that everybody knows to be there)
AfterStep = Callable[[int, Gradient, Gradient], None]


class Injection(Protocol):
    """Canaries that are gradients instead of records: units whose gradient the auditor dictates."""

    def rows(self, parameters: int) -> InjectedRows:
        """(k, parameters), the gradient of each inserted canary over all trained parameters in name order."""
        ...

    def observe(
        self, step: int, noisy: Gradient, known: Gradient, taken: npt.NDArray[np.int64], without: Callable[[], Gradient]
    ) -> None:
        """What `step` released, the clipped sum of its records, the inserted canaries it took, and what the same step
        with the same noise would have released without them."""
        ...


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
    """Train (or continue) the run in `run`, whose lock the caller holds, and release the adapter.

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
    model.set_reducer(config.reducer)  # which features depend on; ranks and resumed runs have it from here
    own = run if group.first else None  # other ranks share the project's folder, if there is one
    features = cache_of(own, config.training.feature_cache, model, warn=reporter.phase)
    trainer = Trainer.build(config, plan, key, model, group.own(units), features, group)
    group.agree("initial weights", fingerprint(trainer.parameters))
    if injection is not None and trainer.zeroth is not None:
        raise rejected("method", config.method, "a method with gradients: gradient canaries can't enter a forward pass")
    if injection is not None and config.model.lora.train == "alternating":
        raise rejected("model.lora.train", "alternating", "both or b: gradient canaries need every block in every step")
    if injection is not None and trainer.pruning.ahead:
        raise rejected("pruning.by", config.pruning.by, "a policy that noises every block: gradient canaries need all")
    if injection is not None:
        trainer.injected = injection.rows(sum(parameter.numel() for parameter in trainer.parameters.values()))
    named = config.model_copy(update={"reducer": model.reducer_config})
    if group.first:
        _describe(run, trainer, resume)  # before a ledger exists: no step is made that it does not cover
    ledger = _open_ledger(named, run, dataset, plan, inserted, resume) if group.first else None
    if group.first and not resume:
        key.save(run.noise_key, bound)  # after its ledger: a key that lies alone has lost one
    frozen = _fingerprint(model, trainer.parameters)
    start = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    identity = binding.identity(bound) if group.first else ""
    for name in run.discard_damaged_checkpoints() if resume and group.first else ():
        reporter.phase(f"checkpoint {name} is damaged; going on from the one before it")
    state = (trainer.parameters, trainer.optimizer, identity)
    pruning, average = trainer.pruning, trainer.average
    done = checkpoints.restore(run.checkpoints, *state, pruning=pruning, average=average, group=group) if resume else 0
    for step in range(done + 1, plan.steps + 1):
        _one_step(trainer, ledger, run, step, len(units), reporter, after_step, injection)
        if group.first and step % config.training.checkpoint_every == 0 and step < plan.steps:
            checkpoints.save(run.checkpoints, step, *state, pruning=pruning, average=average)
    reporter.close()
    trainer.noise.close()
    trainer.average.install(trainer.parameters)
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
    if group.first:
        trainer.draw_ahead(step)
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
        base = configuration.public_path(trainer.model.source)  # peft writes the folder
        name, _, revision = str(base).partition("@")
        tree |= {"base_model_name_or_path": name, "revision": revision or None}
        settings.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for file in sorted(temporary.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json"):
            atomic.write_bytes(run.model / file.name, file.read_bytes())
    shutil.rmtree(temporary, ignore_errors=True)
    run.finish_model()


def _describe(run: RunFolder, trainer: Trainer, resume: bool) -> None:
    """Write the environment of this process, with the gradient paths of all processes of this training.

    They stay unknown where an earlier process did not record its own.
    """
    mine: tuple[GradientPathName, ...] = () if trainer.zeroth is not None else (trainer.path.kind,)
    paths: tuple[GradientPathName, ...] | None = mine
    if resume:
        before = EnvironmentDocument.read(run.environment).gradient_paths if run.environment.exists() else None
        paths = None if before is None else tuple(dict.fromkeys((*before, *mine)))
    ranks = f" on {trainer.group.size} ranks" if trainer.group.size > 1 else ""
    run.write(describe(f"{trainer.model.device}{ranks}", sys.argv[1:], paths))


def config_sha256(run: RunFolder) -> str:
    """Hash of the configuration as released, the same from every folder."""
    return configuration.resolve(configuration.read_yaml(run.config)).sha256()


def read_config(run: RunFolder) -> RunConfig:
    """The resolved configuration of a run, with the paths that it was started with.

    A file without `reducer.feature-layer` is from a dpaudit where LLaVA's features came from `reducer.layer`.
    """
    config = run.read_config()
    mine = config.reducer
    if "feature_layer" in mine.model_fields_set or mine.name == "none" or mine.layer is None or not config.model.path:
        return config
    if model_files.model_type(model_files.find(config.model.path, "model.path", False), "model.path:") != "llava":
        return config
    return config.model_copy(update={"reducer": mine.model_copy(update={"feature_layer": mine.layer})})


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
    model.load_adapter(run.model, trained=mine.model.lora.train)
    return model
