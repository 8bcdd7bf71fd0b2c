"""The release game: what leaks if visual tokens leave the trust boundary.

Fix two inputs. For every draw a fair coin picks one of them, its tokens pass through the trainer's own noise, and a
distinguisher guesses which it was. For Gaussian noise the best distinguisher is known: with c0, c1 the noiseless tokens
and x the draw, the log likelihood ratio is <x - (c0 + c1) / 2, c1 - c0> / std^2, its laws are N(-mu^2/2, mu^2) and
N(mu^2/2, mu^2) with mu = |c1 - c0| / std, and each side errs with probability Phi(-mu/2). So every number of the game
has a closed form beside it. Draws are independent, the threshold 0 is fixed beforehand, hence the bounds for
independent runs apply (Clopper-Pearson; Gaussian DP of Nasr et al. 2023, which is no assumption where the noise is
Gaussian by construction). The trained distinguisher knows neither c0, c1 nor std: a linear classifier that is fitted on
the first half of the draws and judged on the second.

None of this decides anything about the trained weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv, ndtri

from attacks.fusion.path import TokenPath
from attacks.fusion.standins import climb
from dpaudit import accounting
from dpaudit.bounds import clopper_pearson, gdp
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.documents import ReleasePair, Test
from trainers.fusion import TokenRelease
from trainers.records import Pixels, Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]

DRAWS = 1000
CONFIDENCE = 0.95
# Standard deviations at which a pair is played besides the run's own, as the mu that they give: enough, and not too
# much, for a game of a thousand draws to measure.
CALIBRATED = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Pair:
    """Noiseless tokens of two inputs, (2, d), and unit noise drawn for `coins`, (n, d). True = the second input."""

    name: str
    what: str
    clean: Floats
    noise: Floats
    coins: Coins

    @property
    def distance(self) -> float:
        return float(np.linalg.norm(self.clean[1] - self.clean[0]))

    def draws(self, std: float) -> Floats:
        """(n, d) what is released."""
        return np.asarray(self.clean[self.coins.astype(int)] + std * self.noise)


def fair_coins(count: int, rng: np.random.Generator) -> Coins:
    """(count,) independent fair coins; drawn again in the rare case that they are all equal."""
    coins = rng.random(count) < 0.5
    return coins if 0 < coins.sum() < count else fair_coins(count, rng)


def fused_pair(path: TokenPath, units: Sequence[Unit], name: str, coins: Coins) -> Pair:
    """The fused tokens of two units of one picture under the trainer's own fusion noise, a fresh step for each draw."""
    inputs = path.encode(units)
    clean = [_fused(inputs.select([place]).tokens, inputs.fused) for place in (0, 1)]
    noise = [
        _fused(inputs.select([int(coin)], key=path.key, step=step, fusion_std=1.0).tokens, inputs.fused)
        - clean[int(coin)]
        for step, coin in enumerate(coins, start=1)
    ]
    return Pair(name, "fused tokens, fusion noise", np.stack(clean), np.stack(noise), coins)


def _fused(tokens: torch.Tensor, fused: int) -> Floats:
    return np.asarray(tokens[0, -fused:].double().flatten().cpu().numpy())


def published_pair(release: TokenRelease, inputs: Sequence[torch.Tensor], name: str, coins: Coins) -> Pair:
    """All tokens of two inputs, (M, D) each, through accounted fusion, fresh noise for each draw; zeros = nobody."""
    clean = [_flat(release.clipped([tokens])[0]) for tokens in inputs]
    noise = [
        (_flat(release.publish([inputs[int(coin)]], [f"draw {number}"])[0]) - clean[int(coin)]) / release.std
        for number, coin in enumerate(coins)
    ]
    return Pair(name, "all tokens, accounted fusion", np.stack(clean), np.stack(noise), coins)


def _flat(tokens: torch.Tensor) -> Floats:
    return np.asarray(tokens.double().flatten().cpu().numpy())


def ratio_scores(pair: Pair, draws: Floats) -> Floats:
    """(n,) log likelihood ratios up to a positive factor; the threshold is 0."""
    return np.asarray((draws - pair.clean.mean(axis=0)) @ (pair.clean[1] - pair.clean[0]))


def trained_scores(draws: Floats, coins: Coins) -> tuple[Floats, Coins]:
    """Scores of the second half by a linear classifier fitted on the first: the nearer of the two mean draws."""
    half = len(draws) // 2
    first, known = draws[:half], coins[:half]
    if known.all() or not known.any():
        return np.zeros(len(draws) - half), coins[half:]
    one, two = first[known].mean(axis=0), first[~known].mean(axis=0)
    return np.asarray((draws[half:] - 0.5 * (one + two)) @ (one - two)), coins[half:]


def count(scores: Floats, coins: Coins) -> Counts:
    """Guesses "second input" where the score is above 0."""
    guessed = scores > 0
    return Counts(
        tp=int((guessed & coins).sum()),
        fn=int((~guessed & coins).sum()),
        fp=int((guessed & ~coins).sum()),
        tn=int((~guessed & ~coins).sum()),
    )


def mu_interval(counts: Counts, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided interval of mu for the Gaussian family: both error rates between their Clopper-Pearson limits.

    Four limits share 1 - confidence. The upper end is inf where a side made no error.
    """
    tail = (1.0 - confidence) / 4
    low = gdp.mu_lower(counts, confidence=1.0 - (1.0 - confidence) / 2)
    rates = ((counts.fp, counts.fp + counts.tn), (counts.fn, counts.tp + counts.fn))
    below = [0.0 if errors == 0 else float(betaincinv(errors, n - errors + 1, tail)) for errors, n in rates]
    high = math.inf if min(below) == 0.0 else max(0.0, -float(ndtri(below[0])) - float(ndtri(below[1])))
    return low, high


def play(pair: Pair, std: float, *, delta: float, confidence: float = CONFIDENCE) -> ReleasePair:
    """Both distinguishers on one pair at one standard deviation, beside the closed form."""
    draws = pair.draws(std)
    exact = count(ratio_scores(pair, draws), pair.coins)
    trained = count(*trained_scores(draws, pair.coins))
    mu = pair.distance / std if std > 0 else math.inf
    low, high = mu_interval(exact, confidence=confidence)
    tests = [
        *_tests(f"{pair.name}: likelihood ratio", "log likelihood ratio", exact, delta, confidence, "threshold 0"),
        *_tests(
            f"{pair.name}: trained",
            "linear classifier",
            trained,
            delta,
            confidence,
            "fitted on the first half of the draws, judged on the second",
        ),
    ]
    return ReleasePair(
        name=pair.name,
        what=pair.what,
        distance=pair.distance,
        std=std,
        mu=mu,
        epsilon=accounting.gaussian_epsilon(mu, delta),
        draws=len(pair.coins),
        mu_low=low,
        mu_high=high,
        tests=tuple(tests),
    )


def _tests(
    name: str, statistic: str, counts: Counts, delta: float, confidence: float, selection: str
) -> tuple[Test, Test]:
    total = counts.tp + counts.fn + counts.fp + counts.tn
    free = Test(
        name=name,
        statistic=statistic,
        bound="clopper-pearson",
        assumes="none",
        selection=selection,
        confidence=confidence,
        delta=delta,
        n=total,
        guesses=total,
        correct=counts.tp + counts.tn,
        epsilon_lower=clopper_pearson.epsilon_lower(counts, delta=delta, confidence=confidence),
        ceiling=clopper_pearson.ceiling(counts, delta=delta, confidence=confidence),
        decides=False,
    )
    gaussian = {
        "bound": "gdp",
        "assumes": "gaussian",
        "epsilon_lower": gdp.epsilon_lower(counts, delta=delta, confidence=confidence),
        "ceiling": gdp.ceiling(counts, delta=delta, confidence=confidence),
    }
    return free, free.model_copy(update=gaussian)


def farthest(
    model: VisionLanguageModel, start: Pixels, other: Pixels, *, rng: np.random.Generator, rounds: int = 8
) -> tuple[Pixels, Pixels]:
    """Two pictures whose fused (or, without fusion, whole) tokens are as far apart as a short search gets."""

    def features(pictures: Sequence[Pixels]) -> Floats:
        reduced = model.reduce(model.visual_tokens(pictures))
        tokens = reduced.tokens[:, -reduced.fused :] if reduced.fused else reduced.tokens
        return np.asarray(tokens.double().flatten(1).cpu().numpy())

    def away_from(fixed: Pixels) -> Callable[[list[Pixels]], Floats]:
        at = features([fixed])[0]
        return lambda pictures: np.linalg.norm(features(pictures) - at, axis=1)

    second = climb(other, away_from(start), rng=rng, rounds=rounds, width=16)
    first = climb(start, away_from(second), rng=rng, rounds=rounds, width=16)
    return first, second


def alone(unit: Unit, name: str, pixels: Pixels | None = None) -> Unit:
    """A unit of one picture: the first of `unit`, or `pixels` with its questions."""
    picture = unit.pictures[0]
    return Unit(name, (replace(picture, id=name, pixels=picture.pixels if pixels is None else pixels),))


def noiseless_tokens(path: TokenPath, unit: Unit) -> tuple[int, int]:
    """(tokens that are the same at every use, all tokens) of a unit's pictures, by using them at two steps."""
    with torch.no_grad():
        one, two = path.rows([unit], step=1).tokens, path.rows([unit], step=2).tokens
    same = (one == two).all(dim=2)
    return int(same[0].sum()), int(same.shape[1])
