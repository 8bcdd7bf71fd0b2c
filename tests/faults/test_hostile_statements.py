"""What an owner states, edited with every checksum made again: claims, verdicts, games, twins, and broken documents.

Whole commands on copies of an audited run. None of them ends as `not refuted`, and none in a traceback.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpaudit import checksums
from dpaudit.documents import GameDocument
from tests.faults import hostile_files as hands
from tests.faults.test_hostile_runs import EVIL, Case, case, untouched, world

__all__ = ["case", "world"]  # fixtures

UNSEEN = set("\x1b\x9b\x07\r\u202e\u2066\u2028")


def claims(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["claim"].update(changes)


CLAIMS: dict[str, dict[str, object]] = {
    "eps": {"epsilon": 0.1, "curve": []},
    "eps at another delta": {"curve": [{"delta": 1e-9, "epsilon": 0.1}]},
    "a smaller delta": {"delta": 1e-12, "curve": []},
    "fewer steps": {"steps": 1},
    "more noise": {"noise_multiplier": 10.0},
    "smaller batches": {"sample_rate": 1e-6, "expected_batch_size": 1e-4},
    "shuffled batches": {"sampling": "fixed"},
    "another relation": {"relation": "zero-out"},
    "another bound of the norm": {"max_grad_norm": 0.01},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_an_edited_claim_is_unsupported_wherever_it_is_read(case: Case, name: str) -> None:
    case.edit("claim.json", claims(**CLAIMS[name]))
    ended = case.type("audit", str(case.run), "--canaries", "--json")
    assert ended.code == 1 and json.loads(ended.out)["verdict"] == "unsupported", ended.out[-2000:]
    assert case.report("--format", "html", "--format", "junit", "-o", str(case.place / "junit.xml")).code == 0
    assert 'class="notice"' in case.page and "<failure" in (case.place / "junit.xml").read_text()


def better(tree: dict[str, Any]) -> None:
    """What audit.json says becomes what its owner wants, with evidence to go with it."""
    tree.update(verdict="not refuted", reasons=["This claim was tested and not refuted."], log_evidence=-5.0)
    for test in tree["tests"]:
        test.update(power=0.99, p_value=0.7, e_value=0.1, refutes=False, control="a control")


@pytest.mark.parametrize("removed", [False, True])
def test_an_edited_verdict_is_judged_again(case: Case, removed: bool) -> None:
    """removed: with SHA256SUMS, which would otherwise be made again."""
    case.edit("audit.json", better)
    if removed:
        (case.run / "release" / checksums.SUMS).unlink()
    ended = case.report("--json")
    (run,) = json.loads(ended.out)["runs"]
    assert ended.code == 0 and run["verdict"] == "inconclusive", run
    assert "audit.json says “not refuted”; its documents give “inconclusive”" in case.page


@pytest.mark.parametrize("sums", [True, False])
def test_an_edited_game_is_noticed(case: Case, sums: bool) -> None:
    """A small p becomes a large one, with and without its checksum: the audit counts another game."""
    (game,) = sorted((case.run / "release" / "games").iterdir())
    tree = json.loads(game.read_text())
    before = GameDocument.model_validate(tree).sha256()
    tree.update(alternative="none", kept=0.9)
    for test in tree["tests"]:
        test.update(p_value=0.7, e_value=0.1, refutes=False, power=0.99)
    assert GameDocument.model_validate(tree).sha256() != before
    game.write_text(json.dumps(tree))
    if sums:
        case.list_again()
    for command in (
        ("report", str(case.run), "-o", str(case.place / "p.html")),
        ("audit", str(case.run), "--contract"),
    ):
        ended = case.type(*command)
        assert ended.code == 2 and "games/" in ended.line, ended.err


def test_a_planted_game_does_not_count(case: Case) -> None:
    """A second game, chained and listed, whose figures nobody played: the page shows it, and its audit does not."""
    (first,) = sorted((case.run / "release" / "games").iterdir())
    tree = json.loads(first.read_text())
    before = GameDocument.model_validate(tree).sha256()
    tree.update(number=2, previous_sha256=before)
    name = first.with_name("02-canaries.json")
    name.write_text(GameDocument.model_validate(tree).to_json())
    listed = case.run / "release" / checksums.SUMS
    sums = checksums.read(listed) | {f"games/{name.name}": checksums.digest(name.read_bytes())}
    listed.write_text(checksums.write(sums))
    assert case.report().code == 0
    assert (
        "audit.json counts 1 of 2 recorded games" in case.page
        and "obody has signed this result, it is stated by the owner" in case.page
    )


def test_a_forged_twin_earns_nothing(case: Case) -> None:
    """A finished twin of another method with forged scores, weights that are no model, and a claim of eps 2."""
    shutil.rmtree(case.run)
    shutil.copytree(case.world.root / "finished" / "plain", case.run)
    for name in ("twin-canaries", "twin-white-box"):
        twin = case.run / name
        shutil.copytree(case.world.root / "finished" / "run", twin)
        tree = json.loads((twin / "release/claim.json").read_text())
        tree["claim"].update(epsilon=2.0)
        (twin / "release/claim.json").write_text(json.dumps(tree))
        listed = twin / "release" / checksums.SUMS
        sums = {key: checksums.digest((twin / "release" / key).read_bytes()) for key in checksums.read(listed)}
        listed.write_text(checksums.write(sums))
    ended = case.type("audit", str(case.run), "--canaries", "--json")
    document = json.loads(ended.out)
    assert document["verdict"] != "not refuted" and all(test["power"] is None for test in document["tests"]), document
    assert [game["supplied"] for game in document["games"]] == [True]
    ended = case.type("audit", str(case.run), "--white-box", "--count", "30", "--json")
    assert ended.code in (0, 1), ended.err
    played = [game for game in json.loads(ended.out)["games"] if "white" in game["name"]]
    assert [game["supplied"] for game in played] == [False], "a white-box twin is trained by the audit itself"
    assert (case.run / "twin-white-box-2").is_dir()


def perfect(twin: Path) -> None:
    """Scores that tell every coin."""
    import pandas as pd

    path = twin / "private/scores.parquet"
    frame = pd.read_parquet(path)
    frame.assign(score=frame["member"].astype(float)).to_parquet(path)


def listed_again(twin: Path) -> None:
    listed = twin / "release" / checksums.SUMS
    sums = {key: checksums.digest((twin / "release" / key).read_bytes()) for key in checksums.read(listed)}
    listed.write_text(checksums.write(sums))


def lowered(twin: Path) -> None:
    tree = json.loads((twin / "release/claim.json").read_text())
    tree["claim"].update(epsilon=2.0, curve=[])
    (twin / "release/claim.json").write_text(json.dumps(tree))


def renamed(twin: Path) -> None:
    """Its configuration says that it is a twin of this very run, as another seed."""
    path = twin / "release/config.yaml"
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))


FORGERIES: dict[str, Callable[[Path], object]] = {
    "as it is": lambda twin: None,
    "perfect scores": perfect,
    "weights that are no model": lambda twin: (twin / "release/model/adapter_model.safetensors").write_bytes(b"x" * 99),
    "no weights": lambda twin: shutil.rmtree(twin / "release/model"),
    "a smaller claim": lowered,
    "another configuration": renamed,
    "no coins": lambda twin: (twin / "private/coins.parquet").unlink(),
    "no key": lambda twin: (twin / "private/noise.key").unlink(),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_supplied_twin_earns_anything(case: Case, name: str) -> None:
    shutil.rmtree(case.run)
    shutil.copytree(case.world.root / "finished" / "plain", case.run)
    twin = case.run / "twin-canaries"
    shutil.copytree(case.world.root / "finished" / "run", twin)
    FORGERIES[name](twin)
    if name not in ("no weights",):
        listed_again(twin)
    ended = case.type("audit", str(case.run), "--canaries", "--json")
    assert ended.code in (0, 1, 2, 3), ended.err
    if ended.code == 2:
        assert len([line for line in ended.err.splitlines() if line.startswith("dpaudit: ")]) == 1, ended.err
        return
    document = json.loads(ended.out)
    assert document["verdict"] != "not refuted" and all(test["power"] is None for test in document["tests"]), document
    played = [game["supplied"] for game in document["games"]]
    own = (case.run / "twin-canaries-2").is_dir()
    assert played == [not own], "supplied, or trained by this audit beside it"


def test_strings_of_all_documents_paint_nothing(case: Case) -> None:
    """Every string that a document of a release may hold, as far as the document stays one, is a hostile text."""
    from dpaudit.documents import AuditDocument, BenchmarkDocument, ClaimDocument, EnvironmentDocument, LedgerDocument

    kinds = (AuditDocument, BenchmarkDocument, ClaimDocument, EnvironmentDocument, LedgerDocument)
    changed = 0
    for kind in kinds:
        path = case.run / "release" / f"{kind.named()}.json"
        if not path.exists():
            continue
        tree = json.loads(path.read_text())
        for node, key in list(strings(tree)):
            kept = node[key]
            node[key] = EVIL
            try:
                kind.model_validate(tree)
                changed += 1
            except ValueError:
                node[key] = kept
        case.edit(path.name, lambda old, tree=tree: old.update(tree))  # type: ignore[misc]
    assert changed > 40
    page = str(case.place / "page.html")
    names = {"html": "page.html", "md": "m.md", "junit": "j.xml", "sarif": "s", "json": "d.json", "card": "c.md"}
    more = [part for form, name in names.items() for part in ("--format", form, "-o", f"{case.place}/{name}")]
    for command in (
        ["report", str(case.run), *more],
        ["report", str(case.run), "-o", page, "--json"],
        ["audit", str(case.run), "--canaries"],
        ["benchmark", str(case.run), "--limit", "0"],
        ["sign", str(case.run), "--key", str(case.place / "nokey")],
    ):
        ended = case.type(*command)
        for text in (ended.out, ended.err):
            assert not set(text) & UNSEEN, command
            assert not [line for line in text.splitlines() if line.lstrip().startswith("verdict   not refuted")]
    for written in case.place.glob("*.*"):
        assert sorted(set(written.read_text()) & UNSEEN) == [], written


def strings(tree: Any) -> Any:
    """Every place of a string in a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        if isinstance(tree[key], str) and key != "sha256":
            yield tree, key
        elif isinstance(tree[key], dict | list):
            yield from strings(tree[key])


FILES = (
    "release/claim.json", "release/ledger.json", "release/audit.json", "release/config.yaml", "release/SHA256SUMS",
    "release/environment.json", "release/games/01-canaries.json", "release/model/complete.json",
    "release/model/adapter_config.json", "release/model/adapter_model.safetensors", "release/signature.json",
)  # fmt: skip


@pytest.mark.parametrize("kind", hands.KINDS)
def test_a_broken_file_of_a_run_is_one_line_or_a_notice(case: Case, kind: str) -> None:
    """A third of the files of a release, each kind another third: a page with a notice, or one line and exit code 2."""
    whole = case.place / "whole"
    shutil.copytree(case.run, whole)
    for name in FILES[list(hands.KINDS).index(kind) % 3 :: 3]:
        if not (case.run / name).exists():
            (case.run / name).write_text("{}")
        hands.KINDS[kind](name)(case.run)
        ended = case.report()
        if ended.code == 0:
            quiet = name == "release/signature.json" and kind == "gone"
            assert quiet or 'class="notice"' in case.page, (name, ended.err)
        else:
            assert ended.code in (2, 4) and len(ended.err.strip().splitlines()) == 1, (name, ended.err)
        shutil.rmtree(case.run)
        shutil.copytree(whole, case.run)


LINKS = {"dangling": "nowhere", "itself": "adapter_config.json", "up": "..", "device": "/dev/zero", "outside": "../x"}


@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("name", ["release/signature.json", "release/model/adapter_config.json", "release/games/a"])
def test_links_of_any_kind_are_refused_by_those_who_sign(case: Case, name: str, target: str) -> None:
    assert case.type("keygen", str(case.place / "key")).code == 0
    path = case.run / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    for command in (
        ["sign", str(case.run), "--key", str(case.place / "key")],
        ["verify", str(case.run), "--key", str(case.place / "key.pub")],
        ["report", str(case.run), "-o", str(case.place / "page.html")],
    ):
        ended = case.type(*command)
        assert ended.code == 2 and "symbolic link" in ended.line, ended.err
    assert path.is_symlink() and not (case.place / "page.html").exists()


def test_a_signed_run_that_was_changed_says_so(case: Case) -> None:
    """The real thing, trained and audited: signed, verified; then other weights with all their hashes made again."""
    key = case.place / "key"
    assert case.type("keygen", str(key)).code == 0
    assert case.type("sign", str(case.run), "--key", str(key), "--name", "Jane").code == 0
    assert case.type("verify", str(case.run), "--key", f"{key}.pub").code == 0
    model = case.run / "release" / "model"
    weights = (model / "adapter_model.safetensors").read_bytes()
    (model / "adapter_model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    tree = json.loads((model / "complete.json").read_text())
    tree["sha256"]["adapter_model.safetensors"] = checksums.digest((model / "adapter_model.safetensors").read_bytes())
    (model / "complete.json").write_text(json.dumps(tree))
    case.list_again()
    ended = case.type("verify", str(case.run), "--key", f"{key}.pub")
    assert ended.code == 1 and "adapter_model.safetensors" in ended.out
    ended = case.report()
    assert ended.code == 1 and "The signature is invalid" in case.page
    audit = case.type("audit", str(case.run), "--canaries")
    assert audit.code in (0, 1) and (case.run / "release/signature.json").exists(), "nobody's signature is removed"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_key_of_somebody_else_is_refused(case: Case) -> None:
    assert case.type("keygen", str(case.place / "key")).code == 0
    os.chown(case.place / "key", 12345, 12345)
    ended = case.type("sign", str(case.run), "--key", str(case.place / "key"))
    assert ended.code == 2 and "belongs to another user" in ended.line
    assert not (Path(case.run) / "release/signature.json").exists()


SWEPT = ("lock", "logs", "logs/job-0000.log", "runs", "runs/cell")


@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
@pytest.mark.parametrize("name", SWEPT)
def test_links_in_a_sweep_lead_nowhere(case: Case, name: str, target: str) -> None:
    """A folder that was made ready for a sweep: no log, lock or run of it is written elsewhere."""
    sweep, leads = case.place / "sweep", {"folder": "", "file": "thesis.tex", "nothing": "new"}
    (sweep / name).parent.mkdir(parents=True)
    (sweep / name).symlink_to(case.outside / leads[target])
    grid = case.place / "grid.yaml"
    data = {"data.path": str(case.world.data), "data.train": "train.jsonl", "data.test": "test.jsonl"}
    settings = {"model.path": str(case.world.model), "training.steps": 2, "training.batch-size": 8, **data}
    grid.write_text(json.dumps({"name": "x", "settings": settings}))
    ended = case.type("sweep", str(grid), "--out", str(sweep))
    told = [line for line in ended.err.splitlines() if line.startswith("dpaudit: ")]
    assert ended.code in (2, 4) and told == [ended.line], ended.err
    assert untouched(case) and not (sweep / "sweep.json").exists()


def test_a_sweep_shows_no_run_of_others(case: Case) -> None:
    sweep = case.place / "sweep"
    (sweep / "runs").mkdir(parents=True)
    cell = {"folder": "x", "configuration": "x", "seed": 0, "config_sha256": "0", "state": "finished"}
    row = dict.fromkeys(("epsilon", "delta", "exact_match"))
    row |= {"configuration": "x", "series": "x", "method": "dp-sgd", "swept": {}, "seeds": [0]}
    tree = {"kind": "sweep", "schema_version": 2, "name": "x", "finished": True, "grid": {"grid": {"a": 7}, "x": 1},
            "overrides": [], "seeds": [0], "rows": [row], "cells": [cell],
            "sample_sha256": None, "ledger": []}  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps(tree))
    (sweep / "runs" / "x").symlink_to(case.run)
    ended = case.type("report", str(sweep), "-o", str(case.place / "page.html"))
    assert ended.code == 2 and "runs/x: is a symbolic link" in ended.line, ended.err
    (sweep / "runs" / "x").unlink()
    ended = case.type("sweep", "--resume", "--out", str(sweep))
    assert ended.code == 2 and "sweep.json: " in ended.line, ended.err
