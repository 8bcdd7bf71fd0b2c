"""The step contract: what one DP-SGD step must satisfy, tested without trusting its code, early and late in a training.

    from attacks.contract import check
    assert check(factory).verdict == "pass"           # or, with the reasons in the message:
    assert_contract(factory)

Deterministic checks compare neighbours under frozen noise; statistical ones have a false-alarm rate of at most 1e-7
each (attacks.contract.statistics), so they fail a correct trainer with probability below `FALSE_ALARMS` in all.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from attacks.contract import (
    accounting,
    history,
    independence,
    influence,
    later,
    liveness,
    noise,
    production,
    resume,
    sampling,
    units,
    updates,
)
from attacks.contract import statistics as stats
from attacks.contract.bench import NOTHING_STATED, Bench, Stated
from attacks.contract.guard import TIME_LIMIT, MethodFailure
from attacks.contract.probe import Probe
from dpaudit.documents import Check, CheckDocument, FactorySource
from dpaudit.errors import rejected

__all__ = ["FALSE_ALARMS", "Examination", "MethodFailure", "assert_contract", "check", "check_names", "run_checks"]

# In the order of a step.
MODULES = (units, influence, history, noise, production, later, updates, liveness, sampling, resume, accounting)

# Without these a pass would say too little: the verdict is then "inconclusive". So it is where neither the update rule
# nor the public line of a zeroth-order step was judged.
CORE = (influence.INFLUENCE, influence.CLIPPING, influence.ISOLATION, noise.LEVEL, noise.OF_DATA)

# Checks with a statistical test: each alarms on a correct trainer with probability at most stats.ALPHA. Those of the
# sampler are made three times: on fresh draws, on those of a trainer that trains, and on those without a noise seed.
STATISTICAL = (
    noise.LEVEL,
    noise.LAW,
    independence.OVER_STEPS,
    independence.OVER_PARAMETERS,
    independence.WITHIN,
    production.UNSEEDED,
    later.LATER,
    updates.LEAK,
    *(sampling.MARGINALS, sampling.SPREAD, sampling.EPOCH) * 3,
    resume.RESUME_NOISE,
)
FALSE_ALARMS = len(STATISTICAL) * stats.ALPHA


def run_checks(probe: Probe) -> tuple[Check, ...]:
    """Every check, in the order of the step: units, influence, history, noise, update, sampling, accounting."""
    return tuple(found for found, _ in timed_checks(Bench(probe)))


def timed_checks(bench: Bench) -> Iterator[tuple[Check, float]]:
    """Every check with the seconds it took; what several checks need is counted in the first of them."""
    for module in MODULES:
        made = module.checks(bench)
        began = time.monotonic()
        for found in made:
            yield found, time.monotonic() - began
            began = time.monotonic()


class Examination:
    """One run of the contract, which can say at any moment what it has found so far.

    epsilon, delta: what the training as a whole is claimed to spend, stated from outside. allow: checks that may fail,
    by name, with the reason. target: the factory as `module:name`; other processes can then build it as well.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        time_limit: float = TIME_LIMIT,
        epsilon: float | None = None,
        delta: float | None = None,
        allow: Mapping[str, str] | None = None,
        target: str | None = None,
    ) -> None:
        self.allow = dict(allow or {})
        for name, reason in self.allow.items():
            if name not in check_names():
                raise rejected("allow", name, f"a check: {', '.join(check_names())}")
            if not reason.strip():
                raise rejected("allow", f"{name}=", "a reason after the check's name (CHECK=REASON)")
        self.seed, self.time_limit, self.target = seed, time_limit, target
        self.stated = Stated(epsilon, delta)
        self.source: FactorySource | None = None
        self.probe: Probe | None = None
        self.found: list[Check] = []
        self.seconds: dict[str, float] = {}

    def run(self, factory: Callable[..., Any]) -> CheckDocument:
        """All checks; raises MethodFailure when the trainer can't be asked (`document` then holds what was made)."""
        self.probe = Probe(factory, seed=self.seed, limit=self.time_limit, target=self.target)
        for made, seconds in timed_checks(Bench(self.probe, self.stated)):
            waived = self.allow.get(made.name) if made.status == "fail" else None
            self.found.append(made.model_copy(update={"waived": waived}))
            self.seconds[made.name] = round(seconds, 3)
        return self.document()

    def _verdict(self) -> Literal["pass", "fail", "inconclusive"]:
        late = self.probe is not None and self.probe.unanswered is not None
        return verdict(tuple(self.found), stated=self.stated, offered=(accounting.EPSILON,) if late else ())

    def document(self, problem: str | None = None) -> CheckDocument:
        """What was found so far; `problem`: why there is no more."""
        probe = self.probe
        return CheckDocument(
            verdict=self._verdict() if problem is None else "inconclusive",
            checks=tuple(self.found),
            factory=self.source,
            problem=problem,
            epsilon=self.stated.epsilon,
            delta=self.stated.delta,
            seconds=dict(self.seconds),
            builds=probe.builds if probe is not None else 0,
            factory_seconds=round(probe.build_seconds, 3) if probe is not None else 0.0,
            steps=probe.steps if probe is not None else 0,
        )


def check(
    factory: Callable[..., Any],
    *,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    epsilon: float | None = None,
    delta: float | None = None,
    allow: Mapping[str, str] | None = None,
    target: str | None = None,
) -> CheckDocument:
    """Run the contract on `factory(records=None, *, seed, noise_seed=None)`; arguments as in `Examination`.

    Raises MethodFailure (a UsageError: one line that names the method) when the trainer can't be asked at all.
    """
    made = Examination(seed=seed, time_limit=time_limit, epsilon=epsilon, delta=delta, allow=allow, target=target)
    return made.run(factory)


def verdict(
    checks: tuple[Check, ...], *, stated: Stated = NOTHING_STATED, offered: tuple[str, ...] = ()
) -> Literal["pass", "fail", "inconclusive"]:
    """fail (and not waived) > inconclusive (a core check, or the claim stated, could not be checked) > pass.

    offered: further checks that are needed, because the trainer offers what they ask and did not answer.
    """
    if any(item.status == "fail" and item.waived is None for item in checks):
        return "fail"
    needed = (*CORE, *offered) if stated.epsilon is None else (*CORE, *offered, accounting.CLAIMED)
    lacking = {item.name for item in checks if item.status == "not applicable"}
    # What a zeroth-order step may do with the parameters is the public line's check.
    missing = lacking.intersection(needed) or {updates.RULE, updates.LINE} <= lacking
    return "inconclusive" if missing else "pass"


def assert_contract(factory: Callable[..., Any], *, seed: int = 0, allow: Mapping[str, str] | None = None) -> None:
    """For pytest: AssertionError with one line per failed check that is not waived."""
    document = check(factory, seed=seed, allow=allow)
    failed = [item for item in document.checks if item.status == "fail" and item.waived is None]
    lines = [f"{item.name}: measured {item.measured}; allowed {item.allowed}. {item.explanation}" for item in failed]
    assert not failed, "the step contract fails:\n" + "\n".join(lines)


def check_names() -> tuple[str, ...]:
    """All checks, in order."""
    names = []
    for module in (*MODULES, independence):
        names += [value for key, value in vars(module).items() if key.isupper() and f"{key}_WHY" in vars(module)]
    return tuple(names)
