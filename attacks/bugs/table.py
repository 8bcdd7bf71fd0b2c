"""The planted bugs: one row each, with where it happened. Catalogue ids (B1 to B43) are those of docs/planted-bugs.md.

A source marked "design reasoning" is a fault that follows from the mechanism and for which no public case was found.
What shows in the first step, in the sampler or in eps is listed here; rows of what is late, large, rare or only in
production stand in the modules that have them. Fields: attacks/bugs/row.py.
"""

from attacks.bugs import (
    accounting,
    alternating,
    clipping,
    dead,
    fusion,
    hidden_state,
    isolation,
    late_clipping,
    late_noise,
    noise,
    physical_batches,
    probes,
    production,
    sampling,
    structured,
    unusual,
    updates,
)
from attacks.bugs.row import REASONING, Bug

OPACUS_SIZE = "Opacus issues 420, 571 (1.2 claimed, 2.5 measured), 819 and PR 838"
JAX = "jax-privacy documentation, sharp edges"
REPLAY = "Re:cord-play (arXiv 2602.17454)"

FIRST_STEP: tuple[Bug, ...] = (
    # clipping and unit
    Bug("batch-mean-clipped", "B1", clipping.BatchMeanClipped, "Tramèr et al. 2022 (claimed 0.21, audit above 2.79)"),
    Bug("microbatch-clipped", "B1, B20", clipping.MicrobatchClipped, "TensorFlow Privacy issues 81 and 620"),
    Bug("clipped-upwards", "B26", clipping.ClippedUpwards, "automatic-clipping variants (Bu et al. 2023)"),
    Bug("never-clipped", "B26", clipping.NeverClipped, "automatic-clipping variants (Bu et al. 2023)"),
    Bug("per-layer-clipped", "B25", clipping.PerLayerClipped, "jax-privacy 2.3 changelog (clipped_fun sensitivity)"),
    Bug("two-towers-clipped", "B24", clipping.TwoTowersClipped, "Opacus issues 418 and 494; dp-recorder's tests"),
    Bug(
        "norm-without-head", "B28", clipping.NormWithoutHead, "Opacus issues 692 and 732; NeMo Safe-Synthesizer PR 518"
    ),
    Bug("half-precision-norm", "B27", clipping.HalfPrecisionNorm, f"{JAX} (mixed precision)"),
    Bug("loss-scale-left-in", "B27", clipping.LossScaleLeftIn, f"{JAX} (mixed precision)"),
    Bug("nan-passes", "B16", clipping.NanPasses, f"{REPLAY}: SmartNoise, dpmm, Synthcity, Opacus, diffprivlib"),
    Bug("nan-replaced-too-late", "B16", clipping.NanReplacedTooLate, f"{REPLAY}; jax-privacy nan_safe"),
    Bug("median-clipped", "B10", clipping.MedianClipped, "Andrew et al. 2021 without their noise"),
    Bug(
        "questions-clipped", "B21", clipping.QuestionsClipped, "jax-privacy PR 362 (data augmentation); Opacus per tile"
    ),
    Bug("repeats-counted", "B21", clipping.RepeatsCounted, f"{JAX} (data augmentation)"),
    Bug("noise-then-clip", "B35", clipping.NoiseThenClip, REASONING),
    # isolation
    Bug("batch-norm", "B7", isolation.BatchNorm, "Opacus issues 308 and 340"),
    Bug("token-mean-loss", "B7", isolation.TokenMeanLoss, "transformers' outputs.loss under DP (measured: x 2.75)"),
    Bug("in-batch-contrast", "B7", isolation.InBatchContrast, f"{JAX} (cross-example operations)"),
    Bug("batch-centre", "B7", isolation.BatchCentre, "token fusion with shared centres; " + REASONING),
    Bug("batch-threshold", "B7", isolation.BatchThreshold, "LLaVA-PruMerge, outlier_dectection over the whole batch"),
    Bug("data-set-statistics", "B11", isolation.DataSetStatistics, f"{REPLAY} (domain inference: diffprivlib, dpmm)"),
    Bug("stale-gradient", "B4", isolation.StaleGradient, "Opacus PR 203"),
    # noise
    Bug("sigma-without-c", "B3", noise.SigmaWithoutC, "Opacus issue 753"),
    Bug(
        "sensitivity-over-batch", "B2, B3", noise.SensitivityOverBatch, "Tramèr et al. 2022 (factor of the batch size)"
    ),
    Bug("micro-step-noise", "B4", noise.MicroStepNoise, f"Opacus PR 203; {JAX}"),
    Bug("workers-share-noise", "B6", noise.WorkersShareNoise, "Opacus PR 196"),
    Bug("one-worker-noised", "B6", noise.OneWorkerNoised, "Opacus PR 196"),
    Bug("same-noise-every-step", "B6", noise.SameNoiseEveryStep, f"{JAX} (random numbers)"),
    Bug("same-noise-every-block", "B6", noise.SameNoiseEveryBlock, f"{JAX} (random numbers)"),
    Bug("broadcast-noise", "B6", noise.BroadcastNoise, REASONING),
    Bug("no-noise", "B31", noise.NoNoise, "LeakPro PR 447 (missing noise_multiplier)"),
    Bug("uniform-noise", "B3", noise.UniformNoise, REASONING),
    Bug("noise-follows-data", "B10", noise.NoiseFollowsData, f"{JAX} (public against private metadata)"),
    Bug("first-group-noised", "B34", noise.FirstGroupNoised, REASONING),
    Bug("head-without-noise", "B8", noise.HeadWithoutNoise, REASONING),
    Bug("actual-batch-size", "B14", noise.ActualBatchSize, OPACUS_SIZE),
    Bug("private-size", "B14", noise.PrivateSize, f"{OPACUS_SIZE}; arXiv 2605.15648"),
    Bug("hidden-private-size", "B14", noise.HiddenPrivateSize, OPACUS_SIZE),
    Bug("empty-skipped", "B15", noise.EmptySkipped, "Opacus issue 161"),
    Bug("empty-crashes", "B15", noise.EmptyCrashes, "Opacus PR 164; transformers on an empty batch"),
    Bug("empty-faked", "B15", noise.EmptyFaked, "Opacus rand_on_empty"),
    Bug("resume-replays-noise", "B13", noise.ResumeReplaysNoise, "OpenVerifiableLLM PR 89 (related)"),
    Bug(
        "weak-generator",
        "B29",
        noise.WeakGenerator,
        f"Mironov 2012; {JAX}",
        "the noise has the right law; that it can be recomputed by guessing 16 bits is a property of its source",
    ),
    # update
    Bug("clean-mask", "B9", updates.CleanMask, REASONING),
    Bug("clean-mask-hidden", "B9", updates.CleanMaskHidden, REASONING),
    Bug("only-kept-noised", "B9", updates.OnlyKeptNoised, REASONING),
    Bug("clean-momentum", "B33", updates.CleanMomentum, REASONING),
    Bug("clean-second-moment", "B33", updates.CleanSecondMoment, REASONING),
    Bug("noise-not-applied", "B33", updates.NoiseNotApplied, REASONING),
    Bug(
        "private-learning-rate",
        "B22",
        updates.PrivateLearningRate,
        "LeakPro PR 438; Papernot & Steinke 2022",
    ),
    Bug(
        "loss-logged",
        "B23",
        updates.LossLogged,
        f"{JAX} (auxiliary information)",
        "the log is no part of what the trainer says it releases; the ledger has a row for metrics",
    ),
    # sampling and accounting
    Bug(
        "shuffled-as-poisson",
        "B5",
        sampling.ShuffledAsPoisson,
        "Chua et al. 2024; Annamalai et al. 2026; Opacus PR 128",
    ),
    Bug(
        "fixed-as-poisson",
        "B5",
        sampling.FixedAsPoisson,
        "Chua et al. 2024; Opacus make_private(poisson_sampling=False)",
    ),
    Bug("poisson-epsilon-for-shuffle", "B5", sampling.PoissonEpsilonForShuffle, "Annamalai et al. 2026 (NDSS)"),
    Bug("shuffled-as-allocated", "B5", sampling.ShuffledAsAllocated, f"Chua et al. 2024 for Poisson; {REASONING}"),
    Bug("allocation-epsilon-for-shuffle", "B5", sampling.AllocationEpsilonForShuffle, REASONING),
    Bug("allocated-once-more", "B17", sampling.AllocatedOnceMore, REASONING),
    Bug("shared-allocation", "B17", sampling.SharedAllocation, REASONING),
    Bug("allocated-for-good", "B17", sampling.AllocatedForGood, REASONING),
    Bug("rotated-allocation", "B17", sampling.RotatedAllocation, REASONING),
    Bug("weighted-sampler", "B17", sampling.WeightedSampler, "Opacus issue 335"),
    Bug("rate-from-loader", "B17", sampling.RateFromLoader, "Opacus issues 813 and 814"),
    Bug("with-replacement", "B17", sampling.WithReplacement, "Opacus issue 335"),
    Bug("capped-batches", "B17", sampling.CappedBatches, "jax_privacy accounts a truncated batch apart from Poisson"),
    Bug("correlated-batches", "B17", sampling.CorrelatedBatches, REASONING),
    Bug("sampler-sees-data", "B17", sampling.SamplerSeesData, REASONING),
    Bug("rate-of-another-n", "B17", sampling.RateOfAnotherN, "Opacus issues 813 and 814"),
    Bug("central-limit-accountant", "B18", sampling.CentralLimitAccountant, "Opacus' GDP accountant (1.62 for 1.83)"),
    Bug("target-reported", "B18", sampling.TargetReported, "Opacus issues 308, 346 and 348"),
    Bug("replace-as-add-remove", "B19", sampling.ReplaceAsAddRemove, f"{JAX} (neighbouring relations)"),
    Bug("one-step-less", "B30", sampling.OneStepLess, "smartnoise-sdk PR 424"),
    Bug("empty-not-counted", "B15", sampling.EmptyNotCounted, "Opacus issue 161"),
    Bug("resume-forgets", "B12", sampling.ResumeForgets, REASONING),
    # the token-fusion path, on the real trainer
    Bug("vlm-batch-centres", "B7, B32", fusion.fused_batch_centres, "shared centres; " + REASONING, slow=True),
    Bug("vlm-batch-normalised", "B7", fusion.fused_batch_normalised, "Opacus issues 308 and 340", slow=True),
    Bug(
        "vlm-batch-count",
        "B7",
        fusion.fused_batch_count,
        "LLaVA-PruMerge, outlier_dectection over the whole batch",
        slow=True,
    ),
    Bug("vlm-token-mean", "B7", fusion.fused_token_mean, "transformers' outputs.loss (measured: x 2.75)", slow=True),
)

BUGS: tuple[Bug, ...] = (
    *FIRST_STEP,
    *late_noise.BUGS,
    *late_clipping.BUGS,
    *physical_batches.BUGS,
    *production.BUGS,
    *hidden_state.BUGS,
    *dead.BUGS,
    *probes.BUGS,
    *accounting.BUGS,
    *unusual.BUGS,
    *alternating.BUGS,
    *structured.BUGS,
)


def bug(name: str) -> Bug:
    """One row by name; KeyError if there is none."""
    return {row.name: row for row in BUGS}[name]
