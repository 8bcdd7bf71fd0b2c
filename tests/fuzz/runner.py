"""A case is laid out in an empty folder and run in a fork; what came of it is judged by rules that hold for any."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from dpaudit import checksums
from tests.faults import harness
from tests.faults.hostile_files import handed_over
from tests.faults.scenarios import WITH_CANARIES, World
from tests.fuzz.grammar import Case

SECONDS = 60  # of processor time that any case may take, whatever else the machine does
WAITING = 600  # seconds on the clock after which a case hangs
MEMORY = 12 << 30  # bytes of address space; the libraries alone take a tenth of it
MOST, MOST_HANDED = 3 << 30, 2 << 30  # bytes of memory that a case may really use
ALSO_WARM = (
    "dpaudit.analysis.scores", "dpaudit.analysis.plan", "dpaudit.cli.scores", "dpaudit.cli.bound", "dpaudit.cli.plan",
    "dpaudit.cli.check", "dpaudit.cli.sweep", "dpaudit.bounds.calculator", "reports.sweep.grid", "attacks.contract",
)  # fmt: skip


class Runner:
    """Lays out and runs cases; one at a time."""

    def __init__(self, root: Path) -> None:
        import importlib

        harness.warm_up()
        for name in ALSO_WARM:
            importlib.import_module(name)
        self.root = root
        self.world = World.make(root)
        self.whole = self.world.finished("fuzzed", *WITH_CANARIES)
        self.sound = handed_over(root / "sound")
        audited = harness.run(["audit", str(self.whole), "--canaries"], [self.whole], root)
        assert audited.code == 0, audited.err
        self.key = root / "key"
        for words in (["keygen", str(self.key)], ["sign", str(self.whole), "--key", str(self.key)]):
            signed = harness.run(words, [self.whole, self.key, root / "key.pub"], root)
            assert signed.code == 0, signed.err

    def play(self, case: Case) -> str | None:
        """Run a case; None, or in one line what was wrong."""
        return self.play_and_tell(case)[0]

    def play_and_tell(self, case: Case) -> tuple[str | None, int]:
        """What was wrong, if anything, and the exit code."""
        place = self.world.place("fuzz")
        (place / "tmp").mkdir()
        for name, content in case.files:
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if case.damage:
            shutil.copytree(self.whole, place / "run")
            for name, how, where in case.damage:
                damage(place / "run", name, how, where)
        if case.handed is not None:
            shutil.copytree(self.sound, place, dirs_exist_ok=True)
            for name, how, where in case.handed:
                damage(place, name, how, where)
        named = {"{run}": str(place / "run"), "{key}": str(self.key)}
        arguments = [item.replace("{run}", named["{run}"]).replace("{key}", named["{key}"]) for item in case.arguments]

        def prepare() -> None:
            os.chdir(place)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # one case must not take the machine with it
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            tempfile.tempdir = str(place / "tmp")
            sys.dont_write_bytecode = True

        ended = harness.run(arguments, [place], self.root, prepare=prepare, timeout=WAITING)
        return judge(case, ended), ended.code


def judge(case: Case, ended: harness.Ended) -> str | None:
    """The rules: an allowed exit code, no traceback, one line an error, one document for --json, nothing outside."""
    if ended.code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"took longer than {SECONDS} s of processor time"
    if ended.code == -signal.SIGALRM:
        return f"hung for {WAITING} s"
    if "Traceback (most recent call last)" in ended.err or "Traceback (most recent call last)" in ended.out:
        return f"a traceback: {ended.line[:200]}"
    if ended.code not in (0, 1, 2, 3, 4):
        return f"exit code {ended.code}: {ended.line[:200]}"
    if ended.memory > (MOST if case.handed is None else MOST_HANDED):
        return f"took {ended.memory / 1e9:.1f} GB"
    if ended.foreign:
        return f"wrote outside: {ended.foreign[0]}"
    told = [line for line in ended.err.splitlines() if line.startswith("dpaudit: ")]
    if ended.code == 2 and (len(told) != 1 or ended.line != told[0]):
        return f"{len(told)} lines for an error: {ended.err[-300:]!r}"
    if any(len(line) > 2000 for line in told):
        return f"a message of {max(map(len, told))} characters"
    if "--json" in case.arguments and ended.code in (0, 1, 3) and "-h" not in case.arguments:
        try:
            json.loads(ended.out)
        except ValueError:
            return f"--json printed no document: {ended.out[:100]!r}"
    return None


def damage(run: Path, name: str, how: str, where: int) -> None:
    """Damage one file of a run; GAME is its first game, LAST its last checkpoint."""
    if name.endswith(("/GAME", "/LAST")):
        found = sorted((run / name).parent.glob("*"))
        name = f"{Path(name).parent}/{found[0 if name.endswith('GAME') else -1].name}" if found else name
    path = run / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 28:
        return  # damaged before: nothing is written through a link, no holes are read
    content = path.read_bytes()
    at = where % max(1, len(content))
    match how:
        case "flip" if content:
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << where % 8)]) + content[at + 1 :])
        case "half":
            path.write_bytes(content[:at])
        case "empty":
            path.write_bytes(b"")
        case "remove" | "folder" | "link":
            path.unlink()
            if how == "folder":
                path.mkdir()
            if how == "link":
                path.symlink_to(("/dev/zero", "/etc/passwd", path.name, "nowhere")[where % 4])
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "sparse":
            path.write_bytes(b"")
            os.truncate(path, 20 << 30)
        case "deep":
            path.write_bytes((b"[", b'{"a":')[where % 2] * 100_000)
        case "key":
            _change_a_key(path, content, where)
        case "names" | "header":
            _bend_a_header(path, content, how, where)
        case "number" | "null" | "rubbish":
            path.write_bytes({"number": b"7", "null": b"null", "rubbish": bytes(range(256)) * 8}[how])
        case "sealed":
            _reseal(run, path, content, where)
        case "mode":
            path.chmod(0)
        case "extra":
            _plant(path, content, where)
        case "moved" if path.parent != run and not path.parent.is_symlink():
            moved = path.parent.with_name(f"moved-{path.parent.name}")
            if not os.path.lexists(moved):
                path.parent.rename(moved)
                path.parent.symlink_to(moved)
        case "twice" if not os.path.lexists(run / f"other-{where}"):
            (run / f"other-{where}").hardlink_to(path)


ODD_VALUES = (
    None, -1, 0, 1, 1e308, 10**9, 10**30, "x" * 50, "", [], {}, "inf", True, "<b>&\u202e", "somebody/else", "../..",
    "(a+)+$", [0], {"a": 1}, float("nan"), "eval", "/dev/zero", 2, 3, 0.5, -(10**6), [[1]], "q_proj", ["q_proj"],
)  # fmt: skip
ODD_KEYS = (
    "quantization_config", "auto_map", "attn_implementation", "adapters", "megatron_config", "use_timm_backbone",
    "custom_generate", "rank_pattern", "modules_to_save", "layer_types", "num_hidden_layers", "padding", "truncation",
    "rope_parameters", "use_dora", "dtype", "head_dim", "sliding_window", "image_size", "model_type", "vision_config",
)  # fmt: skip


# Names that a folder may hold and that a page, a terminal or a shell might take for something else.
PLANTED = (
    "\x1b[2Jverdict: not refuted", "\u202elmth.txt", "a\nverdict not refuted", "x" * 250, "-rf", "02-canaries.json",
    ".SHA256SUMS.next", "audit.json.dpaudit-tmp", ".audit.json.0000.dpaudit-tmp", "<img src=x onerror=alert(1)>",
    "lock", "noise.key", "model.safetensors", "adapter_model.bin", "signature.json", "gallery.json",
    "step-99.safetensors", "999999999999999999999-x.json", "\udcff\udcfe",
)  # fmt: skip


def _plant(path: Path, content: bytes, where: int) -> None:
    """A file that nobody asked for, beside `path`, with its content, nothing, or rubbish; a link or a pipe."""
    planted = path.parent / PLANTED[where % len(PLANTED)]
    if os.path.lexists(planted):
        return
    match where // 19 % 5:
        case 0:
            planted.write_bytes(content)
        case 1:
            planted.write_bytes(b"")
        case 2:
            planted.write_bytes(bytes(range(256)) * 8)
        case 3:
            planted.symlink_to("/etc/passwd")
        case 4:
            os.mkfifo(planted)


def _change_a_key(path: Path, content: bytes, where: int) -> None:
    """Change, add or remove one value of a JSON file."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # an earlier damage left no tree
        return
    leaves = _leaves(tree)
    if not leaves or not isinstance(tree, dict):
        return
    node, key = leaves[where % len(leaves)]
    value = ODD_VALUES[where // 13 % len(ODD_VALUES)]
    match where // 7 % 5:
        case 0:
            tree[ODD_KEYS[where // 3 % len(ODD_KEYS)]] = value
        case 1 if isinstance(node, dict):
            del node[key]
        case _:
            node[key] = value
    path.write_text(json.dumps(tree))


def _bend_a_header(path: Path, content: bytes, how: str, where: int) -> None:
    """The JSON in front of the tensors of a safetensors file; the beginning of any other."""
    size = int.from_bytes(content[:8], "little")
    if path.suffix != ".safetensors" or how == "header":
        at = where % max(1, min(len(content), size + 8))
        path.write_bytes(content[:at] + bytes([where % 256]) + content[at + 1 :])
        return
    tree = json.loads(content[8 : 8 + size])
    names = sorted(tree)
    name = names[where % len(names)]
    tree[(name + "x", name.replace("lora_A", "lora_B"), "", "base_model.model." + name)[where // 11 % 4]] = tree.pop(
        name
    )
    header = json.dumps(tree).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a tree, the first 5,000."""
    found: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            if len(found) < 5000:
                found.append((node, key))
                walk(node[key])

    walk(tree)
    return found


def _reseal(run: Path, path: Path, content: bytes, where: int) -> None:
    """Change one value of a JSON document and mend every checksum: what somebody who can edit a release could do."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # an earlier damage left no tree
        return
    leaves = _leaves(tree)
    if not leaves:
        return
    node, key = leaves[where % len(leaves)]
    node[key] = (None, -1, 1e308, "x" * 50, [], {}, "inf", True, 10**30, "<b>&\u202e")[where // 7 % 10]
    if isinstance(tree, dict) and "sha256" in tree and isinstance(tree["sha256"], str):
        tree["sha256"] = checksums.seal(tree)
    path.write_text(json.dumps(tree))
    sums = checksums.read(run / "release" / checksums.SUMS)
    if path.name in sums:
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (run / "release" / checksums.SUMS).write_text(checksums.write(sums))
