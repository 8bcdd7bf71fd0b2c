"""The sampler against the claimed rate and scheme: marginals, spread, repeats."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import binom

from attacks.contract import allocation
from attacks.contract import statistics as stats
from attacks.contract.allocation import Found
from attacks.contract.bench import Bench
from attacks.contract.draws import LEAST_DRAWS, PLAYED, Drawn, draw, window_of
from attacks.contract.guard import MethodFailure
from attacks.contract.probe import Records
from attacks.contract.result import judged, skipped
from dpaudit.documents import Check

MARGINALS = "sampling rate of each unit"
MARGINALS_WHY = (
    "Amplification holds for the claimed rate q only. A unit drawn more often (weighted sampler, 1 / len(loader) with "
    "a dropped last batch, losses that steer sampling) has less privacy than accounted."
)
SPREAD = "spread of batch sizes"
SPREAD_WHY = (
    "Poisson batches vary in size with variance n q (1 - q), and allocated ones do at each step of an epoch. Constant "
    "sizes mean fixed-size or shuffled batches, a larger spread means units drawn together; the eps of independent "
    "units holds for neither (off by up to 10x, NDSS 2026)."
)
EPOCH = "repeats within an epoch"
EPOCH_WHY = (
    "Under independent draws a unit often comes twice within 1/q draws, under shuffling never. A shuffled loader "
    "accounted as Poisson understates eps (Chua et al. 2024). Under allocation a unit is in k steps of every epoch, "
    "whatever others do."
)
TWICE = "repeats within a batch"
TWICE_WHY = "A batch is a set of units; a repeated index (sampling with replacement) counts one person twice."

ALTERNATED = 400  # as many where a step takes a moment; those draws are then judged by themselves as well
ALPHA = stats.ALPHA / 2  # each of the three times may look at two sets of draws
MOST_PAIRED = 500  # units all of whose pairs are looked at

Named = tuple[str, Drawn]


def checks(bench: Bench) -> Iterator[Check]:
    """All checks of this module: each on the draws of a fresh trainer, of one that trains, and of one in production."""
    named = ((TWICE, TWICE_WHY), (MARGINALS, MARGINALS_WHY), (SPREAD, SPREAD_WHY), (EPOCH, EPOCH_WHY))
    if bench.draws is None:
        yield from (skipped(name, bench.probe.lacking["sample"], why) for name, why in named)
        return
    quick = bench.training.quick_batches
    playing, empties = ALTERNATED if quick else PLAYED, bench.empty_problem is None
    trained = draw(bench.probe, playing=playing, empties=empties)
    drawn = (
        ("fresh", bench.draws),
        (f"after {trained.played} steps", trained),
        ("without a noise seed", draw(bench.probe, playing=playing if quick else 0, empties=empties, noise=None)),
    )
    twice = [f"{when} {found.twice} of {len(found.drawn)}" for when, found in drawn]
    fine = all(found.twice == 0 for _, found in drawn)
    yield judged(TWICE, fine, f"batches that name a unit twice: {', '.join(twice)}", "none", TWICE_WHY)
    sets = [(drawn[0][0], drawn[0][1].drawn)]
    for when, found in drawn[1:]:
        sets += _alternating(bench, when, found.drawn, found.played) if quick else [(when, found.drawn)]
    allocated = bench.probe.claim.sampling == "allocation"
    for check in _allocated if allocated else (marginals, spread, epochs):
        others = _of_half(bench) if check in (marginals, _allocated_marginals) else []
        yield _worse(bench, check, [*sets, *others])


def _alternating(bench: Bench, when: str, drawn: Drawn, playing: int) -> list[Named]:
    """The draws that were each stepped on before the next, by themselves, and those that came later, from the beginning
    of an epoch on."""
    window = window_of(bench.probe.claim)
    rest = drawn[math.ceil(playing / window) * window :]
    while_training = "while it trains" + (", without a noise seed" if "seed" in when else "")
    return [(while_training, drawn[:playing]), *([(when, rest)] if len(rest) >= LEAST_DRAWS else [])]


def _of_half(bench: Bench) -> list[Named]:
    """Draws over half of the records, where their number is private: the rate must be the same."""
    probe = bench.probe
    if probe.public_size or probe.claim.sampling not in ("poisson", "allocation"):
        return []
    half = Records("half", probe.own.items[: max(3, len(probe.own.items) // 2)])
    try:
        return [("with half of the records", draw(probe, records=half, cheap=False).drawn)]
    except MethodFailure:  # no neighbour; a trainer may refuse so small a data set
        return []


def _worse(bench: Bench, check: Callable[[Bench, Drawn], Check], drawn: list[Named]) -> Check:
    """The one that fails, if any; otherwise the fresh draws', with all named."""
    made = [(when, check(bench, found)) for when, found in drawn]
    when, worst = next(((when, item) for when, item in made if item.status == "fail"), made[0])
    said = f"{when}: {worst.measured}"
    if worst.status == "pass":
        said += "".join(f"; {when}: {item.measured}" for when, item in made[1:])
    return worst.model_copy(update={"measured": said if worst.status != "not applicable" else worst.measured})


def marginals(bench: Bench, drawn: Drawn) -> Check:
    """Each unit's number of inclusions is Binomial(draws, q), exactly, for Poisson and fixed-size batches."""
    claim = bench.probe.claim
    counts, draws, rate = drawn.sum(axis=0), len(drawn), claim.sample_rate
    if claim.sampling == "full":
        missing = int((~drawn).sum())
        return judged(MARGINALS, missing == 0, f"{missing} absences", "every unit in every batch", MARGINALS_WHY)
    if claim.sampling == "shuffle":
        # Per epoch at most once; that is what the accounting of shuffled batches rests on.
        most = math.ceil(draws / window_of(claim)) + 1
        fine = int(counts.max()) <= most
        return judged(MARGINALS, fine, f"at most {int(counts.max())} times in {draws} draws", f"{most}", MARGINALS_WHY)
    rates = rate if claim.sampling == "poisson" else float(drawn.sum(axis=1).mean()) / drawn.shape[1]
    if claim.sampling == "fixed" and abs(rates - rate) > 0.5 / drawn.shape[1]:
        measured = f"batches hold {rates:.4g} of the units"
        return judged(MARGINALS, False, measured, f"q = {rate:.4g}", MARGINALS_WHY)
    p_each = [stats.count_p(int(count), draws, rates) for count in counts]
    p_all = stats.count_p(int(counts.sum()), draws * counts.size, rates) if claim.sampling == "poisson" else 1.0
    p = min(1.0, 2 * min(min(p_each) * counts.size, p_all))
    unit = int(np.argmin(p_each))
    measured = (
        f"mean rate {counts.mean() / draws:.4g}, most unusual unit {unit} at {counts[unit] / draws:.4g} "
        f"({draws} draws, p = {p:.2g})"
    )
    return judged(MARGINALS, p > ALPHA, measured, f"q = {rate:.4g}, p above {ALPHA:g}", MARGINALS_WHY)


def spread(bench: Bench, drawn: Drawn) -> Check:
    """Sum of squared deviations of the batch sizes (exact Chernoff bound), the largest and the smallest for Poisson;
    constant for fixed size; how often two units come together in both."""
    claim = bench.probe.claim
    sizes, count = drawn.sum(axis=1).astype(np.float64), drawn.shape[1]
    measured = f"variance {sizes.var():.3g} over {len(sizes)} draws"
    if claim.sampling in ("fixed", "full"):
        fine, allowed = float(sizes.var()) == 0, "0: the claim says batches of one size"
        if fine and claim.sampling == "fixed" and count > 1:
            p, seen = together(bench, drawn, float(sizes[0] * (sizes[0] - 1) / (count * (count - 1))))
            fine, measured, allowed = p > ALPHA, f"{measured}; {seen}", f"{allowed}; p above {ALPHA:g}"
        return judged(SPREAD, fine, measured, allowed, SPREAD_WHY)
    if claim.sampling == "shuffle":
        return skipped(SPREAD, "shuffled batches by claim", SPREAD_WHY)
    extremes = stats.extremes_p(sizes, count, claim.sample_rate)
    pairs, seen = together(bench, drawn, claim.sample_rate**2)
    p = min(1.0, 3 * min(stats.spread_p(sizes, count, claim.sample_rate), extremes, pairs))
    measured += f", sizes {sizes.min():.0f} to {sizes.max():.0f}, {seen}"
    expected = count * claim.sample_rate * (1 - claim.sample_rate)
    measured += f" (p <= {p:.2g})"
    return judged(SPREAD, p > ALPHA, measured, f"{expected:.3g}, p above {ALPHA:g}", SPREAD_WHY)


def together(bench: Bench, drawn: Drawn, rate: float) -> tuple[float, str]:
    """(p, what was seen) of the two units that come together most unusually often.

    The draws that hold both are Binomial(draws, rate), exactly: q^2 for Poisson batches, B (B - 1) / (n (n - 1)) for
    fixed ones. Tails fall off to both sides, so the most and the fewest are the least likely; all pairs are counted.
    """
    units = np.arange(drawn.shape[1])
    if units.size < 2:
        return 1.0, "one unit"
    if units.size > MOST_PAIRED:
        rng = np.random.default_rng([bench.probe.seed, 37])
        units = np.sort(rng.choice(units.size, MOST_PAIRED, replace=False))
    held = drawn[:, units].astype(np.float32)
    one, two = np.triu_indices(units.size, 1)
    both = (held.T @ held)[one, two]
    places = (int(np.argmin(both)), int(np.argmax(both)))
    p, place = min((stats.count_p(round(float(both[place])), len(drawn), rate), place) for place in places)
    pair = f"units {units[one[place]]} and {units[two[place]]}"
    return min(1.0, p * both.size), f"{pair} together in {both[place]:.0f} draws, {len(drawn) * rate:.3g} expected"


def epochs(bench: Bench, drawn: Drawn) -> Check:
    """(unit, epoch) pairs with exactly one inclusion: Binomial for Poisson batches, all of them if shuffled."""
    claim = bench.probe.claim
    rate, window = claim.sample_rate, window_of(claim)
    whole = len(drawn) // window
    if claim.sampling == "full" or window == 1:
        return skipped(EPOCH, "every unit is in every batch", EPOCH_WHY)
    if whole < 2:
        return skipped(EPOCH, f"only {len(drawn)} draws of an epoch of {window}", EPOCH_WHY)
    times = drawn[: whole * window].reshape(whole, window, -1).sum(axis=1)
    if claim.sampling == "shuffle":
        again = int((times > 1).sum())
        measured = f"{again} of {times.size} times a unit came twice in an epoch of {window} draws"
        return judged(EPOCH, again == 0, measured, "never: shuffled by claim", EPOCH_WHY)
    # Window against window two neighbours apart catches a shuffle whose epochs start elsewhere.
    once = float(binom.pmf(1, window, rate))
    pairs = len(drawn) // 2
    both = int((drawn[: 2 * pairs : 2] & drawn[1 : 2 * pairs : 2]).sum())
    if claim.sampling == "poisson":
        p = min(
            stats.count_p(int((times == 1).sum()), times.size, once),
            stats.count_p(both, pairs * drawn.shape[1], rate**2),
        )
        p = min(1.0, 2 * p)
    else:  # units of one fixed-size batch are not independent of each other, their own histories are
        p = min(1.0, min(stats.count_p(int(k), whole, once) for k in (times == 1).sum(axis=0)) * drawn.shape[1])
    measured = f"{(times == 1).mean():.3g} of units exactly once in {window} draws (p = {p:.2g})"
    return judged(EPOCH, p > ALPHA, measured, f"{once:.3g}, p above {ALPHA:g}", EPOCH_WHY)


def _allocated_marginals(bench: Bench, drawn: Drawn) -> Check:
    """Every place of an epoch holds every unit equally often."""
    return _by_law(
        bench, drawn, MARGINALS, MARGINALS_WHY, "q = {rate:.4g} at every step of an epoch", allocation.uniform
    )


def _allocated_spread(bench: Bench, drawn: Drawn) -> Check:
    """Sizes at one place of an epoch are binomial, and independent over epochs."""
    return _by_law(
        bench, drawn, SPREAD, SPREAD_WHY, "{variance:.3g}: units independent of each other", allocation.sizes
    )


def _allocated_epochs(bench: Bench, drawn: Drawn) -> Check:
    """Exactly k times an epoch, no two units alike, every epoch anew."""
    allowed = "never, by units that share nothing"
    return _by_law(bench, drawn, EPOCH, EPOCH_WHY, allowed, allocation.counted, allocation.independent)


_allocated = (_allocated_marginals, _allocated_spread, _allocated_epochs)


def _by_law(bench: Bench, drawn: Drawn, name: str, why: str, allowed: str, *tests: Callable[..., Found]) -> Check:
    event = bench.probe.claim.allocated()
    held = allocation.whole_epochs(event, drawn)
    if len(held) < allocation.LEAST_EPOCHS:
        return skipped(name, f"only {len(drawn)} draws of an epoch of {event.epoch_steps}", why)
    if event.draws == event.epoch_steps and name != EPOCH:
        return skipped(name, "every unit is in every batch", why)
    found = [test(event, held) for test in tests]
    words = {"rate": event.sample_rate, "variance": drawn.shape[1] * event.sample_rate * (1 - event.sample_rate)}
    fine = all(p > ALPHA for p, _ in found)
    text = allowed.format(**words)
    return judged(name, fine, "; ".join(seen for _, seen in found), f"{text}, p above {ALPHA:g}", why)
