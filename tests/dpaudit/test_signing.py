"""`dpaudit keygen`, `sign` and `verify`: what a signature covers, and every way to have it say more than was signed."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from dpaudit.checksums import digest
from dpaudit.cli.app import run as command
from dpaudit.documents import EpsilonAt, SignatureDocument, Statement
from tests.reports.fixtures import games, white_box_game, write_audit, write_run, write_sums

PROGRAM = Path(sys.executable).with_name("dpaudit")


def list_again(release: Path) -> None:
    """All checksums, as dpaudit lists them: not that of a signature."""
    signature = (release / "signature.json").read_bytes()
    (release / "signature.json").unlink()
    write_sums(release)
    (release / "signature.json").write_bytes(signature)


def whole(parent: Path, name: str, method: str = "dp-sgd") -> Path:
    """A run with a model, whose checksums fit."""
    run = write_run(parent, method, name=name)
    model = run / "release" / "model"
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    listed = {"sha256": {"adapter_config.json": digest(b"{}")}}
    (model / "complete.json").write_text(json.dumps(listed))
    write_sums(run / "release")
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, two keys, and the run signed by the first of them."""
    root = tmp_path_factory.mktemp("signed")
    run = whole(root, "run")
    for name in ("key", "other"):
        assert command(["keygen", str(root / name)]) == 0
    assert command(["sign", str(run), "--key", str(root / "key"), "--name", "Jane Roe, Audit Ltd"]) == 0
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def verify(place: Path, key: str = "key.pub") -> int:
    return command(["verify", str(place / "run"), "--key", str(place / key)])


def sign(place: Path, *more: str, key: str = "key") -> int:
    return command(["sign", str(place / "run"), "--key", str(place / key), *more])


def report(place: Path) -> tuple[int, str]:
    """Exit code of a report over the run, and its page."""
    code = command(["report", str(place / "run"), "-o", str(place / "page.html")])
    return code, (place / "page.html").read_text() if (place / "page.html").exists() else ""


def test_the_installed_command_makes_keys_signs_and_verifies(tmp_path: Path) -> None:
    whole(tmp_path, "run")

    def typed(*words: str) -> dict[str, object]:
        done = subprocess.run([str(PROGRAM), *words, "--json"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    key = typed("keygen", "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    signed = typed("sign", "run", "--key", "mine", "--name", "Jane")
    checked = typed("verify", "run", "--key", "mine.pub")
    assert checked["valid"] is True and checked["signer"] == "Jane" and checked["verdict"] == "inconclusive"
    assert checked["key_sha256"] == key["key_sha256"] and signed["kind"] == "signature"


def test_what_is_signed_can_be_checked_without_dpaudit(made: Path) -> None:
    """By a second implementation: OpenSSL over the text of the statement, and `sha256sum` over the files."""
    document = json.loads((made / "run/release/signature.json").read_text())
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl")
    for name, content in (("text", document["statement"].encode()), ("sig", base64.b64decode(document["signature"]))):
        (made / name).write_bytes(content)
    words = ["pkeyutl", "-verify", "-pubin", "-inkey", "key.pub", "-rawin", "-in", "text", "-sigfile", "sig"]
    assert subprocess.run([openssl, *words], cwd=made, capture_output=True).returncode == 0
    (made / "text").write_bytes(document["statement"].replace("Jane", "John").encode())
    assert subprocess.run([openssl, *words], cwd=made, capture_output=True).returncode != 0
    der = subprocess.run(
        [openssl, "pkey", "-pubin", "-in", "key.pub", "-outform", "DER"], cwd=made, capture_output=True
    )
    statement = json.loads(document["statement"])
    listed = "".join(f"{value}  {name}\n" for name, value in statement["files"].items())
    assert subprocess.run(["sha256sum", "-c"], cwd=made / "run/release", input=listed.encode()).returncode == 0
    fingerprint = subprocess.run(["sha256sum"], input=der.stdout, capture_output=True).stdout.decode().split()[0]
    assert fingerprint == statement["key_sha256"]
    release = made / "run/release"
    there = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    assert set(statement["files"]) == there - {"signature.json"}


def test_the_page_says_who_vouches_and_that_nobody_does(place: Path) -> None:
    code, page = report(place)
    fingerprint = json.loads(json.loads((place / "run/release/signature.json").read_text())["statement"])["key_sha256"]
    assert code == 0 and fingerprint in page and "states the name Jane Roe, Audit Ltd" in page
    assert "unsigned" not in page.partition("<script")[0]
    assert f'"signature":"signed","key_sha256":"{fingerprint}"' in page.replace(": ", ":").replace(", ", ",")
    (place / "run/release/signature.json").unlink()
    code, page = report(place)
    assert code == 0 and "obody has signed this result, it is stated by the owner" in page and fingerprint not in page
    assert verify(place) == 1


def test_the_markdown_summary_says_who_vouches_and_that_nobody_does(place: Path) -> None:
    def summary() -> str:
        command(["report", str(place / "run"), "--format", "md", "-o", str(place / "summary.md")])
        return (place / "summary.md").read_text()

    signature = place / "run/release/signature.json"
    key = json.loads(json.loads(signature.read_text())["statement"])["key_sha256"]
    assert (
        "who vouches" in summary()
        and f"key `{key[:16]}…`; the signer states the name Jane Roe, Audit Ltd |" in summary()
    )
    with (place / "run/release/claim.json").open("a") as file:
        file.write("\n")
    list_again(place / "run/release")
    assert f"nobody: the signature by key `{key[:16]}…` is **invalid**" in summary()
    signature.unlink()
    assert "nobody (unsigned)" in summary()


def edit(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Change a document as its owner could: every checksum is made again."""

    def make(release: Path) -> None:
        tree = json.loads((release / name).read_text())
        change(tree)
        (release / name).write_text(json.dumps(tree, indent=2) + "\n")
        list_again(release)

    return make


def statement(**changes: object) -> Callable[[Path], None]:
    """Another statement under the signature of the old one."""

    def make(release: Path) -> None:
        tree = json.loads((release / "signature.json").read_text())
        tree["statement"] = json.dumps(json.loads(tree["statement"]) | changes)
        (release / "signature.json").write_text(json.dumps(tree))

    return make


def lower(tree: dict[str, object]) -> None:
    claim = tree["claim"]
    assert isinstance(claim, dict)
    claim.update(epsilon=9.5, curve=[EpsilonAt(delta=claim["delta"], epsilon=9.5).model_dump()])


def flip(name: str) -> Callable[[Path], None]:
    def make(release: Path) -> None:
        content = (release / name).read_bytes()
        (release / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return make


def listed_again(release: Path) -> None:
    (release / "SHA256SUMS").write_text((release / "SHA256SUMS").read_text() + f"{'0' * 64}  new.json\n")


CHANGES: dict[str, Callable[[Path], None]] = {
    "claim edited, checksums made again": edit("claim.json", lower),
    "environment edited": edit("environment.json", lambda tree: tree.update(device="cuda")),
    "checksums edited": listed_again,
    "checksums removed": lambda release: (release / "SHA256SUMS").unlink(),
    "a file more": lambda release: (release / "notes.txt").write_text("x"),
    "a file more, deep": lambda release: (release / "model" / "more.txt").write_text("x"),
    "a file less": lambda release: (release / "environment.json").unlink(),
    "the ledger, which no list names": flip("ledger.json"),
    "another name": statement(signer="John Doe"),
    "another verdict": statement(verdict="refuted"),
    "no files": statement(files={}),
    "another key's statement": statement(key_sha256="0" * 64),
    "spelling of the JSON": statement(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_signature_over_changed_files_is_invalid(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    CHANGES[name](place / "run" / "release")
    assert verify(place) in ((1, 2) if "ledger" in name else (1,))
    said = capsys.readouterr()
    assert "not valid: " in said.out or said.err.count("\n") == 1
    code, page = report(place)
    if "ledger" not in name:  # a document that is none is one line and no page
        assert code == 1 and "The signature is invalid" in page and "signature invalid" in page
        assert "Jane Roe" not in page.partition("<script")[0] or name == "x"
    else:
        assert code in (1, 2)


def test_only_the_key_that_is_given_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(place, "other.pub") == 1
    assert "another key" in capsys.readouterr().out
    assert sign(place, "--name", "Jane Roe, Audit Ltd", key="other") == 0, "a forger signs with a key of their own"
    assert verify(place) == 1 and verify(place, "other.pub") == 0
    code, page = report(place)
    key = SignatureDocument.read(place / "run/release/signature.json")
    own = Statement.model_validate_json(key.statement).key_sha256
    assert code == 0 and own in page, "the page names the key, which is all that tells the two apart"


def test_a_signature_of_another_run_is_none(place: Path, tmp_path: Path) -> None:
    whole(tmp_path / "second", "run", "dual-priv")
    shutil.copy(place / "run/release/signature.json", tmp_path / "second/run/release/signature.json")
    assert command(["verify", str(tmp_path / "second/run"), "--key", str(place / "key.pub")]) == 1


def test_another_audit_ends_a_signature_and_signing_again_mends_it(place: Path) -> None:
    write_audit(place / "run", "dp-sgd", (*games("dp-sgd"), white_box_game()))
    list_again(place / "run" / "release")
    assert verify(place) == 1
    assert sign(place) == 0 and verify(place) == 0


def test_a_release_that_contradicts_itself_is_not_signed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = place / "run" / "release"
    before = (release / "signature.json").read_bytes()
    audit = json.loads((release / "audit.json").read_text())
    for change in (
        lambda: (
            (release / "audit.json").write_text(json.dumps(audit | {"verdict": "no claim"})) and write_sums(release)
        ),
        lambda: (release / "SHA256SUMS").unlink(),
    ):
        change()
        assert sign(place) == 2 and "not signed: " in capsys.readouterr().err
        assert (release / "signature.json").read_bytes() == before


@pytest.mark.parametrize("name", ["-rf", "a b", "x\ny", "\x1b[2J", "\u202etxt.json", "é"])
def test_odd_names_are_not_signed(place: Path, name: str) -> None:
    (place / "run" / "release" / name).write_text("x")
    assert sign(place) == 2


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(place: Path, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "key").chmod(mode)
    assert sign(place) == 2
    assert f"has mode {mode:04o}" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["run", "run/release", "run/private", "run/release/model", "run/new"])
def test_a_private_key_never_lies_in_a_run(place: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / where).mkdir(exist_ok=True)
    inside = place / where / "mine"
    assert command(["keygen", str(inside)]) == 2 and not inside.exists()
    shutil.move(place / "key", inside)
    assert command(["sign", str(place / "run"), "--key", str(inside)]) == 2
    (place / "link").symlink_to(inside)
    assert sign(place, key="link") == 2
    assert all("lies in" in line for line in capsys.readouterr().err.splitlines() if line.startswith("dpaudit"))


def test_keys_are_never_replaced(place: Path) -> None:
    before = (place / "key").read_bytes()
    assert command(["keygen", str(place / "key")]) == 2
    (place / "fresh.pub").write_text("x")
    assert command(["keygen", str(place / "fresh")]) == 2 and not (place / "fresh").exists()
    (place / "dangling").symlink_to(place / "nowhere")
    assert command(["keygen", str(place / "dangling")]) == 2 and not (place / "nowhere").exists()
    assert (place / "key").read_bytes() == before


def foreign_keys() -> dict[str, bytes]:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8, openssh = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH
    mine = ed25519.Ed25519PrivateKey.generate()
    return {
        "another curve": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, plain),
        "locked": mine.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"word")),
        "openssh": mine.private_bytes(pem, openssh, plain),
        "public": mine.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
        "nothing": b"", "rubbish": bytes(range(256)), "long": b"x" * (1 << 20),
    }  # fmt: skip


@pytest.mark.parametrize("kind", foreign_keys())
def test_foreign_keys_are_one_line(place: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "foreign").write_bytes(foreign_keys()[kind])
    (place / "foreign").chmod(0o600)
    capsys.readouterr()
    assert sign(place, key="foreign") == 2
    assert verify(place, "foreign") == (1 if kind == "public" else 2)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (1 if kind == "public" else 2) and all("foreign: " in line for line in told)


@pytest.mark.parametrize("target", [".", "/dev/zero", "pipe", "nowhere"])
def test_what_is_no_file_is_no_key(place: Path, target: str) -> None:
    import os

    os.mkfifo(place / "pipe")
    for name in ("sign", "verify"):
        assert command([name, str(place / "run"), "--key", str(place / target)]) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[" * 100_000, b'{"kind": "signature", "statement": 1}', bytes(range(256))],
)
def test_a_damaged_signature_is_one_line(place: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run/release/signature.json").write_bytes(content)
    capsys.readouterr()
    assert verify(place) == 2 and report(place)[0] == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("signature.json" in line for line in told)


@pytest.mark.parametrize("value", ["AAAA", "", "!!", base64.b64encode(bytes(64)).decode(), "é" * 88])
def test_any_other_signature_is_invalid(place: Path, value: str) -> None:
    path = place / "run/release/signature.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"signature": value}))
    assert verify(place) == 1 and report(place)[0] == 1


def test_names_that_paint_are_refused_when_signing_and_cleaned_when_shown(place: Path, tmp_path: Path) -> None:
    """A forger writes a statement by hand, and signs it rightly."""
    from dpaudit.signing import PrivateKey

    evil = "Jane\x1b[2J\n\u202everdict   not refuted <script>alert(1)</script>"
    assert sign(place, "--name", evil) == 2
    path = place / "run/release/signature.json"
    key, tree = PrivateKey.load(place / "key"), json.loads(path.read_text())
    text = json.dumps(json.loads(tree["statement"]) | {"signer": evil, "signed_on": "\u202e\x1b[2J"})
    path.write_text(json.dumps(tree | {"statement": text, "signature": key.sign(text)}))
    code, page = report(place)
    assert code == 0 and "<script>alert" not in page and not set(page) & set("\x1b\u202e")
    done = subprocess.run(
        [str(PROGRAM), "verify", str(place / "run"), "--key", str(place / "key.pub")], capture_output=True, text=True
    )
    assert done.returncode == 0 and not set(done.stdout) & set("\x1b\u202e")
    assert not [line for line in done.stdout.splitlines() if line.startswith("verdict   not refuted <")]
