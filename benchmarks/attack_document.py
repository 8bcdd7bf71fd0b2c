"""Puts the committed results of the attack benchmarks into docs/attacks.md.

    python benchmarks/attack_document.py

Everything between "<!-- figures: NAME -->" and "<!-- end -->" is written anew from benchmarks/results/NAME.json; a
result that is not there yet says so.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dpaudit import atomic

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "attacks.md"


def white_box(tree: Any) -> str:
    """One row a trainer."""
    lines = [
        "| trainer | seeds | verdicts | mean bound within DP-SGD(q, T), of eps = 8 | share | bounds above 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in tree["summary"].items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row["verdicts"].items())
        bound = "–" if row["mean_bound"] is None else f"{row['mean_bound']:.3f}"
        share = "–" if row["mean_bound"] is None else f"{row['mean_share_of_claim']:.1%}"
        lines.append(f"| {name} | {row['seeds']} | {verdicts} | {bound} | {share} | {row['bounds_above_claim']} |")
    return "\n".join(lines)


def black_box(rows: Any) -> str:
    """One row an arm and score, over seeds."""
    lines = [
        "| run | score | seeds | AUC | guesses | right | bound, nothing assumed | its ceiling "
        "| f-DP within DP-SGD(q, T) | order statistics (informs) | loss of members / others |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    arms = dict.fromkeys(row["arm"] for row in rows)
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        for name in ("planned", "loss-against-base", "first-order-fall", "unmixed-update"):
            found = [row[name] for row in mine if name in row]
            if not found:
                continue
            losses = f"{_mean(mine, 'loss_members'):.2f} / {_mean(mine, 'loss_others'):.2f}"
            label = "loss against base, guesses as `--canaries` plans them" if name == "planned" else f"`{name}`"
            cells = [arm, label, str(len(found)), _list(found, "auc", 2), str(found[0]["guesses"])]
            cells += [_list(found, "correct", 0), _list(found, "bound", 2), f"{found[0]['ceiling']:.2f}"]
            cells += [_list(found, key, 2) for key in ("f_dp_within_dp_sgd", "order_statistics_if_separate")]
            lines.append("| " + " | ".join([*cells, losses]) + " |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _list(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    return ", ".join(f"{row[key]:.{digits}f}" for row in rows) if all(key in row for row in rows) else "–"


def null(tree: Any) -> str:
    """One row an attack."""
    found = tree["summary"]
    lines = [
        f"{found['seeds']} seeds; at most {found['allowed']} refutations are allowed, the most of any attack was "
        f"{found['most_refuted']}.",
        "",
        "| attack | eps = 0 refuted at 5 % | seeds with a bound above 0 at 95 % |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {row['refuted']} | {row['bounds_above_0']} |" for name, row in found["attacks"].items()]
    return "\n".join(lines)


def references(rows: Any) -> str:
    """One row a measurement."""
    lines = [
        "| method | models | units, steps | load before | study: wall, CPU s | separate: wall, CPU s | ratio of wall "
        "| ratio of CPU | largest difference of a loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        study, alone = row["study"], row["separate"]
        lines.append(
            f"| {row['method']} | {row['trials']} | {row['units']}, {row['steps']} | {row['load_before'][0]} "
            f"| {study['wall']:.0f}, {study['cpu']:.0f} | {alone['wall']:.0f}, {alone['cpu']:.0f} "
            f"| {row['wall_ratio']:.2f} | {row['cpu_ratio']:.2f} | {row['largest_difference_of_a_loss']:.1e} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[Any], str]] = {
    "attack_white_box": white_box,
    "attack_white_box_300": white_box,
    "attack_black_box": black_box,
    "attack_null": null,
    "membership_references": references,
}


def filled(page: str) -> str:
    """The page with every table written anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        path = HERE / "results" / f"{name}.json"
        text = TABLES[name](json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not measured yet."
        return f"<!-- figures: {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    atomic.write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
