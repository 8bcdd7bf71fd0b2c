"""Keep the document of a finished sweep as a result, and print its table.

    dpaudit sweep --preset dual-priv-ablation --out sweeps/ablation
    python benchmarks/sweep_results.py sweeps/ablation/sweep.json --keep ablation_digits    # into benchmarks/results/
    python benchmarks/sweep_results.py benchmarks/results/ablation_digits.json              # the table of the docs

Folders of the machine are cut to their last part; nothing else is changed. Columns: held-out exact match, averaged over
the seeds, with its 95 % interval over seeds and pictures; the share of the gain of non-private fine-tuning over the
base model that is kept (of the means, no interval); and the difference from the line that the configuration is against,
trainings paired by seed, with its interval. A difference whose interval holds 0 is no difference.
"""

import argparse
from pathlib import Path

from dpaudit import atomic
from dpaudit.config import public_path
from reports.sweep.document import Averaged, SweepDocument, SweepRow

RESULTS = Path(__file__).parent / "results"


def without_folders(document: SweepDocument) -> SweepDocument:
    """The same with `key=/a/b/c` cut to `key=c`."""
    cut = []
    for override in document.overrides:
        key, equals, value = override.partition("=")
        cut.append(f"{key}{equals}{public_path(value)}")
    return document.model_copy(update={"overrides": tuple(cut)})


def percent(found: Averaged | None, *, signed: bool = False) -> str:
    """A mean and its interval in percent (points, where signed)."""
    if found is None:
        return ""
    sign = "+" if signed else ""
    text = f"{100 * found.value:{sign}.1f}"
    if found.low is None or found.high is None:
        return text
    return f"{text} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def mean_of(document: SweepDocument, wanted: str) -> float | None:
    """Exact match of the line of that series, if it is there."""
    for row in document.rows:
        if row.series == wanted and row.exact_match is not None:
            return row.exact_match.value
    return None


def kept(row: SweepRow, base: float | None, full: float | None) -> str:
    """(row - base) / (non-private - base), where there is something to keep."""
    if base is None or full is None or row.exact_match is None or full <= base or row.epsilon is None:
        return ""
    return f"{100 * (row.exact_match.value - base) / (full - base):.0f} %"


def table(document: SweepDocument) -> str:
    """Markdown."""
    base, full = mean_of(document, "base model"), mean_of(document, "non-private")
    lines = [
        "| configuration | eps | exact match, % | gain kept | against | difference, points |",
        "|---|---|---|---|---|---|",
    ]
    for row in document.rows:
        cells = [
            row.series,
            "" if row.epsilon is None else f"{float(row.epsilon):g}",
            percent(row.exact_match),
            kept(row, base, full),
            (row.against or "").partition(", epsilon ")[0],  # always at the eps of its row
            percent(row.difference, signed=True),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if document.majority is not None:
        constant = f"{100 * document.majority.value:.1f} %"
        lines.append(f"\nAlways giving the most common answer to each kind of question reaches {constant}.\n")
    cells, known = len(document.cells), [cell.seconds for cell in document.cells if cell.seconds is not None]
    timed = "" if len(known) == cells else f" in {len(known)} of them"  # the others were trained elsewhere
    lines.append(f"{cells} cells, {len(document.seeds)} seeds; {sum(known):.0f} s of training jobs{timed}.")
    return "\n".join(lines)


def main() -> None:
    """Keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    document = without_folders(SweepDocument.read(options.sweep))
    if options.keep:
        atomic.write_document(RESULTS / f"{options.keep}.json", document)
    print(table(document))


if __name__ == "__main__":
    main()
