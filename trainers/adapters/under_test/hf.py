"""A Hugging Face `Trainer` with DP code of its own under test: its `train()` runs unchanged, a batch at a time.

Collator, data preparation, training step, optimiser, callbacks and gradient accumulation are the owner's. The trainer's
data loader gets its indices from here, and the noisy gradient is what the optimiser reads (before the Trainer's own
`max_grad_norm`, where the noise is there already). A canary gradient takes the place of one more record's own gradient
where the training step makes one backward pass a record, or is one more row of Opacus' `grad_sample`.
"""

import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test.base import (
    Extras,
    Gradient,
    Records,
    RecordSource,
    Scratch,
    Source,
    UnderTest,
    trained,
)
from trainers.adapters.under_test.loop import NEVER, Feed
from trainers.adapters.under_test.rehearsal import Rehearsal
from trainers.adapters.under_test.rows import GHOST_INJECT, Rows, dp_optimizer, hook_step, is_ghost

LEAST_STEPS = 600  # of one train(): audits make that many whatever the arguments say

NOT_ONE_BY_ONE = (
    "{passes} backward passes for {records} records: their gradients are not computed one by one, and the optimizer is "
    "not Opacus', so a canary gradient can't be injected; this closes the white-box game"
)


class HuggingFaceTrainer(UnderTest):
    """One Trainer, driven."""

    kind = "train()"

    def __init__(
        self, plan: "HuggingFacePlan", records: Records, *, seed: int, noise_seed: int | None, least: int = LEAST_STEPS
    ) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed, extras=plan.extras, public=plan.rehearsal.public)
        self._plan, self._claim = plan, plan.claim
        with self._streams.active():
            self.trainer = plan.make_trainer(list(self.records))
            self._streams.after_construction(noise_seed)
        _checked(self.trainer, len(self.records))
        self._parameters = trained(self.trainer.model)
        if not self._parameters:
            raise UsageError("make_trainer: the model of the Trainer has no parameter with requires_grad")
        self._rows: Rows | None = None
        self._loop = self._in_thread(
            _body(self.trainer, self._releases, self._passes, self._opacus, max(least, plan.claim.steps or 1))
        )
        if plan.epsilon is None:
            self._refuse("epsilon", "no epsilon=(trainer, delta) was given")
        if plan.sample is None:  # a sampler of ours would pass its checks, and say nothing of theirs
            self._refuse("sample", "no sample= was given, so the Trainer's own sampler is not looked at")

    def _opacus(self, optimizer: Any) -> None:
        """Called in the loop once the optimizer is there."""
        found = dp_optimizer(optimizer)
        if found is not None and self._rows is None:
            self._rows = Rows(self._parameters, ghost=is_ghost(found))
            hook_step(found, self._rows)

    def _advance(self, chosen: list[int], injected: list[Mapping[str, Tensor]], *, keep: bool = False) -> None:
        self._loop.start()
        rows = self._rows
        carriers = [0] * len(injected) if rows is None else []
        canaries = {len(chosen) + place: gradient for place, gradient in enumerate(injected)} if carriers else {}
        if rows is not None:
            rows.rows, rows.keep, rows.seen = list(injected), keep, None
        parts = max(1, int(self.trainer.args.gradient_accumulation_steps))
        batches = [[int(index) for index in part] for part in np.array_split([*chosen, *carriers], parts)]
        with self._releases.watching(), self._passes.watching(self._parameters, canaries, keep=keep):
            self._loop.advance(batches)
        if carriers and self._passes.count != len(chosen) + len(carriers):
            raise UsageError(f"inject: {self._passes.count} backward passes for {len(chosen) + len(carriers)} records")
        self._keep_released(chosen)

    def sample(self) -> list[int]:
        """The owner's."""
        assert self._plan.sample is not None
        with self._streams.active():
            return [int(index) for index in self._plan.sample(self.trainer)]

    def epsilon(self, delta: float) -> float:
        """The owner's."""
        assert self._plan.epsilon is not None
        return float(self._plan.epsilon(self.trainer, delta))

    def gradient(self, record: Any) -> Mapping[str, Tensor]:
        """One record's gradient before clipping, as the training step computes it in a batch of one."""
        return self._read(record)[0]

    def score(self, record: Any) -> float:
        """Minus the loss that the training step has for the record in a batch of its own."""
        return -self._read(record)[1]

    def _read(self, record: Any) -> tuple[Gradient, float]:
        scratch, index = self._plan.scratch.ready(self, record)
        assert isinstance(scratch, HuggingFaceTrainer)
        return scratch.read(index)

    def read(self, index: int) -> tuple[Gradient, float]:
        """(gradient, loss) of one record, by a step on it alone."""
        with self._streams.active():
            assert self._frozen is not None
            self._frozen.begin(0)
            self._advance([index], [], keep=True)
        if not self._passes.values:
            raise UsageError("train(): no backward pass for a batch of one record")
        seen = self._passes.kept[0] if self._rows is None else self._rows.seen
        return self._full(seen or {}), self._passes.values[0]

    def save(self, path: Path) -> None:
        """The owner's."""
        assert self._extras.save is not None
        self._extras.save(self.trainer, path)

    def load(self, path: Path) -> None:
        """The owner's."""
        assert self._extras.load is not None
        self._extras.load(self.trainer, path)


def _checked(trainer: Any, count: int) -> None:
    """That it is a Trainer on one process whose data set holds the records one to one."""
    for name in ("train", "get_train_dataloader", "args", "model"):
        if not hasattr(trainer, name):
            raise rejected("make_trainer", type(trainer).__name__, "a transformers.Trainer (or a subclass of it)")
    data = trainer.train_dataset
    held = len(data) if hasattr(data, "__len__") else None
    if held != count:
        found = f"a Trainer with {held} training examples for {count} records"
        raise rejected("make_trainer", found, "one example a record, in their order (no packing, no streaming)")


def _body(
    trainer: Any, releases: Any, passes: Any, optimizer_ready: Callable[[Any], None], least: int
) -> Callable[[Feed], None]:
    """train() with its loader fed by us. Holds the Trainer, not the trainer under test."""
    ready = weakref.WeakMethod(optimizer_ready)

    def body(feed: Feed) -> None:
        from transformers import trainer_callback

        loader = trainer.get_train_dataloader()
        feed.length = max(least, len(loader))
        # A plain loader: accelerate's fetches a batch ahead, and would hide where a step ends.
        fed = DataLoader(_data_of(loader, trainer), batch_sampler=feed, collate_fn=_collate_of(loader, trainer))
        trainer.get_train_dataloader = lambda: fed
        arguments = trainer.args
        arguments.disable_tqdm, arguments.logging_steps = True, 10**9
        for callback in ("ProgressCallback", "PrinterCallback"):
            trainer.remove_callback(getattr(trainer_callback, callback))
        arguments.save_strategy = type(arguments.save_strategy)("no")
        arguments.max_steps = max(arguments.max_steps, least)
        _settle_before_clipping(trainer, releases, passes)
        create = trainer.create_optimizer

        def look() -> None:
            found = ready()
            if found is not None:
                found(trainer.optimizer)

        def created(*given: Any, **options: Any) -> Any:
            made = create(*given, **options)
            look()
            return made

        trainer.create_optimizer = created
        if trainer.optimizer is not None:
            look()
        trainer.train()

    return body


def _data_of(loader: Any, trainer: Any) -> Any:
    return getattr(loader, "dataset", trainer.train_dataset)


def _collate_of(loader: Any, trainer: Any) -> Any:
    return getattr(loader, "collate_fn", None) or trainer.data_collator


def _settle_before_clipping(trainer: Any, releases: Any, passes: Any) -> None:
    """Where the noise is in `.grad` before the Trainer clips the whole gradient, that is what was released."""
    accelerator = trainer.accelerator
    clip = accelerator.clip_grad_norm_

    def clipped(parameters: Any, *given: Any, **options: Any) -> Any:
        listed = list(parameters)
        if passes.drawn:
            releases.settle(listed)
        return clip(listed, *given, **options)

    accelerator.clip_grad_norm_ = clipped


class HuggingFacePlan:
    """All that the factory knows."""

    def __init__(
        self, make_trainer: Callable[[list[Any]], Any], source: Source, claim: StepClaim, extras: Extras, **said: Any
    ):
        self.make_trainer, self.source, self.claim, self.extras = make_trainer, source, claim, extras
        self.epsilon, self.sample = said["epsilon"], said["sample"]
        self.scratch = Scratch(lambda records: self._new(records, 0, 0, least=NEVER))
        self.rehearsal = Rehearsal(
            lambda seed, noise: HuggingFaceTrainer(self, source.own(), seed=seed, noise_seed=noise)
        )
        self._refusal: tuple[str | None] | None = None

    def trainer(self, records: Records | None, seed: int, noise_seed: int | None) -> HuggingFaceTrainer:
        """A fresh one."""
        chosen = self.source.own() if records is None else records
        why = self._why_not()
        trainer = self._new(chosen, seed, noise_seed)
        if why is not None:
            for name in ("inject", "gradient", "score"):
                trainer._refuse(name, why)
        return trainer

    def _new(
        self, records: Records, seed: int, noise_seed: int | None, *, least: int = LEAST_STEPS
    ) -> HuggingFaceTrainer:
        began = time.monotonic()
        trainer = HuggingFaceTrainer(self, records, seed=seed, noise_seed=noise_seed, least=least)
        if noise_seed is not None:
            self.rehearsal.make(seed, time.monotonic() - began)
        return trainer

    def _why_not(self) -> str | None:
        if self._refusal is None:
            # train() collects garbage at its start, which takes longer than all the rest of a small step.
            gc.collect()
            gc.freeze()
            trial = HuggingFaceTrainer(self, self.source.own(), seed=0, noise_seed=0)
            trial.step([0, 1])
            passes = trial._passes.count
            if trial._rows is not None:
                self._refusal = (GHOST_INJECT if trial._rows.ghost else None,)
            else:
                self._refusal = (None if passes == 2 else NOT_ONE_BY_ONE.format(passes=passes, records=2),)
        return self._refusal[0]


def hf_trainer(
    make_trainer: Callable[[list[Any]], Any],
    *,
    records: RecordSource,
    claim: StepClaim,
    epsilon: Callable[[Any, float], float] | None = None,
    sample: Callable[[Any], Sequence[int]] | None = None,
    canaries: Callable[[int, int], Records] | None = None,
    extreme_records: RecordSource | None = None,
    save: Callable[[Any, Path], None] | None = None,
    load: Callable[[Any, Path], None] | None = None,
) -> Callable[..., HuggingFaceTrainer]:
    """A Hugging Face `Trainer` (or `SFTTrainer`, or a subclass) with its own DP code, unchanged, as a factory.

    make_trainer(rows): makes the Trainer for a list of records, with model, data collator and DP optimiser or training
    step of its own; its train_dataset must hold one example a record, in order. claim: the StepClaim of one optimiser
    step; `expected_batch_size` is what the sum of clipped gradients is divided by. epsilon(trainer, delta),
    sample(trainer) -> indices, canaries(n, seed), extreme_records, save(trainer, path), load(trainer, path) open
    further checks. Without `sample`, games draw the claimed batches themselves: the Trainer's own sampler is then not
    looked at.

        def make_trainer(rows):
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LORA)
            return DPTrainer(model=model, args=ARGUMENTS, train_dataset=rows, data_collator=collate)

        factory = hf_trainer(make_trainer, records=load_rows, claim=CLAIM)

    Raises UsageError (one line).
    """
    if not isinstance(claim, StepClaim):
        raise rejected("claim", type(claim).__name__, "a dpaudit.claims.StepClaim")
    extras = Extras(canaries, extreme_records, save, load)
    plan = HuggingFacePlan(make_trainer, Source(records), claim, extras, epsilon=epsilon, sample=sample)

    def factory(
        records: Sequence[Any] | None = None, *, seed: int, noise_seed: int | None = None
    ) -> HuggingFaceTrainer:
        return plan.trainer(records, seed, noise_seed)

    return factory
