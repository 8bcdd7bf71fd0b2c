"""Token paths of the benchmark: put into their row of the truth table, and reported as wrong when they are not.

Isolation itself has tests of its own (tests/attacks/test_fusion_isolation.py); here it is handed in.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from attacks.bugs import paths
from attacks.bugs.benchmark import document
from attacks.bugs.paths import OURS, PATHS, run_path
from attacks.bugs.token_path import PLANTS, plant
from attacks.fusion import verdicts
from attacks.fusion.isolation import REPLAY, Isolation
from dpaudit.cli.bugs import describe
from dpaudit.documents import Check, Leak
from tests.attacks.fusion_paths import token_path
from tests.tiny import save_tiny_llava

PASSED = Isolation((Check(name=REPLAY, status="pass", measured="0", allowed="0", explanation=""),), None)
LEAKS = Isolation(
    (Check(name=REPLAY, status="fail", measured="0.2", allowed="0", explanation=""),),
    Leak(
        stage="fusion",
        observable="fused tokens",
        changed=0,
        moved=1,
        size=0.2,
        largest_gradient_change=0.1,
        how="white",
    ),
)
Found = Callable[[Isolation], None]


@pytest.fixture
def found(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Found:
    """The tiny random model instead of the reference model, and what isolation finds on it."""
    folder = save_tiny_llava(tmp_path_factory.mktemp("tiny"))
    monkeypatch.setattr(paths, "own_path", lambda reducer, *, seed=0: token_path(folder, reducer))
    return lambda isolation: monkeypatch.setattr(paths, "audit_isolation", lambda *_, **__: isolation)


def test_content_seeded_noise_voids_the_release_and_leaves_training(found: Found) -> None:
    found(PASSED)
    row = run_path(plant("noise-seeded-by-content"))
    assert row.as_planted and row.stage is None and row.training == "per-example preprocessing"
    assert row.failed == ("fusion noise not seeded by content", "fusion noise from the secret key")
    assert {verdicts.NOISE_SHARED, verdicts.OWN} < set(row.cases) and verdicts.SHARED not in row.cases


def test_a_leak_is_unaccounted_and_named(found: Found) -> None:
    found(LEAKS)
    row = run_path(plant("batch-merged"))
    assert row.as_planted and (row.stage, row.training) == ("fusion", "UNACCOUNTED")
    assert row.moved == "fused tokens by 0.2 of its size (white)"
    assert verdicts.SHARED in row.cases and verdicts.OWN not in row.cases
    # Another stage than the planted one, or a leak of a correct path, is no success.
    assert not run_path(plant("batch-centres")).as_planted
    assert not run_path(OURS[0]).as_planted


def test_a_bug_that_slips_through_is_no_success(found: Found) -> None:
    """The correct path under the name of a plant: nothing to find, and the table says that it was not found."""
    found(PASSED)
    row = run_path(replace(plant("noise-without-key"), apply=lambda path: path))
    assert not row.as_planted and not row.failed
    lines = describe(document((), token_paths=[row]))
    assert lines[-1] == "0 of 1 put into their row of the truth table; wrong: noise-without-key."
    assert "passes" in lines[1]


def test_the_list_holds_every_plant_and_every_reducer() -> None:
    assert [row.name for row in PATHS] == [item.name for item in PLANTS] + [item.name for item in OURS]
    assert {"ours: none", "ours: visionzip", "ours: divprune"} <= {item.name for item in OURS}
