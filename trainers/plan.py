"""What a run is going to do and claim, fixed before the first step: q, T, sigma, claim, ledger rows."""

import math
from dataclasses import dataclass
from functools import partial

from dpaudit import accounting
from dpaudit.config import ReducerConfig, RunConfig
from dpaudit.documents import Claim, ClaimDocument, LedgerRow
from dpaudit.errors import rejected
from dpaudit.randomness import FINITE_PRECISION, SECURE_PRECISION
from trainers.records import Dataset, Unit
from trainers.sampling import Sampler

CURVE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class Inserted:
    """Canaries as the trainer sees them: how many candidates there were, and the units whose coin fell heads.

    Only `candidates` enters q, T and the batch size; the number of heads is private to the game.
    """

    candidates: int = 0
    units: tuple[Unit, ...] = ()
    coins_sha256: str | None = None
    about: str = "Mislabelled ones are reserved pictures with wrong answers."


@dataclass(frozen=True)
class Plan:
    """Everything public about a run. sigma is 0 for a run without privacy; `claim` is None then."""

    candidates: int
    sample_rate: float
    steps: int
    expected_batch_size: float
    noise_multiplier: float
    max_grad_norm: float
    claim: Claim | None
    not_releasable: tuple[str, ...] = ()
    sampling: accounting.Scheme = "poisson"
    draws: int = 1  # k of allocation
    token_multiplier: float | None = None  # z of a release of visual tokens; None: none leave

    @property
    def noise_std(self) -> float:
        """Of each number of a released noisy mean: sigma C / B; 0 without a claim."""
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch_size if self.claim else 0.0

    @property
    def sampler(self) -> Sampler:
        """Who is in the batch of which step."""
        return Sampler(self.sampling, self.candidates, round(self.expected_batch_size), self.draws)

    @property
    def event(self) -> accounting.DpSgd | None:
        """What the accountant composes; None for a run without a claim."""
        if self.claim is None:
            return None
        public = (self.sample_rate, self.steps, self.claim.relation, self.claim.noise, self.sampling)
        return accounting.DpSgd(self.noise_multiplier, *public, self.claim.epoch_steps)

    @property
    def others(self) -> tuple[accounting.DpSgd, ...]:
        """What the accountant composes beside `event`: a release of tokens, spent before the first step."""
        if self.claim is None or self.token_multiplier is None:
            return ()
        return (accounting.release_event(self.token_multiplier, self.claim.relation),)

    def epsilon_after(self, step: int) -> float | None:
        """eps spent after `step` steps (an upper bound before the last one); None without a claim."""
        event = self.event
        if event is None or self.claim is None:
            return None
        if self.others:
            return accounting.joint_after(event, self.others, step, self.claim.delta)
        return accounting.epsilon_after(event, step, self.claim.delta)

    def document(self) -> ClaimDocument:
        """`release/claim.json`, with what other accountants say of the same mechanism."""
        reasons = () if self.claim else (NO_CLIPPING if math.isinf(self.max_grad_norm) else NO_NOISE,)
        event = self.event
        return ClaimDocument(
            claim=self.claim,
            releasable=not self.not_releasable,
            reasons=(*reasons, *self.not_releasable),
            # Those accountants are asked about a training alone.
            cross_checks=accounting.cross_check(event, self.claim.delta)
            if event and self.claim and not self.others
            else (),
        )


def make_plan(config: RunConfig, dataset: Dataset, canaries: int) -> Plan:
    """q, T, sigma and the claim of a configuration; raises UsageError before anything is trained.

    q, T and the expected batch size follow from the declared public size plus the number of canary candidates.
    """
    training, privacy = config.training, config.privacy
    candidates = (config.data.public_size or len(dataset.train)) + canaries
    if not dataset.train:
        raise rejected("data.train", 0, "at least one unit")
    if training.batch_size > candidates:
        raise rejected(
            "training.batch-size", training.batch_size, f"at most {candidates} (units and canary candidates)"
        )
    if training.sampling in ("fixed", "shuffle") and candidates - canaries < len(dataset.train):
        why = f"at least {len(dataset.train)}, the units, for training.sampling={training.sampling}"
        raise rejected("data.public-size", config.data.public_size, why)
    sampler = Sampler(training.sampling, candidates, training.batch_size, training.draws)
    rate = sampler.rate
    steps = training.steps or sampler.steps(training.epochs)
    public = (candidates, rate, steps, float(training.batch_size))
    not_releasable = _not_releasable(config)
    if not config.claims:
        norm = math.inf if config.method == "non-private" else privacy.max_grad_norm
        return Plan(*public, 0.0, norm, None, not_releasable, training.sampling, training.draws)
    if privacy.delta >= 1 / candidates:
        raise rejected("privacy.delta", privacy.delta, f"below 1/n = {1 / candidates:.2g} for {candidates} units")
    epoch = sampler.batches if training.sampling == "allocation" else None
    if epoch is not None:
        accounting.require_reference()
    multiplier = config.fusion.multiplier if config.fusion.release != "none" else None
    others = () if multiplier is None else (accounting.release_event(multiplier, privacy.relation),)
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert isinstance(privacy.epsilon, float)
        solve = partial(accounting.noise_multiplier_beside, others) if others else accounting.noise_multiplier_for
        sigma = solve(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sample_rate=rate,
            steps=steps,
            relation=privacy.relation,
            noise=config.zeroth_order.noise,
            sampling=training.sampling,
            epoch=epoch,
        )
    event = accounting.DpSgd(sigma, rate, steps, privacy.relation, config.zeroth_order.noise, training.sampling, epoch)
    deltas = [delta for delta in CURVE_DELTAS if delta < 1 / candidates]
    spent = accounting.joint_epsilon((event, *others), privacy.delta)
    claim = Claim(
        epsilon=privacy.epsilon if isinstance(privacy.epsilon, float) else spent,
        delta=privacy.delta,
        relation=privacy.relation,
        unit=dataset.unit,
        mechanism="zeroth-order" if config.method == "dp-zo" else "gaussian",
        noise=config.zeroth_order.noise,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        sampling=training.sampling,
        sample_rate=rate,
        epoch_steps=epoch,
        steps=steps,
        expected_batch_size=float(training.batch_size),
        candidates=candidates,
        accountant=accounting.accountant_name(),
        token_multiplier=multiplier,
        release="final weights (LoRA adapter)" + (" and noisy visual tokens" if others else ""),
        curve=accounting.joint_curve((event, *others), deltas),
    )
    return Plan(
        *public, sigma, privacy.max_grad_norm, claim, not_releasable, training.sampling, training.draws, multiplier
    )


NO_CLIPPING = "method non-private: no clipping, no noise, no claim"
NO_NOISE = "privacy.epsilon=inf: clipped, but no noise is added: no privacy is claimed"
SEEDED = "the noise key came from --seed, so anyone can recompute the noise: not for release"


def _not_releasable(config: RunConfig) -> tuple[str, ...]:
    reasons = []
    if config.seed is not None:
        reasons.append(SEEDED)
    if config.planted.noise_scale != 1.0:
        reasons.append(f"planted.noise-scale = {config.planted.noise_scale:g}: the noise is not the one claimed")
    return tuple(reasons)


def ledger_rows(config: RunConfig, dataset: Dataset, plan: Plan, inserted: Inserted) -> tuple[LedgerRow, ...]:
    """Every place where this run touches private data."""
    rows = [_gradient_row(config, plan), *_copies_row(config), *_token_rows(config, plan)]
    if plan.claim is not None and config.pruning.keep < 1:
        rows.append(
            LedgerRow(
                path="gradient-update pruning",
                stage="gradient pruning",
                status="post-processing",
                explanation="Which blocks are updated is decided from the gradient after the noise was added."
                if config.pruning.by != "previous"
                else "Which blocks are computed, clipped and noised is decided before the batch is seen, from noisy "
                "gradients of earlier steps and public coins.",
                evidence=f"trainers.updates.Pruning sees noisy gradients only; keeps {config.pruning.keep:g} of the "
                f"blocks ({config.pruning.granularity}) by {config.pruning.by}",
            )
        )
    rows.extend(_recipe_rows(config, plan))
    if inserted.candidates:
        rows.append(
            LedgerRow(
                path="canaries",
                stage="canaries",
                status="accounted" if plan.claim else "UNACCOUNTED",
                explanation="Test records that a fair coin inserts or leaves out; each is one unit like any other. "
                + inserted.about,
                evidence=f"{inserted.candidates} candidates, all counted in q, T and the batch size; coins hashed "
                "before the first step",
            )
        )
    rows.extend(dataset.ledger)
    if config.planted.noise_scale != 1.0:
        rows.append(
            LedgerRow(
                path="planted fault",
                stage="gradients",
                status="UNACCOUNTED",
                explanation="This run deliberately adds less noise than it claims, to test the audit.",
                evidence=f"planted.noise-scale = {config.planted.noise_scale:g}",
            )
        )
    return tuple(rows)


def _gradient_row(config: RunConfig, plan: Plan) -> LedgerRow:
    if plan.claim is None:
        clipped = math.isfinite(plan.max_grad_norm)
        how = (
            "clipped, but without noise: no finite eps holds, and none is claimed"
            if clipped
            else "without clipping or noise"
        )
        return LedgerRow(
            path="gradients",
            stage="gradients",
            status="UNACCOUNTED",
            explanation=f"Gradients of private records are used {how}.",
            evidence=f"C = {plan.max_grad_norm:g}, sigma = 0" if clipped else "method non-private",
        )
    claim = plan.claim
    what = "The gradient of each unit is clipped"
    if config.privacy.clipping == "automatic":
        what = "The gradient of each unit is scaled to less than C, small ones too (automatic clipping)"
    if config.method == "dp-zo":
        what = "No gradient is taken: each unit's change of loss along public random directions is clipped"
    precision = SECURE_PRECISION if config.privacy.noise == "secure" else FINITE_PRECISION
    return LedgerRow(
        path="gradients",
        stage="gradients",
        status="accounted",
        explanation=f"{what}, summed over a random batch and noised; the sum is divided by the public expected batch "
        f"size. {precision}" + ("" if config.seed is None else f" {SEEDED[0].upper()}{SEEDED[1:]}."),
        evidence=f"C = {plan.max_grad_norm:g}, sigma = {plan.noise_multiplier:.4g}, {plan.sampler.describe()}, "
        f"T = {plan.steps}; {claim.accountant}, {claim.relation}: eps <= {float(claim.epsilon):.4g} at {claim.delta:g}",
    )


def _recipe_rows(config: RunConfig, plan: Plan) -> list[LedgerRow]:
    """What is done with noisy gradients or settled before them, where it is not the plain optimiser."""
    training = config.training
    found: list[tuple[str, str, str]] = []
    if plan.claim is None:
        return []
    if config.model.lora.train != "both":
        only = (
            "A stays as it was drawn from the run's key"
            if config.model.lora.train == "b"
            else "B in odd, A in even steps"
        )
        found.append(
            (
                "trained matrices",
                f"What a step computes, clips and noises does not follow data: {only}.",
                "model.lora.train",
            )
        )
    if training.optimizer == "adambc":
        why = "The second moment of the noisy gradient loses the public variance of the noise, (sigma C / B)^2."
        found.append(("noise correction", why, "training.optimizer=adambc"))
    if training.average:
        why = "The released weights are a fixed mean of the weights after each step, which are accounted all together."
        found.append(("averaged weights", why, f"training.average = {training.average:g}"))
    return [
        LedgerRow(path=path, stage="other", status="post-processing", explanation=why, evidence=by)
        for path, why, by in found
    ]


def _copies_row(config: RunConfig) -> list[LedgerRow]:
    count = config.training.augmentations
    if count == 1:
        return []
    return [
        LedgerRow(
            path="shifted copies",
            stage="preprocessing",
            status="per-example preprocessing",
            explanation="A unit's gradient is the mean over its pictures and shifted copies of them, before it is "
            "clipped. A copy follows from its picture, the picture's id and a public rule.",
            evidence=f"training.augmentations = {count}",
        )
    ]


def _token_rows(config: RunConfig, plan: Plan) -> list[LedgerRow]:
    reducer = config.reducer
    released = _released_rows(config, plan)
    if reducer.name == "none":
        return released
    pruned = LedgerRow(
        path="token pruning and fusion",
        stage="token reduction",
        status="per-example preprocessing",
        explanation="The visual tokens of a picture are chosen and fused from that picture alone, before its gradient "
        "is clipped. "
        + (
            ""
            if released
            else "Valid for the trained weights only; tokens themselves must not leave the trust boundary."
        ),
        evidence=f"reducer {reducer.name}, {_numbers(reducer)}; by construction, and decided by the isolation test "
        "(dpaudit audit RUN --fusion)",
    )
    if fusion_std(config, plan) == 0:
        return [pruned, *released]
    noise = LedgerRow(
        path="fusion noise",
        stage="fusion noise",
        status="per-example preprocessing",
        explanation="Noise on the fused tokens is a random augmentation of each picture. It buys no differential "
        "privacy and is not counted as any.",
        evidence=f"std = {fusion_std(config, plan):.4g} ({reducer.noise}), independent for every picture and step",
    )
    return [pruned, noise, *released]


def _numbers(reducer: ReducerConfig) -> str:
    """K, k and layers of a reducer; what the checkpoint decides is named as that where no model was loaded."""
    given = {"K =": reducer.keep, "k =": reducer.fuse, "attention of layer": reducer.layer}
    given |= {"features of layer": reducer.feature_layer}
    text = ", ".join(f"{name} {'by the checkpoint' if value is None else value}" for name, value in given.items())
    return text + (f", assigned by {reducer.assign}" if reducer.name == "visionzip" else "")


def _released_rows(config: RunConfig, plan: Plan) -> list[LedgerRow]:
    if plan.claim is None or plan.token_multiplier is None:
        return []
    event = accounting.release_event(plan.token_multiplier, plan.claim.relation)
    mu = accounting.sensitivity(event.relation) / plan.token_multiplier
    return [
        LedgerRow(
            path="released visual tokens",
            stage="released tokens",
            status="accounted",
            explanation="All visual tokens of a unit are clipped together and noised once; training uses the noisy "
            "ones in every step. They may leave the trust boundary. Which units there are, and how many pictures each "
            "has, is not hidden.",
            evidence=f"R = {config.fusion.radius:g}, z = {plan.token_multiplier:g}: mu = {mu:.4g} under "
            f"{event.relation}, eps = {accounting.gaussian_epsilon(mu, plan.claim.delta):.4g} at "
            f"{plan.claim.delta:g} by itself; part of the claim's eps",
        )
    ]


def fusion_std(config: RunConfig, plan: Plan) -> float:
    """Std of the fusion noise: 'sum' = sigma*C, 'mean' = sigma*C/B, or the number given (references disagree)."""
    noise = config.reducer.noise
    if noise == "none" or (noise in ("sum", "mean") and not plan.noise_multiplier):
        return 0.0
    if noise == "sum":
        return plan.noise_multiplier * plan.max_grad_norm
    if noise == "mean":
        return plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
    return float(noise)
