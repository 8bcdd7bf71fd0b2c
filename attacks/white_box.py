"""The white-box one-run audit of the training procedure: gradient canaries, every noisy gradient seen.

Each candidate is a unit vector, all of them orthonormal; when its coin says so it takes part in training as one more
unit whose gradient is `scale * C` times that vector, Poisson-sampled, clipped and noised by the code under test like
any other. The auditor knows the data and sees every released gradient, so it subtracts what the known records
contributed and projects the rest: with the claimed mechanism, candidate i at step t shows b + N(0, sigma^2), b = 1
when it was sampled, independently over candidates (orthogonal directions of white noise) and steps. That is the
claimed mechanism's own pair of distributions, so

    score = sum over t of log(1 - q + q exp((2 z - 1) / (2 sigma^2)))

is its log-likelihood ratio, no test can be sharper (Neyman-Pearson), and the order-statistics claim test is exact.
Knowing the other records and their sampling is allowed to the adversary of differential privacy, and the
amplification argument conditions on them. Directions may also be single coordinates (Dirac), which are orthonormal by
construction, or independent random ones, which meet a little (cosines of 1 / sqrt(parameters)): then the test that
assumes nothing about meetings decides. With `final` the auditor sees the sum of all updates only, as somebody who holds
the first and the last weights does, and scores its projection.

Sources: Nasr et al. 2023 (arXiv 2302.07956), Steinke et al. 2023 (arXiv 2305.08846), Xiang et al. 2025
(arXiv 2509.08704).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from attacks.canaries import ALL, COLUMNS, Coins, Plan, check_coins, save_coins
from attacks.canary_audit import CanaryAudit, unsound
from attacks.membership.stacked import initial_adapter
from attacks.training import open_run
from dpaudit import atomic
from dpaudit.analysis.claim import claim_test
from dpaudit.bounds import steinke
from dpaudit.bounds.guesses import count_correct, rank_guesses
from dpaudit.bounds.roc import summarise
from dpaudit.config import RunConfig
from dpaudit.documents import Check, Claim, ClaimDocument, LedgerDocument, Test, Validity
from dpaudit.errors import InvalidGame, UsageError, rejected
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers.gradients import Gradient
from trainers.plan import Inserted, make_plan
from trainers.progress import Reporter
from trainers.run import train

KIND = "gradient"
Directions = Literal["orthogonal", "dirac", "random"]
TITLE = "white box: gradient canaries"
STATISTIC = "log-likelihood ratio of the claimed mechanism, over all noisy gradients"
LOUD_TITLE = "white box: canaries that arrive at 100 C"
LOUD = "gradient, loud"  # key of a plan: the canaries far above C
DECIDING = 2  # tests of the claim that one game makes: of all canaries, and of the loud ones
FINAL = "-final"  # at the end of the coin file's kind: the final update only
FINAL_STATISTIC = "projection of the final update on the canary's direction"
DEFAULT_COUNT = 1000
PARAMETERS_PER_CANARY = 10  # fewer, and orthogonal directions would crowd out the model's own gradient
WORDS = {"orthogonal": "orthonormal", "dirac": "single-coordinate", "random": "random"}
SCALES = (1.0, 100.0)  # half of the canaries arrive at norm C, half far above: both must be clipped to C


@dataclass
class GradientGame:
    """`count` directions with independent fair coins: orthonormal, single coordinates, or random unit vectors.

    `scores` (m,) grows while the run trains: `observe` is the trainer's after-step callback. final: nothing is seen of
    the steps; `see_final` scores the sum of all updates.
    """

    count: int
    key: Key
    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    members: npt.NDArray[np.bool_] = field(init=False)
    scores: npt.NDArray[np.float64] = field(init=False)
    steps_seen: int = 0
    directions: Directions = "orthogonal"
    final: bool = False

    def __post_init__(self) -> None:
        self.members = self.key.uniform(self.count, step=0, name="gradient canaries", purpose="coins") < 0.5
        self.scores = np.zeros(self.count)
        self._directions = torch.empty(0)

    @property
    def kind(self) -> str:
        """What the coin file calls these canaries: 'gradient', 'gradient-dirac', 'gradient-random-final', …"""
        named = KIND if self.directions == "orthogonal" else f"{KIND}-{self.directions}"
        return named + (FINAL if self.final else "")

    @property
    def plan(self) -> Plan:
        """A quarter of the candidates guessed on each side."""
        side = max(1, self.count // 4)
        seed = int(self.key.generator(purpose="gradient ties").integers(2**31))
        return Plan({ALL: (side, side), self.kind: (side, side), LOUD: self._loud_side()}, seed)

    def _loud_side(self) -> tuple[int, int]:
        mine = int(loud(self.count).sum())
        return (max(1, mine // 4),) * 2 if mine > 1 else (mine, 0)

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
        self._directions = self._drawn(parameters)
        scale = torch.tensor([SCALES[index % len(SCALES)] for index in range(self.count)])
        inserted = torch.from_numpy(self.members)
        return self._directions[inserted] * (scale[inserted] * self.max_grad_norm).unsqueeze(1)

    def _drawn(self, parameters: int) -> torch.Tensor:
        """(m, parameters) unit vectors."""
        rng = self.key.generator(purpose="gradient directions")
        if self.directions == "dirac":
            basis = torch.zeros(self.count, parameters)
            basis[torch.arange(self.count), torch.from_numpy(rng.permutation(parameters)[: self.count])] = 1.0
            return basis
        drawn = rng.normal(size=(parameters, self.count)).astype(np.float32)
        if self.directions == "random":
            return torch.from_numpy(np.ascontiguousarray((drawn / np.linalg.norm(drawn, axis=0)).T))
        return torch.from_numpy(np.ascontiguousarray(np.linalg.qr(drawn)[0].T))

    def see_final(self, start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> None:
        """Scores from the first and the last weights alone: an update goes against the gradient."""
        moved = torch.cat([(start[name] - end[name].detach()).flatten().float().cpu() for name in sorted(start)])
        self.scores = (self._directions @ moved).double().numpy()

    def observe(self, step: int, noisy: Gradient, known: Gradient) -> None:
        """Add one step's log-likelihood ratios to the scores; an auditor of the final update looks away."""
        self.steps_seen += 1
        if self.final:
            return
        size = self.expected_batch_size
        rest = torch.cat([(noisy[name] * size - known[name]).flatten().cpu() for name in sorted(noisy)])
        z = (self._directions @ rest).double().numpy() / self.max_grad_norm
        rate, variance = self.sample_rate, self.noise_multiplier**2
        shifted = (2 * z - 1) / (2 * variance)
        self.scores += shifted if rate >= 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + shifted)


def refusal(sampling: str) -> str:
    """Why a run with other than Poisson batches is not played: its canaries don't join steps independently."""
    return (
        f"--white-box: training.sampling={sampling}; accepted: poisson, whose likelihood ratio the game scores (the "
        "other audits judge this run)"
    )


def train_twin(
    config: RunConfig,
    place: Path,
    *,
    count: int,
    directions: Directions = "orthogonal",
    final: bool = False,
    reporter: Reporter | None = None,
) -> RunFolder:
    """Train the white-box twin of a configuration in `place` and write its scores. Needs a claim with Gaussian noise.

    The twin's scores grow with its steps and are not part of its checkpoints: an interrupted twin starts over.
    """
    plain = config.model_copy(update={"canaries": config.canaries.model_copy(update={"count": 0})})
    with open_run(plain, place, candidates=count) as (run, key, dataset, model):
        plan = make_plan(plain, dataset, count)
        claim = plan.claim
        if claim is None:
            raise UsageError("--white-box: the run makes no claim, so there is no mechanism to audit")
        if plan.sampling != "poisson":
            raise UsageError(refusal(plan.sampling))
        game = GradientGame(
            count,
            key,
            plan.max_grad_norm,
            plan.noise_multiplier,
            plan.sample_rate,
            plan.expected_batch_size,
            directions=directions,
            final=final,
        )
        digest = save_coins(run.coins, game.frame(), game.plan)
        inserted = Inserted(count, (), digest, f"They are gradients along {WORDS[directions]} directions, not records.")
        train(
            plain,
            run,
            key=key,
            dataset=dataset,
            model=model,
            inserted=inserted,
            reporter=reporter,
            after_step=game.observe,
            injection=game,
        )
        if final:
            game.see_final(initial_adapter(model, key), model.adapter_parameters())
        frame = game.frame()[["id", "kind", "member"]].assign(score=game.scores)
        atomic.write_frame(run.scores, frame, mode=0o600)
    return run


def audit_twin(twin: RunFolder, *, confidence: float, alpha: float) -> CanaryAudit:
    """The claim test and the bounds on a finished white-box twin's scores.

    Two tests decide, of all canaries and of those that arrive at 100 C, each at half of `alpha`.
    """
    claim = ClaimDocument.read(twin.claim).claim
    try:
        coins = check_coins(twin.coins, LedgerDocument.read(twin.ledger).coins_sha256)
        frame = _scores(twin, coins)
    except InvalidGame as error:
        return unsound("coins and scores", str(error))
    assert claim is not None
    check = Check(
        name="coins",
        status="pass",
        measured=f"SHA-256 {coins.sha256[:16]}…",
        allowed="the hash in the ledger",
        explanation="The coins are those hashed before the first step. The directions are random and tell nothing "
        "about the coins, so no blind baseline is needed.",
    )
    scores, members = frame["score"].to_numpy(), frame["member"].to_numpy(dtype=bool)
    kind = str(frame["kind"].iloc[0])
    separate = "random" not in kind and not kind.endswith(FINAL)
    statistic = FINAL_STATISTIC if kind.endswith(FINAL) else STATISTIC
    words: dict[str, Any] = {"separate": separate, "statistic": f"{statistic} ({kind})"}
    mine = loud_of(coins.frame)
    tests = tests_of(scores, members, claim, coins.plan, confidence=confidence, alpha=alpha / DECIDING, **words)
    top, bottom = loud_guesses(coins.plan, int(mine.sum()))
    louder = (scores[mine], members[mine], claim, coins.plan.tie_seed, (top, bottom))
    return CanaryAudit(
        validity=Validity(sound=True, checks=(check,)),
        tests=(*tests, *loud_tests(*louder, alpha=alpha / DECIDING, **words)),
        scores=(summarise(TITLE, scores, members),) if 0 < members.sum() < members.size else (),
        coins_sha256=coins.sha256,
    )


def tests_of(
    scores: npt.NDArray[np.float64],
    members: npt.NDArray[np.bool_],
    claim: Claim,
    plan: Plan,
    *,
    confidence: float,
    alpha: float,
    separate: bool = True,
    statistic: str = STATISTIC,
) -> tuple[Test, ...]:
    """The assumption-free one-run bound, and the claim test: by order statistics for canaries on separate directions of
    the noise that every step shows, by the f-DP theorem otherwise."""
    top, bottom = plan.guesses[ALL]
    guesses = rank_guesses(scores, top, bottom, rng=np.random.default_rng([plan.tie_seed]))
    correct, m, r = count_correct(guesses, members), len(scores), top + bottom
    free = Test(
        name=TITLE,
        statistic=statistic,
        bound="steinke",
        assumes="none",
        selection=f"fixed with the coins: the {top} highest scores guessed in, the {bottom} lowest out",
        confidence=confidence,
        delta=claim.delta,
        n=m,
        guesses=r,
        correct=correct,
        epsilon_lower=steinke.epsilon_lower(
            canaries=m, guesses=r, correct=correct, delta=claim.delta, confidence=confidence
        ),
        ceiling=steinke.ceiling(canaries=m, guesses=r, delta=claim.delta, confidence=confidence),
    )
    against = claim_test(
        scores,
        members,
        claim=claim,
        top=top,
        bottom=bottom,
        rng=np.random.default_rng([plan.tie_seed]),
        name=TITLE,
        statistic=statistic,
        alpha=alpha,
        confidence=confidence,
        separate=separate,
        alternative=1.0 - plan.sigma_reduction,
    )
    return (free, *against)


def loud(count: int) -> npt.NDArray[np.bool_]:
    """(count,) which canaries arrive far above C. Clipped as they must be they look like the others."""
    return np.array([SCALES[index % len(SCALES)] > 1 for index in range(count)])


def loud_of(frame: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """(m,) the loud ones of a coin file, whose ids end in the candidate's number."""
    digits = frame["id"].astype(str).str.extract(r"^gradient-(\d{1,9})$", expand=False)
    if digits.isna().any():
        raise InvalidGame("coins: an id is not that of a gradient canary")
    chosen: npt.NDArray[np.bool_] = loud(len(SCALES))[digits.astype(int).to_numpy() % len(SCALES)]
    return chosen


def loud_guesses(plan: Plan, count: int) -> tuple[int, int]:
    """(top, bottom) for the loud canaries alone: the plan's own, or a quarter of them on each side."""
    return plan.guesses.get(LOUD, (max(1, count // 4), max(1, count // 4)) if count > 1 else (count, 0))


def loud_tests(
    scores: npt.NDArray[np.float64],
    members: npt.NDArray[np.bool_],
    claim: Claim,
    tie_seed: int,
    guesses: tuple[int, int],
    *,
    alpha: float,
    separate: bool = True,
    statistic: str = STATISTIC,
) -> tuple[Test, ...]:
    """The claim's test on the canaries that arrive at 100 C alone.

    Faulty clipping (of the batch's mean, say) may hide the canaries of norm C behind the loud ones; ranks of all
    together then hardly show how certain the loud ones are. This is the second test that decides, so `alpha` is its
    share of the level. Nothing without canaries.
    """
    if not scores.size:
        return ()
    found = claim_test(
        scores,
        members,
        claim=claim,
        top=guesses[0],
        bottom=guesses[1],
        rng=np.random.default_rng([tie_seed, 1]),
        name=LOUD_TITLE,
        statistic=statistic,
        alpha=alpha,
        confidence=1 - alpha,
        separate=separate,
        alternative=0.7,
    )
    return tuple(test for test in found if test.decides)


def _scores(twin: RunFolder, coins: Coins) -> pd.DataFrame:
    from attacks.scores import join_coins

    if not twin.scores.is_file():
        raise InvalidGame(f"{twin.scores}: missing; delete {twin.path} and audit again")
    found = atomic.read_frame(twin.scores)
    joined = join_coins(found[["id", "score"]], coins.frame)
    theirs = found.set_index("id")["member"].reindex(coins.frame["id"]).to_numpy(dtype=bool)
    if not np.array_equal(theirs, coins.frame["member"].to_numpy(dtype=bool)):
        raise InvalidGame(f"{twin.scores}: scores of another run; they were written beside other coins than these")
    return joined
