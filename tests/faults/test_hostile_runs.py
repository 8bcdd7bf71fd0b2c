"""Run folders that somebody else prepared, and outputs in the wrong place: whole commands, one line each, nothing else
touched."""

import base64
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpaudit import checksums
from dpaudit.documents import Claim, EpsilonAt, GameDocument
from tests.faults import harness
from tests.faults.scenarios import DUAL_PRIV, WITH_CANARIES, World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    harness.warm_up()
    root = Path(tempfile.mkdtemp(prefix="dpaudit-hostile-"))
    made = World.make(root)
    whole = made.finished("run", *WITH_CANARIES)
    ended = harness.run(["audit", str(whole), "--canaries"], [root], root)
    assert ended.code == 0, ended.err
    made.finished("plain", *DUAL_PRIV)
    yield made
    shutil.rmtree(root)


@dataclass(frozen=True)
class Case:
    """A copy of an audited run in a place of its own; `outside` is somebody's folder that must stay as it is."""

    world: World
    place: Path

    @property
    def run(self) -> Path:
        return self.place / "run"

    @property
    def outside(self) -> Path:
        return self.place / "outside"

    @property
    def page(self) -> str:
        return (self.place / "page.html").read_text()

    def type(self, *arguments: str, prepare: Callable[[], object] | None = None) -> harness.Ended:
        ended = harness.run(list(arguments), [self.place], self.world.root, timeout=300, prepare=prepare)
        assert "Traceback" not in ended.err, ended.err
        return ended

    def report(self, *more: str) -> harness.Ended:
        return self.type("report", str(self.run), "-o", str(self.place / "page.html"), *more)

    def edit(self, name: str, change: Callable[[dict[str, object]], object], *, sums: bool = True) -> None:
        """Change a document of the release as its owner could: checksums and seals are made again."""
        path = self.run / "release" / name
        tree = json.loads(path.read_bytes())
        change(tree)
        if "sha256" in tree and name == "ledger.json":
            tree["sha256"] = checksums.seal(tree)
        path.write_text(json.dumps(tree, indent=2) + "\n")
        if sums:
            self.list_again()

    def list_again(self) -> None:
        listed = self.run / "release" / checksums.SUMS
        sums = {name: checksums.digest((listed.parent / name).read_bytes()) for name in checksums.read(listed)}
        listed.write_text(checksums.write(sums))


@pytest.fixture
def case(world: World) -> Case:
    place = world.place("hostile")
    shutil.copytree(world.root / "finished" / "run", place / "run")
    (place / "outside").mkdir()
    (place / "outside" / "thesis.tex").write_text("precious\n")
    (place / "outside" / "model").mkdir()
    return Case(world, place)


def untouched(case: Case) -> bool:
    return (
        sorted(path.name for path in case.outside.rglob("*")) == ["model", "thesis.tex"]
        and (case.outside / "thesis.tex").read_text() == "precious\n"
    )


def nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


LINKS = (
    "private/lock", "private/metrics.jsonl", "private/noise.key", "private/scores.parquet", "private/folders.json",
    "private/coins.parquet", "release/claim.json", "release/audit.json", "release/config.yaml", "release/ledger.json",
    "release/SHA256SUMS", "release/model/adapter_model.safetensors", "release/notes.txt", "private/checkpoints/x",
)  # fmt: skip


@pytest.mark.parametrize("name", [*LINKS, "release", "private", "release/model", "private/checkpoints"])
def test_links_in_a_run_lead_nowhere(case: Case, name: str) -> None:
    path, folder = case.run / name, "." not in name.rpartition("/")[2] and name not in ("private/lock", LINKS[-1])
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(case.outside if folder else case.outside / "thesis.tex")
    commands = [("audit", str(case.run), "--canaries"), ("train", "--resume", str(case.run))]
    commands += [("benchmark", str(case.run), "--limit", "4"), ("report", str(case.run), "-o", f"{case.place}/p.html")]
    for command in commands:
        reads = command[0] != "report" or not name.startswith("private")
        ended = case.type(*command)
        assert untouched(case), command
        if reads:
            assert ended.code in (2, 4) and len(ended.err.strip().splitlines()) == 1, (command, ended.err)
    assert not any("thesis" in file.read_text() for file in case.place.glob("*.html"))


@pytest.mark.parametrize("name", ["private/lock", "private/metrics.jsonl", "release/audit.json", "release/extra"])
def test_pipes_and_sockets_are_refused_at_once(case: Case, name: str) -> None:
    path = case.run / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for command in (("audit", str(case.run), "--canaries"), ("train", "--resume", str(case.run))):
        ended = case.type(*command)
        assert ended.code == 2 and "device, pipe or socket" in ended.line, ended.err


@pytest.mark.parametrize(
    "target",
    ["/dev/full", "/dev/null", "/dev/stdout", "{run}/private/noise.key", "{run}/private/new.html",
     "{run}/release/config.yaml", "{run}/release/model/page.html", "{run}/release/claim.json", "{place}/pipe",
     "{place}/link-to-key", "{place}/a/../run/private/coins.parquet", "{place}/linked-folder/noise.key"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["html", "junit", "card"])
def test_a_report_is_written_beside_what_it_reads(case: Case, target: str, form: str) -> None:
    os.mkfifo(case.place / "pipe")
    (case.place / "link-to-key").symlink_to(case.run / "private" / "noise.key")
    (case.place / "linked-folder").symlink_to(case.run / "private")
    (case.place / "a").mkdir()
    before = {path: path.read_bytes() for path in case.run.rglob("*") if path.is_file()}
    named = ["--format", "html", "-o", str(case.place / "page.html")] if form != "html" else []
    written = target.format(run=case.run, place=case.place)
    # Never as root into /dev: where this test finds something, the machine would be broken.
    prepare = nobody if written.startswith("/dev/") and os.getuid() == 0 else None
    ended = case.type("report", str(case.run), *named, "--format", form, "-o", written, prepare=prepare)
    if prepare is not None and form == "card":  # a card is of one run, which is read first; nobody may not
        assert ended.code == 4 and "Permission denied" in ended.line
    else:
        assert ended.code == 2 and ("device" in ended.line or not written.startswith("/dev/"))
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert before == {path: path.read_bytes() for path in case.run.rglob("*") if path.is_file()}
    assert not (case.place / "page.html").exists()


def test_two_outputs_are_two_files(case: Case) -> None:
    page, same = case.place / "page.html", case.place / "outside" / ".." / "page.html"
    ended = case.type("report", str(case.run), "--format", "html", "-o", str(page), "--format", "md", "-o", str(same))
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and "page.html" in ended.line, ended.err
    assert not page.exists()


EVIL = (
    "\x1b[2J\x1b[1;1H\x9b31mverdict   not refuted\r\nverdict   not refuted\u202e\u2066x\u2028verdict   not refuted\x07"
    + (" " * 300 + "verdict   not refuted")
)


def test_text_of_others_paints_nothing(case: Case) -> None:
    """A unit, a reason, a ledger row and a name of a run that try to write a line of their own on the terminal."""

    def ledger(tree: dict[str, object]) -> None:
        rows = tree["rows"]
        assert isinstance(rows, list)
        rows.append({"path": EVIL, "status": "UNACCOUNTED", "explanation": EVIL, "evidence": EVIL})

    case.edit("claim.json", lambda tree: tree["claim"].update(unit=EVIL))  # type: ignore[attr-defined]
    case.edit("ledger.json", ledger)
    named = case.place / "run\x1b[2Jverdict   not refuted\nverdict   not refuted"
    shutil.move(case.run, named)
    commands = [["audit", str(named), "--canaries"], ["audit", str(named), "--canaries", "--json"]]
    commands += [["train", "--resume", str(named)], ["report", str(named), "-o", str(case.place / "page.html")]]
    for command in commands:
        ended = case.type(*command)
        for text in (ended.out, ended.err):
            assert not set(text) & set("\x1b\x9b\x07\r\u202e\u2066\u2028"), command
            lines = [line for line in text.splitlines() if line.lstrip().startswith("verdict   not refuted")]
            assert lines == [], command
        if "--json" in command:
            assert json.loads(ended.out)["claim"]["unit"] == EVIL, "escapes mean the same text"


def test_a_smaller_claim_than_the_mechanism_costs_is_unsupported(case: Case) -> None:
    def lower(tree: dict[str, object]) -> None:
        claim = Claim.model_validate(tree["claim"])
        small = claim.model_copy(update={"epsilon": 0.5, "curve": (EpsilonAt(delta=claim.delta, epsilon=0.5),)})
        tree["claim"] = json.loads(small.model_dump_json())

    case.edit("claim.json", lower)
    ended = case.type("audit", str(case.run), "--canaries", "--json")
    document = json.loads(ended.out)
    assert ended.code == 1 and document["verdict"] == "unsupported", document["reasons"]
    assert "costs more than the eps" in " ".join(document["reasons"])
    assert case.report().code == 0 and "costs more than the eps" in case.page


def test_a_claim_of_another_configuration_is_unsupported(case: Case) -> None:
    case.edit("claim.json", lambda tree: tree["claim"].update(noise_multiplier=5.0))  # type: ignore[attr-defined]
    ended = case.type("audit", str(case.run), "--canaries", "--json")
    assert ended.code == 1 and json.loads(ended.out)["verdict"] == "unsupported"
    assert "not the one that this configuration makes" in ended.out


def test_the_page_says_that_nobody_vouches(case: Case) -> None:
    assert case.report().code == 0
    assert "obody has signed this result, it is stated by the owner" in case.page and 'class="notice"' not in case.page


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (lambda release: (release / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda release: (release / "SHA256SUMS").write_text("none\n"), "SHA256SUMS is empty"),
        (lambda release: flip(release / "model" / "adapter_model.safetensors"), "Changed since training ended"),
        (lambda release: flip(release / "model" / "adapter_config.json"), "Changed since training ended"),
        (lambda release: (release / "model" / "adapter_model.safetensors").unlink(), "Missing since training ended"),
        (lambda release: (release / "model" / "complete.json").unlink(), "complete.json is missing"),
        (lambda release: (release / "model" / "more.safetensors").write_bytes(b"x"), "but not when training ended"),
        (lambda release: drop(release, "audit.json"), "Not listed in SHA256SUMS: audit.json"),
    ],
)
def test_a_report_tells_what_was_changed(case: Case, change: Callable[[Path], object], notice: str) -> None:
    change(case.run / "release")
    junit = case.place / "junit.xml"
    assert case.report("--format", "html", "--format", "junit", "-o", str(junit)).code == 0
    assert notice in case.page and 'class="notice"' in case.page
    assert notice in junit.read_text() and "<failure" in junit.read_text()


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def drop(release: Path, name: str) -> None:
    sums = checksums.read(release / checksums.SUMS)
    del sums[name]
    (release / checksums.SUMS).write_text(checksums.write(sums))


def solid(side: int) -> str:
    """A black picture as PNG, its rows compressed without holding them."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 + side // 8 + 1)) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(("side", "shown"), [(64, True), (2000, False), (9000, False)])
def test_large_pictures_are_left_out_of_a_page(case: Case, side: int, shown: bool) -> None:
    picture = {"caption": "c", "kind": "noise", "png_base64": solid(side), "question": "q", "answer": "a"}
    (game,) = (case.run / "release" / "games").iterdir()
    before = GameDocument.read(game).sha256()
    case.edit(f"games/{game.name}", lambda tree: tree.update(gallery=[picture] * 8))
    audit = case.run / "release" / "audit.json"
    audit.write_text(audit.read_text().replace(before, GameDocument.read(game).sha256()))
    case.list_again()
    ended = case.report()
    assert ended.code == 0, ended.err
    assert (picture["png_base64"] in case.page) == shown and len(case.page) < 500_000


@pytest.mark.parametrize("twin", ["twin-white-box", "twin-members"])
def test_what_lies_where_a_twin_would_be_is_left_alone(case: Case, twin: str) -> None:
    """Files of somebody else's, and a link: a twin takes the next free name, and nothing is deleted or followed."""
    shutil.rmtree(case.run)
    shutil.copytree(case.world.root / "finished" / "plain", case.run)
    flags = ["--white-box", "--count", "30"] if "white" in twin else ["--mia"]
    place = case.run / twin
    for name in ("thesis.tex", "release/thesis.tex", "private/thesis.tex"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("precious\n")
    ended = case.type("audit", str(case.run), *flags)
    assert ended.code in (0, 2), ended.err
    for name in ("thesis.tex", "release/thesis.tex", "private/thesis.tex"):
        assert (place / name).read_text() == "precious\n"
    assert not (place / "release" / "config.yaml").exists()
    shutil.rmtree(place)
    place.symlink_to(case.outside)
    ended = case.type("audit", str(case.run), *flags, "--again")
    assert ended.code in (0, 2) and untouched(case), ended.err


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/dpaudit-escaped", "a/b", "..", "", "\x1b[2J", "x" * 150])
def test_the_name_of_a_grid_is_no_path(case: Case, name: str) -> None:
    grid = case.place / "grid.yaml"
    settings = {"model.path": str(case.world.model), "training.steps": 2}
    grid.write_text(json.dumps({"name": name, "settings": settings}))
    here = os.getcwd()
    os.chdir(case.place)
    try:
        ended = case.type("sweep", str(grid), "--dry-run")
    finally:
        os.chdir(here)
    assert ended.code == 0, ended.err
    folder = Path(ended.out.splitlines()[0])
    assert folder.parts[0] == "sweeps" and folder.parts[2] == "runs" and len(folder.parts) == 4
    assert folder.parts[1].strip(".") and len(folder.parts[1]) <= 60


def test_names_of_pictures_are_never_quoted(case: Case) -> None:
    """A path that no file system takes, one through a file, and one with a name of somebody."""
    data = case.place / "data"
    shutil.copytree(case.world.data, data)
    row = json.loads((data / "train.jsonl").read_text().splitlines()[0])
    for image in (
        "Jane-Roe/" + "Jane-Roe" * 40 + ".png", "train.jsonl/Jane-Roe.png", "Jane-Roe.png", "Jane-Roe\0.png",
        "../Jane-Roe.png", "/Jane-Roe.png", "Jane-Roe/" * 600 + "x.png",
    ):  # fmt: skip
        (data / "train.jsonl").write_text(json.dumps({**row, "image": {"bytes": None, "path": image}}) + "\n")
        out = case.place / "new"
        command = [item.replace(str(case.world.data), str(data)) for item in case.world.train(out)]
        ended = case.type(*command)
        assert ended.code == 2 and "row 1" in ended.line and "Jane" not in ended.err, ended.err
