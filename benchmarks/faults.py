"""Every write of every command, and a fault at each: kill -9, a torn write, a full disk. Then every file, damaged.

    python benchmarks/faults.py                       # writes benchmarks/results/faults.json; goes on where it stopped
    python benchmarks/faults.py --only train,report   # some of the scenarios
    python benchmarks/faults.py --sample benchmark    # of these one fault, in turn, at the first of each call on a file
    python benchmarks/faults.py --table               # prints the tables of docs/nothing-lost.md

A case passes when the command (or `--resume`) that a person types next ends with the files of an uninterrupted run,
the spent budget never fell, no half-written run was audited, and every message on the way was one line. The commands
run on a model of a few thousand weights: where files are written does not depend on the size.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpaudit import atomic
from tests.faults import harness
from tests.faults.scenarios import SCENARIOS, WITH_CANARIES, World, distinct, play, state, uninterrupted

RESULTS = Path(__file__).parent / "results" / "faults.json"
KINDS: tuple[harness.Kind, ...] = ("kill", "torn", "full")
PER_WRITE = 10  # cases between two writes of the results
Tree = dict[str, Any]


def play_all(world: World, name: str, results: Tree, out: Path, *, few: bool = False) -> None:
    """Every kind of fault at every site of one scenario; what is in `results` already is kept.

    few: at the first site only of each call on each file, the three kinds in turn.
    """
    scenario = SCENARIOS[name]
    began = time.perf_counter()
    ended, expected = uninterrupted(world, scenario)
    part = results["writes"].setdefault(name, {"sites": [], "cases": {}, "seconds": 0.0})
    sites = [f"{site.call} {site.path}" for site in ended.sites]
    if part["sites"] != sites:  # the program writes other files than last time
        part.update(sites=sites, cases={})
    if ended.foreign:
        part["outside"] = sorted(set(ended.foreign))
    cases = [(kind, at) for kind in KINDS for at in range(len(sites))]
    if few:
        cases = [(KINDS[number % len(KINDS)], at) for number, at in enumerate(distinct(ended.sites))]
    todo = [(kind, at) for kind, at in cases if f"{kind} {at}" not in part["cases"]]
    for number, (kind, at) in enumerate(todo, start=1):
        case = play(world, scenario, kind, at, expected)
        part["cases"][f"{kind} {at}"] = case.problem
        if case.problem is not None:
            print(f"{name}: {kind} at {at} ({sites[at]}): {case.problem}", flush=True)
        if number % PER_WRITE == 0 or number == len(todo):
            part["seconds"] = round(part["seconds"] + time.perf_counter() - began, 1)
            began = time.perf_counter()
            atomic.write_text(out, json.dumps(results, indent=1) + "\n")
            print(f"{name}: {number}/{len(todo)}", file=sys.stderr, flush=True)


def damage_all(world: World, results: Tree, out: Path) -> None:
    """Every file of an audited run: one bit flipped (three places), cut in half, emptied; then audit and report."""
    place = world.place("damage")
    whole = world.root / "audited" / "run"  # the name of the folder is part of the audit
    shutil.copytree(world.finished("damage", *WITH_CANARIES), whole, dirs_exist_ok=True)
    command = ["audit", str(whole), "--canaries"]
    assert harness.run(command, [whole], world.root).code == 0
    expected = state(whole)
    rng = random.Random(0)
    rows: dict[str, Tree] = {}
    for path in sorted(item for item in whole.rglob("*") if item.is_file() and item.stat().st_size):
        name = path.relative_to(whole).as_posix()
        for kind in ("flip", "flip", "flip", "half", "empty"):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place / "run")
            _damage(place / "run" / name, kind, rng)
            answers = [
                harness.run(["audit", str(place / "run"), "--canaries"], [place], world.root),
                harness.run(["report", str(place / "run"), "-o", str(place / "r.html")], [place], world.root),
            ]
            row = rows.setdefault(name, {"damaged": 0, "named": 0, "unharmed": 0, "problems": [], "says": None})
            row["damaged"] += 1
            found = state(place / "run")
            others = [
                key for key in found.keys() | expected.keys() if key != name and found.get(key) != expected.get(key)
            ]
            _judge(row, name, answers, not others)
    for row in rows.values():
        row["says"] = row["says"] and row["says"].replace(str(world.root), "…")
    results["damage"] = rows
    atomic.write_text(out, json.dumps(results, indent=1) + "\n")


def _damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flip":
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(
        bytes(content) if kind == "flip" else bytes(content[: len(content) // 2]) if kind == "half" else b""
    )


def _judge(row: Tree, name: str, answers: Sequence[harness.Ended], unharmed: bool) -> None:
    """Named: a command ended with one line that names the file. Unharmed: all other files are as without the damage."""
    last = Path(name).name
    for ended in answers:
        if "Traceback" in ended.err or ended.code not in (0, 1, 2, 3, 4):
            row["problems"].append(f"code {ended.code}: {ended.line[:200]}")
            return
    said = [ended for ended in answers if ended.code != 0]
    if any(last in ended.err or last in ended.out for ended in said) or any(last in ended.out for ended in answers):
        row["named"] += 1
        row["says"] = row["says"] or next((ended.line for ended in said), None)
    elif unharmed:
        row["unharmed"] += 1
    else:
        row["problems"].append("neither named nor unharmed")


def small_disk(world: World, results: Tree, out: Path) -> None:
    """A real file system of a few pages, mounted for the purpose: the training runs out of room, then gets it."""
    rows = []
    scenario = SCENARIOS["train"]
    for kib in (16, 48, 96, 128, 160, 192, 256):
        place = world.place("whole")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], check=False)
        if mounted.returncode != 0:
            results["small disk"] = "not run: mounting a file system needs more rights than this user has"
            return
        try:
            first = harness.run(scenario.command(world, place), [], world.root)
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            again = [harness.run(command, [], world.root) for command in scenario.again(world, place)]
            good = any(ended.code == 0 for ended in again)
            rows.append({"KiB": kib, "code": first.code, "says": first.line, "goes on": good, "state": state(place)})
        finally:
            subprocess.run(["umount", str(place)], check=True)
    _, expected = uninterrupted(world, scenario)
    for row in rows:
        row["same"] = row.pop("state") == expected
        row["says"] = row["says"].replace(str(world.root), "…")[-160:] if row["code"] else ""
    results["small disk"] = rows
    atomic.write_text(out, json.dumps(results, indent=1) + "\n")


def table(results: Tree) -> str:
    """The Markdown tables."""
    head = "| command | writes | of them played | kill -9 | torn write | full disk | minutes |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, part in results["writes"].items():
        counts = {kind: Counter(part["cases"][f"{kind} {at}"] is None for at in _played(part, kind)) for kind in KINDS}
        cells = [f"{counts[kind][True]} of {sum(counts[kind].values())}" for kind in KINDS]
        played = len({at for kind in KINDS for at in _played(part, kind)})
        writes = f"{len(part['sites'])} | {'all' if played == len(part['sites']) else played}"
        lines.append(f"| {name} | {writes} | {' | '.join(cells)} | {part['seconds'] / 60:.0f} |")
    if results.get("damage"):
        lines += ["", "| file | damaged copies | named | made no difference | what is said |", "|---|---|---|---|---|"]
        for name, row in results["damage"].items():
            says = (row["says"] or "").partition("dpaudit: ")[2].replace("|", "\\|")
            says = "…" + says[says.find("/run/") :] if "/run/" in says else says
            lines.append(f"| `{name}` | {row['damaged']} | {row['named']} | {row['unharmed']} | {says[:160]} |")
    return "\n".join(lines)


def _played(part: Tree, kind: str) -> list[int]:
    return [at for at in range(len(part["sites"])) if f"{kind} {at}" in part["cases"]]


def main() -> None:
    """Play what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="scenarios by name, separated by commas; also 'damage' and 'small disk'")
    parser.add_argument("--sample", default="", help="scenarios of which one fault at each call and file is played")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the Markdown tables of what is there")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {"writes": {}}
    if options.table:
        print(table(results))
        return
    wanted = options.only.split(",") if options.only else [*SCENARIOS, "damage", "small disk"]
    harness.warm_up()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-faults-"))
    try:
        world = World.make(root)
        for name in wanted:
            if name == "damage":
                damage_all(world, results, options.out)
            elif name == "small disk":
                small_disk(world, results, options.out)
            else:
                play_all(world, name, results, options.out, few=name in options.sample.split(","))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
