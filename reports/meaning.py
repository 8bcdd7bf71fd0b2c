"""What claim and evidence mean for one unit: advantage and TPR at small FPR, as the claim allows and attacks reached.

After Kulynych et al. 2024 (arXiv 2407.02191): an attacker's rates say what an eps means, and follow from the mechanism.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpaudit import accounting
from dpaudit.documents import ScoreSummary
from reports import allowed
from reports.games import ON, game_of, score_summaries
from reports.inputs import RunReport
from reports.text import clean, number, percent


@dataclass(frozen=True)
class Reading:
    """One line of the table, as text: who says it, advantage, and TPR by false positive rate (allowed.FPRS)."""

    source: str
    advantage: str
    tpr: tuple[str, ...]


@dataclass(frozen=True)
class Meaning:
    """The lines of one run, and what the claim's say in a sentence."""

    run: RunReport
    sentence: str
    readings: tuple[Reading, ...]


def meanings(runs: Sequence[RunReport]) -> tuple[Meaning, ...]:
    """Of all runs that have a claim or scores."""
    found = (_meaning(run) for run in runs)
    return tuple(item for item in found if item.readings)


def _meaning(run: RunReport) -> Meaning:
    readings, sentence, claim = [], "", run.claim
    if claim is not None:
        rates = allowed.claimed_rates(claim)
        event = allowed.event_of(claim)
        by = "its mechanism" if event is not None else "eps and delta alone"
        readings.append(_reading(f"The claim allows at most (by {by})", rates, "≤ "))
        if event is not None:
            alone = accounting.stated_largest_tpr(claim.epsilon, claim.delta, allowed.FPRS)
            guess = 2 * allowed.stated_guess(claim.epsilon, claim.delta) - 1
            stated = allowed.Rates(guess, dict(zip(allowed.FPRS, (float(rate) for rate in alone), strict=True)))
            readings.append(_reading("The same from eps and delta alone", stated, "≤ "))
        readings += _shown(run)
        first, short = rates.tpr[allowed.FPRS[0]], clean(allowed.unit_of(claim), 60)
        sentence = (
            f"While the claim holds, an attacker who wrongly accuses 1 of 100 {short}s that were not in training finds "
            f"at most {number(100 * first, 2)} of 100 that were; without any privacy it could be all 100."
        )
    abouts: dict[str, ScoreSummary] = {}
    for summary, game in score_summaries(run):
        abouts.setdefault(ON[game.about] if game is not None else "the scores", summary)
    readings += [_measured(about, abouts[about]) for about in sorted(abouts, reverse=True)]  # the weights, then a twin
    return Meaning(run, sentence, tuple(readings))


def _shown(run: RunReport) -> list[Reading]:
    """What the best bound within the claimed mechanism leaves, by q and T of what was attacked: a twin has its own."""
    within = run.within_mechanism
    game = game_of(run, within) if within is not None else None
    claim = game.claim if game is not None else run.claim
    event = allowed.shown_event(claim, within)
    if event is None or claim is None:
        return []
    twin = "; a retrained twin" if game is not None and game.about == "procedure" else ""
    sigma = f"sigma ≤ {number(event.noise_multiplier, 4)}, claimed {number(claim.noise_multiplier, 4)}{twin}"
    what = f"The evidence shows at least, within the claimed mechanism ({sigma})"
    return [_reading(what, allowed.event_rates(event), "≥ ")]


def _reading(source: str, rates: allowed.Rates, sign: str) -> Reading:
    return Reading(source, sign + percent(rates.advantage), tuple(sign + percent(rates.tpr[f]) for f in allowed.FPRS))


def _measured(about: str, summary: ScoreSummary) -> Reading:
    """What an attack reached. Its advantage is the largest over thresholds of the same records: optimistic."""
    advantage = max((point.tpr - point.fpr for point in summary.roc), default=0.0)
    rates = []
    for rate in allowed.FPRS:
        point = summary.tpr_at_fpr.get(f"{rate:g}")
        if point is None:
            rates.append("too few records")
        elif point.tpr_low is None or point.tpr_high is None:
            rates.append(percent(point.tpr))
        else:
            rates.append(f"{percent(point.tpr)} ({100 * point.tpr_low:.1f} to {100 * point.tpr_high:.1f})")
    return Reading(f"An attack reached on {about} ({clean(summary.name, 80)})", percent(advantage), tuple(rates))
