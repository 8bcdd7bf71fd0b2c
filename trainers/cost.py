"""What a run will take, before it is started: time and memory, for a large model without running it.

A small model is measured: gradients of a few units of noise pictures. Of a larger one nothing but the header of its
weights is read: floating-point operations are counted by the usual rule (two a weight and token forwards, as many again
for the gradient of what flows through frozen weights), and divided by what this machine does of them a second on
matrices of the model's own sizes. That leaves out attention's softmax, normalisation and reading of data, so it is
rather too little than too much. How far off it is was not measured.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dpaudit.config import ALL_LINEAR, ReducerConfig, RunConfig
from dpaudit.randomness import Key
from trainers.families import Family
from trainers.memory import RowMemory
from trainers.opened import Opened
from trainers.plan import Plan
from trainers.precision import computed_in
from trainers.records import Dataset, Picture, Unit
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel, pick_device

MEASURED = 20_000_000  # numbers of a model that is run; the reference model has 0.4 million
UNITS = 16  # that are measured at most
SECONDS = 0.3  # of multiplying matrices
ASSUMED = 256  # visual tokens of a picture where the tower's layout can't be had without running it
TEMPLATE = 12  # tokens of a chat template around a question
KEPT = 34  # numbers a layer keeps for its backward pass, by token and width (Korthikanti et al. 2022, table 2)
COPIES = 6  # of the trained numbers: weight, sum, noisy mean, noise, two moments of the optimiser


@dataclass(frozen=True)
class Cost:
    """seconds: of all steps, on this machine. bytes: weights, adapters, tokens, one backward pass. how: in words."""

    seconds: float
    bytes: int
    how: str


def estimate(config: RunConfig, dataset: Dataset, plan: Plan, opened: Opened) -> Cost:
    """Rough cost of a run; only sizes are read of the data."""
    size = _Size.of(config, dataset, opened)
    memory = size.memory(config, plan, len(dataset.train))
    if opened.files.numbers <= MEASURED:
        seconds, units = _measured(config, dataset, plan, opened)
        return Cost(seconds, memory, f"measured on {units} units")
    device = pick_device(config.model.device)
    speed = _speed(device, computed_in(config.model.precision), size)
    pictures = sum(len(picture.images) for unit in dataset.train for picture in unit.pictures)
    work = size.tower_work * pictures + size.unit_work(config) * plan.expected_batch_size * plan.steps
    work *= config.training.augmentations
    about = (
        f"counted: {size.tokens} tokens a unit, {opened.files.numbers / 1e6:,.0f} M weights, {speed / 1e9:.0f} GFLOP/s"
    )
    return Cost(work / speed, memory, about + size.note)


@dataclass(frozen=True)
class _Size:
    """Sizes of a model and of a unit. decoder, tower, head: numbers in linear layers. trained: of the adapters."""

    numbers: int
    decoder: int
    tower: int
    head: int
    trained: int
    width: int
    inner: int
    layers: int
    tower_width: int
    visual: int
    tokens: int
    targets: int
    note: str

    @classmethod
    def of(cls, config: RunConfig, dataset: Dataset, opened: Opened) -> "_Size":
        family = opened.family(opened.empty, opened.processor, opened.source or "reference")
        text = opened.config.get_text_config()
        linear = _linear(family.language_model)
        wanted = set(config.model.lora.targets)
        adapted = [module for name, module in linear if {name.rpartition(".")[2], ALL_LINEAR} & wanted]
        unit = dataset.train[0]
        visual, note = _visual(family, unit.pictures[0])
        shown, asked, said = _text(opened, unit)
        vocabulary, width = opened.empty.get_input_embeddings().weight.shape
        return cls(
            numbers=opened.files.numbers,
            decoder=sum(module.weight.numel() for _, module in linear),
            tower=sum(module.weight.numel() for _, module in _linear(family.tower)),
            head=vocabulary * width,
            trained=config.model.lora.rank * sum(m.in_features + m.out_features for m in adapted),
            width=int(width),
            inner=int(getattr(text, "intermediate_size", None) or 4 * width),
            layers=int(getattr(text, "num_hidden_layers", 1)),
            tower_width=int(getattr(getattr(opened.config, "vision_config", None), "hidden_size", None) or width),
            visual=visual,
            tokens=visual * shown + asked + said,
            targets=said,
            note=note,
        )

    @property
    def tower_work(self) -> float:
        """Operations of one picture through the tower."""
        return 2.0 * self.tower * self.visual

    def unit_work(self, config: RunConfig) -> float:
        """Operations of one unit's gradient: forwards, backwards, and forwards again where layers are recomputed."""
        passes = 1 if config.method == "dp-zo" else 2 if config.training.gradient_checkpointing == "none" else 3
        attention = 4.0 * self.tokens**2 * self.width * self.layers
        return passes * (2.0 * self.decoder * self.tokens + 2.0 * self.head * self.targets + attention)

    def memory(self, config: RunConfig, plan: Plan, units: int) -> int:
        """Bytes: weights, copies of the adapters, tokens of all pictures, one physical batch with its gradients."""
        each = computed_in(config.model.precision).itemsize
        kept = 2 if config.training.gradient_checkpointing != "none" else KEPT
        row = self.tokens * self.width * self.layers * kept * each + 3 * self.head // self.width * self.targets * 4
        row += self._gradients(config, row)
        copies = rows = config.training.augmentations  # of a unit, which is never split
        if config.training.gradient_path != "micro-batch":
            most = config.training.rows_at_once
            if most == "auto":
                most = RowMemory(row, 0).rows(config.training.memory)
            rows = max(copies, min(most, copies * round(plan.expected_batch_size), copies * units))
        tokens = copies * units * self.visual * self.tower_width * each
        weights = self.numbers * each
        if config.model.precision == "nf4":  # half a byte, and a scale of four bytes for 64 of them
            weights -= round(self.decoder * (each - 0.5625))
        return weights + 4 * COPIES * self.trained + tokens + rows * row

    def _gradients(self, config: RunConfig, activations: int) -> int:
        """Bytes of one row's gradients by `trainers.step.gradient_path`: hooks and rows keep them."""
        chosen, each = config.training, 4 * self.trained
        if config.method in ("non-private", "dp-zo") or chosen.gradient_path not in ("auto", "hooks", "rows"):
            return 0
        free = chosen.gradient_path == chosen.rows_at_once == "auto" and chosen.gradient_checkpointing != "reentrant"
        return 0 if free and RowMemory(activations, each).ghost_pays(chosen.memory) else each


def _linear(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def _visual(family: Family, picture: Picture) -> tuple[int, str]:
    """Visual tokens of a picture of that size, and what is to be said of the number."""
    if family.patches is not None:
        return family.patches, ""
    noise = np.random.default_rng(0).integers(0, 256, picture.images[0].shape, dtype=np.uint8)
    try:
        with torch.no_grad():
            return int(family.encode(family.prepare([noise]), family.layers(ReducerConfig())).tokens.shape[1]), ""
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):  # not without numbers
        return ASSUMED, f", {ASSUMED} visual tokens assumed"


def _text(opened: Opened, unit: Unit) -> tuple[int, int, int]:
    """(pictures, tokens asked, tokens answered) of a unit."""
    questions = [question for picture in unit.pictures for question in picture.questions]
    asked, said = [item.text for item in questions], [item.answer for item in questions]
    if opened.guard is not None:
        opened.guard.vouch([*asked, *said])
    counts = [sum(len(opened.tokenizer(text)["input_ids"]) for text in texts) for texts in (asked, said)]
    return sum(len(picture.images) for picture in unit.pictures), counts[0] + TEMPLATE * len(asked), counts[1]


def _speed(device: torch.device, dtype: torch.dtype, size: _Size) -> float:
    """Operations a second in products of (tokens, width) by (width, inner)."""
    left = torch.randn(max(8, size.tokens), size.width, device=device).to(dtype)
    right = torch.randn(size.width, size.inner, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    left @ right
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        left @ right
        wait()
        done += 1
    return 2.0 * left.shape[0] * size.width * size.inner * done / (time.perf_counter() - began)


def _measured(config: RunConfig, dataset: Dataset, plan: Plan, opened: Opened) -> tuple[float, int]:
    """(seconds of all steps, units): one gradient on noise pictures of the data's size, times T."""
    sample = min(UNITS, max(1, round(plan.expected_batch_size)))
    units = _noise_units(dataset.train[0].pictures[0], sample)
    chosen = config.model
    model = VisionLanguageModel.load(device=chosen.device, precision=chosen.precision, opened=opened)
    trainer = Trainer.build(config, plan, Key.from_seed(0), model, units)
    trainer.clipped_sum(1, range(sample))
    began = time.perf_counter()
    trainer.clipped_sum(2, range(sample))
    return (time.perf_counter() - began) / sample * plan.expected_batch_size * plan.steps, sample


def _noise_units(like: Picture, count: int) -> Sequence[Unit]:
    rng: Any = np.random.default_rng(0)
    shape = like.images[0].shape
    return [
        Unit(str(index), (replace(like, id=str(index), pixels=rng.integers(0, 256, shape, np.uint8)),))
        for index in range(count)
    ]
