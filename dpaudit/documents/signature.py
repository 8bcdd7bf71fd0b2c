"""Who vouches for a release: what is signed, the signature beside it, and what became of it when it was checked."""

from typing import Literal

from pydantic import Field

from dpaudit.documents.base import Document, Part


class Statement(Part):
    """What a signer signs, as JSON: every file of a release by its hash, and the claim and verdict that they amount to.

    It holds text alone, so that no reader's numbers differ from the signer's.
    """

    format: Literal["dpaudit-release-signature-v1"]
    signer: str = Field(max_length=200, description="Who signs, by their own account; nothing proves it.")
    key_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Fingerprint of the key: SHA-256 of its DER form.")
    signed_on: str = Field(max_length=10, description="Day, by the signer's clock.")
    claim: str = Field(max_length=1000)
    verdict: str = Field(max_length=100)
    files: dict[str, str] = Field(
        max_length=200_000, description="Name below release/ -> SHA-256; all but the signature."
    )


class SignatureDocument(Document):
    """`release/signature.json`."""

    kind: Literal["signature"] = "signature"
    statement: str = Field(max_length=1 << 24, description="The signed bytes, as UTF-8: a `Statement` as JSON.")
    public_key: str = Field(max_length=1000, description="Ed25519, PEM (RFC 8410).")
    signature: str = Field(max_length=100, description="Base64, 64 bytes (RFC 8032).")


class VerificationDocument(Document):
    """What `dpaudit verify --json` prints."""

    kind: Literal["verification"] = "verification"
    valid: bool
    reasons: tuple[str, ...] = Field(description="Why the signature is not valid; empty where it is.")
    key_sha256: str = Field(description="Fingerprint of the key that was given.")
    signer: str | None = None
    signed_on: str | None = None
    claim: str | None = None
    verdict: str | None = None


class KeyDocument(Document):
    """What `dpaudit keygen --json` prints."""

    kind: Literal["key"] = "key"
    private_key: str = Field(description="The file of the private key, mode 0600.")
    public_key: str = Field(description="The file of the public key, to be given away.")
    key_sha256: str
