"""An Opacus loop under test, as its tutorials write it: what `make_private` returned, and a train function.

The noisy gradient is what the inner optimiser reads. A canary gradient is one more row of `grad_sample` at the moment
of `optimizer.step()`, so Opacus clips it like a record. Ghost clipping never has such rows: there `inject` is refused.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from dpaudit.claims import StepClaim
from dpaudit.documents import Relation
from dpaudit.errors import UsageError, rejected
from trainers.adapters.under_test.base import (
    Extras,
    Gradient,
    Records,
    RecordSource,
    Scratch,
    Source,
    UnderTest,
    names,
    trained,
)
from trainers.adapters.under_test.loop import Feed
from trainers.adapters.under_test.rehearsal import Rehearsal
from trainers.adapters.under_test.rows import GHOST_INJECT, Rows, hook_step

Build = Callable[[list[Any]], Any]


class Parts(SimpleNamespace):
    """What `build` returned, by kind, and all of it as the train function takes it."""

    returned: tuple[Any, ...]
    module: nn.Module
    optimizer: Any
    loader: Any
    accountant: Any
    ghost: bool


def parts_of(returned: Any) -> Parts:
    """Sort the tuple of `make_private` (an engine may be in it too). Raises UsageError naming what is missing."""
    from opacus import PrivacyEngine
    from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPOptimizerFastGradientClipping
    from torch.utils.data import DataLoader

    values = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    optimizer = next((value for value in values if isinstance(value, DPOptimizer)), None)
    loader = next((value for value in values if isinstance(value, DataLoader)), None)
    if optimizer is None or loader is None:
        accepted = "what make_private returned: (module, DPOptimizer, DataLoader), or with a criterion in ghost mode"
        raise UsageError(f"build: returned ({names(values)}); accepted: {accepted}")
    if isinstance(optimizer, AdaClipDPOptimizer):
        raise rejected(
            "build, clipping",
            "adaptive",
            "flat or per_layer: a claim states one C, and an adaptive one follows the data",
        )
    model = next((value for value in values if hasattr(value, "_module") or isinstance(value, nn.Module)), None)
    if model is None:
        raise UsageError(f"build: returned no model ({names(values)}); accepted: the module of make_private")
    engine = next((value for value in values if isinstance(value, PrivacyEngine)), None)
    taken = tuple(value for value in values if value is not engine)
    return Parts(
        returned=taken,
        module=getattr(model, "_module", model),
        model=model,
        optimizer=optimizer,
        loader=loader,
        accountant=engine.accountant if engine is not None else _accountant(optimizer),
        ghost=isinstance(optimizer, DPOptimizerFastGradientClipping),
    )


def _accountant(optimizer: Any) -> Any:
    """The accountant behind the step hook that make_private attached (a closure over it); None where there is none."""
    hook = optimizer.step_hook
    cells = (
        dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)) if hasattr(hook, "__code__") else {}
    )
    owner = cells["self"].cell_contents if "self" in cells else None
    return owner if hasattr(owner, "get_epsilon") else None


class OpacusTrainer(UnderTest):
    """One construction by `build`, driven by `train`."""

    kind = "train"

    def __init__(
        self, plan: "OpacusPlan", records: Records, *, seed: int, noise_seed: int | None, loud: bool = False
    ) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed, extras=plan.extras, public=plan.rehearsal.public)
        self._plan = plan
        with self._streams.active():
            self._parts = plan.construct(self.records)
            self._streams.after_construction(noise_seed)
        parts = self._parts
        self._sampler = parts.loader.batch_sampler
        if self._sampler is None:
            raise rejected(
                "build", "a loader without a batch sampler", "a map-style data set in a DataLoader with batches"
            )
        self._draws: Any = None
        self._parameters = trained(parts.module)
        if loud and parts.ghost:  # to read gradients off: nothing is clipped
            parts.model.max_grad_norm = 1e30
        if plan.public_size is not None:
            plan.public(self)
        self._claim = plan.claim_of(self)
        self._own = Rows(self._parameters, parts.ghost)
        hook_step(parts.optimizer, self._own)
        self._loop = self._make_loop(plan.train)
        if parts.ghost:
            self._refuse("inject", GHOST_INJECT)
        if parts.accountant is None:
            self._refuse("epsilon", "no Opacus accountant is attached to the optimizer; return the PrivacyEngine too")

    def _make_loop(self, train: Callable[..., Any]) -> Any:
        returned, loader = self._parts.returned, self._parts.loader

        def body(feed: Feed) -> None:
            # The loader itself, not a copy: the train function may hold on to it by a closure.
            loader.__dict__["batch_sampler"] = feed
            loader.num_workers = 0
            train(*returned)

        return self._in_thread(body)

    def _advance(self, chosen: list[int], injected: list[Mapping[str, Tensor]], *, keep: bool = False) -> None:
        self._own.rows, self._own.keep, self._own.seen, self._own.steps = injected, keep, None, 0
        with self._releases.watching(), self._passes.watching(self._parameters):
            self._loop.advance([chosen])
        if self._own.rows:
            raise UsageError("train: made no optimizer.step() that an injected gradient could join")
        optimizer = self._parts.optimizer
        self._keep_released(
            chosen, divide=self._claim.expected_batch_size if optimizer.loss_reduction == "sum" else 1.0
        )
        if not self._own.steps:
            raise UsageError(
                "train: stepped the optimizer inside make_private's, which neither clips nor adds noise; accepted: "
                "optimizer.step() of what make_private returned"
            )

    def sample(self) -> list[int]:
        """The next draw of the loader's own batch sampler."""
        with self._streams.active():
            for _ in range(2):
                if self._draws is None:
                    self._draws = iter(self._sampler)
                try:
                    return [int(index) for index in next(self._draws)]
                except StopIteration:  # an epoch is over
                    self._draws = None
        raise UsageError("build: the loader's batch sampler draws no batch")

    def epsilon(self, delta: float) -> float:
        """By the accountant that make_private attached; without noise it overflows instead of answering."""
        if self._claim.noise_multiplier == 0:
            return math.inf
        accountant = self._parts.accountant
        return float(accountant.get_epsilon(delta)) if len(accountant) else 0.0

    def gradient(self, record: Any) -> Mapping[str, Tensor]:
        """One record's gradient before clipping: what Opacus itself has in `grad_sample` for it."""
        scratch, index = self._plan.scratch.ready(self, record)
        assert isinstance(scratch, OpacusTrainer)
        return scratch.read(index)[0]

    def score(self, record: Any) -> float:
        """Minus the loss that the train function has for it, in a batch of its own."""
        scratch, index = self._plan.scratch.ready(self, record)
        assert isinstance(scratch, OpacusTrainer)
        return -scratch.read(index)[1]

    def read(self, index: int) -> tuple[Gradient, float]:
        """(gradient, loss) of one record, by a step on it alone."""
        with self._streams.active():
            assert self._frozen is not None
            self._frozen.begin(0)
            self._advance([index], [], keep=True)
        if self._own.seen is None or not self._passes.values:
            raise UsageError("train: no gradient of a single record to be seen in a batch of one")
        return self._full(self._own.seen), self._passes.values[0]

    def save(self, path: Path) -> None:
        """The owner's."""
        assert self._extras.save is not None
        self._extras.save(self._parts.returned, path)

    def load(self, path: Path) -> None:
        """The owner's."""
        assert self._extras.load is not None
        self._extras.load(self._parts.returned, path)


class OpacusPlan:
    """All that the factory knows; what is costly and the same for every trainer is worked out once."""

    def __init__(self, build: Build, source: Source, train: Callable[..., Any], extras: Extras, **said: Any) -> None:
        self.build, self.source, self.train, self.extras = build, source, train, extras
        self.claim: StepClaim | None = said["claim"]
        self.delta, self.steps, self.unit = said["delta"], said["steps"], said["unit"]
        self.relation: Relation = said["relation"]
        self.public_size: int | None = said["public_size"]
        self._public: tuple[float, int, int] | None = None  # q, expected batch size and batches an epoch
        self._multipliers: dict[Any, float] = {}
        self.scratch = Scratch(lambda records: self._new(records, 0, 0, loud=True))
        self.rehearsal = Rehearsal(lambda seed, noise: OpacusTrainer(self, source.own(), seed=seed, noise_seed=noise))

    def trainer(self, records: Records | None, seed: int, noise_seed: int | None) -> OpacusTrainer:
        """A fresh one."""
        own = self.source.own()
        if self.public_size is not None and self._public is None:
            if self.public_size != len(own):
                raise rejected("public_size", self.public_size, f"the number of your records, {len(own)}")
            parts = self.construct(own)
            self._public = (_rate(parts), int(parts.optimizer.expected_batch_size), _steps(parts.loader))
        return self._new(own if records is None else records, seed, noise_seed)

    def _new(self, records: Records, seed: int, noise_seed: int | None, *, loud: bool = False) -> OpacusTrainer:
        began = time.monotonic()
        trainer = OpacusTrainer(self, records, seed=seed, noise_seed=noise_seed, loud=loud)
        if noise_seed is not None:
            self.rehearsal.make(seed, time.monotonic() - began)
        return trainer

    def construct(self, records: list[Any]) -> Parts:
        """`build(records)`; the search for a noise multiplier, seconds long, is made once for equal arguments."""
        from opacus import privacy_engine

        # It warns in every trainer whose first batch is empty, which is a question that we ask on purpose.
        logging.getLogger("opacus.data_loader").setLevel(logging.ERROR)
        search = privacy_engine.get_noise_multiplier

        def remembered(**arguments: Any) -> float:
            # With a public size so is its rate: the first search, on the owner's records, holds for all data sets.
            varying = {} if self.public_size is None else {"sample_rate": None}
            key = tuple(sorted((name, str(value)) for name, value in (arguments | varying).items()))
            if key not in self._multipliers:
                self._multipliers[key] = search(**arguments)
            return self._multipliers[key]

        privacy_engine.get_noise_multiplier = remembered
        try:
            return parts_of(self.build(list(records)))
        finally:
            privacy_engine.get_noise_multiplier = search

    def public(self, trainer: OpacusTrainer) -> None:
        """q and the expected batch size of the declared size, whatever records were handed in."""
        assert self._public is not None
        rate, size, _ = self._public
        parts = trainer._parts
        sampler = parts.loader.batch_sampler
        if not hasattr(sampler, "sample_rate"):
            raise rejected("public_size", self.public_size, "Poisson sampling (poisson_sampling=True) with it")
        sampler.sample_rate = parts.loader.sample_rate = rate
        parts.optimizer.expected_batch_size = size
        if parts.accountant is not None:
            parts.optimizer.attach_step_hook(parts.accountant.get_optimizer_hook_fn(sample_rate=rate))

    def claim_of(self, trainer: OpacusTrainer) -> StepClaim:
        """As stated, or what `make_private` was told."""
        if self.claim is not None:
            return self.claim
        parts = trainer._parts
        optimizer, rate = parts.optimizer, _rate(parts)
        epoch = _steps(parts.loader) if self._public is None else self._public[2]
        steps = self.steps if self.steps is not None else epoch
        size = optimizer.expected_batch_size or rate * _length(trainer)
        return StepClaim(
            mechanism="gaussian",
            max_grad_norm=float(optimizer.max_grad_norm),
            noise_multiplier=float(optimizer.noise_multiplier),
            sampling="poisson" if hasattr(trainer._sampler, "sample_rate") else "shuffle",
            sample_rate=rate,
            expected_batch_size=float(size),
            relation=self.relation,
            unit=self.unit,
            steps=steps,
            delta=self.delta,
        )


def _length(trainer: OpacusTrainer) -> int:
    return len(trainer.records)


def _rate(parts: Parts) -> float:
    return float(getattr(parts.loader, "sample_rate", None) or 1 / len(parts.loader))


def _steps(loader: Any) -> int:
    return max(1, len(loader))


def opacus_loop(
    build: Build,
    *,
    records: RecordSource,
    train: Callable[..., Any],
    delta: float = 1e-5,
    steps: int | None = None,
    public_size: int | None = None,
    claim: StepClaim | None = None,
    unit: str = "example",
    relation: Relation = "add-remove",
    canaries: Callable[[int, int], Records] | None = None,
    extreme_records: RecordSource | None = None,
    save: Callable[[Any, Path], None] | None = None,
    load: Callable[[Any, Path], None] | None = None,
) -> Callable[..., OpacusTrainer]:
    """An Opacus training loop, unchanged, as a factory for `dpaudit check` and `dpaudit audit-trainer`.

    build(records): makes model, optimizer and loader for a list of records, and returns what `make_private` or
    `make_private_with_epsilon` returned (a PrivacyEngine may be appended). train(*returned): your loop over the
    loader, an epoch or several; it is stopped whenever it asks for the next batch. records: a list, a map-style data
    set, or a function that makes one; one record is one unit.

    The claim is read off what was returned (sigma, C, q, expected batch size), for `steps` steps (default: one epoch)
    at `delta`; `claim` states it instead. Opacus takes q and the batch size from the number of records, so they
    disclose it; public_size=len(records) declares that number public, and neighbouring data sets then keep both.

        def build(records):
            model, loader = make_model(), DataLoader(records, batch_size=64)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return PrivacyEngine().make_private(
                module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
            )

        factory = opacus_loop(build, records=load_data, train=train, public_size=4000)

    Raises UsageError (one line) for what `build` returns instead.
    """
    extras = Extras(canaries, extreme_records, save, load)
    said = {
        "claim": claim,
        "delta": delta,
        "steps": steps,
        "unit": unit,
        "relation": relation,
        "public_size": public_size,
    }
    plan = OpacusPlan(build, Source(records), train, extras, **said)

    def factory(records: Sequence[Any] | None = None, *, seed: int, noise_seed: int | None = None) -> OpacusTrainer:
        return plan.trainer(records, seed, noise_seed)

    return factory
