"""The canary game on a foreign trainer: one training, records inserted by fair coins, one score a candidate.

The score is what the trained trainer says of a candidate minus what a trainer without any candidate says before its
first step, times the regression slope between the two (attacks.scores.calibrate): the second takes out how remarkable a
candidate is by itself. Both are functions of the output and of public things, never of a coin.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from attacks.external.contents import features, fingerprint, visible
from attacks.external.setting import Setting, seed_of
from attacks.external.subject import Subject
from attacks.games.reading import finite
from attacks.scores import calibrate
from dpaudit import blind
from dpaudit.documents import Check
from dpaudit.randomness import Key
from trainers.progress import Reporter

KIND = "canary"
TITLE = "canaries: one run"
STATISTIC = "score(record) after training, minus its regression on the score before"
DEFAULT_COUNT = 300
LEAST_FOR_BASELINE = 40

Floats = npt.NDArray[np.float64]


def draw(setting: Setting, count: int) -> list[Any]:
    """The candidates, drawn before and without any coin."""
    return setting.first.canaries(count, seed_of(setting.key, "candidates"))


def coins(key: Key, candidates: Sequence[Any]) -> pd.DataFrame:
    """One fair, independent coin a candidate: id, kind, member, content."""
    heads = key.uniform(len(candidates), step=0, name=KIND, purpose="coins") < 0.5
    return pd.DataFrame(
        {
            "id": [f"canary-{index:05d}" for index in range(len(candidates))],
            "kind": KIND,
            "member": heads,
            "content": [fingerprint(candidate) for candidate in candidates],
        }
    )


def play(
    setting: Setting, candidates: Sequence[Any], members: npt.NDArray[np.bool_], reporter: Reporter
) -> tuple[Floats, float | None]:
    """Train once with the heads; returns the scores (m,) and the eps that the trainer then states (None: none).

    A score that is not finite after training becomes the lowest of all: such a model says nothing about a record.
    """
    reporter.phase(f"scoring {len(candidates)} candidates before training")
    before = _scores(setting.trainer("canaries"), candidates)
    inserted = [candidate for candidate, head in zip(candidates, members, strict=True) if head]
    subject = setting.trainer("canaries", [*setting.records, *inserted])
    reporter.phase(f"training with {len(inserted)} of {len(candidates)} canaries")
    for _, indices in setting.batches(subject, "canaries", reporter):
        subject.step(indices)
    after = _scores(subject, candidates)
    # `calibrate` takes losses, where lower = was in training.
    return calibrate(-before, -after, np.full(len(candidates), KIND)), setting.stated_epsilon(subject)


def _scores(subject: Subject, candidates: Sequence[Any]) -> Floats:
    return finite(np.array([subject.score(candidate) for candidate in candidates]))


def checks(candidates: Sequence[Any], members: npt.NDArray[np.bool_], known: Sequence[Any], seed: int) -> list[Check]:
    """Whether this is a game at all: candidates differ from each other and from the records; the blind baseline."""
    return [_distinct(candidates, known), _blind(candidates, members, seed)]


def _distinct(candidates: Sequence[Any], known: Sequence[Any]) -> Check:
    allowed = "no candidate equals another or a record of the training set"
    if not visible([*candidates, *known]):
        return Check(
            name="candidates differ",
            status="not applicable",
            measured="the records hold objects that dpaudit can't look into",
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
        explanation="A record that takes part several times is a group, and the claim speaks of one unit."
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
