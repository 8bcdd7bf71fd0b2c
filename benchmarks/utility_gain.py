"""How much of what non-private fine-tuning adds over the base model do the private methods keep?

    python benchmarks/utility_gain.py --data shifted    # public synthetic pictures: where settings are chosen
    python benchmarks/utility_gain.py --data digits     # real handwriting: reported, never used to choose

Every arm is trained from the same base with the settings that `dpaudit train` uses by default (plus what is given with
--set), once a seed. gain kept = (arm - base) / (non-private - base) of held-out exact match, averaged over seeds; the
interval is a bootstrap over pictures and seeds together (2,000 resamples, 95 %), the same pictures for all arms.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from attacks.training import start_run
from dpaudit.config import resolve
from trainers.progress import Live
from trainers.records import Dataset, Unit
from trainers.run import load_model
from trainers.vlm import VisionLanguageModel

ARMS = ("non-private", "dp-sgd", "dual-priv")
RESULTS = Path(__file__).parent / "results"


def load(name: str) -> Dataset:
    """Real digits, or public synthetic pictures in a style that the base model was not trained on."""
    if name == "digits":
        from trainers.data.digits import load_digits_vqa

        return load_digits_vqa()
    from trainers.public.synthetic import synthetic_vqa

    return synthetic_vqa("shifted", 1150, seed=11)


def correct(model: VisionLanguageModel, units: tuple[Unit, ...]) -> npt.NDArray[np.float64]:
    """(pictures, questions) 1 where the greedy answer equals the right one."""
    pictures = [picture for unit in units for picture in unit.pictures]
    pixels = [picture.pixels for picture in pictures for _ in picture.questions]
    questions = [question for picture in pictures for question in picture.questions]
    answers = model.answer(pixels, [question.text for question in questions])
    right = [given.strip() == question.answer for given, question in zip(answers, questions, strict=True)]
    return np.array(right, dtype=np.float64).reshape(len(pictures), -1)


def train_arm(arm: str, seed: int, dataset: Dataset, settings: list[str]) -> tuple[npt.NDArray[np.float64], float]:
    """Correctness of one freshly trained arm and its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        config = resolve({"method": arm}, [f"seed={seed}", "model.device=cpu", *settings])
        began = time.monotonic()
        run = start_run(config, Path(folder) / "run", dataset=dataset, reporter=Live(f"{arm} seed {seed}"))
        return correct(load_model(run, "cpu"), dataset.test), time.monotonic() - began


def interval(
    base: npt.NDArray[np.float64],
    plain: npt.NDArray[np.float64],
    arm: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """Gain kept with its interval. base: (pictures,); plain, arm: (seeds, pictures) mean correctness a picture."""

    def kept(pictures: npt.NDArray[np.int64], seeds: npt.NDArray[np.int64]) -> float:
        low, high = base[pictures].mean(), plain[np.ix_(seeds, pictures)].mean()
        return float((arm[np.ix_(seeds, pictures)].mean() - low) / (high - low))

    everything = kept(np.arange(base.size), np.arange(len(arm)))
    draws = [kept(rng.integers(0, base.size, base.size), rng.integers(0, len(arm), len(arm))) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return everything, float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "shifted"), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    dataset = load(options.data)
    base = correct(VisionLanguageModel.load(device="cpu"), dataset.test)
    found: dict[str, list[npt.NDArray[np.float64]]] = {arm: [] for arm in options.arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in options.arms}
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            right, spent = train_arm(arm, seed, dataset, options.settings)
            found[arm].append(right.mean(axis=1))
            seconds[arm].append(spent)
            print(
                f"{arm:12s} seed {seed}: exact match {right.mean():.4f} (base {base.mean():.4f}), {spent:.0f} s",
                flush=True,
            )
    table = {"base": {"exact_match": [float(base.mean())]}}
    rng = np.random.default_rng(0)
    for arm in options.arms:
        row: dict[str, object] = {
            "exact_match": [float(part.mean()) for part in found[arm]],
            "seconds": [round(part, 1) for part in seconds[arm]],
        }
        if arm != "non-private" and "non-private" in found:
            kept = interval(base.mean(axis=1), np.stack(found["non-private"]), np.stack(found[arm]), rng)
            row["gain_kept"], row["gain_kept_low"], row["gain_kept_high"] = (round(part, 4) for part in kept)
        table[arm] = row  # type: ignore[assignment]
        print(arm, row)
    document = {
        "data": options.data,
        "seeds": options.seeds,
        "settings": options.settings,
        "pictures": int(base.shape[0]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "table": table,
    }
    out = options.out or RESULTS / f"utility_gain_{options.data}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
