"""The examples: each passes when it is correct, and each mistake planted by flag is found.

Seeds are fixed. A correct example is tested at level 1e-6, which bounds the false alarms of this file.
"""

import ast
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpaudit.cli import app
from dpaudit.documents import AuditDocument

EXAMPLES = Path(__file__).parents[2] / "examples"
DPAUDIT = Path(sys.executable).parent / "dpaudit"


@pytest.fixture(autouse=True)
def path_as_before() -> Iterator[None]:
    """An example's folder goes first on sys.path, as for a user who works in it; other tests must not see it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


# Lines of glue beside the loop, without comments, blank lines and imports of the loop itself.
GLUE = {"opacus_digits": 10, "sft_lora": 12, "llava_trainer": 12, "by_hand": 10, "jax_digits": 12}
LOOPS = ["opacus_digits", "by_hand", "sft_lora"]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`loop(example, bug)` -> its factory, the modules of the example's folder imported anew."""
    held = set(sys.modules)

    def load(example: str, bug: str = "none", **environment: str) -> Any:
        monkeypatch.chdir(EXAMPLES / example)
        monkeypatch.syspath_prepend(str(EXAMPLES / example))
        monkeypatch.setenv("BUG", bug)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return importlib.import_module("audited").factory

    yield load
    for name in set(sys.modules) - held:
        if name in ("audited", "digits", "sft", "llava"):
            del sys.modules[name]


@pytest.mark.parametrize(("example", "most"), GLUE.items())
def test_lines_of_glue(example: str, most: int) -> None:
    tree = ast.parse((EXAMPLES / example / "audited.py").read_text(encoding="utf-8"))
    lines = {line for node in tree.body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    assert len(lines) <= most
    loops = [path for path in (EXAMPLES / example).glob("*.py") if path.name != "audited.py"]
    assert loops and all("import dpaudit" not in path.read_text() for path in loops)
    assert all("from dpaudit" not in path.read_text() for path in loops)


@pytest.mark.parametrize(
    ("heading", "example"),
    [
        ("Opacus", "opacus_digits"),
        ("Hugging Face", "sft_lora"),
        ("By hand", "by_hand"),
        ("jax, numpy, torch.func", "jax_digits"),
    ],
)
def test_the_page_has_the_glue_of_the_example(loop: Any, heading: str, example: str) -> None:
    """The block of docs/under-test.md beside the example's loop makes the same claim as the example's own glue."""
    if example == "jax_digits" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    page = (EXAMPLES.parent / "docs" / "under-test.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^## {re.escape(heading)}\n\n```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    own = loop(example)(seed=0).claim
    typed: dict[str, Any] = {}
    exec(block, typed)
    assert typed["factory"](seed=0).claim == own


def spread(factory: Any, seeds: int) -> float:
    """Standard deviation of what empty steps release, over sigma * C: noise of `seeds` trainers."""
    values = []
    for seed in range(seeds):
        trainer = factory(seed=0, noise_seed=seed)
        trainer.step([])
        claim = trainer.claim
        scale = claim.expected_batch_size / (claim.noise_multiplier * claim.max_grad_norm)
        values += [scale * value.flatten() for value in trainer.released().values() if value is not None]
    return float(torch.cat(values).std())


def sums(factory: Any, batch: list[int], gradient: Any = None) -> torch.Tensor:
    """(d,) expected batch size times the release, noise seed 0."""
    trainer = factory(seed=0, noise_seed=0)
    if gradient is not None:
        trainer.inject({name: gradient[name] for name in trainer.parameters()})
    trainer.step(batch)
    released = trainer.released()
    return trainer.claim.expected_batch_size * torch.cat([released[name].flatten() for name in sorted(released)])


def direction(factory: Any, norm: float) -> dict[str, torch.Tensor]:
    """A random gradient of this norm, in C."""
    trainer = factory(seed=0, noise_seed=0)
    generator = torch.Generator().manual_seed(3)
    value = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in trainer.parameters().items()}
    size = torch.sqrt(sum(part.square().sum() for part in value.values()))
    return {name: part * (norm * trainer.claim.max_grad_norm / size) for name, part in value.items()}


@pytest.mark.parametrize("example", LOOPS)
def test_noise_and_injection_of_the_correct_loop(loop: Any, example: str) -> None:
    """Noise as claimed; frozen noise cancels; an injected gradient moves the sum by itself, clipped to C."""
    factory = loop(example)
    assert abs(spread(factory, 4) - 1) < 0.06  # at least 4 x 3,610 numbers: 6 standard errors are 0.036
    size = factory(seed=0, noise_seed=0).claim.max_grad_norm
    base = sums(factory, [0, 1])
    assert torch.equal(base, sums(factory, [0, 1])) and not torch.equal(base, sums(factory, [0, 2]))
    for norm in (100.0, 0.5):
        canary = direction(factory, norm)
        flat = torch.cat([canary[name].flatten() for name in sorted(canary)])
        moved = sums(factory, [0, 1], canary) - base
        assert float(moved.norm()) == pytest.approx(min(norm, 1.0) * size, rel=2e-4)
        assert float(moved @ flat / moved.norm() / flat.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("example", LOOPS)
def test_half_the_noise_shows(loop: Any, example: str) -> None:
    assert abs(spread(loop(example, "half-noise"), 4) - 0.5) < 0.03


@pytest.mark.parametrize("example", LOOPS)
def test_gradients_of_single_records(loop: Any, example: str) -> None:
    """What a record adds to the sum is its own gradient, clipped."""
    trainer = loop(example)(seed=0, noise_seed=0)
    factory = loop(example)
    gradient = trainer.gradient(trainer.records[5])
    flat = torch.cat([gradient[name].flatten() for name in sorted(gradient)])
    moved = sums(factory, [0, 5]) - sums(factory, [0])
    expected = flat * min(1.0, float(trainer.claim.max_grad_norm / flat.norm()))
    assert float((moved - expected).norm()) < 2e-3 * float(expected.norm())


def test_ghost_clipping_says_what_cannot_be_played(loop: Any) -> None:
    trainer = loop("opacus_digits", MODE="ghost")(seed=0)
    assert trainer.inject is None and "closes the white-box game" in trainer.unavailable["inject"]


def dpaudit(example: str, bug: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(DPAUDIT), *words],
        cwd=EXAMPLES / example,
        env={**os.environ, "BUG": bug},
        capture_output=True,
        text=True,
        timeout=500,
    )


WHITE_BOX = ("audit", "--trainer", "audited:factory", "--white-box", "--seed", "1", "--time-limit", "200")


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "code"), [("none", 0), ("half-noise", 1), ("batch-clip", 1)])
def test_opacus_loop_on_the_command_line(tmp_path: Path, bug: str, code: int) -> None:
    done = dpaudit("opacus_digits", bug, *WHITE_BOX, "--out", str(tmp_path / "a"))
    assert done.returncode == code, done.stdout + done.stderr
    written = AuditDocument.read(tmp_path / "a" / "release" / "audit.json")
    assert (written.verdict == "refuted") == (code == 1) and written.ledger[0].status == "accounted"


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "code"), [("none", 0), ("half-noise", 1)])
def test_language_model_on_the_command_line(tmp_path: Path, bug: str, code: int) -> None:
    done = dpaudit("sft_lora", bug, *WHITE_BOX, "--out", str(tmp_path / "a"))
    assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize(("bug", "wanted"), [("none", 1.0), ("half-noise", 0.5)])
def test_jax(loop: Any, bug: str, wanted: float) -> None:
    factory = loop("jax_digits", bug)
    assert abs(spread(factory, 4) - wanted) < 0.06
    canary = direction(factory, 100.0)
    assert float((sums(factory, [0, 1], canary) - sums(factory, [0, 1])).norm()) == pytest.approx(1.0, rel=2e-4)


def run_script(monkeypatch: pytest.MonkeyPatch, example: str, name: str, *words: str) -> None:
    """`python NAME WORDS` in the example's folder."""
    monkeypatch.chdir(EXAMPLES / example)
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / example / name), run_name="__main__")


@pytest.mark.parametrize("bug", ["none", "no-noise", "half-noise", "batch-clip"])
def test_score_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example's own last line is the command that is run."""
    run_script(monkeypatch, "score_file", "regression.py", str(tmp_path / "scores.csv"), "--bug", bug, "--seed", "1")
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[0] == "dpaudit"
    code = app.run([*command[1:], "--alpha", "1e-6"])
    assert code == (0 if bug == "none" else 1), capsys.readouterr().out


@pytest.mark.parametrize(
    ("example", "name", "said"),
    [
        ("opacus_digits", "digits.py", "accuracy"),
        ("by_hand", "digits.py", "accuracy"),
        ("sft_lora", "sft.py", "30 steps"),
    ],
)
def test_scripts_train_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: str, name: str, said: str
) -> None:
    run_script(monkeypatch, example, name)
    assert said in capsys.readouterr().out
