"""What test_distributed.py lets two processes do together. Imported once by a fork server, so that ranks start fast."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from attacks.games.gradients import GradientGame
from attacks.training import resume_run, start_run
from dpaudit.config import RunConfig, resolve
from dpaudit.errors import DpauditError
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder
from tests.tiny import random_units
from trainers import feature_folder
from trainers.distributed import current, joined
from trainers.gradients import Gradient
from trainers.plan import make_plan
from trainers.records import Dataset
from trainers.run import train
from trainers.sharding import local, shard
from trainers.vlm import VisionLanguageModel

FAST = ("training.batch-size=8", "training.steps=4", "model.lora.rank=2", "model.device=cpu", "seed=1",
        "training.checkpoint-every=2", "privacy.noise-multiplier=1")  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")


def data(units: int = 21) -> Dataset:
    train_units = random_units(units, pictures=1)
    return Dataset("random", "image (with all its questions)", train_units, random_units(4, seed=9, prefix="t"))


def settings(tiny: Path, *extra: str) -> RunConfig:
    return resolve({}, [f"model.path={tiny}", *FAST, *extra])


class Recorder:
    """An after-step hook that keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def __call__(self, step: int, noisy: Gradient, known: Gradient) -> None:
        for kind, values in (("noisy", noisy), ("known", known)):
            for name, value in values.items():
                self.seen[f"{step}//{kind}//{name}"] = value.detach().clone()


def start(tiny: Path, out: Path, *extra: str) -> None:
    """A run from start to end; what the hook saw lies beside it."""
    recorder = Recorder()
    start_run(settings(tiny, *extra), out, dataset=data(), after_step=recorder)
    if current().first:
        save_file(recorder.seen, out / "seen.safetensors")
    else:
        assert not recorder.seen, "the hook must see rank 0 only"


def start_sharing(tiny: Path, out: Path, *extra: str) -> None:
    """The same with a folder of encoded pictures for the project."""
    os.environ[feature_folder.VARIABLE] = str(out.parent / "features")
    start(tiny, out, *extra)


def twin(tiny: Path, out: Path, *extra: str) -> None:
    """The white-box hook: gradient canaries on rank 0, their scores beside the run."""
    config, key, group = settings(tiny, *extra), Key.from_seed(1), current()
    plan = make_plan(config, data(), 12)
    game = GradientGame(12, key, 1.0, 1.0, plan.sample_rate, plan.expected_batch_size)
    run = RunFolder.create(out) if group.first else RunFolder(out)
    if group.first:
        run.config.write_text(config.to_yaml())
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    hook: Any = {"injection": game} if group.first else {}
    from trainers.plan import Inserted

    train(config, run, key=key, dataset=data(), model=model, inserted=Inserted(12), group=group, **hook)
    if group.first:
        (out / "scores.json").write_text(json.dumps(game.scores().tolist()))


def resume(tiny: Path, out: Path, *extra: str) -> None:
    resume_run(out, dataset=data())


def shares(tiny: Path, out: Path) -> None:
    """How many frozen numbers of the decoder layers this rank holds, of how many, and how many of the adapter."""
    group, config = current(), settings(tiny)
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(config.model.lora, generator=Key.from_seed(1).generator(purpose="initialisation"))
    mine = {id(parameter) for parameter in parameters.values()}
    shard(model, parameters, group, "cpu")
    frozen = [
        value
        for name, value in model.hf.named_parameters()
        if ".layers." in name and "language_model" in name and id(value) not in mine
    ]
    counted = [sum(local(value).numel() for value in frozen), sum(value.numel() for value in frozen)]
    adapter = sum(local(value).numel() for value in parameters.values())
    (out / f"share-{group.rank}").write_text(json.dumps([*counted, adapter]))


def dies(tiny: Path, out: Path, *extra: str) -> None:
    """Rank 1 is killed while the others are in the middle of step 4."""
    from trainers.step import Trainer

    update = Trainer.update

    def fatal(self: Trainer, step: int, noisy: Gradient) -> set[str]:
        if step == 3 and not current().first:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, step, noisy)

    Trainer.update = fatal  # type: ignore[method-assign]
    start_run(settings(tiny, *extra), out, dataset=data())


def other_data(tiny: Path, out: Path, *extra: str) -> None:
    start_run(settings(tiny, *extra), out, dataset=data(21 if current().first else 22))


def _rank(rank: int, port: int, work: Callable[..., None], arguments: Sequence[Any], errors: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with joined():
            work(*arguments)
    except DpauditError as error:
        errors.write_text(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(error.exit_code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together(work: Callable[..., None], *arguments: Any, notes: Path) -> tuple[list[int], list[str]]:
    """`work(*arguments)` on two ranks; their exit codes and error lines."""
    CONTEXT.set_forkserver_preload(["tests.trainers.ranks"])
    port = free_port()
    places = [notes / f"error-{rank}" for rank in (0, 1)]
    ranks = [CONTEXT.Process(target=_rank, args=(rank, port, work, arguments, places[rank])) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks], [p.read_text() if p.exists() else "" for p in places]
