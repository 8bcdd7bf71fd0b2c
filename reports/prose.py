"""Sentences generated from the documents: the claim, what it leaves open, what the audit could and couldn't see.

Every sentence states a field or follows from one by a formula named in the docstring; nothing is written by hand for
a particular run.
"""

import math
from collections.abc import Sequence

from dpaudit.documents import Claim, Test
from dpaudit.verdict import NO_CONTROL, POWER_NEEDED, marked, powerful
from reports import allowed
from reports.inputs import RunReport
from reports.subjects import SweepReport
from reports.text import clean, number, percent, plural

GROUPS = (2, 3, 5)  # units of one person whose cost is stated
USELESS = 0.1  # a guarantee at such a delta is none
LIMIT = "An audit can refute a claim; it can never prove privacy."

_RELATION = {
    "add-remove": "adding or removing one {unit}",
    "zero-out": "replacing one {unit} by an empty one",
    "replace": "replacing one {unit} by any other",
}
_SAMPLING = {
    "poisson": "Each step draws every {unit} independently (Poisson sampling)",
    "fixed": "Each step draws a batch of fixed size",
    "shuffle": "Batches come from a shuffled order",
    "full": "Each step uses all of the data",
    "allocation": "Each {unit} draws for itself the steps of an epoch that hold it (random allocation)",
}
VERDICT_MEANING = {
    "invalid": "The test itself is unsound, so none of its numbers counts.",
    "refuted": "The evidence contradicts the claim.",
    "unsupported": "The training does not do what the claim's proof assumes.",
    "inconclusive": "This audit could not reliably have caught a wrong claim. Treat the claim as untested.",
    "not refuted": "No contradiction found by a test that could have found the stated wrong claim. Not a proof.",
    "no claim": "No privacy is promised; the audit shows what leaks without it.",
}


def claim_paragraphs(run: RunReport) -> list[str]:
    """The claim of a run in plain sentences."""
    claim = run.claim
    if claim is None:
        reasons = run.claim_document.reasons if run.claim_document is not None else ()
        first = "This run makes no privacy claim."
        if run.claim_document is None and run.audit is None:
            first = "There is no claim.json in this run: no privacy claim is stated."
        return [" ".join([first, *(_sentence(reason) for reason in reasons)])]
    unit = clean(claim.unit, 120)
    relation = _RELATION[claim.relation].format(unit=unit)
    paragraphs = [
        f"The owner claims differential privacy with eps = {number(claim.epsilon)} at delta = {number(claim.delta)}. "
        f"The protected unit is one {unit}; data sets are neighbours by {relation} ({claim.relation}).",
        _meaning(claim, unit),
        _mechanism(claim, unit),
    ]
    if run.claim_document is not None and not run.claim_document.releasable:
        reasons_text = " ".join(_sentence(reason) for reason in run.claim_document.reasons)
        paragraphs.append(f"This run must not be released. {reasons_text}".strip())
    return [paragraph for paragraph in paragraphs if paragraph]


def _sentence(text: str) -> str:
    """A reason from a document as a sentence."""
    shown = clean(text, 400)
    shown = shown[:1].upper() + shown[1:]
    return shown if shown.endswith((".", "!", "?")) or not shown else f"{shown}."


def _meaning(claim: Claim, unit: str) -> str:
    if math.isinf(claim.epsilon):
        return "An infinite eps promises nothing."
    factor = math.exp(min(claim.epsilon, 700.0))
    return (
        f"In words: whether or not one {unit} took part changes the probability of any outcome by a factor of at most "
        f"e^eps = {number(factor)}, apart from {number(claim.delta)}. Someone who must guess from the release whether "
        f"it took part is right at most {percent(allowed.best_guess(claim))} of the time{_guess_source(claim)}; a coin "
        "flip is right 50 % of the time."
    )


def _guess_source(claim: Claim) -> str:
    return " (by eps and delta alone)" if allowed.event_of(claim) is None else " (by the claimed mechanism)"


def group_sentence(claim: Claim) -> str:
    """What several units of one person cost, from the mechanism where it is stated (dpaudit.accounting.groups)."""
    unit = clean(claim.unit, 120)
    first = f"Anyone who contributes more than one {unit} is protected less, by more than k × eps for k of them"
    if math.isinf(claim.epsilon):
        return f"Anyone who contributes more than one {unit}: nothing is promised."
    losses = allowed.group_losses(claim, GROUPS)
    parts = []
    for k, loss in losses.items():
        if loss.delta >= USELESS:
            parts.append(f"nothing useful is known for {k}")
        elif loss.delta > claim.delta:
            parts.append(f"{k} cost eps up to {number(loss.epsilon)}, at delta = {number(loss.delta)} only")
        else:
            parts.append(f"{k} cost eps up to {number(loss.epsilon)}")
    by = "by the group lemma" if any(loss.rule == "group lemma" for loss in losses.values()) else "by the mechanism"
    return f"{first}. At delta = {number(claim.delta)}, {by}: {'; '.join(parts)}."


def _rate(claim: Claim) -> str:
    if claim.sample_rate is None:
        return ""
    if claim.sampling == "allocation" and claim.epoch_steps is not None:
        return f", {number(claim.sample_rate * claim.epoch_steps, 4)} of {claim.epoch_steps:,}"
    return f" with probability q = {number(claim.sample_rate, 4)}"


def _mechanism(claim: Claim, unit: str) -> str:
    parts = []
    if claim.sampling is not None:
        drawn = _SAMPLING[claim.sampling].format(unit=unit)
        parts.append(f"{drawn}{_rate(claim)}.")
    if claim.max_grad_norm is not None:
        parts.append(f"Its gradient is clipped to norm C = {number(claim.max_grad_norm)}.")
    if claim.noise_multiplier is not None:
        parts.append(
            f"The sum receives {claim.mechanism} noise of standard deviation sigma × C with sigma = "
            f"{number(claim.noise_multiplier, 4)}."
        )
    if claim.steps is not None:
        parts.append(f"There are {plural(claim.steps, 'step')}.")
    if claim.candidates is not None:
        parts.append(f"q and the batch size follow from {claim.candidates:,} candidate records, canaries included.")
    if claim.accountant is not None:
        parts.append(f"eps was computed by {clean(claim.accountant, 120)}.")
    parts.append(f"Released: {clean(claim.release, 120)}.")
    return " ".join(parts)


def not_covered(run: RunReport) -> list[str]:
    """What the claim leaves open even if it holds."""
    claim = run.claim
    if claim is None:
        return []
    items = [
        group_sentence(claim),
        f"Anything beyond “{clean(claim.release, 120)}”: intermediate checkpoints, gradients, fused tokens, exact "
        "training curves and logs.",
        "What the base model learned before this fine-tuning, and the accuracy figures below: they are computed on "
        "test questions without noise.",
        "Side channels: timing, memory, floating-point artefacts of the noise, and who can read the private folder.",
    ]
    if claim.relation != "replace":
        items.insert(1, _replacing(claim))
    if all(row.stage != "tuning" for row in run.ledger):
        items.insert(2, "The choice of hyper-parameters: the ledger has no row about it.")
    return items


def _replacing(claim: Claim) -> str:
    first = "Replacing one record by another"
    loss = allowed.replacement_loss(claim)
    if not math.isfinite(loss.epsilon) or loss.delta >= USELESS:
        return f"{first}: nothing useful is known."
    by = "by the group lemma" if loss.rule == "group lemma" else "by the mechanism"
    return f"{first}: eps up to {number(loss.epsilon)} at delta = {number(loss.delta)}, {by}."


def ceiling_note(test: Test, claim: Claim | None) -> str | None:
    """What a reader must know about a bound and its ceiling; None when there is nothing to add."""
    if test.epsilon_lower is None or test.ceiling is None:
        return None
    if math.isfinite(test.ceiling) and test.epsilon_lower >= test.ceiling - 1e-6 * max(1.0, test.ceiling):
        return "Every guess was right; the leak may exceed what this test measures: more canaries needed."
    if claim is not None and test.ceiling < claim.epsilon:
        return f"This test cannot measure above {number(test.ceiling)}, so it cannot check {number(claim.epsilon)}."
    return None


def looked_for(run: RunReport) -> list[tuple[str, str | None, Sequence[Test]]]:
    """(prefix, wrong claim, tests) of each game; of a bare document all tests together."""
    if run.audit is None:
        return []
    if not run.games:
        return [("", run.audit.alternative, run.audit.tests)]
    return [(f"{game.name}, ", game.alternative, marked(game.tests, run.audit.alpha)) for game in run.games]


def power(run: RunReport) -> list[str]:
    """What the audit could have detected: its power against the stored alternative, and its ceiling."""
    if run.audit is None:
        return []
    items = []
    for name, alternative, tests in looked_for(run):
        said = clean(alternative, 160) if alternative is not None else "not stated"
        for test in tests:
            if test.power is None:
                continue
            low = f" (at least {percent(test.power_low, 0)})" if test.power_low is not None else ""
            items.append(
                f"{name}{clean(test.name, 80)}: had the wrong claim been true ({said}), this game would have refuted "
                f"it with probability {percent(test.power, 0)}{low}, earned by {clean(test.control or NO_CONTROL, 200)}"
                + ("." if powerful(test) else f"; a verdict of “not refuted” needs {percent(POWER_NEEDED, 0)}.")
            )
    if run.claim is not None and not items:
        items.append("No test of this audit has earned power, so a wrong claim may have gone unnoticed.")
    best = run.headline
    if best is not None and best.ceiling is not None:
        items.append(
            f"With every guess right, the headline bound would have been eps ≥ {number(best.ceiling)}: no larger leak "
            "could have shown in it."
        )
    return items


def sweep_limits(sweeps: Sequence[SweepReport]) -> list[str]:
    """What a sweep's table does not say."""
    items = []
    for sweep in sweeps:
        items.append(
            f"Sweep {sweep.name}: the best of {len(sweep.lines)} lines looks better than it is, since it was chosen by "
            "the numbers that describe it. Choosing by accuracy on private data also costs privacy (see the ledger)."
        )
        single = [line.key for line in sweep.lines if line.row.method is not None and len(line.row.seeds) == 1]
        if single:
            items.append(
                f"Trained once only, so their intervals say nothing about luck in training: {', '.join(single)}."
            )
        broken = sum(cell.state == "failed" for cell in sweep.document.cells)
        if broken:
            items.append(f"{plural(broken, 'cell')} of the sweep failed and is missing from its line.")
    return items


def limits(runs: Sequence[RunReport]) -> list[str]:
    """The limits of what this page shows, first the general ones, then those of these runs."""
    items = [
        "A bound counts what these attacks found. A better attack may find more.",
        "Canaries are records chosen to be found. They say how much the training procedure can leak, not how much "
        "it leaked about one real person.",
        "The audit trusts the machine that ran it: coins, scores and code were not witnessed by anyone else.",
        "Each lower bound holds with the stated confidence: at 95 %, up to one audit in twenty overstates the leak.",
    ]
    for run in runs:
        test = run.headline
        if test is not None and run.claim is not None and test.ceiling is not None and test.ceiling < run.claim.epsilon:
            items.append(
                f"Run {run.key}: the claim is eps = {number(run.claim.epsilon)}, but this game could not have shown "
                f"more than {number(test.ceiling)}, even with every guess right. By its bound alone it could not "
                "refute the claim."
            )
        if run.audit is None and run.cell_of is None:
            items.append(f"Run {run.key} has not been audited: nothing here supports or contradicts its claim.")
        if run.source == "scores":
            items.append(
                f"{run.key} is a file of scores from elsewhere: that its coins were fair, independent and drawn before "
                "training is its owner's word."
            )
        twins = [] if run.audit is None else [entry.game for entry in run.audit.games if entry.about == "procedure"]
        if twins:
            games = ", ".join(dict.fromkeys(twins))
            items.append(
                f"Run {run.key}: {games}: played on a retrained twin, so it says nothing about the released weights."
            )
    unmeasured = [run.key for run in runs if run.benchmark is None and run.source == "run"]
    if unmeasured:
        items.append(f"No accuracy was measured for run {', '.join(unmeasured)}.")
    return items
