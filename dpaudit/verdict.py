"""Derives the verdict of an audit, and its reasons, from the games, the contract checks and the ledger.

This is the only module that compares evidence with a level.

Evidence. Each test has a share of the error budget, fixed when the coins of its game are drawn, whether or not the game
is played afterwards. The share-weighted sum of the e-values of all games on one set of coins, plus the share that is
not staked, is therefore an e-value itself; a game that is not played contributes 0. Sets of coins that are drawn
independently multiply: the product over sets, in the order in which they were begun, is bounded by a nonnegative
supermartingale that starts at 1. (Playing a further game on old coins only increases a sum, which stays below the sum
over all games on these coins.) By Ville's inequality the product ever reaches 1 / alpha with probability at most alpha
while the claim holds. A correct claim is thus refuted with probability at most alpha, no matter how often it is audited
and when the auditor stops.

Bounds. The bounds of the k-th game hold jointly with confidence 1 - (1 - confidence) / 2^k (`confidence_of`), so the
bounds of all games hold jointly with the confidence of the document, however many games are played. They inform and
never refute a claim: their confidence is far below 1 - alpha.

An audit can refute a claim; it can never prove privacy. "not refuted" requires a test whose power a control earned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpaudit.documents import (
    ABOUT,
    WITHOUT_COINS,
    AuditDocument,
    Check,
    Claim,
    GameDocument,
    GameEntry,
    LedgerRow,
    RunInfo,
    ScoresDocument,
    Test,
    Validity,
    Verdict,
)

POWER_NEEDED = 0.8
NO_CONTROL = "no control shows that its scores carry a signal"
CERTAIN = 0.999  # a p-value this near to 1 contradicts a high power: the channel is not what the power assumes
HEADLINE = ("none", "claimed-mechanism")  # what a headline bound may assume
UNDER_TEST = "trainer under test"  # RunInfo.method of training code that dpaudit did not write
UNSEEN = (
    "Not looked at: the update rule, the accounting, the independence of the sampler's draws, saved states, how single "
    "records are clipped (gradient canaries go through inject). dpaudit check, or audit-trainer with no game, does."
)
MISSING_CLAIM = "missing claim"  # the row of a run without the claim that its configuration or its games name


@dataclass(frozen=True)
class Evidence:
    """Log evidence in the order of play.

    games: the evidence of each game alone. products: the product over all sets of coins, up to and including each game.
    """

    games: tuple[float, ...]
    products: tuple[float, ...]

    @property
    def best(self) -> float:
        """The largest log product reached so far; 0 if no game was played."""
        return max((0.0, *self.products))


def confidence_of(number: int, confidence: float) -> float:
    """Joint confidence of the bounds of one game, so that those of all games hold jointly with `confidence`.

    number: the position of the game in the order of play, from 1.
    """
    return 1.0 - (1.0 - confidence) / 2.0**number


def wanted(share: float, alpha: float) -> float:
    """The e-value at which a test with this share of the error budget refutes on its own."""
    return 1.0 / (alpha * share)


def refutes(log_evidence: float, alpha: float) -> bool:
    """Whether the evidence has reached 1 / alpha, which is a refutation at level alpha by Ville's inequality."""
    return log_evidence >= -math.log(alpha)


def level(games: Sequence[GameDocument]) -> float:
    """The level of a verdict over several games: the largest level at which one of them was played."""
    return max(game.alpha for game in games)


def reached(p_value: float, alpha: float) -> bool:
    """Whether an anytime-valid p-value has reached the level, so that further trials can't change the verdict."""
    return p_value <= alpha


def counts(test: Test) -> bool:
    """Whether a test contributes to the verdict."""
    return test.decides and not test.estimate and test.e_value is not None


def powerful(test: Test) -> bool:
    """Whether a test that contributes to the verdict has earned the power that "not refuted" requires."""
    return counts(test) and test.power_low is not None and test.power_low >= POWER_NEEDED


def marked(tests: Sequence[Test], alpha: float) -> tuple[Test, ...]:
    """The tests with `level` and `refutes` filled in; power is withdrawn where a test's own p-value contradicts it."""
    found = []
    for test in tests:
        update: dict[str, object] = {"level": None, "refutes": None}
        if counts(test):
            assert test.e_value is not None
            update = {"level": alpha * test.share, "refutes": test.share * float(test.e_value) >= 1.0 / alpha}
        if test.power is not None and test.p_value is not None and test.p_value > CERTAIN:
            update |= {
                "power": None,
                "power_low": None,
                "control": f"withdrawn: p = {test.p_value:.4f} contradicts it; the channel is not the claimed one",
            }
        found.append(test.model_copy(update=update))
    return tuple(found)


def evidence(games: Sequence[GameDocument]) -> Evidence:
    """The evidence of games that are given in the order of play."""
    own, products, sums, staked_shares = [], [], dict[str, float](), dict[str, float]()
    for game in games:
        staked = [test for test in game.tests if counts(test)] if game.validity.sound else []
        total = sum(test.share * float(test.e_value or 0.0) for test in staked)
        own.append(_log(game.kept + total) if staked else 0.0)
        if staked:
            coins = f"{game.coins_sha256 or game.name}: {game.coins}"
            sums[coins] = sums.get(coins, game.kept) + total
            staked_shares[coins] = staked_shares.get(coins, game.kept) + sum(test.share for test in staked)
        # Shares add up to more than 1 only if a game was recorded twice; a weighted mean is still an e-value.
        products.append(sum(_log(value / max(1.0, staked_shares[coins])) for coins, value in sums.items()))
    return Evidence(tuple(own), tuple(products))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def decide(
    *,
    claim: Claim | None,
    alpha: float,
    games: Sequence[GameDocument],
    ledger: Sequence[LedgerRow] = (),
    checks: Sequence[Check] = (),
) -> tuple[Verdict, tuple[str, ...]]:
    """Decides the verdict and gives the reasons as sentences.

    Precedence: invalid > refuted > unsupported > inconclusive > not refuted. Without a claim the verdict is "no claim"
    (or "invalid"), unless the ledger has the row MISSING_CLAIM.

    ledger: the rows of the *training*; UNACCOUNTED, like a broken control, makes the claim unsupported. checks: of the
    step contract.
    """
    unsound = [check for game in games for check in game.validity.checks if check.status == "fail"]
    if unsound or any(not game.validity.sound for game in games):
        failed = [f"{check.name}: {check.explanation}" for check in unsound]
        return "invalid", ("The game itself is unsound, so its numbers mean nothing.", *dict.fromkeys(failed))
    if claim is None and all(row.path != MISSING_CLAIM for row in ledger):
        return "no claim", ("The run makes no privacy claim, so there is none to refute.",)
    found = evidence(games)
    gaps = _gaps(ledger, checks, games)
    if refutes(found.best, alpha):
        return "refuted", (*_refutation(found, games, alpha), *gaps)
    if gaps or claim is None:
        return "unsupported", ("The proof behind the claim does not apply to what the code does.", *gaps)
    tests = [test for game in games if _speaks_of(claim, game) for test in marked(game.tests, alpha) if counts(test)]
    powered = [test for test in tests if powerful(test)]
    above = [test for game in games for test in game.tests if _above(test, claim)]
    if above:
        shown = "; ".join(f"{t.name}: eps >= {float(t.epsilon_lower or 0):.3g} at {t.confidence:.4g}" for t in above)
        return "inconclusive", (
            f"A bound lies above the claimed eps, at a confidence too low to refute by itself ({shown}): more evidence "
            "is needed, a game with fresh coins or more records.",
        )
    if powered:
        names = "; ".join(
            dict.fromkeys(f"{test.name}: power {test.power:.0%}, earned by {test.control}" for test in powered)
        )
        sought = dict.fromkeys(
            game.alternative for game in games if game.alternative and any(map(powerful, game.tests))
        )
        wrong = " or ".join(sought) or "the stated wrong claim"
        return "not refuted", (
            f"No test refuted the claim, and a test that could have found this was run: {wrong} ({names}).",
            "This is no proof of privacy.",
        )
    return "inconclusive", _why_inconclusive(games, tests)


def _above(test: Test, claim: Claim) -> bool:
    """Whether a bound that may be the headline lies above the claimed eps, at the confidence of that bound."""
    fits = test.decides and not test.estimate and test.assumes in HEADLINE and test.delta >= claim.delta * (1 - 1e-9)
    return fits and test.epsilon_lower is not None and float(test.epsilon_lower) > float(claim.epsilon)


def _speaks_of(claim: Claim, game: GameDocument) -> bool:
    """Whether a game was played against this claim, on something that this audit trained or scored itself."""
    theirs = game.claim
    return (
        not game.supplied
        and theirs is not None
        and (theirs.epsilon, theirs.delta, theirs.relation) == (claim.epsilon, claim.delta, claim.relation)
    )


def _refutation(found: Evidence, games: Sequence[GameDocument], alpha: float) -> tuple[str, ...]:
    at = next(place for place, value in enumerate(found.products) if refutes(value, alpha))
    played = f"after {at + 1} games" if at else "in the first game"
    if len(games) == 1:
        played = "in the game"
    reasons = [f"Evidence against the claim reached {_power_of_ten(found.best)}; {1 / alpha:g} refutes it ({played})."]
    for game in games:
        for test in marked(game.tests, alpha):
            if test.refutes:
                shown = "" if test.p_value is None else f", p = {test.p_value:.2g}"
                # Which model a score file comes from is not known; the name of the test names the file.
                where = "" if game.game == "scores" else f" ({ABOUT[game.about]})"
                reasons.append(f"{test.name}: e = {float(test.e_value or 0):.3g}{shown}{where}.")
    return tuple(dict.fromkeys(reasons))


def _power_of_ten(log: float) -> str:
    if log == math.inf:
        return "more than 10^300"
    return f"{math.exp(log):,.0f}" if log < 14 else f"10^{log / math.log(10):.0f}"


def _gaps(ledger: Sequence[LedgerRow], checks: Sequence[Check], games: Sequence[GameDocument]) -> tuple[str, ...]:
    rows = [f"UNACCOUNTED: {row.path}: {row.explanation}" for row in ledger if row.status == "UNACCOUNTED"]
    failed = [
        f"Contract check failed: {check.name}: measured {check.measured}, allowed {check.allowed}."
        for check in checks
        if check.status == "fail" and check.waived is None
    ]
    found = [c for game in games for c in game.controls if c.broken]
    shown = [f"Control broken: {c.name}: measured {c.measured}, allowed {c.allowed}: {c.explanation}" for c in found]
    return tuple(dict.fromkeys((*rows, *shown, *failed)))


def _why_inconclusive(games: Sequence[GameDocument], tests: Sequence[Test]) -> tuple[str, ...]:
    if not tests:
        return ("No test that may decide was run.",)
    reasons = ["Nothing was refuted, but no test was shown to be able to find the wrong claim: treat it as untested."]
    for test in tests:
        if test.power is None:
            reasons.append(f"{test.name}: no power is stated ({test.control or NO_CONTROL}).")
        else:
            reasons.append(f"{test.name}: power {test.power:.0%}, at least {POWER_NEEDED:.0%} needed.")
    if any(game.supplied for game in games):
        reasons.append(
            "A game was played on a twin that was supplied and not trained by this audit: it earns no power."
        )
    return tuple(dict.fromkeys(reasons))


def document(
    *,
    run: RunInfo,
    claim: Claim | None,
    alpha: float,
    confidence: float,
    games: Sequence[GameDocument],
    ledger: Sequence[LedgerRow] = (),
    checks: Sequence[Check] = (),
) -> AuditDocument:
    """Assembles the audit document from all games, given in the order of play.

    The result depends on nothing but the arguments. checks: validity checks besides those of the games.
    """
    contracts = [game.contract for game in games if game.contract is not None]
    fusions = [game.fusion for game in games if game.fusion is not None]
    judged = [check for contract in contracts for check in contract.checks]
    verdict, reasons = decide(claim=claim, alpha=alpha, games=games, ledger=ledger, checks=judged)
    found = evidence(games)
    played = [game for game in games if game.game not in WITHOUT_COINS]
    abouts = {game.about for game in played} or {"weights"}
    sayings = (
        []
        if claim is None
        else [
            f"{', '.join(dict.fromkeys(g.game for g in played if g.about == about))}: speaks of {ABOUT[about]}."
            for about in ("weights", "procedure")
            if about in abouts and played
        ]
    )
    if len(played) > 1:
        sayings.append(f"{len(played)} games were played in all; their evidence is counted together.")
    if run.method == UNDER_TEST and played and not contracts:
        sayings.append(UNSEEN)
    latest = next((game.alternative for game in reversed(games) if game.alternative), None)
    return AuditDocument(
        verdict=verdict,
        reasons=(*reasons, *sayings),
        claim=claim,
        alternative=latest,
        alpha=alpha,
        family_confidence=confidence,
        games=tuple(
            GameEntry(
                name=game.name,
                game=game.game,
                sha256=game.sha256(),
                about=game.about,
                claim=game.claim,
                alternative=game.alternative,
                coins_sha256=game.coins_sha256,
                sound=game.validity.sound,
                supplied=game.supplied,
                log_evidence=own,
                log_product=product,
                power=max((test.power for test in marked(game.tests, alpha) if test.power is not None), default=None),
            )
            for game, own, product in zip(games, found.games, found.products, strict=True)
        ),
        log_evidence=found.best if any(counts(test) for game in games for test in game.tests) else None,
        tests=tuple(test for game in games for test in marked(game.tests, alpha)),
        validity=Validity(
            sound=all(game.validity.sound for game in games),
            checks=(*checks, *dict.fromkeys(check for game in games for check in game.validity.checks)),
        ),
        controls=tuple(control for game in games for control in game.controls),
        ledger=tuple(ledger),
        fusion=fusions[-1] if fusions else None,
        contract=contracts[-1] if contracts else None,
        scores=_latest(games, "scores"),
        gallery=_latest(games, "gallery"),
        attacks=_latest(games, "attacks"),
        exposure=_latest(games, "exposure"),
        regeneration=_latest(games, "regeneration"),
        run=run.model_copy(update={"about": "weights" if abouts == {"weights"} else "procedure"}),
    )


def _latest(games: Sequence[GameDocument], field: str) -> tuple:  # type: ignore[type-arg]
    """The entries of `field` from the latest game of each kind, so that repeated games don't repeat their figures."""
    last = {game.game: getattr(game, field) for game in games if getattr(game, field)}
    return tuple(item for shown in last.values() for item in shown)


def headline(document: AuditDocument | ScoresDocument) -> Test | None:
    """The best bound that assumes nothing or only the claimed mechanism; None if there is none.

    Taking the best of several bounds is valid because they hold jointly (`confidence_of`). In documents of version 1
    bounds may not share an error budget; the first one is returned then.
    """
    bounds = _headlines(document)
    if not bounds:
        return None
    return max(bounds, key=lambda test: float(test.epsilon_lower or 0.0)) if _fit(document, bounds) else bounds[0]


def headline_confidence(document: AuditDocument | ScoresDocument) -> float | None:
    """Confidence of the headline bound: the joint confidence of all bounds, since the headline is the best of them."""
    bounds = _headlines(document)
    if not bounds:
        return None
    return document.family_confidence if _fit(document, bounds) else bounds[0].confidence


def _headlines(document: AuditDocument | ScoresDocument) -> list[Test]:
    return [
        test
        for test in document.tests
        if test.epsilon_lower is not None and test.decides and not test.estimate and test.assumes in HEADLINE
    ]


def _fit(document: AuditDocument | ScoresDocument, bounds: Sequence[Test]) -> bool:
    return sum(1 - test.confidence for test in bounds) <= 1 - document.family_confidence + 1e-9


def within_mechanism(document: AuditDocument | ScoresDocument) -> Test | None:
    """The best bound that assumes DP-SGD with the claimed q and T; None if there is none."""
    return best_within(document.tests)


def best_within(tests: Sequence[Test]) -> Test | None:
    """The same for a selection of tests, for example those of one game."""
    bounds = [test for test in tests if test.epsilon_lower is not None and test.assumes == "dp-sgd(q,T)"]
    exact = [test for test in bounds if test.bound in ("exact likelihood", "chi-square")]
    return max(exact or bounds[:1], key=lambda test: float(test.epsilon_lower or 0.0), default=None)


def highest_ceiling(document: AuditDocument | ScoresDocument) -> float | None:
    """The largest bound that the headline tests could have shown; None if there is none, or if one has no ceiling."""
    found = [None if test.ceiling is None else float(test.ceiling) for test in _headlines(document)]
    return None if not found or None in found else max(value for value in found if value is not None)


def exceeds(document: AuditDocument | ScoresDocument, epsilon: float) -> bool:
    """Whether the headline bound lies above `epsilon`, the threshold of a gate."""
    best = headline(document)
    return best is not None and best.epsilon_lower is not None and float(best.epsilon_lower) > epsilon
