"""How exact are per-unit gradients? Every family x gradient path x reducer x checkpointing x precision.

    python benchmarks/exactness.py              # measures what is missing in benchmarks/results/exactness.json
    python benchmarks/exactness.py --table      # prints the Markdown table of docs/exactness.md

Each row is the largest relative difference ||g - g'|| / ||g'|| over units and seeds. g is a unit's gradient before
clipping, as the path computes it within a batch. g' is that of tests/trainers/oracle.py: transformers' own forward
pass, one picture and one question at a time, one plain backward pass. The models are tiny and random (and the reference
model); pictures have several sizes, hence several tiles; units have two pictures; LoRA on language model and projector.
In float64 what is left is the rounding of gradients to float32; in float32 it is what the model makes of rounding.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from dpaudit import atomic
from dpaudit.config import LoraConfig, ReducerConfig, RunConfig, TrainingConfig, resolve
from dpaudit.errors import UsageError
from tests.tiny import random_units
from tests.tiny_families import TINY
from tests.trainers.oracle import REDUCERS, Plain
from trainers.gradients import MicroBatch
from trainers.inputs import Rows, UnitInputs
from trainers.records import Picture, Unit
from trainers.step import gradient_path
from trainers.vlm import VisionLanguageModel

RESULTS = Path(__file__).parent / "results" / "exactness.json"
SIZES = [(32, 32), (32, 64), (64, 32), (48, 32)]
SEEDS, UNITS = 3, 4
PRECISIONS = ("float64", "float32", "bfloat16")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a mixture of experts: its experts are no linear layers
PACKAGES = ("torch", "transformers", "peft", "opacus")
Row = dict[str, Any]


def units(family: str, seed: int) -> tuple[Unit, ...]:
    """Units of two pictures each; pictures of several sizes but where the family knows one size only."""
    rng = np.random.default_rng(seed)

    def resized(picture: Picture) -> Picture:
        height, width = (32, 32) if family.startswith("llava") else SIZES[rng.integers(len(SIZES))]
        if family == "reference":
            height = width = 32
        return Picture(picture.id, rng.integers(0, 256, (height, width, 3), dtype=np.uint8), picture.questions)

    made = random_units(UNITS, pictures=2, seed=seed)
    return tuple(Unit(unit.id, tuple(resized(picture) for picture in unit.pictures)) for unit in made)


def prepared(
    folder: str | None, precision: str, reducer: str, seed: int, *, projector: bool = True
) -> tuple[VisionLanguageModel, dict[str, nn.Parameter]]:
    """A model with an adapter whose B is not zero, so that every path through it matters."""
    chosen: Any = "bfloat16" if precision == "bfloat16" else "float32"
    model = VisionLanguageModel.load(folder, device="cpu", precision=chosen)
    if precision == "float64":  # not offered to users: here it tells rounding from error
        model.hf.double()
        if "moe" in model.family.model_type:  # grouped products know no float64
            model.hf.set_experts_implementation("eager")
    model.set_reducer(ReducerConfig(name=reducer, keep=3, fuse=2, layer=-1))  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    names = LoraConfig().targets if "moe" not in model.family.model_type else ATTENTION
    parameters = model.attach_lora(LoraConfig(rank=4, targets=names, projector=projector), generator=rng)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.from_numpy(rng.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)))
    return model, parameters


def per_unit(path: Any, rows: Rows) -> list[Mapping[str, Tensor]]:
    """The unclipped gradient of each unit, from whatever a path offers."""
    if isinstance(path, MicroBatch):
        return [path.gradient(rows.unit(index))[0] for index in range(rows.units)]
    if hasattr(path, "per_unit"):
        gradients, _ = path.per_unit(rows)
        return [{name: value[index] for name, value in gradients.items()} for index in range(rows.units)]
    whole = path(rows, 1e12).gradient  # a path that knows sums only: what is missing when a unit is left out
    found = []
    for index in range(rows.units):
        others = [other for other in range(rows.units) if other != index]
        rest = path(_some(rows, others), 1e12).gradient
        found.append({name: whole[name] - rest[name] for name in whole})
    return found


def _some(rows: Rows, chosen: list[int]) -> Rows:
    mine = torch.cat([(rows.owner == unit).nonzero()[:, 0] for unit in chosen])
    owner = torch.cat([torch.full((int((rows.owner == unit).sum()),), at) for at, unit in enumerate(chosen)])
    return Rows(rows.tokens[mine], rows.packed[mine], owner, rows.weight[mine], len(chosen))


def _norm(values: Mapping[str, Tensor]) -> float:
    return float(torch.sqrt(sum((value.double().square().sum() for value in values.values()), torch.zeros(()))))


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||found - expected|| / ||expected|| over all trained parameters."""
    return _norm({name: found[name].double() - expected[name].double() for name in expected}) / _norm(expected)


def configurations(names: list[str]) -> Iterator[tuple[RunConfig, str]]:
    """(configuration, what it does) for every gradient path, without and with checkpointing."""
    for name in names:
        for checkpointing in ("none", "auto"):
            settings = [f"training.gradient-path={name}", f"training.gradient-checkpointing={checkpointing}"]
            yield resolve({}, ["privacy.noise-multiplier=1", *settings]), checkpointing


def paths() -> list[str]:
    """Every gradient path that a configuration can name."""
    names = get_args(TrainingConfig.model_fields["gradient_path"].annotation)
    return [name for name in names if name != "auto"]


def measure(family: str, folder: str | None, precision: str, reducer: str, wanted: list[str]) -> Iterator[Row]:
    """One row a path and kind of checkpointing. Path "rows" does not adapt the projector: it is measured alone."""
    projector = "rows" not in wanted
    worst: dict[tuple[str, str], list[float]] = {}
    for seed in range(SEEDS):
        model, parameters = prepared(folder, precision, reducer, seed, projector=projector)
        chosen = units(family, seed)
        inputs = UnitInputs(model, chosen)
        rows = inputs.select(range(UNITS))
        oracle = Plain(model, ReducerConfig(name=reducer, keep=3, fuse=2, layer=-1))  # type: ignore[arg-type]
        expected = [oracle.gradient(unit, parameters)[0] for unit in chosen]
        for config, checkpointing in configurations(wanted):
            try:
                path = gradient_path(config, model, parameters, inputs)
            except UsageError as refused:
                print(f"refused: {refused}", file=sys.stderr)
                continue
            gaps = [relative(mine, truth) for mine, truth in zip(per_unit(path, rows), expected, strict=True)]
            kind = "none" if checkpointing == "none" else model.checkpointing
            worst.setdefault((config.training.gradient_path, kind), []).extend(gaps)
    for (path_name, kind), gaps in worst.items():
        yield {
            "family": family,
            "path": path_name,
            "reducer": reducer,
            "checkpointing": kind,
            "precision": precision,
            "gradients": len(gaps),
            "largest_relative_difference": float(f"{max(gaps):.3g}"),
        }


def main() -> None:
    """Measure what is missing, writing after every cell, so that an interrupted run goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the Markdown table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if options.table:
        print(table(rows))
        return
    done = {(row["family"], row["precision"], row["reducer"], row["path"]) for row in rows}
    versions = {name: version(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory() as place:
        for family in ["reference", *TINY]:
            folder = None if family == "reference" else str(TINY[family](Path(place) / family))
            for precision in PRECISIONS:
                for reducer in REDUCERS if precision != "bfloat16" else ("none", "visionzip"):
                    missing = [name for name in paths() if (family, precision, reducer, name) not in done]
                    for wanted in ([name for name in missing if name != "rows"], ["rows"] if "rows" in missing else []):
                        rows.extend(measure(family, folder, precision, reducer, wanted) if wanted else [])
                    if not missing:
                        continue
                    print(family, precision, reducer, rows[-1]["largest_relative_difference"], file=sys.stderr)
                    document = {"versions": versions, "seeds": SEEDS, "units_a_seed": UNITS, "rows": rows}
                    atomic.write_text(options.out, json.dumps(document, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Markdown: one line a family and reducer, one column a path with its checkpointing."""
    columns = sorted({(row["precision"], row["path"], row["checkpointing"]) for row in rows}, key=_order)
    titles = [f"{path}{'' if kind == 'none' else f', {kind} checkpointing'}" for _, path, kind in columns]
    lines = []
    for precision in PRECISIONS:
        mine = [index for index, column in enumerate(columns) if column[0] == precision]
        lines += [
            "",
            f"Computed in {precision}:",
            "",
            "| family | reducer | " + " | ".join(titles[i] for i in mine) + " |",
        ]
        lines.append("|---|---|" + "---|" * len(mine))
        for family, reducer in dict.fromkeys((row["family"], row["reducer"]) for row in rows):
            found = {
                (row["precision"], row["path"], row["checkpointing"]): row["largest_relative_difference"]
                for row in rows
                if (row["family"], row["reducer"]) == (family, reducer)
            }
            cells = [f"{found[columns[i]]:.1e}" if columns[i] in found else "-" for i in mine]
            if set(cells) != {"-"}:
                lines.append(f"| {family} | {reducer} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _order(column: tuple[str, str, str]) -> tuple[int, int, bool, str]:
    precision, path, kind = column
    return PRECISIONS.index(precision), paths().index(path) if path in paths() else 99, kind != "none", kind


if __name__ == "__main__":
    main()
