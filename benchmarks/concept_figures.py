"""The figures of docs/concepts.md, made by dpaudit's own functions. Deterministic: the same bytes every time.

python benchmarks/concept_figures.py        # writes docs/images/concepts-*.svg
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dpaudit import accounting
from dpaudit.analysis import plan
from dpaudit.bounds import steinke
from dpaudit.documents import Claim

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: told apart by everybody
STYLES = ("-", "--", ":")
DELTA, CONFIDENCE = 1e-5, 0.95


def save(figure: Figure, name: str) -> None:
    """As SVG without a date and with fixed ids."""
    path = FOLDER / f"concepts-{name}.svg"
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": "dpaudit"})
    path.write_text(re.sub(r"[ \t]+\n", "\n", path.read_text(encoding="utf-8")), encoding="utf-8")
    plt.close(figure)


def spent() -> None:
    """eps over steps for three noise multipliers, q = 0.05."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    steps = [1, 2, 5, 10, 20, 50, 100, 150, 200]
    for sigma, colour, style in zip((0.8, 1.0, 1.5), COLOURS, STYLES, strict=True):
        values = [accounting.epsilon(accounting.DpSgd(sigma, 0.05, count), DELTA) for count in steps]
        axes.plot(steps, values, style, color=colour, label=f"sigma = {sigma:g}")
    axes.set(xlabel="steps (Poisson sampling, q = 0.05)", ylabel="eps at delta = 1e-5", ylim=(0, None))
    axes.legend(frameon=False)
    save(figure, "spent")


def ceiling() -> None:
    """The largest eps that the one-run bound can show: all guesses right."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    guesses = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
    values = [steinke.ceiling(canaries=r, guesses=r, delta=DELTA, confidence=CONFIDENCE) for r in guesses]
    axes.semilogx(guesses, values, "-o", color=COLOURS[0], markersize=3)
    axes.axhline(8, color="#555555", linewidth=0.8, linestyle="--")
    axes.text(guesses[0], 8.15, "a claim of eps = 8", color="#555555", fontsize=8)
    axes.set(xlabel="guesses, all right", ylabel="largest eps that can be shown", ylim=(0, 9))
    save(figure, "ceiling")


def power() -> None:
    """Power of the claim test against missing noise, by canaries."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    canaries = [50, 100, 200, 300, 500, 700, 1000]
    claim = Claim(
        epsilon=accounting.epsilon(accounting.DpSgd(1.0, 0.05, 200), DELTA),
        delta=DELTA,
        relation="add-remove",
        unit="image",
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sampling="poisson",
        sample_rate=0.05,
        steps=200,
    )
    for missing, colour, style in zip((0.3, 0.2, 0.1), COLOURS, STYLES, strict=True):
        values = [
            plan.plan(claim, canaries=count, alpha=0.001, alternative=1 - missing, separate=True).power
            for count in canaries
        ]
        axes.plot(canaries, values, style, color=colour, label=f"sigma {missing:.0%} too small")
    axes.axhline(0.8, color="#555555", linewidth=0.8, linestyle="--")
    axes.set(xlabel="gradient canaries (sigma = 1, q = 0.05, T = 200)", ylabel="power at level 0.001", ylim=(0, 1.02))
    axes.legend(frameon=False)
    save(figure, "power")


def main() -> None:
    """Write all figures."""
    plt.rcParams.update(
        {"svg.hashsalt": "dpaudit", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    FOLDER.mkdir(exist_ok=True)
    for figure in (spent, ceiling, power):
        figure()


if __name__ == "__main__":
    main()
