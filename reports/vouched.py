"""Who vouches for a release: the statement that is signed, and what a signature beside the files is worth.

A signature says that the holder of a key saw exactly these files, and with them this claim and this verdict. It says
nothing about whether they are true, and a key by itself says nothing about whose it is (docs/threat-model.md).
"""

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from dpaudit.documents import Claim, SignatureDocument, Statement, VerificationDocument
from dpaudit.errors import UsageError
from dpaudit.signing import PrivateKey, PublicKey
from reports.text import clean

if TYPE_CHECKING:
    from reports.inputs import RunReport

SIGNATURE = "signature.json"
MOST_NAMED = 5
STATED = "stated by the owner"
UNSIGNED = f"nobody has signed this result, it is {STATED}"
# What a name below release/ may be, so that a list of them reads as nothing else.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Vouched:
    """What is known of a release's signer. said: a line to stand beside the verdict; reasons: why it is invalid."""

    status: Literal["unsigned", "signed", "invalid"] = "unsigned"
    said: str = UNSIGNED
    reasons: tuple[str, ...] = ()
    statement: Statement | None = None
    key: PublicKey | None = None

    @property
    def notices(self) -> tuple[str, ...]:
        """What a page says above its verdicts."""
        return (f"The signature is invalid: {'; '.join(self.reasons)}.",) if self.reasons else ()


def claimed(claim: Claim | None) -> str:
    """A claim in one line, as it is signed."""
    if claim is None:
        return "no claim"
    spent = f"eps = {claim.epsilon:.6g} at delta = {claim.delta:.6g}"
    return clean(f"{spent}, relation {claim.relation}, unit {clean(claim.unit, 300)}", 900)


def judged(run: "RunReport") -> str:
    """A verdict in one line, as it is signed: that of the recorded games, not the one that audit.json states."""
    return run.verdict or "not audited"


def check(folder: Path, run: "RunReport") -> Vouched:
    """The signature of a release against its files, its claim and its verdict as they are now.

    UsageError where `signature.json` is no document of that kind.
    """
    path = folder / SIGNATURE
    if not path.exists():
        return Vouched()
    document = SignatureDocument.read(path)
    key = PublicKey.parse(document.public_key.encode(), f"{path}: public_key")
    statement = _statement(document, key)
    if isinstance(statement, str):
        return Vouched("invalid", f"signature invalid; {STATED}", (statement,), key=key)
    reasons = tuple(_changes(statement, run))
    if reasons:
        said = f"signature invalid (files, claim or verdict changed); {STATED}"
        return Vouched("invalid", said, reasons, statement, key)
    name = f"the signer states the name {clean(statement.signer, 80)}" if statement.signer else "no name is stated"
    said = f"signed on {clean(statement.signed_on, 10)} with the key of SHA-256 {key.sha256}; {name}"
    return Vouched("signed", said, (), statement, key)


def _statement(document: SignatureDocument, key: PublicKey) -> Statement | str:
    """What was signed, once the signature holds; otherwise why it doesn't."""
    if not key.signed(document.statement, document.signature):
        return "it is not that of its key over its statement"
    try:
        statement = Statement.model_validate_json(document.statement)
    except ValidationError:
        return "what was signed is no statement that this version reads"
    if statement.key_sha256 != key.sha256:
        return "its statement names another key"
    return statement


def _changes(statement: Statement, run: "RunReport") -> Iterator[str]:
    """Where a release is no longer what was signed."""
    files = _hashes(run)
    both = statement.files.keys() & files.keys()
    yield from _about("changed since", [name for name in both if statement.files[name] != files[name]])
    yield from _about("missing since", list(statement.files.keys() - files.keys()))
    yield from _about("not signed", list(files.keys() - statement.files.keys()))
    for what, signed, now in (
        ("claim", statement.claim, claimed(run.claim)),
        ("verdict", statement.verdict, judged(run)),
    ):
        if signed != now:
            yield f"the {what} that was signed is “{clean(signed, 200)}”, the files give “{clean(now, 200)}”"


def _about(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        yield f"{what}: {', '.join(clean(name, 60) for name in sorted(names)[:MOST_NAMED])}{more}"


def _hashes(run: "RunReport") -> dict[str, str]:
    return {file.name: file.sha256 for file in run.files if file.name != SIGNATURE}


def sign(run: "RunReport", key: PrivateKey, *, name: str, today: datetime.date) -> SignatureDocument:
    """A signature over a release as it was read. UsageError where its files contradict each other."""
    if run.unfit:
        raise UsageError(f"run {run.name}: not signed: {clean(run.unfit[0], 400)}")
    files = _hashes(run)
    odd = next((file for file in files if not _NAME.fullmatch(file)), None)
    if odd is not None:
        raise UsageError(f"run {run.name}: not signed: release/ holds {clean(odd, 80)!r}, which is no file of a run")
    statement = Statement(
        format="dpaudit-release-signature-v1",
        signer=name,
        key_sha256=key.public.sha256,
        signed_on=today.isoformat(),
        claim=claimed(run.claim),
        verdict=judged(run),
        files=files,
    )
    text = statement.model_dump_json(indent=1)
    return SignatureDocument(statement=text, public_key=key.public.pem, signature=key.sign(text))


def verify(run: "RunReport", key: PublicKey) -> VerificationDocument:
    """Whether `key` vouches for a release as it is; a signature by any other key is none."""
    found = run.vouched
    if found.status == "unsigned":
        return VerificationDocument(valid=False, reasons=("the release is not signed",), key_sha256=key.sha256)
    reasons = found.reasons
    if found.key is None or found.key.sha256 != key.sha256:
        other = found.key.sha256 if found.key is not None else "unknown"
        reasons = (f"it was made with another key, of SHA-256 {other}", *reasons)
    reasons = (*reasons, *(run.unfit if not reasons else ()))
    statement = found.statement if not reasons else None
    return VerificationDocument(
        valid=not reasons,
        reasons=reasons,
        key_sha256=key.sha256,
        signer=statement.signer if statement is not None else None,
        signed_on=statement.signed_on if statement is not None else None,
        claim=statement.claim if statement is not None else None,
        verdict=statement.verdict if statement is not None else None,
    )
