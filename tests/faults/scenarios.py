"""What is run under the harness: commands on a model of a few thousand weights, how a person goes on after a crash, and
what must be equal in the end."""

import base64
import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dpaudit.cli.app import run as command
from tests.faults import in_process
from tests.faults.harness import Ended, Kind, Site, run
from tests.tiny import random_units, save_tiny_llava
from trainers.records import Unit

SETTINGS = (
    "seed=1", "data.reserve=12", "canaries.kinds=[mislabelled, noise]", "training.batch-size=8", "training.steps=4",
    "training.checkpoint-every=2", "model.lora.rank=2", "model.device=cpu", "privacy.noise-multiplier=1",
)  # fmt: skip
DUAL_PRIV = ("method=dual-priv", "reducer.keep=4", "reducer.fuse=3")
WITH_CANARIES = (*DUAL_PRIV, "canaries.count=12")


def write_data(folder: Path, units: int = 36) -> Path:
    """A local data set of train units (12 of them held back) and 8 test units, as JSONL with pictures inside."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("train", random_units(units)), ("test", random_units(8, seed=9, prefix="t"))):
        (folder / f"{name}.jsonl").write_text("".join(_rows(unit) for unit in found), encoding="utf-8")
    return folder


def _rows(unit: Unit) -> str:
    lines = []
    for picture in unit.pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture.pixels).save(buffer, "PNG")
        image = {"bytes": base64.b64encode(buffer.getvalue()).decode(), "path": None}
        for question in picture.questions:
            row = {"image": image, "question": question.text, "answer": question.answer, "kind": question.kind}
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def _here(typed: list[str]) -> None:
    """A command in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        if command(typed) != 0:
            raise RuntimeError(f"the command itself fails: {err.getvalue()[-2000:]}")


@dataclass(frozen=True)
class World:
    """Model and data shared by all cases, finished runs to start from, and a place for each case."""

    root: Path
    model: Path
    data: Path

    @classmethod
    def make(cls, root: Path) -> "World":
        world = cls(root, save_tiny_llava(root / "model", reserved=8), write_data(root / "data"))
        world._compute_once()
        return world

    def _compute_once(self) -> None:
        """One training and one audit in this very process: privacy losses and bounds are then known to every fork."""
        run = self.root / "first"
        _here(self.train(run, *WITH_CANARIES))
        _here(["audit", str(run), "--canaries"])

    def train(self, out: Path, *extra: str) -> list[str]:
        """The command line of a training."""
        data = [f"data.path={self.data}", "data.train=train.jsonl", "data.test=test.jsonl"]
        return ["train", *extra, f"model.path={self.model}", *data, *SETTINGS, "--out", str(out)]

    def finished(self, name: str, *extra: str) -> Path:
        """A finished run, trained once."""
        out = self.root / "finished" / name
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            ended = run(self.train(out, *extra), [out], self.root)
            assert ended.code == 0, ended.err
        return out

    def place(self, name: str) -> Path:
        """An empty place for one case."""
        place = self.root / "case" / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place


@dataclass(frozen=True)
class Scenario:
    """A command in an empty place. prepare: what lies there before; again: how a person goes on after a crash.

    skip: sites that another scenario plays. patch: called in the process of the command, returns what undoes it.
    finished: what is said, with exit code 2, by a command that has nothing left to do.
    """

    name: str
    prepare: Callable[[World, Path], None]
    command: Callable[[World, Path], list[str]]
    again: Callable[[World, Path], Sequence[list[str]]]
    skip: str | None = None
    patch: Callable[[World], Callable[[], Callable[[], None]]] | None = None
    finished: str | None = None

    def run(self, world: World, place: Path, typed: Sequence[str], kind: Kind = "none", at: int = -1) -> Ended:
        """One command of this scenario, with a fault at its site `at`."""
        prepare = self.patch(world) if self.patch is not None else None
        return run(typed, [place], world.root, kind=kind, at=at, skip=self.skip, prepare=prepare)


def _with_run(*extra: str) -> Callable[[World, Path], None]:
    def prepare(world: World, place: Path) -> None:
        shutil.copytree(world.finished("-".join(extra).replace("=", "_") or "plain", *extra), place / "run")

    return prepare


def _same(command: Callable[[World, Path], list[str]]) -> Callable[[World, Path], Sequence[list[str]]]:
    return lambda world, place: [command(world, place)]


def _train(world: World, place: Path) -> list[str]:
    return world.train(place / "run", *DUAL_PRIV, "canaries.count=12")


def _resume(world: World, place: Path) -> Sequence[list[str]]:
    """`--resume` first; where there is nothing to resume, it says so and the command itself is typed again."""
    return [["train", "--resume", str(place / "run")], _train(world, place)]


def _audit(*flags: str) -> Callable[[World, Path], list[str]]:
    return lambda world, place: ["audit", str(place / "run"), *flags]


def _report(world: World, place: Path) -> list[str]:
    return ["report", str(place / "run"), "-o", str(place / "report.html")]


def _benchmark(world: World, place: Path) -> list[str]:
    return ["benchmark", str(place / "run"), "--limit", "4"]


GRID = """
name: small
settings: {{{settings}}}
grid: {{privacy.noise-multiplier: [1.0, 2.0]}}
"""


def _grid(world: World) -> Path:
    """A grid of two cells of two steps."""
    data = [f"data.path={world.data}", "data.train=train.jsonl", "data.test=test.jsonl", f"model.path={world.model}"]
    kept = [item for item in SETTINGS if not item.startswith(("seed", "privacy", "training.steps", "data.reserve"))]
    pairs = [item.replace("=", ": ", 1) for item in (*kept, *data, "training.steps=2", "privacy.epsilon=null")]
    path = world.root / "grid.yaml"
    path.write_text(GRID.format(settings=", ".join(pairs)))
    return path


def _sweep(world: World, place: Path) -> list[str]:
    return ["sweep", str(_grid(world)), "--out", str(place / "sweep")]


def _sweep_again(world: World, place: Path) -> Sequence[list[str]]:
    return [[*_sweep(world, place), "--resume"], _sweep(world, place)]


def _measured(world: World) -> Callable[[], Callable[[], None]]:
    """The sweep is measured once, for real; its jobs run in the process that is watched."""
    whole = world.root / "finished" / "sweep"
    if not whole.exists():
        whole.parent.mkdir(exist_ok=True)
        ended = run(["sweep", str(_grid(world)), "--out", str(whole)], [whole], world.root)
        assert ended.code == 0, ended.err
    return lambda: in_process.patch(whole)


def _trainer(world: World, place: Path) -> list[str]:
    games = ["--canaries", "--count", "30", "--runs", "20", "--steps", "2"]
    return ["audit", "--trainer", "tests.attacks.external_toy:factory", *games, "--seed", "1", "--out", f"{place}/toy"]


def _scenario(
    name: str, prepare: Callable[[World, Path], None], command: Callable[[World, Path], list[str]]
) -> Scenario:
    return Scenario(name, prepare, command, _same(command))


SCENARIOS: Mapping[str, Scenario] = {
    item.name: item
    for item in (
        Scenario("train", lambda world, place: None, _train, _resume),
        _scenario("audit", _with_run(*WITH_CANARIES), _audit("--canaries")),
        _scenario("audit that trains a twin", _with_run(*DUAL_PRIV), _audit("--canaries", "--count", "12")),
        _scenario("white-box audit", _with_run(*DUAL_PRIV), _audit("--white-box", "--count", "30")),
        Scenario(
            "membership audit",
            _with_run(*WITH_CANARIES),
            _audit("--mia", "--references", "2"),
            _same(_audit("--mia", "--references", "2")),
            skip=r"/\.?progress-",  # written by a clock
            patch=lambda world: in_process.patch,
        ),
        Scenario(
            "audit of a trainer",
            lambda world, place: None,
            _trainer,
            _same(_trainer),
            finished="holds a finished audit",
        ),
        Scenario("sweep", lambda world, place: None, _sweep, _sweep_again, patch=_measured),
        _scenario("report", _with_run(*WITH_CANARIES), _report),
        _scenario("benchmark", _with_run(*WITH_CANARIES), _benchmark),
    )
}


def state(place: Path) -> dict[str, str]:
    """What a reader or a later command sees of a place: every released file and everything private that decides.

    Left out: how long something took, the command line that was typed last, and the order in which steps were logged.
    """
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if not path.is_file() or name.endswith(("/lock", "SHA256SUMS")) or "/checkpoints/" in name:
            continue
        if path.name == "metrics.jsonl":
            found[name] = _digest(_metrics(path))
        elif path.name in ("benchmark.json", "environment.json"):
            found[name] = _digest(_without(path, "seconds", "command"))
        elif path.name == "sweep.json":
            found[name] = _digest(_timeless(json.loads(path.read_bytes())))
        elif path.suffix == ".html":
            found[name] = "present"  # it embeds command lines and times; the same inputs give the same bytes
        elif path.suffix in (".log",):
            continue
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _without(path: Path, *names: str) -> object:
    try:
        tree = json.loads(path.read_bytes())
        return {key: value for key, value in tree.items() if key not in names}
    except (ValueError, AttributeError):
        return path.read_bytes().hex()


def _timeless(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key != "seconds"}
    return [_timeless(item) for item in tree] if isinstance(tree, list) else tree


def _metrics(path: Path) -> list[object]:
    steps = {}
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            tree = json.loads(line)
            steps[tree["step"]] = {key: value for key, value in tree.items() if key != "seconds"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return [line]
    return [steps[step] for step in sorted(steps)]


def _digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def spent(place: Path) -> dict[str, int]:
    """Steps started by the ledger of every run below a place."""
    return {
        path.relative_to(place).as_posix(): (json.loads(path.read_text())["spent"] or {}).get("steps_started", 0)
        for path in sorted(place.rglob("ledger.json"))
    }


@dataclass(frozen=True)
class Case:
    """One fault and what became of it. problem: None, or in one line what was not as it must be."""

    site: Site
    kind: Kind
    problem: str | None


def distinct(sites: Sequence[Site]) -> list[int]:
    """Indices of the first site of each call on each file."""
    first: dict[Site, int] = {}
    for index, site in enumerate(sites):
        first.setdefault(site, index)
    return sorted(first.values())


def _know(world: World, scenario: Scenario) -> None:
    """The command once in this very process, for what every fork then finds computed: most of a case's time."""
    place = world.place("whole")
    scenario.prepare(world, place)
    undo = scenario.patch(world)() if scenario.patch is not None else None
    try:
        _here(scenario.command(world, place))
    finally:
        if undo is not None:
            undo()


def uninterrupted(world: World, scenario: Scenario) -> tuple[Ended, dict[str, str]]:
    """The command without a fault, and what it leaves."""
    if scenario.name not in ("train", "audit", "benchmark"):  # known; known; nothing to know
        _know(world, scenario)
    place = world.place("whole")
    scenario.prepare(world, place)
    ended = scenario.run(world, place, scenario.command(world, place))
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name}: the command itself fails: {ended.err[-2000:]}")
    return ended, state(place)


def play(world: World, scenario: Scenario, kind: Kind, at: int, expected: Mapping[str, str]) -> Case:
    """The command with a fault at site `at`, then what a person does next; checks every promise on the way."""
    # The same path as the uninterrupted run: a path is part of a configuration.
    place = world.place("whole")
    scenario.prepare(world, place)
    ended = scenario.run(world, place, scenario.command(world, place), kind, at)
    if len(ended.sites) <= at:
        return Case(Site("none", ""), kind, f"has only {len(ended.sites)} sites")
    site = ended.sites[at]
    problem = _first_problem(world, scenario, kind, place, ended, expected)
    return Case(site, kind, problem)


def _first_problem(
    world: World, scenario: Scenario, kind: Kind, place: Path, ended: Ended, expected: Mapping[str, str]
) -> str | None:
    if kind in ("kill", "torn") and ended.code != -9:
        return f"ended with code {ended.code} instead of dying: {ended.line[:200]}"
    if kind == "full":
        told = _told(ended)
        if told is not None:
            return told
    before = spent(place)
    model = place / "run" / "release" / "model" / "complete.json"
    if scenario.name == "train" and not model.exists():
        audit = run(["audit", str(place / "run")], [place], world.root)
        if audit.code != 2 or "Traceback" in audit.err or len(audit.err.strip().splitlines()) != 1:
            return f"a half-written run was audited: code {audit.code}: {audit.line[:200]}"
    last, done = None, False
    for typed in scenario.again(world, place):
        last = scenario.run(world, place, typed)
        done = scenario.finished is not None and scenario.finished in last.line
        if last.code == 0 or done:
            break
        if last.code != 2 or "Traceback" in last.err or len(last.err.strip().splitlines()) != 1:
            return f"going on failed with code {last.code}: {last.err.strip()[-300:]}"
    assert last is not None
    if last.code != 0 and not done:
        return f"no way to go on: {last.line[:300]}"
    after = spent(place)
    fallen = [name for name, steps in before.items() if after.get(name, 0) < steps]
    if fallen:
        return f"the spent budget of {fallen[0]} fell from {before[fallen[0]]} to {after.get(fallen[0])}"
    found = state(place)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return f"not the result of an uninterrupted run: {', '.join(different[:5])}" if different else None


def _told(ended: Ended) -> str | None:
    """A full disk is one line that says so, with exit code 4; or it did not matter."""
    if ended.code == 0:
        return None
    if "Traceback" in ended.err:
        return f"a traceback: {ended.line[:200]}"
    if ended.code != 4:
        return f"exit code {ended.code} instead of 4: {ended.line[:200]}"
    return None if "disk is full" in ended.line or "space" in ended.line.lower() else f"unclear: {ended.line[:200]}"
