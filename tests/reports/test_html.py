"""The page as text: bytes, size, what it says, and what it refuses."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpaudit.documents import AuditDocument, LedgerDocument, Thumbnail
from dpaudit.errors import UsageError
from dpaudit.ledger import tuning_row
from reports.embedded import ReportDocument
from reports.html import SIZE_LIMIT, SIZE_WANTED, render
from reports.inputs import Gallery, load_runs
from reports.subjects import load_page
from tests import commands
from tests.reports.fixtures import (
    audit,
    canary_game,
    thumbnails,
    token_game,
    white_box_game,
    write_audit,
    write_run,
    write_sums,
    write_three,
)
from tests.reports.hostile import HOSTILE, write_hostile_run

VOID = {"meta", "link", "img", "br"}


def page_of(*paths: Path, title: str = "T", **options: bool) -> str:
    return render(load_page(paths, **options), title=title, show_examples=options.get("show_examples", False))[0]


def visible(page: str) -> str:
    """What a reader sees as words: tags gone, spaces joined."""
    body = re.sub(r"<script.*?</script>|<style.*?</style>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def embedded(page: str) -> dict[str, object]:
    text = page.split('id="dpaudit-report">', 1)[1].split("</script>", 1)[0]
    data: dict[str, object] = json.loads(text)
    return data


class Balance(HTMLParser):
    """Every opened element is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def claims_first(paths: list[Path]) -> list[Path]:
    """Three runs in the order of their page: the first of them makes no claim."""
    return [*paths[1:], paths[0]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    paths = write_three(tmp_path_factory.mktemp("runs"))
    return paths, page_of(*paths)


def test_same_inputs_same_bytes(three: tuple[list[Path], str], tmp_path: Path) -> None:
    paths, page = three
    assert page_of(*paths) == page
    assert page_of(*write_three(tmp_path)) == page  # neither paths nor times are in it


def test_one_closed_file(three: tuple[list[Path], str]) -> None:
    _, page = three
    assert len(page.encode()) < SIZE_LIMIT
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    # nothing to fetch: addresses are fragments or data:, and the only style sheet is the one that the policy names
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith(("#", "data:image/png;base64,", "data:,"))
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    style = page.split("<style>", 1)[1].split("</style>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.split('http-equiv="Content-Security-Policy" content="', 1)[1].split('"', 1)[0]
    assert f"style-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert re.findall(r"<script([^>]*)>", page) == ["", ' type="application/json" id="dpaudit-report"']
    script = page.split("<script>", 1)[1].split("</script>", 1)[0]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert not re.search(r"\sstyle=", page)


def test_says_what_an_auditor_needs(three: tuple[list[Path], str]) -> None:
    text = visible(three[1])
    for words in (
        "An audit can refute a claim; it can never prove privacy.",
        "eps = 8 at delta = 1e-5",
        "image (with all its questions)",
        "(add-remove)",
        "right at most 77.4 % of the time (by the claimed mechanism)",
        "dp-accounting 0.6.0 PLD",
        "Every guess was right; the leak may exceed what this test measures",
        "This test cannot measure above 3.66, so it cannot check 8.",
        "keeps 79 % of the gain",  # (0.861 - 0.552) / (0.942 - 0.552) = 0.792
        "This run makes no privacy claim.",
        "true sigma 30 % smaller than claimed",
        "fixed: 60 top, 60 bottom",
        "per-example preprocessing",
        "dpaudit train method=dp-sgd",
        "this game could not have shown more than 3.66",
        "17 of 25 tokens of a picture have no noise",
        "above the bound",
        "6.2 to 6.6",
        "tokens published with the paper's noise does not apply",
        "No test of this audit has earned power",
        "dpaudit audit dp-sgd --white-box : tests the noise itself",
        "--strict turns an inconclusive audit into exit code 3",
        "Each image, not each person (or patient). Two images of one person: eps up to 19.",
        "is right at most 78 times in 100; a coin: 50.",
        "could not have shown a wrong claim (no control earned it any power)",
        "Nothing for or against the claim: it rests on the owner's word.",
    ):
        assert words in text, words


def test_embedded_json_is_the_documents(three: tuple[list[Path], str]) -> None:
    paths, page = three
    data = embedded(page)
    runs = data["runs"]
    assert isinstance(runs, list) and [run["summary"]["key"] for run in runs] == ["A", "B", "C"]
    for path, run in zip(claims_first(paths), runs, strict=True):
        release = path / "release"
        files = {file.relative_to(release).as_posix(): file for file in release.rglob("*") if file.is_file()}
        assert run["files"] == {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()}
        own = json.loads(files["audit.json"].read_text())
        own.pop("gallery")
        ((own["fusion"] or {}).get("released") or {}).pop(
            "strip_png_base64", None
        )  # pictures are on the page, not in its data
        assert run["documents"]["audit"] == own
        assert run["documents"]["ledger"] == json.loads(files["ledger.json"].read_text())


def test_ten_runs_stay_small_and_say_what_was_left_out(tmp_path: Path) -> None:
    methods = ["non-private", *["dp-sgd", "dual-priv"] * 5][:10]
    paths = [write_run(tmp_path, method, name=f"run-{index}") for index, method in enumerate(methods)]
    page = page_of(*paths)
    assert len(page.encode()) <= SIZE_WANTED
    assert "to keep the page small" in visible(page)


def test_hostile_text_is_shown_but_never_markup(tmp_path: Path) -> None:
    page = page_of(write_hostile_run(tmp_path, "a</title><script>"), title=HOSTILE[0])
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert page.count("<script") == 2 and "<img src=x" not in page and "<svg onload" not in page
    raw = page.split('id="dpaudit-report">', 1)[1]
    assert raw.index("</script") == raw.index("</script>\n</body>")
    assert "\x00" not in page and "\u202e" not in page and "\x1b" not in page and "\u2028" not in page
    assert "{{ 7*7 }}" in visible(page) and "10,000 characters" in page and "x" * 1000 not in page.split("<script")[0]
    assert "🙂" in page and "אבג" in page


def test_private_parts_stay_out_unless_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    (run / "private").mkdir()
    steps = [{"step": step, "loss": 2.0 / step, "secret": "seven-of-nine"} for step in range(1, 9)]
    (run / "private" / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    photo = Thumbnail(**{**thumbnails()[0].model_dump(), "caption": "a real picture", "kind": "mislabelled"})
    (run / "private" / "gallery.json").write_text(Gallery(thumbnails=(photo,)).model_dump_json())
    plain, curves, pictures = page_of(run), page_of(run, include_private=True), page_of(run, show_examples=True)
    assert "report: training curves" not in visible(plain) and "Training curve</title>" not in plain
    assert "a real picture" not in plain
    assert "report: training curves" in visible(curves) and curves.count("Training curve</title>") == 1
    assert "report: pictures" in visible(pictures) and "a real picture" in pictures
    assert "UNACCOUNTED" in visible(curves) and "UNACCOUNTED" in visible(pictures)
    assert "seven-of-nine" not in curves


def test_contradictions_between_documents_are_notices(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_sums(run / "release")
    assert load_runs([run])[0].notices == ()
    (run / "release" / "SHA256SUMS").unlink()
    other = audit("dp-sgd").model_copy(update={"claim": audit("dp-sgd").claim.model_copy(update={"epsilon": 2.0})})  # type: ignore[union-attr]
    (run / "release" / "audit.json").write_text(other.to_json())
    config = run / "release" / "config.yaml"
    config.write_text(config.read_text().replace("batch-size: 256", "batch-size: 128"))
    notices = load_runs([run])[0].notices
    assert any("another claim" in notice for notice in notices)
    assert any("another configuration" in notice for notice in notices)
    assert all(notice in visible(page_of(run)) for notice in notices)


def test_headline_is_the_best_deciding_bound_within_the_budget(tmp_path: Path) -> None:
    first = audit("non-private").tests[0]
    free = first.model_copy(update={"name": "free", "decides": False, "epsilon_lower": 9.0})
    guess = first.model_copy(update={"name": "estimate", "estimate": True, "epsilon_lower": 9.0})
    family = first.model_copy(update={"name": "gaussian", "assumes": "gaussian", "epsilon_lower": 9.0})
    half = [
        first.model_copy(update={"name": name, "confidence": 0.975, "epsilon_lower": bound})
        for name, bound in (("low", 1.0), ("high", 2.0))
    ]

    def headline(*tests: object) -> tuple[str, float | None]:
        run = write_run(tmp_path, "non-private", name=f"r{len(list(tmp_path.iterdir()))}")
        write_audit(run, "non-private", [canary_game("non-private", tests=tuple(tests))])
        loaded = load_runs([run])[0]
        assert loaded.headline is not None
        return loaded.headline.name, loaded.headline_confidence

    assert headline(first, free, guess, family) == (first.name, 0.95)
    assert headline(*half) == ("high", 0.95)
    # two tests at 95 % each overdraw a 95 % budget: the best of them may not be picked after the fact
    wide = [test.model_copy(update={"confidence": 0.95}) for test in half]
    assert headline(*wide) == ("low", 0.95)


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    base, run = write_run(tmp_path, "non-private"), write_run(tmp_path, "dp-sgd")
    path = run / "release" / "benchmark.json"
    path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    text = visible(page_of(base, run))
    assert "measured on other questions" in text and "of the gain" not in text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("audit.json", '{"schema_version": 1, "verd', "audit.json: not a audit document"),
        ("audit.json", "[]", "audit.json: not a audit document"),
        ("claim.json", '{"name": "package", "version": "1.0"}', "claim.json: not a claim document"),
        ("ledger.json", "\x00\x01", "ledger.json: not a ledger document"),
        ("benchmark.json", b"\xff\xfe\xfa", "benchmark.json: can't be read"),
        ("config.yaml", "method: magic\n", "config.yaml: not a run configuration: method"),
        ("config.yaml", "- a\n- b\n", "config.yaml: not a run configuration"),
        ("claim.json", '{"schema_version": 99, "claim": null}', "schema_version"),
    ],
)
def test_a_foreign_document_is_one_clear_line(tmp_path: Path, file: str, content: str | bytes, words: str) -> None:
    run = write_run(tmp_path, "dp-sgd")
    (run / "release" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        load_runs([run])
    assert words in str(caught.value) and "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges": (0.0, 1.0)}, "edges"),
        ({"counts_in": (-1,) * 24}, "negative"),
        ({"edges": tuple(float(-i) for i in range(25))}, "rise"),
        ({"auc": float("nan")}, "finite number"),
    ],
)
def test_impossible_scores_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    run = write_run(tmp_path, "dp-sgd")
    game = canary_game("dp-sgd")
    broken = game.scores[0].model_copy(update=change)
    raw = game.model_copy(update={"scores": (broken,)}).model_dump(mode="python")
    (run / "release" / "audit.json").unlink()
    (run / "release" / "games" / "01-canaries.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=words):
        load_runs([run])


def test_command_line(tmp_path: Path) -> None:
    paths = write_three(tmp_path / "runs")
    out = tmp_path / "out.html"
    done = commands.run("report", *paths, "-o", out, "--title", "Ours & theirs", "--json")
    assert done.code == 0, done.stderr
    document = ReportDocument.model_validate_json(done.stdout)
    assert document.bytes == out.stat().st_size and document.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [(run.verdict, run.epsilon_lower) for run in document.runs] == [
        ("inconclusive", 0.0),
        ("inconclusive", 0.12),
        ("no claim", 3.41),
    ]
    assert "<h1><bdi>Ours &amp; theirs</bdi></h1>" in out.read_text()
    for arguments, words in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path)], "not a run folder"),
        ([str(paths[0]), str(paths[0] / "release")], "given twice"),
        ([], "Missing argument"),
    ):
        failed = commands.run("report", *arguments)
        assert failed.code == 2 and words in failed.line


def test_release_alone_is_enough(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    assert page_of(run / "release") == page_of(run)
    assert AuditDocument.read(run / "release" / "audit.json").verdict == "inconclusive"


def test_a_page_judges_the_recorded_games_again(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    path = run / "release" / "audit.json"
    path.write_text(path.read_text().replace('"verdict": "inconclusive"', '"verdict": "not refuted"'))
    write_sums(run / "release")  # whoever edits a file can edit its hash
    loaded = load_runs([run])[0]
    assert loaded.verdict == "inconclusive"
    assert loaded.notices == ("audit.json says “not refuted”; its documents give “inconclusive”.",)
    write_audit(run, "dp-sgd")
    path.write_text(path.read_text().replace('"auc": 0.', '"auc": 0.1'))
    write_sums(run / "release")
    assert load_runs([run])[0].notices == ("audit.json differs from what its documents give: summaries of scores.",)
    path.unlink()  # killed between the game and the audit
    loaded = load_runs([run])[0]
    assert loaded.verdict == "inconclusive" and "There is no audit.json" in loaded.notices[0]


def test_a_row_that_came_after_the_audit_counts_and_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    ledger = LedgerDocument.read(run / "release" / "ledger.json")
    later = ledger.model_copy(update={"rows": (*ledger.rows, tuning_row(5))})
    (run / "release" / "ledger.json").write_text(later.to_json())
    loaded = load_runs([run])[0]
    assert loaded.verdict == "unsupported"
    assert "since: hyper-parameter tuning" in loaded.notices[0]


def test_a_game_that_is_gone_or_edited_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game()])
    place = run / "release" / "games" / "01-canaries.json"
    whole = place.read_text()
    place.unlink()
    with pytest.raises(UsageError, match="02-white-box"):
        load_runs([run])
    place.write_text(whole.replace("0.43", "0.44"))
    with pytest.raises(UsageError, match="02-white-box"):
        load_runs([run])
    place.write_text(whole)
    (run / "release" / "games" / "02-white-box.json").unlink()
    with pytest.raises(UsageError, match="02-white-box"):
        load_runs([run])


def test_a_twin_has_coins_of_its_own_and_the_run_may_not(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game()])
    write_sums(run / "release")
    assert load_runs([run])[0].notices == ()
    write_audit(run, "dp-sgd", [canary_game("dp-sgd", coins_sha256="cd" * 32)])
    write_sums(run / "release")
    assert any("coins of game 01-canaries" in notice for notice in load_runs([run])[0].notices)


def test_every_figure_says_what_it_speaks_of_and_the_deciding_one_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    document = write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game()])
    assert document.verdict == "not refuted"
    page = page_of(run)
    text = visible(page)
    assert "The released weights (this model), canaries game: could not have shown" in text
    assert (
        "A retrained twin (the same training, run again by this audit), white-box game: 97 % sure to refute if the "
        "true sigma is 10 % smaller" in text
    )
    own = "(game 02-white-box: the training procedure, not these weights; sigma 1.198, q 0.119, T 168)"
    assert f"Scores in “ white box ” {own}" in text and f"Trade-off of “ white box ” {own}" in text
    assert "02-white-box strongest evidence" in text and "97 % liveness: earned (1.000 C)" in text
    assert "Within claimed mechanism (twin) ≥ 7.7 (sees ≤ 9.9)" in text and "dpaudit audit dp-sgd --contract" in text
    assert "of 1,000 97 %" in text
    many = [run]
    for index in range(11):
        other = write_run(tmp_path, "dual-priv", name=f"run-{index}")
        write_audit(other, "dual-priv", [canary_game("dual-priv"), token_game(), white_box_game()])
        many.append(other)
    small, detail = render(load_page(many), title="T")
    assert len(small.encode()) < SIZE_LIMIT and not detail.documents_embedded
    assert visible(small).count("Trade-off of “ white box ”") == 12
    assert "Trade-off of “ canaries" not in visible(small)


def test_a_refuting_game_is_the_one_that_decides(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    write_audit(run, "dp-sgd", [canary_game("dp-sgd"), white_box_game(e_value=1e9, power=None)])
    text = visible(page_of(run))
    assert (
        load_runs([run])[0].verdict == "refuted"
        and "02-white-box strongest evidence" in text
        and "refutes level" in text
    )


def test_an_audit_of_version_1_is_read_and_earns_no_power(tmp_path: Path) -> None:
    run = write_run(tmp_path, "dp-sgd")
    tree = json.loads(audit("dp-sgd").to_json())
    for name in ("kind", "games", "controls", "log_evidence"):
        del tree[name]
    for test in tree["tests"]:
        for name in ("power_low", "e_value", "share", "level", "refutes", "control"):
            del test[name]
        test["power"] = 0.99
    tree["run"]["audits"] = "these weights"
    del tree["run"]["about"]
    for row in tree["ledger"]:
        del row["stage"]
    tree |= {"schema_version": 1, "verdict": "not refuted"}
    for game in (run / "release" / "games").iterdir():
        game.unlink()
    (run / "release" / "audit.json").write_text(json.dumps(tree))
    loaded = load_runs([run])[0]
    assert loaded.verdict == "inconclusive" and "before controls were required" in loaded.notices[0]
    bare = tmp_path / "told.json"
    bare.write_text(json.dumps(tree))
    stages = {row.path: row.stage for row in load_page([bare]).runs[0].ledger}
    assert stages["gradients"] == "gradients" and stages["answer vocabulary"] is None
