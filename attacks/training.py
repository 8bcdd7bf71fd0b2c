"""A run from its configuration alone: folder, key, data, model, canary game, training.

The game is drawn here, before the first step, and handed to the trainer as units; the trainer never learns a coin.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from attacks.canaries import Coins, Game, check_coins, draw_game
from dpaudit import folders
from dpaudit.config import RunConfig, resolve
from dpaudit.errors import InvalidGame, UsageError, rejected
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from trainers import data, distributed
from trainers.cost import Cost, estimate
from trainers.distributed import Group
from trainers.opened import Opened, open_checkpoint
from trainers.plan import Inserted, Plan, make_plan
from trainers.progress import Reporter
from trainers.records import Dataset
from trainers.run import AfterStep, read_config, train
from trainers.vlm import VisionLanguageModel

BASE_QUESTIONS, BASE_BATCH, BASE_SECONDS = 64, 16, 20.0  # of the test split, asked of the base before training


def redraw_game(
    config: RunConfig, dataset: Dataset, key: Key, model: VisionLanguageModel, coins: Coins | None = None
) -> Game | None:
    """The canary game of a run: a function of its configuration, data and key. None without canaries.

    coins: those stored, which hold what kinds chose among their proposals; without them the choice is made now.
    """
    count = config.canaries.count
    if count == 0:
        return None
    if coins is not None and len(coins.frame) != count:  # before so many candidates are drawn
        raise InvalidGame(f"coins: {len(coins.frame)} of them, where the configuration has {count} canaries")
    from attacks.fusion.masks import selection_of
    from attacks.kinds_sampled import sampler_of
    from attacks.membership.gradients import base_gradients

    return draw_game(
        dataset,
        count,
        config.canaries.kinds,
        key=key,
        spare_tokens=model.spare_tokens(count),
        gradients=base_gradients(config),
        chosen=coins.plan.chosen if coins is not None else None,
        selection=selection_of(config),
        sampler=sampler_of(config),
    )


def start_run(
    config: RunConfig,
    out: Path,
    *,
    reporter: Reporter | None = None,
    after_step: AfterStep | None = None,
    dataset: Dataset | None = None,
) -> RunFolder:
    """Train a new run in `out`. Raises UsageError when `out` holds a run already.

    `dataset` replaces what the configuration names, for callers that hold it already.
    """
    group = distributed.current()
    if not group.first:
        return _follow(group, out, dataset)
    with distributed.leading(group), open_run(config, out, dataset=dataset) as (run, key, loaded, model):
        group.from_first(lambda: _orders(config, key, resume=False))
        _train(config, run, key, loaded, model, False, reporter, after_step)
    return run


def _orders(config: RunConfig, key: Key, *, resume: bool) -> bytes:
    """What the other ranks need to know of a run that rank 0 has opened."""
    settings = config.model_dump(mode="json", by_alias=True)
    tree = {"config": settings, "key": key.material.hex(), "seeded": key.seeded, "resume": resume}
    return json.dumps(tree).encode()


def _follow(group: Group, out: Path, dataset: Dataset | None) -> RunFolder:
    """Train along with rank 0, which alone touches the folder. Nothing to do when the run is finished already."""
    orders = group.from_first(bytes)
    run = RunFolder(out)
    if orders:
        tree = json.loads(orders)
        config = resolve(tree["config"])
        key = Key(bytes.fromhex(tree["key"]), seeded=tree["seeded"])
        opened = open_checkpoint(config.model.path)
        dataset = dataset or data.load(config.data)
        model = _load_model(config, opened)
        _train(config, run, key, dataset, model, tree["resume"], None, None)
    return run


def _load_model(config: RunConfig, opened: Opened) -> VisionLanguageModel:
    chosen, group = config.model, distributed.current()
    group.sharded = group.size > 1 and config.training.parallel == "fsdp"
    device = "cpu" if group.sharded else group.device(chosen.device)  # sharded: moved layer by layer
    return VisionLanguageModel.load(device=device, precision=chosen.precision, opened=opened)


@contextmanager
def open_run(
    config: RunConfig, out: Path, *, dataset: Dataset | None = None, candidates: int | None = None
) -> Iterator[tuple[RunFolder, Key, Dataset, VisionLanguageModel]]:
    """Everything that a new run in `out` needs, its lock held: folder, key, data, base model.

    Every setting is checked before a key or a coin is drawn. `candidates`: canary candidates, where they are not those
    of the configuration. Raises UsageError when `out` holds a run already.
    """
    folders.require_outside_runs("--out", out)
    if config.model.path is not None:
        folders.require_outside("--out", out, config.model.path)
    run = RunFolder.create(out)
    with run.lock():
        if run.ledger.exists() or run.finished:
            raise UsageError(
                f"--out {out}: holds a run already; choose another folder, or dpaudit train --resume {out}"
            )
        opened = open_checkpoint(config.model.path)  # what is wrong with it is said before pictures are read
        dataset = dataset or data.load(config.data)
        model = _load_model(config, opened)
        make_plan(config, dataset, config.canaries.count if candidates is None else candidates)
        model.set_reducer(config.reducer)
        _refuse_leftovers(run)
        key = _fresh_key(config)
        run.write_config(config)
        yield run, key, dataset, model


def resume_run(path: Path, *, reporter: Reporter | None = None, dataset: Dataset | None = None) -> RunFolder:
    """Continue an interrupted run: same key, same coins, same ledger. A finished run is left as it is."""
    group = distributed.current()
    if not group.first:
        return _follow(group, path, dataset)
    with distributed.leading(group):
        run = RunFolder.open(path)
        config = read_config(run)
        with run.lock():
            if run.finished:
                run.require_finished()
                group.from_first(bytes)
                return run
            again = _begun(run)
            run.make_parts()
            opened = open_checkpoint(config.model.path)
            dataset = dataset or data.load(config.data)
            model = _load_model(config, opened)
            key = Key.load(run.noise_key) if again else _fresh_key(config)
            group.from_first(lambda: _orders(config, key, resume=again))
            _train(config, run, key, dataset, model, again, reporter, None)
    return run


def _begun(run: RunFolder) -> bool:
    """Whether an unfinished run has a key to continue with; without one it starts with a fresh key.

    Raises UsageError where the ledger of a key is missing, or the key of steps.
    """
    if not run.ledger.exists():
        _refuse_leftovers(run)
        raise UsageError(
            f"run {run.path}: stopped before its first step; start it again: dpaudit train --out {run.path}"
        )
    if run.noise_key.exists():
        return True
    spent = Ledger.load(run.ledger).steps_started
    if spent or run.traces():
        raise UsageError(f"{run.noise_key}: missing, though {spent} steps were started with it; restore it from a copy")
    run.ledger.unlink()  # nothing was spent
    return False


def _fresh_key(config: RunConfig) -> Key:
    return Key.fresh() if config.seed is None else Key.from_seed(config.seed)


def _refuse_leftovers(run: RunFolder) -> None:
    """UsageError for a folder without a ledger that holds a key, or traces of steps.

    `train` writes the ledger first, then the key, then makes steps. What lies there without a ledger was used, and
    its budget is not known any more, or somebody else put it there.
    """
    found = run.traces()
    if found:
        raise UsageError(
            f"--out {run.path}: holds {found[0].relative_to(run.path)} without its ledger.json, so noise may have been "
            "used already; choose another folder, or restore the ledger from a copy"
        )


def _train(
    config: RunConfig,
    run: RunFolder,
    key: Key,
    dataset: Dataset,
    model: VisionLanguageModel,
    resume: bool,
    reporter: Reporter | None,
    after_step: AfterStep | None,
) -> Plan:
    if reporter is not None and not resume:
        for line in model.warnings:
            reporter.phase(f"warning: {line}")
        for line in about_data(dataset):
            reporter.phase(line)
        for line in base_accuracy(model, dataset):
            reporter.phase(line)
    inserted, group = Inserted(), distributed.current()
    own = [kind for kind in ("orthogonal", "sampled") if kind in config.canaries.kinds]
    if group.size > 1 and own and config.canaries.count:
        accepted = f"kinds without {own[0]!r} with several ranks: each rank would choose its own candidates"
        raise rejected("canaries.kinds", list(config.canaries.kinds), accepted)
    coins = None
    if resume and group.first and run.ledger.exists() and config.canaries.count:
        coins = check_coins(run.coins, Ledger.load(run.ledger).document.coins_sha256)
    game = redraw_game(config, dataset, key, model, coins)
    if game is not None and not group.first:
        inserted = Inserted(len(game.candidates), game.members())
    elif game is not None:
        if resume and run.ledger.exists():
            digest = Ledger.load(run.ledger).document.coins_sha256
        else:
            digest = game.save_coins(run.coins)
        game.check_against(check_coins(run.coins, digest))
        inserted = Inserted(len(game.candidates), game.members(), digest)
    return train(
        config,
        run,
        key=key,
        dataset=dataset,
        model=model,
        inserted=inserted,
        resume=resume,
        reporter=reporter,
        after_step=after_step,
        group=group,
    )


def about_data(dataset: Dataset) -> tuple[str, ...]:
    """How the files were read, and what the owner of the data should know before anything is trained."""
    return (*(f"data: {note}" for note in dataset.notes), *(f"warning: {warning}" for warning in dataset.warnings))


def base_accuracy(model: VisionLanguageModel, dataset: Dataset) -> tuple[str, ...]:
    """What the base model answers right of some test questions, in a line; nothing for the embedded data.

    A base that knows nothing of a task can't be fine-tuned to it privately: a small set and noise teach no sight.
    """
    if dataset.source == "embedded":
        return ()
    asked = [(p.images, q) for unit in dataset.test for p in unit.pictures for q in p.questions]
    names = [f"{p.id}, question {n}" for u in dataset.test for p in u.pictures for n in range(1, len(p.questions) + 1)]
    places = np.linspace(0, len(asked) - 1, min(len(asked), BASE_QUESTIONS)).astype(int)
    chosen = [asked[index] for index in places]
    too_long: list[str] = []
    began, right, done = time.perf_counter(), 0, 0
    for at in range(0, len(chosen), BASE_BATCH):
        part = chosen[at : at + BASE_BATCH]
        said = model.answer([shown for shown, _ in part], [question for _, question in part])
        right += sum(
            text.strip().lower() in {answer.strip().lower() for answer in (question.answer, *question.accepted)}
            for text, (_, question) in zip(said, part, strict=True)
        )
        too_long += [names[places[at + index]] for index in model.too_long]
        done += len(part)
        if time.perf_counter() - began > BASE_SECONDS:
            break
    text = f"base model: {right} of {done} test questions answered right before training"
    if right == 0:
        text += " (exact match): it knows nothing of this task in this form; a checkpoint that does: --model PATH"
    if not too_long:
        return (text,)
    more = ", …" if len(too_long) > 1 else ""
    return (
        text,
        f"warning: {len(too_long)} of these {done} do not fit into the model's context of {model.max_positions} tokens "
        f"({too_long[0]}{more}): no answer, counted as wrong",
    )


def dry_run(config: RunConfig) -> tuple[Dataset, Plan, Cost, tuple[str, ...]]:
    """(data, plan, cost, warnings) of a configuration; trains and writes nothing, runs no large model."""
    opened = open_checkpoint(config.model.path)
    dataset = data.load(config.data)
    plan = make_plan(config, dataset, config.canaries.count)
    return dataset, plan, estimate(config, dataset, plan, opened), opened.warnings
