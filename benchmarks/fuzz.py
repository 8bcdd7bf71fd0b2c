"""New cases by grammar for as long as it is given: never a traceback, always an allowed exit code, nothing outside.

    python benchmarks/fuzz.py --minutes 60       # adds to benchmarks/results/fuzz.json

The grammar and the rules are those of `tests/fuzz`; here each round draws other cases. What fails is kept as the
smallest case that hypothesis finds, with the command line and the files that reproduce it.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Flaky

from dpaudit import atomic
from tests.fuzz.grammar import FAMILIES, Case
from tests.fuzz.runner import Runner

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
PER_ROUND = 50
Tree = dict[str, Any]


def play_round(runner: Runner, family: str, start: int, part: Tree) -> None:
    """One round of one family; what it finds goes into `part`."""

    @seed(start)
    @settings(max_examples=PER_ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=FAMILIES[family])
    def play(case: Case) -> None:
        problem, code = runner.play_and_tell(case)
        part["cases"] += 1
        part["codes"][str(code)] = part["codes"].get(str(code), 0) + 1
        if problem is not None:
            raise AssertionError(f"{problem}\n{case}")

    try:
        play()
    except (AssertionError, Flaky) as found:  # Flaky: a second try of the same case did not show it
        part["problems"].append(f"{type(found).__name__ if isinstance(found, Flaky) else ''} {found}".strip()[:2000])
        print(f"{family}: {str(found)[:600]}", flush=True)


def main() -> None:
    """Play rounds of all families in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: Tree = json.loads(options.out.read_text()) if options.out.exists() else {"minutes": 0.0, "families": {}}
    families = options.only.split(",") if options.only else list(FAMILIES)
    root = Path(tempfile.mkdtemp(prefix="dpaudit-fuzz-"))
    began = last = time.monotonic()
    try:
        runner, number = Runner(root), options.seed
        while time.monotonic() - began < 60 * options.minutes:
            for family in families:
                part = results["families"].setdefault(family, {"cases": 0, "codes": {}, "problems": []})
                number += 1
                play_round(runner, family, number, part)
                results["minutes"] = round(results["minutes"] + (time.monotonic() - last) / 60, 2)
                last = time.monotonic()
                atomic.write_text(options.out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    total = sum(part["cases"] for part in results["families"].values())
    print(f"{total} cases in {results['minutes']:.0f} minutes")


if __name__ == "__main__":
    main()
