"""Damaged files of a run are named; a kill between two writes raises no false alarm; `sha256sum -c` agrees."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from dpaudit import atomic, checksums
from dpaudit.documents import Claim, ClaimDocument, EnvironmentDocument, LedgerDocument, LedgerRow
from dpaudit.errors import UsageError
from dpaudit.ledger import Ledger
from dpaudit.randomness import Key
from dpaudit.runs import RunFolder

CLAIM = ClaimDocument(claim=Claim(epsilon=8.0, delta=1e-5, relation="add-remove", unit="image"))
OTHER = ClaimDocument(claim=None, reasons=("no claim",))
ENVIRONMENT = EnvironmentDocument(dpaudit="0", python="3", platform="x", device="cpu", packages={})
ROW = LedgerRow(path="gradients", status="accounted", explanation="Clipped and noised.", evidence="sigma = 1")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run")
    atomic.write_text(run.config, "method: dp-sgd\n")
    run.write(CLAIM)
    Ledger.create(run.ledger, [ROW], None, 10, 1e-5, run.seal(run.config)).start_step(1, 0.5)
    atomic.write_bytes(run.model / "adapter.safetensors", bytes(100))
    run.write(ENVIRONMENT)
    run.finish_model()
    return run


def flips(path: Path) -> list[bytes]:
    """The content with each bit flipped."""
    content = path.read_bytes()
    return [
        content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
        for at in range(len(content))
        for bit in range(8)
    ]


def test_every_flipped_bit_of_a_claim_is_noticed(run: RunFolder) -> None:
    whole = run.claim.read_bytes()
    for damaged in flips(run.claim)[::13]:
        run.claim.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"claim\.json") as caught:
            ClaimDocument.read(run.claim)
        assert "\n" not in str(caught.value)
    run.claim.write_bytes(whole)
    assert ClaimDocument.read(run.claim) == CLAIM


def test_every_flipped_bit_of_a_ledger_is_noticed_or_changes_nothing(run: RunFolder) -> None:
    content = LedgerDocument.read(run.ledger)
    for damaged in flips(run.ledger)[::11]:
        run.ledger.write_bytes(damaged)
        try:
            assert LedgerDocument.read(run.ledger) == content  # white space
        except UsageError as error:
            assert "ledger.json" in str(error) and "\n" not in str(error)


def test_a_ledger_set_back_by_hand_is_refused(run: RunFolder) -> None:
    tree = json.loads(run.ledger.read_text())
    tree["spent"]["steps_started"] = 0
    run.ledger.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match="damaged"):
        Ledger.load(run.ledger)


def test_a_flipped_configuration_is_noticed_on_opening(run: RunFolder) -> None:
    assert RunFolder.open(run.path) == run
    for damaged in flips(run.config)[::5]:
        run.config.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"config\.yaml: damaged"):
            RunFolder.open(run.path)


def test_every_flipped_bit_of_a_key_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "noise.key"
    key = Key.from_seed(3)
    key.save(path)
    noticed = 0
    for damaged in flips(path)[::3]:
        path.write_bytes(damaged)
        try:
            assert Key.load(path) == key
        except UsageError as error:
            noticed += 1
            assert key.material.hex()[:8] not in str(error)
    assert noticed > 8 * 64 / 3  # at least every bit of the key itself


def test_damaged_checkpoints_are_dropped_and_older_ones_kept(run: RunFolder) -> None:
    for step in (1, 2):
        tensors = {"w": torch.arange(6.0), "half": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(step)}
        atomic.write_tensors(run.checkpoints / f"step-{step}.safetensors", tensors, {"step": str(step)})
    newest = run.checkpoints / "step-2.safetensors"
    assert run.discard_damaged_checkpoints() == ()
    whole = newest.read_bytes()
    for damaged in flips(newest)[:: 8 * 3]:
        newest.write_bytes(damaged)
        if run.discard_damaged_checkpoints():
            assert not newest.exists()
        else:  # a bit of the header that means nothing (a name in the metadata is covered by its reader)
            with_care = atomic.tensors_intact(newest)
            assert with_care
    newest.write_bytes(whole[: len(whole) // 2])
    assert run.discard_damaged_checkpoints() == ("step-2.safetensors",)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-1.safetensors"]


def test_damaged_frames_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    frame = pd.DataFrame({"id": [f"r{index}" for index in range(200)], "score": [0.5 * index for index in range(200)]})
    atomic.write_frame(path, frame)
    pd.testing.assert_frame_equal(atomic.read_frame(path), frame)
    whole = path.read_bytes()
    changed = 0
    for at in range(4, len(whole) - 4, 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = atomic.read_frame(path)
            changed += not found.equals(frame)
        except UsageError as error:
            assert "scores.parquet" in str(error)
    assert changed == 0
    with pytest.raises(UsageError, match="missing"):
        atomic.read_frame(tmp_path / "none.parquet")


def test_a_kill_between_two_writes_is_no_damage(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` announces, replaces, lists: stopped after each of its file operations, both readings are accepted."""

    class Stop(BaseException):
        pass

    original, seen = atomic.write_bytes, 0
    for limit in range(4):
        calls = iter(range(100))

        def counted(path: Path, content: bytes, mode: int = 0o644) -> None:
            if next(calls) == limit:  # noqa: B023 (used at once)
                raise Stop
            original(path, content, mode)

        monkeypatch.setattr(atomic, "write_bytes", counted)
        try:
            run.write(OTHER if limit % 2 == 0 else CLAIM)
        except Stop:
            seen += 1
        monkeypatch.setattr(atomic, "write_bytes", original)
        assert ClaimDocument.read(run.claim) in (CLAIM, OTHER)
        if limit < 2:
            run.write(ENVIRONMENT)  # the next write settles the list
        else:
            with run.lock():  # so does the next process that takes the run
                pass
        assert not (run.release / checksums.NEXT).exists()
        assert ClaimDocument.read(run.claim) in (CLAIM, OTHER)
        damaged = run.claim.read_bytes().replace(b"claim", b"clajm", 1)
        whole = run.claim.read_bytes()
        run.claim.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged"):
            ClaimDocument.read(run.claim)
        run.claim.write_bytes(whole)
    assert seen == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_agrees(run: RunFolder) -> None:
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=run.release, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert listed == {"config.yaml", "claim.json", "environment.json", "model/adapter.safetensors"}


def test_documents_from_elsewhere_have_no_list(tmp_path: Path) -> None:
    atomic.write_document(tmp_path / "claim.json", CLAIM)
    assert ClaimDocument.read(tmp_path / "claim.json") == CLAIM
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\x00 nonsense\n" * 10)
    assert ClaimDocument.read(tmp_path / "claim.json") == CLAIM
