"""The white-box game: gradient canaries, every noisy gradient seen.

Each candidate is a unit vector, all of them orthonormal; when its coin says so it takes part in training as one more
unit whose gradient is `scale * C` times that vector, Poisson-sampled, clipped and noised by the code under test like
any other. The auditor knows the data and sees every released gradient, so it subtracts what the known records
contributed and projects the rest. What that shows, and what it says about the coins, is dpaudit.evidence.channel: the
channel is known exactly, so nothing is counted and the evidence is a likelihood ratio. Spare directions that hold no
canary show the noise by itself (dpaudit.evidence.noise).

Where the known records can't be subtracted (a trainer that shows no gradients), or the auditor sees the final update
alone (`final`), or directions are random and meet (`random`), the channel is not known: the coins are then read by the
f-DP theorem (attacks.games.reading), and no power is stated.

Sources: Nasr et al. 2023 (arXiv 2302.07956), Steinke et al. 2023 (arXiv 2305.08846).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attacks.canaries import ALL, COLUMNS, Plan
from attacks.games import controls
from attacks.games.played import Played
from attacks.games.reading import claim_tests, one_run_bound
from dpaudit.analysis.claim import claimed_event, describe_alternative, sigma_sentence
from dpaudit.bounds import pld
from dpaudit.bounds.roc import summarise
from dpaudit.documents import Claim, Control, Test, Validity
from dpaudit.errors import rejected
from dpaudit.evidence.channel import Channel, log_ratio
from dpaudit.evidence.coins import Posteriors, p_value
from dpaudit.evidence.game import ALL as ALL_CANARIES
from dpaudit.evidence.game import LOUD as LOUD_CANARIES
from dpaudit.evidence.game import NOISE, SHARES, SPARE, Rule
from dpaudit.evidence.limits import sigma_upper
from dpaudit.evidence.noise import NoiseLevel
from dpaudit.evidence.power import white_box_power
from dpaudit.randomness import Key
from trainers.gradients import Gradient

KIND = "gradient"
Directions = Literal["orthogonal", "dirac", "random"]
TITLE = "white box"
STATISTIC = "log-likelihood ratio of the claimed mechanism, over all noisy gradients"
FINAL_STATISTIC = "projection of the final update on the canary's direction"
FINAL = "-final"  # at the end of the coin file's kind: the final update only
DEFAULT_COUNT = 1000
PARAMETERS_PER_CANARY = 10  # fewer, and orthogonal directions would crowd out the model's own gradient
SCALES = (1.0, 100.0)  # half of the canaries arrive at norm C, half far above: both must be clipped to C
SIGMA_REDUCTION = 0.1  # the wrong claim to find: the true sigma is so much smaller
WORDS = {"orthogonal": "orthonormal", "dirac": "single-coordinate", "random": "random"}

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass
class GradientGame:
    """`count` directions with independent fair coins: orthonormal, single coordinates, or random unit vectors.

    known: whether `observe` is told what the other records contributed. final: nothing is seen of the steps;
    `see_final` scores the sum of all updates.
    """

    count: int
    key: Key
    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    directions: Directions = "orthogonal"
    final: bool = False
    known: bool = True
    members: Bools = field(init=False)
    arrived: controls.Arrived = field(init=False)
    liveness: list[controls.Liveness] = field(init=False, default_factory=list)
    _seen: list[npt.NDArray[np.float32]] = field(init=False, default_factory=list)
    _squares: float = field(init=False, default=0.0)
    _last: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.members = self.key.uniform(self.count, step=0, name="gradient canaries", purpose="coins") < 0.5
        self.arrived = controls.Arrived()
        self._vectors = torch.empty(0)
        self._last = np.zeros(self.count)

    @property
    def kind(self) -> str:
        """What the coin file calls these canaries: 'gradient', 'gradient-dirac', 'gradient-random-final', …"""
        named = KIND if self.directions == "orthogonal" else f"{KIND}-{self.directions}"
        return named + (FINAL if self.final else "")

    @property
    def exact(self) -> bool:
        """Whether the channel is known, so that coins have a likelihood."""
        return self.known and not self.final and self.directions != "random"

    @property
    def loud(self) -> Bools:
        """(m,) which canaries arrive far above C. Clipped as they must be they look like the others."""
        return np.array([SCALES[index % len(SCALES)] > 1 for index in range(self.count)])

    @property
    def inserted(self) -> npt.NDArray[np.intp]:
        """(k,) numbers of the canaries whose coin put them in."""
        return np.flatnonzero(self.members)

    @property
    def plan(self) -> Plan:
        """A quarter of the candidates guessed on each side, for the bound that assumes nothing; the wrong claim."""
        side = max(1, self.count // 4)
        seed = int(self.key.generator(purpose="gradient ties").integers(2**31))
        return Plan({ALL: (side, side), self.kind: (side, side)}, seed, SIGMA_REDUCTION)

    def ids(self) -> list[str]:
        """Names of the candidates, in order."""
        return [f"gradient-{index:05d}" for index in range(self.count)]

    def frame(self) -> pd.DataFrame:
        """The coin file's rows: id, kind, member, content (a hash of the name: the key defines the direction)."""
        content = [hashlib.sha256(name.encode()).hexdigest() for name in self.ids()]
        rows = zip(self.ids(), [self.kind] * self.count, self.members.tolist(), content, strict=True)
        return pd.DataFrame(list(rows), columns=COLUMNS).astype({"member": bool})

    def rows(self, parameters: int) -> torch.Tensor:
        """(k, parameters) gradients of the inserted canaries. Raises UsageError when there is not room for them."""
        room = parameters // PARAMETERS_PER_CANARY
        if self.count > room:
            why = f"{parameters} trained parameters, {PARAMETERS_PER_CANARY} for each gradient canary"
            raise rejected("--count", self.count, f"at most {room} ({why})")
        self._vectors = self._drawn(parameters, self.count + min(SPARE, parameters - self.count))
        scale = torch.tensor([SCALES[index % len(SCALES)] for index in range(self.count)])
        chosen = torch.from_numpy(self.members)
        return self._vectors[: self.count][chosen] * (scale[chosen] * self.max_grad_norm).unsqueeze(1)

    def _drawn(self, parameters: int, count: int) -> torch.Tensor:
        """(count, parameters) unit vectors: the canaries', then the spare ones."""
        rng = self.key.generator(purpose="gradient directions")
        if self.directions == "dirac":
            basis = torch.zeros(count, parameters)
            basis[torch.arange(count), torch.from_numpy(rng.permutation(parameters)[:count])] = 1.0
            return basis
        drawn = rng.normal(size=(parameters, count)).astype(np.float32)
        if self.directions == "random":
            return torch.from_numpy(np.ascontiguousarray((drawn / np.linalg.norm(drawn, axis=0)).T))
        return torch.from_numpy(np.ascontiguousarray(np.linalg.qr(drawn)[0].T))

    @property
    def spare(self) -> int:
        """Directions without canaries; none where directions meet or the steps are not seen."""
        return 0 if self.final or self.directions == "random" else max(0, len(self._vectors) - self.count)

    def see_final(self, start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> None:
        """Scores from the first and the last weights alone: an update goes against the gradient."""
        moved = torch.cat([(start[name] - end[name].detach()).flatten().float().cpu() for name in sorted(start)])
        self._last = (self._vectors[: self.count] @ moved).double().numpy()

    def project(self, difference: Gradient) -> Floats:
        """(m + K,) what a difference of releases shows along the directions, in units of C of the sum."""
        flat = torch.cat([difference[name].flatten().float().cpu() for name in sorted(difference)])
        return (self._vectors @ flat).double().numpy() * self.expected_batch_size / self.max_grad_norm

    def observe(
        self,
        step: int,
        noisy: Gradient,
        known: Gradient,
        taken: npt.NDArray[np.intp],
        without: Callable[[], Gradient] | None = None,
    ) -> None:
        """One step: what it shows along every direction; the first steps with canaries are checked for liveness.

        known: clipped sum of the records. taken: the inserted canaries in this step. without: the release of the same
        step and noise without them.
        """
        if without is not None and len(taken) and len(self.liveness) < controls.LIVE_STEPS:
            there = without()
            moved = self.project({name: noisy[name] - there[name] for name in noisy})
            self.liveness.append(controls.Liveness.of(moved, self.inserted[taken], f"step {step}"))
        if self.final:
            return
        size = self.expected_batch_size
        shown = self.project({name: noisy[name] - known[name] / size for name in noisy})
        self._seen.append(shown[: self.count].astype(np.float32))
        self._squares += float(np.square(shown[self.count :]).sum()) / self.noise_multiplier**2
        self.arrived.add(shown[: self.count][self.inserted[taken]])

    def seen(self) -> Floats:
        """(m, T) in units of C."""
        return np.stack(self._seen, axis=1).astype(np.float64) if self._seen else np.zeros((self.count, 0))

    def scores(self) -> Floats:
        """(m,) log-likelihood ratios under the claim, or projections of the final update."""
        if self.final:
            return self._last
        return log_ratio(self.seen(), sigma=self.noise_multiplier, rate=self.sample_rate)


def read_game(
    game: GradientGame,
    claim: Claim,
    *,
    confidence: float,
    alpha: float,
    coins_sha256: str | None,
    coins: str = "gradients",
) -> Played:
    """The finished game as evidence: tests with fixed shares, bounds, controls, and the power that they earned.

    A white-box game whose injected gradients do not arrive is invalid: it could not have seen anything.
    """
    rng = game.key.generator(purpose="gradient evidence")
    found = controls.judge_liveness(game.liveness, game.arrived, game.noise_multiplier)
    noise = NoiseLevel(game._squares, game.spare * len(game._seen)) if game.spare and game._seen else None
    if noise is not None:
        found.append(controls.noise_control(noise, game.spare))
    dead = [control for control in found if control.outcome == "failed"]
    checks = tuple(controls.as_check(control) for control in found if control.name == "liveness")
    shared: dict[str, Any] = {"coins_sha256": coins_sha256, "coins": coins, "controls": tuple(found)}
    if dead:
        return Played(Validity(sound=False, checks=checks), **shared)
    scores, plan = game.scores(), game.plan
    statistic = f"{FINAL_STATISTIC if game.final else STATISTIC} ({game.kind})"
    tests = [*_coin_tests(game, scores, claim, noise, found, statistic, alpha, rng)]
    tests += _noise_tests(noise, game, claim, alpha)
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
    channel = Channel(game.noise_multiplier, game.sample_rate, len(game._seen))
    posteriors = Posteriors.of(game.seen(), channel)
    rule = Rule(game.loud, game.spare if noise is not None else 0)
    parts = rule.parts(posteriors, game.members, noise)
    blank = Test(
        name=f"{TITLE}: {ALL_CANARIES}",
        statistic=statistic,
        bound="exact likelihood",
        assumes="claimed-mechanism",
        selection="nothing is selected: every coin counts by its likelihood",
        confidence=1 - alpha,
        delta=claim.delta,
        n=game.count,
        guesses=None,
        epsilon_lower=None,
        ceiling=None,
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
            "control": "the power of the game stands with the test of all canaries",
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


def _noise_tests(noise: NoiseLevel | None, game: GradientGame, claim: Claim, alpha: float) -> list[Test]:
    if noise is None:
        return []
    return [
        Test(
            name=f"{TITLE}: {NOISE}",
            statistic=f"sum of squares along {game.spare} directions without canaries, over all steps",
            bound="chi-square",
            assumes="claimed-mechanism",
            selection="directions drawn with the coins",
            confidence=1 - alpha,
            delta=claim.delta,
            n=noise.count,
            guesses=None,
            epsilon_lower=None,
            ceiling=None,
            p_value=noise.p_value,
            statement=f"p-value of 'the noise is at least as large as claimed'; it is {noise.ratio:.4f} times that",
            e_value=_plain(noise.log_e),
            share=SHARES[NOISE],
            control="the power of the game stands with the test of all canaries",
        )
    ]


def mechanism_bound(game: GradientGame, claim: Claim, confidence: float, rng: np.random.Generator) -> Test:
    """Lower bound on eps within DP-SGD of the claimed q and T: the coins' evidence inverted over sigma.

    The ceiling is the bound of the same game if its noise were missing: what was sampled is then seen exactly.
    """
    channel = Channel(game.noise_multiplier, game.sample_rate, len(game._seen))
    event = claimed_event(claim)
    assert event is not None
    sigma = sigma_upper(game.seen(), game.members, channel, level=1 - confidence, rng=rng)
    perfect = np.zeros((game.count, channel.steps))
    inside = game.inserted
    perfect[inside] = game.key.generator(purpose="perfect game").random((len(inside), channel.steps)) < channel.rate
    top = sigma_upper(perfect, game.members, channel, level=1 - confidence, rng=rng)
    return Test(
        name=TITLE,
        statistic=STATISTIC,
        bound="exact likelihood",
        assumes="dp-sgd(q,T)",
        selection="nothing is selected: the evidence inverted over sigma",
        confidence=confidence,
        delta=claim.delta,
        n=game.count,
        guesses=None,
        epsilon_lower=_epsilon(sigma, claim),
        ceiling=_epsilon(top, claim),
        statement=sigma_sentence(sigma, event, confidence),
        decides=False,
    )


def noise_bound(game: GradientGame, claim: Claim, noise: NoiseLevel, confidence: float) -> Test:
    """Lower bound on eps within DP-SGD of the claimed q and T: the noise measured where no canary is.

    Exact: the squares over sigma^2 are chi-square, so the largest level that they do not refute lies below the true one
    with probability at most 1 - confidence. It says how much noise there is; that a unit moves the sum by C is what the
    liveness control shows.
    """
    event = claimed_event(claim)
    assert event is not None
    sigma = noise.upper(1 - confidence) * game.noise_multiplier
    return Test(
        name=f"{TITLE}: {NOISE}",
        statistic=f"sum of squares along {game.spare} directions without canaries, over all steps",
        bound="chi-square",
        assumes="dp-sgd(q,T)",
        selection="directions drawn with the coins",
        confidence=confidence,
        delta=claim.delta,
        n=noise.count,
        guesses=None,
        epsilon_lower=_epsilon(sigma, claim),
        ceiling=np.inf,
        statement=sigma_sentence(sigma, event, confidence),
        decides=False,
    )


def _epsilon(sigma: float, claim: Claim) -> float:
    """eps of the claimed q and T with this noise multiplier, under the claim's relation."""
    from dpaudit import accounting

    event = claimed_event(claim)
    assert event is not None
    if sigma == 0.0 or sigma == np.inf:
        return 0.0 if sigma else np.inf
    return accounting.epsilon(accounting.DpSgd(sigma, event.sample_rate, event.steps, event.relation), claim.delta)


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
        epsilon = pld.dp_sgd_epsilon(sigma, event.sample_rate, event.steps, claim.delta)
    return f"{text} ({sigma:.3g} instead of {event.noise_multiplier:.3g}: eps {epsilon:.3g} at {claim.delta:g})"


def _plain(log: float) -> float:
    """exp, infinite where a float can't hold it."""
    return float(np.exp(log)) if log < 700 else np.inf
