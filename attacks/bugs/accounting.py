"""Planted bugs of accounting that is not the claimed scheme's: the step is as claimed, the eps quoted is another's."""

import math
from pathlib import Path

from attacks.bugs.row import REASONING, Bug
from dpaudit import accounting
from trainers.adapters.compact import PUBLIC_SIZE, Compact, FixedSize, FullBatch, Laplace, Shuffled


class FixedQuotesPoisson(FixedSize):
    """Fixed-size batches, claimed as such, quote Poisson's eps plus 3 % "for safety"."""

    def epsilon(self, delta: float) -> float:  # type: ignore[override]
        event = accounting.DpSgd(self.noise_multiplier, self.sample_rate, self.step_count)
        return 1.03 * accounting.epsilon(event, delta)


class ReplacedFixedQuotesPoisson(FixedQuotesPoisson):
    """The same under replace-one, which has a proof for fixed-size batches: with 2 C, not C."""

    relation = "replace"


class LaplaceNotComposed(Laplace):
    """Laplace noise quotes log(1 + q (e^(1/sigma) - 1)), the eps of one step, after any number of them."""

    def epsilon(self, delta: float) -> float:  # type: ignore[override]
        return math.log1p(self.sample_rate * math.expm1(1 / self.noise_multiplier)) * min(1, self.step_count)


class LaplaceAdvanced(Laplace):
    """Laplace noise quotes an eighth of advanced composition: sqrt(2 T log(1/delta)) q (e^(1/sigma) - 1) / 8."""

    def epsilon(self, delta: float) -> float:  # type: ignore[override]
        one = self.sample_rate * math.expm1(1 / self.noise_multiplier)
        return math.sqrt(2 * self.step_count * math.log(1 / delta)) * one / 8


class EpochsInParallel(Shuffled):
    """Shuffled batches are disjoint, hence "parallel composition": one Gaussian, however many epochs."""

    def epsilon(self, delta: float) -> float:
        event = accounting.DpSgd(self.noise_multiplier, 1.0, min(1, self.step_count), self.relation)
        return accounting.epsilon(event, delta)


class FullBatchAmplified(FullBatch):
    """Every unit is in every step, and the eps is amplified by a sampling at 1/10 that does not take place."""

    def epsilon(self, delta: float) -> float:
        event = accounting.DpSgd(self.noise_multiplier, 4.0 / PUBLIC_SIZE, self.step_count, self.relation)
        return accounting.epsilon(event, delta)


class OtherDelta(Compact):
    """eps is computed at delta = 1/n and quoted at whatever delta is asked for."""

    def epsilon(self, delta: float) -> float:
        return super().epsilon(max(delta, 1 / PUBLIC_SIZE))


class RenyiWithoutConversion(Compact):
    """The Renyi divergence of order 2 is quoted as eps, without log(1/delta)."""

    def epsilon(self, delta: float) -> float:
        from dp_accounting.rdp import RdpAccountant

        from dpaudit.accounting.cross_checks import rdp_relation, rdp_step

        event = accounting.DpSgd(self.noise_multiplier, self.sample_rate, max(1, self.step_count))
        accountant = RdpAccountant([2], rdp_relation(event))
        accountant.compose(rdp_step(event), max(1, self.step_count))
        return float(accountant._rdp[0]) * bool(self.step_count)


class WholeEpochsCounted(Compact):
    """The accountant is told of whole epochs only: steps are counted in tens, rounded down."""

    def epsilon(self, delta: float) -> float:
        return _after(self, self.step_count // 10 * 10, delta)


class HistoryOverwritten(Compact):
    """The accountant keeps a list of sixteen steps and overwrites the oldest: eps stops growing at step 16."""

    kept = 16

    def epsilon(self, delta: float) -> float:
        return _after(self, min(self.kept, self.step_count), delta)


class RateRoundedDown(Compact):
    """The rate is passed on in whole percent of the loader's 6 batches a virtual epoch: 0.06 instead of 0.1."""

    def epsilon(self, delta: float) -> float:
        event = accounting.DpSgd(self.noise_multiplier, 0.06, self.step_count)
        return accounting.epsilon(event, delta)


class AverageNoiseQuoted(Compact):
    """Noise alternates between 0.6 and 1.4 sigma C, the claim and the accountant have the average, sigma."""

    def noise_std(self) -> float:
        return super().noise_std() * (1.4 if self.step_count % 2 else 0.6)


class ResumeCountsOnce(Compact):
    """Steps after a resume are taken for repeats of the first ones (max instead of sum): they are counted once."""

    before = 0

    def load(self, path: Path) -> None:
        super().load(path)
        self.before = self.step_count

    def epsilon(self, delta: float) -> float:
        return _after(self, max(self.before, self.step_count - self.before), delta)


def _after(trainer: Compact, steps: int, delta: float) -> float:
    return accounting.epsilon(accounting.DpSgd(trainer.noise_multiplier, trainer.sample_rate, steps), delta)


QUOTED = "the eps quoted against a proven bound of the claimed scheme"
POISSON = "Chua et al. 2024; Opacus make_private(poisson_sampling=False)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "fixed-quotes-poisson",
        "B5, B43",
        FixedQuotesPoisson,
        POISSON,
        effect="10.3 is quoted after 200 steps, at least 45 is spent (a unit that takes a place moves 2 C)",
        seen_by=QUOTED,
    ),
    Bug(
        "replaced-fixed-quotes-poisson",
        "B5, B19, B43",
        ReplacedFixedQuotesPoisson,
        POISSON,
        effect="sensitivity 2 C is accounted as C: 10.3 is quoted after 200 steps, at least 45 is spent",
        seen_by=QUOTED,
    ),
    Bug(
        "laplace-not-composed",
        "B43",
        LaplaceNotComposed,
        REASONING,
        effect="0.16 is quoted after 200 steps, 6.1 is spent at delta = 1e-5",
        seen_by=QUOTED,
    ),
    Bug(
        "laplace-advanced",
        "B43",
        LaplaceAdvanced,
        "advanced composition (Dwork & Roth 2014, theorem 3.20) with terms left out",
        effect="1.5 is quoted after 200 steps, 6.1 is spent at delta = 1e-5",
        seen_by=QUOTED,
    ),
    Bug(
        "epochs-in-parallel",
        "B5, B43",
        EpochsInParallel,
        "parallel composition over batches; " + REASONING,
        effect="4.4 is quoted after 20 epochs, 28 is spent",
        seen_by=QUOTED + ", after more than one epoch",
    ),
    Bug(
        "full-batch-amplified",
        "B43",
        FullBatchAmplified,
        REASONING,
        effect="amplification by sampling that does not take place: 10 is quoted after 200 steps, 159 is spent",
        seen_by=QUOTED,
    ),
    Bug(
        "other-delta",
        "B18, B43",
        OtherDelta,
        REASONING,
        effect="the eps holds at delta = 1/40 only: 4.5 is quoted after 200 steps, 10 is spent at 1e-5",
        seen_by=QUOTED + ", at a delta below 1/n",
    ),
    Bug(
        "renyi-without-conversion",
        "B18, B43",
        RenyiWithoutConversion,
        "Renyi DP quoted as DP; " + REASONING,
        effect="log(1/delta) = 11.5 is missing at delta = 1e-5: 0.02 is quoted after one step that spends 1.7",
        seen_by=QUOTED,
    ),
    Bug(
        "whole-epochs-counted",
        "B30, B43",
        WholeEpochsCounted,
        "smartnoise-sdk PR 424",
        effect="up to nine steps are not paid for",
        seen_by=QUOTED + ", at step counts that are no multiples of ten",
    ),
    Bug(
        "history-overwritten",
        "B43",
        HistoryOverwritten,
        REASONING,
        effect="steps after the sixteenth are free",
        seen_by=QUOTED + ", after more than 16 steps",
    ),
    Bug(
        "rate-rounded-down",
        "B17, B43",
        RateRoundedDown,
        "Opacus issues 813 and 814",
        effect="5.8 is quoted after 200 steps, 10 is spent",
        seen_by=QUOTED,
    ),
    Bug(
        "average-noise-quoted",
        "B36, B43",
        AverageNoiseQuoted,
        REASONING,
        effect="every second step has 0.6 of the noise; the average does not account for that",
        seen_by="the noise level at odd and even steps",
    ),
    Bug(
        "resume-counts-once",
        "B12, B43",
        ResumeCountsOnce,
        REASONING,
        effect="steps after a resume are not paid for until they outnumber those before",
        seen_by="eps before `save` and after `load` and further steps",
    ),
)
