"""One unit is one contribution, whatever it is made of: paths that clip tiles, patches or questions are refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpaudit.config import LoraConfig, resolve
from dpaudit.errors import DpauditError
from dpaudit.randomness import Key
from tests.tiny import random_units
from tests.tiny_families import save_tiny_idefics3
from trainers.families.base import Layers
from trainers.ghost import Ghost
from trainers.gradients import Hooks, MicroBatch, UnitSum, unit_losses, whole_units
from trainers.inputs import Rows, UnitInputs
from trainers.plan import make_plan
from trainers.prompts import Packed
from trainers.records import Dataset
from trainers.step import Trainer
from trainers.vlm import VisionLanguageModel


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_idefics3(tmp_path_factory.mktemp("tiled"))


def prepare(folder: Path, *, projector: bool = False) -> tuple[VisionLanguageModel, dict[str, nn.Parameter], Rows]:
    model = VisionLanguageModel.load(str(folder), device="cpu")
    parameters = model.attach_lora(LoraConfig(rank=2, projector=projector), generator=np.random.default_rng(0))
    return model, parameters, UnitInputs(model, random_units(3, pictures=2)).select(range(3))


class PerTile:
    """Clips what each picture says on its own: the mistake that this module is about."""

    checkpointing = "none"

    def __init__(self, path: MicroBatch) -> None:
        self.path = path

    def __call__(self, rows: Rows, max_grad_norm: float) -> UnitSum:
        pieces = torch.arange(len(rows.owner))
        split = replace(rows, owner=pieces, weight=torch.ones(len(pieces)), units=len(pieces))
        return self.path(split, max_grad_norm)


def test_a_path_that_clips_pieces_is_refused_by_the_trainer(tiled: Path) -> None:
    units = random_units(4, pictures=2)
    config = resolve(
        {},
        [
            "training.steps=1",
            f"model.path={tiled}",
            "model.device=cpu",
            "training.batch-size=2",
            "privacy.noise-multiplier=1",
        ],
    )
    plan = make_plan(config, Dataset("probe", "person", units, units[:1]), 0)
    model = VisionLanguageModel.load(str(tiled), device="cpu")
    trainer = Trainer.build(config, plan, Key.from_seed(1), model, units)
    assert trainer.clipped_sum(1, [0, 1, 2]).norms.shape == (3,)
    broken = replace(trainer, path=PerTile(MicroBatch(model, trainer.parameters)))
    with pytest.raises(DpauditError, match=r"gradient path: \(6,\) norms for 3 units; clipping must be per unit"):
        broken.clipped_sum(1, [0, 1, 2])


def test_rows_of_half_a_unit_are_no_rows(tiled: Path) -> None:
    rows = prepare(tiled)[2]

    def part(chosen: Sequence[int]) -> Rows:
        mine = torch.tensor(chosen)
        return Rows(rows.tokens[mine], rows.packed[mine], rows.owner[mine], rows.weight[mine], rows.units)

    assert part(range(6)).units == 3
    for wrong in ([0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5], [0, 2, 1, 3, 4, 5]):  # missing, doubled, not adjacent
        with pytest.raises(DpauditError, match="split, missing or doubled"):
            part(wrong)
    with pytest.raises(DpauditError, match="tiles and patches are no rows"):
        replace(rows, tokens=rows.tokens.repeat(4, 1, 1))


def test_a_loss_for_each_tile_is_refused(tiled: Path) -> None:
    model, _, rows = prepare(tiled)
    model.losses = lambda tokens, packed: torch.zeros(4 * packed.rows)  # type: ignore[method-assign]
    with pytest.raises(DpauditError, match=r"losses: \(24,\) for 6 rows"):
        unit_losses(model, rows)


def test_an_adapter_inside_the_tower_is_refused_where_its_rows_are_tiles(tiled: Path) -> None:
    """What Opacus alone does not notice: with tiles as rows it clips each tile (Opacus 1.6, measured)."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    model = VisionLanguageModel.load(str(tiled), device="cpu")
    model.hf = get_peft_model(model.hf, PeftLora(r=2, target_modules=r".*vision_model.*\.q_proj"))
    parameters = model.adapter_parameters()
    assert parameters and all("vision_model" in name for name in parameters)
    units = random_units(3, pictures=1)
    rows = UnitInputs(model, units).select(range(3))
    prepared = model.family.prepare([unit.pictures[0].pixels for unit in units])
    assert prepared[0].values.shape[0] == 5, "four tiles and the whole"

    def through_the_tower(_tokens: Tensor, packed: Packed) -> Tensor:
        visual = model.family.encode(prepared, Layers(-1, -1))
        return VisionLanguageModel.losses(model, visual.tokens, packed)

    model.losses = through_the_tower  # type: ignore[method-assign]
    for path in (Hooks(model, parameters), Ghost(model, parameters)):
        with pytest.raises(DpauditError, match=r"15 rows for 3 pictures; clipping would not be per unit"):
            path(rows, 1.0)


def test_a_result_for_whole_units_passes(tiled: Path) -> None:
    model, parameters, rows = prepare(tiled, projector=True)
    for path in (Hooks(model, parameters), MicroBatch(model, parameters), Ghost(model, parameters)):
        assert whole_units(path(rows, 1.0), rows).norms.shape == (3,)
    short = UnitSum({}, torch.zeros(3), torch.zeros(6))
    with pytest.raises(DpauditError, match="losses for 3 units"):
        whole_units(short, rows)
