"""The fusion audit on every planted token path, and on the correct path with each of our reducers.

The audits of `attacks.bugs.benchmark` take one trainer step after another from outside; this one looks into the token
path of the reference model (isolation by exact replay, checks of the fusion noise) and puts it into its row of the
truth table. Pictures are random and public.
"""

import time
from typing import get_args

import numpy as np
import torch
from pydantic import Field

from attacks.bugs.token_path import PER_EXAMPLE, PLANTS, Plant
from attacks.fusion import blocks, verdicts
from attacks.fusion.isolation import audit_isolation
from attacks.fusion.noise import audit_noise
from attacks.fusion.path import TokenPath
from dpaudit.config import LoraConfig, ReducerConfig, ReducerName
from dpaudit.documents import Check, LedgerStatus, Part
from dpaudit.randomness import Key
from trainers.adapters.vlm import synthetic_units
from trainers.vlm import VisionLanguageModel

KEEP, FUSE, BATCH, STD = 6, 3, 6, 0.1
OURS: tuple[Plant, ...] = tuple(
    Plant(f"ours: {name}", f"The correct path, reducer {name}.", "trainers.reducers", lambda path: path, PER_EXAMPLE)
    for name in get_args(ReducerName)
)
PATHS: tuple[Plant, ...] = (*PLANTS, *OURS)


_NO_MASK = Check(
    name=blocks.NAME, status="not applicable", measured="no update is made", allowed="", explanation=blocks.WHY
)


class PathRow(Part):
    """One token path and what the fusion audit says of it."""

    name: str
    what: str
    source: str
    as_planted: bool = Field(
        description="Stage, failed noise check and verdict on training are those planted, or none."
    )
    stage: str | None = Field(description="First leaking stage; null = isolation passes.")
    moved: str | None = Field(description="What moved of another record, by how much and through what.")
    failed: tuple[str, ...] = Field(description="Checks that failed.")
    training: LedgerStatus
    cases: tuple[str, ...] = Field(description="Rows of the truth table that apply.")
    seconds: float


def own_path(reducer: ReducerConfig, *, seed: int = 0) -> TokenPath:
    """The trainer's path on the reference model, with random adapter weights: zero ones would hide a leak."""
    model = VisionLanguageModel.load(device="cpu")
    model.set_reducer(reducer)
    parameters = model.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(seed))
    rng = np.random.default_rng([seed, 1])
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)))
    return TokenPath.of(model, parameters, key=Key.from_seed(seed), fusion_std=STD)


def run_path(plant: Plant, *, seed: int = 0) -> PathRow:
    """All checks of one path on a batch of random pictures."""
    began = time.monotonic()
    name = plant.name.removeprefix("ours: ") if plant in OURS else "visionzip"
    config = ReducerConfig(name=name, keep=KEEP, fuse=FUSE)  # type: ignore[arg-type]
    path = plant.apply(own_path(config, seed=seed))
    units = synthetic_units(BATCH, seed=seed + 3)
    isolation, noise = audit_isolation(path, units, seed=seed), audit_noise(path, units)
    table = verdicts.cases(
        verdicts.Findings(isolation=isolation, noise=noise, mask=_NO_MASK, sensitivity=(), released=None)
    )
    leak, training = isolation.leak, verdicts.training_status(table)
    failed = tuple(check.name for check in (*isolation.checks, *noise) if check.status == "fail")
    stage = None if leak is None else leak.stage
    right = (stage, training) == (plant.stage, plant.training) and (plant.noise in failed if plant.noise else True)
    if plant.stage is None and plant.noise is None:
        right = right and not failed
    return PathRow(
        name=plant.name,
        what=plant.what,
        source=plant.source,
        as_planted=right,
        stage=stage,
        moved=None if leak is None else f"{leak.observable} by {leak.size:.2g} of its size ({leak.how})",
        failed=failed,
        training=training,
        cases=tuple(case.case for case in table if case.applies),
        seconds=round(time.monotonic() - began, 1),
    )
