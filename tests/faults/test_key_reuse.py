"""One noise key, one configuration, one model, one data set in one order: every way round it that we could think of.

With the noise of one key on two data sets, the two releases subtract to private gradients without noise. So each case
here takes a training that was killed after its third step, or a finished one, changes something, and types a command:
whatever the command does, no two sets of weights may come from one key and two data sets.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpaudit import checksums
from tests.faults import harness
from tests.faults.scenarios import DUAL_PRIV, SETTINGS, write_data
from tests.tiny import save_tiny_llava

UNSEEDED = [item for item in SETTINGS if not item.startswith(("seed", "training.checkpoint-every"))]


@dataclass(frozen=True)
class Bench:
    """A data set and a model that cases may change, and runs on them: `killed` after step 3 of 4, `whole` finished."""

    root: Path

    @property
    def rows(self) -> Path:
        return self.root / "data" / "train.jsonl"

    def train(self, out: Path) -> list[str]:
        data = [f"data.path={self.root / 'data'}", "data.train=train.jsonl", "data.test=test.jsonl"]
        settings = [*DUAL_PRIV, "training.checkpoint-every=1", *UNSEEDED, *data]
        return ["train", f"model.path={self.root / 'model'}", *settings, "--out", str(out)]

    def run(self, command: list[str], **faults: object) -> harness.Ended:
        return harness.run(command, [self.root], self.root, **faults)  # type: ignore[arg-type]

    def prepare(self) -> None:
        """Train `whole`, then `killed`, which is stopped just before its third line of metrics."""
        assert self.run(self.train(self.root / "whole")).code == 0
        sites = self.run(self.train(self.root / "rehearsal")).sites
        at = [n for n, site in enumerate(sites) if site.call == "write" and site.path.endswith("metrics.jsonl")][2]
        assert self.run(self.train(self.root / "killed"), kind="kill", at=at).code == -9
        assert steps(self.root / "killed") == 3 and not weights(self.root / "killed")


@pytest.fixture(scope="module")
def made() -> Iterator[Bench]:
    harness.warm_up()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-keys-"))
    write_data(root / "data")
    save_tiny_llava(root / "model", reserved=8)
    bench = Bench(root)
    bench.prepare()
    yield bench
    shutil.rmtree(root)


@pytest.fixture
def bench(made: Bench) -> Iterator[Bench]:
    """The bench, its data and model put back afterwards."""
    kept = {path: path.read_bytes() for name in ("data", "model") for path in (made.root / name).iterdir()}
    yield made
    for path, content in kept.items():
        path.write_bytes(content)
    shutil.rmtree(made.root / "case", ignore_errors=True)


def steps(run: Path) -> int:
    found: int = json.loads((run / "release" / "ledger.json").read_bytes())["spent"]["steps_started"]
    return found


def key(run: Path) -> str | None:
    path = run / "private" / "noise.key"
    return json.loads(path.read_bytes())["key"] if path.exists() else None


def weights(run: Path) -> bytes:
    path = run / "release" / "model" / "adapter_model.safetensors"
    return path.read_bytes() if path.exists() else b""


def lines(bench: Bench) -> list[dict[str, object]]:
    return [json.loads(line) for line in bench.rows.read_text().splitlines()]


def write(bench: Bench, rows: list[dict[str, object]]) -> None:
    bench.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(bench: Bench) -> None:
    rows = lines(bench)
    write(bench, [{**rows[0], "answer": "no" if rows[0]["answer"] == "yes" else "yes"}, *rows[1:]])


def picture(bench: Bench) -> None:
    rows = lines(bench)
    other = next(row for row in rows if row["image"] != rows[0]["image"])
    write(bench, [{**row, "image": other["image"]} if row["image"] == rows[0]["image"] else row for row in rows])


def order(bench: Bench) -> None:
    write(bench, lines(bench)[::-1])


def fewer(bench: Bench) -> None:
    rows = lines(bench)
    write(bench, [row for row in rows if row["image"] != rows[0]["image"]])


def kind(bench: Bench) -> None:
    rows = lines(bench)
    write(bench, [{**rows[0], "kind": "other"}, *rows[1:]])


def base_model(bench: Bench) -> None:
    save_tiny_llava(bench.root / "model", reserved=8, seed=5)


CHANGES: tuple[Callable[[Bench], None], ...] = (answer, picture, order, fewer, kind, base_model)


def remove(*names: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def unbound(run: Path) -> None:
    path = run / "private" / "noise.key"
    tree = json.loads(path.read_bytes())
    del tree["bound"]
    path.write_text(json.dumps(tree))


def older(run: Path) -> None:
    """The oldest checkpoint that is there, as if a backup had been put back; of a finished run the model too."""
    for path in sorted((run / "private" / "checkpoints").iterdir())[1:]:
        path.unlink()
    shutil.rmtree(run / "release" / "model")


MODEL, LEDGER, KEY = "release/model", "release/ledger.json", "private/noise.key"
TRACES = ("private/metrics.jsonl", "private/checkpoints")
WAYS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # what there is, what is done to it, and how training goes on
    "resumed": ("killed", lambda run: None, "resume"),
    "the model removed, as advised for a damaged one": ("whole", remove(MODEL), "resume"),
    "model and checkpoints removed": ("whole", remove(MODEL, "private/checkpoints"), "resume"),
    "all but key and ledger removed": ("whole", remove(MODEL, *TRACES), "resume"),
    "an older checkpoint": ("whole", older, "resume"),
    "no ledger, resumed": ("killed", remove(LEDGER), "resume"),
    "no ledger, started": ("killed", remove(LEDGER), "start"),
    "release removed": ("whole", remove("release"), "start"),
    "release and traces removed": ("whole", remove("release", *TRACES), "start"),
    "started over it": ("killed", lambda run: None, "start"),
    "a key without the data that it was drawn for": ("killed", unbound, "resume"),
}


CASES = [(way, answer) for way in WAYS] + [
    (way, change) for change in CHANGES[1:] for way in ("resumed", "all but key and ledger removed")
]


@pytest.mark.parametrize(("way", "change"), CASES, ids=[f"{way}-{change.__name__}" for way, change in CASES])
def test_no_key_twice_on_different_data(bench: Bench, way: str, change: Callable[[Bench], None]) -> None:
    start, prepared, how = WAYS[way]
    run = bench.root / "case"
    shutil.copytree(bench.root / start, run)
    prepared(run)
    before = key(run), weights(run)
    change(bench)
    ended = bench.run(bench.train(run) if how == "start" else ["train", "--resume", str(run)])
    assert ended.code == 2 and len(ended.err.strip().splitlines()) >= 1, ended.err
    assert (key(run), weights(run)) == before, "a release was made with a key that was used on other data"
    assert any(text in ended.line for text in ("noise", "holds a run already")), ended.line


@pytest.mark.parametrize("way", WAYS)
def test_on_the_same_data_a_key_gives_the_same_release_or_none(bench: Bench, way: str) -> None:
    """The control: resuming works where it is allowed, and repeats to the bit what was released."""
    start, prepared, how = WAYS[way]
    run = bench.root / "case"
    shutil.copytree(bench.root / start, run)
    prepared(run)
    ended = bench.run(bench.train(run) if how == "start" else ["train", "--resume", str(run)])
    allowed = how == "resume" and prepared is not unbound and (run / "release" / "ledger.json").exists()
    assert ended.code == (0 if allowed else 2), ended.err
    if allowed and start == "whole":
        assert weights(run) == weights(bench.root / "whole")


def test_without_key_and_traces_a_fresh_key_is_drawn(bench: Bench) -> None:
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    remove("release", KEY, *TRACES)(run)
    assert bench.run(bench.train(run)).code == 0
    assert key(run) not in (None, key(bench.root / "killed"))
    assert weights(run) != weights(bench.root / "whole")


@pytest.mark.parametrize("left", ["private/metrics.jsonl", "private/checkpoints"])
def test_traces_of_steps_without_their_key_start_nothing(bench: Bench, left: str) -> None:
    """A key that was deleted with its ledger: a resume would go on from checkpoints of another key."""
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    remove("release", KEY, *(name for name in TRACES if name != left))(run)
    ended = bench.run(bench.train(run))
    assert ended.code == 2 and "without its ledger" in ended.line and key(run) is None


def test_a_lost_key_is_not_replaced(bench: Bench) -> None:
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    remove(KEY)(run)
    ended = bench.run(["train", "--resume", str(run)])
    assert ended.code == 2 and "noise.key: missing, though 3 steps" in ended.line and key(run) is None


def test_an_edited_configuration_with_its_hashes_made_again(bench: Bench) -> None:
    """Clipping to another C under the same noise: the difference is private gradients just as well."""
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    config, listed = run / "release" / "config.yaml", run / "release" / checksums.SUMS
    text = config.read_text()
    config.write_text(text.replace("max-grad-norm: 1.0", "max-grad-norm: 0.5"))
    assert config.read_text() != text
    found = checksums.digest(config.read_bytes())
    listed.write_text(checksums.write(checksums.read(listed) | {"config.yaml": found}))
    ledger = json.loads((run / LEDGER).read_bytes()) | {"config_sha256": found}
    (run / LEDGER).write_text(json.dumps(ledger | {"sha256": checksums.seal(ledger)}))
    ended = bench.run(["train", "--resume", str(run)])
    assert ended.code == 2 and "another configuration" in ended.line and not weights(run), ended.err


def test_a_copy_goes_on_as_the_original_does(bench: Bench) -> None:
    """Two copies on one data set repeat each other; with changed data neither goes on, nor with each other's key."""
    one, two = bench.root / "case" / "one", bench.root / "case" / "two"
    for run in (one, two):
        shutil.copytree(bench.root / "killed", run)
        assert bench.run(["train", "--resume", str(run)]).code == 0
    assert weights(one) == weights(two) != b""
    answer(bench)
    other = bench.root / "case" / "other"
    assert bench.run(bench.train(other)).code == 0 and key(other) != key(one)
    shutil.copy(one / KEY, other / KEY)
    remove(MODEL)(other)
    ended = bench.run(["train", "--resume", str(other)])
    assert ended.code == 2 and "other data" in ended.line and not weights(other)


def test_checkpoints_of_another_run_are_not_taken(bench: Bench) -> None:
    """Of the same data and configuration, with another key: a run goes on from its own steps or from its start."""
    own, mixed = bench.root / "case" / "own", bench.root / "case" / "mixed"
    for run in (own, mixed):
        shutil.copytree(bench.root / "killed", run)
    shutil.rmtree(mixed / "private/checkpoints")
    shutil.copytree(bench.root / "whole" / "private/checkpoints", mixed / "private/checkpoints")
    assert bench.run(["train", "--resume", str(own)]).code == 0
    ended = bench.run(["train", "--resume", str(mixed)])
    assert ended.code == 2 or (ended.code == 0 and weights(mixed) == weights(own)), ended.err
    assert weights(mixed) in (b"", weights(own))


def test_a_planted_folder_is_not_taken(bench: Bench) -> None:
    """A key that somebody else knows, in a folder that was made ready for its victim."""
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    known = key(run)
    remove(LEDGER, *TRACES)(run)
    (run / "private").chmod(0o777)
    for command in (bench.train(run), ["train", "--resume", str(run)]):
        ended = bench.run(command)
        assert ended.code == 2 and not weights(run) and key(run) == known, ended.err
    remove(KEY)(run)  # without a key the folder is still open to everybody
    ended = bench.run(bench.train(run))
    assert ended.code == 2 and "0700" in ended.line, ended.err
    (run / "private").chmod(0o700)
    assert bench.run(bench.train(run)).code == 0 and key(run) != known


@pytest.mark.parametrize(
    "more", [["--dry-run"], ["--seed", "3"], ["--delta", "1e-6"], ["--epsilon", "0"], ["--canaries", "2"]]
)
def test_a_resume_takes_no_other_settings(bench: Bench, more: list[str]) -> None:
    """They would be left out without a word; with --dry-run a run would be trained to its end."""
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    ended = bench.run(["train", "--resume", str(run), *more])
    assert ended.code == 2 and f"drop {more[0]}" in ended.line and steps(run) == 3 and not weights(run), ended.err


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o711, 0o720, 0o701])
@pytest.mark.parametrize("how", ["start", "resume"])
def test_a_folder_that_others_may_enter_is_not_taken(bench: Bench, mode: int, how: str) -> None:
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    known = key(run)
    if how == "start":
        remove(LEDGER, *TRACES)(run)
    (run / "private").chmod(mode)
    ended = bench.run(bench.train(run) if how == "start" else ["train", "--resume", str(run)])
    assert ended.code == 2 and key(run) == known and not weights(run), ended.err
    assert steps(run) == 3 if how == "resume" else not (run / LEDGER).exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_folder_of_somebody_else_is_not_taken(bench: Bench) -> None:
    run = bench.root / "case"
    shutil.copytree(bench.root / "killed", run)
    os.chown(run / "private", 12345, 12345)
    ended = bench.run(["train", "--resume", str(run)])
    assert ended.code == 2 and steps(run) == 3 and not weights(run), ended.err
