"""What surrounds lmms-eval's numbers: words, resampled metrics, subgroups, gaps, and documents that are added to."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binom

from dpaudit.documents import BenchmarkDocument
from dpaudit.errors import EnvironmentFailure, UsageError
from dpaudit.runs import RunFolder
from reports import copies, evaluate, groups
from reports.benchmark import _with_earlier
from reports.catalogue import parse_data
from reports.metrics import difference_of_means, resampled, token_f1, words, yes_no
from reports.process import worker_environment
from reports.tasks import utils  # type: ignore[import-not-found, unused-ignore]
from tests.reports.fixtures import benchmark


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left lung.", "left lung"),
        ("AN X-ray!", "xray"),
        ("1.5 cm, -2", "1.5 cm -2"),
        ("«Да»", "да"),
        ("a", ""),
    ],
)
def test_words_leave_out_what_does_not_answer(text: str, expected: str) -> None:
    assert words(text) == expected


def test_token_f1_by_hand() -> None:
    assert token_f1("the left lung", "left lung") == 1.0
    assert token_f1("left left lung", "left lung lobe") == pytest.approx(2 * 2 / 6)  # one "left" is shared, and "lung"
    assert token_f1("heart", "left lung") == 0.0
    assert (token_f1("", "lung"), token_f1("the", "a")) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"), [("Yes, it is.", "yes"), ("NO", "no"), ("not sure", None), ("", None), ("yesterday", None)]
)
def test_the_first_word_is_the_yes_or_no(text: str, expected: str | None) -> None:
    assert yes_no(text) == expected


def test_yes_no_metrics_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("maybe", "yes"), ("no", "no"), ("yes", "yes")]
    results = [utils.yes_no_results({"answer": wanted}, [said]) for said, wanted in pairs]
    parts = [result["f1"] for result in results]
    assert utils.precision(parts) == pytest.approx(2 / 3)
    assert utils.recall(parts) == pytest.approx(2 / 3)  # "maybe" misses a yes
    assert utils.f1(parts) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert [sum(result[name] for result in results) for name in ("accuracy", "yes_rate", "unreadable_rate")] == [
        3,
        3,
        1,
    ]
    assert math.isnan(utils.precision([{"said": "no", "wanted": "yes"}]))


def test_a_resampled_mean_has_the_binomial_limits() -> None:
    """1,000 resamples put a quantile's own level within 0.025 +- 0.0247 (5 standard errors): false alarm < 1e-6."""
    n, right = 400, 300
    items = [1.0] * right + [0.0] * (n - right)
    limits = resampled(lambda values: sum(values) / len(values), items, [str(i) for i in range(n)])
    assert limits is not None
    for limit, level in zip(limits, (0.025, 0.975), strict=True):
        low, high = max(level - 0.0247, 1e-6), min(level + 0.0247, 1 - 1e-6)
        assert binom.ppf(low, n, 0.75) <= limit * n + 1e-9 and limit * n <= binom.ppf(high, n, 0.75) + 1e-9


def test_what_no_resample_moves_has_no_interval() -> None:
    assert resampled(lambda values: 0.0, [1, 2, 3], ["a", "b", "c"]) is None
    assert resampled(len, [1, 2], ["a", "a"]) is None
    assert resampled(lambda values: math.nan, [1, 2], ["a", "b"]) is None


def test_a_difference_between_groups_has_the_normal_limits() -> None:
    """Two groups of 400 pictures at 80 % and 60 %: half-width 1.96 sqrt(.16/400 + .24/400) = 0.062, within a tenth."""
    values = [1.0] * 320 + [0.0] * 80 + [1.0] * 240 + [0.0] * 160
    first = [index < 400 for index in range(800)]
    limits = difference_of_means(values, first, [not one for one in first], [str(i) for i in range(800)])
    assert limits is not None
    low, high = limits
    assert low < 0.2 < high and (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.4 / 400), rel=0.1)


def results(kinds: list[str], right: list[float], **columns: list[Any]) -> evaluate.Results:
    docs = [
        {"kind": kind, "answer": "yes", **{name: column[index] for name, column in columns.items()}}
        for index, kind in enumerate(kinds)
    ]
    clusters = tuple(f"p{index}" for index in range(len(kinds)))
    return evaluate.Results("t", tuple(docs), ("",) * len(kinds), {"exact_match": right}, clusters, "0" * 64)


MEAN = {"exact_match": evaluate.Aggregate(lambda values: sum(values) / len(values), mean=True)}


def test_subgroups_and_their_largest_gap() -> None:
    kinds = ["a"] * 10 + ["b"] * 10 + ["c"] * 4  # c has too few pictures for a gap, though it is the worst
    right = [1.0] * 9 + [0.0] + [1.0] * 5 + [0.0] * 5 + [0.0] * 4
    found = results(kinds, right, group=["north", "south"] * 12)
    metrics, gaps, headline = evaluate.measure(found, MEAN, {"exact_match,none": 14 / 24})
    assert headline == "exact_match" and metrics["exact_match/c"].value == 0.0
    first = next(gap for gap in gaps if gap.grouping == groups.QUESTION)
    assert (first.best, first.worst, first.value) == ("a", "b", pytest.approx(0.4))
    assert first.low is not None and first.high is not None and first.low < 0.4 < first.high
    assert {"exact_match/unit group: north", "exact_match/unit group: south"} <= set(metrics)
    assert not any("answer kind" in name for name in metrics)  # all answers are yes: no subgroups
    assert groups.of("exact_match", groups.QUESTION, metrics).keys() == {"a", "b", "c"}


def test_a_value_that_is_not_lmms_evals_is_refused() -> None:
    found = results(["a", "b"], [1.0, 0.0])
    with pytest.raises(EnvironmentFailure, match=r"lmms-eval's exact_match is 0\.6"):
        evaluate.measure(found, MEAN, {"exact_match,none": 0.6})
    with pytest.raises(EnvironmentFailure, match="states no number"):
        evaluate.measure(found, MEAN, {})


def test_kinds_of_answers() -> None:
    docs = [
        {"answers": ["two", "2", "two"]},
        {"answers": [{"answer": "No"}]},
        {"answer": "a cat"},
        {"answer": "-1,000"},
    ]
    targets = [groups.target(doc) for doc in docs]
    assert targets == ["two", "No", "a cat", "-1,000"]
    assert groups.groupings(docs, targets) == {groups.ANSWER: ["number", "yes/no", "other", "number"]}


def test_another_task_is_added_and_the_same_one_replaced(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    old = benchmark(0.8)
    run.write(old)
    other = old.model_copy(
        update={
            "tasks": {"pope": old.tasks["dpaudit_vqa"]},
            "base": None,
            "majority": {},
            "sample_sha256": {"pope": "cd" * 32},
        }
    )
    both = _with_earlier(run, other)
    assert list(both.tasks) == ["dpaudit_vqa", "pope"] and both.base == old.base and both.majority == old.majority
    assert both.sample_sha256 == {"dpaudit_vqa": "ab" * 32, "pope": "cd" * 32}
    run.write(both)
    again = _with_earlier(run, benchmark(0.5))
    assert again.tasks["dpaudit_vqa"]["exact_match"].value == 0.5 and again.tasks["pope"] == other.tasks["pope"]
    run.benchmark.write_text("{")
    assert _with_earlier(run, other) == other  # a damaged document is written anew
    BenchmarkDocument.model_validate_json(again.to_json())


def test_annotators_that_can_not_be_told_apart_are_refused(tmp_path: Path) -> None:
    """lmms-eval's VQA v2 compares entries: two annotators with equal entries count as one, and the score is wrong."""
    rows = {"image": [{"bytes": b"x", "path": None}], "question": ["q"], "question_id": [1]}
    for entry, fine in (({"answer": "red"}, False), ({"answer": "red", "answer_id": 1}, True)):
        pq.write_table(pa.table({**rows, "answers": [[entry]]}), tmp_path / "x.parquet")
        columns = ("image", "question", "answers", "question_id")
        if fine:
            assert copies.find("vqav2_val", tmp_path / "x.parquet", "validation", columns, tmp_path).undeclared
        else:
            with pytest.raises(UsageError, match="answer_id"):
                copies.find("vqav2_val", tmp_path / "x.parquet", "validation", columns, tmp_path)


def test_files_of_other_splits_are_left_alone(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "validation-0.parquet", "validation-1.parquet"):
        (tmp_path / name).write_bytes(b"")
    names = [file.name for file in copies.parquet_files("--data t", tmp_path, "validation")]
    assert names == ["validation-0.parquet", "validation-1.parquet"]
    with pytest.raises(UsageError, match="files of the split testdev"):
        copies.parquet_files("--data t", tmp_path, "testdev")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"bad\.parquet: not a readable Parquet file"):
        copies.find("t", tmp_path / "bad.parquet", None, ("image",), tmp_path)


def test_data_is_named_once(tmp_path: Path) -> None:
    assert parse_data([f"pope={tmp_path}"]) == {"pope": tmp_path}
    with pytest.raises(UsageError, match="given twice"):
        parse_data([f"pope={tmp_path}", f"pope={tmp_path}"])


def test_online_lifts_every_lock_and_uses_the_users_cache(tmp_path: Path) -> None:
    shell = {"HF_HOME": "/home/hf", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    made = worker_environment(tmp_path, shell, online=True)
    assert not any("OFFLINE" in name for name in made)
    assert made["HF_DATASETS_CACHE"] == "/home/hf/datasets" and made["HF_TOKEN_PATH"] == "/home/hf/token"


def test_the_spread_of_clusters_is_kept_when_they_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from reports import metrics

    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, 90).astype(float)
    clusters = [f"p{index // 3}" for index in range(90)]
    whole = metrics.cluster_metric(right, clusters)
    monkeypatch.setattr(metrics, "DRAWN_AT_ONCE", 100)
    assert metrics.cluster_metric(right, clusters) == whole
