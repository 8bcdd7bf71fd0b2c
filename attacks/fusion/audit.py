"""The fusion-path audit of a finished run, on its own model, reducer, data and key."""

import math
from dataclasses import replace

from attacks.fusion.isolation import audit_isolation
from attacks.fusion.noise import APART, audit_noise
from attacks.fusion.path import TokenPath
from attacks.fusion.sensitivity import audit_sensitivity
from dpaudit.documents import FusionAudit
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.run import gradient_path, load_model, read_config

ANY_STD = 0.1  # of fusion noise: only its independence is at stake
BATCH = 6


def path_of(run: RunFolder, device: str = "cpu") -> TokenPath:
    """The token path of a finished run at its released weights."""
    config = read_config(run)
    model = load_model(run, device)
    parameters = model.adapter_parameters()
    return TokenPath.of(
        model,
        parameters,
        key=Key.load(run.noise_key),
        fusion_std=0.0 if config.reducer.noise == "none" else ANY_STD,
        max_grad_norm=math.inf if config.method == "non-private" else config.privacy.max_grad_norm,
        gradient=gradient_path(config, model, parameters) if config.method != "non-private" else None,
    )


def audit_fusion(run: RunFolder, *, batch: int = BATCH, device: str = "cpu") -> FusionAudit:
    """Every test of the token path that this run allows. Raises UsageError when the data hold fewer than two units."""
    config = read_config(run)
    path = path_of(run, device)
    # Two pictures a unit show all that can happen between pictures of a unit and of others; more only cost time.
    units = [replace(unit, pictures=unit.pictures[:2]) for unit in data.load(config.data).train[:batch]]
    isolation = audit_isolation(path, units)
    noise = audit_noise(path, units)
    collision = any(check.name == APART and check.status == "fail" for check in noise)
    return FusionAudit(
        training="per-example preprocessing" if isolation.passed and not collision else "UNACCOUNTED",
        release="not released",
        reducer=config.reducer.name,
        first_leaking_stage=None if isolation.leak is None else isolation.leak.stage,
        leak=isolation.leak,
        checks=(*isolation.checks, *noise),
        sensitivity=audit_sensitivity(path, units),
    )
