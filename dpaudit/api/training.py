"""`dpaudit.check` and `dpaudit.audit`: training code, or a finished run, under the contract and the games."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpaudit import extras, packages, verdict
from dpaudit.api import html
from dpaudit.api.results import LIMIT, Bound
from dpaudit.documents import AuditDocument, Check, CheckDocument, Claim, Verdict
from dpaudit.errors import UsageError, rejected

if TYPE_CHECKING:
    from trainers.progress import Reporter

Factory = Callable[..., Any] | str
UNLIT = {"runs": "training"}  # what a progress bar counts; otherwise steps


@dataclass(frozen=True, repr=False)
class Contract:
    """What the step contract found. document: all of it, as `dpaudit check --json` prints it."""

    document: CheckDocument

    @property
    def verdict(self) -> Literal["pass", "fail", "inconclusive"]:
        """fail: a check failed and was not waived. inconclusive: a core check could not be made."""
        return self.document.verdict

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed and were not waived."""
        return tuple(check for check in self.document.checks if check.status == "fail" and check.waived is None)

    def __getitem__(self, name: str) -> Check:
        """A check by its name."""
        found = {check.name: check for check in self.document.checks}
        if name not in found:
            raise rejected("check", name, tuple(found))
        return found[name]

    def _lines(self) -> list[str]:
        lines = [f"{check.name}: measured {check.measured}; allowed {check.allowed}. {check.explanation}"
                 for check in self.failed]  # fmt: skip
        lines += [f"{check.name}: waived ({check.waived})" for check in self.document.checks if check.waived]
        if self.verdict == "inconclusive":
            lines.append("A core check could not be made, so a pass would say too little.")
        if self.verdict != "fail":
            lines.append("The contract can show that a training is wrong; it can never prove privacy.")
        return lines

    def _counts(self) -> str:
        made = sum(check.status != "not applicable" for check in self.document.checks)
        return f"{made} checks made, {len(self.failed)} failed, {len(self.document.checks) - made} not applicable"

    def __repr__(self) -> str:
        return "\n".join(
            [f"step contract: {self.verdict} ({self._counts()})", *(f"  {line}" for line in self._lines())]
        )

    def _repr_html_(self) -> str:
        return html.verdict(f"Step contract ({self._counts()})", self.verdict, {}, self._lines())


@dataclass(frozen=True, repr=False)
class Audit:
    """What an audit found. document: all of it, as `dpaudit audit --json` prints it; path: the folder that holds it."""

    document: AuditDocument
    path: Path

    @property
    def verdict(self) -> Verdict:
        """invalid, refuted, unsupported, inconclusive, not refuted or no claim."""
        return self.document.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """In sentences."""
        return self.document.reasons

    @property
    def claim(self) -> Claim | None:
        """What was audited."""
        return self.document.claim

    @property
    def bound(self) -> Bound | None:
        """The headline: the best bound that assumes nothing or only the claimed mechanism."""
        best, sure = verdict.headline(self.document), verdict.headline_confidence(self.document)
        return None if best is None or sure is None else Bound.of(best, sure)

    @property
    def within_mechanism(self) -> Bound | None:
        """The best bound within DP-SGD of the claimed q and T; None where there is none."""
        found = verdict.within_mechanism(self.document)
        return None if found is None else Bound.of(found, found.confidence)

    def _rows(self) -> dict[str, str]:
        rows = {}
        if self.claim is not None:
            rows["claim"] = (
                f"eps = {float(self.claim.epsilon):.4g} at delta = {self.claim.delta:g} (unit: {self.claim.unit})"
            )
        for test in self.document.tests:
            if verdict.counts(test) and test.p_value is not None:
                power = "no power earned" if test.power is None else f"power {test.power:.0%}"
                rows[test.name] = f"p = {test.p_value:.3g}, e = {float(test.e_value or 0):.3g}; {power}"
        if self.bound is not None:
            rows["bound"] = f"eps >= {self.bound.value:.3g} (ceiling {self.bound.ceiling:.3g})"
        rows["written to"] = str(self.path)
        return rows

    def _notes(self) -> list[str]:
        skipped = [f"{check.name}: not played ({check.measured})" for check in self.document.validity.checks
                   if check.status == "not applicable"]  # fmt: skip
        return [*self.reasons, *skipped, LIMIT]

    def __repr__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self._rows().items()]
        return "\n".join([f"verdict: {self.verdict}", *lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        return html.verdict("Audit", self.verdict, self._rows(), self._notes())


def check(
    factory: Factory,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    allow: Mapping[str, str] | None = None,
    seed: int = 0,
    time_limit: float = 30.0,
) -> Contract:
    """The step contract on training code, as `dpaudit check`: what a DP-SGD step must satisfy, early and late.

    factory: from `dpaudit.under_test`, any `factory(records=None, *, seed, noise_seed=None) -> trainer`, or
    "module:factory". epsilon, delta: what the whole training is said to spend. allow: checks that may fail, with the
    reason. time_limit: seconds that one call of the trainer may take. Takes seconds to a minute, trains nothing. Raises
    UsageError when the trainer can't be asked.

    With the loop of docs/python.md:

    >>> import dpaudit
    >>> from dpaudit.under_test import step_function
    >>> found = dpaudit.check(step_function(init=start, step=step, records=records, claim=claim, released=noisy,
    ...                                     per_record_gradients=noisy), allow={"claim is public": "24 is public"})
    >>> found.verdict, found.failed, found["influence of one unit"].status
    ('pass', (), 'pass')
    """
    with _training("check"):
        from attacks.contract import Examination
        from attacks.contract.loading import load_factory, source

        stated = {"epsilon": epsilon, "delta": delta}
        target = factory if isinstance(factory, str) else None
        made = Examination(seed=seed, time_limit=time_limit, allow=allow, target=target, **_claimed(stated))
        loaded = load_factory(factory, limit=time_limit) if isinstance(factory, str) else _callable(factory)
        made.source = source(target or _name(factory), loaded)
        return Contract(made.run(loaded))


def audit(
    subject: Factory | Path,
    *,
    white_box: bool = False,
    canaries: bool = False,
    contract: bool = False,
    mia: bool = False,
    fusion: bool = False,
    count: int | None = None,
    runs: int | None = None,
    steps: int | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    arguments: Mapping[str, object] | None = None,
    seed: int | None = None,
    again: bool = False,
    out: Path | str | None = None,
    confidence: float = 0.95,
    alpha: float = 0.001,
    time_limit: float = 30.0,
    progress: bool = False,
) -> Audit:
    """Audit training code (a factory or "module:factory": `dpaudit audit-trainer`) or a run folder (`dpaudit audit`).

    No game named: all that the subject allows without further trainings. count: canaries; runs: trainings of the
    multi-run audit; steps: of each training; epsilon, delta: the claim (default: as the trainer says); arguments: of
    the factory; seed: repeatable coins and noise; out: folder of the audit (default: under audits/); again: fresh coins
    (run folders). progress: shown on stderr. Raises UsageError for what the subject can't be asked.

    With the loop of docs/python.md:

    >>> import dpaudit
    >>> from dpaudit.under_test import step_function
    >>> factory = step_function(init=start, step=step, records=records, claim=claim, released=noisy,
    ...                         per_record_gradients=noisy)
    >>> dpaudit.audit(factory, white_box=True, seed=3).verdict
    'not refuted'
    """
    named = {"canaries": canaries, "mia": mia, "fusion": fusion, "contract": contract, "white-box": white_box}
    audits = tuple(name for name, wanted in named.items() if wanted)
    levels: dict[str, Any] = {"confidence": confidence, "alpha": alpha, "count": count}
    of_trainer = {
        "runs": runs,
        "steps": steps,
        "epsilon": epsilon,
        "delta": delta,
        "seed": seed,
        "arguments": arguments,
    }
    if not _is_run(subject):
        if again:
            raise UsageError("again: applies to a run folder; to audit a trainer again, choose another folder")
        given = {name: value for name, value in of_trainer.items() if value is not None}
        place = None if out is None else Path(out)
        return _audit_trainer(subject, place, progress, audits=audits, time_limit=time_limit, **given, **levels)
    for name, value in {**of_trainer, "out": out}.items():
        if value is not None:
            raise UsageError(f"{name}: belongs to training code; a run folder states its own claim")
    with _training("audit"):
        from attacks.audit import audit as audit_run
        from attacks.options import Options
        from dpaudit.cli.console import log
        from reports import card

        options = Options(audits=audits, again=again, **levels)
        place = Path(str(subject))
        reporter = _reporter("twin", progress)
        document = audit_run(place, options, reporter=reporter, log=log if progress else _quiet)
        card.renew(place, log if progress else _quiet)
        return Audit(document, place)


def _audit_trainer(subject: Any, out: Path | None, progress: bool, **options: Any) -> Audit:
    with _training("audit"):
        from attacks.external.options import TrainerOptions
        from attacks.external.trainer import audit_trainer
        from dpaudit.cli.console import log

        text = isinstance(subject, str)
        asked = TrainerOptions(target=subject if text else _name(subject), **options)
        document, path = audit_trainer(
            asked,
            out,
            reporter=lambda name: _reporter(name, progress),
            log=log if progress else _quiet,
            given=None if text else _callable(subject),
        )
        return Audit(document, path)


@contextlib.contextmanager
def _training(what: str) -> Iterator[None]:
    """What needs the extra `train`, with our packages in place whatever the caller's own are called."""
    with extras.named(what), packages.ours():
        yield


def _is_run(subject: object) -> bool:
    """A folder, as against training code."""
    if isinstance(subject, Path):
        return True
    return isinstance(subject, str) and (":" not in subject or Path(subject).is_dir())


def _callable(factory: object) -> Callable[..., Any]:
    if not callable(factory):
        raise rejected("factory", factory, "a callable of dpaudit.under_test or of the protocol, or 'module:factory'")
    return factory


def _name(factory: object) -> str:
    """A factory's name for documents and folders; those of dpaudit.under_test by the function that made them."""
    value = factory if hasattr(factory, "__qualname__") else type(factory)
    if str(getattr(value, "__module__", "")).startswith("trainers.adapters.under_test"):
        return f"dpaudit.under_test:{value.__qualname__.partition('.')[0]}"
    text = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', 'factory')}"
    return re.sub(r"[^A-Za-z0-9_.:]+", "", text.replace("<locals>.", ""))


def _claimed(stated: Mapping[str, float | None]) -> dict[str, float | None]:
    """epsilon and delta, validated; delta alone means nothing."""
    from dpaudit import validate

    epsilon, delta = stated["epsilon"], stated["delta"]
    if epsilon is None and delta is not None:
        raise rejected("delta", delta, "delta only beside epsilon")
    if epsilon is not None:
        validate.real("epsilon", epsilon, low=0.0, high=1e6, open_low=True)
    if delta is not None:
        validate.real("delta", delta, low=0.0, high=1.0, open_low=True, open_high=True)
    return {"epsilon": epsilon, "delta": delta}


def _reporter(name: str, progress: bool) -> "Reporter":
    from trainers.progress import Live, Silent

    return Live(name, UNLIT.get(name, "step")) if progress else Silent()


def _quiet(_: str) -> None:
    return None
