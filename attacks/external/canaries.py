"""The canary game on a foreign trainer: one training, records inserted by fair coins, one score a candidate.

The score is what the trained trainer says of a candidate minus what a trainer without any candidate says before its
first step, times the regression slope between the two (attacks.scores.calibrate): the second takes out how remarkable a
candidate is by itself. Both are functions of the output and of public things, never of a coin.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.canaries import coin_frame
from attacks.external.contents import features, fingerprint, visible
from attacks.external.setting import Playing, Setting, seed_of
from attacks.external.subject import Subject
from attacks.games.played import Played
from attacks.games.reading import finite, one_kind_tests, planned
from attacks.scores import calibrate
from dpaudit import blind
from dpaudit.documents import Check, Claim
from trainers.progress import Reporter

TITLE = "canaries: one run"
STATISTIC = "score(record) after training, minus its regression on the score before"
DEFAULT_COUNT = 300
LEAST_FOR_BASELINE = 40

Floats = npt.NDArray[np.float64]


class CanaryGame:
    """Records that a fair coin of their own inserts into one training or not; drawn before and without any coin."""

    name, label, kind = "canaries", "canary game", "canary"

    def __init__(self, setting: Setting, claim: Claim) -> None:
        count = setting.options.count or DEFAULT_COUNT
        self.candidates = setting.first.canaries(count, seed_of(setting.key, "candidates"))
        heads = setting.key.uniform(count, step=0, name=self.kind, purpose="coins") < 0.5
        self.frame = coin_frame(
            (f"canary-{index:05d}", self.kind, bool(heads[index]), fingerprint(candidate))
            for index, candidate in enumerate(self.candidates)
        )
        self.guesses = planned(self.kind, count, claim, **setting.levels)

    @staticmethod
    def why_not(setting: Setting) -> str | None:
        """None when it can be played; otherwise why not."""
        return setting.no_records

    def play(self, at: Playing, confidence: float) -> tuple[Played, Claim]:
        """Train once with the heads and score all candidates."""
        members, plan = at.heads(self.kind), at.coins.plan
        scores, stated, lost = train(at.setting, self.candidates, members, at.reporter("canaries"))
        frame, claim = at.scored(self.kind, scores), at.setting.claim(stated)
        checks = [_distinct(self.candidates, at.setting.records), _blind(self.candidates, members, plan.tie_seed)]
        if lost:
            checks.append(_lost(lost, len(scores)))
        levels = {"confidence": confidence, "alpha": at.setting.options.alpha}
        tests = partial(one_kind_tests, frame, plan, claim=claim, title=TITLE, statistic=STATISTIC, **levels)
        return at.read(frame, checks, TITLE, tests), claim


def train(
    setting: Setting, candidates: Sequence[Any], members: npt.NDArray[np.bool_], reporter: Reporter
) -> tuple[Floats, float | None, int]:
    """Train once with the heads; returns the scores (m,), the eps that the trainer then states (None: none), and how
    many scores were not finite after training.

    Such a score becomes the lowest of all (+inf the highest): the model says nothing about that record.
    """
    reporter.phase(f"scoring {len(candidates)} candidates before training")
    before = finite(_scores(setting.trainer("canaries"), candidates))
    inserted = [candidate for candidate, head in zip(candidates, members, strict=True) if head]
    subject = setting.trainer("canaries", [*setting.records, *inserted])
    reporter.phase(f"training with {len(inserted)} of {len(candidates)} canaries")
    for _, indices in setting.batches(subject, "canaries", reporter):
        subject.step(indices)
    after = _scores(subject, candidates)
    # `calibrate` takes losses, where lower = was in training.
    scores = calibrate(-before, -finite(after), np.full(len(candidates), CanaryGame.kind))
    return scores, setting.stated_epsilon(subject), int((~np.isfinite(after)).sum())


def _scores(subject: Subject, candidates: Sequence[Any]) -> Floats:
    return np.array([subject.score(candidate) for candidate in candidates], dtype=np.float64)


def _lost(count: int, candidates: int) -> Check:
    """The check of scores that are not finite: some say nothing about their records, all of them nothing at all."""
    return Check(
        name="finite scores",
        status="fail" if count == candidates else "not applicable",
        measured=f"{count} of {candidates} scores after training are not finite",
        allowed="0",
        explanation="score() returns no finite number for any candidate: the model that was trained says nothing."
        if count == candidates
        else "A candidate with such a score is ranked lowest (+inf: highest): it can hide a leak, and shows none.",
    )


def _distinct(candidates: Sequence[Any], known: Sequence[Any]) -> Check:
    allowed = "no candidate equals another or a record of the training set"
    if not visible([*candidates, *known]):
        return Check(
            name="candidates differ",
            status="not applicable",
            measured="the records contain objects that dpaudit can't compare",
            allowed=allowed,
            explanation="Records of tensors, arrays, pictures, numbers and text can be compared.",
        )
    prints = [fingerprint(candidate) for candidate in candidates]
    repeated = len(prints) - len(set(prints))
    shared = len(set(prints) & {fingerprint(record) for record in known})
    return Check(
        name="candidates differ",
        status="fail" if repeated or shared else "pass",
        measured=f"{repeated} of {len(prints)} candidates repeat another, {shared} are in the training set already",
        allowed=allowed,
        explanation="A record that takes part several times is a group, and the claim is about one unit."
        if repeated or shared
        else "Every candidate takes part once or not at all, as its coin says.",
    )


def _blind(candidates: Sequence[Any], members: npt.NDArray[np.bool_], seed: int) -> Check:
    allowed = f"p > {blind.LEVEL:g} one-sided for better than chance"
    numbers = features(candidates)
    if numbers is None or len(candidates) < LEAST_FOR_BASELINE:
        few = f"{len(candidates)} candidates, at least {LEAST_FOR_BASELINE} needed"
        return Check(
            name="blind baseline",
            status="not applicable",
            measured=few if numbers is not None else "nothing to be seen in the candidates",
            allowed=allowed,
            explanation="A classifier that sees the candidates but never the model could not be fitted; membership was "
            "decided by dpaudit's own coins.",
        )
    return blind.baseline(numbers, members, rng=np.random.default_rng([seed, 2])).check()
