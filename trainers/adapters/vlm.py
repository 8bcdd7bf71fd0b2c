"""dpaudit's own trainer under test: vision-language fine-tuning with DP-SGD, Dual-Priv Pruning or DP-ZO.

`factory_for(config, dataset)` puts any configuration to the test; `dp_sgd`, `dual_priv` and `dp_zo` are ready-made
factories on the compact reference model and public synthetic pictures. The step is that of `trainers.step.Trainer`,
unchanged; only the source of the noise is handed in.

    dpaudit check trainers.adapters.vlm:dual_priv
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpaudit import accounting, atomic, untrusted
from dpaudit.claims import StepClaim
from dpaudit.config import RunConfig, resolve
from dpaudit.randomness import Key
from trainers import updates
from trainers.augmentation import augmented
from trainers.gradients import CLIPPING, MicroBatch
from trainers.inputs import UnitInputs
from trainers.plan import Plan, fusion_std, make_plan
from trainers.protocol import Factory
from trainers.records import Dataset, Picture, Question, Unit
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel


def synthetic_units(count: int, *, side: int = 64, seed: int = 0) -> tuple[Unit, ...]:
    """Units with random pictures and one to three questions; nothing private, nothing learnable."""
    rng = np.random.default_rng(seed)
    bank = [("what digit is this?", "seven"), ("is it even or odd?", "odd"), ("is it a seven?", "yes")]

    def unit(index: int) -> Unit:
        pixels = rng.integers(0, 256, size=(side, side, 3), dtype=np.uint8)
        asked = sorted(int(place) for place in rng.choice(3, size=int(rng.integers(1, 4)), replace=False))
        questions = tuple(Question(bank[place][0], bank[place][1], "digit") for place in asked)
        return Unit(f"u{index}", (Picture(f"u{index}", pixels, questions),))

    return tuple(unit(index) for index in range(count))


class Workshop:
    """What trainers of one configuration share: the frozen model, and the encoded inputs of data sets seen before.

    The frozen tower makes tokens a function of the data set alone, so equal data sets (the very same record objects)
    are encoded once; any other data set is encoded anew as a whole, so that a leak between records is not hidden.
    """

    def __init__(self, config: RunConfig, plan: Plan, units: Sequence[Unit] = ()) -> None:
        self.config, self.plan, self.units = config, plan, tuple(units)
        self._built: dict[int, tuple[Trainer, dict[str, Tensor]]] = {}
        self._inputs: dict[tuple[int, ...], tuple[list[Unit], UnitInputs]] = {}

    def trainer(self, records: list[Unit], seed: int) -> tuple[Trainer, dict[str, Tensor]]:
        """A trainer on `records` with an optimiser of its own, and the initial weights for this seed."""
        if seed not in self._built:
            base = self.config.model
            model = VisionLanguageModel.load(base.path, device="cpu", precision=base.precision)
            built = Trainer.build(self.config, self.plan, Key.from_seed(seed), model, records)
            self.adapt(built.model)
            start = {name: value.detach().clone() for name, value in built.parameters.items()}
            self._built[seed] = (built, start)
        built, start = self._built[seed]
        key = tuple(id(record) for record in records)
        if key not in self._inputs:
            if len(self._inputs) >= 16:
                del self._inputs[next(iter(self._inputs))]
            shown = augmented(records, self.config.training.augmentations)
            self._inputs[key] = (records, UnitInputs(built.model, shown))
        optimizer = updates.make_optimizer(built.parameters, self.config.training, noise=self.plan.noise_std)
        pruning = updates.Pruning.of(built.parameters, self.config.pruning)
        average = updates.Average(0.0)  # what is looked at are the weights after each step
        inputs = self._inputs[key][1]
        return replace(built, inputs=inputs, optimizer=optimizer, pruning=pruning, average=average), start

    def adapt(self, model: VisionLanguageModel) -> None:
        """For subclasses that change a part of the model once it is built; inputs are encoded afterwards."""


class VlmTrainer:
    """One configuration as a trainer under test; records are `trainers.records.Unit`.

    Trainers of one factory share the model's modules, so each keeps its weights and installs them while it works.
    """

    def __init__(
        self, workshop: Workshop, records: Sequence[Unit] | None, *, seed: int, noise_seed: int | None
    ) -> None:
        self.records = list(workshop.units if records is None else records)
        self.plan, self.config = workshop.plan, workshop.config
        self.public = Key.from_seed(seed)
        self.secret = Key.fresh() if noise_seed is None else Key.from_seed(noise_seed)
        self.trainer, start = workshop.trainer(self.records, seed)
        self.weights = {name: value.clone() for name, value in start.items()}
        self.step_count = self.draws = 0
        self.last: dict[str, Tensor] = {}
        self.kept: set[str] = set()
        self.injected: list[Tensor] = []  # gradients that join the next step

    def __deepcopy__(self, memo: dict[int, object]) -> "VlmTrainer":
        """Weights, moments and pruning scores of its own; model and inputs are shared, as in one factory anyway."""
        made = copy.copy(self)
        parameters = self.trainer.parameters
        optimizer = updates.make_optimizer(parameters, self.config.training, noise=self.plan.noise_std)
        moments = updates.optimizer_tensors(parameters, self.trainer.optimizer)
        updates.restore_optimizer(parameters, optimizer, {name: value.clone() for name, value in moments.items()})
        pruning = replace(self.trainer.pruning, scores=dict(self.trainer.pruning.scores))
        made.trainer = replace(self.trainer, optimizer=optimizer, pruning=pruning)
        made.weights = {name: value.clone() for name, value in self.weights.items()}
        made.last, made.kept, made.injected = dict(self.last), set(self.kept), list(self.injected)
        return made

    def _install(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trainer.parameters.items():
                parameter.copy_(weights[name])

    @property
    def claim(self) -> StepClaim:
        """From the plan that a run would announce."""
        assert self.plan.claim is not None
        return StepClaim(
            mechanism=self.plan.claim.mechanism,
            max_grad_norm=self.plan.max_grad_norm,
            noise_multiplier=self.plan.noise_multiplier,
            sampling=self.plan.sampling,
            sample_rate=self.plan.sample_rate,
            expected_batch_size=self.plan.expected_batch_size,
            relation=self.plan.claim.relation,
            unit=self.plan.claim.unit,
            steps=self.plan.steps,
            delta=self.plan.claim.delta,
            epoch_steps=self.plan.claim.epoch_steps,
        )

    def step(self, indices: Sequence[int]) -> None:
        """The run's own step: clipped sum, noisy mean, pruned update."""
        self.step_count += 1
        self._install(self.weights)
        total = self.trainer.clipped_sum(self.step_count, sorted(set(indices)))
        if self.injected:
            more = replace(self.trainer, injected=torch.stack(self.injected))
            total, self.injected = more.with_injected(total, np.arange(len(self.injected))), []
        noisy = replace(self.trainer, key=self.secret).noisy_mean(self.step_count, total)
        self.last = {name: value.clone() for name, value in noisy.items()}
        self.kept = self.trainer.update(self.step_count, noisy)
        self.weights = {name: value.detach().clone() for name, value in self.trainer.parameters.items()}

    def inject(self, gradient: Mapping[str, Tensor]) -> None:
        """One more unit of the next step, by its gradient."""
        self.injected.append(torch.cat([gradient[name].flatten() for name in sorted(gradient)]))

    def released(self) -> Mapping[str, Tensor | None]:
        """The noisy mean before pruning; None for a block that was pruned ahead of the step."""
        return {**dict.fromkeys(self.weights), **self.last} if self.trainer.partial else self.last

    def parameters(self) -> Mapping[str, Tensor]:
        """The adapter."""
        return self.weights

    def extreme_records(self) -> list[Unit]:
        """Far from the data: black, white and chequered pictures, wrong and long answers, many questions."""
        side = self.records[0].pictures[0].pixels.shape
        grid = (np.indices(side[:2]).sum(axis=0) % 2 * 255).astype(np.uint8)
        pictures = {
            "white": np.full(side, 255, np.uint8),
            "black": np.zeros(side, np.uint8),
            "chequered": np.repeat(grid[:, :, None], 3, axis=2),
        }
        long = Question("what is this? " * 4, "no " * 12, "probe")
        wrong = Question("what digit is this?", "qzxj kw", "probe")
        asked = {"white": (wrong,), "black": (long, wrong), "chequered": (long,) * 4}
        return [Unit(f"x-{name}", (Picture(f"x-{name}", pixels, asked[name]),)) for name, pixels in pictures.items()]

    def sample(self) -> list[int]:
        """The batch of the next step, and the next at every call."""
        self.draws += 1
        batch = self.plan.sampler.batch(self.public, step=self.draws, units=len(self.records))
        return [int(index) for index in batch]

    def applied(self) -> set[str]:
        """Blocks that the last step updated."""
        return self.kept

    def select(self, noisy: Mapping[str, Tensor]) -> set[str]:
        """The blocks that a noisy gradient would update in this step; settled already if chosen ahead of it."""
        if self.trainer.pruning.ahead:
            return self.kept
        return self.trainer.pruning.select(noisy, self.public.generator(purpose="pruning", step=self.step_count))

    def gradient(self, record: Unit) -> Mapping[str, Tensor]:
        """By the micro-batch loop, the oracle of the fast path; with the fusion noise of the next step.

        Under automatic clipping what is clipped is the gradient over its norm, so that is shown.
        """
        self._install(self.weights)
        inputs = UnitInputs(self.trainer.model, augmented([record], self.config.training.augmentations))
        std = fusion_std(self.config, self.plan)
        rows = inputs.select([0], key=self.public, step=self.step_count + 1, fusion_std=std)
        path = MicroBatch(self.trainer.model, self.trainer.parameters, CLIPPING[self.config.privacy.clipping])
        if self.config.privacy.clipping == "automatic":
            return path(rows, self.plan.max_grad_norm).gradient
        return path.gradient(rows)[0]

    def epsilon(self, delta: float) -> float:
        """The accountant's eps for the steps taken."""
        event = self.plan.event
        assert event is not None
        return accounting.epsilon(replace(event, steps=self.step_count), delta)

    def save(self, path: Path) -> None:
        """Adapter, optimiser state and step count in one safetensors file."""
        state = {f"weight//{name}": value for name, value in self.weights.items()}
        moments = updates.optimizer_tensors(self.trainer.parameters, self.trainer.optimizer)
        state |= {f"optimizer//{name}": value for name, value in moments.items()}
        state |= {f"pruning//{name}": value for name, value in self.trainer.pruning.tensors().items()}
        atomic.write_tensors(path, state, metadata={"step": json.dumps(self.step_count)})

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        with untrusted.open_tensors(path) as file:
            self.step_count = json.loads(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights = {name: tensors[f"weight//{name}"] for name in self.weights}
        moments = {name[11:]: value for name, value in tensors.items() if name.startswith("optimizer//")}
        updates.restore_optimizer(self.trainer.parameters, self.trainer.optimizer, moments)
        self.trainer.pruning.restore({name[9:]: value for name, value in tensors.items() if name.startswith("pruning")})

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """The adapter's weights; they are installed when the next step begins."""
        self.weights = {name: parameters[name].detach().clone() for name in self.weights}


class VlmZerothOrder(VlmTrainer):
    """Method dp-zo: `released()` holds one noisy number a direction. No gradient, no block that is chosen."""

    gradient = None  # type: ignore[assignment]
    inject = None  # type: ignore[assignment]
    applied = None  # type: ignore[assignment]
    select = None  # type: ignore[assignment]

    def direction(self) -> Mapping[str, Tensor]:
        """The public direction of the last step (the first, where there are several)."""
        assert self.trainer.zeroth is not None
        return self.trainer.zeroth.lines(self.public, self.step_count)[0]


def factory_for(config: RunConfig, dataset: Dataset) -> Factory:
    """A factory for the protocol. The plan is made once, from the declared data set: it is public."""
    return _factory(Workshop(config, make_plan(config, dataset, 0), dataset.train))


def _factory(shared: Workshop) -> Factory:
    kind = VlmZerothOrder if shared.config.method == "dp-zo" else VlmTrainer

    def factory(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
        return kind(shared, records, seed=seed, noise_seed=noise_seed)

    return factory


@lru_cache(maxsize=4)
def workshop(method: str, *settings: str) -> Workshop:
    """The ready-made configuration of the factories below: reference model, LoRA of rank 2, AdamW, sigma 1.

    C = 10 is about the median gradient of these units at the start, so that some are clipped and some are not.
    """
    small = ["training.batch-size=6", "training.steps=60", "model.lora.rank=2", "model.device=cpu", "training.warmup=0"]
    small += ["privacy.noise-multiplier=1.0", "privacy.max-grad-norm=10", "privacy.delta=1e-3", *settings]
    if method == "dp-zo":
        # One direction, along which SGD moves. mu = 1e-2: batched kernels round losses by 1e-7, which 1 / mu enlarges.
        small += ["zeroth-order={directions: 1, perturbation: 1e-2}", "training.optimizer=sgd"]
        small += ["privacy.max-grad-norm=4", "model.lora.targets=[q_proj, v_proj]"]  # numbers of size 0 to 10 here
    config = resolve({}, [f"method={method}", *small])
    units = synthetic_units(30)
    dataset = Dataset("synthetic", "image (with all its questions)", units, units[:1])
    return Workshop(config, make_plan(config, dataset, 0), units)


def dp_sgd(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """Plain DP-SGD on the reference model."""
    return VlmTrainer(workshop("dp-sgd"), records, seed=seed, noise_seed=noise_seed)


def dual_priv(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """Dual-Priv Pruning: VisionZip tokens with fusion noise, 80 % of the blocks updated."""
    return VlmTrainer(workshop("dual-priv"), records, seed=seed, noise_seed=noise_seed)


def dp_zo(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """DP-ZO: one noisy number along one public direction, two forward passes."""
    return VlmZerothOrder(workshop("dp-zo"), records, seed=seed, noise_seed=noise_seed)


def previous(records: Sequence[Unit] | None = None, *, seed: int, noise_seed: int | None = None) -> VlmTrainer:
    """DP-SGD on half of the blocks, chosen ahead of each step from earlier noisy gradients: only they have noise."""
    chosen = workshop("dp-sgd", "pruning={keep: 0.5, by: previous, explore: 0.25}")
    return VlmTrainer(chosen, records, seed=seed, noise_seed=noise_seed)
