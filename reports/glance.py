"""What the first screen says of each run: claim, evidence, what was tested, accuracy, conclusion, and what to do next.

Every sentence is a field of the documents or follows from one; verdict, power and bounds are dpaudit.verdict's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpaudit import verdict
from dpaudit.documents import Claim, Test
from reports import allowed, games, prose, utility
from reports.evidence import Row, axis, guess_bar, scale_top
from reports.inputs import RunReport
from reports.text import clean, number, percent, plural


@dataclass(frozen=True)
class Glance:
    """One run in a few lines. Lists of sentences hold one idea each; `todo`: (command, why), or None."""

    run: RunReport
    lead: str
    protects: tuple[str, ...]
    strength: tuple[str, ...]
    guess: Markup
    drawing: Markup
    tested: tuple[str, ...]
    by: str
    accuracy: tuple[str, ...]
    conclude: tuple[str, ...]
    todo: tuple[str, str] | None
    ask: tuple[str, ...]


def glances(runs: Sequence[RunReport], table: utility.TaskTable | None) -> tuple[Glance, ...]:
    """Of all runs, in their order; the drawings share one scale."""
    rows = {run.key: evidence_rows(run) for run in runs}
    shown = [row for found in rows.values() for row in found]
    top = scale_top([value for row in shown for value in (row.value, row.reach) if value is not None])
    return tuple(_glance(run, rows[run.key], top, utility.utility(run, runs, table)) for run in runs)


def _glance(run: RunReport, rows: Sequence[Row], top: float, measured: utility.Utility | None) -> Glance:
    claim, share = run.claim, None
    if claim is not None:
        share = allowed.best_guess(claim)
    return Glance(
        run=run,
        lead=prose.VERDICT_MEANING[run.verdict]
        if run.verdict is not None
        else "Not audited: nothing supports or contradicts this.",
        protects=_protects(run),
        strength=_strength(claim, share),
        guess=guess_bar(share) if share is not None else Markup(""),
        drawing=axis(rows, top, key=f"axis-{run.key.lower()}"),
        tested=tested(run),
        by=_played_by(run),
        accuracy=_accuracy(measured),
        conclude=_conclude(run),
        todo=games.next_step(run),
        ask=questions(run),
    )


def _protects(run: RunReport) -> tuple[str, ...]:
    claim = run.claim
    if claim is None:
        return ("Nobody: this run makes no privacy claim.",)
    unit = clean(claim.unit, 120)
    if claim.epsilon == float("inf"):
        return (f"Nobody: an infinite eps promises nothing about one {unit}.",)
    if allowed.is_person(claim):
        return (f"Each {unit}, with everything that person contributed.",)
    short = clean(allowed.unit_of(claim), 60)
    loss = allowed.group_losses(claim, (2,))[2]
    cost = f"eps up to {number(loss.epsilon)}"
    if loss.delta > claim.delta:
        useless = loss.delta >= prose.USELESS
        cost = "nothing useful is known" if useless else f"{cost} at delta {number(loss.delta)}"
    return (f"Each {short}, not each person (or patient).", f"Two {short}s of one person: {cost}.")


def _strength(claim: Claim | None, share: float | None) -> tuple[str, ...]:
    if claim is None or share is None:
        return ()
    times = min(100, _rounded_up(100 * share))
    short = clean(allowed.unit_of(claim), 60)
    said = f"A guess “was this {short} in training?” is right at most {times} times in 100; a coin: 50."
    return said, tier(claim.epsilon)


def _rounded_up(value: float) -> int:
    """An upper bound stays one; a value within rounding of a whole number is that number."""
    return int(-(-(value - 1e-9) // 1))


def tier(epsilon: float) -> str:
    """The scale of Ponomareva et al. 2023 (How to DP-fy ML, arXiv 2303.00654, section 5.2)."""
    word = "Strong" if epsilon <= 1 else "Moderate" if epsilon <= 10 else "Weak"
    return f"{word} (eps ≤ 1 is strong, > 10 weak: Ponomareva et al. 2023)."


def evidence_rows(run: RunReport) -> tuple[Row, ...]:
    """The rows of the drawing: the claim, the best bounds that assume nothing (weights and twin), and the one within
    the claimed mechanism."""
    rows = []
    if run.claim is not None:
        rows.append(Row("claim", "Claim: at most", run.claim.epsilon, None))
    for about, test in headlines(run).items():
        where = "Released weights" if about == "weights" else "Retrained twin"
        rows.append(Row("found", f"{where}, no assumption", float(test.epsilon_lower or 0.0), test.ceiling))
    within = run.within_mechanism
    if within is not None and within is not run.headline:
        place = games.game_of(run, within)
        where = " (twin)" if place is not None and place.about == "procedure" else ""
        text = f"Within claimed mechanism{where}"
        rows.append(Row("within", text, float(within.epsilon_lower or 0.0), within.ceiling))
    return tuple(rows)


def headlines(run: RunReport) -> dict[str, Test]:
    """The best bound that assumes nothing of each thing that was attacked: weights first, then the procedure."""
    if run.audit is None:
        return {}
    if not run.games:
        about = run.audit.run.about if run.audit.run is not None else "weights"
        return {} if run.headline is None else {about: run.headline}
    found: dict[str, Test] = {}
    for about in ("weights", "procedure"):
        theirs = [
            test for game in run.games if game.about == about for test in verdict.marked(game.tests, run.audit.alpha)
        ]
        best = verdict.headline(run.audit.model_copy(update={"tests": tuple(theirs)}))
        if best is not None:
            found[about] = best
    return found


def tested(run: RunReport) -> tuple[str, ...]:
    """What was attacked, how often, and with which power and control: one sentence for each kind of game."""
    if run.audit is None:
        return ("Nothing.",)
    kinds: dict[tuple[str, str], list[games.GameRow]] = {}
    for row in games.game_rows(run):
        kinds.setdefault((row.entry.about, row.entry.game), []).append(row)
    lines = [_sentence(about, game, rows, run) for (about, game), rows in kinds.items()]
    if not kinds:
        tests = [test for test in run.audit.tests if test.power is not None]
        power = f"power {percent(max(test.power or 0.0 for test in tests), 0)}" if tests else "no power earned"
        lines.append(f"{plural(len(run.audit.tests), 'test')} of scores; {power}.")
    checks = run.audit.contract
    lines += [f"Step contract on the training code: {checks.verdict}."] if checks is not None else []
    return tuple(lines)


def _sentence(about: str, game: str, rows: Sequence[games.GameRow], run: RunReport) -> str:
    times = "" if len(rows) == 1 else f", {len(rows)} times"
    best = max(rows, key=lambda row: row.entry.power or 0.0)
    whose = {"weights": " (this model)", "procedure": " (the same training, run again by this audit)"}
    where = games.ON[about] + (" (supplied, not trained by this audit)" if best.entry.supplied else whose[about])
    first = f"{where[0].upper()}{where[1:]}, {game} game{times}"
    if run.claim is None:
        return f"{first}."
    if best.entry.power is None:
        return f"{first}: could not have shown a wrong claim (no control earned it any power)."
    wrong = clean((best.entry.alternative or "the stated wrong claim").partition(" (")[0], 120)
    sure = percent(best.entry.power, 0) if best.entry.power < 0.995 else "over 99 %"
    return f"{first}: {sure} sure to refute if {wrong} (control: {', '.join(best.earned_by) or 'not stated'})."


def _played_by(run: RunReport) -> str:
    """Which program tested, and who says so."""
    if run.audit is None:
        return "nobody."
    how = "dpaudit, on scores from elsewhere" if run.source == "scores" else "dpaudit"
    said = clean(run.vouched.said, 160)
    return f"{how}. {said[:1].upper()}{said[1:]}."


def _accuracy(measured: utility.Utility | None) -> tuple[str, ...]:
    if measured is None:
        return ("Not measured.",)
    metric = measured.metric
    said = percent(metric.value)
    if metric.low is not None and metric.high is not None:
        said += f" ({100 * metric.low:.1f} to {100 * metric.high:.1f})"
    parts = []
    if measured.to_non_private is not None:
        parts.append(f"without privacy {percent(metric.value - measured.to_non_private)}")
    if measured.over_base is not None:
        parts.append(f"untrained {percent(metric.value - measured.over_base)}")
    if measured.kept is not None:
        parts.append(f"keeps {percent(measured.kept, 0)} of the gain")
    return (said, *parts)


def _conclude(run: RunReport) -> tuple[str, ...]:
    """What a reader may conclude, by verdict."""
    claim = run.claim
    if run.verdict == "not refuted":
        powered = {entry.about for entry in run.audit.games if entry.power is not None} if run.audit else set()
        items = ["As far as this test can tell, training adds the noise that is claimed."]
        if powered == {"procedure"}:
            items.append("Not shown: that the released weights leak no more than eps.")
        return tuple(items)
    if run.verdict == "refuted":
        alpha = run.audit.alpha if run.audit is not None else 0.001
        return (
            f"Do not rely on eps = {number(claim.epsilon if claim else None)}. A correct claim is refuted like this "
            f"in at most {number(alpha * 1000)} of 1,000 audits.",
        )
    if run.verdict == "unsupported":
        return ("Do not rely on the claim until what is named below is fixed or explained.",)
    if run.verdict == "invalid":
        return ("Nothing, for or against the claim, until the test is repaired.",)
    if run.verdict == "no claim":
        best = run.headline
        if best is not None and (best.epsilon_lower or 0.0) > 0:
            end = ""
            if best.ceiling is not None and best.epsilon_lower is not None and best.epsilon_lower > 0.98 * best.ceiling:
                end = ", the most that this test could show; it may be far larger"
            return (f"This training leaks: any true eps is at least {number(best.epsilon_lower)}{end}.",)
        return ("Nothing is promised. That an attack found nothing is no protection.",)
    return ("Nothing for or against the claim: it rests on the owner's word.",)


def questions(run: RunReport) -> tuple[str, ...]:
    """What the documents leave open and only the owner can say."""
    claim = run.claim
    if claim is None:
        return ()
    items = []
    if not allowed.is_person(claim):
        items.append(f"{clean(allowed.unit_of(claim), 60)}s per person?")
    if all(row.stage != "tuning" for row in run.ledger):
        items.append("settings tuned on private data?")
    if run.audit is None or run.audit.contract is None:
        items.append("code checked?")
    return tuple(items)
