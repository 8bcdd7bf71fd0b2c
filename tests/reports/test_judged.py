"""The judge takes no level, claim or ledger from a document that its games contradict."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpaudit.documents import GameDocument
from dpaudit.errors import UsageError
from reports.inputs import RunReport, load_runs
from tests.reports import fixtures


def played(**changes: object) -> list[GameDocument]:
    """The games of the fixture with every deciding test changed."""
    found = []
    for game in fixtures.games("dp-sgd"):
        tests = [test.model_copy(update=changes) if test.p_value is not None else test for test in game.tests]
        found.append(game.model_copy(update={"tests": tuple(tests)}))
    return found


REFUTING = {"e_value": 1e6, "p_value": 1e-9, "share": 0.9}
POWERED = {
    "power": 0.99,
    "power_low": 0.95,
    "power_high": 1.0,
    "control": "a planted leak",
    "p_value": 0.5,
    "e_value": 0.5,
}


def write(place: Path, games: Sequence[GameDocument]) -> Path:
    run = fixtures.write_run(place, "dp-sgd", with_benchmark=False)
    fixtures.write_audit(run, "dp-sgd", games)
    return run


def edit(run: Path, name: str, **changes: object) -> None:
    path = run / "release" / name
    tree: dict[str, Any] = json.loads(path.read_text())
    tree.update(changes)
    path.write_text(json.dumps(tree))


def claim(run: Path, **changes: object) -> None:
    """The same edited claim wherever it is stated."""
    tree = json.loads((run / "release" / "claim.json").read_text())["claim"] | changes
    edit(run, "claim.json", claim=tree)
    edit(run, "audit.json", claim=tree)


def load(run: Path) -> RunReport:
    return load_runs([run])[0]


@pytest.mark.parametrize("alpha", [1e-12, 1e-300])
def test_a_level_in_audit_json_hides_no_refutation(tmp_path: Path, alpha: float) -> None:
    run = write(tmp_path, played(**REFUTING))
    assert load(run).verdict == "refuted"
    edit(run, "audit.json", alpha=alpha, verdict="inconclusive")
    found = load(run)
    assert found.verdict == "refuted" and any("its games were played at 0.001" in notice for notice in found.notices)


def test_a_level_of_the_games_that_hides_evidence_is_told(tmp_path: Path) -> None:
    run = write(tmp_path, [game.model_copy(update={"alpha": 1e-30}) for game in played(**REFUTING)])
    assert any("refutes the claim at the usual alpha = 0.001" in notice for notice in load(run).notices)


def test_a_confidence_that_the_bounds_do_not_have_is_told(tmp_path: Path) -> None:
    run = write(tmp_path, played())
    before = load(run)
    assert not any("confidence" in notice for notice in before.notices), before.notices
    edit(run, "audit.json", family_confidence=0.9999999)
    found = load(run)
    assert found.verdict == before.verdict and any("states a confidence of 1" in notice for notice in found.notices)


@pytest.mark.parametrize("removed", [(), ("ledger.json",), ("ledger.json", "config.yaml"), ("config.yaml",)])
def test_a_smaller_eps_is_priced_with_or_without_its_ledger(tmp_path: Path, removed: tuple[str, ...]) -> None:
    run = write(tmp_path, [game.model_copy(update={"claim": fixtures.claim(2.0)}) for game in played(**POWERED)])
    claim(run, epsilon=2.0, curve=[])
    for name in removed:
        (run / "release" / name).unlink()
    assert load(run).verdict == "unsupported"


def test_nothing_is_supported_without_a_ledger(tmp_path: Path) -> None:
    run = write(tmp_path, played(**POWERED))
    assert load(run).verdict == "not refuted"
    (run / "release" / "ledger.json").unlink()
    found = load(run)
    assert found.verdict == "unsupported" and "has no ledger" in " ".join(found.audit.reasons if found.audit else ())


@pytest.mark.parametrize(
    "changes",
    [{"mechanism": "correlated"}, {"noise_multiplier": None}, {"noise_multiplier": "inf"}, {"noise_multiplier": -2.0},
     {"sample_rate": None}, {"sample_rate": 0.0}, {"sample_rate": 5.0}, {"sample_rate": 0.02},
     {"token_multiplier": 1e-9}, {"steps": None}, {"steps": 0}, {"sampling": None}],
    ids=str,
)  # fmt: skip
def test_what_has_no_price_is_unsupported(tmp_path: Path, changes: dict[str, object]) -> None:
    run = write(tmp_path, played(**POWERED))
    claim(run, curve=[], **changes)
    found = load(run)
    assert found.verdict == "unsupported" and found.notices


@pytest.mark.parametrize("removed", [(), ("config.yaml",)])
def test_a_claim_taken_out_is_a_contradiction(tmp_path: Path, removed: tuple[str, ...]) -> None:
    run = write(tmp_path, played(**POWERED))
    edit(run, "claim.json", claim=None)
    edit(run, "audit.json", claim=None, verdict="no claim")
    for name in removed:
        (run / "release" / name).unlink()
    found = load(run)
    assert found.verdict == "unsupported" and any("states no claim" in notice for notice in found.notices)


def test_a_long_curve_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path, played())
    claim(run, curve=[{"delta": 1e-5 + 1e-9 * at, "epsilon": 8.0} for at in range(3000)])
    with pytest.raises(UsageError, match=r"curve: .*at most 64"):
        load(run)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 10**12}, {"steps": 10**8}, {"sample_rate": 1e-300}, {"sample_rate": 5.0},
     {"noise_multiplier": 1e300}, {"noise_multiplier": 1e-300}, {"epsilon": 1e300}],
    ids=str,
)  # fmt: skip
def test_a_page_is_made_of_any_figures(tmp_path: Path, changes: dict[str, object]) -> None:
    """A page that calls it unsupported, but for more noise than the claim needs: never a traceback."""
    from reports.html import render
    from reports.subjects import load_page

    run = write(tmp_path, played(**POWERED))
    claim(run, curve=[], **changes)
    page = load_page([run])
    expected = "not refuted" if changes == {"noise_multiplier": 1e300} else "unsupported"
    assert page.runs[0].verdict == expected
    assert expected in render(page, title="x")[0]


@pytest.mark.parametrize("value", ["9" * 400, "1e308", "-1e308", "NaN", "Infinity"])
def test_a_training_curve_beyond_any_figure_is_refused(tmp_path: Path, value: str) -> None:
    run = write(tmp_path, played())
    (run / "private").mkdir(mode=0o700)
    lines = [f'{{"step": {step}, "loss": {value}}}' for step in (1, 2)] + [f'{{"step": {"9" * 400}, "loss": 1}}']
    (run / "private" / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"metrics\.jsonl: row 1: "):
        load_runs([run], include_private=True)
