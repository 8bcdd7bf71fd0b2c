"""The sides of membership_peers.py: a target and its references as each tool trains and attacks them."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import torch
from membership_peers_model import BATCH, RATE, AnswerModel, Bools, Classified, config_of, rate_at
from torch import nn

import attacks
import trainers
from attacks.membership import formulas
from attacks.membership.members import member_twin
from attacks.membership.records import StudyRecords, study_records
from attacks.membership.references import train_references
from attacks.scores import losses
from trainers.data import load
from trainers.run import load_model

POPULATION = 200
MODEL = str(Path(__file__).with_name("membership_peers_model.py"))  # LeakPro opens the file of the model's class
STUBS = ("torchvision", "umap", "ts2vec", "kornia", "numba")


def side_dpaudit(folder: Path, data: Path, epochs: int, references: int, **_: Any) -> dict[str, Any]:
    """Target, references, LiRA and RMIA as `dpaudit audit RUN --mia --references K` plays them."""
    twin = member_twin(config_of(data, epochs), folder / "twin")
    study = train_references(twin, references)
    records = study_records(twin)
    model = load_model(twin, "cpu")
    target, outside = (losses(model, units) for units in (records.candidate_units(), records.population_units()))
    inside = _members(twin.coins, records)
    population = (outside, study.population)
    found = {
        "lira": formulas.lira_online(target, study.losses, study.inside),
        "rmia": formulas.rmia(target, study.losses, study.inside, population),
    }
    gap = float(target[~inside].mean() - target[inside].mean())
    return {"models": 1 + references, "gap": gap, **{name: rate_at(scores, inside) for name, scores in found.items()}}


def _members(coins: Path, records: StudyRecords) -> Bools:
    frame = pd.read_parquet(coins).set_index("id")
    return frame.loc[[unit.id for unit in records.candidate_units()], "member"].to_numpy(dtype=bool)


def fit(model: nn.Module, loader: Any, criterion: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """The training loop that a user of LeakPro writes."""
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, criterion: nn.Module) -> dict[str, float]:
    """Of a model on a loader, with its mean loss."""
    parts = [(model(x), y) for x, y in loader]
    logits, targets = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return {"accuracy": float((logits.argmax(1) == targets).float().mean()), "loss": float(criterion(logits, targets))}


def side_leakpro(
    folder: Path, data: Path, epochs: int, references: int, *, tokens: bool, checkout: Path
) -> dict[str, Any]:
    """A target by `fit`, then LeakPro's audit with the attacks lira and rmia on the same shadow models."""
    population = Classified(load(config_of(data, epochs).data).train, tokens)
    open_checkout(checkout)
    leakpro = importlib.import_module("leakpro.leakpro").LeakPro
    schemas = importlib.import_module("leakpro.schemas")
    base = importlib.import_module("leakpro.input_handler.abstract_input_handler").AbstractInputHandler
    order = np.random.default_rng(1).permutation(len(population))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]

    class Set(base.UserDataset):  # type: ignore[misc]
        def __init__(self, data: Any, targets: Any) -> None:
            self.data, self.targets = data, targets

    class Handler(base):  # type: ignore[misc]
        UserDataset = Set

        def train(self, dataloader: Any, model: Any, criterion: Any, optimizer: Any, epochs: int) -> Any:
            fit(model, dataloader, criterion, optimizer, epochs)
            metrics = schemas.EvalOutput(**accuracy(model, dataloader, criterion))
            return schemas.TrainingOutput(model=model, metrics=metrics)

        def eval(self, loader: Any, model: Any, criterion: Any) -> Any:
            return schemas.EvalOutput(**accuracy(model, loader, criterion))

    def loader_of(chosen: Any) -> Any:
        part = Set(population.data[chosen], population.targets[chosen])
        return torch.utils.data.DataLoader(part, batch_size=BATCH, shuffle=True)

    model, criterion = AnswerModel(tokens), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    loader, held = loader_of(train), loader_of(test)
    fit(model, loader, criterion, optimizer, epochs)
    inner, outer = accuracy(model, loader, criterion), accuracy(model, held, criterion)
    result = schemas.TrainingOutput(model=model, metrics=schemas.EvalOutput(**inner))
    metadata = leakpro.make_mia_metadata(
        result,
        optimizer,
        criterion,
        loader,
        schemas.EvalOutput(**outer),
        epochs,
        train.tolist(),
        test.tolist(),
        "digits",
    )
    target = folder / "target"
    target.mkdir()
    (target / "model_metadata.pkl").write_bytes(pickle.dumps(metadata))
    (target / "population.pkl").write_bytes(pickle.dumps(population))
    torch.save(model.state_dict(), target / "target_model.pkl")
    attacks = [{"attack": name, "online": True, "num_shadow_models": references} for name in ("lira", "rmia")]
    audit = {
        "attack_type": "mia",
        "attack_list": attacks,
        "data_modality": "tabular",
        "output_dir": str(folder / "out"),
    }
    where = {"module_path": MODEL, "model_class": "AnswerModel", "target_folder": str(target),
             "data_path": str(target / "population.pkl")}  # fmt: skip
    (folder / "audit.yaml").write_text(json.dumps({"audit": audit, "target": where}), encoding="utf-8")
    found = leakpro(Handler, str(folder / "audit.yaml")).run_audit()
    member = np.concatenate([np.ones(len(train), bool), np.zeros(len(test), bool)])
    rates = {
        name: rate_at(np.asarray(one.signal_values).ravel(), member)
        for name, one in zip(("lira", "rmia"), found, strict=True)
    }
    return {"models": 1 + references, "gap": outer["loss"] - inner["loss"], **rates}


def side_privacy_meter(
    folder: Path, data: Path, epochs: int, references: int, *, tokens: bool, checkout: Path
) -> dict[str, Any]:
    """What its run_mia.py does, on our data and model; it knows RMIA and the loss."""
    records = load(config_of(data, epochs).data)
    dataset, population = Classified(records.train, tokens), Classified(records.test[:POPULATION], tokens)
    open_privacy_meter(checkout)
    models = importlib.import_module("models.utils")
    signals, audit = importlib.import_module("get_signals"), importlib.import_module("audit")
    models.get_model = lambda *_: AnswerModel(tokens)
    # Its schedule multiplies the rate by 0.1.
    options = {"model_name": "answer", "batch_size": BATCH, "device": "cpu", "epochs": epochs, "optimizer": "AdamW",
               "learning_rate": 10 * RATE, "weight_decay": 0.0}  # fmt: skip
    settings = {
        "run": {"log_dir": str(folder)},
        "train": options,
        "data": {"dataset": "digits"},
        "audit": {"algorithm": "RMIA", "batch_size": 500, "device": "cpu", "num_ref_models": references // 2},
    }
    logger = logging.getLogger("privacy_meter")
    np.random.seed(1)
    torch.manual_seed(1)
    splits, members = models.split_dataset_for_training(len(dataset), references // 2 + 1)
    trained = models.train_models(str(folder), dataset, splits, members, settings, logger)
    seen = signals.get_model_signals(trained, dataset, settings, logger)
    public = signals.get_model_signals(trained, population, settings, logger, is_population=True)
    scores, inside = audit.audit_models(
        str(folder / "exp"), [0], seen, public, members, references // 2, logger, settings
    )
    loss, member = -np.log(seen[:, 0]), np.asarray(inside[0], bool).ravel()
    gap = float(loss[~member].mean() - loss[member].mean())
    return {"models": len(trained), "gap": gap, "rmia": rate_at(np.asarray(scores[0]).ravel(), member)}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "dpaudit": side_dpaudit,
    "leakpro": side_leakpro,
    "privacy_meter": side_privacy_meter,
}


class _Stub(ModuleType):
    """A module of which every name is a mock."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in STUBS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def open_checkout(checkout: Path) -> None:
    """Make a checkout importable, with empty modules for what isn't installed; after a model was loaded by us."""
    sys.meta_path.insert(0, _Stubs())
    sys.path.insert(0, str(checkout))


def open_privacy_meter(checkout: Path) -> ModuleType:
    """Its `attacks`. Its folder `trainers` and file `attacks` share names with packages of ours, which stay what they
    are and are given its contents as well."""
    open_checkout(checkout)
    trainers.__path__.append(str(checkout / "trainers"))
    spec = importlib.util.spec_from_file_location("privacy_meter_attacks", checkout / "attacks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("tune_offline_a", "run_rmia", "run_loss"):
        setattr(attacks, name, getattr(module, name))
    return module
