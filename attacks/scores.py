"""Scores of canaries: how much lower a candidate's loss is than the base model leads to expect, joined by id.

score = b * (loss of the base model) - (loss of the fine-tuned one), both on the candidate's own questions: the mean
over questions of the mean over that question's own answer tokens, exactly the loss that training lowers. The base
model takes out how hard a candidate is, as far as it knows: b is the slope, between 0 and 1, with which its losses
predict the fine-tuned model's within one kind. For records near the base model's training data b is about 1 (the usual
reference-model attack); for canaries whose base loss is only noise (a token never seen) it is about 0, where a fixed
b = 1 costs much of the signal (measured on new-token canaries: AUC 0.73 instead of 0.98). Higher = "was in training".
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attacks.canaries import Game
from dpaudit import atomic
from dpaudit.errors import InvalidGame
from dpaudit.runs import RunFolder
from trainers.gradients import unit_losses
from trainers.inputs import UnitInputs
from trainers.records import Unit
from trainers.run import load_model, read_config
from trainers.vlm import VisionLanguageModel

STATISTIC = "b loss(base) - loss(model), b fitted per canary kind"
ROWS_AT_ONCE = 64
Floats = npt.NDArray[np.float64]

# For normal scores the median absolute deviation is 0.6745 standard deviations.
_MAD_OF_NORMAL = 0.6745


@torch.no_grad()
def losses(model: VisionLanguageModel, units: Sequence[Unit]) -> Floats:
    """(U,) loss of each unit under `model` with its reducer, without fusion noise."""
    inputs = UnitInputs(model, units)
    parts = [
        unit_losses(model, inputs.select(chunk)).double().cpu().numpy()
        for chunk in inputs.chunks(range(len(units)), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def loss_scores(run: RunFolder, game: Game, *, device: str = "auto") -> pd.DataFrame:
    """One row a candidate: id, kind, member, score. Raises InvalidGame for a score that is not finite.

    Both models see the picture through the run's own reducer, the base model without the adapter.
    """
    units = [canary.unit for canary in game.candidates]
    before = losses(load_model(None, device, config=read_config(run)), units)
    after = losses(load_model(run, device), units)
    kinds = np.array([canary.kind for canary in game.candidates])
    scores = pd.DataFrame({"id": [canary.id for canary in game.candidates], "score": calibrate(before, after, kinds)})
    return join_coins(scores, game.frame())


def calibrate(before: Floats, after: Floats, kinds: npt.NDArray[np.str_]) -> Floats:
    """(m,) b * before - after with b the least-squares slope of `after` on `before` within each kind, cut to [0, 1].

    The slope is fitted on all candidates, members or not: a function of losses and kinds without the coins, which the
    one-run theorem allows any guesser.
    """
    out = np.empty_like(after)
    for kind in np.unique(kinds):
        mine = kinds == kind
        x, y = before[mine] - before[mine].mean(), after[mine] - after[mine].mean()
        spread = float(x @ x)
        slope = float(np.clip(x @ y / spread, 0.0, 1.0)) if spread > 0 else 0.0
        out[mine] = slope * before[mine] - after[mine]
    return out


def join_coins(scores: pd.DataFrame, coins: pd.DataFrame) -> pd.DataFrame:
    """Scores (columns id, score) with the coins (id, kind, member) of the same ids, in the order of the coins.

    Raises InvalidGame for a missing, doubled or foreign id and for a score that is not finite.
    """
    doubled = scores.loc[scores["id"].duplicated(), "id"]
    if len(doubled):
        raise InvalidGame(f"scores: {len(doubled)} ids occur twice, the first is {doubled.iloc[0]!r}")
    foreign = sorted(set(scores["id"]) - set(coins["id"]))
    if foreign:
        raise InvalidGame(f"scores: {len(foreign)} ids have no coin, the first is {foreign[0]!r}")
    missing = sorted(set(coins["id"]) - set(scores["id"]))
    if missing:
        raise InvalidGame(f"scores: {len(missing)} ids of the coin file have no score, the first is {missing[0]!r}")
    joined = coins[["id", "kind", "member"]].merge(scores[["id", "score"]], on="id", validate="one_to_one")
    bad = joined.loc[~np.isfinite(joined["score"].to_numpy(dtype=np.float64)), "id"]
    if len(bad):
        raise InvalidGame(f"scores: {len(bad)} are not finite, the first is that of {bad.iloc[0]!r}")
    return joined


def save_scores(run: RunFolder, frame: pd.DataFrame) -> None:
    """Write private/scores.parquet: exact losses of single records are never released."""
    atomic.write_frame(run.scores, frame, mode=0o600)


def standardise(frame: pd.DataFrame) -> Floats:
    """(m,) scores on a common scale over kinds: (score - median of its kind) / robust spread of its kind.

    Kinds differ in scale (a code word of many tokens loses more than a yes), so raw scores would fill the top ranks
    with one kind. Median and median absolute deviation are taken over all candidates of the kind, members or not: a
    function of scores and kinds without the coins. The one-run theorem allows any guesser that doesn't see the coins,
    so the bound stays valid.
    """
    scores = frame["score"].to_numpy(dtype=np.float64)
    kinds = frame["kind"].to_numpy()
    out = np.empty_like(scores)
    for kind in np.unique(kinds):
        mine = kinds == kind
        centred = scores[mine] - np.median(scores[mine])
        spread = np.median(np.abs(centred)) / _MAD_OF_NORMAL
        if spread == 0:  # more than half of the scores are equal
            spread = np.mean(np.abs(centred)) or 1.0
        out[mine] = centred / spread
    return out


def prioritise(frame: pd.DataFrame, guesses: Mapping[str, tuple[int, int]], rng: np.random.Generator) -> Floats:
    """(m,) scores whose largest and smallest are exactly the planned guesses of every kind.

    guesses: (top, bottom) per kind; `rng` orders equal scores of a kind, so that the order of the file can't.
    Within a kind the order of scores is kept; the i-th largest of a kind that guesses `top` gets top / i, so the
    candidates at 1 and above are the kinds' own top guesses together (and likewise at -1 and below). A function of
    scores, kinds and the plan, never of the coins.
    """
    scores = frame["score"].to_numpy(dtype=np.float64)
    kinds = frame["kind"].to_numpy()
    out = np.zeros(len(frame))
    for kind in np.unique(kinds):
        mine = rng.permutation(np.flatnonzero(kinds == kind))
        top, bottom = guesses[str(kind)]
        order = mine[np.argsort(-scores[mine], kind="stable")]
        place = np.arange(1, len(mine) + 1)
        from_top, from_bottom = top / place, bottom / place[::-1]
        inner = 0.5 - place / (len(mine) + 1)  # the rest, in order, strictly inside (-1, 1)
        out[order] = np.where(from_top >= 1, from_top, np.where(from_bottom >= 1, -from_bottom, inner))
    return out
