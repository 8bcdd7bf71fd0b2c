"""The contract on real trainers: dpaudit's own, a Hugging Face Trainer, and the planted bugs of the token path."""

import pytest
import torch

from attacks.bugs import production
from attacks.bugs.benchmark import run_bug
from attacks.bugs.table import bug
from attacks.contract import check
from trainers.adapters import foreign, vlm


def test_dual_priv_keeps_the_contract() -> None:
    """Fused tokens with noise, blocks pruned by the noisy gradient: nothing of it is a fault."""
    document = check(vlm.dual_priv)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]
    status = {item.name: item.status for item in document.checks}
    for name in ("update mask sees noise only", "others unmoved", "empty batch", "noise after a resume"):
        assert status[name] == "pass"


def test_zeroth_order_keeps_the_contract() -> None:
    document = check(vlm.dp_zo)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]
    status = {item.name: item.status for item in document.checks}
    for name in ("influence of one unit", "noise level", "moves along the public line", "eps reported", "empty batch"):
        assert status[name] == "pass"


def test_blocks_chosen_ahead_of_a_step_keep_the_contract() -> None:
    document = check(vlm.previous)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]


def test_a_hugging_face_trainer_keeps_the_contract() -> None:
    document = check(foreign.hugging_face)
    assert document.verdict == "pass", [item for item in document.checks if item.status == "fail"]


def test_noise_that_the_hugging_face_trainer_seeds_is_public() -> None:
    failed = [item.name for item in check(production.trainer_seeds_the_noise).checks if item.status == "fail"]
    assert failed == ["noise without a seed"]


@pytest.mark.parametrize("name", ["vlm-batch-normalised", "vlm-token-mean"])
def test_tokens_or_losses_shared_over_a_batch_are_caught(name: str) -> None:
    row = run_bug(bug(name), game=False)
    assert "others unmoved" in row.contract and row.isolation


def test_trainers_of_one_factory_do_not_disturb_each_other() -> None:
    """They share modules: two in turns must do what each does alone."""
    one, two = (vlm.dp_sgd(seed=0, noise_seed=seed) for seed in (1, 2))
    one.step([0, 1])
    two.step([2])
    one.step([3])
    alone = vlm.dp_sgd(seed=0, noise_seed=1)
    alone.step([0, 1])
    alone.step([3])
    for name, value in alone.parameters().items():
        assert torch.equal(value, one.parameters()[name])
