"""What a white-box game (attacks.games.gradients) says: tests with fixed shares, bounds, controls, earned power."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.canaries import ALL
from attacks.games import controls
from attacks.games.gradients import SIGMA_REDUCTION, GradientGame
from attacks.games.played import Played, sound
from attacks.games.reading import claim_tests, one_run_bound
from dpaudit import accounting
from dpaudit.analysis.claim import claimed_event, describe_alternative, sigma_sentence
from dpaudit.bounds import pld
from dpaudit.bounds.roc import summarise
from dpaudit.documents import Claim, Control, Test, Validity
from dpaudit.evidence import calibrate, steps
from dpaudit.evidence.coins import Posteriors, p_value
from dpaudit.evidence.game import ALL as ALL_CANARIES
from dpaudit.evidence.game import KEPT, NOISE, PLACES, SHARES, STEPS, Rule
from dpaudit.evidence.game import LOUD as LOUD_CANARIES
from dpaudit.evidence.limits import sigma_upper
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.evidence.power import white_box_power
from dpaudit.verdict import wanted

TITLE = "white box"
STATISTIC = "log-likelihood ratio of the claimed mechanism, over all noisy gradients"
FINAL_STATISTIC = "projection of the final update on the canary's direction"
ELSEWHERE = "the power of the game stands with the test of all canaries"

Floats = npt.NDArray[np.float64]


def read_game(
    game: GradientGame,
    claim: Claim,
    *,
    confidence: float,
    alpha: float,
    coins_sha256: str | None,
) -> Played:
    """The finished game as evidence: tests with fixed shares, bounds, controls, and the power that they earned.

    A white-box game whose injected gradients do not arrive is invalid: it could not have seen anything. So is one whose
    releases hold numbers that are not finite.
    """
    if game.unreadable is not None:
        return Played(sound([controls.finite_check(game.unreadable)]), coins_sha256=coins_sha256, coins="gradients")
    rng = game.key.generator(purpose="gradient evidence")
    found = controls.judge_liveness(game.liveness, game.arrived, game.noise_multiplier)
    empty = game.empty()
    noise = NoiseLevel(float(np.square(empty).sum()), empty.size) if empty.size else None
    if noise is not None:
        found.append(controls.noise_control(noise, game.spare))
        found += controls.steps_control(empty)
    if game.exact:
        found += controls.records_control(game.records, game.noise_multiplier, noise)
    if game.places is not None and game.known:
        found += controls.law_control(game.places)
    found += game.beside
    said = (control for control in found if control.name == "liveness" or control.outcome == "failed")
    checks = tuple(controls.as_check(control) for control in said)
    shared: dict[str, Any] = {
        "coins_sha256": coins_sha256,
        "coins": "gradients",
        "controls": tuple(found),
        "kept": KEPT,
    }
    if any(control.outcome == "failed" for control in found):
        return Played(Validity(sound=False, checks=checks), **shared)
    scores, plan = game.scores(), game.plan
    statistic = f"{FINAL_STATISTIC if game.final else STATISTIC} ({game.kind})"
    tests = [*_coin_tests(game, scores, claim, noise, found, statistic, alpha, rng)]
    if noise is not None:
        tests.append(_noise_test(noise, game, claim, alpha))
        if len(empty) > 1:
            tests.append(_steps_test(empty, claim, alpha))
    if game.places is not None:
        tests.append(_places_test(game, empty, claim, alpha))
    # A third of the error of the bounds each: what assumes nothing, and within the mechanism the coins and the noise.
    level = 1 - (1 - confidence) / 3
    free = one_run_bound(
        scores,
        game.members,
        plan.guesses[ALL],
        delta=claim.delta,
        confidence=level,
        rng=np.random.default_rng([plan.tie_seed]),
    )
    tests.append(free.model_copy(update={"name": TITLE, "statistic": statistic}))
    if game.exact:
        tests.append(mechanism_bound(game, claim, level, rng).model_copy(update={"statistic": statistic}))
    if noise is not None and claimed_event(claim) is not None:
        tests.append(noise_bound(game, claim, noise, level))
    return Played(
        validity=Validity(sound=True, checks=checks),
        tests=tuple(tests),
        scores=(summarise(TITLE, scores, game.members),) if 0 < game.members.sum() < game.count else (),
        alternative=wrong_claim(claim, SIGMA_REDUCTION),
        **shared,
    )


def _coin_tests(
    game: GradientGame,
    scores: Floats,
    claim: Claim,
    noise: NoiseLevel | None,
    found: list[Control],
    statistic: str,
    alpha: float,
    rng: np.random.Generator,
) -> tuple[Test, ...]:
    """What the coins say: by their likelihood where the channel is known, else by counts."""
    if not game.exact:
        frame = game.frame()[["id", "kind", "member"]].assign(score=scores)
        words: dict[str, Any] = {"title": TITLE, "statistic": statistic, "share": SHARES[ALL_CANARIES]}
        read = claim_tests(frame, game.plan, claim=claim, confidence=0.95, alpha=alpha, **words)
        why = "the channel is not known: " + (
            "the final update alone"
            if game.final
            else "random directions meet"
            if game.known
            else "no gradient() to subtract"
        )
        return tuple(test.model_copy(update={"control": why}) for test in read if test.decides)
    channel = game.channel
    posteriors = Posteriors.of(game.seen(), channel)
    rule = Rule(game.loud, game.spare if noise is not None else 0)
    parts = rule.parts(posteriors, game.members, noise)
    blank = _test(
        claim,
        1 - alpha,
        name=f"{TITLE}: {ALL_CANARIES}",
        statistic=statistic,
        bound="exact likelihood",
        selection="nothing is selected: every coin counts by its likelihood",
        n=game.count,
        p_value=p_value(posteriors, game.members, rng),
        statement="p-value of 'the coins obey the claimed mechanism, given all that was released'",
        e_value=_plain(parts[ALL_CANARIES]),
        share=SHARES[ALL_CANARIES],
    )
    tests = [blank]
    if LOUD_CANARIES in parts:
        louder = posteriors.rows(game.loud)
        update = {
            "name": f"{TITLE}: {LOUD_CANARIES}, gradients of norm 100 C before clipping",
            "n": int(game.loud.sum()),
            "p_value": p_value(louder, game.members[game.loud], rng),
            "e_value": _plain(parts[LOUD_CANARIES]),
            "share": SHARES[LOUD_CANARIES],
            "control": ELSEWHERE,
        }
        tests.append(blank.model_copy(update=update))
    lost = [control for control in found if control.outcome != "earned"]
    if lost:
        why = f"not earned: {lost[0].name}: {lost[0].measured}"
        return (blank.model_copy(update={"control": why}), *tests[1:])
    power = white_box_power(channel, rule, alpha=alpha, scale=1 - SIGMA_REDUCTION, rng=rng)
    earned = "the controls " + ", ".join(control.name for control in found)
    update = {"power": power.value, "power_low": power.low, "control": earned}
    return (blank.model_copy(update=update), *tests[1:])


def _test(claim: Claim, confidence: float, **fields: Any) -> Test:
    """A test of the claimed mechanism that guesses nothing."""
    blank = {"assumes": "claimed-mechanism", "guesses": None, "epsilon_lower": None, "ceiling": None}
    return Test(confidence=confidence, delta=claim.delta, **{**blank, **fields})


def _within(claim: Claim, sigma: float, confidence: float, *, ceiling: float, **fields: Any) -> Test:
    """A lower bound on eps within DP-SGD of the claimed q and T, from an upper limit of sigma."""
    event = claimed_event(claim)
    assert event is not None
    return _test(
        claim,
        confidence,
        assumes="dp-sgd(q,T)",
        epsilon_lower=_epsilon(sigma, claim),
        ceiling=ceiling,
        statement=sigma_sentence(sigma, event, confidence),
        decides=False,
        **fields,
    )


def _of_noise(game: GradientGame, noise: NoiseLevel) -> dict[str, Any]:
    """What test and bound of the noise level have in common."""
    return {
        "name": f"{TITLE}: {NOISE}",
        "statistic": f"sum of squares along {game.spare} directions without canaries, over all steps",
        "bound": "chi-square",
        "selection": "directions drawn with the coins",
        "n": noise.count,
    }


def _noise_test(noise: NoiseLevel, game: GradientGame, claim: Claim, alpha: float) -> Test:
    return _test(
        claim,
        1 - alpha,
        p_value=noise.p_value,
        statement=f"p-value of 'the noise is at least as large as claimed'; it is {noise.ratio:.4f} times that",
        e_value=_plain(noise.log_e),
        share=SHARES[NOISE],
        control=ELSEWHERE,
        **_of_noise(game, noise),
    )


def _steps_test(empty: Floats, claim: Claim, alpha: float) -> Test:
    log = steps.log_e(empty)
    return _test(
        claim,
        1 - alpha,
        name=f"{TITLE}: {STEPS}",
        statistic=f"noise level along fixed combinations of the {len(empty)} steps, {empty.shape[1]} directions each",
        bound="chi-square",
        selection="combinations fixed beforehand: cosines, sums and differences of neighbours",
        n=empty.size,
        p_value=min(1.0, _plain(-log)),
        statement="p-value (one over the e-value) of 'every step has noise of its own, at least as large as claimed'",
        e_value=_plain(log),
        share=SHARES[STEPS],
        control=ELSEWHERE,
    )


def _places_test(game: GradientGame, empty: Floats, claim: Claim, alpha: float) -> Test:
    assert game.places is not None
    places, share = game.places, SHARES[PLACES]
    seen = places.judged(empty)
    return _test(
        claim,
        1 - alpha,
        name=f"{TITLE}: {PLACES}",
        statistic=f"least noise in any step, block, coordinate or predictable direction; lowest: {seen.seen}",
        bound="chi-square",
        selection=f"all of them, by Bonferroni's inequality ({places.kept.size} coordinates, fixed with the coins)",
        n=places.kept.size * places.steps,
        p_value=seen.p_value,
        statement="p-value of 'the noise is at least as large as claimed in every step and every coordinate'",
        e_value=calibrate.e_value(seen.p_value, wanted=wanted(share, alpha)),
        share=share,
        control=ELSEWHERE,
    )


def mechanism_bound(game: GradientGame, claim: Claim, confidence: float, rng: np.random.Generator) -> Test:
    """Lower bound on eps within DP-SGD of the claimed q and T: the coins' evidence inverted over sigma.

    The ceiling is the bound of the same game if its noise were missing: what was sampled is then seen exactly.
    """
    channel = game.channel
    upper = partial(sigma_upper, coins=game.members, channel=channel, level=1 - confidence, rng=rng)
    sigma = upper(game.seen())
    perfect = np.zeros((game.count, channel.steps))
    inside = game.inserted
    perfect[inside] = channel.sampled(len(inside), game.key.generator(purpose="perfect game"))
    return _within(
        claim,
        sigma,
        confidence,
        ceiling=_epsilon(upper(perfect), claim),
        name=TITLE,
        statistic=STATISTIC,
        bound="exact likelihood",
        selection="nothing is selected: the evidence inverted over sigma",
        n=game.count,
    )


def noise_bound(game: GradientGame, claim: Claim, noise: NoiseLevel, confidence: float) -> Test:
    """Lower bound on eps within DP-SGD of the claimed q and T: the noise measured where no canary is.

    Exact: the squares over sigma^2 are chi-square, so the largest level that they do not refute lies below the true one
    with probability at most 1 - confidence. It says how much noise there is; that a unit moves the sum by C is what the
    liveness control shows.
    """
    sigma = noise.upper(1 - confidence) * game.noise_multiplier
    return _within(claim, sigma, confidence, ceiling=np.inf, **_of_noise(game, noise))


def _epsilon(sigma: float, claim: Claim) -> float:
    """eps of the claimed q and T with this noise multiplier, under the claim's relation."""
    event = claimed_event(claim)
    assert event is not None
    if sigma == 0.0 or sigma == np.inf:
        return 0.0 if sigma else np.inf
    return accounting.epsilon(replace(event, noise_multiplier=sigma), claim.delta)


def wrong_claim(claim: Claim, reduction: float) -> str:
    """The wrong claim that a game looks for, in words and figures."""
    text = describe_alternative(1 - reduction)
    event = claimed_event(claim)
    if event is None:
        return text
    sigma = event.noise_multiplier * (1 - reduction)
    if event.relation == "replace":
        epsilon = _epsilon(sigma, claim)
    else:
        epsilon = pld.dp_sgd_epsilon(sigma, event.sample_rate, event.steps, claim.delta, event.epoch)
    return f"{text} ({sigma:.3g} instead of {event.noise_multiplier:.3g}: eps {epsilon:.3g} at {claim.delta:g})"


def _plain(log: float) -> float:
    """exp, infinite where a float can't hold it."""
    return float(np.exp(log)) if log < 700 else np.inf
