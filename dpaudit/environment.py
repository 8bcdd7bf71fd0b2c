"""This machine: what a release may say about it, and what `dpaudit doctor` finds broken.

The environment document names versions and the kind of device, never a host, a user or a path.
"""

import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpaudit import __version__, extras, untrusted
from dpaudit.documents import Check, DoctorDocument, EnvironmentDocument, GradientPathName

# What results depend on; versions of the rest don't matter to a reader.
REPORTED = (
    "torch", "transformers", "peft", "opacus", "dp-accounting", "accelerate", "numpy", "scipy", "pandas", "pyarrow",
    "pillow", "scikit-learn", "safetensors", "tokenizers", "cryptography", "lmms-eval", "datasets", "torchvision",
)  # fmt: skip
LEAST_DISK = 2.0  # GiB: the demo's three runs with checkpoints take well under one
LEAST_MEMORY = 2.0  # GiB: torch, transformers and the reference model in training

# Run in a process of its own: a broken torchvision or a missing library may take the interpreter down with it.
_PROBE = """
import importlib, json
found = {"errors": {}}
try:
    import torch
    found["torch"] = torch.__version__
    found["device"] = "cpu"
    if torch.cuda.is_available():
        found["device"] = "cuda (" + torch.cuda.get_device_name(0) + ")"
    elif torch.backends.mps.is_available():
        found["device"] = "mps"
    found["cuda_build"] = torch.version.cuda
except BaseException as error:
    found["errors"]["torch"] = repr(error)
for name in ("torchvision", "transformers.models.llava.modeling_llava", "peft", "opacus"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        found["errors"][name] = "missing" if error.name == name.partition(".")[0] else repr(error)
    except BaseException as error:
        found["errors"][name] = repr(error)
print("DPAUDIT" + json.dumps(found))
"""


def versions(names: Sequence[str] = REPORTED) -> dict[str, str]:
    """Versions of the installed ones among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def public_command(arguments: Sequence[str]) -> str:
    """The command line with every path that leads elsewhere (/…, ~…, ../…) cut to its last part: paths name people.

    Paths below the working directory and hub ids (`org/model`) stay as they are.
    """
    return " ".join(["dpaudit", *(_cut(argument) for argument in arguments)])


def _cut(argument: str) -> str:
    from dpaudit.config import public_path  # brings yaml, which is not in the core

    field, equals, value = argument.rpartition("=")
    return field + equals + ",".join(public_path(piece) or "" for piece in value.split(","))


def describe(
    device: str = "cpu",
    arguments: Sequence[str] | None = None,
    gradient_paths: Sequence[GradientPathName] | None = None,
) -> EnvironmentDocument:
    """The environment document of this machine. device: where the model ran; arguments: of the command line;
    gradient_paths: those of the training, None where that is not known."""
    return EnvironmentDocument(
        dpaudit=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=device,
        packages=versions(),
        command=public_command(arguments) if arguments is not None else None,
        gradient_paths=None if gradient_paths is None else tuple(gradient_paths),
    )


def examine(folder: Path) -> DoctorDocument:
    """Look at everything that dpaudit needs; takes the seconds that importing torch and transformers takes.

    folder: where runs would be written. Never raises for a broken machine: that is a failed check.
    """
    requirements = importlib.metadata.requires("dpaudit") or []
    core_only = versions(("torch",)) == {}
    probe = {} if core_only else _probe()
    checks = (
        check_python(sys.version_info[:2]),
        *check_packages(requirements),
        *((check_core_only(),) if core_only else _beyond_the_core(probe, requirements)),
        check_folder(folder),
        check_disk(shutil.disk_usage(_existing(folder)).free / 2**30),
        check_memory(_memory_gib()),
        check_chromium(shutil.which),
    )
    return DoctorDocument(healthy=all(check.status != "fail" for check in checks), checks=checks)


def check_core_only() -> Check:
    """Bounds, scores, plans and the Python door work; nothing else was installed, which is no defect."""
    return _check(
        "extras",
        None,
        "the core alone: no torch",
        "optional",
        "Training, audits, the step contract and reports need: pip install 'dpaudit[train]'",
    )


def _beyond_the_core(probe: dict[str, Any], requirements: Sequence[str]) -> tuple[Check, ...]:
    return (
        *check_packages(requirements, extra="train"),
        check_torch(probe),
        check_torchvision(probe),
        check_imports(probe),
        check_lmms_eval(versions(("lmms-eval",)).get("lmms-eval"), requirements),
        check_base(Path(str(importlib.resources.files("trainers"))) / "public" / "base"),
    )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _check(name: str, good: bool | None, measured: str, allowed: str, explanation: str) -> Check:
    status = "not applicable" if good is None else "pass" if good else "fail"
    return Check.model_validate(
        {
            "name": name,
            "status": status,
            "measured": " ".join(measured.split())[:300],
            "allowed": allowed,
            "explanation": explanation,
        }
    )


def _probe() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROBE], capture_output=True, text=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"errors": {"torch": repr(error)}}
    for line in done.stdout.splitlines():
        if line.startswith("DPAUDIT"):
            found: dict[str, Any] = json.loads(line.removeprefix("DPAUDIT"))
            return found
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"errors": {"torch": f"Python stopped while importing ({last})"}}


def check_python(version: tuple[int, int]) -> Check:
    """Python 3.11 or 3.12."""
    return _check(
        "python",
        version in ((3, 11), (3, 12)),
        ".".join(map(str, version)),
        "3.11 or 3.12",
        "Make the environment with another Python: python3.12 -m venv .venv",
    )


def check_packages(requirements: Sequence[str], extra: str = "") -> tuple[Check, ...]:
    """Every requirement of dpaudit itself, or of one of its extras, at a version in its range; one check for all.

    The ranges are those of the installed package's metadata, so they are stated once, in pyproject.toml.
    """
    broken: list[str] = []
    wanted: list[str] = []
    count = 0
    for name, specifier in _ranges(requirements, extra=extra):
        count += 1
        installed = versions((name,)).get(name)
        if installed is None or not _inside(installed, specifier):
            broken.append(f"{name} {installed or 'missing'}")
            wanted.append(f"'{name}{specifier}'")
    return (
        _check(
            "packages" if not extra else f"extra {extra}",
            not broken,
            ", ".join(broken) or f"{count} packages in range",
            "every package in the tested range",
            "pip install " + " ".join(wanted) if broken else "All that dpaudit imports is there.",
        ),
    )


def _ranges(requirements: Sequence[str], extra: str) -> list[tuple[str, str]]:
    from packaging.requirements import Requirement

    found = []
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if extra and (marker is None or "extra" not in str(marker)):
            continue
        if marker is None or marker.evaluate({"extra": extra}):
            found.append((requirement.name, str(requirement.specifier)))
    return found


def _inside(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def check_torch(probe: dict[str, Any]) -> Check:
    """torch imports; which device it sees."""
    error = probe["errors"].get("torch")
    measured = f"torch {probe.get('torch')} on {probe.get('device')}" if error is None else error
    return _check("torch", error is None, measured, "imports", "pip install --force-reinstall torch")


def check_torchvision(probe: dict[str, Any]) -> Check:
    """torchvision is not needed, but one of another build than torch breaks transformers and peft."""
    error = probe["errors"].get("torchvision")
    if error == "missing":
        return _check("torchvision", True, "not installed", "absent, or it loads", "It is not needed.")
    return _check(
        "torchvision",
        error is None,
        "loads" if error is None else error,
        "absent, or it loads",
        "Its build does not match torch's and it breaks transformers and peft: pip uninstall -y torchvision",
    )


def check_imports(probe: dict[str, Any]) -> Check:
    """LLaVA in transformers, peft and opacus import."""
    names = {"transformers.models.llava.modeling_llava": "transformers", "peft": "peft", "opacus": "opacus"}
    broken = {short: probe["errors"][name] for name, short in names.items() if name in probe["errors"]}
    return _check(
        "imports",
        not broken and "torch" not in probe["errors"],
        "; ".join(f"{name}: {error}" for name, error in broken.items()) or "transformers, peft, opacus",
        "transformers (LLaVA), peft and opacus import",
        "pip install --force-reinstall " + (" ".join(broken) or "transformers peft opacus")
        if broken
        else "They load together with this torch.",
    )


def check_lmms_eval(version: str | None, requirements: Sequence[str]) -> Check:
    """lmms-eval in the tested range, with what it really needs."""
    specifier = dict(_ranges(requirements, extra="lmms")).get("lmms-eval", ">=0.7.3,<0.8")
    missing = [name for name, _ in _ranges(requirements, extra="benchmark") if name not in versions((name,))]
    if version is None:
        measured = "not installed"
    elif missing:
        measured = f"{version}, but its needs are missing: {', '.join(missing)}"
    else:
        measured = version
    return _check(
        "lmms-eval",
        version is not None and not missing and _inside(version, specifier),
        measured,
        f"lmms-eval{specifier} with the benchmark extra",
        f"dpaudit benchmark and demo need it: {extras.LMMS_EVAL} (without --no-deps it breaks torch on CPU machines)",
    )


def check_base(folder: Path) -> Check:
    """The public base checkpoint of the reference model is in the package and readable."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    broken = []
    for file in files:
        try:
            untrusted.tensor_shapes(file)
        except (OSError, ValueError):
            broken.append(file.name)
    good = bool(files) and not broken
    measured = "missing" if not files else f"damaged: {', '.join(broken)}" if broken else f"{len(files)} file(s)"
    return _check("base model", good, measured, "readable safetensors", "pip install --force-reinstall dpaudit")


def check_folder(folder: Path) -> Check:
    """Runs can be written here."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            error = None
    except OSError as failed:
        error = failed.strerror or str(failed)
    return _check(
        "folder", error is None, error or "writable", "writable", f"Choose another --out, or: chmod u+w {place}"
    )


def check_disk(gib: float) -> Check:
    """Room for runs and checkpoints."""
    return _check(
        "disk", gib >= LEAST_DISK, f"{gib:.1f} GiB free", f"at least {LEAST_DISK:g} GiB", "Free space: df -h ."
    )


def check_memory(gib: float | None) -> Check:
    """Room for torch, transformers and the reference model."""
    return _check(
        "memory",
        None if gib is None else gib >= LEAST_MEMORY,
        "not known" if gib is None else f"{gib:.1f} GiB available",
        f"at least {LEAST_MEMORY:g} GiB",
        "Close other programs, or train with training.memory=1",
    )


def _memory_gib() -> float | None:
    """Memory that a new process could take: of the machine, or of the container if that is less."""
    try:
        if sys.platform == "linux":
            fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            available = float(fields["MemAvailable"].split()[0]) * 1024
        else:  # no portable figure for what is free: the machine's memory
            available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, float(limit) - float(used))
    except (OSError, ValueError):
        pass
    return available / 2**30


def check_chromium(which: Callable[[str], str | None]) -> Check:
    """Only the report's own tests need a browser; never a failure."""
    found = next((name for name in ("chromium", "chromium-browser", "google-chrome") if which(name)), None)
    return _check(
        "chromium",
        True if found else None,
        found or "not installed",
        "optional",
        "Only the tests of the report need it: apt-get install chromium",
    )
