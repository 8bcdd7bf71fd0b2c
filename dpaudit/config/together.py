"""Rules that span sections, checked before anything is computed."""

from collections.abc import Sequence

from dpaudit.config.sections import RunConfig, Section, ZerothOrderConfig, dashed
from dpaudit.errors import rejected


def check_together(config: RunConfig) -> None:
    """Rules that span sections."""
    privacy = config.privacy
    if config.method == "non-private":
        _check_unused("privacy", privacy, ("clipping",), False, "a method that clips")
    elif (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise rejected(
            "privacy.epsilon", privacy.epsilon, "either privacy.epsilon or privacy.noise-multiplier, exactly one"
        )
    if not config.claims and config.planted.noise_scale != 1.0:
        raise rejected("planted.noise-scale", config.planted.noise_scale, "1.0 for a run that adds no noise")
    _check_zeroth_order(config)
    _check_recipe(config)
    _check_fusion(config)
    _check_unused(
        "pruning", config.pruning, ("decay", "explore"), config.pruning.by == "previous", "pruning.by=previous"
    )
    _check_sampling(config)
    if config.canaries.count and not config.canaries.kinds:
        raise rejected("canaries.kinds", config.canaries.kinds, "at least one kind")
    reducer = config.reducer
    if reducer.noise != "none" and reducer.name not in ("visionzip",):
        raise rejected("reducer.noise", reducer.noise, f"'none' for reducer {reducer.name} (it fuses no tokens)")
    if reducer.name == "visionzip" and reducer.fuse is not None and reducer.fuse < 1:
        raise rejected("reducer.fuse", reducer.fuse, "at least 1 for reducer visionzip")
    if reducer.assign != "keys" and reducer.name != "visionzip":
        raise rejected("reducer.assign", reducer.assign, f"keys for reducer {reducer.name} (it assigns nothing)")
    if isinstance(reducer.noise, float) and reducer.noise < 0:
        raise rejected("reducer.noise", reducer.noise, "'none', 'sum', 'mean' or a number >= 0")
    if config.method == "non-private" and reducer.noise in ("sum", "mean"):
        raise rejected("reducer.noise", reducer.noise, "'none' or a number for method non-private (it has no sigma)")


def _check_sampling(config: RunConfig) -> None:
    """What has no proof is refused before anything is computed."""
    training, sampling = config.training, config.training.sampling
    laplace = config.method == "dp-zo" and config.zeroth_order.noise == "laplace"
    if sampling in ("fixed", "allocation") and laplace:
        raise rejected("training.sampling", sampling, "poisson or shuffle for Laplace noise")
    if sampling == "allocation" and config.method != "non-private" and config.privacy.relation == "replace":
        raise rejected("privacy.relation", "replace", "add-remove or zero-out with training.sampling=allocation")
    _check_unused("training", training, ("draws",), sampling == "allocation", "training.sampling=allocation")


def _check_fusion(config: RunConfig) -> None:
    """A release of tokens needs its own clip norm and noise, a claim to be part of, and a relation that it can keep."""
    chosen = config.fusion
    _check_unused(
        "fusion", chosen, ("radius", "multiplier"), chosen.release == "clip-noise", "fusion.release=clip-noise"
    )
    if chosen.release == "none":
        return
    if not config.claims:
        raise rejected("fusion.release", chosen.release, "none for a run that makes no claim")
    if chosen.radius is None:
        hint = "a number > 0, chosen on public pictures (python -m trainers.fusion prints their norms)"
        raise rejected("fusion.radius", None, hint)
    if chosen.multiplier is None:
        raise rejected("fusion.multiplier", None, "a number > 0: the noise on the tokens over fusion.radius")
    if config.training.augmentations > 1:
        accepted = "1 with fusion.release: what is published are the tokens of the pictures themselves"
        raise rejected("training.augmentations", config.training.augmentations, accepted)
    if config.privacy.relation == "add-remove":
        accepted = "zero-out or replace with fusion.release=clip-noise: a published row shows presence"
        raise rejected("privacy.relation", "add-remove", accepted)


def _check_recipe(config: RunConfig) -> None:
    """Settings of one optimiser, and steps that train a part of the adapter."""
    training, which = config.training, config.model.lora.train
    adam = training.optimizer != "sgd"
    _check_unused("training", training, ("beta1", "beta2", "adam_epsilon"), adam, "training.optimizer=adamw or adambc")
    corrected = training.optimizer == "adambc"
    _check_unused("training", training, ("variance_floor",), corrected, "training.optimizer=adambc")
    _check_unused("training", training, ("momentum",), not adam, "training.optimizer=sgd")
    if corrected and not config.claims:
        raise rejected("training.optimizer", "adambc", "adamw or sgd for a run without noise (nothing to take out)")
    if corrected and config.method == "dp-zo":
        raise rejected("training.optimizer", "adambc", "adamw or sgd for method dp-zo (its noise is on numbers)")
    if which == "alternating" and config.method == "dp-zo":
        raise rejected(
            "model.lora.train", which, "both or b for method dp-zo (a direction is over all that is trained)"
        )
    pruned = config.pruning.keep < 1 and (config.pruning.by == "previous" or config.pruning.granularity == "layer")
    if which == "alternating" and pruned:
        accepted = "both or b with pruning.by=previous or pruning.granularity=layer, whose blocks hold A and B"
        raise rejected("model.lora.train", which, accepted)


def _check_zeroth_order(config: RunConfig) -> None:
    """dp-zo has K noisy numbers a step, and no noisy gradient of any block."""
    chosen = config.zeroth_order
    zeroth = config.method == "dp-zo"
    _check_unused("zeroth-order", chosen, tuple(ZerothOrderConfig.model_fields), zeroth, "method dp-zo")
    if not zeroth:
        return
    if config.pruning.keep < 1:
        raise rejected("pruning.keep", config.pruning.keep, "1 for method dp-zo (no block has noise of its own)")
    if config.training.gradient_path != "auto":
        raise rejected("training.gradient-path", config.training.gradient_path, "auto for method dp-zo (no gradients)")
    if config.training.gradient_checkpointing != "none":
        given = config.training.gradient_checkpointing
        raise rejected("training.gradient-checkpointing", given, "none for method dp-zo (no backward pass)")
    if chosen.noise == "laplace" and config.privacy.noise == "secure":
        raise rejected("privacy.noise", "secure", "plain for Laplace noise")
    if chosen.noise == "laplace" and config.privacy.relation == "replace":
        raise rejected("privacy.relation", "replace", "add-remove or zero-out for Laplace noise")


def _check_unused(section: str, given: Section, fields: Sequence[str], used: bool, where: str) -> None:
    """A setting that would change nothing is a slip: fields of `given` keep their defaults unless they are used."""
    plain = type(given)()
    for name in fields:
        if not used and getattr(given, name) != getattr(plain, name):
            raise rejected(f"{section}.{dashed(name)}", getattr(given, name), f"only with {where}")
