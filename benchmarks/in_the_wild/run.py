"""Public DP trainers at pinned versions under the step contract and the white-box game, through `under_test` alone.

    python benchmarks/in_the_wild/run.py FOLDER [--only NAME …] [--source fastDP=PATH]

Each package goes into an environment of its own below FOLDER (an environment that is there already is used), with this
dpaudit, installed anew. Then `dpaudit check` and `dpaudit audit-trainer --white-box` run on the case beside this file.
Writes benchmarks/results/in_the_wild.json, a case at a time. Nothing that is fetched is kept in this repository.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "in_the_wild.json"
FASTDP = "git+https://github.com/awslabs/fast-differential-privacy@3d5cc561aa337c72f79873ccc4fe8b900b5493b5"
LISTED = ("opacus", "torch", "transformers", "jax", "jax-privacy", "opake", "opake-transformers", "fastdp")


@dataclass(frozen=True)
class Package:
    """environment: its folder. needs: what pip installs. module: the case. variants: name -> environment variables."""

    environment: str
    needs: tuple[str, ...]
    module: str
    variants: dict[str, dict[str, str]] = field(default_factory=lambda: {"": {}})
    game: bool = True


PACKAGES = {
    "Opacus": Package(
        "opacus",
        ("opacus==1.6.0",),
        "opacus_case",
        {
            "hooks": {},
            "functorch": {"MODE": "functorch"},
            "ghost": {"MODE": "ghost"},
            "hooks, BatchMemoryManager": {"MEMORY": "1"},
            "make_private_with_epsilon": {"EPSILON": "8"},
        },
    ),
    "jax_privacy": Package("jax", ("jax-privacy==2.0.0", "optax", "jax"), "jax_privacy_case"),
    "Opake": Package(
        "opake",
        ("opake==0.16.1", "opake-transformers==0.16.1"),
        "opake_case",
        {"DPTrainer": {}, "DPTrainer, default seed": {"SEED": "default"}},
    ),
    "fastDP": Package(
        "fastdp", (FASTDP,), "fastdp_case", {"Abadi clipping": {}, "automatic clipping": {"CLIP_FN": "automatic"}}
    ),
    "dp-transformers' pattern": Package(
        "opacus", ("opacus==1.6.0",), "dp_transformers_case", {"as accounted": {}, "as sampled": {"CLAIM": "shuffle"}}
    ),
}


def prepared(folder: Path, package: Package, sources: dict[str, str]) -> Path:
    """`bin` of the package's environment, with this dpaudit in it. Raises CalledProcessError with pip's last line."""
    home = folder / package.environment
    if not (home / "bin" / "python").exists():
        venv.create(home, with_pip=True)
        needs = [sources.get(package.environment, need) for need in package.needs]
        pip(home, "-c", str(ROOT / "constraints.txt"), "torch")
        pip(home, f"{ROOT}[train]", *needs)
    pip(home, "--no-deps", "--force-reinstall", str(ROOT))
    return home / "bin"


def pip(home: Path, *words: str) -> None:
    subprocess.run([str(home / "bin" / "pip"), "install", "-q", *words], check=True, capture_output=True, text=True)


def versions(bin: Path) -> dict[str, str]:
    done = subprocess.run([str(bin / "pip"), "list", "--format=json"], capture_output=True, text=True, check=True)
    found = {row["name"].lower().replace("_", "-"): row["version"] for row in json.loads(done.stdout)}
    return {name: found[name] for name in LISTED if name in found}


def audited(bin: Path, module: str, changes: dict[str, str], words: list[str], limit: float) -> dict[str, Any]:
    """One command: exit code, seconds, and of its document what the page says."""
    start = time.monotonic()
    if words[0] == "audit-trainer":
        words = [*words, "--out", str(Path(tempfile.mkdtemp()) / "audit")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **changes}
    command = ["dpaudit", words[0], f"{module}:factory", *words[1:]]
    shown = [word for word in command if word != "--out" and not word.startswith(tempfile.gettempdir())]
    typed = " ".join([*(f"{name}={value}" for name, value in changes.items()), *shown])
    row: dict[str, Any] = {"command": typed}
    try:
        done = subprocess.run(
            [str(bin / "dpaudit"), *command[1:], "--json", "--time-limit", "300"],
            cwd=HERE, env=environment, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**row, "verdict": None, "said": f"not finished in {limit:.0f} s"}
    row |= {"exit_code": done.returncode, "seconds": round(time.monotonic() - start, 1)}
    try:
        document = json.loads(done.stdout)
    except ValueError:
        return {**row, "verdict": None, "said": (done.stderr.strip().splitlines() or [""])[-1][:300]}
    checks = document.get("checks") or document.get("validity", {}).get("checks", [])
    told = [item for item in checks if item["status"] != "pass"]
    row |= {"verdict": document["verdict"], "reasons": document.get("reasons", [])[:3]}
    return row | {"checks": [{key: str(item[key])[:300] for key in ("name", "status", "measured")} for item in told]}


def table() -> str:
    """The committed results as the Markdown table of docs/in-the-wild.md."""
    lines = ["| package | case | `dpaudit check` | `audit-trainer --white-box` | seconds |", "|---|---|---|---|---|"]
    for name, entry in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        for variant, (check, game) in entry.get("cases", {}).items():
            cells = [
                f"{row['verdict'] or 'no verdict'} (exit code {row.get('exit_code', '-')})" for row in (check, game)
            ]
            spent = " + ".join(f"{row.get('seconds', 0):.0f}" for row in (check, game))
            lines.append(f"| {name} | {variant or 'as taught'} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true", help="only print the table of the committed results")
    parser.add_argument("--only", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--source", nargs="*", default=[], help="ENVIRONMENT=PATH: a local copy instead of a download")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a command may take")
    given = parser.parse_args()
    if given.table or given.folder is None:
        print(table())
        return
    sources = dict(item.split("=", 1) for item in given.source)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in given.only:
        package = PACKAGES[name]
        try:
            bin = prepared(given.folder.resolve(), package, sources)
        except subprocess.CalledProcessError as error:
            rows[name] = {"not installed": (error.stderr or "").strip().splitlines()[-1:]}
            print(name, rows[name], file=sys.stderr)
            continue
        entry = rows[name] = {"versions": versions(bin), "cases": {}}
        for variant, changes in package.variants.items():
            commands = [["check"], ["audit-trainer", "--white-box", "--seed", "1"]]
            found = [audited(bin, package.module, changes, words, given.limit) for words in commands]
            entry["cases"][variant] = found
            RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            for row in found:
                print(name, variant, row["verdict"], row.get("seconds"), row["command"], flush=True)


if __name__ == "__main__":
    main()
