"""16 reference models here, in LeakPro and in privacy_meter: CPU time, and what LiRA and RMIA find with them.

    python benchmarks/membership_peers.py --leakpro CHECKOUT --privacy-meter CHECKOUT

The problem: 1,150 pictures of handwriting, "Which digit is this?", and the reference model with LoRA, fine-tuned on
half of them without privacy. For the others the model is wrapped as a classifier (`AnswerModel`: picture in, logits of
the answer's token out), because that is what they take.

Cost: each tool trains one target and its references in its own way, in a process of its own, on one thread a process.
Ours takes all cores and runs alone; the two others take one and run side by side. Here it is `member_twin` and
`train_references`; in LeakPro `LeakPro.run_audit` with the attacks lira and rmia (the user writes the training loop;
ours is eight lines of torch); in privacy_meter `train_models`, `get_model_signals` and `audit_models`. Equal numbers of
units, batch size, steps and AdamW. privacy_meter trains models in pairs, so 16 references make 18 models there. CPU
time of the process and of its children, imports included, and per model. Rows "tokens" give the others what we compute
for ourselves: the frozen tower's tokens in place of the pictures.

Power: nine complementary pairs of models. Each of the 18 is a target, with the 16 of the other pairs as references, and
all three tools get the same logits, members and population: LeakPro's `AttackLiRA` and `AttackRMIA`, privacy_meter's
`run_rmia` with `tune_offline_a`, our formulas. True positive rate at a false positive rate of at most 1 %, mean over
the targets with its standard error.

Libraries that the others import for attacks that aren't run here are replaced by empty modules (torchvision, umap,
ts2vec, kornia, numba); LeakPro also needs optuna, seaborn and dotmap. Results:
benchmarks/results/membership_peers.json.
"""

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from membership_peers_model import BATCH, Bools, Floats, config_of, labels_of, rate_at, write_data
from membership_peers_sides import POPULATION, SIDES, open_checkout, open_privacy_meter
from torch import Tensor

from attacks.membership import formulas
from attacks.membership.stacked import Shared, Trial, train_stack
from dpaudit import atomic
from dpaudit.randomness import Key
from trainers.data import load
from trainers.plan import make_plan
from trainers.prompts import IGNORE
from trainers.vlm import VisionLanguageModel

RESULTS = Path(__file__).parent / "results" / "membership_peers.json"
EPOCHS, REFERENCES = 20, 16


def measured(side: str, data: Path, options: argparse.Namespace, *, tokens: bool = False) -> dict[str, Any]:
    """One side in a process of its own: its figures, CPU seconds with those of its children, and wall seconds."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as said:
        call = [sys.executable, __file__, "--side", side, "--data", str(data), "--folder", name, "--epochs",
                str(options.epochs), "--references", str(options.references), "--leakpro", str(options.leakpro),
                "--privacy-meter", str(options.privacy_meter), *(["--tokens"] if tokens else [])]  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        began = time.perf_counter()
        child = subprocess.Popen(call, env=os.environ | threads, stdout=said)
        _, status, used = os.wait4(child.pid, 0)
        wall = round(time.perf_counter() - began, 1)
        if status:
            raise RuntimeError(f"{side} ended with status {os.waitstatus_to_exitcode(status)}")
        said.seek(0)
        row = json.loads(said.read().splitlines()[-1])
    cpu = used.ru_utime + used.ru_stime
    found = {"side": side, "input": "tokens" if tokens else "pictures", **row, "cpu": round(cpu, 1), "wall": wall,
             "cpu_per_model": round(cpu / row["models"], 2)}  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def cost(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours alone, since it takes all cores; of the others, which take one, two side by side."""
    rows = [measured("dpaudit", data, options)]
    for given in options.inputs:
        others = [side for side in SIDES if side != "dpaudit"]
        with ThreadPoolExecutor(len(others)) as pool:
            rows += pool.map(lambda side, given=given: measured(side, data, options, tokens=given == "tokens"), others)
    return rows


def pairs(data: Path, epochs: int, count: int) -> tuple[Floats, Floats, Bools, npt.NDArray[np.int64]]:
    """Logits of complementary pairs of models, (2 count, N, V), those of the population, members, and labels (N,)."""
    config = config_of(data, epochs)
    records = load(config.data)
    units = (*records.train, *records.test[:POPULATION])
    model = VisionLanguageModel.load(None, device="cpu")
    shared = Shared.of(config, make_plan(config, records, 0), model, units)
    rng, total = np.random.default_rng(2), len(records.train)
    members = np.zeros((2 * count, total), bool)
    for pair in range(count):
        half = rng.permutation(total)[: total // 2]
        members[2 * pair, half] = True
        members[2 * pair + 1] = ~members[2 * pair]
    trials = [Trial(Key.from_seed(1000 + place), np.flatnonzero(row)) for place, row in enumerate(members)]
    logits = []
    for place, trial in enumerate(trials):
        (adapter,) = train_stack(shared, [trial])
        logits.append(answers_under(shared, adapter))
        print(f"pairs: model {place + 1} of {len(trials)}", file=sys.stderr, flush=True)
    both = np.stack(logits)
    return both[:, :total], both[:, total:], members, labels_of(model, units)


@torch.no_grad()
def answers_under(shared: Shared, adapter: dict[str, Tensor]) -> Floats:
    """(units, V) logits of the answer's first token under an adapter."""
    for name, value in shared.model.adapter_parameters().items():
        value.copy_(adapter[name])
    parts = []
    for chunk in shared.inputs.chunks(range(len(shared.units)), 64):
        rows = shared.inputs.select(chunk)
        logits = shared.model.logits(rows.tokens, rows.packed)
        owner = (rows.packed.targets != IGNORE).nonzero()[:, 0]
        first = torch.cat([torch.ones(1, dtype=torch.bool), owner.diff() > 0])
        parts.append(logits[first].double().numpy())
    return np.concatenate(parts)


def log_softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def power(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tool's attacks on every model of the pairs."""
    logits, outside, members, labels = pairs(data, options.epochs, options.references // 2 + 1)
    total = logits.shape[1]
    answer = -np.take_along_axis(log_softmax(logits), labels[None, :total, None], 2)[:, :, 0]
    public = -np.take_along_axis(log_softmax(outside), labels[None, total:, None], 2)[:, :, 0]
    open_checkout(options.leakpro)
    mia = "leakpro.attacks.mia_attacks"
    lira, rmia = (importlib.import_module(f"{mia}.{name}") for name in ("lira", "rmia"))
    meter = open_privacy_meter(options.privacy_meter)
    np.random.seed(3)
    found: dict[str, list[float]] = {}
    for target, member in enumerate(members):
        others = [place for place in range(len(members)) if place // 2 != target // 2]
        inside = members[others]
        arguments = (answer[target], answer[others], inside)
        scores = {
            "dpaudit lira": formulas.lira_online(*arguments),
            "dpaudit rmia": formulas.rmia(*arguments, (public[target], public[others])),
            "dpaudit bavaria (default)": formulas.bavaria(*arguments),
            "leakpro lira": _leakpro_lira(lira, logits, labels[:total], target, others, member, inside),
            "leakpro rmia": _leakpro_rmia(rmia, logits, labels[:total], target, others, member, {}),
            "leakpro rmia, gamma 1, temperature 1": _leakpro_rmia(
                rmia, logits, labels[:total], target, others, member, {"gamma": 1.0, "temperature": 1.0}
            ),
            "privacy_meter rmia": _privacy_meter(meter, answer, public, members, target, others),
        }
        for name, values in scores.items():
            found.setdefault(name, []).append(rate_at(values, member))
    return [
        {"attack": name, "targets": len(rates), "tpr_at_1_percent": round(float(np.mean(rates)), 4),
         "standard_error": round(float(np.std(rates, ddof=1) / np.sqrt(len(rates))), 4),
         "each": [round(rate, 4) for rate in rates]}
        for name, rates in found.items()
    ]  # fmt: skip


def _scores_of(attack: Any, member: Bools) -> Floats:
    """What a LeakPro attack left, in the records' order."""
    scores = np.empty(len(member))
    scores[member], scores[~member] = attack.in_member_signals.ravel(), attack.out_member_signals.ravel()
    return scores


def _prepared(kind: Any, member: Bools, settings: dict[str, Any]) -> Any:
    """A LeakPro attack with its configuration, before `prepare_attack`."""
    attack = kind.__new__(kind)
    attack.configs = kind.AttackConfig(**settings)
    for name, value in attack.configs.model_dump().items():
        setattr(attack, name, value)
    (base,) = kind.__bases__  # attacks share what is audited as an attribute of their class
    base.audit_dataset = {"data": np.arange(len(member)), "in_members": np.flatnonzero(member),
                          "out_members": np.flatnonzero(~member)}  # fmt: skip
    return attack


def _leakpro_lira(
    module: Any, logits: Floats, labels: Any, target: int, others: list[int], member: Bools, inside: Bools
) -> Floats:
    attack = _prepared(module.AttackLiRA, member, {"online": True, "num_shadow_models": len(others)})
    attack.fix_var_threshold, attack.out_indices = 32, ~inside
    attack.target_logits = attack.rescale_logits(logits[target], labels)
    attack.shadow_models_logits = np.array([attack.rescale_logits(logits[place], labels) for place in others])
    attack.run_attack()
    return _scores_of(attack, member)


def _leakpro_rmia(
    module: Any, logits: Floats, labels: Any, target: int, others: list[int], member: Bools, settings: dict[str, Any]
) -> Floats:
    settings = {"online": True, "num_shadow_models": len(others), **settings}
    attack = _prepared(module.AttackRMIA, member, settings)
    attack.handler = SimpleNamespace(
        train_indices=np.arange(len(member)), test_indices=np.empty(0, int), get_labels=lambda chosen: labels[chosen],
        target_model=None,
    )  # fmt: skip
    attack.epsilon, attack.load_for_optuna, attack.attack_data_indices = 1e-6, True, np.arange(len(member))
    attack.ground_truth_indices, attack.logits_theta = labels, logits[target]
    attack.logits_shadow_models, attack.shadow_models = [logits[place] for place in others], [None] * len(others)
    attack.prepare_attack()
    attack.run_attack()
    return _scores_of(attack, member)


def _privacy_meter(
    module: Any, answer: Floats, public: Floats, members: Bools, target: int, others: list[int]
) -> Floats:
    columns = [target, target ^ 1, *others]  # it takes the second of a pair to tune on
    signals, outside = np.exp(-answer[columns]).T, np.exp(-public[columns]).T
    inside = members[columns].T
    logger = logging.getLogger("privacy_meter")
    a = module.tune_offline_a(0, signals, outside, inside, logger)[0]
    return np.asarray(module.run_rmia(0, signals, outside, inside, len(others) // 2, a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leakpro", type=Path, required=True)
    parser.add_argument("--privacy-meter", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--references", type=int, default=REFERENCES)
    parser.add_argument("--parts", nargs="+", default=["cost", "power"], choices=["cost", "power"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--inputs", nargs="+", default=["pictures", "tokens"], choices=["pictures", "tokens"])
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        checkout = {"leakpro": options.leakpro, "privacy_meter": options.privacy_meter}.get(options.side)
        more = {} if checkout is None else {"tokens": options.tokens, "checkout": checkout}
        row = SIDES[options.side](options.folder, options.data, options.epochs, options.references, **more)
        print(json.dumps(row), flush=True)
        return
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_data(data)
        about = {"epochs": options.epochs, "batch": BATCH, "references": options.references,
                 "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread a process"}  # fmt: skip
        if "cost" in options.parts:
            result["cost"] = {**about, "rows": cost(data, options)}
        if "power" in options.parts:
            torch.set_num_threads(1)
            rows = power(data, options)
            result.setdefault("power", {})[str(options.epochs)] = {**about, "rows": rows}
            for row in rows:
                print({key: value for key, value in row.items() if key != "each"}, flush=True)
        atomic.write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
