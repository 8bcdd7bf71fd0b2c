"""Update pruning and optimisers: every policy against its definition, pruned blocks untouched, the state resumed."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from attacks.contract import sampling, verdict
from attacks.training import resume_run, start_run
from dpaudit.config import PruningConfig, TrainingConfig, resolve
from dpaudit.errors import UsageError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.contract import all_but
from tests.tiny import random_units
from trainers import updates
from trainers.adapters.vlm import factory_for
from trainers.gradients import Gradient, MicroBatch
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.step import Trainer
from trainers.updates import Pruning, group_of
from trainers.vlm import VisionLanguageModel

SHAPES = {
    "layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
    "layers.0.self_attn.q_proj.lora_B.weight": (8, 2),
    "layers.0.mlp.up_proj.lora_A.weight": (2, 40),
    "layers.1.self_attn.q_proj.lora_A.weight": (2, 8),
    "layers.10.self_attn.q_proj.lora_A.weight": (2, 3),
    "multi_modal_projector.linear_1.lora_A.weight": (2, 5),
    "multi_modal_projector.linear_1.lora_B.weight": (5, 2),
}
DATA = Dataset("random", "image (with all its questions)", random_units(24), random_units(4, seed=9, prefix="t"))
FAST = ["training.batch-size=8", "training.steps=6", "model.lora.rank=2", "model.device=cpu", "seed=1"]
FAST += ["privacy.noise-multiplier=1.5"]


def gradient(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pruning(**changes: object) -> Pruning:
    return Pruning.of(gradient(0), PruningConfig.model_validate(changes))


def coins(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_block_is_a_matrix_or_a_decoder_layer() -> None:
    found = {group_of(name, "layer") for name in SHAPES}
    assert found == {"layers.0", "layers.1", "layers.10", "multi_modal_projector"}
    assert [group_of(name, "matrix") for name in SHAPES] == list(SHAPES)
    assert group_of("model.layers.3.mlp.x", "layer") == "model.layers.3"


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.01, 1.0),
    by=st.sampled_from(["magnitude", "magnitude-normalised"]),
    granularity=st.sampled_from(["matrix", "layer"]),
)
def test_the_largest_blocks_are_kept(seed: int, keep: float, by: str, granularity: str) -> None:
    noisy = gradient(seed)
    policy = pruning(keep=keep, by=by, granularity=granularity)
    members = {block: [name for name in SHAPES if group_of(name, granularity) == block] for block in policy.blocks}
    sizes = {}
    for block, names in members.items():
        flat = torch.cat([noisy[name].double().flatten() for name in names])
        sizes[block] = float(flat.norm()) / (math.sqrt(flat.numel()) if by == "magnitude-normalised" else 1.0)
    count = max(1, math.ceil(keep * len(members)))
    best = sorted(members, key=lambda block: sizes[block], reverse=True)[:count]
    assert policy.select(noisy, coins(0)) == {name for block in best for name in members[block]}
    assert policy.chosen(coins(0)) == set(SHAPES), "these policies compute and noise every block"


def test_ties_go_to_the_earlier_name_and_random_keeps_as_many() -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert pruning(keep=0.4).select(zero, coins(0)) == set(sorted(SHAPES)[:3])
    drawn = [pruning(keep=0.4, by="random").select(zero, coins(seed)) for seed in range(300)]
    assert {len(names) for names in drawn} == {3}
    # Each of 7 blocks is in 300 * 3/7 = 129 draws on average, s.d. 8.6: seven of them is a false alarm below 1e-10.
    assert all(abs(sum(name in names for names in drawn) - 300 * 3 / 7) < 60 for name in SHAPES)


def test_on_noise_alone_raw_norms_favour_big_blocks_and_normalised_ones_do_not() -> None:
    counts: dict[str, int] = {}
    for by in ("magnitude", "magnitude-normalised"):
        policy = pruning(keep=1 / 7, by=by)
        winners = [policy.select(gradient(seed), coins(0)) for seed in range(200)]
        counts[by] = sum("layers.0.mlp.up_proj.lora_A.weight" in names for names in winners)
    assert counts["magnitude"] == 200, "80 values against at most 16: the largest block wins every time"
    assert counts["magnitude-normalised"] < 20, "its norm per value varies least, so it hardly ever wins"


def test_previous_starts_at_random_and_then_follows_earlier_noisy_norms() -> None:
    policy = pruning(keep=0.5, by="previous", explore=0.25, decay=0.5)
    assert policy.ahead and policy.count == 4
    first = policy.chosen(coins(1))
    assert len(first) == 4 and len({frozenset(pruning(**_previous()).chosen(coins(k))) for k in range(20)}) > 5
    noisy = {name: value for name, value in gradient(1).items() if name in first}
    assert policy.select(noisy, coins(1)) == first, "what was computed is what is updated"
    policy.observe(noisy)
    expected = {name: float(value.double().square().mean().sqrt()) for name, value in noisy.items()}
    assert policy.scores == pytest.approx(expected)
    second = policy.chosen(coins(2))
    best = sorted(expected, key=lambda name: -expected[name])[:3]
    assert set(best) <= second and len(second) == 4, "three places by rank, one by coin"
    again = {name: torch.zeros(shape) for name, shape in SHAPES.items() if name in second}
    policy.observe(again)
    for name in second & first:
        assert policy.scores[name] == pytest.approx(0.5 * expected[name])
    for name in first - second:
        assert policy.scores[name] == pytest.approx(expected[name]), "a pruned block keeps its rank"


def _previous(**changes: object) -> dict[str, object]:
    return {"keep": 0.5, "by": "previous", "explore": 0.25, "decay": 0.5, **changes}


def test_every_block_comes_back_through_the_random_quota() -> None:
    policy, seen = pruning(**_previous()), set()
    for step in range(60):
        chosen = policy.chosen(coins(step))
        seen |= chosen
        # Only one block ever looks worth keeping.
        policy.observe({name: torch.full(SHAPES[name], float("q_proj.lora_B" in name)) for name in chosen})
    assert seen == set(SHAPES)
    stuck = pruning(**_previous(explore=0.0))
    held = stuck.chosen(coins(0))
    for step in range(5):
        stuck.observe({name: value for name, value in gradient(step).items() if name in held})
        assert stuck.chosen(coins(step + 1)) == held, "without a quota the first draw is final"


def test_the_memory_survives_a_checkpoint() -> None:
    policy, other = pruning(**_previous()), pruning(**_previous())
    policy.observe({name: value for name, value in gradient(3).items() if name in policy.chosen(coins(3))})
    other.restore(policy.tensors())
    assert other.scores == policy.scores
    assert all(policy.chosen(coins(k)) == other.chosen(coins(k)) for k in range(10))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_pruned_block_keeps_weights_momentum_and_decay(optimizer: str) -> None:
    """A block that is chosen in steps 1, 2 and 4 ends where the optimiser takes it alone in three steps."""
    config = TrainingConfig.model_validate({"optimizer": optimizer, "learning-rate": 0.1, "weight-decay": 0.3})
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in ("a", "b")}
    alone = {"b": nn.Parameter(parameters["b"].detach().clone())}
    together, single = (updates.make_optimizer(part, config, noise=0.0) for part in (parameters, alone))
    for step, kept in enumerate(({"a", "b"}, {"a", "b"}, {"a"}, {"a", "b"})):
        noisy = {name: torch.randn(3, 2) for name in parameters}
        before = parameters["b"].detach().clone()
        state = {key: torch.as_tensor(value).clone() for key, value in together.state[parameters["b"]].items()}
        updates.apply_update(parameters, noisy, kept, together, 0.1)
        if "b" in kept:
            updates.apply_update(alone, noisy, {"b"}, single, 0.1)
        else:
            assert torch.equal(parameters["b"], before), f"weights moved in step {step}"
            now = together.state[parameters["b"]]
            assert state and all(torch.equal(state[key], torch.as_tensor(now[key])) for key in state)
    assert torch.equal(parameters["b"], alone["b"])
    assert all(parameter.grad is None for parameter in parameters.values())


def build(tiny: Path, *extra: str) -> Trainer:
    config = resolve({}, [f"model.path={tiny}", *FAST, *extra])
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    return Trainer.build(config, make_plan(config, DATA, 0), Key.from_seed(1), model, DATA.train)


@pytest.mark.parametrize("path", ["hooks", "micro-batch", "ghost"])
@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_previous_computes_clips_and_noises_the_chosen_blocks_only(tiny: Path, path: str, granularity: str) -> None:
    extra = [f"pruning={{keep: 0.5, by: previous, granularity: {granularity}}}", f"training.gradient-path={path}"]
    trainer = build(tiny, *extra, "privacy.max-grad-norm=1e-3")
    with torch.no_grad():
        for value in trainer.parameters.values():
            value.add_(0.05)
    total = trainer.clipped_sum(1, [0, 1, 2])
    chosen = set(total.gradient)
    assert len(chosen) == len(trainer.parameters) / 2
    if granularity == "layer":
        assert len({group_of(name, "layer") for name in chosen}) == 1
    assert all(value.requires_grad and value.grad is None for value in trainer.parameters.values())
    oracle = MicroBatch(trainer.model, trainer.parameters)
    expected = {name: torch.zeros_like(trainer.parameters[name]) for name in chosen}
    for unit in range(3):
        full, _ = oracle.gradient(trainer.inputs.select([unit]))
        norm = torch.stack([full[name].square().sum() for name in chosen]).sum().sqrt()
        assert float(total.norms[unit]) == pytest.approx(float(norm), rel=1e-4), "the norm is over the chosen alone"
        for name in chosen:
            expected[name] += full[name] * (1e-3 / norm)
    for name in chosen:
        torch.testing.assert_close(total.gradient[name], expected[name], rtol=1e-3, atol=1e-8)
    noisy = trainer.noisy_mean(1, total)
    assert set(noisy) == chosen
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    assert trainer.update(1, noisy) == chosen
    moved = {name for name, value in trainer.parameters.items() if not torch.equal(before[name], value)}
    assert moved == chosen


class Stop(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_previous_resumes_exactly(tiny: Path, tmp_path: Path, optimizer: str) -> None:
    extra = ["pruning={keep: 0.3, by: previous, explore: 0.3}", f"training.optimizer={optimizer}"]
    config = resolve({}, [f"model.path={tiny}", *FAST, *extra, "training.checkpoint-every=3", "training.steps=8"])
    chosen: dict[int, list[set[str]]] = {}

    def note(step: int, noisy: Gradient, known: Gradient) -> None:
        chosen.setdefault(step, []).append(set(noisy))

    def cut(step: int, noisy: Gradient, known: Gradient) -> None:
        note(step, noisy, known)
        if step == 5:
            raise Stop

    whole = start_run(config, tmp_path / "whole", dataset=DATA, after_step=note)
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", dataset=DATA, after_step=cut)
    resume_run(tmp_path / "cut", dataset=DATA)
    broken = RunFolder(tmp_path / "cut")
    one, two = (load_file(run.model / "adapter_model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert broken.ledger.read_bytes() == whole.ledger.read_bytes()
    assert all(part[0] == part[1] for part in chosen.values() if len(part) > 1)
    assert len({frozenset(part[0]) for part in chosen.values()}) > 3, "the choice changes over steps"
    row = next(row for row in json.loads(whole.ledger.read_text())["rows"] if row["path"] == "gradient-update pruning")
    assert row["status"] == "post-processing" and "before the batch is seen" in row["explanation"]


def test_the_step_contract_holds_for_previous(tiny: Path) -> None:
    extra = ["pruning={keep: 0.5, by: previous, explore: 0.25}", "privacy.delta=1e-3", "training.warmup=0"]
    extra += ["model.lora.targets=[q_proj, v_proj]"]
    config = resolve({}, [f"model.path={tiny}", *FAST, *extra, "training.batch-size=5", "training.steps=20"])
    measured = all_but(factory_for(config, DATA), sampling)  # of all methods: test_sampling.py
    assert verdict(tuple(measured.values())) == "pass", [item for item in measured.values() if item.status == "fail"]
    for name in (
        "noise level",
        "noised blocks don't follow data",
        "update mask sees noise only",
        "nothing carried over",
    ):
        assert measured[name].status == "pass"
    assert re.search("[4-7] of 8 blocks moved", measured["every trained parameter noised"].measured)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("pruning={keep: 0.5, decay: 0.5}", "pruning.decay"),
        ("pruning={keep: 0.5, by: random, explore: 0.5}", "pruning.explore"),
        ("pruning={keep: 0.5, by: previous, decay: 1}", "pruning.decay"),
        ("pruning.granularity=block", "pruning.granularity"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, field: str) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: got"):
        resolve({}, [setting])
