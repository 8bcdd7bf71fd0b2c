"""The isolation test passes on every reducer of ours and fails on batch-wide ones, naming the stage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.isolation import audit_fusion, audit_units, model_probe, noise_check
from attacks.training import start_run
from dpaudit.config import LoraConfig, ReducerConfig, resolve
from dpaudit.randomness import Key
from tests.tiny import random_units, save_tiny_llava
from trainers.records import Dataset
from trainers.reducers import Reduced, VisualTokens, make_reducer
from trainers.vlm import VisionLanguageModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


def audit(tiny: Path, *, reducer: ReducerConfig | Callable[[VisualTokens], Reduced], pictures: int = 1, loss=None):
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    if isinstance(reducer, ReducerConfig):
        model.set_reducer(reducer)
    else:
        model.reducer = reducer
    if loss is not None:
        model.losses = loss(model)  # type: ignore[method-assign]
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.1)
    return audit_units(model_probe(model, parameters, fusion_std=0.1), random_units(4, pictures=pictures))


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize(
    "reducer",
    [
        ReducerConfig(),
        ReducerConfig(name="random", keep=5),
        ReducerConfig(name="cls-topk", keep=5),
        ReducerConfig(name="visionzip", keep=5, fuse=3),
    ],
    ids=lambda reducer: reducer.name,
)
def test_our_reducers_are_isolated(tiny: Path, reducer: ReducerConfig, pictures: int) -> None:
    checks, leak = audit(tiny, reducer=reducer, pictures=pictures)
    assert leak is None and [check.status for check in checks] == ["pass"] * 4


def batch_centres(visual: VisualTokens) -> Reduced:
    """Fused tokens are moved by the batch's mean: centres shared over the batch."""
    own = make_reducer(ReducerConfig(name="visionzip", keep=5, fuse=3), patches=16, drop_cls=False)(visual)
    tokens = own.tokens.clone()
    tokens[:, -3:] += own.tokens[:, -3:].mean(dim=0, keepdim=True)
    return replace(own, tokens=tokens)


def batch_count(visual: VisualTokens) -> Reduced:
    """How many tokens are kept follows from the spread of attention over the whole batch."""
    spread = visual.importance.flatten().quantile(0.75) - visual.importance.flatten().quantile(0.25)
    keep = int((visual.importance > visual.importance.median() + spread).sum(dim=1).max().clamp(1, 15))
    return make_reducer(ReducerConfig(name="cls-topk", keep=keep), patches=16, drop_cls=False)(visual)


def batch_norm(visual: VisualTokens) -> Reduced:
    """Tokens are normalised by the batch's own statistics."""
    own = make_reducer(ReducerConfig(name="cls-topk", keep=5), patches=16, drop_cls=False)(visual)
    return replace(own, tokens=(own.tokens - own.tokens.mean(dim=(0, 1))) / (own.tokens.std(dim=(0, 1)) + 1e-6))


@pytest.mark.parametrize(
    ("reducer", "stage"), [(batch_centres, "fusion"), (batch_count, "selection"), (batch_norm, "fusion")]
)
def test_batch_wide_reducers_are_caught_at_their_stage(
    tiny: Path, reducer: Callable[[VisualTokens], Reduced], stage: str
) -> None:
    checks, leak = audit(tiny, reducer=reducer)
    assert leak is not None and leak.stage == stage and leak.moved != leak.changed
    assert checks[0].status == "fail"


def token_mean(model: VisionLanguageModel) -> Callable[..., Tensor]:
    """Hugging Face's loss: each row's share of the mean over all answer tokens of the batch."""

    def losses(tokens: Tensor, packed) -> Tensor:
        wanted = packed.targets != -100
        logits = model.logits(tokens, packed)
        each = torch.nn.functional.cross_entropy(logits, packed.targets[wanted], reduction="none")
        rows = torch.zeros(packed.rows).index_add(0, wanted.nonzero()[:, 0], each)
        return rows / wanted.sum() * packed.rows

    return losses


def test_a_token_mean_loss_is_caught_at_the_loss(tiny: Path) -> None:
    checks, leak = audit(tiny, reducer=ReducerConfig(), loss=token_mean)
    assert leak is not None and leak.stage == "loss"
    assert {check.name: check.status for check in checks}["isolation under padding"] == "fail"


def test_shared_fusion_noise_is_caught_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"picture {index}" for index in range(8)]
    assert noise_check(Key.from_seed(0), ids, (3, 32)).status == "pass"
    shared = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    monkeypatch.setattr("attacks.isolation.fusion_noise", lambda *_args, **_settings: shared)
    assert noise_check(Key.from_seed(0), ids, (3, 32)).status == "fail"


def test_a_run_is_audited_on_its_own_model_and_data(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset("random", "image", random_units(20), random_units(2, seed=9, prefix="t"))
    overrides = ["seed=1", f"model.path={tiny}", "model.device=cpu", "reducer.keep=4", "reducer.fuse=3"]
    config = resolve({"method": "dual-priv"}, [*overrides, "training.batch-size=8", "training.steps=3"])
    run = start_run(config, tmp_path / "run", dataset=dataset)
    monkeypatch.setattr("attacks.isolation.data.load", lambda _config: dataset)
    fusion = audit_fusion(run)
    assert fusion.training == "per-example preprocessing" and fusion.first_leaking_stage is None
    assert [check.status for check in fusion.checks] == ["pass"] * 5
