"""What do the audits see when a run adds less noise than it claims?

    python benchmarks/noise_faults.py --scales 1 0.7 0.5 0.1

One DP-SGD run on the embedded digits a scale (1 = correct), all claiming eps = 8, each audited by the black-box canary
game (300 candidates) and by the white-box game (1,000 gradient canaries). The white-box game trains a twin with the
same fault. Writes benchmarks/results/noise_faults.json.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from attacks.audit import audit
from attacks.options import Options
from attacks.training import start_run
from dpaudit.config import resolve
from trainers.progress import Live

RESULTS = Path(__file__).parent / "results"


def row(scale: float, folder: Path) -> dict[str, object]:
    """One run at `scale` times the claimed noise, with what both games found."""
    name = f"noise x {scale:g}"
    settings = [f"planted.noise-scale={scale}", "model.device=cpu", "canaries.count=300"]
    run = start_run(resolve({"method": "dp-sgd"}, settings), folder / "run", reporter=Live(name))
    document = audit(run.path, Options(audits=("canaries", "white-box")), reporter=Live(name))
    black = next(test for test in document.tests if test.name == "canaries: all kinds" and test.bound == "steinke")
    white = [test for test in document.tests if test.name.startswith("white box")]
    free = next(test for test in white if test.bound == "steinke")
    claim = next(test for test in white if test.p_value is not None and test.decides)
    family = next(test for test in white if test.bound == "order-statistic" and test.p_value is None)
    auc = {summary.name: round(summary.auc, 3) for summary in document.scores}
    return {
        "noise_scale": scale,
        "verdict": document.verdict,
        "black_box": {
            "correct": f"{black.correct}/{black.guesses}",
            "epsilon_lower": round(float(black.epsilon_lower or 0), 2),
            "ceiling": round(float(black.ceiling or 0), 2),
            "auc": auc["canaries: all kinds"],
        },
        "white_box": {
            "correct": f"{free.correct}/{free.guesses}",
            "epsilon_lower": round(float(free.epsilon_lower or 0), 2),
            "p_value_of_the_claim": claim.p_value,
            "power": claim.power,
            "epsilon_lower_within_dp_sgd": round(float(family.epsilon_lower or 0), 2),
            "auc": auc["white box: gradient canaries"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.1])
    options = parser.parse_args()
    rows = []
    for scale in options.scales:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(scale, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "noise_faults.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
