"""Accounted fusion under audit: is what is published the mechanism that was accounted?

- the noise of every picture is its own, keyed, and used once: the same in every step;
- no pair of inputs is told apart better than the formula allows. Under the claim each guess of a fair coin errs with
  probability at least Phi(-mu/2), mu = 1/z (zero-out) or 2/z (replace), so the number of errors over n independent
  draws is at least binomial; a count too small to believe (1e-9) refutes it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from scipy.special import ndtr

from attacks.fusion import noise
from attacks.fusion.path import TokenPath
from attacks.fusion.release import Pair, count, fair_coins, play, published_pair, ratio_scores
from dpaudit.accounting import sensitivity
from dpaudit.documents import Check, Relation, ReleasePair
from dpaudit.randomness import Key
from trainers.fusion import TokenRelease
from trainers.records import Unit

Floats = npt.NDArray[np.float64]
Units = Sequence[Unit]
Game = tuple[Pair, Relation]

LEVEL = 1e-9
ONCE = "published tokens are the same in every step"
AGREES = "published tokens tell no more than accounted"
WHY_ONCE = "Fresh noise in every step would publish each picture many times, and the noise would average out."
WHY_AGREES = (
    "Every pair of inputs is told apart at most as well as the formula says. A failure is noise of another size, "
    "clipping that does not hold, or something released beside the noise."
)


def published_name(name: str) -> str:
    """A noise check's name when it is about published tokens."""
    return name.replace("fusion noise", "published noise")


def residuals(release: TokenRelease, path: TokenPath, units: Units, *, key: Key | None = None) -> Floats:
    """(pictures, values) of the noise really published, in units of its standard deviation."""
    chosen = release if key is None else TokenRelease(release.radius, release.multiplier, key)
    rows = []
    for unit in units:
        tokens = [item.tokens for item in path.model.encoded([picture.pixels for picture in unit.pictures])]
        names = [picture.id for picture in unit.pictures]
        for plain, noisy in zip(chosen.clipped(tokens), chosen.publish(tokens, names), strict=True):
            rows.append((noisy.double() - plain.double()).flatten().cpu().numpy() / chosen.std)
    return np.stack(rows)


def audit_noise(release: TokenRelease, path: TokenPath, units: Units) -> tuple[Check, ...]:
    """Own noise for each picture, keyed, not by content, apart from the gradient noise, and used once."""
    own = residuals(release, path, units)
    doubles = noise.renamed(units)
    other = residuals(release, path, units, key=noise.another(path.key))
    with torch.no_grad():
        first, later = (path.rows(units, noisy=False, step=step).tokens for step in (1, 2))
    found = (
        noise.over_pictures([own]),
        noise.matched(noise.CONTENT, own, residuals(release, path, doubles)),
        noise.matched(noise.KEYED, own, other),
        noise.apart(path, units, [own]),
    )
    return (
        *(check.model_copy(update={"name": published_name(check.name)}) for check in found),
        Check(
            name=ONCE,
            status="pass" if torch.equal(first, later) else "fail",
            measured="bit for bit the same at two steps" if torch.equal(first, later) else "they differ",
            allowed="the same",
            explanation=WHY_ONCE,
        ),
    )


def pairs(release: TokenRelease, path: TokenPath, units: Units, *, draws: int, seed: int) -> list[Game]:
    """The games: a picture against nobody, two pictures, and the two ends of the ball, with their relations."""
    rng = np.random.default_rng(seed)
    tokens = [item.tokens.float().cpu() for item in path.model.encoded([unit.pictures[0].pixels for unit in units[:2]])]
    nobody = torch.zeros_like(tokens[0])
    end = tokens[0] / tokens[0].norm() * 2 * release.radius
    games: list[tuple[str, Relation, Sequence[torch.Tensor]]] = [
        ("a picture against none", "zero-out", (nobody, tokens[0])),
        ("two pictures", "replace", (tokens[0], tokens[1])),
        ("the two ends of the ball", "replace", (end, -end)),
    ]
    return [
        (published_pair(release, inputs, name, fair_coins(draws, rng)), relation) for name, relation, inputs in games
    ]


def audit_pairs(release: TokenRelease, games: Sequence[Game], *, delta: float) -> tuple[tuple[ReleasePair, ...], Check]:
    """Every game beside its closed form, and the check that none beats the accounted mechanism."""
    played = tuple(play(pair, release.std, delta=delta) for pair, _ in games)
    worst, text = 1.0, ""
    for pair, relation in games:
        found = count(ratio_scores(pair, pair.draws(release.std)), pair.coins)
        errors, total = found.fn + found.fp, len(pair.coins)
        mu = sensitivity(relation) / release.multiplier
        p = float(stats.binom.cdf(errors, total, ndtr(-mu / 2)))
        if p <= worst:
            worst = p
            text = f"{pair.name}: {errors} of {total} guesses wrong, {ndtr(-mu / 2):.1%} expected at least, p = {p:.2g}"
    return played, Check(
        name=AGREES,
        status="pass" if worst > LEVEL / len(games) else "fail",
        measured=text,
        allowed=f"p > {LEVEL / len(games):.1g}",
        explanation=WHY_AGREES,
    )
