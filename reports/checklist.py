"""What an evaluator of a differential privacy guarantee asks, answered from the documents or "not stated".

The questions follow NIST SP 800-226, *Guidelines for Evaluating Differential Privacy Guarantees* (March 2025,
doi:10.6028/NIST.SP.800-226), from the top of its pyramid downwards: the guarantee itself, the algorithms behind it,
utility and bias, then deployment. The wording is ours. An answer is taken from a field or follows from one; where no
field says anything the line stays "not stated": an empty line is information for a reader too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dpaudit.documents import Stage
from reports.inputs import RunReport
from reports.text import clean, number, percent, plural

Status = Literal["stated", "measured", "refuted", "not covered", "not stated"]
MISSING: tuple[Status, str] = ("not stated", "")


@dataclass(frozen=True)
class Answer:
    """One answer and the runs (letters) that share it."""

    keys: tuple[str, ...]
    status: Status
    text: str


@dataclass(frozen=True)
class Line:
    """One question with its answers: one where all runs agree."""

    group: str
    question: str
    answers: tuple[Answer, ...]


def checklist(runs: Sequence[RunReport]) -> tuple[Line, ...]:
    """All lines for these runs."""
    lines = []
    for group, question, answer in QUESTIONS:
        said: dict[tuple[Status, str], list[str]] = {}
        for run in runs:
            said.setdefault(answer(run), []).append(run.key)
        lines.append(Line(group, question, tuple(Answer(tuple(k), status, text) for (status, text), k in said.items())))
    return tuple(lines)


def answers(run: RunReport) -> dict[str, tuple[Status, str]]:
    """Question -> answer of one run."""
    return {question: answer(run) for _, question, answer in QUESTIONS}


def _parameters(run: RunReport) -> tuple[Status, str]:
    if run.claim is None:
        return ("stated", "no claim is made") if run.claim_document is not None else MISSING
    return "stated", f"eps = {number(run.claim.epsilon)} at delta = {number(run.claim.delta)}, approximate DP"


def _lower_bound(run: RunReport) -> tuple[Status, str]:
    test = run.headline
    if run.audit is None:
        return "not stated", "not audited"
    if test is None:
        return "not stated", "the audit computed no bound"
    status: Status = "refuted" if run.verdict in ("refuted", "invalid") else "measured"
    return status, f"eps ≥ {number(test.epsilon_lower)}, ceiling {number(test.ceiling)}; verdict: {run.verdict}"


def _curve(run: RunReport) -> tuple[Status, str]:
    if run.claim is None or not run.claim.curve:
        return MISSING
    points = ", ".join(f"{number(p.epsilon)} at {number(p.delta)}" for p in run.claim.curve[:6])
    return "stated", f"eps at other deltas: {points}"


def _unit(run: RunReport) -> tuple[Status, str]:
    return ("stated", clean(run.claim.unit, 160)) if run.claim is not None else MISSING


def _contribution(run: RunReport) -> tuple[Status, str]:
    unit = run.config.data.unit if run.config is not None else None
    if unit is not None:
        return "stated", f"everything with one value of column “{clean(unit, 60)}” is one unit, clipped together"
    return "not stated", "how many units one person may contribute" if run.claim is not None else ""


def _neighbours(run: RunReport) -> tuple[Status, str]:
    if run.claim is None:
        return MISSING
    kind = {"add-remove": "unbounded", "replace": "bounded", "zero-out": "a unit is replaced by an empty one"}
    return "stated", f"{run.claim.relation} ({kind[run.claim.relation]})"


def _mechanism(run: RunReport) -> tuple[Status, str]:
    claim = run.claim
    if claim is None or claim.noise_multiplier is None:
        return MISSING
    parts = [f"{claim.mechanism}, sigma = {number(claim.noise_multiplier, 4)}"]
    parts += [f"C = {number(claim.max_grad_norm)}"] if claim.max_grad_norm is not None else []
    parts += [f"{claim.sampling} sampling"] if claim.sampling is not None else []
    parts += [f"q = {number(claim.sample_rate, 4)}"] if claim.sample_rate is not None else []
    parts += [plural(claim.steps, "step")] if claim.steps is not None else []
    return "stated", ", ".join(parts)


def _proof(run: RunReport) -> tuple[Status, str]:
    if run.claim is None or run.claim.accountant is None:
        return MISSING
    checks = run.claim_document.cross_checks if run.claim_document is not None else ()
    others = [f"{clean(c.accountant, 60)}: {number(c.epsilon)}" for c in checks if c.epsilon is not None]
    beside = f"; cross-checks: {', '.join(others)}" if others else ""
    return "stated", f"computed by {clean(run.claim.accountant, 120)}{beside}"


def _implementation(run: RunReport) -> tuple[Status, str]:
    if run.audit is None or run.audit.contract is None:
        return "not stated", "the step contract was not run on this trainer"
    contract = run.audit.contract
    made = [check for check in contract.checks if check.status != "not applicable"]
    failed = [clean(check.name, 60) for check in made if check.status == "fail"]
    if failed:
        return "refuted", f"{len(failed)} of {len(made)} checks of the step contract failed: {', '.join(failed[:5])}"
    return "measured", f"step contract: {contract.verdict}, {plural(len(made), 'check')} made, none failed"


def _by_ledger(*stages: Stage) -> Callable[[RunReport], tuple[Status, str]]:
    def answer(run: RunReport) -> tuple[Status, str]:
        rows = [row for row in run.ledger if row.stage in stages]
        if not rows:
            return MISSING
        open_rows = any(row.status == "UNACCOUNTED" for row in rows)
        text = "; ".join(dict.fromkeys(f"{clean(row.path, 60)}: {row.status}" for row in rows))
        return "not covered" if open_rows else "stated", text

    return answer


def _composition(run: RunReport) -> tuple[Status, str]:
    spent = run.ledger_document.spent if run.ledger_document is not None else None
    if run.claim is None:
        return MISSING
    text = f"the claim covers one release: {clean(run.claim.release, 80)}"
    if spent is not None:
        text += f"; {spent.steps_started} of {spent.steps_planned} steps spent"
        text += f", eps = {number(spent.epsilon)}" if spent.epsilon is not None else ""
    return "stated", text


def _pretraining(run: RunReport) -> tuple[Status, str]:
    if run.config is None:
        return MISSING
    base = run.config.model.path
    name = "the compact reference model, made from public synthetic pictures" if base is None else clean(base, 80)
    return "not covered", f"base model: {name}; what it learned before is outside the claim"


def _utility(run: RunReport) -> tuple[Status, str]:
    if run.benchmark is None:
        return MISSING
    from reports.utility import headline

    parts = []
    for task, metrics in run.benchmark.tasks.items():
        metric = metrics.get(headline(task, run.benchmark))
        if metric is not None:
            span = (
                f" ({100 * metric.low:.1f} to {100 * metric.high:.1f})"
                if metric.low is not None and metric.high is not None
                else ""
            )
            parts.append(f"{clean(task, 40)}: {percent(metric.value)}{span}, n = {metric.n:,}")
    beside = " (one training; the sweep's table has the mean)" if run.cell_of is not None else ""
    return ("measured", "; ".join(parts) + beside) if parts else MISSING


def _statistical_bias(run: RunReport) -> tuple[Status, str]:
    from reports.utility import gaps

    found = gaps(run.benchmark)
    if not found:
        return MISSING
    widest = found[0]
    pair = f"{clean(widest.best, 40)} over {clean(widest.worst, 40)}"
    text = f"largest gap by {widest.grouping}: {100 * widest.value:.1f} points ({pair})"
    before = "" if widest.base is None else f"; base model {100 * widest.base:.1f} points between the same two"
    return "measured", text + before


def _trust(run: RunReport) -> tuple[Status, str]:
    if run.claim is None:
        return MISSING
    return "stated", "central: whoever trained saw the records; protection begins at what is released"


def _released(run: RunReport) -> tuple[Status, str]:
    if run.claim is None:
        return MISSING
    if run.claim_document is not None and not run.claim_document.releasable:
        return "not covered", "this run must not be released: " + clean(" ".join(run.claim_document.reasons), 200)
    return "stated", clean(run.claim.release, 120)


def _randomness(run: RunReport) -> tuple[Status, str]:
    if run.config is None or run.claim is None:
        return MISSING
    if run.config.seed is not None:
        return "not covered", "the noise key came from --seed, so the noise can be recomputed"
    return "stated", "noise key from the operating system, kept in the private part"


def _side_channels(run: RunReport) -> tuple[Status, str]:
    return ("not covered", "floating-point artefacts of the noise, timing and memory") if run.claim else MISSING


def _never(run: RunReport) -> tuple[Status, str]:
    return MISSING


def _access(run: RunReport) -> tuple[Status, str]:
    if run.source != "run":
        return MISSING
    return (
        "stated",
        "keys, coins, scores and curves stay in private/ (owner only); who can read the machine: not stated",
    )


GUARANTEE, ALGORITHMS, UTILITY, DEPLOYMENT = "The guarantee", "Algorithms", "Utility and bias", "Deployment"
QUESTIONS: tuple[tuple[str, str, Callable[[RunReport], tuple[Status, str]]], ...] = (
    (GUARANTEE, "Privacy parameters", _parameters),
    (GUARANTEE, "Evidence beside the claim", _lower_bound),
    (GUARANTEE, "Whole privacy curve", _curve),
    (GUARANTEE, "Unit of privacy", _unit),
    (GUARANTEE, "Bound on one person's contribution", _contribution),
    (GUARANTEE, "Neighbouring data sets", _neighbours),
    (ALGORITHMS, "Mechanism and its parameters", _mechanism),
    (ALGORITHMS, "Proof and accountant", _proof),
    (ALGORITHMS, "Correctness of the implementation", _implementation),
    (ALGORITHMS, "Composition over releases", _composition),
    (ALGORITHMS, "Choice of hyper-parameters", _by_ledger("tuning")),
    (
        ALGORITHMS,
        "Preprocessing of private records",
        _by_ledger("token reduction", "fusion noise", "released tokens", "preprocessing"),
    ),
    (ALGORITHMS, "Size of the data set and limits on it", _by_ledger("data size")),
    (ALGORITHMS, "Public data and pre-training", _pretraining),
    (UTILITY, "Accuracy", _utility),
    (UTILITY, "Statistical bias: accuracy of subgroups", _statistical_bias),
    (UTILITY, "Systemic and human bias", _never),
    (DEPLOYMENT, "Trust model", _trust),
    (DEPLOYMENT, "What is released, to whom", _released),
    (DEPLOYMENT, "Source of randomness", _randomness),
    (DEPLOYMENT, "Side channels", _side_channels),
    (DEPLOYMENT, "Security and access control", _access),
    (DEPLOYMENT, "Exposure while data is collected", _never),
)
