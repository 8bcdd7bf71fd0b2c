"""`dpaudit scores` end to end: what each way of drawing coins opens, bad files, blind baseline, documents."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpaudit.analysis.scores import Options, analyse
from dpaudit.analysis.tables import ScoreTable, read_features, read_scores
from dpaudit.cli import app
from dpaudit.documents import ScoresDocument
from dpaudit.errors import UsageError

DPAUDIT = Path(sys.executable).parent / "dpaudit"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process (starting Python and pandas anew for each call would take minutes)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = app.run(["scores", *map(str, arguments)])
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def from_the_shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DPAUDIT), "scores", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def write(path: Path, mu: float, n: int = 1000, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    member = rng.random(n) < 0.5
    frame = pd.DataFrame(
        {"id": [f"r{i}" for i in range(n)], "member": member.astype(int), "score": rng.normal(size=n) + mu * member}
    )
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def test_unknown_coins_open_no_bound(tmp_path: Path) -> None:
    done = run(write(tmp_path / "s.csv", 1.0), "--delta", "1e-5", "--json")
    assert done.returncode == 0, done.stderr
    document = ScoresDocument.model_validate_json(done.stdout)
    assert document.verdict == "no claim" and document.tests == ()
    status = {check.name: check for check in document.validity.checks}
    assert status["one-run bounds"].status == "not applicable"
    assert "--coins independent" in status["one-run bounds"].explanation
    assert status["blind baseline"].status == "not applicable"
    assert document.scores[0].auc == pytest.approx(0.76, abs=0.05)
    assert document.scores[0].tpr_at_fpr["0.001"] is None


@pytest.mark.parametrize("flags", [["--coins", "independent"], ["--independent-runs"]])
def test_pure_dp_has_no_bound_within_the_gaussian_family(tmp_path: Path, flags: list[str]) -> None:
    """At delta = 0 a Gaussian mechanism has no finite eps: a bound of inf under a ceiling of inf would say nothing."""
    done = run(write(tmp_path / "s.csv", 3.0), "--delta", "0", *flags, "--json")
    document = ScoresDocument.model_validate_json(done.stdout)
    assert document.tests and all(np.isfinite(test.ceiling or 0.0) for test in document.tests)
    assert {test.assumes for test in document.tests} <= {"none", "prior"}
    assert any(
        check.name == "Gaussian bounds" and check.status == "not applicable" for check in document.validity.checks
    )


def test_reasons_about_a_file_speak_of_no_weights(tmp_path: Path) -> None:
    done = run(
        write(tmp_path / "s.csv", 3.0), "--delta", "1e-5", "--coins", "independent", "--epsilon", "0.5", "--json"
    )
    document = ScoresDocument.model_validate_json(done.stdout)
    assert document.verdict == "refuted" and len(document.reasons) == 2
    assert "weights" not in " ".join(document.reasons)


def test_independent_coins_and_a_claim(tmp_path: Path) -> None:
    flags = ["--coins", "independent", "--claim-sigma", "1", "--claim-rate", "1", "--claim-steps", "1"]
    honest = run(write(tmp_path / "a.csv", 1.0), "--delta", "1e-5", *flags, "--separate", "--json")
    assert honest.returncode == 0, honest.stderr
    document = ScoresDocument.model_validate_json(honest.stdout)
    assert document.verdict == "inconclusive"  # nothing shows that these scores carry a signal
    assert {test.bound for test in document.tests} == {"steinke", "mahloujifar", "order-statistic"}
    assert all("fixed" in test.selection for test in document.tests)
    false = run(write(tmp_path / "b.parquet", 2.0), "--delta", "1e-5", *flags, "--separate")
    assert false.returncode == 1
    assert "Verdict: refuted" in false.stdout and "can never prove privacy" in false.stdout
    # The same scores of a game with a known leak earn a power.
    control = run(
        write(tmp_path / "c.csv", 1.0), "--delta", "1e-5", *flags, "--separate", "--control", tmp_path / "b.parquet"
    )
    assert control.returncode == 0 and "not refuted" in control.stdout and "a known leak (AUC" in control.stdout
    plain = run(write(tmp_path / "d.csv", 1.0), "--delta", "1e-5", *flags, "--strict")
    assert plain.returncode == 3 and "inconclusive" in plain.stdout


def test_a_control_is_for_one_run_tests(tmp_path: Path) -> None:
    """Beside independent runs alone it would be read and never used."""
    flags = ["--delta", "1e-5", "--claim-sigma", "1", "--claim-rate", "1", "--claim-steps", "1", "--independent-runs"]
    file, leak = write(tmp_path / "a.csv", 1.0), write(tmp_path / "b.csv", 2.0)
    refused = run(file, *flags, "--control", leak)
    assert refused.returncode == 2 and not refused.stdout and refused.stderr.count("\n") == 1
    assert "--control: can't be used with --independent-runs without --coins independent: the power" in refused.stderr
    both = run(file, *flags, "--coins", "independent", "--control", leak)
    assert both.returncode == 0, both.stderr
    assert "not refuted" in both.stdout and "is not used for independent runs" in both.stdout


@pytest.mark.parametrize(
    "kind", ["noise", "zero", "rounded", "two values", "turned", "turned and weak", "turned ranks"]
)
@pytest.mark.parametrize(
    "how", [["--coins", "independent", "--separate"], ["--coins", "independent"], ["--independent-runs"]]
)
def test_scores_that_carry_nothing_or_the_wrong_sign_are_never_an_all_clear(
    kind: str, how: list[str], tmp_path: Path
) -> None:
    """1,000 fair coins and scores without a signal: inconclusive, no power; with the sign turned: invalid."""
    rng = np.random.default_rng(5)
    member = rng.random(1000) < 0.5
    noise = rng.normal(size=1000)
    scores = {
        "noise": noise, "zero": np.zeros(1000), "rounded": np.round(noise), "two values": (noise > 0).astype(float),
        "turned": -(3 * member + noise), "turned and weak": -(0.5 * member + noise),
        "turned ranks": 1000.0 - np.argsort(np.argsort(3 * member + noise)),
    }[kind]  # fmt: skip
    path = tmp_path / "scores.csv"
    pd.DataFrame({"id": range(1000), "member": member.astype(int), "score": scores}).to_csv(path, index=False)
    claim = ["--claim-sigma", "1", "--claim-rate", ".05", "--claim-steps", "200"]
    done = run(path, "--delta", "1e-5", *how, *claim, "--json")
    document = ScoresDocument.model_validate_json(done.stdout)
    if kind.startswith("turned"):
        assert (done.returncode, document.verdict, document.tests) == (3, "invalid", ())
        assert "is the sign turned?" in " ".join(document.reasons)
    else:
        assert (done.returncode, document.verdict) == (0, "inconclusive")
        assert all(test.power is None for test in document.tests) and "--strict" in done.stderr


def test_independent_runs(tmp_path: Path) -> None:
    done = from_the_shell(write(tmp_path / "s.csv", 2.0), "--delta", "1e-5", "--independent-runs", "--json")
    document = ScoresDocument.model_validate_json(done.stdout)
    rows = {test.bound: test for test in document.tests}
    assert set(rows) == {"clopper-pearson", "gdp", "bayes"}
    assert rows["bayes"].estimate and not rows["bayes"].decides and rows["bayes"].assumes == "prior"
    assert rows["gdp"].assumes == "gaussian" and not rows["gdp"].decides
    for row in rows.values():
        assert row.epsilon_lower is not None and row.ceiling is not None and 0 < row.epsilon_lower <= row.ceiling
    assert (rows["clopper-pearson"].epsilon_lower or 0) < 9.997


def test_half_split(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", 1.0)
    done = run(path, "--delta", "1e-5", "--coins", "half", "--json")
    assert done.returncode == 3  # 1000 tosses that are not exactly half: the statement is false
    frame = pd.read_csv(path)
    frame["member"] = (np.arange(len(frame)) % 2).astype(int)
    frame.to_csv(path, index=False)
    document = ScoresDocument.model_validate_json(run(path, "--delta", "1e-5", "--coins", "half", "--json").stdout)
    assert document.validity.sound and document.tests == ()


def test_impossible_coins_are_invalid(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", 1.0)
    frame = pd.read_csv(path)
    frame["member"] = (np.arange(len(frame)) < 300).astype(int)
    frame.to_csv(path, index=False)
    done = run(path, "--delta", "1e-5", "--coins", "independent", "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["verdict"] == "invalid" and document["tests"] == [] and document["scores"] == []


def test_blind_baseline(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", 1.0)
    frame = pd.read_csv(path)
    rng = np.random.default_rng(1)
    clean = pd.DataFrame({"id": frame["id"], "a": rng.normal(size=len(frame)), "b": rng.random(len(frame))})
    shifted = clean.assign(a=clean["a"] + frame["member"])
    clean.sample(frac=1.0, random_state=0).to_csv(tmp_path / "clean.csv", index=False)
    shifted.to_csv(tmp_path / "shifted.csv", index=False)
    good = run(path, "--delta", "1e-5", "--features", tmp_path / "clean.csv")
    bad = run(path, "--delta", "1e-5", "--features", tmp_path / "shifted.csv")
    assert good.returncode == 0 and "[pass] blind baseline" in good.stdout
    assert bad.returncode == 3 and "Verdict: invalid" in bad.stdout


BAD = {
    "missing column": ("id,member\na,1\nb,0\n", "score"),
    "NaN": ("id,member,score\n" + "".join(f"r{i},{i % 2},{'nan' if i == 7 else i}\n" for i in range(40)), "row 8"),
    "infinite score": (
        "id,member,score\n" + "".join(f"r{i},{i % 2},{'inf' if i == 7 else i}\n" for i in range(40)),
        "inf",
    ),
    "duplicated id": ("id,member,score\n" + "".join(f"r{i % 39},{i % 2},{i}\n" for i in range(40)), "r0"),
    "one class only": ("id,member,score\n" + "".join(f"r{i},1,{i}\n" for i in range(40)), "non-members"),
    "empty": ("", "empty"),
    "no rows": ("id,member,score\n", "no rows"),
    "2 rows": ("id,member,score\na,1,0.5\nb,0,0.1\n", "at least 10"),
    "wrong delimiter": ("id;member;score\na;1;0.5\nb;0;0.1\n", "semicolons"),
    "text for a score": ("id,member,score\n" + "".join(f"r{i},{i % 2},high\n" for i in range(40)), "high"),
    "text for a member": ("id,member,score\n" + "".join(f"r{i},maybe,{i}\n" for i in range(40)), "maybe"),
    "not text at all": ("\x00\x01\x02", "column"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    text, names = BAD[case]
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=names) as caught:
        read_scores(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["wrong delimiter"])
def test_bad_files_from_the_shell(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(BAD[case][0])
    done = from_the_shell(path, "--delta", "1e-5")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--delta", "2"], "delta"),
        (["--delta", "1e-5", "--coins", "maybe"], "--coins"),
        (["--delta", "1e-5", "--claim-sigma", "1"], "--claim-rate"),
        (["--delta", "1e-5", "--claim-sigma", "-1", "--claim-rate", "1", "--claim-steps", "1"], "sigma"),
        ([], "delta"),
    ],
)
def test_bad_flags(arguments: list[str], names: str, tmp_path: Path) -> None:
    done = run(write(tmp_path / "s.csv", 1.0, n=50), *arguments)
    assert done.returncode == 2 and names in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_missing_file() -> None:
    done = run("/nowhere/scores.csv", "--delta", "1e-5")
    assert done.returncode == 2 and "/nowhere/scores.csv" in done.stderr


def test_features_join_by_id(tmp_path: Path) -> None:
    table = read_scores(write(tmp_path / "s.csv", 0.0, n=60))
    features = tmp_path / "f.csv"
    pd.DataFrame({"id": table.ids[::-1], "x": np.arange(60)[::-1]}).to_csv(features, index=False)
    assert read_features(features, table.ids)[:, 0].tolist() == list(range(60))
    pd.DataFrame({"id": table.ids[:50], "x": np.arange(50)}).to_csv(features, index=False)
    with pytest.raises(UsageError, match="r50"):
        read_features(features, table.ids)


def test_file_order_and_monotone_maps_change_nothing(tmp_path: Path) -> None:
    table = read_scores(write(tmp_path / "s.csv", 1.5, n=400))
    options = Options(delta=1e-5, coins="independent", independent_runs=True)
    order = np.random.default_rng(0).permutation(400)
    shuffled = type(table)(table.ids[order], table.members[order], np.exp(table.scores[order]))
    for one, other in zip(analyse(table, options).tests, analyse(shuffled, options).tests, strict=True):
        assert (one.correct, one.epsilon_lower, one.ceiling) == (other.correct, other.epsilon_lower, other.ceiling)


def test_null_scores_bound_nothing() -> None:
    """80 leak-free files: each printed bound is positive in at most 5 % (P[Binomial(80, 0.05) > 16] < 1e-6)."""
    rng = np.random.default_rng(9)
    options = Options(delta=1e-5, coins="independent", independent_runs=True)
    alarms: dict[str, int] = {}
    for _ in range(80):
        members = rng.random(200) < 0.5
        table = ScoreTable(np.array([str(i) for i in range(200)]), members, rng.integers(0, 50, 200).astype(float))
        for test in analyse(table, options).tests:
            if not test.estimate:
                alarms[test.bound] = alarms.get(test.bound, 0) + ((test.epsilon_lower or 0) > 0)
    assert len(alarms) == 5 and max(alarms.values()) <= 16, alarms


def test_a_gate_above_every_ceiling_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    members = rng.random(200) < 0.5
    lines = [f"r{row},{int(member)},{10 * member + rng.normal()}" for row, member in enumerate(members)]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(["id,member,score", *lines]))
    for more, code in (([], 0), (["--strict"], 3)):
        done = run(str(path), "--delta", "1e-5", "--coins", "independent", "--fail-above", "40", *more)
        assert done.returncode == code and "a gate of 40 can't fail" in done.stderr
    low = run(str(path), "--delta", "1e-5", "--coins", "independent", "--fail-above", "1")
    assert low.returncode == 1 and "can't fail" not in low.stderr


def test_a_gate_that_dead_scores_pass_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = [f"r{row},{int(rng.random() < 0.5)},{rng.normal()}" for row in range(400)]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(["id,member,score", *rows]))
    for more, code in (([], 0), (["--strict"], 3)):
        done = run(str(path), "--delta", "1e-5", "--coins", "independent", "--fail-above", "1", *more)
        assert done.returncode == code and "the gate tests nothing" in done.stderr


def test_a_bound_without_end_does_not_say_that_every_guess_was_right(tmp_path: Path) -> None:
    """q = 1e-12 and T = 1 can't leak what these scores show: the counts contradict q and T, 1 guess in 3 is wrong."""
    rng = np.random.default_rng(1)
    members = rng.random(400) < 0.5
    rows = [f"r{row},{int(member)},{member + rng.normal()}" for row, member in enumerate(members)]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(["id,member,score", *rows]))
    claim = ["--claim-sigma", "1", "--claim-rate", "1e-12", "--claim-steps", "1", "--separate"]
    done = run(str(path), "--delta", "1e-5", "--coins", "independent", *claim)
    assert done.returncode == 1 and "eps >= inf" in done.stdout and "every guess" not in done.stdout


@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\n"])
def test_lines_may_end_as_on_any_system(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path / "s.csv", 1.0)
    whole = run(path, "--delta", "1e-5", "--json")
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", end))
    again = run(path, "--delta", "1e-5", "--json")
    assert again.returncode == whole.returncode == 0
    assert json.loads(again.stdout)["tests"] == json.loads(whole.stdout)["tests"]


@pytest.mark.parametrize(
    "content", [b"PAR1\x15\x04\r\x00,a\r\nb,\x00", b"\x89PNG\r\n\x1a\n\x00", b'"a\rb","c', bytes(99)]
)
def test_a_file_of_another_kind_under_this_name_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.csv").write_bytes(content)
    done = run(tmp_path / "s.csv", "--delta", "1e-5")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
