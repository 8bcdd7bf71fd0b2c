"""Figures and tables of docs/fusion-path.md, from benchmarks/results/release_game.json. No random number, no date.

Called by `python benchmarks/release_game.py --figures` and `--table`.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dpaudit import atomic

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by everybody
MARKERS = ("o", "s", "^", "D")
SMALLEST = 1e-3  # where noise 0 is drawn on a logarithmic axis
Row = dict[str, Any]


def save(figure: Figure, name: str) -> None:
    """As SVG without a date and with fixed ids."""
    path = FOLDER / f"fusion-{name}.svg"
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "dpaudit"})
    atomic.write_text(path, re.sub(r"[ \t]+\n", "\n", buffer.getvalue()))
    plt.close(figure)


def game(tree: Row) -> None:
    """Measured mu against the closed form, where 1,000 draws can measure it."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    paper = [{**row, "name": row["pair"]} for row in tree["game"]["rows"]]
    groups = [(name, [row for row in paper if row["name"] == name]) for name in dict.fromkeys(r["name"] for r in paper)]
    groups.append(("accounted fusion", tree["accounted"]["rows"]))
    for (name, rows), colour, marker in zip(groups, COLOURS, MARKERS, strict=True):
        finite = [row for row in rows if row["mu_high"] != "inf"]
        mu = np.array([row["mu"] for row in finite])
        low, high = (np.array([row[end] for row in finite]) for end in ("mu_low", "mu_high"))
        middle = (low + high) / 2
        axes.errorbar(
            mu, middle, (middle - low, high - middle), fmt=marker, color=colour, markersize=3, capsize=2, label=name
        )
    end = 4.6
    axes.plot([0, end], [0, end], color="#555555", linewidth=0.8)
    axes.set(xlabel="mu by the formula", ylabel="mu measured, 95 %", xlim=(0, end), ylim=(0, end))
    axes.legend(frameon=False, fontsize=8)
    save(figure, "game")


def kinds(tree: Row) -> dict[str, list[Row]]:
    """Reconstruction rows by what is released, ridge only, by growing noise."""
    rows = [row for row in tree["reconstruction"]["rows"] if row["decoder"] == "ridge"]
    found: dict[str, list[Row]] = {"all tokens, noise on the fused ones": [], "fused tokens alone": []}
    found["all tokens, accounted fusion"] = [row for row in rows if row["multiplier"] is not None]
    for row in rows:
        if row["multiplier"] is None:
            alone = row["released"].startswith("fused tokens alone")
            found["fused tokens alone" if alone else "all tokens, noise on the fused ones"].append(row)
    return {name: sorted(part, key=lambda row: float(row["std"])) for name, part in found.items()}


def reconstruction(tree: Row) -> None:
    """SSIM over the noise's standard deviation."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for (name, rows), colour, marker in zip(kinds(tree).items(), COLOURS, MARKERS, strict=False):
        std = np.maximum([row["std"] for row in rows], SMALLEST)
        value = np.array([row["ssim"] for row in rows])
        ends = np.array([[row["ssim"] - row["ssim_low"], row["ssim_high"] - row["ssim"]] for row in rows]).T
        axes.errorbar(std, value, ends, fmt=f"-{marker}", color=colour, markersize=3, capsize=2, label=name)
    floor = next(row for row in tree["reconstruction"]["rows"] if row["decoder"] == "mean picture")["ssim"]
    axes.axhline(floor, color="#555555", linewidth=0.8, linestyle="--")
    axes.text(SMALLEST, floor + 0.005, "mean picture: sees nothing", color="#555555", fontsize=8)
    for name, std in tree["game"]["sigma_fuse"].items():
        axes.axvline(std, color="#999999", linewidth=0.8, linestyle=":")
        axes.text(std * 1.1, 0.555, "sigma C / B" if name == "mean" else "sigma C", color="#555555", fontsize=8)
    axes.set_xscale("log")
    axes.set(xlabel="standard deviation of the noise on a token value (left end: none)", ylabel="SSIM, 95 %")
    axes.set_ylim(0.25, 0.58)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    save(figure, "reconstruction")


def strip(tree: Row) -> None:
    """The strip of pictures, twice its size."""
    with Image.open(io.BytesIO(base64.b64decode(tree["reconstruction"]["strip_png_base64"]))) as image:
        larger = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    out = io.BytesIO()
    larger.save(out, "PNG", optimize=True)
    atomic.write_bytes(FOLDER / "fusion-strip.png", out.getvalue())


def draw(tree: Row) -> None:
    """All figures of the page."""
    plt.rcParams.update(
        {"svg.hashsalt": "dpaudit", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    for figure in (game, reconstruction, strip):
        figure(tree)


def _lines(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    whole = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in whole)


def _mu(value: object) -> str:
    if value == "inf":
        return "inf"
    number = float(str(value))
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}" if number < 1e5 else f"{number:.1e}"


def _interval(row: Row) -> str:
    return (
        f"above {_mu(row['mu_low'])}" if row["mu_high"] == "inf" else f"{_mu(row['mu_low'])} to {_mu(row['mu_high'])}"
    )


def game_table(tree: Row) -> str:
    """One line a pair and sigma_fuse."""
    rows = []
    for row in tree["game"]["rows"]:
        bounds = row["epsilon_lower"]
        cells = (row["pair"], f"{row['std']:.3g}", _mu(row["mu"]), _interval(row), _mu(row["epsilon"]))
        rows.append(
            (*cells, *(f"{bounds[f'{name}, gdp']:.2f}" for name in ("log likelihood ratio", "linear classifier")))
        )
    head = ("pair", "sigma_fuse", "mu, formula", "mu, measured (95 %)", "eps, formula")
    return _lines((*head, "eps at least, likelihood ratio", "eps at least, trained"), rows)


def accounted_table(tree: Row) -> str:
    """One line a z and pair."""
    rows = [
        (f"{row['z']:g}", row["pair"], row["relation"], _mu(row["formula"]), _mu(row["mu"]), _interval(row))
        for row in tree["accounted"]["rows"]
    ]
    return _lines(("z", "pair", "relation", "mu at most, accounted", "mu of this pair", "mu, measured (95 %)"), rows)


def rebuilt_table(tree: Row) -> str:
    """One line a level, ridge."""
    rows = []
    for name, part in kinds(tree).items():
        for row in part:
            noise = f"{row['std']:.3g}" + (f" (z = {row['multiplier']:g})" if row["multiplier"] is not None else "")
            ssim = f"{row['ssim']:.3f} ({row['ssim_low']:.3f} to {row['ssim_high']:.3f})"
            psnr = f"{row['psnr']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
            rows.append((name, noise, psnr, ssim))
    blind = next(row for row in tree["reconstruction"]["rows"] if row["decoder"] == "mean picture")
    rows.append(("nothing (mean picture)", "", f"{blind['psnr']:.1f}", f"{blind['ssim']:.3f}"))
    return _lines(("released", "noise", "PSNR, dB (95 %)", "SSIM (95 %)"), rows)


def runs_table(tree: Row) -> str:
    """One line an arm: accuracy of every seed."""
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in tree["runs"]):
        mine = [row for row in tree["runs"] if row["arm"] == arm]
        right = np.array([100 * row["exact_match"] for row in mine])
        rows.append(
            (
                arm,
                _mu(round(mine[0]["claim"], 2)),
                ", ".join(f"{value:.1f}" for value in right),
                f"{right.mean():.1f} %",
            )
        )
    rows.insert(0, ("base model", "", "", f"{100 * tree['base']['exact_match']:.1f} %"))
    return _lines(("run", "eps claimed, all together", "exact match by seed, %", "mean"), rows)


def case_table(audit: Row) -> str:
    """The truth table of one run."""
    rows = []
    for case in audit["cases"]:
        verdict = (case["training"] or "-", case["release"] or "-") if case["applies"] else ("does not apply", "")
        rows.append((case["case"], *verdict, case["decided_by"], case["evidence"].replace("|", "/")))
    return _lines(("case", "training", "release", "decided by", "figures"), rows)


def tables(tree: Row) -> str:
    """All of them."""
    parts = [game_table(tree), accounted_table(tree), rebuilt_table(tree)]
    if tree.get("runs"):
        parts.append(runs_table(tree))
        parts += [f"{row['arm']}\n\n{case_table(row['audit'])}" for row in tree["runs"] if "audit" in row]
    return "\n\n".join(parts)
