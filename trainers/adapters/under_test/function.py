"""A training step written by hand under test: `step(state, batch) -> state`, in torch, numpy or jax.

What was released is what a torch optimiser in the step reads, or what a function of the owner's returns. A canary
gradient is carried by one more record where torch computes the gradients of the records one by one, or joins the rows
of a function that takes the gradients of all records at once; it goes through the owner's clipping in either case.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dpaudit.claims import StepClaim
from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test import seams, state, trees
from trainers.adapters.under_test.base import Extras, Gradient, Records, RecordSource, Scratch, Source, UnderTest
from trainers.adapters.under_test.rehearsal import Rehearsal

Init = Callable[[int], Any]
Step = Callable[[Any, list[Any]], Any]
Released = Callable[[Any], Any] | seams.Seam | None

NO_SEAM = (
    "the gradients of single records can't be seen in this step; this closes the white-box game. Pass "
    'per_record_gradients=(module, "name"): a function of yours that takes the gradients of all records, a row each, '
    "as its first argument"
)


OTHER = 1_000_003  # added to a seed for a state whose generators show what a seed does to them


class FunctionTrainer(UnderTest):
    """One state, stepped."""

    kind = "step"

    def __init__(self, plan: "FunctionPlan", records: Records, *, seed: int, noise_seed: int | None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed, extras=plan.extras, public=plan.rehearsal.public)
        self._plan = plan
        self._claim = plan.claim
        with self._streams.active():
            self._state = plan.init(seed)
            other = plan.init(seed + OTHER) if noise_seed is None else None
            if noise_seed is None and plan.seed_is_optional:
                self._streams.as_without_a_seed(cast(Callable[[], object], plan.init))
            else:
                self._streams.after_construction(noise_seed)
        self._state = state.renew(self._state, noise_seed, other)
        self._where = state.Where(self._state, plan.parameters)
        self._parameters = self._where.get(self._state)
        self._sees = seams.Rows("per_record_gradients", plan.rows) if plan.rows is not None else None
        self._returns = seams.Returned("released", plan.released) if isinstance(plan.released, tuple) else None
        for name in ("epsilon", "sample", "score"):
            if getattr(plan, name) is None and (name != "score" or not self._where.of_modules):
                self._refuse(name, f"no {name}= was given")
        if self._where.prefix is None and not self._where.of_modules:
            self._refuse("assign", "parameters= is a function; a dotted path into the state can be set")
            self._refuse("gradient", "parameters= is a function; a dotted path into the state can be set")

    def _advance(self, chosen: list[int], injected: list[Mapping[str, Tensor]]) -> None:
        self._run([self.records[index] for index in chosen], injected)

    def _run(self, batch: list[Any], injected: list[Mapping[str, Tensor]], *, keep: bool = False) -> None:
        plan = self._plan
        carriers = [] if self._sees is not None else [plan.source.own()[0] for _ in injected]
        canaries = {len(batch) + place: gradient for place, gradient in enumerate(injected)} if carriers else {}
        live = self._parameters if self._where.of_modules else {}
        with contextlib.ExitStack() as stack:
            if self._frozen is not None:
                stack.enter_context(self._frozen)
            stack.enter_context(self._passes)
            stack.enter_context(self._releases.watching())
            stack.enter_context(self._passes.watching(live, canaries, keep=keep))
            result = self._looked_at([*batch, *carriers], list(injected))
        if self._sees is not None and injected:
            self._sees.check()
        changed = result is not None and result is not self._state  # None: changed in place
        self._state = result if changed else self._state
        if carriers and self._passes.count != len(batch) + len(carriers):
            raise UsageError(f"inject: {self._passes.count} backward passes for {len(batch) + len(carriers)} records")
        if changed or not self._where.of_modules:
            self._parameters = self._where.get(self._state)
        self._read_released([*batch, *carriers])

    def _looked_at(self, batch: list[Any], canaries: list[Mapping[str, Tensor]]) -> Any:
        """The step, with the owner's functions wrapped; once more and uncompiled where jax hides their values."""
        looks = [look for look in (self._sees, self._returns) if look is not None]

        def once(uncompiled: bool) -> Any:
            with contextlib.ExitStack() as stack:
                if self._sees is not None:
                    stack.enter_context(self._sees.watching(canaries))
                if self._returns is not None:
                    stack.enter_context(self._returns.watching())
                if uncompiled:
                    stack.enter_context(seams.eager())
                return self._plan.step(self._state, batch)

        if not looks or "jax" not in sys.modules or self._plan.uncompiled:
            return once(bool(looks) and self._plan.uncompiled)
        try:
            result = once(False)
            if all(look.called for look in looks):
                return result
        except seams.Traced:
            pass
        self._plan.uncompiled = True
        return once(True)

    def _read_released(self, batch: list[Any]) -> None:
        plan = self._plan
        if self._returns is not None:
            seen: Mapping[str, Tensor] = self._returns.tensors()
        elif callable(plan.released):
            seen = trees.tensors(plan.released(self._state))
        elif self._releases.seen or not batch or self._where.of_modules:
            if not self._releases.seen and batch:
                raise UsageError(
                    "released: no torch optimizer made a step; accepted: released=(module, 'function that returns the "
                    "noisy mean') or a function of the state"
                )
            return self._keep_released([0] * len(batch))
        else:
            raise UsageError(
                "released: missing; accepted: (module, 'function that returns the noisy mean'), or a function of the "
                "state"
            )
        unknown = sorted(set(seen) - set(self._parameters))
        if unknown:
            known = ", ".join(list(self._parameters)[:6])
            raise rejected("released", unknown[0], f"arrays named like the parameters: {known}")
        self._last = {name: seen.get(name) for name in self._parameters}

    def assign(self, parameters: Mapping[str, Tensor]) -> None:
        """Into the state."""
        self._state = self._where.put(self._state, parameters)
        if not self._where.of_modules:
            self._parameters = self._where.get(self._state)

    def gradient(self, record: Any) -> Mapping[str, Tensor]:
        """One record's gradient before clipping, as the step itself computes it in a batch of one."""
        return self._read(record)[0]

    def score(self, record: Any) -> float:
        """The owner's, or minus the loss that the step has for the record in a batch of its own."""
        if self._plan.score is not None:
            with self._streams.active():
                return float(self._plan.score(self._state, record))
        return -self._read(record)[1]

    def _read(self, record: Any) -> tuple[Gradient, float]:
        scratch, index = self._plan.scratch.ready(self, record)
        assert isinstance(scratch, FunctionTrainer)
        return scratch.read(index)

    def read(self, index: int) -> tuple[Gradient, float]:
        """(gradient, loss) of one record, by a step on it alone."""
        with self._streams.active():
            assert self._frozen is not None
            self._frozen.begin(0)
            self._run([self.records[index]], [], keep=True)
        if self._sees is not None:
            if self._sees.first is None:
                raise UsageError("per_record_gradients: saw no row for a batch of one record")
            return self._full(self._sees.first), float("nan")
        if self._passes.count != 1:
            raise UsageError(f"step: {self._passes.count} backward passes for a batch of one record")
        return self._full(self._passes.kept[0]), self._passes.values[0]

    def sample(self) -> list[int]:
        """The owner's."""
        assert self._plan.sample is not None
        with self._streams.active():
            return [int(index) for index in self._plan.sample(self._state)]

    def epsilon(self, delta: float) -> float:
        """The owner's."""
        assert self._plan.epsilon is not None
        return float(self._plan.epsilon(self._state, delta))

    def save(self, path: Path) -> None:
        """The owner's."""
        assert self._extras.save is not None
        self._extras.save(self._state, path)

    def load(self, path: Path) -> None:
        """The owner's; it may change the state in place or return another."""
        assert self._extras.load is not None
        made = self._extras.load(self._state, path)
        self._state = self._state if made is None else made
        self._parameters = self._where.get(self._state)


class FunctionPlan:
    """All that the factory knows."""

    def __init__(self, init: Init, step: Step, source: Source, claim: StepClaim, extras: Extras, **said: Any) -> None:
        self.init, self.step, self.source, self.claim, self.extras = init, step, source, claim, extras
        self.parameters: state.Selector = said["parameters"]
        self.released: Released = said["released"]
        self.rows: seams.Seam | None = said["per_record_gradients"]
        self.epsilon, self.sample, self.score = said["epsilon"], said["sample"], said["score"]
        self.scratch = Scratch(lambda records: self._new(records, 0, 0))
        self.rehearsal = Rehearsal(lambda seed, noise: FunctionTrainer(self, source.own(), seed=seed, noise_seed=noise))
        self.seed_is_optional = _optional(init)
        self.uncompiled = False  # whether functions of the owner's are called inside compiled code of jax
        self._refusal: tuple[str | None] | None = None

    def trainer(self, records: Records | None, seed: int, noise_seed: int | None) -> FunctionTrainer:
        """A fresh one."""
        trainer = self._new(self.source.own() if records is None else records, seed, noise_seed)
        why = self._why_not()
        if why is not None:
            trainer._refuse("inject", why)
            trainer._refuse("gradient", why)
            if self.score is None:
                trainer._refuse("score", why)
        return trainer

    def _new(self, records: Records, seed: int, noise_seed: int | None) -> FunctionTrainer:
        began = time.monotonic()
        trainer = FunctionTrainer(self, records, seed=seed, noise_seed=noise_seed)
        if noise_seed is not None:
            self.rehearsal.make(seed, time.monotonic() - began)
        return trainer

    def _why_not(self) -> str | None:
        """None where gradients of single records can be read and joined; found out once, by a step on two records."""
        if self._refusal is None:
            self._refusal = (self._tried(),)
        return self._refusal[0]

    def _tried(self) -> str | None:
        if self.rows is not None:
            return None
        trial = FunctionTrainer(self, self.source.own(), seed=0, noise_seed=0)
        if not trial._where.of_modules:
            return NO_SEAM
        trial.step([0, 1])
        if trial._passes.count == 2:
            return None
        passes = trial._passes.count
        return f"{passes} backward passes for 2 records, so {NO_SEAM}"


def _optional(init: Init) -> bool:
    """Whether `init` may be called without its seed, as a training outside of tests would."""
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # built in, or a callable without a signature
        return False
    return bool(parameters) and parameters[0].default is None


def step_function(
    *,
    init: Init,
    step: Step,
    records: RecordSource,
    claim: StepClaim,
    parameters: state.Selector = None,
    released: Released = None,
    per_record_gradients: seams.Seam | None = None,
    epsilon: Callable[[Any, float], float] | None = None,
    sample: Callable[[Any], Sequence[int]] | None = None,
    score: Callable[[Any, Any], float] | None = None,
    canaries: Callable[[int, int], Records] | None = None,
    extreme_records: RecordSource | None = None,
    save: Callable[[Any, Path], None] | None = None,
    load: Callable[[Any, Path], None] | None = None,
) -> Callable[..., FunctionTrainer]:
    """A training step written by hand, unchanged, as a factory for `dpaudit check` and `dpaudit audit-trainer`.

    init(seed) makes the state: anything that holds a torch module, or a tree of arrays (torch, numpy, jax). step(state,
    batch) makes one logical step on a list of records, which may be empty, and returns the state (None: changed in
    place). claim: the StepClaim of one step.

    parameters: a dotted path into the state (default: its torch modules, else "params", else its first part).
    released: where the noisy mean is to be seen: (module, "name") of a function that returns it, or a function of the
    state; default: what a torch optimizer in the step reads. per_record_gradients: (module, "name") of a function whose
    first argument holds the gradients of all records, a row each; needless where torch makes one backward pass a
    record. sample(state) -> indices, epsilon(state, delta), score(state, record), canaries(n, seed), extreme_records,
    save(state, path) and load(state, path) open further checks.

        def init(seed):
            torch.manual_seed(seed)
            model = Net()
            return model, torch.optim.SGD(model.parameters(), lr=0.1)

        factory = step_function(
            init=init, step=lambda state, batch: dp_step(*state, batch), records=load_data, claim=CLAIM
        )

    Generators and keys of jax in the state are seeded anew for every trainer, but for those that a constant has seeded:
    without a noise seed they are left alone, so that public noise shows. An init whose seed defaults to None is also
    called without one there, to see what it does to the global generators. Raises UsageError (one line).
    """
    if not isinstance(claim, StepClaim):
        raise rejected("claim", type(claim).__name__, "a dpaudit.claims.StepClaim")
    if isinstance(released, tuple) or (released is not None and not callable(released)):
        seams.checked("released", released)
    if per_record_gradients is not None:
        seams.checked("per_record_gradients", per_record_gradients)
    plan = FunctionPlan(
        init,
        step,
        Source(records),
        claim,
        Extras(canaries, extreme_records, save, load),
        parameters=parameters,
        released=released,
        per_record_gradients=per_record_gradients,
        epsilon=epsilon,
        sample=sample,
        score=score,
    )

    def factory(records: Sequence[Any] | None = None, *, seed: int, noise_seed: int | None = None) -> FunctionTrainer:
        return plan.trainer(records, seed, noise_seed)

    return factory
