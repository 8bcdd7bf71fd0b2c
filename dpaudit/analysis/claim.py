"""The claim test: does a one-run game contradict the claimed mechanism itself?

Instead of asking whether the scores fit *some* eps, it takes the claimed (sigma, q, T), builds the accountant's own
privacy-loss distribution of it, and computes how likely so few wrong guesses are. Two p-values with two statements:

- `f-dp` (Mahloujifar et al. 2025): valid for every mechanism whose coins satisfy the claimed trade-off curve, however
  the canaries interfere. It decides, unless the game has separate canaries.
- `order-statistic` (Xiang et al. 2025): much sharper, and exact for canaries on separate directions of the noise (such
  as orthogonal injected gradients). It decides when the caller vouches for that (`separate=True`), never otherwise.

One of them is made, chosen before looking, so the error budget is not split.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dpaudit import validate
from dpaudit.bounds import dp_sgd, order_statistic, pld
from dpaudit.bounds.guesses import as_members, as_scores, count_correct, rank_guesses
from dpaudit.bounds.profile import DiscreteProfile, Profile, epsilon_delta
from dpaudit.documents import Claim, Relation, Test
from dpaudit.errors import UsageError, rejected
from dpaudit.evidence import calibrate
from dpaudit.verdict import reached, wanted

if TYPE_CHECKING:  # imported where a claim is there: scores without one need no accountant
    from dpaudit.accounting import DpSgd

# The wrong claim that an audit must be able to find: a true sigma of so many times the claimed one (0 = clipped, but
# the noise is missing), or no DP at all (nothing clipped, every member trains in every epoch).
Alternative = float | Literal["no-dp"]
ALTERNATIVE = 0.7

ANY = (
    "p-value of 'every canary's coin satisfies the claimed trade-off curve'; valid for every mechanism that meets the "
    "claim, however the canaries interfere"
)
SEPARATE = (
    "p-value of 'each canary passes independently through the claimed mechanism'; exact for canaries on separate "
    "directions of the noise, as their owner vouches"
)


@dataclass(frozen=True)
class Game:
    """Counts of a one-run game with guesses fixed beforehand: canaries (m), guesses (r), correct ones (v)."""

    canaries: int
    guesses: int
    correct: int

    def read_by(self, *, separate: bool) -> dp_sgd.Game:
        """The counts with a theory: order statistics for separate canaries, otherwise the f-DP theorem."""
        reader = dp_sgd.Ordered if separate else dp_sgd.Interfering
        return reader(self.canaries, self.guesses, self.guesses - self.correct)

    def perfect(self) -> "Game":
        """The same game without a wrong guess."""
        return Game(self.canaries, self.guesses, self.guesses)


MOST_STEPS, SMALLEST_RATE = 10**6, 1e-12


def claimed_event(claim: Claim) -> "DpSgd | None":
    """The claim as Gaussian steps, Poisson-subsampled, allocated or on everybody; None if it says too little for that.

    Shuffled epochs are as many full-batch steps: that is what their proof gives each unit (dpaudit.accounting.schemes).
    Subsets of fixed size are no such steps: their claim is tested as (eps, delta) alone.
    """
    from dpaudit.accounting import DpSgd

    sigma, steps = claim.noise_multiplier, claim.steps
    rate = 1.0 if claim.sampling == "full" else claim.sample_rate
    # A zeroth-order step is a Gaussian step of few numbers; the alternatives below know Gaussian noise only.
    if claim.mechanism not in ("gaussian", "zeroth-order") or claim.noise != "gaussian":
        return None
    if claim.sampling not in ("poisson", "full", "shuffle", "allocation"):
        return None
    if sigma is None or not 0 < sigma < np.inf or rate is None or steps is None:
        return None
    if not (1 <= steps <= MOST_STEPS and SMALLEST_RATE <= rate <= 1):  # no training; numbers overflow beyond
        return None
    if claim.sampling == "shuffle":
        if abs(1 / rate - round(1 / rate)) > 1e-6 / rate:
            return None  # not cut into whole batches: nothing is known about its epochs
        rate, steps = 1.0, DpSgd(float(sigma), float(rate), steps, claim.relation, sampling="shuffle").epochs
    if claim.sampling == "allocation":
        return _allocated(float(sigma), float(rate), steps, claim.relation, claim.epoch_steps)
    return DpSgd(float(sigma), float(rate), steps, claim.relation)


def _allocated(sigma: float, rate: float, steps: int, relation: Relation, epoch: int | None) -> "DpSgd | None":
    """None where a unit is in no whole number of steps of an epoch, or under a relation without a proof."""
    from dpaudit.accounting import DpSgd

    try:
        found = DpSgd(sigma, rate, steps, relation, sampling="allocation", epoch=epoch)
    except UsageError:
        return None
    return replace(found, epoch=found.epoch_steps)


def null_profile(claim: Claim) -> Profile:
    """The most that one canary's coin may leak under the claim: of the mechanism, or of (eps, delta) alone."""
    event = claimed_event(claim)
    if event is None:
        if not 0 <= claim.epsilon < np.inf:
            raise rejected("claim.epsilon", claim.epsilon, "a finite eps >= 0 (an infinite one claims nothing to test)")
        return epsilon_delta(claim.epsilon, claim.delta)
    return pld.claimed_profile(event)


def alternative_profile(claim: Claim, alternative: Alternative = ALTERNATIVE) -> Profile | None:
    """What a canary leaks under the alternative. None when the claim names no mechanism to be wrong about."""
    event = claimed_event(claim)
    if event is None:
        return None
    scale = check_alternative(alternative)
    if scale == "no-dp":
        return DiscreteProfile(np.array([np.inf]), np.ones(1))
    if scale == 0.0:
        return dp_sgd.noiseless_profile(event.sample_rate, event.steps, event.epoch)
    return pld.dp_sgd_profile(event.noise_multiplier * scale, event.sample_rate, event.steps, event.epoch)


def check_alternative(alternative: Alternative) -> Alternative:
    """The alternative in its domain: "no-dp" or a number in [0, 1)."""
    if alternative == "no-dp":
        return "no-dp"
    return validate.real("alternative", alternative, low=0.0, high=1.0, open_high=True)


def describe_alternative(alternative: Alternative) -> str:
    """The alternative in words, as it is stored before scoring."""
    if alternative == "no-dp":
        return "no DP at all: nothing clipped, no noise"
    if alternative == 0.0:
        return "the noise is missing"
    return f"the true sigma is {1.0 - float(alternative):.0%} smaller than claimed"


def critical_errors(profile: Profile, *, canaries: int, guesses: int, alpha: float, separate: bool) -> int:
    """The most errors at which the claim is still refuted at `alpha`; -1 if even a perfect guesser refutes nothing."""
    low, high = -1, guesses
    while high - low > 1:
        middle = (low + high) // 2
        p = Game(canaries, guesses, guesses - middle).read_by(separate=separate).p_value(profile)
        if reached(p, alpha):
            low = middle
        else:
            high = middle
    return low


def ideal_power(
    claim: Claim,
    *,
    canaries: int,
    guesses: int,
    alpha: float,
    separate: bool,
    alternative: Alternative = ALTERNATIVE,
) -> float | None:
    """P[the deciding test refutes] when the true sigma is `alternative` times the claimed one.

    Every canary is guessed as well as can be, so this is an upper limit for weaker attacks. None when the claim names
    no mechanism.
    """
    truth = alternative_profile(claim, alternative)
    if truth is None:
        return None
    critical = critical_errors(null_profile(claim), canaries=canaries, guesses=guesses, alpha=alpha, separate=separate)
    if critical < 0:
        return 0.0
    return order_statistic.p_value(truth, canaries=canaries, guesses=guesses, errors=critical)


def epsilon_lower(event: "DpSgd", game: dp_sgd.Game, *, delta: float, confidence: float) -> float:
    """Lower bound on eps at `delta` within "DP-SGD with this q and T, unknown sigma", under the claim's relation."""
    if event.relation != "replace":
        words = {"delta": delta, "confidence": confidence}
        return dp_sgd.epsilon_lower(event.sample_rate, event.steps, game, **words, epoch=event.epoch)
    sigma = dp_sgd.sigma_upper(event.sample_rate, event.steps, game, confidence=confidence)
    if sigma == 0.0 or sigma == np.inf:
        return np.inf if sigma == 0.0 else 0.0
    from dpaudit.accounting import DpSgd, epsilon

    return epsilon(DpSgd(sigma, event.sample_rate, event.steps, "replace"), delta)


def play(scores: npt.ArrayLike, members: npt.ArrayLike, *, top: int, bottom: int, rng: np.random.Generator) -> Game:
    """Scores and coins, both (n,), to counts: the top and bottom ranks are guessed, ties in random order."""
    values = as_scores(scores)
    inside = as_members(members, values.size)
    correct = count_correct(rank_guesses(values, top, bottom, rng=rng), inside)
    return Game(values.size, top + bottom, correct)


def claim_test(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    claim: Claim,
    top: int,
    bottom: int,
    rng: np.random.Generator,
    name: str = "canaries",
    statistic: str = "score",
    alpha: float = 0.001,
    share: float = 1.0,
    confidence: float = 0.95,
    separate: bool = False,
) -> list[Test]:
    """Put scores to the claim: its p-value and e-value, and the bound within the claimed q and T.

    scores: (n,), higher = was in training; members: (n,) coins, fair and independent; `top` and `bottom` guesses fixed
    beforehand; `rng` breaks ties. `separate`: the caller vouches that canaries act on separate directions of the noise.
    `alpha`: level of the claim; `share`: of the game's evidence; `confidence`: of the bound. No power is stated: what
    an ideal attacker would find says nothing about these scores. Raises UsageError for arguments outside their domain,
    or a claim with nothing to test.
    """
    game = play(scores, members, top=top, bottom=bottom, rng=rng)
    level = validate.real("alpha", alpha, low=0.0, high=1.0, open_low=True, open_high=True)
    event, profile = claimed_event(claim), null_profile(claim)
    # An (eps, delta) claim without a mechanism is tested by the f-DP theorem in every game.
    ordered = separate and event is not None
    p = game.read_by(separate=ordered).p_value(profile)
    text = f"p-value of 'the training is ({claim.epsilon:g}, {claim.delta:g})-DP'; valid for every mechanism"
    deciding = Test(
        name=name,
        statistic=statistic,
        bound="order-statistic" if ordered else "f-dp",
        assumes="none" if event is None else "claimed-mechanism",
        selection=f"fixed: {top} top, {bottom} bottom",
        confidence=1 - level,
        delta=claim.delta,
        n=game.canaries,
        guesses=game.guesses,
        correct=game.correct,
        epsilon_lower=None,
        ceiling=None,
        p_value=p,
        statement=text if event is None else SEPARATE if ordered else ANY,
        e_value=calibrate.e_value(p, wanted=wanted(share, level)),
        share=share,
    )
    return [deciding] if event is None else [deciding, _family_bound(deciding, event, game, confidence)]


def _family_bound(like: Test, event: "DpSgd", game: Game, confidence: float) -> Test:
    """Bound on eps within this q and T by the same theory, with the largest unrefuted sigma in words."""
    ordered = like.bound == "order-statistic"
    reading = game.read_by(separate=ordered)
    sigma = dp_sgd.sigma_upper(event.sample_rate, event.steps, reading, confidence=confidence, epoch=event.epoch)
    top = epsilon_lower(event, game.perfect().read_by(separate=ordered), delta=like.delta, confidence=confidence)
    return like.model_copy(
        update={
            "assumes": "dp-sgd(q,T)",
            "confidence": confidence,
            "epsilon_lower": epsilon_lower(event, reading, delta=like.delta, confidence=confidence),
            "ceiling": top,
            "p_value": None,
            "e_value": None,
            "statement": sigma_sentence(sigma, event, confidence),
            "decides": False,
        }
    )


def sigma_sentence(sigma: float, event: "DpSgd", confidence: float) -> str:
    """What a game says about sigma, in words."""
    scheme = "" if event.epoch is None else f", allocated over epochs of {event.epoch} steps"
    family = f"DP-SGD with q = {event.sample_rate:g} and T = {event.steps}{scheme}"
    if sigma == np.inf:
        return f"within {family}: no noise multiplier is refuted at {confidence:.3g}"
    if sigma == 0.0:
        return f"within {family}: even a run without noise is refuted at {confidence:.3g}"
    return (
        f"consistent at {confidence:.3g} with noise multipliers up to {sigma:.4g} within {family}; "
        f"claimed: {event.noise_multiplier:.4g}"
    )
