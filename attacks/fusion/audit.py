"""The fusion-path audit of a finished run, on its own model, reducer, data and key."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from attacks.fusion import published, reconstruction, release, verdicts
from attacks.fusion.blocks import audit_blocks
from attacks.fusion.isolation import audit_isolation
from attacks.fusion.masks import mask_leak
from attacks.fusion.noise import audit_noise
from attacks.fusion.path import TokenPath
from attacks.fusion.sensitivity import audit_sensitivity
from attacks.fusion.standins import one_patch
from dpaudit.config import RunConfig
from dpaudit.documents import (
    Carried,
    Check,
    ClaimDocument,
    EnvironmentDocument,
    FusionAudit,
    LedgerDocument,
    MaskLeak,
    ReleaseAudit,
    ReleasePair,
)
from dpaudit.errors import UsageError
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data
from trainers.augmentation import augmented
from trainers.fusion import TokenRelease, release_of
from trainers.gradients import GradientPath, Hooks, Plain
from trainers.inputs import UnitInputs
from trainers.plan import make_plan
from trainers.records import Dataset, Unit
from trainers.run import load_model, read_config
from trainers.step import Trainer, gradient_path
from trainers.vlm import VisionLanguageModel

KIND = "fused-region"
ANY_STD = 0.1  # of fusion noise, where only its independence is at stake
BATCH = 6
MASKED = 200  # pictures whose masks are compared
MOST_VALUES = 20_000_000  # of one game's draws
EXAMPLES = (0.01, 0.1, 1.0)  # z of accounted fusion, for the reconstruction figures of a run that does not use it


def path_of(run: RunFolder, units: Sequence[Unit], device: str = "cpu") -> TokenPath:
    """The token path of a finished run at its released weights. units: on which a fast gradient path is tried out."""
    config = read_config(run)
    model = load_model(run, device)
    model.set_reducer(config.reducer)  # without what a run with a release does to new pictures
    parameters = model.adapter_parameters()
    key = Key.load(run.noise_key)
    publish = release_of(config, key)

    def encode(shown: Sequence[Unit]) -> UnitInputs:
        return UnitInputs(model, augmented(shown, config.training.augmentations), release=publish)

    return TokenPath.of(
        model,
        parameters,
        key=key,
        fusion_std=0.0 if config.reducer.noise == "none" else ANY_STD,
        max_grad_norm=math.inf if config.method == "non-private" else config.privacy.max_grad_norm,
        gradients=gradient_paths(run, config, model, parameters, encode(units)),
        encode=encode,
    )


def gradient_paths(
    run: RunFolder,
    config: RunConfig,
    model: VisionLanguageModel,
    parameters: Mapping[str, nn.Parameter],
    inputs: UnitInputs,
) -> tuple[GradientPath, ...]:
    """What the configuration means here, and what the steps of the run computed their sums by, as its release records.

    The record can name more than the configuration, which leaves `auto` to the machine; it can't take anything away.
    An earlier dpaudit recorded nothing: there, Opacus' hooks are looked at as well, which `auto` meant then.
    Without privacy nothing is clipped, and hooks stand for the plain sum, which has no gradient of a unit. UsageError
    for a recorded path that this method has not, or that does not compute this model.
    """
    recorded = EnvironmentDocument.read(run.environment).gradient_paths if run.environment.exists() else None
    chosen = config.training.gradient_path
    if config.method == "dp-zo":  # moves the weights by losses alone; gradients show more than these
        names: tuple[str, ...] = ("hooks",)
    elif recorded and "plain" in recorded and config.method != "non-private":
        accepted = f"a path that clips, for method {config.method}"
        raise UsageError(f"{run.environment}: gradient_paths: got plain; accepted: {accepted}")
    else:
        before = ("hooks",) if chosen == "auto" else ()
        names = tuple(dict.fromkeys((chosen, *(recorded or before))))
    # Two paths may want two kinds of checkpointing, which changes memory and no gradient.
    update = {"gradient_checkpointing": "none"} if len(names) > 1 else {}
    found: dict[str, GradientPath] = {}
    for name in names:
        training = config.training.model_copy(update={**update, "gradient_path": name})
        way = gradient_path(config.model_copy(update={"training": training}), model, parameters, inputs)
        way = Hooks(model, parameters) if isinstance(way, Plain) else way
        found[way.kind] = way
    return tuple(found.values())


def audit_fusion(
    run: RunFolder, *, batch: int = BATCH, device: str = "cpu", log: Callable[[str], None] = lambda _: None
) -> FusionAudit:
    """Every test of the token path that this run allows. Raises UsageError when the data hold fewer than two units.

    The tests run on held-out records where there are any: the figures go into a document that may be published, and
    exact figures of training records must not (docs/fusion-path.md).
    """
    config = read_config(run)
    dataset = data.load(config.data)
    # Two pictures a unit show all that can happen between pictures of a unit and of others; more only cost time.
    records = dataset.test if len(dataset.test) >= 2 else dataset.train
    units = [replace(unit, pictures=unit.pictures[:2]) for unit in records[:batch]]
    path = path_of(run, units, device)
    log("token path: isolation")
    isolation = audit_isolation(path, units)
    log("token path: noise, sensitivity, update mask")
    noise = audit_noise(path, units)
    sensitivity = audit_sensitivity(path, units)
    mask = _mask_check(config, dataset, units)
    log("token path: what released tokens would tell")
    publish = release_of(config, path.key)
    released, publishing = _release_audit(run, path, publish, records, config)
    rows = LedgerDocument.read(run.ledger).rows
    found = verdicts.Findings(
        isolation=isolation,
        noise=noise,
        mask=mask,
        sensitivity=sensitivity,
        released=released,
        publishing=publishing,
        leaves=publish is not None,
        tuning=next((row for row in rows if row.stage == "tuning"), None),
    )
    table = verdicts.cases(found)
    carries = carried_by(run, config, dataset, device, log)
    return FusionAudit(
        training=verdicts.training_status(table),
        release=verdicts.release_status(table),
        reducer=config.reducer.name,
        first_leaking_stage=None if isolation.leak is None else isolation.leak.stage,
        leak=isolation.leak,
        checks=(*isolation.checks, *noise, mask, *publishing),
        sensitivity=sensitivity,
        released=released,
        cases=table,
        carried=carries,
    )


def carried_by(
    run: RunFolder, config: RunConfig, dataset: Dataset, device: str, log: Callable[[str], None]
) -> Carried | None:
    """Exposure of the run's fused-region canaries; None where it has none, or too few for figures.

    Raises InvalidGame when its coins are not those of its ledger, configuration and key.
    """
    if not config.canaries.count or KIND not in config.canaries.kinds:
        return None
    from attacks.canaries import check_coins
    from attacks.fusion.carried import carried, exposures
    from attacks.training import redraw_game

    log("token path: exposure of fused-region canaries")
    coins = check_coins(run.coins, LedgerDocument.read(run.ledger).coins_sha256)
    base = load_model(None, device, config=config)
    game = redraw_game(config, dataset, Key.load(run.noise_key), base, coins)
    assert game is not None
    game.check_against(coins)
    mine = [canary for canary in game.candidates if canary.kind == KIND]
    return carried(mine, exposures(base, load_model(run, device), [canary.unit for canary in mine]))


def record(run: RunFolder, audit: FusionAudit) -> None:
    """Let the run's ledger cite the tests that decided its rows. The caller holds the run's lock."""
    ledger = Ledger.load(run.ledger)
    there = {row.path: row for row in ledger.rows}
    for row in verdicts.ledger(ledger.rows, audit.cases):
        if row.path not in there:
            ledger.add_row(row)
        elif row != there[row.path]:
            ledger.replace_row(row)


def _mask_check(config: RunConfig, dataset: Dataset, units: Sequence[Unit]) -> Check:
    """The update mask of this run's own trainer, on a few of its units."""
    training = config.training.model_copy(update={"batch_size": len(units), "steps": 10, "sampling": "poisson"})
    privacy = config.privacy.model_copy(update={"epsilon": None, "noise_multiplier": 1.0, "delta": 1e-3})
    if config.method == "non-private":
        privacy = config.privacy
    small = config.model_copy(update={"training": training, "privacy": privacy})
    few = replace(dataset, train=tuple(units), reserve=())
    plan = make_plan(small, few, 0)

    def make(chosen: Sequence[Unit]) -> Trainer:
        model = VisionLanguageModel.load(config.model.path, device="cpu", precision=config.model.precision)
        return Trainer.build(small, plan, Key.from_seed(0), model, chosen)

    return audit_blocks(make, units)


def paper_std(run: RunFolder, config: RunConfig) -> float:
    """Standard deviation of the run's fusion noise, from its claim."""
    noise = config.reducer.noise
    claim = ClaimDocument.read(run.claim).claim
    if noise == "none":
        return 0.0
    if noise in ("sum", "mean"):
        if claim is None:
            return 0.0  # sigma is 0
        assert claim.noise_multiplier is not None and claim.max_grad_norm is not None
        total = float(claim.noise_multiplier) * claim.max_grad_norm
        return total if noise == "sum" else total / float(claim.expected_batch_size or 1.0)
    return float(noise)


def _release_audit(
    run: RunFolder, path: TokenPath, publish: TokenRelease | None, records: Sequence[Unit], config: RunConfig
) -> tuple[ReleaseAudit, tuple[Check, ...]]:
    """The part of the document on leaving tokens, and the checks of what a run really publishes."""
    delta = config.privacy.delta
    units = [release.alone(unit, f"unit {index}") for index, unit in enumerate(records[:MASKED])]
    std = paper_std(run, config)
    checks: tuple[Check, ...] = ()
    if publish is None:
        noiseless, tokens = release.noiseless_tokens(path, units[0])
        pairs = paper_pairs(path, units, std, delta=delta)
        # A run without fusion noise has nothing but noiseless tokens.
        statement, epsilon = _noiseless(noiseless, tokens, pairs), math.inf
    else:
        noiseless, tokens = 0, len(path.model.encoded([units[0].pictures[0].pixels])[0].tokens)
        games = published.pairs(publish, path, units, draws=_draws(path, units), seed=0)
        pairs, agrees = published.audit_pairs(publish, games, delta=delta)
        checks = (*published.audit_noise(publish, path, records[:BATCH]), agrees)
        statement, epsilon = _accounted(run, pairs, publish, delta)
    masks = _masks(path, units, config)
    rebuilt = _rebuilt(path, publish, std)
    if masks is not None and publish is None:
        statement += f" The mask alone tells {masks.flipped} of {masks.neighbours} pictures from a one-patch neighbour."
    part = ReleaseAudit(
        delta=delta,
        tokens=tokens,
        noiseless=noiseless,
        epsilon=epsilon,
        statement=statement,
        pairs=pairs,
        masks=masks,
        reconstructions=() if rebuilt is None else rebuilt.rows,
        strip_png_base64=None if rebuilt is None else reconstruction.strip_text(rebuilt.strip),
        strip_caption=None if rebuilt is None else rebuilt.caption,
    )
    return part, checks


def _draws(path: TokenPath, units: Sequence[Unit]) -> int:
    """As many as fit."""
    values = path.model.encoded([units[0].pictures[0].pixels])[0].tokens.numel()
    return int(np.clip(MOST_VALUES // max(values, 1), 100, release.DRAWS))


def paper_pairs(
    path: TokenPath, units: Sequence[Unit], std: float, *, delta: float, seed: int = 0
) -> tuple[ReleasePair, ...]:
    """Games on the fused tokens under the trainer's own noise: at the run's std, and where a game can measure.

    Nothing where the reducer fuses no tokens or adds no noise to them.
    """
    if std <= 0 or len(units) < 2 or not path.encode(units[:1]).fused:
        return ()
    rng = np.random.default_rng(seed)
    draws = _draws(path, units)
    one, two = units[0].pictures[0].pixels, units[1].pictures[0].pixels
    real = release.fused_pair(path, units[:2], "two pictures", release.fair_coins(draws, rng))
    patched = release.alone(units[0], "patched", one_patch(one))
    near = release.fused_pair(
        path, [units[0], patched], "a picture and itself with one patch changed", release.fair_coins(draws, rng)
    )
    ends = release.farthest(path.model, one, two, rng=rng) if one.shape == two.shape else (one, two)
    far = release.fused_pair(
        path,
        [release.alone(units[0], f"end {place}", pixels) for place, pixels in enumerate(ends)],
        "the two farthest pictures that a search found",
        release.fair_coins(draws, rng),
    )
    played = [release.play(pair, std, delta=delta) for pair in (real, near, far)]
    played += [release.play(real, real.distance / mu, delta=delta) for mu in release.CALIBRATED if real.distance > 0]
    return tuple(played)


def _noiseless(noiseless: int, tokens: int, pairs: Sequence[ReleasePair]) -> str:
    text = (
        f"{noiseless} of {tokens} tokens of a picture carry no noise: they are a function of the picture, so whoever "
        "holds them tells any two pictures apart, and eps is infinite."
    )
    if pairs:
        worst = max(pairs, key=lambda pair: pair.mu)
        text += (
            f" The fused tokens alone: mu = {float(pairs[0].mu):.3g} for two pictures and "
            f"{float(worst.mu):.3g} for {worst.name} (eps = {float(worst.epsilon):.3g} at {worst.tests[0].delta:g}); "
            "there is no bound over all pictures."
        )
    return text


def _accounted(run: RunFolder, pairs: Sequence[ReleasePair], publish: TokenRelease, delta: float) -> tuple[str, float]:
    from dpaudit.accounting import joint_epsilon, release_event

    claim = ClaimDocument.read(run.claim).claim
    assert claim is not None
    epsilon = joint_epsilon([release_event(publish.multiplier, claim.relation)], delta)
    worst = max(pairs, key=lambda pair: pair.mu)
    return (
        f"All tokens of a unit are clipped to {publish.radius:g} and noised once with z = {publish.multiplier:g}: "
        f"eps = {epsilon:.4g} at {delta:g} under {claim.relation}, part of the claim's. Largest mu played "
        f"{float(worst.mu):.3g} ({worst.name}), measured between {worst.mu_low or 0:.3g} and "
        f"{float(worst.mu_high or math.inf):.3g}.",
        epsilon,
    )


def _masks(path: TokenPath, units: Sequence[Unit], config: RunConfig) -> MaskLeak | None:
    """Nothing where the selection is not of single patches of the picture, or the same for every picture."""
    if config.reducer.name in ("none", "random"):
        return None
    pictures = [unit.pictures[0].pixels for unit in units]
    same = [pixels for pixels in pictures if pixels.shape == pictures[0].shape]
    if len(same) < 2:
        return None
    return mask_leak(path.model, same, rng=np.random.default_rng(0))


def _rebuilt(path: TokenPath, publish: TokenRelease | None, std: float) -> reconstruction.Rebuilt | None:
    """Reconstruction of public pictures, at the run's own noise and at some of accounted fusion."""
    corpora = reconstruction.public_corpora(path.model)
    if corpora is None:
        return None
    fused = path.model.encoded([np.zeros((32, 32, 3), np.uint8)])[0].fused
    typical = float(np.median([float(item.norm()) for item in corpora[0].tokens]))
    own = reconstruction.fused_noise(std, fused)
    levels = [own]
    if fused:
        loud = typical / math.sqrt(fused)  # per coordinate: louder than any token
        levels.append(reconstruction.fused_noise(loud, fused))
    radius = typical if publish is None else publish.radius
    steps = EXAMPLES if publish is None else (publish.multiplier,)
    levels += [reconstruction.accounted(radius, z) for z in steps]
    return reconstruction.rebuild(*corpora, levels, deep=[own.name])
