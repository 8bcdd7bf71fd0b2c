"""Puts the figures of benchmarks/results into docs/statistics.md, from the template beside this script.

python benchmarks/bounds_document.py
"""

import csv
import statistics
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, TEMPLATE = HERE / "results", HERE / "bounds_document.template.md"
TARGET = HERE.parent / "docs" / "statistics.md"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    """A committed table."""
    with (RESULTS / f"bounds_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Rows, columns: dict[str, str]) -> str:
    """Markdown; columns: field -> heading."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[field] for field in columns) + " |" for row in rows]
    return "\n".join(lines)


def coverage() -> dict[str, str]:
    """Figures of the coverage table."""
    rows = read("coverage")
    inside = [row for row in rows if row["inside_family"] == "yes"]
    worst = max(inside, key=lambda row: float(row["rate"]))
    outside = max((float(row["rate"]) for row in rows if row["inside_family"] == "no"), default=0.0)
    return {
        "COVERAGE_ROWS": str(len(rows)),
        "COVERAGE_INSIDE": str(len(inside)),
        "COVERAGE_BAD": str(sum(row["ok"] == "NO" for row in rows)),
        "COVERAGE_MAX_ROW": f"{worst['bound']}, {worst['rule']}, {worst['mechanism']}, n = {worst['n']}",
        "COVERAGE_MAX": f"{float(worst['rate']):.1%}",
        "COVERAGE_OUTSIDE": f"{outside:.0%}",
    }


def interference() -> dict[str, str]:
    """Figures of canaries that meet."""
    rows = [row for row in read("interference") if row["theory"] == "order-statistic" and row["claim_true"] == "yes"]
    die = [row for row in rows if row["canaries"].startswith("one hidden die")]
    meeting = [row for row in rows if row not in die]
    worst = max(die, key=lambda row: float(row["refuted_at_0.05"]))
    return {
        "INTERFERENCE_DIE_01": f"{float(worst['refuted_at_0.01']):.1%}",
        "INTERFERENCE_DIE": f"{float(worst['refuted_at_0.05']):.1%}",
        "INTERFERENCE_ROWS": str(len(meeting)),
        "INTERFERENCE_MAX": f"{max(float(row['refuted_at_0.05']) for row in meeting):.1%}",
    }


def peers() -> dict[str, str]:
    """Figures beside jax-privacy."""
    rows = read("peers")
    same = [row for row in rows if row["kind"] == "same"]
    null = {row["what"]: row for row in rows if row["kind"].startswith("null")}
    return {
        "PEER_SAME_ALL": str(len(same)),
        "PEER_SAME": str(sum(abs(float(r["dpaudit"]) - float(r["jax_privacy"])) < 1.5e-4 for r in same)),
        "PEER_FASTER": f"{statistics.median(float(row['times_faster']) for row in same):.0f}",
        "PEER_GDP_OURS": f"{float(null['GDP']['dpaudit']):.0%}",
        "PEER_GDP": f"{float(null['GDP']['jax_privacy']):.0%}",
        "PEER_AUC_OURS": null["AUC above 1/2 by"]["dpaudit"],
        "PEER_AUC": null["AUC above 1/2 by"]["jax_privacy"],
    }


def evidence() -> str:
    """The simulated white-box games."""
    with (RESULTS / "white_box_evidence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def percent(row: dict[str, str], field: str) -> str:
        return f"{float(row[field]):.1%}"

    shown = [
        {
            "sigma": row["sigma"],
            "q": row["q"],
            "T": row["T"],
            "eps": f"{float(row['eps']):.2f}",
            "power at 0.95 x noise": percent(row, "power 0.95"),
            "at 0.9 x": percent(row, "power 0.9"),
            "coins alone at 0.9 x (nats)": f"{percent(row, 'coins alone 0.9')} ({row['kl']})",
            "counts at 0.9 x": percent(row, "counts 0.9"),
            "correct claims refuted, noise 1, 1.02, 1.1, 1.5 x": ", ".join(
                row[f"false {scale}"] for scale in ("1", "1.02", "1.1", "1.5")
            ),
            "in up to ten games": row["auditor"],
        }
        for row in rows
    ]
    return table(shown, {name: name for name in shown[0]})


def tables() -> dict[str, str]:
    """The tables shown whole."""
    claims = [row for row in read("claims") if row["theory"] == "order-statistic"]
    return {
        "RECOVERY_TABLE": table(
            read("recovery"),
            {
                "mu": "mu",
                "true_eps": "true eps",
                "n": "n",
                "bound": "bound",
                "guesses": "guesses",
                "mean_eps_lower": "mean bound",
                "recovered": "recovered",
                "above_truth": "above the truth",
            },
        ),
        "CLAIMS_TABLE": table(
            claims,
            {
                "claim": "claim",
                "true_sigma_over_claimed": "true / claimed sigma",
                "n": "n",
                "refuted_at_0.05": "p <= 0.05",
                "refuted_at_0.001": "p <= 0.001",
                "median_p": "median p",
            },
        ),
        "EVIDENCE_TABLE": evidence(),
        "TIMINGS_TABLE": table(read("timings"), {"what": "what", "cold_s": "cold", "warm_s": "warm"}),
    }


def filled() -> str:
    """The template with its figures."""
    text = TEMPLATE.read_text(encoding="utf-8")
    figures = coverage() | interference() | peers() | tables()
    # Longer names first: some are the beginning of others.
    for name in sorted(figures, key=len, reverse=True):
        assert name in text, name
        text = text.replace(name, figures[name])
    return text


if __name__ == "__main__":
    TARGET.write_text(filled(), encoding="utf-8")
