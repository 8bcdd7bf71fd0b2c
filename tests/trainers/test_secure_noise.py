"""privacy.noise=secure: the law of plain noise, other numbers, one rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dpaudit.config import resolve
from dpaudit.errors import UsageError
from tests.trainers.test_run import build, small
from trainers.noise import noise_like
from trainers.plan import ledger_rows, make_plan


def test_secure_noise_has_the_claimed_law_and_is_rounded_once(tiny: Path) -> None:
    settings = ("privacy.max-grad-norm=0.5", "model.lora.rank=8")
    trainer, plain = build(tiny, "privacy.noise=secure", *settings), build(tiny, *settings)
    size, std = trainer.plan.expected_batch_size, 0.5 * trainer.plan.noise_multiplier
    values = []
    for step in (1, 2, 3):
        total = trainer.clipped_sum(step, range(8))
        noisy, other = trainer.noisy_mean(step, total), plain.noisy_mean(step, total)
        noise = noise_like(trainer.key, total.gradient, step=step, std=std, secure=True)
        for name, value in noisy.items():
            assert value.dtype == total.gradient[name].dtype and not torch.equal(value, other[name])
            assert torch.equal(value, ((total.gradient[name].double() + noise[name]) / size).float())
            values.append((value * size - total.gradient[name]).double().flatten().numpy() / std)
    sample = np.concatenate(values)
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], len(sample))  # false alarm 2e-8, and 1e-8 for the law
    assert low < float((sample**2).sum()) < high
    assert stats.kstest(sample, "norm").pvalue > 1e-8


def test_the_ledger_says_what_the_proof_does_not_cover(tiny: Path) -> None:
    from trainers.plan import Inserted

    for noise, words in (("plain", "floating-point noise and on timing are not covered"), ("secure", "infeasible")):
        config = resolve({}, [f"model.path={tiny}", "training.batch-size=8", f"privacy.noise={noise}"])
        plan = make_plan(config, small(), 0)
        row = next(row for row in ledger_rows(config, small(), plan, Inserted()) if row.path == "gradients")
        assert words in row.explanation


def test_laplace_noise_has_no_secure_form() -> None:
    with pytest.raises(UsageError, match=r"^privacy\.noise"):
        resolve({"method": "dp-zo"}, ["zeroth-order.noise=laplace", "privacy.noise=secure"])
