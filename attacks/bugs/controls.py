"""Correct trainers of different build: no check may alarm on any of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attacks.bugs import correct, correct_opacus, correct_updates
from attacks.bugs.benchmark import ControlRow
from attacks.bugs.game import release_game
from attacks.contract import run_checks, verdict
from attacks.contract.influence import Bench
from attacks.contract.probe import Probe
from trainers.adapters import compact, foreign, vlm, zeroth_order


@dataclass(frozen=True)
class Control:
    """A correct trainer of some build."""

    name: str
    factory: Callable[..., Any]
    slow: bool = False


CONTROLS: tuple[Control, ...] = (
    Control("dp-sgd", compact.dp_sgd),
    Control("dp-sgd, blocks pruned by the noisy gradient", compact.pruned),
    Control("dp-adam", compact.adam),
    Control("fixed-size batches, claimed as such", compact.fixed_size),
    Control("shuffled epochs, claimed as such", compact.shuffled),
    Control("random allocation, one of ten steps", compact.allocated),
    Control("random allocation, two of twenty steps", correct.AllocatedTwice),
    Control("full batch", compact.full_batch),
    Control("laplace noise, L1 clipping", compact.laplace),
    Control("dp-zo (zeroth-order)", zeroth_order.dp_zo),
    Control("opacus loop", foreign.opacus),
    Control("hugging face trainer", foreign.hugging_face, slow=True),
    Control("vision-language dp-sgd", vlm.dp_sgd, slow=True),
    Control("vision-language dual-priv", vlm.dual_priv, slow=True),
    # what looks suspicious and is not
    Control("gradient accumulation, noise once", correct.Accumulated),
    Control("opacus loop with a memory manager", correct_opacus.Managed),
    Control("bf16 autocast", correct.Autocast),
    Control("float64 sums", correct.DoublePrecision),
    Control("noise in four workers' shares", correct.SharesOfNoise),
    Control("torch generator seeded by the system", correct.SystemSeeded),
    Control("tied head, whole norm", correct.TiedHead),
    Control("a budget of C / 2 a block", correct.BlockBudgets),
    Control("augmentations averaged inside the unit", correct.AugmentedInside),
    Control("dropout by a public mask a step", correct.StepDropout),
    Control("replace-one, accounted as such", correct.ReplaceOne),
    Control("poisson by size and subset, unsorted", correct.SizeThenSubset),
    Control("poisson by geometric gaps", correct.GeometricGaps),
    Control("poisson over public slots, reversed", correct.PublicSlots),
    Control("nesterov momentum 0.9", correct_updates.Nesterov),
    Control("adamw, weight decay", correct_updates.AdamW),
    Control("warm-up and cosine of the learning rate", correct_updates.WarmUp),
    Control("sign of the noisy gradient", correct_updates.SignOfNoisy),
    Control("error feedback of the noisy gradient", correct_updates.NoisyFeedback),
    Control("learning rate by the noisy gradient", correct_updates.RateFollowsNoisy),
    Control("moving average of noisy weights", correct_updates.Averaged),
    Control("polyak averaging that starts late", correct_updates.LatePolyak),
    Control("head unfrozen late, clipped and noised", correct.LateHead),
    Control("frozen body", correct.FrozenBody),
)


def run_control(control: Control, seeds: Sequence[int], *, game: bool = False) -> ControlRow:
    """The contract on a correct trainer over several seeds; an alarm is any verdict but pass."""
    began = time.monotonic()
    verdicts: dict[str, int] = {}
    game_alarms = 0
    for seed in seeds:
        probe = Probe(control.factory, seed=seed)
        outcome = verdict(run_checks(probe))
        verdicts[outcome] = verdicts.get(outcome, 0) + 1
        if game:
            game_alarms += release_game(probe, Bench(probe), seed=seed).caught
    return ControlRow(
        name=control.name,
        seeds=len(seeds),
        alarms=verdicts.get("fail", 0),
        verdicts=verdicts,
        game_alarms=game_alarms if game else None,
        seconds=round(time.monotonic() - began, 1),
    )
