"""`dpaudit.Scores`: the shell's own figures, nothing unseen is agreement, and every kind of wrong input."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch

import dpaudit
from dpaudit.cli import app
from dpaudit.errors import InvalidGame, UsageError

matplotlib.use("agg")
CLAIM = {"sigma": 1.0, "rate": 0.05, "steps": 200}
FULL = {"sigma": 2.0, "rate": 1.0, "steps": 4}  # in closed form, so quick


def game(mu: float, n: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    member = rng.random(n) < 0.5
    return rng.normal(size=n) + mu * member, member


def shell(path: Path, *words: object) -> str:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = app.run(["scores", str(path), "--delta", "1e-5", "--json", *map(str, words)])
    assert code != 2, err.getvalue()
    return out.getvalue()


def write(path: Path, scores: np.ndarray, member: np.ndarray, names: dict[str, str] | None = None) -> Path:
    frame = pd.DataFrame({"id": np.arange(scores.size), "member": member.astype(int), "score": scores})
    frame = frame.rename(columns=names or {})
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npz":
        np.savez_compressed(path, **{name: frame[name].to_numpy() for name in frame.columns})
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("how", ["independent", "separate", "runs", "unknown", "half"])
@pytest.mark.parametrize("claimed", [{}, {"epsilon": 2.0}, FULL], ids=["no claim", "eps", "mechanism"])
def test_the_same_document_as_the_shell(how: str, claimed: dict[str, Any], tmp_path: Path) -> None:
    """Byte for byte, from arrays, a data frame and the file itself."""
    scores, member = game(1.0, 400)
    path = write(tmp_path / "scores.csv", scores, member)
    scores = pd.read_csv(path)["score"].to_numpy()
    words = {"independent": ["--coins", "independent"], "separate": ["--coins", "independent", "--separate"],
             "runs": ["--independent-runs"], "half": ["--coins", "half"], "unknown": []}[how]  # fmt: skip
    flags = {"epsilon": "--epsilon", "sigma": "--claim-sigma", "rate": "--claim-rate", "steps": "--claim-steps"}
    expected = shell(path, *words, *(word for name, value in claimed.items() for word in (flags[name], value)))
    options: dict[str, Any] = {"coins": {"separate": "independent", "runs": "unknown"}.get(how, how),
                               "separate": how == "separate", "independent_runs": how == "runs"}  # fmt: skip
    for given in ((scores, member), (pd.DataFrame({"member": member, "score": scores}),), (path,)):
        made = dpaudit.Scores(*given, **options)
        document = made.test(**claimed).document if claimed else made.document(1e-5)
        assert document.to_json() == expected


def test_the_bound_is_the_headline_of_the_document() -> None:
    scores, member = game(2.0)
    s = dpaudit.Scores(scores, member, coins="independent")
    bound = s.epsilon(1e-5)
    rows = s.bounds(1e-5)
    assert float(bound) == bound.value == rows.loc["steinke", "epsilon_lower"] > 0
    assert bound.ceiling == rows.loc["steinke", "ceiling"] and bound.assumes == "none" and bound.decides
    assert list(rows.index[rows["decides"]]) == ["steinke"]
    other = s.epsilon(1e-5, method="order-statistic")
    assert other.role == "informs only" and "informs only" in repr(other) and other.assumes == "gaussian"
    runs = dpaudit.Scores(scores, member, independent_runs=True)
    assert runs.epsilon().method == "clopper-pearson" and runs.epsilon(method="bayes").role == "estimate"
    assert s.epsilon(1e-5, confidence=0.99).confidence == 0.99


@pytest.mark.parametrize(
    ("how", "claimed"),
    [
        ({"coins": "independent", "separate": True}, CLAIM),
        ({"coins": "independent"}, FULL),
        ({"coins": "independent"}, {"epsilon": 8.0}),
        ({"independent_runs": True}, {"epsilon": 8.0}),
    ],
)
def test_scores_that_carry_nothing_are_never_an_all_clear(how: dict[str, Any], claimed: dict[str, Any]) -> None:
    """1,000 fair coins with noise or a constant: inconclusive without power; with the sign turned: invalid."""
    rng = np.random.default_rng(5)
    member = rng.random(1000) < 0.5
    cases = {"noise": rng.normal(size=1000), "zero": np.zeros(1000), "turned": -(3 * member + rng.normal(size=1000))}
    for name in ("noise", "zero"):
        s = dpaudit.Scores(cases[name], member, **how)
        found = s.test(**claimed)
        assert (found.verdict, found.power) == ("inconclusive", None) and "never prove privacy" in repr(found)
        assert s.epsilon().value == 0.0
    turned = dpaudit.Scores(cases["turned"], member, **how)
    found = turned.test(**claimed)
    assert (found.verdict, found.p_value, found.e_value, found.power) == ("invalid", None, None, None)
    assert "is the sign turned?" in repr(found) and "is the sign turned?" in found._repr_html_()
    for ask in (turned.epsilon, turned.bounds, turned.auc, turned.plot_roc, turned.plot_scores,
                lambda: turned.tpr(0.1)):  # fmt: skip
        with pytest.raises(InvalidGame, match="sign"):
            ask()  # type: ignore[operator]
    assert "is the sign turned?" in repr(turned) and "invalid" in turned._repr_html_()


def test_power_takes_a_control() -> None:
    scores, member = game(1.0)
    leak = dpaudit.Scores(*game(2.0, seed=1), coins="independent", separate=True)
    honest = dpaudit.Scores(scores, member, coins="independent", separate=True)
    one = {"sigma": 1, "rate": 1, "steps": 1}
    assert honest.test(**one).verdict == "inconclusive"
    found = honest.test(**one, control=leak)
    assert found.verdict == "not refuted" and found.power is not None and "known leak" in " ".join(found.reasons)
    weak = dpaudit.Scores(*game(0.0, seed=2), coins="independent", separate=True)
    assert honest.test(**one, control=weak).verdict == "inconclusive"  # a control that shows nothing earns nothing
    with pytest.raises(UsageError, match="control"):
        honest.test(**one, control=(scores, member))  # type: ignore[arg-type]
    runs = dpaudit.Scores(scores, member, independent_runs=True)
    with pytest.raises(UsageError, match=r'control: can\'t be used with independent_runs=True without coins="indep'):
        runs.test(**one, control=leak)


def test_without_a_word_on_the_coins_nothing_is_bounded() -> None:
    s = dpaudit.Scores(*game(2.0))
    for ask in (s.epsilon, s.bounds):
        with pytest.raises(UsageError, match="coins='independent'"):
            ask()
    found = s.test(epsilon=0.1)
    assert found.verdict == "inconclusive" and found.p_value is None and "independent fair toss" in repr(found)
    with pytest.raises(InvalidGame, match="coins"):
        dpaudit.Scores(game(1.0)[0], np.arange(1000) < 300, coins="independent").epsilon()


SCORES, MEMBER = game(1.0, 200)


@pytest.mark.parametrize(
    "made",
    [
        lambda: dpaudit.Scores(SCORES.tolist(), MEMBER.tolist()),
        lambda: dpaudit.Scores(tuple(SCORES), MEMBER.astype(int).tolist()),
        lambda: dpaudit.Scores(SCORES, MEMBER.astype(float)),
        lambda: dpaudit.Scores(SCORES, MEMBER.astype(np.uint8)),
        lambda: dpaudit.Scores(SCORES, np.array([str(m) for m in MEMBER])),
        lambda: dpaudit.Scores(SCORES.astype(object), MEMBER.astype(object)),
        lambda: dpaudit.Scores(torch.tensor(SCORES), torch.tensor(MEMBER)),
        lambda: dpaudit.Scores(np.ma.array(SCORES), MEMBER),
        lambda: dpaudit.Scores(pd.Series(SCORES, index=range(9, 209)), pd.Series(MEMBER, index=range(9, 209))),
        lambda: dpaudit.Scores(pd.Series(SCORES), pd.Series(MEMBER, dtype="boolean")),
        lambda: dpaudit.Scores(pd.Series(SCORES), MEMBER),
        lambda: dpaudit.Scores(in_scores=SCORES[MEMBER], out_scores=SCORES[~MEMBER]),
        lambda: dpaudit.Scores(pd.DataFrame({"score": SCORES, "member": MEMBER}).sample(frac=1, random_state=0)),
        lambda: dpaudit.Scores(pd.DataFrame({"score": SCORES, "member": MEMBER}, index=[f"x{i}" for i in range(200)])),
        lambda: dpaudit.Scores(pd.DataFrame({"score": SCORES, "member": MEMBER, "id": range(200)}, index=[0] * 200)),
        lambda: dpaudit.Scores(pd.DataFrame({"loss": SCORES, "in": MEMBER, "k": range(200)}), id_column="k",
                               member_column="in", score_column="loss"),
    ],
)  # fmt: skip
def test_every_sensible_form(made: Callable[[], dpaudit.Scores]) -> None:
    found = made()
    assert found.auc() == dpaudit.Scores(SCORES, MEMBER).auc() and len(found) == 200


FRAME = pd.DataFrame({"id": range(200), "member": MEMBER, "score": SCORES})
ROOT = torch.tensor(SCORES, requires_grad=True)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: dpaudit.Scores(), "scores: missing"),
        (lambda: dpaudit.Scores(SCORES), "member: missing"),
        (lambda: dpaudit.Scores(SCORES, MEMBER[:-1]), "member: 199 values for 200 scores"),
        (lambda: dpaudit.Scores(SCORES[:, None], MEMBER), r"shape \(200, 1\)"),
        (lambda: dpaudit.Scores(1.0, MEMBER), r"shape \(\)"),
        (lambda: dpaudit.Scores(set(SCORES), MEMBER), r"scores: got set"),
        (lambda: dpaudit.Scores([[1.0], [1.0, 2.0]], MEMBER), "scores: can't be read as an array"),
        (lambda: dpaudit.Scores([], []), "no rows"),
        (lambda: dpaudit.Scores(np.r_[np.nan, SCORES[1:]], MEMBER), "row 1 is missing or NaN"),
        (lambda: dpaudit.Scores(np.r_[SCORES[:-1], np.inf], MEMBER), "row 200 is inf"),
        (lambda: dpaudit.Scores([None, *SCORES[1:]], MEMBER), "row 1 is missing"),
        (lambda: dpaudit.Scores(["a", *SCORES[1:]], MEMBER), "row 1 is 'a'"),
        (lambda: dpaudit.Scores(SCORES.astype(complex), MEMBER), "complex"),
        (lambda: dpaudit.Scores(SCORES.astype("datetime64[s]"), MEMBER), "times"),
        (lambda: dpaudit.Scores(np.where(MEMBER, 1e308, -1e308), MEMBER), "at most 1e[+]300"),
        (lambda: dpaudit.Scores({"score": SCORES, "member": MEMBER}), "member: missing"),
        (lambda: dpaudit.Scores(MEMBER, SCORES), "member in row 1 is"),
        (lambda: dpaudit.Scores(SCORES, np.where(MEMBER, 1, -1)), "is '-1'; accepted: 0, 1, true or false"),
        (lambda: dpaudit.Scores(SCORES, np.where(MEMBER, "in", "out")), "accepted: 0, 1, true or false"),
        (lambda: dpaudit.Scores(SCORES, np.ones(200)), "0 non-members"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, ids=[1] * 200), "occurs more than once"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, ids=range(3)), "ids: 3 values"),
        (lambda: dpaudit.Scores(np.ma.masked_less(SCORES, 0), MEMBER), "masked"),
        (lambda: dpaudit.Scores(ROOT, MEMBER), "scores: can't be read as an array .*grad"),
        (lambda: dpaudit.Scores(pd.Series(SCORES), pd.Series(MEMBER, index=range(1, 201))), "its index is not that"),
        (lambda: dpaudit.Scores(pd.Series(SCORES), pd.Series(MEMBER, index=range(199, -1, -1))), "its index"),
        (lambda: dpaudit.Scores(in_scores=SCORES), "belong together"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, in_scores=SCORES, out_scores=SCORES), "belong together"),
        (lambda: dpaudit.Scores(FRAME, MEMBER), "member: given beside a table; name its column by member_column="),
        (lambda: dpaudit.Scores(FRAME, score_column="loss"), "column 'loss' is missing"),
        (lambda: dpaudit.Scores(FRAME[["score", "member"]].set_axis([7] * 200)), "id '7' occurs more than once"),
        (lambda: dpaudit.Scores(pd.concat([FRAME, FRAME["score"]], axis=1)), "column 'score' occurs 2 times"),
        (lambda: dpaudit.Scores(FRAME.set_index(["id", FRAME["id"].rename("k")])), "column 'id' is missing"),
        (lambda: dpaudit.Scores("nowhere.csv"), "nowhere.csv: no such file"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, coins="permuted"), "coins: got 'permuted'; accepted: one of"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, seed=-1), "seed"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, separate="no"), "separate: got 'no'"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, features=np.ones((3, 1))), r"features: got shape \(3, 1\)"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, features=FRAME["id"][:5].to_frame()), "features"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).tpr(0.001), "fpr: got 0.001; accepted: at least"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).tpr(2), "fpr"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, coins="independent").epsilon(method="best"), "one of steinke"),
        (lambda: dpaudit.Scores(SCORES, MEMBER, coins="independent").epsilon(2.0), "delta"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(), "nothing is claimed"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(sigma=1.0), "rate: missing; a claim needs sigma, rate and steps"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(sigma=1, rate=1, steps=1, epsilon=3), "given beside sigma"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(8), "claim: got int"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(dpaudit.claim(epsilon=1), epsilon=2), "beside a claim"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(epsilon=float("nan")), "epsilon"),
        (lambda: dpaudit.Scores(SCORES, MEMBER).test(epsilon=1, alpha=0), "alpha"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        made()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_files_with_names_of_their_own(suffix: str, tmp_path: Path) -> None:
    names = {"id": "uuid", "member": "in_training", "score": "minus_loss"}
    path = write(tmp_path / f"s{suffix}", SCORES, MEMBER, names)
    columns = {f"{name}_column": value for name, value in names.items()}
    assert dpaudit.Scores(path, **columns).auc() == dpaudit.Scores(SCORES, MEMBER).auc()
    flags = [word for name, value in names.items() for word in (f"--{name}-column", value)]
    assert shell(path, *flags) == shell(write(tmp_path / "plain" / f"s{suffix}", SCORES, MEMBER))
    with pytest.raises(UsageError, match=r"column '(id|member)' is missing"):
        dpaudit.Scores(path)


def test_the_id_in_an_index_or_nowhere(tmp_path: Path) -> None:
    """Parquet keeps the index of a data frame; .npz needs no ids; a CSV without them is refused."""
    path = tmp_path / "s.parquet"
    FRAME.assign(id=[f"r{place}" for place in range(200)]).set_index("id").to_parquet(path)
    assert dpaudit.Scores(path)._table.ids[3] == "r3"
    FRAME[["member", "score"]].set_axis([f"q{place}" for place in range(200)]).to_parquet(path)
    assert dpaudit.Scores(path)._table.ids[3] == "q3"
    FRAME[["member", "score"]].to_parquet(path)
    with pytest.raises(UsageError, match="column 'id' is missing"):
        dpaudit.Scores(path)
    np.savez(tmp_path / "s.npz", member=MEMBER, score=SCORES)
    assert dpaudit.Scores(tmp_path / "s.npz").auc() == dpaudit.Scores(SCORES, MEMBER).auc()


def test_features_find_coins_that_follow_the_records() -> None:
    scores, member = game(1.0)
    rng = np.random.default_rng(3)
    shifted = rng.normal(size=(1000, 2)) + 2 * member[:, None]
    found = dpaudit.Scores(scores, member, coins="independent", features=shifted).test(epsilon=8)
    assert found.verdict == "invalid" and "blind baseline" in " ".join(found.reasons)
    frame = pd.DataFrame(rng.normal(size=(1000, 2))).sample(frac=1, random_state=0)  # joined by its index
    s = dpaudit.Scores(scores, member, coins="independent", features=frame)
    assert s.epsilon().value > 0 and "blind baseline" in s._repr_html_()


def test_plots_draw_what_the_figures_say() -> None:
    scores, member = game(1.0)
    s = dpaudit.Scores(scores, member, coins="independent")
    _, (left, right) = matplotlib.pyplot.subplots(1, 2)
    assert s.plot_roc(left, claim=dpaudit.claim(epsilon=8)) is left
    x, y = left.lines[0].get_data()
    assert np.sum(np.diff(x) * y[1:]) == pytest.approx(float(s.auc()), abs=0.02)
    limit = left.lines[-1].get_data()
    assert limit[1][np.argmin(np.abs(limit[0] - 1e-4))] == pytest.approx(1e-5 + np.exp(8) * 1e-4, rel=0.1)
    assert s.plot_scores(right) is right and s.plot_roc(log=True).get_xscale() == "log"
    matplotlib.pyplot.close("all")


def test_text_of_others_can_not_break_a_notebook() -> None:
    odd = "<script>\x1b[2J"
    with pytest.raises(UsageError) as caught:
        dpaudit.Scores(FRAME.assign(member=odd))
    assert "accepted: 0, 1" in str(caught.value)
    from dpaudit.api import html

    assert "<script>" not in html.table(odd, {odd: odd}, [odd]) and "\x1b" not in html.table(odd, {odd: odd})
