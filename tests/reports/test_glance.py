"""The first screen: what each run is said to promise, what was tested, and what to do, from its documents alone."""

import html
import re
import shlex
from pathlib import Path

import pytest

from dpaudit import accounting
from dpaudit.cli import app
from dpaudit.documents import Claim, ClaimDocument, GameDocument, LedgerDocument, Test, Validity
from dpaudit.ledger import tuning_row
from reports import allowed
from reports.glance import Glance, glances, headlines, tier
from reports.meaning import meanings
from reports.subjects import load_page
from tests.reports.fixtures import (
    canary_game,
    check_document,
    claim,
    claim_test,
    token_game,
    white_box_game,
    write_audit,
    write_run,
    write_three,
)
from tests.reports.sweep.fakes import write_sweep


def glance_of(path: Path) -> Glance:
    return glances(load_page([path]).runs, None)[0]


def twin_with_bound(bound: float) -> GameDocument:
    """A white-box game that also has a bound which assumes nothing."""
    game = white_box_game()
    plain = claim_test(assumes="none", bound="steinke", epsilon_lower=bound, ceiling=4.87, p_value=None, e_value=None)
    return game.model_copy(update={"tests": (*game.tests, plain)})


def test_bounds_of_a_twin_never_stand_for_the_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), twin_with_bound(1.69)])
    loaded = load_page([run]).runs[0]
    found: dict[str, Test] = headlines(loaded)
    assert {about: test.epsilon_lower for about, test in found.items()} == {"weights": 0.0, "procedure": 1.69}
    drawing = str(glance_of(run).drawing)
    assert "Released weights, no assumption at least 0, could show up to 3.66" in drawing
    assert "Retrained twin, no assumption at least 1.69, could show up to 4.87" in drawing
    assert "Within claimed mechanism (twin) at least 7.7" in drawing and "Claim: at most 8" in drawing


@pytest.mark.parametrize("verdict", ["refuted", "unsupported", "invalid", "inconclusive", "not refuted", None])
def test_every_verdict_has_a_conclusion_and_one_thing_to_do(tmp_path: Path, verdict: str | None) -> None:
    run = write_run(tmp_path, "dp-sgd", name="my run", with_audit=verdict is not None)
    own = canary_game("dp-sgd")
    if verdict == "refuted":
        write_audit(run, "dp-sgd", [own, white_box_game(e_value=1e9, power=None)])
    elif verdict == "not refuted":
        write_audit(run, "dp-sgd", [own, white_box_game()])
    elif verdict == "invalid":
        write_audit(run, "dp-sgd", [own.model_copy(update={"validity": Validity(sound=False, checks=())})])
    elif verdict == "unsupported":
        path = run / "release" / "ledger.json"
        ledger = LedgerDocument.read(path)
        path.write_text(ledger.model_copy(update={"rows": (*ledger.rows, tuning_row(5))}).to_json())
    found = glance_of(run)
    assert found.run.verdict == verdict and found.todo is not None
    command, why = found.todo
    wanted = {
        "refuted": "dpaudit audit 'my run' --contract",
        "inconclusive": "dpaudit audit 'my run' --white-box",
        "not refuted": "dpaudit audit 'my run' --contract",
        None: "dpaudit audit 'my run'",
    }
    assert command == wanted.get(verdict, "") and why
    assert ("hyper-parameter tuning" in why) == (verdict == "unsupported")
    said = " ".join((found.lead, *found.conclude))
    assert {
        "refuted": "Do not rely on eps = 8. A correct claim is refuted like this in at most 1 of 1,000 audits.",
        "unsupported": "Do not rely on the claim",
        "invalid": "Nothing, for or against",
        "inconclusive": "Treat the claim as untested.",
        "not refuted": "Not a proof. As far as this test can tell",
        None: "Not audited",
    }[verdict] in said
    assert ("released weights leak no more than eps" in said) == (verdict == "not refuted")


def test_power_is_named_with_what_earned_it_and_repeats_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    again = white_box_game(number=3).model_copy(update={"coins_sha256": "ef" * 32})
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game(), again])
    tested = glance_of(run).tested
    assert tested == (
        "The released weights (this model), canaries game: could not have shown a wrong claim "
        "(no control earned it any power).",
        "A retrained twin (the same training, run again by this audit), white-box game, "
        "2 times: 97 % sure to refute if the true sigma is 10 % smaller than claimed "
        "(control: liveness).",
    )
    supplied = white_box_game().model_copy(update={"supplied": True})
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), supplied])
    assert "(supplied, not trained by this audit)" in glance_of(run).tested[1]


@pytest.mark.parametrize(
    ("unit", "person"),
    [
        ("image (with all its questions)", False),
        ("patient (column 'patient')", True),
        ("patient_id (column 'patient_id')", True),
        ("image of a person", False),
        ("hospital patient", True),
        ("person image", False),
        ("record", False),
        ("personal note", False),
    ],
)
def test_a_unit_that_is_no_person_says_so(tmp_path: Path, unit: str, person: bool) -> None:
    other = claim().model_copy(update={"unit": unit})
    assert allowed.is_person(other) == person
    run = write_run(tmp_path, "dp-sgd", with_audit=False)
    (run / "release" / "claim.json").write_text(ClaimDocument(claim=other).to_json())
    found = glance_of(run)
    if not person:
        assert "not each person (or patient)" in found.protects[0] and "Two" in found.protects[1]
        assert found.ask[0].endswith("s per person?")
    else:
        assert found.protects == (f"Each {unit}, with everything that person contributed.",)
        assert not any("per person" in question for question in found.ask)


def test_strength_has_the_published_tiers_and_rounds_against_the_claim() -> None:
    assert [tier(eps).split()[0] for eps in (0.5, 1.0, 8.0, 10.0, 10.1)] == [
        "Strong",
        "Strong",
        "Moderate",
        "Moderate",
        "Weak",
    ]


def test_rates_of_the_claim_bound_those_of_the_evidence(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game()])
    (meant,) = meanings(load_page([run]).runs)
    by_source = {reading.source.partition(" (")[0]: reading for reading in meant.readings}
    allowed_most, shown = (
        by_source[name]
        for name in ("The claim allows at most", "The evidence shows at least, within the claimed mechanism")
    )
    assert allowed_most.advantage == "≤ 54.8 %"  # 2 x 77.4 % - 1
    (line,) = (reading.source for reading in meant.readings if reading.source.startswith("The evidence"))
    assert "claimed 1.198; a retrained twin" in line  # the twin's own sigma, q and T, not the run's 1.519
    sigma = float(line.split("sigma ≤ ")[1].split(",")[0])
    assert accounting.epsilon(accounting.DpSgd(sigma, 0.119, 168), 1e-5) == pytest.approx(7.7, rel=5e-3)
    for most, least in zip(allowed_most.tpr, shown.tpr, strict=True):
        assert float(least.split()[1]) < float(most.split()[1])
    assert by_source["The same from eps and delta alone"].tpr[0] == "≤ 100.0 %"
    assert "An attack reached on a retrained twin" in by_source
    tokens: Claim = claim().model_copy(update={"token_multiplier": 1.0})
    assert allowed.event_of(tokens) is None


def test_runs_with_a_claim_come_first_and_letters_follow(tmp_path: Path) -> None:
    page = load_page(write_three(tmp_path))
    assert [(run.key, run.name) for run in page.runs] == [("A", "dp-sgd"), ("B", "dual-priv"), ("C", "non-private")]


@pytest.mark.parametrize("options", [[], ["--show-examples"], ["--against", "old.html"]])
def test_reproduce_this_page_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """The command on the page, typed in the folder that holds the subjects, whatever the folder it was written from."""
    monkeypatch.setattr("reports.sweep.table.RESAMPLES", 50)
    top = tmp_path / "all"
    (top / "deep").mkdir(parents=True)
    first = write_run(top / "deep", "non-private", name="it's")
    second = write_run(top, "dual-priv")
    write_audit(second, "dual-priv", [canary_game("dual-priv"), token_game(), white_box_game()])
    write_sweep(top / "sweep", seeds=(0,))
    check = top / "deep" / "check.json"
    check.write_text(check_document().to_json())
    monkeypatch.chdir(top)
    assert app.run(["report", "dual-priv", "-o", "old.html"]) == 0
    monkeypatch.chdir(tmp_path)
    old = ["--against", str(top / "old.html")] if "--against" in options else options
    subjects = [str(first), "all/sweep", str(second / "release"), str(check)]
    assert app.run(["report", *subjects, *old, "--title", "Ours & 'theirs'", "-o", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    command = html.unescape(re.findall(r'<pre class="copy"><bdi>(.*?)</bdi></pre>', page, flags=re.S)[0])
    words = shlex.split(command)
    assert words[:2] == ["dpaudit", "report"]
    monkeypatch.chdir(top)
    assert app.run(words[1:]) == 0
    assert (top / "report.html").read_text() == page
