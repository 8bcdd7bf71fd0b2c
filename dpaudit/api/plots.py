"""Pictures on a given axis. matplotlib is imported when one is drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpaudit import extras
from dpaudit.printable import field

if TYPE_CHECKING:
    from dpaudit.documents import ScoreSummary

SMALLEST = 1e-3  # where log axes begin
CHANCE = "chance"


def axis(ax: Any | None) -> Any:
    """`ax`, or that of a new figure."""
    if ax is not None:
        return ax
    with extras.named("plot"):
        from matplotlib import pyplot
    return pyplot.subplots(figsize=(4.5, 4.5), layout="constrained")[1]


def roc(
    ax: Any | None, summary: "ScoreSummary", limit: "tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None",
    log: bool,
) -> Any:  # fmt: skip
    """ROC with its simultaneous 95 % band; `limit`: (FPR, TPR) that no attack may pass."""
    ax = axis(ax)
    fpr, tpr, low, high = (
        np.array([getattr(point, name) for point in summary.roc]) for name in ("fpr", "tpr", "tpr_low", "tpr_high")
    )
    ax.fill_between(fpr, low, high, step="post", alpha=0.2, linewidth=0)
    ax.plot(fpr, tpr, drawstyle="steps-post", label=f"{field(summary.name, 40)} (AUC {summary.auc:.3f})")
    chance = np.geomspace(SMALLEST, 1, 50) if log else np.array([0.0, 1.0])
    if not any(line.get_label() == CHANCE for line in ax.lines):
        ax.plot(chance, chance, color="grey", linestyle=":", label=CHANCE)
    if limit is not None:
        ax.plot(*limit, color="black", linestyle="--", label="most that the claim allows")
    _frame(ax, "false positive rate", "true positive rate", log)
    return ax


def errors(ax: Any | None, alpha: npt.NDArray[np.float64], beta: npt.NDArray[np.float64], name: str, log: bool) -> Any:
    """Type I against type II errors."""
    ax = axis(ax)
    ax.plot(alpha, beta, label=name)
    chance = np.linspace(0, 1, 200) if not log else np.geomspace(SMALLEST, 1 - SMALLEST, 200)
    if not any(line.get_label() == CHANCE for line in ax.lines):
        ax.plot(chance, 1 - chance, color="grey", linestyle=":", label=CHANCE)
    _frame(ax, "type I error (false positive rate)", "type II error (false negative rate)", log)
    return ax


def histogram(ax: Any | None, summary: "ScoreSummary") -> Any:
    """Scores of members and non-members, each as a density."""
    ax = axis(ax)
    edges = np.array(summary.edges)
    for counts, name in ((summary.counts_in, "in training"), (summary.counts_out, "not in training")):
        values = np.array(counts) / (sum(counts) * np.diff(edges))
        ax.stairs(values, edges, fill=True, alpha=0.4, label=f"{name} ({sum(counts)})")
    ax.set_xlabel("score (higher: was in training)")
    ax.set_ylabel("density")
    ax.legend(frameon=False)
    return ax


def _frame(ax: Any, x: str, y: str, log: bool) -> None:
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(SMALLEST, 1)
        ax.set_ylim(SMALLEST, 1.02)
    else:
        ax.set_xlim(-0.01, 1.01)
        ax.set_ylim(-0.01, 1.01)
        ax.set_aspect("equal")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.legend(frameon=False, loc="best")
