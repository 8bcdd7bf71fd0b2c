"""Memory of training on many photographs: pictures left where they lie, against all of them decoded.

    python benchmarks/large_set.py --out benchmarks/results/large_set.json      # about half an hour, 6 GB in TMPDIR

Makes a set of synthetic photographs (640 x 480, JPEG at quality 85, no two alike) once as files beside a table of JSON
lines and once inside a Parquet file, and trains the reference model on the first 500, 2,000 and 20,000 of them, each in
a process of its own; the first two sizes also with the sources of `BEFORE`, which held every picture decoded. Memory is
the highest resident size of the process less the one it had with libraries and model loaded. Weights and ledgers are
compared between the two by their hashes.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEFORE = "0062153"
SIZES, SMALL = (500, 2000, 20000), 2000
SIDE = (640, 480)
TEST = 50


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def child(folder: Path, table: str, out: Path) -> dict[str, Any]:
    """Train on a set in this process; imports nothing that only one of the two versions has."""
    import numpy as np

    from attacks.training import start_run
    from dpaudit.config import resolve
    from trainers.data import load
    from trainers.vlm import VisionLanguageModel

    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    VisionLanguageModel.load(None, device="cpu").encoded(list(noise))
    model = status("VmRSS")
    words = [f"data.path={folder}", f"data.train={table}", "data.test=test.jsonl", "seed=1", "model.device=cpu"]
    words += ["training.batch-size=64", "training.steps=20", "training.feature-cache=never", "data.public-size=20000"]
    config = resolve({"method": "dual-priv"}, words)
    began = time.perf_counter()
    dataset = load(config.data)
    read = time.perf_counter() - began
    after_reading = status("VmHWM")
    run = start_run(config, out, dataset=dataset)
    digest = hashlib.sha256((run.model / "adapter_model.safetensors").read_bytes()).hexdigest()
    return {
        "pictures": len(dataset.train),
        "mib_above_the_model": round((status("VmHWM") - model) / 2**20),
        "of_it_after_reading": round((after_reading - model) / 2**20),
        "seconds": {"reading": round(read, 1), "training": round(time.perf_counter() - began - read, 1)},
        "weights": digest[:16],
        "ledger": hashlib.sha256(run.ledger.read_bytes()).hexdigest()[:16],
    }


def photographs(folder: Path, count: int, first: int) -> list[dict[str, Any]]:
    """Files of synthetic photographs, and their rows."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    spectrum = np.hypot(np.fft.fftfreq(SIDE[1])[:, None], np.fft.rfftfreq(SIDE[0])[None]) + 1 / 640
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((SIDE[1], SIDE[0]))) / spectrum, s=(SIDE[1], SIDE[0]))
    texture = 18 * texture / texture.std() + rng.normal(0, 4, texture.shape)
    rows = []
    for index in range(first, first + count):
        draw = np.random.default_rng(index)
        small = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        large = np.asarray(small.resize(SIDE, Image.Resampling.BICUBIC), dtype=np.int16)
        shifted = np.roll(texture, draw.integers(0, 480, 2), (0, 1)).astype(np.int16)[..., None]
        name = f"{folder.name}/{index:06d}.jpg"
        Image.fromarray(np.clip(large + shifted, 0, 255).astype(np.uint8)).save(folder.parent / name, quality=85)
        rows.append({"image": name, "question": "is it light?", "answer": "yes" if large.mean() > 127 else "no"})
    return rows


def make_sets(root: Path) -> dict[int, tuple[str, str]]:
    """Tables of the first so many pictures: (files, Parquet) by size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    train, test = photographs(root / "pictures", SIZES[-1], 0), photographs(root / "held-out", TEST, 10**6)
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test), encoding="utf-8")
    made = {}
    for size in SIZES:
        names = f"train-{size}.jsonl", f"train-{size}.parquet"
        (root / names[0]).write_text("".join(json.dumps(row) + "\n" for row in train[:size]), encoding="utf-8")
        kinds = [("image", pa.struct([("bytes", pa.binary())])), ("question", pa.string()), ("answer", pa.string())]
        with pq.ParquetWriter(root / names[1], pa.schema(kinds)) as writer:
            for at in range(0, size, 100):
                part = [
                    row | {"image": {"bytes": (root / row["image"]).read_bytes()}} for row in train[:size][at:][:100]
                ]
                writer.write_table(pa.Table.from_pylist(part, schema=pa.schema(kinds)))
        made[size] = names
    return made


def run(tree: Path, root: Path, table: str, name: str) -> dict[str, Any]:
    """One training in a process of its own, with the sources in `tree`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(root), table, str(root / name)]
    done = subprocess.run(command, cwd=root, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps(found), file=sys.stderr, flush=True)
    return found


def environment(tree: Path) -> dict[str, str]:
    """The environment with the sources in `tree` before all others."""
    import os

    return os.environ | {"PYTHONPATH": str(tree)}


def main() -> None:
    """All of it, or one training for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, table, out = options.child
        print(json.dumps(child(Path(folder), table, Path(out))))
        return
    here = Path(__file__).resolve().parents[1]
    found: dict[str, Any] = {"machine": f"{platform.machine()}, 2 cores", "before": BEFORE, "rows": []}
    with tempfile.TemporaryDirectory(prefix="large-set-") as folder:
        root = Path(folder)
        old = root / "before"
        old.mkdir()
        archive = subprocess.run(["git", "archive", BEFORE], cwd=here, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive, check=True)
        sets = make_sets(root)
        sizes = [path.stat().st_size for path in (root / "pictures").iterdir()]
        found["kilobytes of a file"] = round(sum(sizes) / len(sizes) / 1000)
        for size, tables in sets.items():
            for table in tables:
                for tree, label in ((old, "before"), (here, "now")):
                    if label == "now" or size <= SMALL:
                        row = run(tree, root, table, f"{label}-{table}")
                        found["rows"].append({"sources": label, "table": table.rpartition(".")[2]} | row)
                        if options.out is not None:  # after every row: what was measured stays where a later one stops
                            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
