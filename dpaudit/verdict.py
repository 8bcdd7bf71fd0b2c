"""The judge: games, token path, contract and ledger in, verdict and reasons out. Nothing else compares with a level.

Evidence. The tests of games that share coins have shares that were fixed with the coins, whether or not a game is
played, so their weighted sum (with what was not staked) is an e-value of that set of coins; a game that is not played
counts 0. Sets of coins that were tossed independently multiply: the product over sets, in the order in which they were
begun, is at most a nonnegative supermartingale that starts at 1 (a sum only grows when a further game on old coins is
played, and is at most the sum over all its games). By Ville's inequality it ever reaches 1 / alpha with probability at
most alpha while the claim holds, so whoever audits again and again and stops when they like refutes a correct claim
with probability at most alpha.

Bounds. The bounds of game number k have together the confidence 1 - (1 - confidence) / 2^k (`confidence_of`), so all
bounds of all audits hold at once with the document's confidence, however many games are played. Bounds inform; they
never refute by themselves, because their confidence is far below 1 - alpha.

An audit can refute a claim; it can never prove privacy. "Not refuted" needs a test whose power was earned by a control.
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
    "Not looked at: the update rule, the accounting, the independence of the sampler's draws, saved states (dpaudit "
    "check, or dpaudit audit-trainer without naming a game, looks at them)."
)
MISSING_CLAIM = "missing claim"  # the row of a run without the claim that its configuration or its games name


@dataclass(frozen=True)
class Evidence:
    """The evidence after each game: of the game itself, and the product over sets of coins up to it (logs)."""

    games: tuple[float, ...]
    products: tuple[float, ...]

    @property
    def best(self) -> float:
        """Largest log product at any moment; 0 before the first game."""
        return max((0.0, *self.products))


def confidence_of(number: int, confidence: float) -> float:
    """Confidence of all bounds of game `number` (from 1) together, when `confidence` is that of all games ever
    played."""
    return 1.0 - (1.0 - confidence) / 2.0**number


def wanted(share: float, alpha: float) -> float:
    """The e-value with which a test of this share refutes by itself."""
    return 1.0 / (alpha * share)


def refutes(log_evidence: float, alpha: float) -> bool:
    """Whether evidence has reached 1 / alpha, which Ville's inequality makes a refutation at level alpha."""
    return log_evidence >= -math.log(alpha)


def level(games: Sequence[GameDocument]) -> float:
    """The level of a verdict over games: the largest that one of them was played at."""
    return max(game.alpha for game in games)


def reached(p_value: float, alpha: float) -> bool:
    """Whether an anytime-valid p-value has reached the level, so that more trials could change nothing."""
    return p_value <= alpha


def counts(test: Test) -> bool:
    """Whether a test has a part in the verdict."""
    return test.decides and not test.estimate and test.e_value is not None


def powerful(test: Test) -> bool:
    """Whether a deciding test has earned the power that "not refuted" needs."""
    return counts(test) and test.power_low is not None and test.power_low >= POWER_NEEDED


def marked(tests: Sequence[Test], alpha: float) -> tuple[Test, ...]:
    """The tests with level, `refutes`, and power withdrawn where their own p-value contradicts it."""
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
    """Of games in the order of play."""
    own, products, sums, staked_shares = [], [], dict[str, float](), dict[str, float]()
    for game in games:
        staked = [test for test in game.tests if counts(test)] if game.validity.sound else []
        total = sum(test.share * float(test.e_value or 0.0) for test in staked)
        own.append(_log(game.kept + total) if staked else 0.0)
        if staked:
            coins = f"{game.coins_sha256 or game.name}: {game.coins}"
            sums[coins] = sums.get(coins, game.kept) + total
            staked_shares[coins] = staked_shares.get(coins, game.kept) + sum(test.share for test in staked)
        # Shares above 1 can only come from one game recorded twice: a weighted mean is still an e-value.
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
    """The verdict and its reasons, in plain sentences.

    Precedence: invalid > refuted > unsupported > inconclusive > not refuted; without a claim "no claim" (or invalid),
    unless the ledger holds the row MISSING_CLAIM.
    ledger: rows of the *training*; UNACCOUNTED ones make the claim unsupported. checks: of the step contract.
    """
    unsound = [check for game in games for check in game.validity.checks if check.status == "fail"]
    if unsound or any(not game.validity.sound for game in games):
        failed = [f"{check.name}: {check.explanation}" for check in unsound]
        return "invalid", ("The game itself is unsound, so its numbers mean nothing.", *dict.fromkeys(failed))
    if claim is None and all(row.path != MISSING_CLAIM for row in ledger):
        return "no claim", ("The run makes no privacy claim, so there is none to refute.",)
    found = evidence(games)
    gaps = _gaps(ledger, checks)
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
            f"A bound lies above the claimed eps, at a confidence too low to refute by itself ({shown}): audit again "
            "with fresh coins.",
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
    """Whether a bound that may stand as a headline contradicts the claim at its own confidence."""
    fits = test.decides and not test.estimate and test.assumes in HEADLINE and test.delta >= claim.delta * (1 - 1e-9)
    return fits and test.epsilon_lower is not None and float(test.epsilon_lower) > float(claim.epsilon)


def _speaks_of(claim: Claim, game: GameDocument) -> bool:
    """Whether a game was played against this claim, and not on what somebody else supplied."""
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
                # What a file of scores speaks of is not known; the name of the test says which file.
                where = "" if game.game == "scores" else f" ({ABOUT[game.about]})"
                reasons.append(f"{test.name}: e = {float(test.e_value or 0):.3g}{shown}{where}.")
    return tuple(dict.fromkeys(reasons))


def _power_of_ten(log: float) -> str:
    if log == math.inf:
        return "more than 10^300"
    return f"{math.exp(log):,.0f}" if log < 14 else f"10^{log / math.log(10):.0f}"


def _gaps(ledger: Sequence[LedgerRow], checks: Sequence[Check]) -> tuple[str, ...]:
    rows = [f"UNACCOUNTED: {row.path}: {row.explanation}" for row in ledger if row.status == "UNACCOUNTED"]
    failed = [
        f"Contract check failed: {check.name}: measured {check.measured}, allowed {check.allowed}."
        for check in checks
        if check.status == "fail" and check.waived is None
    ]
    return tuple(dict.fromkeys((*rows, *failed)))


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
    """The audit of all games in the order of play: a pure function of its arguments. checks: further ones of
    validity."""
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
    """What the latest game of each kind shows; repeated games would show the same figures many times."""
    last = {game.game: getattr(game, field) for game in games if getattr(game, field)}
    return tuple(item for shown in last.values() for item in shown)


def headline(document: AuditDocument | ScoresDocument) -> Test | None:
    """The best bound that assumes nothing, or only the claimed mechanism; None without one.

    The best of several is valid because all bounds hold at once (`confidence_of`); where version 1 documents did not
    share one error budget, the first stands instead.
    """
    bounds = _headlines(document)
    if not bounds:
        return None
    return max(bounds, key=lambda test: float(test.epsilon_lower or 0.0)) if _fit(document, bounds) else bounds[0]


def headline_confidence(document: AuditDocument | ScoresDocument) -> float | None:
    """Confidence of the headline bound: that of all bounds together, since it is the best of them."""
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
    """The best bound within DP-SGD of the claimed q and T; None without one."""
    return best_within(document.tests)


def best_within(tests: Sequence[Test]) -> Test | None:
    """The same of some tests, such as those of one game."""
    bounds = [test for test in tests if test.epsilon_lower is not None and test.assumes == "dp-sgd(q,T)"]
    exact = [test for test in bounds if test.bound in ("exact likelihood", "chi-square")]
    return max(exact or bounds[:1], key=lambda test: float(test.epsilon_lower or 0.0), default=None)


def highest_ceiling(document: AuditDocument | ScoresDocument) -> float | None:
    """The largest bound that the headline tests could have shown; None without one, or where one has no ceiling."""
    found = [None if test.ceiling is None else float(test.ceiling) for test in _headlines(document)]
    return None if not found or None in found else max(value for value in found if value is not None)


def exceeds(document: AuditDocument | ScoresDocument, epsilon: float) -> bool:
    """Whether the headline bound lies above a gate's eps."""
    best = headline(document)
    return best is not None and best.epsilon_lower is not None and float(best.epsilon_lower) > epsilon
